//! Requests that wait for the end of a claim, on whatever node it is held.
//!
//! While somebody waits, one task of the storage listens (`LISTEN`) on a connection of its own. A waiter first joins, *then* looks at
//! the key and leaves a mark in its row, so that the statement that ends the claim notifies. A notification can get lost, and a holder
//! that died sends none, so waiters also poll: at a growing, jittered pace, and when the lease is over. The waiters of a key share its
//! notifications and its polls.
//!
//! Whether notifications arrive is tried: the task notifies itself. Behind a proxy that pools transactions that notification does not arrive; then, and
//! while the connection is lost, waiters only poll, more often.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::{Either, select};
use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::sync::{Notify, futures::OwnedNotified};

use super::{
    link::{Link, Protocol, Value, jittered},
    row::{column, milliseconds},
};
use crate::{EncodedKey, StorageError, StorageErrorKind};

/// The first and the longest pause between two polls of a key, with notifications and without.
const NOTIFIED: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
const POLLED: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];

/// How long the first look is put off until notifications arrive, so that one look is enough.
const PUT_OFF: Duration = Duration::from_millis(300);

/// How long a look may take before another waiter looks.
const LATE: Duration = Duration::from_secs(1);

/// How long the task and its connection outlive the last waiter: the next duplicate often comes soon.
const IDLE: Duration = Duration::from_secs(5);

/// How long the notification may take that the task sends to itself.
const HELLO: Duration = Duration::from_secs(10);

/// The first pause before the connection is tried again, the longest, and the one when notifications do not arrive.
const RECONNECT: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
const UNCONFIRMED: Duration = Duration::from_secs(60);

/// The keys with waiters of a storage and its clones. When it is dropped the task ends.
pub(super) struct Waiting(Arc<Shared>);

/// The part that the task shares.
struct Shared {
    link: Link,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State>,
    /// There is something new for the task.
    news: Notify,
    /// Whether notifications arrive has changed.
    changed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    /// The storage is dropped, so there are no more waiters.
    is_over: bool,
    slots: HashMap<EncodedKey, Slot>,
    listening: Listening,
    /// A claim ended, and no notification came.
    is_suspect: bool,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Listening {
    /// There is no task.
    #[default]
    Stopped,
    Connecting,
    /// Notifications arrive.
    Confirmed,
    /// The connection is lost, or notifications do not arrive.
    Failed,
}

/// A key that has waiters.
struct Slot {
    waiting: usize,
    ended: Arc<Notify>,
    /// There is a new pause.
    looked: Arc<Notify>,
    /// How many looks were begun, and the number of the last one that ended.
    begun: u64,
    done: u64,
    /// When the look under way was begun.
    looking: Option<Duration>,
    next: Duration,
    pause: Duration,
    /// How many waiters are woken when the key is found free.
    wakes: usize,
    /// How often it could not be looked at, and why, the last time.
    failures: u64,
    failure: Option<StorageErrorKind>,
}

/// What a waiter does next.
enum Turn {
    Look(u64),
    Pause(Duration, OwnedNotified),
}

/// What is under a key.
enum Seen {
    Free,
    Completed,
    /// What is left of the lease, and whether its end will be notified.
    Claimed(Duration, bool),
    /// A transaction holds the key, whose end is not notified.
    InTransaction,
}

impl Waiting {
    pub(super) fn new(link: Link) -> Self {
        Self(Arc::new(Shared {
            link,
            state: Mutex::default(),
            news: Notify::new(),
            changed: Arc::default(),
        }))
    }

