//! Who waits for the end of a claim, wherever it is held.
//!
//! One task per storage, which lives while somebody waits, has the one connection that is subscribed. For a key that somebody
//! waits for it subscribes to the channel of the key *first* and looks at the key *then*, so an end in between is not missed. From
//! then on it is told; it looks again at a growing, jittered pace all the same, and when the lease is over, because a message is a
//! hint that may get lost and a holder that died sends none. All who wait for one key share what it hears and sees.
//!
//! Without a subscription (no connection for it, no right to the channel) it only looks, at a faster pace.
//!
//! The task runs on the runtime of the first who waits. If that one is blocked or gone, the others start another task on theirs.

use std::{
    collections::{BTreeSet, HashMap},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio::sync::{Notify, futures::OwnedNotified};

use self::attendant::Attendant;
use super::link::Link;
use crate::{Env, StorageError, StorageErrorKind};

mod attendant;
mod teller;

pub(super) use self::teller::{Tellers, subscribing};

/// How long a subscription outlives the last who waited: the next duplicate often comes soon.
const LINGER: Duration = Duration::from_secs(2);

/// How often those who wait see to it that the task runs, and how late it may be.
const LATE: Duration = Duration::from_secs(1);

/// The keys that are waited for through a storage and its clones. With it goes the task.
pub(super) struct Subscriber(Arc<Shared>);

/// What the task has of it too.
struct Shared {
    link: Link,
    tellers: Tellers,
    env: Env,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State>,
    /// There is something new for the task.
    news: Notify,
}

#[derive(Default)]
struct State {
    /// Nobody can wait any more.
    is_over: bool,
    slots: HashMap<String, Slot>,
    /// When the task is to attend to which key.
    due: BTreeSet<(Duration, String)>,
    /// The number of the task, if there is one.
    attendant: Option<u64>,
    /// How many there were.
    attendants: u64,
    /// When the task ran last.
    attended: Duration,
}

/// A key that somebody waits for, or did a moment ago.
struct Slot {
    waiting: usize,
    ended: Arc<Notify>,
    /// How often it could not be looked at.
    failures: u64,
    /// Why, the last time.
    failure: Option<StorageErrorKind>,
    due: Option<Duration>,
    subscription: Subscription,
    is_looked_at: bool,
    /// Something has happened since it was last looked at: somebody came, or it is heard of now.
    is_stale: bool,
    /// It was to be looked at, which waits a little for the subscription.
    is_put_off: bool,
    /// How many are woken when it is found free.
    wakes: usize,
    pause: Duration,
}

#[derive(Clone, Copy, PartialEq)]
enum Subscription {
    None,
    Asked,
    Confirmed,
}

/// One who waits.
struct Waiter<'a> {
    shared: &'a Shared,
    name: &'a str,
    failures: u64,
}

impl Subscriber {
    pub(super) fn new(link: Link, tellers: Tellers) -> Self {
        Self(Arc::new(Shared {
            env: link.env.clone(),
            link,
            tellers,
            state: Mutex::default(),
            news: Notify::new(),
        }))
    }

    pub(super) fn tellers(&self) -> &Tellers {
        &self.0.tellers
    }

    /// Returns when the claim of the key `name` has ended, or perhaps has, or when `timeout` is over.
    pub(super) async fn wait(&self, name: &str, timeout: Duration) -> Result<(), StorageError> {
        self.0.wait(name, timeout).await
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.0.state().is_over = true;
        self.0.news.notify_one();
    }
}

impl Shared {
    async fn wait(self: &Arc<Self>, name: &str, timeout: Duration) -> Result<(), StorageError> {
        if timeout.is_zero() {
            return Ok(());
        }
        let deadline = self.env.now().saturating_add(timeout);
        let (waiter, ended) = self.join(name)?;
        // Dropped before `waiter`: a wake that it was given is passed on while the others can still be found.
        let mut ended = Box::pin(ended);
        loop {
            let left = deadline.saturating_sub(self.env.now());
            let sleep = pin!(self.env.sleep(left.min(LATE)));
            match select(ended.as_mut(), sleep).await {
                Either::Right(_) if left > LATE => self.see_to_the_task(self.state())?,
                _ => break,
            }
        }
        drop(ended);
        waiter.result()
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join<'a>(
        self: &'a Arc<Self>,
        name: &'a str,
    ) -> Result<(Waiter<'a>, OwnedNotified), StorageError> {
        let now = self.env.now();
        let mut state = self.state();
        let slot = state.slots.entry(name.to_owned()).or_insert_with(Slot::new);
        slot.waiting += 1;
        slot.is_stale = true;
        // Told of all that happens from here on, polled or not.
        let ended = slot.ended.clone().notified_owned();
        let waiter = Waiter {
            shared: self,
            name,
            failures: slot.failures,
        };
        // Where the task is late, it is late for this one too.
        let at = slot.due.map_or(now, |at| at.min(now));
        state.attend(name, at);
        self.see_to_the_task(state)?;
        self.news.notify_one();
        Ok((waiter, ended))
    }

