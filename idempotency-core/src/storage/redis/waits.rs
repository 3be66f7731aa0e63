//! Requests that wait for the end of a claim, on whatever node it is held.
//!
//! All waiters of a key share one wait, and one of them drives it for all: it subscribes to the channel of the key *first* and reads
//! the key *then*, so it misses no end in between. From then on Redis sends a message. A message can get lost, and a holder that died
//! sends none, so the driver also polls: at a growing, jittered pace, and when the lease is over. When it leaves, the next waiter
//! continues where it stopped. There is no task: what is not polled by a waiter does not happen.
//!
//! All waits of a storage share one subscribed connection, which is closed with the last wait. Without it (no source, or no right to
//! the channel) they only poll, more often.
//!
//! A driver may stand still because its runtime is blocked. Another waiter then drives too, which costs a few commands and is
//! otherwise harmless. Messages are read by one of the drivers; if that one stands still, the others still poll.

use std::{
    collections::HashMap,
    future::pending,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::select};
use redis::{
    ErrorKind, Msg, RedisError, ServerErrorKind,
    aio::{PubSubSink, PubSubStream},
};
use tokio::sync::{Notify, OnceCell, Semaphore};

use super::{
    commands::{Commands, Mode},
    scripts,
    source::NotifySource,
};
use crate::{Env, StorageError, StorageErrorKind};

/// The first and the longest pause between two polls of a key, with a subscription and without.
const NOTIFIED: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
const POLLED: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];

/// How long a poll is put off until the subscription is confirmed, so that one poll is enough; and the pauses after that.
const SUBSCRIBING: Duration = Duration::from_millis(300);
const SOON_NOTIFIED: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];

/// How many polls may be under way. If Redis is far away or busy, it would not answer more of them in time.
const LOOKS: usize = 256;

/// How often a waiter checks that its wait is driven, and how late the driver may be.
const LATE: Duration = Duration::from_secs(1);

/// The first pause before the connection is tried again, and the longest.
const RECONNECT: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// When a channel that may not be subscribed to is tried again.
const FORBIDDEN: Duration = Duration::from_secs(60);

/// The waits of a storage and its clones.
pub(super) struct Waits {
    commands: Commands,
    source: NotifySource,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State>,
    looks: Semaphore,
}

#[derive(Default)]
struct State {
    waits: HashMap<String, Wait>,
    /// The subscribed connection, or one that is being made.
    pub_sub: Option<Arc<PubSub>>,
    /// How many connections there were.
    connections: u64,
    /// When the next connection may be made, and the pause after it if that fails.
    retry_at: Duration,
    backoff: Duration,
}

/// The wait of a key: it has at least one waiter.
struct Wait {
    waiters: usize,
    signals: Arc<Signals>,
    /// When the next poll is due.
    due: Duration,
    pause: Duration,
    is_polled: bool,
    /// Counts what may have happened after a poll began: a waiter came, or the subscription was confirmed.
    changes: u64,
    /// The number of the connection that has confirmed the subscription.
    subscribed: Option<u64>,
    /// How many waiters are woken when the key is found free.
    wakes: usize,
    /// How many polls failed.
    failures: u64,
    /// Why, the last time.
    failure: Option<StorageErrorKind>,
}

#[derive(Default)]
struct Signals {
    /// Wakes waiters.
    ended: Notify,
    /// The driver has it. `tokio`'s lock is fair, and passes from a waiter that is dropped to the next.
    turn: tokio::sync::Mutex<()>,
    /// Tells the driver that a poll is due earlier.
    due: Notify,
}

/// A connection for subscriptions.
struct PubSub {
    number: u64,
    /// How often the connection for commands had been made when this one began to open. One that was made anew since then may lead
    /// to another server.
    age: u64,
    /// `None` if it could not be opened. The driver that holds the lock reads messages for all.
    open: OnceCell<Option<(PubSubSink, tokio::sync::Mutex<PubSubStream>)>>,
}

/// Why a connection brings no messages.
enum Deaf {
    Forbidden(RedisError),
    Lost,
}

/// One waiter.
struct Waiter<'a> {
    waits: &'a Waits,
    name: &'a str,
    signals: Arc<Signals>,
    failures: u64,
}