    /// Returns when the claim of `key` has ended, or perhaps has, or when `timeout` is over.
    pub(super) async fn wait(
        &self,
        key: &EncodedKey,
        timeout: Duration,
    ) -> Result<(), StorageError> {
        if timeout.is_zero() {
            return Ok(());
        }
        self.0.wait(key, timeout).await
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.state().is_over = true;
        self.0.news.notify_one();
    }
}

impl Shared {
    async fn wait(
        self: &Arc<Self>,
        key: &EncodedKey,
        timeout: Duration,
    ) -> Result<(), StorageError> {
        let env = &self.link.env;
        let deadline = env.now().saturating_add(timeout);
        let (waiter, ended, first) = self.join(key);
        // Dropped before `waiter`, so that an unused permit is passed on while the other waiters are still registered.
        let mut ended = Box::pin(ended);
        self.until_listening(timeout.min(PUT_OFF)).await;
        loop {
            let left = deadline.saturating_sub(env.now());
            if left.is_zero() {
                return waiter.result();
            }
            match self.turn(key, first) {
                Turn::Look(number) => {
                    if waiter.look(number, first).await? {
                        return Ok(());
                    }
                }
                Turn::Pause(pause, looked) => {
                    let sleep = pin!(env.sleep(pause.min(left)));
                    let looked = pin!(looked);
                    let pause = pin!(select(sleep, looked));
                    if let Either::Left(_) = select(ended.as_mut(), pause).await {
                        return waiter.result();
                    }
                }
            }
        }
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A waiter, what wakes it, and the number of the first look that sees what it must see.
    fn join<'a>(self: &'a Arc<Self>, key: &'a EncodedKey) -> (Waiter<'a>, OwnedNotified, u64) {
        let mut state = self.state();
        let slot = state.slots.entry(*key).or_insert_with(Slot::new);
        slot.waiting += 1;
        // Made under the lock: it receives every permit from here on, polled or not.
        let ended = slot.ended.clone().notified_owned();
        let first = slot.begun + 1;
        let waiter = Waiter {
            shared: self,
            key,
            failures: slot.failures,
        };
        self.see_to_the_task(&mut state);
        (waiter, ended, first)
    }

    /// Starts the task if there is none. It runs in the background, where nothing blocks it.
    fn see_to_the_task(self: &Arc<Self>, state: &mut State) {
        if state.listening != Listening::Stopped || self.link.protocol == Protocol::Simple {
            return;
        }
        let Some(spawner) = self.link.env.background() else {
            return;
        };
        state.listening = Listening::Connecting;
        spawner.spawn(
            ListenTask {
                shared: self.clone(),
                has_stopped: false,
            }
            .run(),
        );
    }

    async fn until_listening(&self, limit: Duration) {
        let changed = self.changed.clone().notified_owned();
        if self.state().listening == Listening::Connecting {
            self.link.env.within(limit, changed).await;
        }
    }

    fn turn(self: &Arc<Self>, key: &EncodedKey, first: u64) -> Turn {
        let now = self.link.env.now();
        let mut state = self.state();
        self.see_to_the_task(&mut state);
        // It is there as long as its waiters are.
        let slot = state.slots.entry(*key).or_insert_with(Slot::new);
        let is_looked_at = slot
            .looking
            .is_some_and(|since| now.saturating_sub(since) < LATE);
        let pause = match is_looked_at {
            true => LATE,
            false if slot.done < first => Duration::ZERO,
            false => slot.next.saturating_sub(now),
        };
        if !pause.is_zero() {
            return Turn::Pause(pause, slot.looked.clone().notified_owned());
        }
        slot.begun += 1;
        slot.looking = Some(now);
        Turn::Look(slot.begun)
    }

    async fn see(&self, key: &EncodedKey, is_marked: bool) -> Result<Seen, StorageError> {
        let statements = self.link.statements()?;
        let statement = match is_marked {
            true => &statements.mark,
            false => &statements.look,
        };
        let values = [Value::Bytes(key.as_bytes())];
        let rows = self.link.run(statement, &values).await?;
        let Some(row) = rows.first() else {
            return Ok(Seen::Free);
        };
        if column(row, "is_completed")? {
            return Ok(Seen::Completed);
        }
        match column::<Option<i64>>(row, "lease_left")? {
            Some(left) => Ok(Seen::Claimed(milliseconds(left), column(row, "is_marked")?)),
            None => Ok(Seen::InTransaction),
        }
    }

    fn notified(&self, payload: &str) {
        let Some((whom, key)) = payload.split_once(' ') else {
            return;
        };
        let Ok(key) = key.parse::<EncodedKey>() else {
            return;
        };
        let now = self.link.env.now();
        let mut state = self.state();
        let Some(slot) = state.slots.get_mut(&key) else {
            return;
        };
        if whom == "all" {
            slot.ended.notify_waiters();
            return;
        }
        slot.ended.notify_one();
        slot.wakes = 1;
        // By then the woken waiter has claimed the key, or others are woken. The new claim needs a mark.
        slot.look_at(now.saturating_add(POLLED[0]));
    }

