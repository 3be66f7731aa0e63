//! The one task that holds the subscribed connection, and polls.

use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt as _, Stream as _, StreamExt as _,
    future::{BoxFuture, Either, select},
    stream::FuturesUnordered,
};
use redis::{
    Msg, RedisError, ServerErrorKind,
    aio::{PubSubSink, PubSubStream},
};

use super::{super::scripts, LATE, Shared, Subscription};
use crate::{Env, StorageError};

/// The first and the longest pause between two polls of a key, with a subscription and without.
const NOTIFIED: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
const POLLED: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];

/// How long a poll is put off until the subscription is confirmed, so that one poll is enough; and the pauses after that.
const ASKING: Duration = Duration::from_millis(300);
const SOON_NOTIFIED: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];

/// How many polls may be under way. If Redis is far away or busy, it would not answer more of them in time.
const LOOKS: usize = 256;

/// How long the connection outlives the last subscription.
const IDLE: Duration = Duration::from_secs(30);

/// The first pause before the connection is tried again, and the longest.
const RECONNECT: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// When a channel that may not be subscribed to is tried again.
const FORBIDDEN: Duration = Duration::from_secs(60);

/// The task.
pub(super) struct WaitTask {
    shared: Arc<Shared>,
    number: u64,
    pub_sub: PubSub,
    /// Which connection it is.
    generation: u64,
    /// How often the connection for commands had been made when it began to open. One that was made anew since then may lead to
    /// another server.
    age: u64,
    /// How long to wait before the connection is tried again, should that fail.
    backoff: Duration,
    jobs: FuturesUnordered<BoxFuture<'static, Done>>,
    /// How many of these are looks.
    looks: usize,
    idle_since: Option<Duration>,
    leaving: bool,
}

/// The connection that is subscribed.
enum PubSub {
    Closed { retry_at: Duration },
    Opening,
    Open(PubSubSink, PubSubStream),
}

/// A job that came to its end.
enum Done {
    Opened(Option<(PubSubSink, PubSubStream)>),
    /// By which connection, what, and what came of it.
    Subscribed(u64, Vec<String>, Result<(), Unheard>),
    Unsubscribed,
    Looked(String, Result<i64, StorageError>),
}

enum Unheard {
    Forbidden(RedisError),
    Lost,
}

/// What the task wakes up for.
enum Woken {
    Done(Done),
    Message(Option<Msg>),
    News,
}

impl WaitTask {
    pub(super) fn new(shared: Arc<Shared>, number: u64) -> Self {
        Self {
            shared,
            number,
            pub_sub: PubSub::Closed {
                retry_at: Duration::ZERO,
            },
            generation: 0,
            age: 0,
            backoff: RECONNECT[0],
            jobs: FuturesUnordered::new(),
            looks: 0,
            idle_since: None,
            leaving: false,
        }
    }

    pub(super) async fn run(mut self) {
        while let Some(next) = self.attend_to_what_is_due() {
            let woken = self.wake_up(next).await;
            if self.is_superseded() {
                break;
            }
            match woken {
                Woken::Done(done) => self.done(done),
                Woken::Message(Some(message)) => self.notified(&message),
                Woken::Message(None) => self.lost(),
                Woken::News => {}
            }
        }
        self.leaving = true;
    }

    /// Whether another task was started, because this one was late.
    fn is_superseded(&self) -> bool {
        self.shared.state().task != Some(self.number)
    }