    /// Starts the task if there is none, or if its runtime has not let it run for a while.
    fn see_to_the_task(
        self: &Arc<Self>,
        mut state: MutexGuard<'_, State>,
    ) -> Result<(), StorageError> {
        let now = self.env.now();
        if state.attendant.is_some() && !state.is_late(now) {
            return Ok(());
        }
        let Some(spawner) = self.env.spawner() else {
            return Err(StorageError::unavailable(
                "there is no tokio runtime to wait on",
            ));
        };
        state.deaf(now);
        for slot in state.slots.values_mut() {
            slot.is_looked_at = false;
        }
        state.attendants += 1;
        let number = state.attendants;
        (state.attendant, state.attended) = (Some(number), now);
        drop(state);
        // What is news from here on is not for the one that is late.
        self.news.notify_waiters();
        // A runtime that shuts down drops the task at once, which then sees to the state.
        spawner.spawn(Attendant::new(self.clone(), number).run());
        Ok(())
    }
}

impl Waiter<'_> {
    /// What came of it.
    fn result(&self) -> Result<(), StorageError> {
        match self.shared.state().slots.get(self.name) {
            Some(slot) if slot.failures != self.failures => Err(StorageError::new(
                slot.failure.unwrap_or(StorageErrorKind::Unavailable),
                "the key that is waited for could not be looked at",
            )),
            _ => Ok(()),
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let now = self.shared.env.now();
        let mut state = self.shared.state();
        let Some(slot) = state.slots.get_mut(self.name) else {
            return;
        };
        slot.waiting -= 1;
        if slot.waiting > 0 {
            return;
        }
        // A wake that nobody took is not for who comes next.
        slot.ended = Arc::default();
        state.attend(self.name, now.saturating_add(LINGER));
        drop(state);
        self.shared.news.notify_one();
    }
}

impl State {
    /// Attends to the key `name` at `at`, and not before.
    fn attend(&mut self, name: &str, at: Duration) {
        let Some(slot) = self.slots.get_mut(name) else {
            return;
        };
        if let Some(before) = slot.due.replace(at) {
            self.due.remove(&(before, name.to_owned()));
        }
        self.due.insert((at, name.to_owned()));
    }

    fn next_due(&mut self, now: Duration) -> Option<String> {
        match self.due.first() {
            Some((at, _)) if *at <= now => {}
            _ => return None,
        }
        let (_, name) = self.due.pop_first()?;
        if let Some(slot) = self.slots.get_mut(&name) {
            slot.due = None;
        }
        Some(name)
    }

    /// Whether something was due a while ago and nobody has attended to it.
    fn is_late(&self, now: Duration) -> bool {
        let due = self.due.first();
        let since = due.map(|(at, _)| self.attended.max(*at));
        since.is_some_and(|since| now.saturating_sub(since) > LATE)
    }

    /// No subscription is left. All that are waited for are due.
    fn deaf(&mut self, now: Duration) {
        let mut waited_for = Vec::new();
        for (name, slot) in &mut self.slots {
            slot.subscription = Subscription::None;
            slot.pause = Duration::ZERO;
            slot.is_stale = true;
            slot.is_put_off = false;
            if slot.waiting > 0 {
                waited_for.push(name.clone());
            }
        }
        for name in waited_for {
            self.attend(&name, now);
        }
    }
}

impl Slot {
    fn new() -> Self {
        Self {
            waiting: 0,
            ended: Arc::default(),
            failures: 0,
            failure: None,
            due: None,
            subscription: Subscription::None,
            is_looked_at: false,
            is_stale: false,
            is_put_off: false,
            wakes: 1,
            pause: Duration::ZERO,
        }
    }
}