    /// From here on, notifications arrive or don't. What came before may be missed.
    fn set_listening(&self, listening: Listening) {
        let now = self.link.env.now();
        let mut state = self.state();
        state.listening = listening;
        state.is_suspect = false;
        for slot in state.slots.values_mut() {
            slot.pause = Duration::ZERO;
            slot.look_at(now);
        }
        drop(state);
        self.changed.notify_waiters();
    }
}

impl Slot {
    fn new() -> Self {
        Self {
            waiting: 0,
            ended: Arc::default(),
            looked: Arc::default(),
            begun: 0,
            done: 0,
            looking: None,
            next: Duration::ZERO,
            pause: Duration::ZERO,
            wakes: 1,
            failures: 0,
            failure: None,
        }
    }

    /// Sees to it that the next look is no later than `at`.
    fn look_at(&mut self, at: Duration) {
        self.next = self.next.min(at);
        self.looked.notify_waiters();
    }
}

/// One waiter.
struct Waiter<'a> {
    shared: &'a Arc<Shared>,
    key: &'a EncodedKey,
    failures: u64,
}

impl Waiter<'_> {
    /// Looks for all waiters of the key. Says whether this one has waited long enough.
    async fn look(&self, number: u64, first: u64) -> Result<bool, StorageError> {
        let shared = self.shared;
        let is_listening = shared.state().listening == Listening::Confirmed;
        let look = Look {
            shared,
            key: self.key,
            number,
        };
        let seen = shared.see(self.key, is_listening).await;

        let env = &shared.link.env;
        let now = env.now();
        let mut state = shared.state();
        let is_connecting = state.listening == Listening::Connecting;
        let [shortest, longest] = if is_listening { NOTIFIED } else { POLLED };
        let Some(slot) = state.slots.get_mut(self.key) else {
            return Ok(true);
        };
        slot.done = slot.done.max(number);
        let mut is_missed = false;
        let result = match seen {
            Ok(Seen::Claimed(left, is_marked)) => {
                slot.wakes = 1;
                slot.pause = (slot.pause * 2).clamp(shortest, longest);
                // A little later than the end of the lease.
                let left = left.saturating_add(Duration::from_millis(2));
                let pause = jittered(env, slot.pause).min(left);
                let pause = if is_marked { pause } else { Duration::ZERO };
                slot.next = now.saturating_add(pause);
                Ok(false)
            }
            Ok(Seen::InTransaction) => {
                slot.wakes = 1;
                let [shortest, longest] = POLLED;
                slot.pause = (slot.pause * 2).clamp(shortest, longest);
                slot.next = now.saturating_add(jittered(env, slot.pause));
                Ok(false)
            }
            Ok(Seen::Free) => {
                // For this one, who ends what it begins or passes the wake on. If it is free still, soon after, that one did not
                // want it, and then it is for two, and so on.
                for _ in 1..slot.wakes.min(slot.waiting) {
                    slot.ended.notify_one();
                }
                slot.wakes = slot.wakes.saturating_mul(2);
                slot.next = now.saturating_add(POLLED[0]);
                Ok(true)
            }
            Ok(Seen::Completed) => {
                // A record is for all waiters.
                slot.ended.notify_waiters();
                is_missed = is_listening && number > first;
                Ok(true)
            }
            Err(error) => {
                slot.failures += 1;
                slot.failure = Some(error.kind());
                slot.next = now.saturating_add(longest);
                slot.ended.notify_waiters();
                Err(error)
            }
        };
        if is_missed && !is_connecting {
            state.is_suspect = true;
        }
        drop(state);
        drop(look);
        if is_missed {
            shared.news.notify_one();
        }
        result
    }

    fn result(&self) -> Result<(), StorageError> {
        match self.shared.state().slots.get(self.key) {
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
        let mut state = self.shared.state();
        let Some(slot) = state.slots.get_mut(self.key) else {
            return;
        };
        slot.waiting -= 1;
        if slot.waiting == 0 {
            state.slots.remove(self.key);
        }
    }
}

/// A look under way. When it ends or is dropped, the others go on.
struct Look<'a> {
    shared: &'a Arc<Shared>,
    key: &'a EncodedKey,
    number: u64,
}

impl Drop for Look<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.shared.state().slots.get_mut(self.key) {
            if slot.begun == self.number {
                slot.looking = None;
            }
            slot.looked.notify_waiters();
        }
    }
}

/// The one task that holds the listening connection.
struct ListenTask {
    shared: Arc<Shared>,
    has_stopped: bool,
}

/// Why it does not listen any more.
enum End {
    /// Nobody waits.
    Idle,
    Lost,
    /// The notification that it sent to itself did not arrive.
    Unconfirmed,
}

