//! Requests that wait for the end of a claim, whoever holds it: in Redis, PostgreSQL and SQLite.
//!
//! All waiters of a key share one wait. A notification wakes one of them if the key is free, and all if it has a record. A
//! notification can get lost, and a holder that died sends none, so waiters also poll: at a growing, jittered pace, and when the lease
//! is over. One waiter at a time polls for all; when it leaves, the next one continues. No task polls, so a key without waiters is left
//! alone.
//!
//! Notifications come from a [`Source`]. While somebody waits, one task of the storage listens to it. A waiter joins *first*, the task
//! subscribes *then*, and the key is looked at *after that*, so no end in between is missed. Without a source, and while it is broken,
//! waiters only poll, more often.

use std::{
    collections::HashMap,
    future::pending,
    mem,
    ops::ControlFlow,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use futures_util::future::{BoxFuture, Either, select};
use tokio::sync::{Notify, Semaphore, futures::OwnedNotified};

use crate::{Env, StorageError, StorageErrorKind};

/// The first and the longest pause between two polls of a key, with notifications and without; SQLite has its own.
const NOTIFIED: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
pub(super) const POLLED: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];

/// How long a poll is put off until the key is subscribed to, so that one poll is enough.
const PUT_OFF: Duration = Duration::from_millis(300);

/// How many polls may be under way. If the server is far away or busy, it would not answer more of them in time.
const LOOKS: usize = 256;

/// How often a waiter checks that its key is polled, and how late a poll may be.
const LATE: Duration = Duration::from_secs(1);

/// The first pause before a source is tried again, the longest, and the one after [`Silence::Refused`].
const RECONNECT: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
const REFUSED: Duration = Duration::from_secs(60);

/// Where notifications of ended claims come from.
pub(super) trait Source: Send + Sync + 'static {
    /// Connects, subscribes to the [changes](WaitTable::changes) of `waits`, and passes notifications on until none come any more.
    fn listen<'a>(&'a self, waits: &'a WaitTable) -> BoxFuture<'a, Silence>;
}

/// Why there are no notifications.
pub(super) enum Silence {
    /// There are no more [changes](WaitTable::changes).
    Deserted,
    /// The connection can't be made, or is lost.
    Lost,
    /// The server sends none. Another attempt would soon be of no use.
    Refused,
}

/// Whom the end of a claim wakes.
#[derive(Clone, Copy)]
pub(super) enum Whom {
    /// One waiter, because the key is free for one.
    One,
    /// All, because there is an answer.
    All,
}

/// What a look finds under a key.
pub(super) enum Seen {
    Free,
    Completed,
    /// A claim, and the rest of its lease. Its end is notified if the key is subscribed to.
    Claimed(Duration),
    /// A claim whose end is not notified.
    Unnotified,
}

/// The waits of a storage and its clones. When it is dropped, nobody listens any more.
pub(super) struct Waits {
    pub(super) table: Arc<WaitTable>,
}

/// What waiters and the listening task share.
pub(super) struct WaitTable {
    env: Env,
    polled: [Duration; 2],
    source: Option<Box<dyn Source>>,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State>,
    looks: Semaphore,
    /// There are keys to subscribe to or to unsubscribe from, or the storage is dropped.
    changed: Notify,
    /// A claim ended, and no notification came.
    suspected: Notify,
}

#[derive(Default)]
struct State {
    /// By the name of the key.
    waits: HashMap<String, Wait>,
    /// The listening task has the other end. It may be dropped with its runtime.
    listener: Weak<()>,
    /// Keys that got or lost their wait since the source was told, if there is one.
    changed: Option<Vec<String>>,
    /// When the next listening task may start, and the pause before it: zero unless the last one failed.
    retry_at: Duration,
    backoff: Duration,
    /// When the last notification came.
    heard_at: Duration,
    /// The storage is dropped.
    is_over: bool,
}

/// The wait of a key: it has at least one waiter.
#[derive(Default)]
struct Wait {
    waiters: usize,
    signals: Arc<Signals>,
    /// When the next poll is due.
    due: Duration,
    pause: Duration,
    /// Something happened after the last poll began, so that the next one is due at once.
    is_asked: bool,
    /// Whether the key is subscribed to.
    is_subscribed: bool,
    /// The last poll found a claim whose end is notified.
    is_promised: bool,
    /// How many other waiters are woken when one finds the key free.
    others: usize,
}