    /// Starts what is due, and says how long there is nothing more to do; `None` when there never will be.
    fn attend_to_what_is_due(&mut self) -> Option<Duration> {
        let shared = self.shared.clone();
        let now = shared.env.now();
        if matches!(self.pub_sub, PubSub::Open(..)) && self.age != shared.link.age() {
            self.close(now);
        }
        let mut state = shared.state();
        if state.is_over || state.task != Some(self.number) {
            return None;
        }
        state.task_seen = now;
        if state.slots.is_empty() {
            let since = *self.idle_since.get_or_insert(now);
            let left = since.saturating_add(IDLE).saturating_sub(now);
            if left.is_zero() {
                state.task = None;
                return None;
            }
            return Some(left);
        }
        self.idle_since = None;

        let can_retry = matches!(self.pub_sub, PubSub::Closed { retry_at } if retry_at <= now);
        if can_retry && !shared.source.is_none() {
            self.pub_sub = PubSub::Opening;
            self.age = shared.link.age();
            self.jobs.push(open(shared.clone()).boxed());
        }
        let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
        while self.looks < LOOKS
            && let Some(name) = state.next_due(now)
        {
            let Some(slot) = state.slots.get_mut(&name) else {
                continue;
            };
            if slot.waiting == 0 {
                if slot.subscription != Subscription::None {
                    unsubscribe.push(name.clone());
                }
                state.slots.remove(&name);
                continue;
            }
            let is_heard_soon = match (&self.pub_sub, slot.subscription) {
                (PubSub::Open(..), Subscription::None) => {
                    slot.subscription = Subscription::Asked;
                    subscribe.push(name.clone());
                    true
                }
                (PubSub::Open(..), Subscription::Asked) | (PubSub::Opening, _) => true,
                (PubSub::Open(..), Subscription::Confirmed) | (PubSub::Closed { .. }, _) => false,
            };
            if is_heard_soon && !slot.is_put_off {
                slot.is_put_off = true;
                state.attend(&name, now.saturating_add(ASKING));
            } else if !slot.is_looked_at {
                slot.is_looked_at = true;
                slot.is_stale = false;
                self.looks += 1;
                self.jobs.push(look(shared.clone(), name).boxed());
            }
        }
        let mut wake_at = match state.due.first() {
            // One of the polls has to end first. The waiters must see that this task is alive.
            Some(_) if self.looks >= LOOKS => now.saturating_add(LATE / 2),
            due => due.map_or(Duration::MAX, |(at, _)| *at),
        };
        drop(state);
        match &self.pub_sub {
            PubSub::Open(sink, _) => {
                if !unsubscribe.is_empty() {
                    let (sink, shared) = (sink.clone(), shared.clone());
                    self.jobs.push(leave(shared, sink, unsubscribe).boxed());
                }
                if !subscribe.is_empty() {
                    let (sink, shared) = (sink.clone(), shared.clone());
                    let subscription = hear(shared, sink, self.generation, subscribe);
                    self.jobs.push(subscription.boxed());
                }
            }
            PubSub::Closed { retry_at } if !shared.source.is_none() => {
                wake_at = wake_at.min(*retry_at);
            }
            PubSub::Closed { .. } | PubSub::Opening => {}
        }
        Some(wake_at.saturating_sub(now))
    }

    async fn wake_up(&mut self, sleep: Duration) -> Woken {
        let shared = self.shared.clone();
        let news = pin!(shared.news.notified());
        let sleep = pin!(shared.env.sleep(sleep));
        let (jobs, pub_sub) = (&mut self.jobs, &mut self.pub_sub);
        let happened = std::future::poll_fn(|cx| {
            // Messages first: they may make a poll needless.
            if let PubSub::Open(_, stream) = pub_sub
                && let std::task::Poll::Ready(message) = Pin::new(stream).poll_next(cx)
            {
                return std::task::Poll::Ready(Woken::Message(message));
            }
            match jobs.poll_next_unpin(cx) {
                std::task::Poll::Ready(Some(done)) => std::task::Poll::Ready(Woken::Done(done)),
                std::task::Poll::Ready(None) | std::task::Poll::Pending => std::task::Poll::Pending,
            }
        });
        match select(happened, select(news, sleep)).await {
            Either::Left((woken, _)) => woken,
            Either::Right(_) => Woken::News,
        }
    }

    fn notified(&mut self, message: &Msg) {
        let mut state = self.shared.state();
        let Some(slot) = state.slots.get_mut(message.get_channel_name()) else {
            return;
        };
        if slot.waiting == 0 {
            return;
        }
        slot.wakes = 1;
        if message.get_payload_bytes() == scripts::WAKE_ALL {
            slot.ended.notify_waiters();
            return;
        }
        slot.ended.notify_one();
        // By then the woken waiter has claimed the key, or others are woken.
        let soon = self.shared.env.now().saturating_add(POLLED[0]);
        let at = slot.due.map_or(soon, |at| at.min(soon));
        state.attend(message.get_channel_name(), at);
    }

    /// The connection is lost, and with it the messages that came meanwhile.
    fn lost(&mut self) {
        let now = self.shared.env.now();
        self.close(now.saturating_add(self.backoff));
        self.backoff = (self.backoff * 2).min(RECONNECT[1]);
    }

    fn close(&mut self, retry_at: Duration) {
        self.pub_sub = PubSub::Closed { retry_at };
        self.generation += 1;
        self.shared.state().deaf(self.shared.env.now());
    }

