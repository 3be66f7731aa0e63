//! Requests that wait for the end of a claim, on whatever node it is held.
//!
//! One task per storage holds the subscribed connection and lives as long as there are waiters. For each key with a waiter it
//! subscribes to the channel of the key *first* and reads the key *then*, so it misses no end in between. From then on Redis sends a
//! message. A message can get lost, and a holder that died sends none, so the task also polls: at a growing, jittered pace, and when
//! the lease is over. All waiters of a key share its messages and its polls.
//!
//! Without a subscription (no connection, or no right to the channel) the task only polls, more often.
//!
//! The task runs on the runtime of the first waiter. If that runtime is blocked or gone, another waiter starts a new task on its own.

use std::{
    collections::{BTreeSet, HashMap},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio::sync::{Notify, futures::OwnedNotified};

use self::task::WaitTask;
use super::link::Link;
use crate::{Env, StorageError, StorageErrorKind};

mod source;
mod task;

pub(super) use self::source::{NotifySource, subscribing};

/// How long a subscription outlives its last waiter: the next duplicate often comes soon.
const LINGER: Duration = Duration::from_secs(2);

/// How often a waiter checks that the task runs, and how late the task may be.
const LATE: Duration = Duration::from_secs(1);

/// The keys with waiters of a storage and its clones. When it is dropped the task ends.
pub(super) struct Subscriber(Arc<Shared>);

/// The part that the task shares.
struct Shared {
    link: Link,
    source: NotifySource,
    env: Env,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State>,
    /// There is something new for the task.
    news: Notify,
}

#[derive(Default)]
struct State {
    /// The storage is dropped, so there are no more waiters.
    is_over: bool,
    slots: HashMap<String, Slot>,
    /// When the task is to attend to which key.
    due: BTreeSet<(Duration, String)>,
    /// The number of the task, if there is one.
    task: Option<u64>,
    /// How many there were.
    tasks: u64,
    /// When the task ran last.
    task_seen: Duration,
}

/// A key that has waiters, or had some a moment ago.
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
    /// Something changed since the last poll: a waiter came, or the subscription was confirmed.
    is_stale: bool,
    /// A poll is due, but is put off for the subscription.
    is_put_off: bool,
    /// How many waiters are woken when the key is found free.
    wakes: usize,
    pause: Duration,
}

#[derive(Clone, Copy, PartialEq)]
enum Subscription {
    None,
    Asked,
    Confirmed,
}

/// One waiter.
struct Waiter<'a> {
    shared: &'a Shared,
    name: &'a str,
    failures: u64,
}

impl Subscriber {
    pub(super) fn new(link: Link, source: NotifySource) -> Self {
        Self(Arc::new(Shared {
            env: link.env.clone(),
            link,
            source,
            state: Mutex::default(),
            news: Notify::new(),
        }))
    }

    pub(super) fn source(&self) -> &NotifySource {
        &self.0.source
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
        // Dropped before `waiter`, so that an unused permit is passed on while the other waiters are still registered.
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
        // Made under the lock: it receives every permit from here on, polled or not.
        let ended = slot.ended.clone().notified_owned();
        let waiter = Waiter {
            shared: self,
            name,
            failures: slot.failures,
        };
        // If the task is late, it is late for this waiter too.
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
        if state.task.is_some() && !state.is_late(now) {
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
        state.tasks += 1;
        let number = state.tasks;
        (state.task, state.task_seen) = (Some(number), now);
        drop(state);
        // The late task must not consume notifications from here on.
        self.news.notify_waiters();
        // A runtime that shuts down drops the task at once, and its `Drop` resets the state.
        spawner.spawn(WaitTask::new(self.clone(), number).run());
        Ok(())
    }
}

impl Waiter<'_> {
    /// The result of the wait.
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
        // Drops an unconsumed permit, so that a later waiter does not get it.
        slot.ended = Arc::default();
        state.attend(self.name, now.saturating_add(LINGER));
        drop(state);
        self.shared.news.notify_one();
    }
}

impl State {
    /// Schedules the key `name` for `at`, and for no earlier time.
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

    /// Whether work was due a while ago and no task has done it.
    fn is_late(&self, now: Duration) -> bool {
        let due = self.due.first();
        let since = due.map(|(at, _)| self.task_seen.max(*at));
        since.is_some_and(|since| now.saturating_sub(since) > LATE)
    }

    /// All subscriptions are lost. All keys with waiters are due.
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