#[derive(Default)]
struct Signals {
    /// Wakes waiters.
    ended: Arc<Notify>,
    /// Why the wait ended, if a poll failed.
    failure: OnceLock<StorageErrorKind>,
    /// Its holder polls. `tokio`'s lock is fair, and passes from a waiter that is dropped to the next.
    turn: tokio::sync::Mutex<()>,
    /// The next poll is due earlier.
    sooner: Notify,
}

impl Waits {
    /// `polled`: the first and the longest pause between two polls without notifications.
    pub(super) fn new(env: Env, polled: [Duration; 2], source: Option<Box<dyn Source>>) -> Self {
        let table = Arc::new(WaitTable {
            env,
            polled,
            source,
            state: Mutex::default(),
            looks: Semaphore::new(LOOKS),
            changed: Notify::new(),
            suspected: Notify::new(),
        });
        Self { table }
    }

    /// Returns when the claim of the key `name` has ended, or perhaps has, or when `timeout` is over. `look` reads the key; it is told
    /// whether the key is subscribed to.
    pub(super) async fn wait<F>(
        &self,
        name: &str,
        timeout: Duration,
        look: impl Fn(bool) -> F + Send + Sync,
    ) -> Result<(), StorageError>
    where
        F: Future<Output = Result<Seen, StorageError>> + Send,
    {
        if timeout.is_zero() {
            return Ok(());
        }
        let env = &self.table.env;
        if env.spawner().is_none() {
            let error = "there is no tokio runtime to wait on";
            return Err(StorageError::unavailable(error));
        }
        let (waiter, ended) = self.join(name);
        let polls = pin!(async {
            loop {
                let turn = env.within(LATE, waiter.signals.turn.lock()).await;
                if turn.is_none() && !waiter.takes_over() {
                    continue;
                }
                self.see_to_the_listener(&mut self.table.state());
                if let ControlFlow::Break(result) = waiter.poll(&look).await {
                    return result;
                }
            }
        });
        let timeout = pin!(env.sleep(timeout));
        // Dropped with an unused permit, `ended` passes it on.
        match select(pin!(ended), select(polls, timeout)).await {
            Either::Right((Either::Left((result, _)), _)) => result,
            _ => waiter.result(),
        }
    }

    /// A waiter, and what wakes it.
    fn join<'a>(&'a self, name: &'a str) -> (Waiter<'a>, OwnedNotified) {
        let table = &*self.table;
        let now = table.env.now();
        let mut state = table.state();
        self.see_to_the_listener(&mut state);
        let is_heard_soon = state.listener.strong_count() > 0 && state.backoff.is_zero();
        let wait = state.waits.entry(name.to_owned()).or_insert_with(|| Wait {
            due: Duration::MAX,
            ..Wait::default()
        });
        wait.waiters += 1;
        wait.poll_at(match is_heard_soon && !wait.is_subscribed {
            true => now.saturating_add(PUT_OFF),
            false => now,
        });
        let waiter = Waiter {
            table,
            name,
            signals: wait.signals.clone(),
        };
        // Made under the lock: it receives every permit from here on, polled or not.
        let ended = wait.signals.ended.clone().notified_owned();
        if wait.waiters == 1 {
            table.has_changed(&mut state, name);
        }
        (waiter, ended)
    }

    /// Starts the listening task if there is none. It runs in the background, where nothing blocks it.
    fn see_to_the_listener(&self, state: &mut State) {
        let table = self.table.clone();
        let is_listening = state.listener.strong_count() > 0;
        if is_listening || table.source.is_none() || state.retry_at > table.env.now() {
            return;
        }
        let Some(spawner) = table.env.background() else {
            return;
        };
        let listener = Arc::new(());
        state.listener = Arc::downgrade(&listener);
        state.changed = Some(state.waits.keys().cloned().collect());
        table.changed.notify_one();
        spawner.spawn(async move {
            table.listen().await;
            drop(listener);
        });
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.table.state().is_over = true;
        self.table.changed.notify_one();
    }
}