impl Waits {
    pub(super) fn new(commands: Commands, source: NotifySource) -> Self {
        Self {
            commands,
            source,
            state: Mutex::default(),
            looks: Semaphore::new(LOOKS),
        }
    }

    pub(super) fn source(&self) -> &NotifySource {
        &self.source
    }

    /// Returns when the claim of the key `name` has ended, or perhaps has, or when `timeout` is over.
    pub(super) async fn wait(&self, name: &str, timeout: Duration) -> Result<(), StorageError> {
        if timeout.is_zero() {
            return Ok(());
        }
        if self.commands.env.spawner().is_none() {
            let error = "there is no tokio runtime to wait on";
            return Err(StorageError::unavailable(error));
        }
        let waiter = self.join(name);
        // Dropped before `waiter`, so that an unused permit is passed on while the other waiters are still registered.
        let ended = pin!(waiter.signals.ended.notified());
        let drive = pin!(async {
            let _turn = waiter.turn().await;
            Box::pin(waiter.drive()).await;
        });
        let timeout = pin!(self.commands.env.sleep(timeout));
        select(ended, select(drive, timeout)).await;
        waiter.result()
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join<'a>(&'a self, name: &'a str) -> Waiter<'a> {
        let now = self.commands.env.now();
        let mut state = self.state();
        let soon = match self.is_deaf(&state, now) {
            true => now,
            false => now.saturating_add(SUBSCRIBING),
        };
        let wait = state.waits.entry(name.to_owned()).or_insert_with(Wait::new);
        wait.waiters += 1;
        wait.poll_at(if wait.subscribed.is_some() { now } else { soon });
        Waiter {
            waits: self,
            name,
            signals: wait.signals.clone(),
            failures: wait.failures,
        }
    }

    /// Whether no subscription is to be expected soon.
    fn is_deaf(&self, state: &State, now: Duration) -> bool {
        self.source.is_none() || state.retry_at > now
    }

    /// The connection for subscriptions, which its first user opens.
    fn pub_sub(&self) -> Arc<PubSub> {
        let age = self.commands.age();
        let mut state = self.state();
        if let Some(pub_sub) = state.pub_sub.as_ref().filter(|it| it.age == age) {
            return pub_sub.clone();
        }
        state.connections += 1;
        let pub_sub = Arc::new(PubSub {
            number: state.connections,
            age,
            open: OnceCell::new(),
        });
        state.pub_sub = Some(pub_sub.clone());
        pub_sub
    }

    /// Gives up a connection, unless another driver did so before.
    fn lost(&self, pub_sub: &PubSub, retry_after: Option<Duration>) {
        let mut state = self.state();
        let current = state.pub_sub.as_ref().map(|current| current.number);
        if current == Some(pub_sub.number) {
            let backoff = state.backoff.clamp(RECONNECT[0], RECONNECT[1]);
            let pause = retry_after.unwrap_or(backoff);
            state.pub_sub = None;
            state.retry_at = self.commands.env.now().saturating_add(pause);
            state.backoff = backoff * 2;
        }
    }

    fn notified(&self, message: &Msg) {
        let mut state = self.state();
        let Some(wait) = state.waits.get_mut(message.get_channel_name()) else {
            return;
        };
        wait.wakes = 1;
        if message.get_payload_bytes() == scripts::WAKE_ALL {
            wait.signals.ended.notify_waiters();
            return;
        }
        wait.signals.ended.notify_one();
        // By then the woken waiter has claimed the key, or others are woken.
        wait.poll_at(self.commands.env.now().saturating_add(POLLED[0]));
    }
}

impl Waiter<'_> {
    /// Returns when this waiter is to drive the wait.
    async fn turn(&self) -> Option<tokio::sync::MutexGuard<'_, ()>> {
        let env = &self.waits.commands.env;
        loop {
            let turn = env.within(LATE, self.signals.turn.lock()).await;
            let now = env.now();
            // A driver that was dropped while it polled left `is_polled` behind. One that is late may stand still.
            let takes_over = self.with_wait(|wait| {
                let is_late = now.saturating_sub(wait.due) > LATE;
                let takes_over = is_late || (turn.is_some() && wait.is_polled);
                if takes_over {
                    wait.is_polled = false;
                    wait.poll_at(now);
                    wait.due = now;
                }
                takes_over
            });
            if turn.is_some() || takes_over == Some(true) {
                return turn;
            }
        }
    }

    /// Drives the wait until it is dropped.
    async fn drive(&self) {
        loop {
            let (subscribes, polls) = (pin!(self.subscribe()), pin!(self.poll()));
            select(subscribes, polls).await;
        }
    }

    /// Keeps the key subscribed, and reads messages for all keys if no other driver does.
    async fn subscribe(&self) {
        let Waits {
            source, commands, ..
        } = self.waits;
        if source.is_none() {
            return pending().await;
        }
        loop {
            let retry_at = self.waits.state().retry_at;
            let pause = retry_at.saturating_sub(commands.env.now());
            if !pause.is_zero() {
                commands.env.sleep(pause).await;
                continue;
            }
            let pub_sub = self.waits.pub_sub();
            let retry_after = match self.hear(&pub_sub).await {
                Deaf::Lost => None,
                Deaf::Forbidden(error) => {
                    tracing::warn!(
                        target: "idempotency",
                        %error,
                        "Redis allows no subscription, so duplicates poll; allow the channels that begin with the prefix"
                    );
                    Some(FORBIDDEN)
                }
            };
            self.waits.lost(&pub_sub, retry_after);
            // A message may have been lost.
            self.subscribed(None);
        }
    }

    /// Returns when `pub_sub` brings no messages for the key any more.
    async fn hear(&self, pub_sub: &PubSub) -> Deaf {
        let Waits {
            source, commands, ..
        } = self.waits;
        let open = async || {
            let (sink, stream) = source.open(commands).await?;
            Some((sink, tokio::sync::Mutex::new(stream)))
        };
        let Some((sink, stream)) = pub_sub.open.get_or_init(open).await else {
            return Deaf::Lost;
        };
        let subscribes = pin!(async {
            let number = Some(pub_sub.number);
            if self.with_wait(|wait| wait.subscribed) != Some(number) {
                let mut sink = sink.clone();
                match commands
                    .env
                    .within(commands.limit, sink.subscribe(self.name))
                    .await
                {
                    Some(Ok(())) => self.subscribed(number),
                    Some(Err(error))
                        if error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm) =>
                    {
                        return Deaf::Forbidden(error);
                    }
                    Some(Err(_)) | None => return Deaf::Lost,
                }
            }
            pending().await
        });
        let reads = pin!(async {
            let mut stream = stream.lock().await;
            while let Some(message) = stream.next().await {
                self.waits.notified(&message);
            }
            Deaf::Lost
        });
        select(reads, subscribes).await.factor_first().0
    }

    /// The subscription of the key was confirmed by this connection, or is lost. Either way the key has to be read.
    fn subscribed(&self, by: Option<u64>) {
        if by.is_some() {
            self.waits.state().backoff = Duration::ZERO;
        }
        let now = self.waits.commands.env.now();
        self.with_wait(|wait| {
            wait.subscribed = by;
            wait.pause = Duration::ZERO;
            wait.poll_at(now);
        });
    }

    /// Polls the key whenever that is due. Returns when the connection for subscriptions may lead to another server than commands.
    async fn poll(&self) {
        let Waits {
            commands, looks, ..
        } = self.waits;
        loop {
            let now = commands.env.now();
            let begins = |wait: &mut Wait| {
                if wait.due > now {
                    return Err(wait.due);
                }
                wait.is_polled = true;
                wait.due = now.saturating_add(commands.limit);
                Ok(wait.changes)
            };
            let changes = match self.with_wait(begins) {
                Some(Ok(changes)) => changes,
                Some(Err(due)) => {
                    let sleep = pin!(commands.env.sleep(due.saturating_sub(now)));
                    select(pin!(self.signals.due.notified()), sleep).await;
                    continue;
                }
                // Not while there is a waiter.
                None => return pending().await,
            };
            let looked = {
                let _permit = looks.acquire().await;
                let look = &scripts::LEASE_LEFT;
                commands.run(look, self.name, &[], Mode::ForWaiters).await
            };
            self.looked(looked, changes);
            let pub_sub = &self.waits.state().pub_sub;
            if pub_sub.as_ref().is_some_and(|it| it.age != commands.age()) {
                return;
            }
        }
    }

    /// Wakes waiters as the result of a poll demands it, and schedules the next.
    fn looked(&self, looked: Result<i64, StorageError>, changes: u64) {
        let waits = self.waits;
        let now = waits.commands.env.now();
        let mut state = waits.state();
        let connection = state.pub_sub.as_ref().map(|it| it.number);
        let is_deaf = waits.is_deaf(&state, now);
        let Some(wait) = state.waits.get_mut(self.name) else {
            return;
        };
        let [first, longest] = match wait.subscribed {
            Some(_) if wait.subscribed == connection => NOTIFIED,
            _ if is_deaf => POLLED,
            _ => SOON_NOTIFIED,
        };
        wait.is_polled = false;
        wait.pause = (wait.pause * 2).clamp(first, longest);
        let mut next = match wait.changes == changes {
            true => jittered(&waits.commands.env, wait.pause),
            false => Duration::ZERO,
        };
        match looked {
            Ok(left) if left >= 0 => {
                wait.wakes = 1;
                // A little later than its end.
                let left = Duration::from_millis(left.unsigned_abs()) + Duration::from_millis(2);
                next = next.min(left);
            }
            Ok(scripts::FREE) => {
                // One waiter is woken. It ends what it begins, or passes the wake on. If the key is still free soon after, that
                // waiter did not claim it, so two are woken, and so on.
                for _ in 0..wait.wakes.min(wait.waiters) {
                    wait.signals.ended.notify_one();
                }
                wait.wakes = wait.wakes.saturating_mul(2);
                next = POLLED[0];
            }
            // A record is for all waiters.
            Ok(_) => wait.signals.ended.notify_waiters(),
            Err(error) => {
                wait.failures += 1;
                wait.failure = Some(error.kind());
                wait.signals.ended.notify_waiters();
            }
        }
        wait.due = now.saturating_add(next);
    }

    /// The result of the wait.
    fn result(&self) -> Result<(), StorageError> {
        let failure = self.with_wait(|wait| match wait.failures == self.failures {
            true => None,
            false => wait.failure,
        });
        match failure.flatten() {
            None => Ok(()),
            Some(kind) => Err(StorageError::new(
                kind,
                "the key that is waited for could not be read",
            )),
        }
    }

    fn with_wait<T>(&self, change: impl FnOnce(&mut Wait) -> T) -> Option<T> {
        self.waits.state().waits.get_mut(self.name).map(change)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut state = self.waits.state();
        let is_last = state.waits.get_mut(self.name).is_some_and(|wait| {
            wait.waiters -= 1;
            wait.waiters == 0
        });
        if !is_last {
            return;
        }
        // With it goes an unconsumed permit, so that a later waiter does not get it.
        state.waits.remove(self.name);
        if state.waits.is_empty() {
            let closed = state.pub_sub.take();
            drop(state);
            drop(closed);
        } else if let Some(pub_sub) = &state.pub_sub
            && let Some(Some((sink, _))) = pub_sub.open.get()
        {
            // Sent by the first poll, under the lock: before the `SUBSCRIBE` of any later waiter. Nobody needs the answer.
            let _ = sink.clone().unsubscribe(self.name).now_or_never();
        }
    }
}

impl Wait {
    fn new() -> Self {
        Self {
            waiters: 0,
            signals: Arc::default(),
            due: Duration::MAX,
            pause: Duration::ZERO,
            is_polled: false,
            changes: 0,
            subscribed: None,
            wakes: 1,
            failures: 0,
            failure: None,
        }
    }

    /// Schedules a poll for `at` at the latest, also if one is under way.
    fn poll_at(&mut self, at: Duration) {
        self.changes += 1;
        if at < self.due {
            self.due = at;
            self.signals.due.notify_one();
        }
    }
}

/// `pause`, give or take a fifth.
fn jittered(env: &Env, pause: Duration) -> Duration {
    let mut random = [0];
    env.fill_random(&mut random);
    pause * 4 / 5 + pause * 2 / 5 * u32::from(random[0]) / 255
}