    fn done(&mut self, done: Done) {
        let now = self.shared.env.now();
        match done {
            Done::Unsubscribed => {}
            // The result of an earlier connection is known already.
            Done::Subscribed(generation, ..) if generation != self.generation => {}
            Done::Opened(Some((sink, stream))) => {
                self.pub_sub = PubSub::Open(sink, stream);
                self.shared.state().deaf(now);
            }
            Done::Opened(None) => self.lost(),
            Done::Subscribed(_, names, Ok(())) => {
                self.backoff = RECONNECT[0];
                let mut state = self.shared.state();
                for name in names {
                    if let Some(slot) = state.slots.get_mut(&name)
                        && slot.subscription == Subscription::Asked
                    {
                        slot.subscription = Subscription::Confirmed;
                        slot.is_stale = true;
                        slot.pause = Duration::ZERO;
                        if slot.waiting > 0 {
                            state.attend(&name, now);
                        }
                    }
                }
            }
            Done::Subscribed(_, _, Err(Unheard::Forbidden(error))) => {
                tracing::warn!(
                    target: "idempotency",
                    %error,
                    "Redis allows no subscription, so duplicates look for the answer instead of being told; allow the channels that begin with the prefix"
                );
                self.close(now.saturating_add(FORBIDDEN));
            }
            Done::Subscribed(_, _, Err(Unheard::Lost)) => self.lost(),
            Done::Looked(name, looked) => {
                self.looks -= 1;
                self.looked(&name, looked, now);
            }
        }
    }

    fn looked(&mut self, name: &str, looked: Result<i64, StorageError>, now: Duration) {
        let mut state = self.shared.state();
        let Some(slot) = state.slots.get_mut(name) else {
            return;
        };
        let [first, longest] = match (&self.pub_sub, slot.subscription) {
            (PubSub::Open(..), Subscription::Confirmed) => NOTIFIED,
            (PubSub::Open(..) | PubSub::Opening, _) => SOON_NOTIFIED,
            (PubSub::Closed { .. }, _) => POLLED,
        };
        slot.is_looked_at = false;
        if slot.waiting == 0 {
            return;
        }
        slot.pause = (slot.pause * 2).clamp(first, longest);
        let mut next = jittered(&self.shared.env, slot.pause);
        match looked {
            Ok(left) if left >= 0 => {
                slot.wakes = 1;
                // A little later than its end.
                let left = Duration::from_millis(left.unsigned_abs()) + Duration::from_millis(2);
                next = next.min(left);
                if slot.is_stale {
                    next = Duration::ZERO;
                }
            }
            Ok(scripts::FREE) => {
                // For one, who ends what it begins or passes the wake on. If it is free still, soon after, that one did not want
                // it, and then it is for two, and so on.
                for _ in 0..slot.wakes.min(slot.waiting) {
                    slot.ended.notify_one();
                }
                slot.wakes = slot.wakes.saturating_mul(2);
                next = POLLED[0];
            }
            // A record is for all waiters.
            Ok(_) => slot.ended.notify_waiters(),
            Err(error) => {
                slot.failures += 1;
                slot.failure = Some(error.kind());
                slot.ended.notify_waiters();
            }
        }
        state.attend(name, now.saturating_add(next));
    }
}

impl Drop for WaitTask {
    /// Its runtime has ended. Waiters on other runtimes start another task.
    fn drop(&mut self) {
        if self.leaving || self.is_superseded() {
            return;
        }
        let mut state = self.shared.state();
        state.task = None;
        state.due.clear();
        state.slots.retain(|_, slot| {
            slot.subscription = Subscription::None;
            slot.is_looked_at = false;
            slot.due = None;
            slot.ended.notify_waiters();
            slot.waiting > 0
        });
    }
}

async fn open(shared: Arc<Shared>) -> Done {
    let Shared {
        source, env, link, ..
    } = &*shared;
    Done::Opened(source.open(env, link.limit).await)
}

async fn hear(
    shared: Arc<Shared>,
    mut sink: PubSubSink,
    generation: u64,
    names: Vec<String>,
) -> Done {
    let Shared { env, link, .. } = &*shared;
    let asked = match env.within(link.limit, sink.subscribe(&names)).await {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) if error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoPerm) => {
            Err(Unheard::Forbidden(error))
        }
        Some(Err(_)) | None => Err(Unheard::Lost),
    };
    Done::Subscribed(generation, names, asked)
}

async fn leave(shared: Arc<Shared>, mut sink: PubSubSink, names: Vec<String>) -> Done {
    let Shared { env, link, .. } = &*shared;
    // If it fails the connection is lost, which the stream reports.
    let _ = env.within(link.limit, sink.unsubscribe(&names)).await;
    Done::Unsubscribed
}

async fn look(shared: Arc<Shared>, name: String) -> Done {
    let script = &scripts::LEASE_LEFT;
    let left = shared.link.look(script, &name).await;
    Done::Looked(name, left)
}

/// `pause`, give or take a fifth.
fn jittered(env: &Env, pause: Duration) -> Duration {
    let mut random = [0];
    env.fill_random(&mut random);
    pause * 4 / 5 + pause * 2 / 5 * u32::from(random[0]) / 255
}