impl WaitTable {
    async fn listen(&self) {
        let Some(source) = &self.source else {
            return;
        };
        let suspected = pin!(self.suspected.notified());
        let silence = match select(source.listen(self), suspected).await {
            Either::Left((silence, _)) => silence,
            Either::Right(_) => Silence::Lost,
        };
        let now = self.env.now();
        let mut state = self.state();
        state.backoff = match silence {
            Silence::Deserted => return,
            Silence::Lost => (state.backoff * 2).clamp(RECONNECT[0], RECONNECT[1]),
            Silence::Refused => REFUSED,
        };
        state.retry_at = now.saturating_add(state.backoff);
        state.changed = None;
        // The last notifications may be missed.
        for wait in state.waits.values_mut() {
            wait.begin_anew(false, now);
        }
    }

    /// Keys to subscribe to, and those to unsubscribe from, since the last call; `None` if nobody has waited for `idle`, or the storage
    /// is dropped.
    pub(super) async fn changes(&self, idle: Duration) -> Option<(Vec<String>, Vec<String>)> {
        let limit = match self.state().waits.is_empty() {
            true => idle,
            false => Duration::MAX,
        };
        let changed = self.env.within(limit, self.changed.notified()).await;
        let mut state = self.state();
        if state.is_over || (changed.is_none() && state.waits.is_empty()) {
            state.listener = Weak::new();
            state.changed = None;
            return None;
        }
        let changed = state.changed.as_mut().map(mem::take).unwrap_or_default();
        let has_waiters = |name: &String| state.waits.contains_key(name);
        Some(changed.into_iter().partition(has_waiters))
    }

    /// From here on, ends of claims of these keys are notified. What came before may be missed.
    pub(super) fn subscribed(&self, names: &[String]) {
        let now = self.env.now();
        let mut state = self.state();
        state.backoff = Duration::ZERO;
        for name in names {
            if let Some(wait) = state.waits.get_mut(name) {
                wait.begin_anew(true, now);
            }
        }
    }

    /// A claim of the key `name` has ended.
    pub(super) fn notified(&self, name: &str, whom: Whom) {
        let now = self.env.now();
        let mut state = self.state();
        state.heard_at = now;
        match whom {
            Whom::All => self.end(&mut state, name, None),
            Whom::One => {
                if let Some(wait) = state.waits.get_mut(name) {
                    wait.others = 0;
                    wait.signals.ended.notify_one();
                    // By then the woken waiter has claimed the key, or others are woken.
                    wait.poll_at(now.saturating_add(self.polled[0]));
                }
            }
        }
    }

    /// Ends a wait for all its waiters. A waiter that comes later begins another one, and gets no permit of this one.
    fn end(&self, state: &mut State, name: &str, failure: Option<StorageErrorKind>) {
        let Some(wait) = state.waits.remove(name) else {
            return;
        };
        if let Some(kind) = failure {
            // Set once: the wait is out of the table.
            let _ = wait.signals.failure.set(kind);
        }
        wait.signals.ended.notify_waiters();
        self.has_changed(state, name);
    }

    /// A key got or lost its wait.
    fn has_changed(&self, state: &mut State, name: &str) {
        if let Some(changed) = &mut state.changed {
            changed.push(name.to_owned());
            self.changed.notify_one();
        }
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wait {
    /// Schedules a poll for `at` at the latest, also if one is under way.
    fn poll_at(&mut self, at: Duration) {
        self.is_asked = true;
        if at < self.due {
            self.due = at;
            self.signals.sooner.notify_one();
        }
    }

    fn begin_anew(&mut self, is_subscribed: bool, now: Duration) {
        self.is_subscribed = is_subscribed;
        self.is_promised = false;
        self.pause = Duration::ZERO;
        self.poll_at(now);
    }
}

/// One waiter.
struct Waiter<'a> {
    table: &'a WaitTable,
    name: &'a str,
    signals: Arc<Signals>,
}

impl Waiter<'_> {
    /// Whether the waiter whose turn it is to poll is late, perhaps because its runtime stands still. The others then wait for this one.
    fn takes_over(&self) -> bool {
        let now = self.table.env.now();
        let mut state = self.table.state();
        match state.wait(self) {
            Some(wait) if now.saturating_sub(wait.due) > LATE => {
                wait.due = now;
                true
            }
            _ => false,
        }
    }