impl ListenTask {
    async fn run(mut self) {
        let shared = self.shared.clone();
        let mut backoff = RECONNECT[0];
        loop {
            let end = self.listen(&mut backoff).await;
            let mut pause = match end {
                Ok(End::Idle) => return,
                Ok(End::Unconfirmed) => {
                    tracing::warn!(
                        target: "idempotency",
                        "PostgreSQL's notifications do not arrive, so duplicates look for the answer instead of being told; a proxy that pools transactions is the usual cause: call `.transaction_pooling()`, or connect without it"
                    );
                    UNCONFIRMED
                }
                Ok(End::Lost) => backoff,
                Err(error) => {
                    tracing::debug!(target: "idempotency", %error, source = ?std::error::Error::source(&error), "no connection to listen on");
                    backoff
                }
            };
            backoff = (backoff * 2).min(RECONNECT[1]);
            shared.set_listening(Listening::Failed);
            while !pause.is_zero() {
                if self.stops_if_idle() {
                    return;
                }
                let step = pause.min(IDLE);
                shared.link.env.sleep(step).await;
                pause -= step;
            }
        }
    }

    /// Connects, and passes notifications on until none come any more.
    async fn listen(&mut self, backoff: &mut Duration) -> Result<End, StorageError> {
        let shared = self.shared.clone();
        let Shared { link, news, .. } = &*shared;
        let env = &link.env;
        let statements = link.statements()?;
        let rows = link.run(&statements.channel, &[]).await?;
        let Some(row) = rows.first() else {
            return Ok(End::Lost);
        };
        let channel: String = column(row, "?column?")?;

        // A connection of its own: those of the pool are for statements.
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .acquire_timeout(HELLO)
            .connect_lazy_with(link.connect_options());
        let connected = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.eager_reconnect(false);
            listener.listen(&channel).await?;
            Ok::<_, sqlx::Error>(listener)
        };
        let mut listener = match env.within(HELLO, connected).await {
            Some(Ok(listener)) => listener,
            Some(Err(error)) => return Err(super::error::into_storage_error(error)),
            None => return Err(StorageError::timeout()),
        };
        let mut nonce = [0; 16];
        env.fill_random(&mut nonce);
        link.run(&statements.hello, &[Value::Bytes(&nonce)]).await?;
        let hello = EncodedNonce(nonce).to_string();
        let heard = async {
            loop {
                match listener.try_recv().await {
                    Ok(Some(notification)) if notification.payload() == hello => return true,
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return false,
                }
            }
        };
        match env.within(HELLO, heard).await {
            Some(true) => {}
            Some(false) => return Ok(End::Lost),
            None => return Ok(End::Unconfirmed),
        }
        *backoff = RECONNECT[0];
        self.shared.set_listening(Listening::Confirmed);

        let mut idle_since = None;
        loop {
            let mut received = pin!(listener.try_recv());
            let notification = loop {
                let sleep = pin!(env.sleep(IDLE / 2));
                let told = pin!(news.notified());
                let other = select(told, sleep);
                match select(received.as_mut(), other).await {
                    Either::Left((notification, _)) => break notification,
                    Either::Right(_) => {
                        let now = env.now();
                        let state = self.shared.state();
                        let (is_over, is_idle) = (state.is_over, state.slots.is_empty());
                        drop(state);
                        idle_since = match idle_since {
                            _ if !is_idle => None,
                            None => Some(now),
                            since => since,
                        };
                        let is_late =
                            idle_since.is_some_and(|since| now.saturating_sub(since) >= IDLE);
                        if (is_over || is_late) && self.stops_if_idle() {
                            return Ok(End::Idle);
                        }
                        if self.shared.state().is_suspect {
                            return Ok(End::Lost);
                        }
                    }
                }
            };
            match notification {
                Ok(Some(notification)) => self.shared.notified(notification.payload()),
                Ok(None) | Err(_) => return Ok(End::Lost),
            }
        }
    }

    /// Whether nobody waits; then there is no task from here on.
    fn stops_if_idle(&mut self) -> bool {
        let mut state = self.shared.state();
        if !state.is_over && !state.slots.is_empty() {
            return false;
        }
        state.listening = Listening::Stopped;
        drop(state);
        self.has_stopped = true;
        true
    }
}

impl Drop for ListenTask {
    /// Its runtime may have ended before it did. The next waiter starts another task.
    fn drop(&mut self) {
        if !self.has_stopped {
            self.shared.set_listening(Listening::Stopped);
        }
    }
}

struct EncodedNonce([u8; 16]);

impl std::fmt::Display for EncodedNonce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("hello ")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