    /// Looks at the key when that is due. Breaks with what this waiter is to return.
    async fn poll<F>(&self, look: impl Fn(bool) -> F) -> ControlFlow<Result<(), StorageError>>
    where
        F: Future<Output = Result<Seen, StorageError>>,
    {
        let Self { table, signals, .. } = self;
        loop {
            let now = table.env.now();
            let due = table.state().wait(self).map(|wait| wait.due);
            let Some(due) = due else {
                // The wait has ended, which this waiter is just being told.
                return pending().await;
            };
            if due <= now {
                break;
            }
            let sooner = pin!(signals.sooner.notified());
            select(sooner, pin!(table.env.sleep(due - now))).await;
        }
        // It stays due until the look has ended, because this waiter may be dropped.
        let is_subscribed = table.state().wait(self).is_some_and(|wait| {
            wait.is_asked = false;
            wait.is_subscribed
        });
        let seen = {
            let _permit = table.looks.acquire().await;
            look(is_subscribed).await
        };
        self.has_seen(seen)
    }

    /// Wakes waiters as the result of a look demands it, and schedules the next.
    fn has_seen(&self, seen: Result<Seen, StorageError>) -> ControlFlow<Result<(), StorageError>> {
        let table = self.table;
        let now = table.env.now();
        let mut state = table.state();
        let is_quiet = now.saturating_sub(state.heard_at) > LATE;
        let Some(wait) = state.wait(self) else {
            return ControlFlow::Break(self.result());
        };
        let left = match seen {
            Ok(Seen::Claimed(left)) => Some(left),
            Ok(Seen::Unnotified) => None,
            Ok(Seen::Free) => {
                // This waiter ends what it begins, or passes the wake on. If the key is still free soon after, that one did not
                // claim it, so two are woken, and so on.
                for _ in 0..wait.others {
                    wait.signals.ended.notify_one();
                }
                wait.others = (2 * wait.others + 1).min(wait.waiters);
                wait.due = now.saturating_add(table.polled[0]);
                return ControlFlow::Break(Ok(()));
            }
            Ok(Seen::Completed) => {
                if wait.is_promised && is_quiet {
                    table.suspected.notify_one();
                }
                table.end(&mut state, self.name, None);
                return ControlFlow::Break(Ok(()));
            }
            Err(error) => {
                table.end(&mut state, self.name, Some(error.kind()));
                return ControlFlow::Break(Err(error));
            }
        };
        wait.others = 0;
        wait.is_promised = wait.is_subscribed && left.is_some();
        let [first, longest] = match wait.is_promised {
            true => NOTIFIED,
            false => table.polled,
        };
        wait.pause = (wait.pause * 2).clamp(first, longest);
        // A little later than the end of the lease.
        let left = left.map_or(Duration::MAX, |left| {
            left.saturating_add(Duration::from_millis(2))
        });
        let pause = match wait.is_asked {
            true => Duration::ZERO,
            false => jittered(&table.env, wait.pause).min(left),
        };
        wait.due = now.saturating_add(pause);
        ControlFlow::Continue(())
    }

    /// The result for one that another waiter, or a notification, has woken.
    fn result(&self) -> Result<(), StorageError> {
        match self.signals.failure.get() {
            None => Ok(()),
            Some(kind) => Err(StorageError::new(
                *kind,
                "the key that is waited for could not be read",
            )),
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut state = self.table.state();
        let Some(wait) = state.wait(self) else {
            return;
        };
        wait.waiters -= 1;
        if wait.waiters == 0 {
            self.table.end(&mut state, self.name, None);
        }
    }
}

impl State {
    /// The wait of `waiter`, unless it has ended.
    fn wait(&mut self, waiter: &Waiter<'_>) -> Option<&mut Wait> {
        let wait = self.waits.get_mut(waiter.name)?;
        Arc::ptr_eq(&wait.signals, &waiter.signals).then_some(wait)
    }
}

/// `pause`, give or take a fifth.
fn jittered(env: &Env, pause: Duration) -> Duration {
    let mut random = [0];
    env.fill_random(&mut random);
    pause * 4 / 5 + pause * 2 / 5 * u32::from(random[0]) / 255
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{
        future::poll_fn,
        sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        task::Poll,
    };

    use super::*;

    const KEY: &str = "key";
    const IDLE: Duration = Duration::from_secs(5);
    const LONG: Duration = Duration::from_secs(3600);

    /// A key that has a claim until it is freed, and counts how often it was looked at.
    #[derive(Default)]
    struct Claim {
        is_free: AtomicBool,
        looks: AtomicUsize,
    }

    impl Claim {
        async fn look(&self) -> Result<Seen, StorageError> {
            self.looks.fetch_add(1, SeqCst);
            match self.is_free.load(SeqCst) {
                true => Ok(Seen::Free),
                false => Ok(Seen::Claimed(LONG)),
            }
        }
    }

    fn waits(env: &Env) -> Waits {
        Waits::new(env.clone(), POLLED, None)
    }

    async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
        // tokio lets a task do so much between two yields, and then all seems pending.
        tokio::task::yield_now().await;
        poll_fn(|context| Poll::Ready(pin!(&mut *future).poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn many_waiters_look_as_often_as_one() {
        let (env, clock) = Env::simulated(7);
        let (storage, claim) = (waits(&env), Claim::default());
        let mut waits: Vec<_> = (0..100)
            .map(|_| Box::pin(storage.wait(KEY, LONG, |_| claim.look())))
            .collect();
        for wait in &mut waits {
            assert!(is_pending(wait).await);
        }
        for _ in 0..60 {
            clock.advance(POLLED[1]);
            for wait in &mut waits {
                assert!(is_pending(wait).await);
            }
        }
        let looks = claim.looks.load(SeqCst);
        assert!((30..=70).contains(&looks), "{looks} looks in 30 s");
        drop(waits);
        assert_eq!(storage.table.state().waits.len(), 0);
    }

    #[tokio::test]
    async fn a_wake_reaches_one_waiter_that_is_left() {
        let (env, _clock) = Env::simulated(7);
        for dropped in 0..2 {
            let (storage, claim) = (waits(&env), Claim::default());
            let mut waits: Vec<_> = (0..2)
                .map(|_| Box::pin(storage.wait(KEY, LONG, |_| claim.look())))
                .collect();
            for wait in &mut waits {
                assert!(is_pending(wait).await);
            }
            claim.is_free.store(true, SeqCst);
            storage.table.notified(KEY, Whom::One);
            drop(waits.remove(dropped));
            waits.remove(0).await.unwrap();
            assert_eq!(storage.table.state().waits.len(), 0);
        }
    }

    #[tokio::test]
    async fn a_waiter_that_is_dropped_while_it_looks_is_replaced() {
        for is_woken in [false, true] {
            drop_while_it_looks(is_woken).await;
        }
    }

    /// If it was woken too, it passes the wake on.
    async fn drop_while_it_looks(is_woken: bool) {
        let (env, _clock) = Env::simulated(7);
        let (storage, claim) = (waits(&env), Claim::default());
        let looks = AtomicUsize::new(0);
        let mut first = Box::pin(storage.wait(KEY, LONG, |_| async {
            looks.fetch_add(1, SeqCst);
            pending().await
        }));
        assert!(is_pending(&mut first).await);
        let mut second = Box::pin(storage.wait(KEY, LONG, |_| claim.look()));
        assert!(is_pending(&mut second).await);
        claim.is_free.store(true, SeqCst);
        assert!(is_pending(&mut first).await);
        assert!(is_pending(&mut second).await);
        assert_eq!((looks.load(SeqCst), claim.looks.load(SeqCst)), (1, 0));
        if is_woken {
            storage.table.notified(KEY, Whom::One);
        }
        drop(first);
        second.await.unwrap();
        assert_eq!(claim.looks.load(SeqCst), usize::from(!is_woken));
    }

    #[tokio::test]
    async fn a_waiter_that_stands_still_is_overtaken() {
        let (env, clock) = Env::simulated(7);
        let (storage, claim) = (waits(&env), Claim::default());
        let mut first = Box::pin(storage.wait(KEY, LONG, |_| claim.look()));
        assert!(is_pending(&mut first).await);
        // Nobody polls the first one from here on.
        let mut second = Box::pin(storage.wait(KEY, LONG, |_| claim.look()));
        assert!(is_pending(&mut second).await);
        claim.is_free.store(true, SeqCst);
        for _ in 0..3 {
            clock.advance(LATE);
            if !is_pending(&mut second).await {
                return;
            }
        }
        panic!("no waiter looks");
    }

    #[tokio::test]
    async fn a_failed_look_ends_the_wait_of_all() {
        let (env, _clock) = Env::simulated(7);
        let storage = waits(&env);
        let is_broken = AtomicBool::new(false);
        let look = async |_| {
            while !is_broken.load(SeqCst) {
                tokio::task::yield_now().await;
            }
            Err(StorageError::timeout())
        };
        let mut waits: Vec<_> = (0..3)
            .map(|_| Box::pin(storage.wait(KEY, LONG, look)))
            .collect();
        for wait in &mut waits {
            assert!(is_pending(wait).await);
        }
        is_broken.store(true, SeqCst);
        for wait in waits {
            let error = wait.await.unwrap_err();
            assert_eq!(error.kind(), StorageErrorKind::Timeout);
        }
    }

    /// Sends what the test says.
    struct Scripted;

    impl Source for Scripted {
        fn listen<'a>(&'a self, waits: &'a WaitTable) -> BoxFuture<'a, Silence> {
            Box::pin(async {
                let key = || vec![KEY.to_owned()];
                let changes = waits.changes(IDLE).await;
                assert_eq!(changes, Some((key(), vec![])));
                waits.subscribed(&key());
                let changes = waits.changes(IDLE).await;
                assert_eq!(changes, Some((vec![], key())));
                assert_eq!(waits.changes(IDLE).await, None);
                Silence::Deserted
            })
        }
    }

    #[tokio::test]
    async fn a_subscribed_key_is_looked_at_once_and_then_seldom() {
        let (env, clock) = Env::simulated(7);
        let storage = Waits::new(env, POLLED, Some(Box::new(Scripted)));
        let is_notified = AtomicBool::new(false);
        let looks = AtomicUsize::new(0);
        let mut wait = Box::pin(storage.wait(KEY, LONG, async |notified| {
            looks.fetch_add(1, SeqCst);
            is_notified.store(notified, SeqCst);
            Ok(Seen::Claimed(LONG))
        }));
        for _ in 0..4 {
            assert!(is_pending(&mut wait).await);
        }
        clock.advance(NOTIFIED[0] / 2);
        assert!(is_pending(&mut wait).await);
        assert_eq!((looks.load(SeqCst), is_notified.load(SeqCst)), (1, true));
        storage.table.notified(KEY, Whom::All);
        wait.await.unwrap();
        // The task ends a while after the last waiter has left.
        tokio::task::yield_now().await;
        assert_eq!(storage.table.state().listener.strong_count(), 1);
        for _ in 0..4 {
            tokio::task::yield_now().await;
            clock.advance(IDLE);
        }
        tokio::task::yield_now().await;
        assert_eq!(storage.table.state().listener.strong_count(), 0);
    }

    /// Subscribes, and then sends nothing.
    #[derive(Clone, Default)]
    struct Mute(Arc<AtomicUsize>);

    impl Source for Mute {
        fn listen<'a>(&'a self, waits: &'a WaitTable) -> BoxFuture<'a, Silence> {
            Box::pin(async {
                self.0.fetch_add(1, SeqCst);
                while let Some((joined, _)) = waits.changes(IDLE).await {
                    waits.subscribed(&joined);
                }
                Silence::Deserted
            })
        }
    }

    #[tokio::test]
    async fn a_source_that_missed_an_end_is_replaced() {
        let (env, clock) = Env::simulated(7);
        clock.advance(LONG);
        let (source, is_completed) = (Mute::default(), AtomicBool::new(false));
        let storage = Waits::new(env, POLLED, Some(Box::new(source.clone())));
        let look = async |_| match is_completed.load(SeqCst) {
            true => Ok(Seen::Completed),
            false => Ok(Seen::Claimed(LONG)),
        };
        let mut wait = Box::pin(storage.wait(KEY, LONG, look));
        for _ in 0..4 {
            assert!(is_pending(&mut wait).await);
        }
        is_completed.store(true, SeqCst);
        clock.advance(NOTIFIED[1]);
        wait.await.unwrap();
        tokio::task::yield_now().await;
        clock.advance(RECONNECT[0]);
        let mut wait =
            Box::pin(storage.wait("another key", LONG, async |_| Ok(Seen::Claimed(LONG))));
        assert!(is_pending(&mut wait).await);
        tokio::task::yield_now().await;
        assert_eq!(source.0.load(SeqCst), 2);
    }
}
