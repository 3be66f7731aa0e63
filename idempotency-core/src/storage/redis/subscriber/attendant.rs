//! The one task that has the connection, and looks.

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

use super::{
    super::{link::Repeatable, scripts},
    Subscriber, Subscription,
};
use crate::{Env, StorageError};

/// The first pause between two looks at a key, and the longest: where the end is told, and where it is not.
const TOLD: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(4)];
const UNTOLD: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];

/// How long a look is put off for a subscription that is asked for, so that one look is enough; and the pauses after that.
const ASKING: Duration = Duration::from_millis(300);
const SOON_TOLD: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(1)];

/// How long the connection outlives the last subscription.
const IDLE: Duration = Duration::from_secs(30);

/// The first pause before the connection is tried again, and the longest.
const RECONNECT: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// When a channel that may not be subscribed to is tried again.
const FORBIDDEN: Duration = Duration::from_secs(60);

/// The task.
pub(super) struct Attendant {
    subscriber: Arc<Subscriber>,
    number: u64,
    ear: Ear,
    /// Which connection it is.
    generation: u64,
    /// How often the connection for commands had been made when it was opened. One that was made anew since then may lead to
    /// another server.
    age: u64,
    /// How long to wait before the connection is tried again, should that fail.
    backoff: Duration,
    jobs: FuturesUnordered<BoxFuture<'static, Done>>,
    idle_since: Option<Duration>,
    leaving: bool,
}

/// The connection that is subscribed.
enum Ear {
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
    Told(Option<Msg>),
    News,
}

impl Attendant {
    pub(super) fn new(subscriber: Arc<Subscriber>, number: u64) -> Self {
        Self {
            subscriber,
            number,
            ear: Ear::Closed {
                retry_at: Duration::ZERO,
            },
            generation: 0,
            age: 0,
            backoff: RECONNECT[0],
            jobs: FuturesUnordered::new(),
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
                Woken::Told(Some(message)) => self.told(&message),
                Woken::Told(None) => self.lost(),
                Woken::News => {}
            }
        }
        self.leaving = true;
    }

    /// Whether another task was started, because this one was late.
    fn is_superseded(&self) -> bool {
        self.subscriber.state().attendant != Some(self.number)
    }

    /// Starts what is due, and says how long there is nothing more to do; `None` when there never will be.
    fn attend_to_what_is_due(&mut self) -> Option<Duration> {
        let subscriber = self.subscriber.clone();
        let now = subscriber.env.now();
        if matches!(self.ear, Ear::Open(..)) && self.age != subscriber.link.age() {
            self.close(now);
        }
        let mut state = subscriber.state();
        if state.attendant != Some(self.number) {
            return None;
        }
        if state.slots.is_empty() {
            let since = *self.idle_since.get_or_insert(now);
            let left = since.saturating_add(IDLE).saturating_sub(now);
            if left.is_zero() {
                state.attendant = None;
                return None;
            }
            return Some(left);
        }
        self.idle_since = None;

        let can_retry = matches!(self.ear, Ear::Closed { retry_at } if retry_at <= now);
        if can_retry && !subscriber.tellers.is_none() {
            self.ear = Ear::Opening;
            self.jobs.push(open(subscriber.clone()).boxed());
        }
        let (mut subscribe, mut unsubscribe) = (Vec::new(), Vec::new());
        while let Some(name) = state.next_due(now) {
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
            let is_heard_soon = match (&self.ear, slot.subscription) {
                (Ear::Open(..), Subscription::None) => {
                    slot.subscription = Subscription::Asked;
                    subscribe.push(name.clone());
                    true
                }
                (Ear::Open(..), Subscription::Asked) | (Ear::Opening, _) => true,
                (Ear::Open(..), Subscription::Confirmed) | (Ear::Closed { .. }, _) => false,
            };
            if is_heard_soon && !slot.is_put_off {
                slot.is_put_off = true;
                state.attend(&name, now.saturating_add(ASKING));
            } else if !slot.is_looked_at {
                slot.is_looked_at = true;
                slot.is_stale = false;
                self.jobs.push(look(subscriber.clone(), name).boxed());
            }
        }
        let mut wake_at = state.due.first().map_or(Duration::MAX, |(at, _)| *at);
        drop(state);
        match &self.ear {
            Ear::Open(sink, _) => {
                if !unsubscribe.is_empty() {
                    let (sink, subscriber) = (sink.clone(), subscriber.clone());
                    self.jobs.push(leave(subscriber, sink, unsubscribe).boxed());
                }
                if !subscribe.is_empty() {
                    let (sink, subscriber) = (sink.clone(), subscriber.clone());
                    let subscription = hear(subscriber, sink, self.generation, subscribe);
                    self.jobs.push(subscription.boxed());
                }
            }
            Ear::Closed { retry_at } if !subscriber.tellers.is_none() => {
                wake_at = wake_at.min(*retry_at);
            }
            Ear::Closed { .. } | Ear::Opening => {}
        }
        Some(wake_at.saturating_sub(now))
    }

    async fn wake_up(&mut self, sleep: Duration) -> Woken {
        let subscriber = self.subscriber.clone();
        let news = pin!(subscriber.news.notified());
        let sleep = pin!(subscriber.env.sleep(sleep));
        let (jobs, ear) = (&mut self.jobs, &mut self.ear);
        let happened = std::future::poll_fn(|cx| {
            // What was told goes first: it may make a look needless.
            if let Ear::Open(_, stream) = ear
                && let std::task::Poll::Ready(message) = Pin::new(stream).poll_next(cx)
            {
                return std::task::Poll::Ready(Woken::Told(message));
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

    fn told(&mut self, message: &Msg) {
        let state = self.subscriber.state();
        let Some(slot) = state.slots.get(message.get_channel_name()) else {
            return;
        };
        if slot.waiting == 0 {
            return;
        }
        match message.get_payload_bytes() {
            scripts::WAKE_ALL => slot.ended.notify_waiters(),
            _ => slot.ended.notify_one(),
        }
    }

    /// The connection is lost, and with it what was told meanwhile.
    fn lost(&mut self) {
        let now = self.subscriber.env.now();
        self.close(now.saturating_add(self.backoff));
        self.backoff = (self.backoff * 2).min(RECONNECT[1]);
    }

    fn close(&mut self, retry_at: Duration) {
        self.ear = Ear::Closed { retry_at };
        self.generation += 1;
        self.subscriber.state().deaf(self.subscriber.env.now());
    }

    fn done(&mut self, done: Done) {
        let now = self.subscriber.env.now();
        match done {
            Done::Unsubscribed => {}
            // What became of an earlier connection is known already.
            Done::Subscribed(generation, ..) if generation != self.generation => {}
            Done::Opened(Some((sink, stream))) => {
                self.ear = Ear::Open(sink, stream);
                self.age = self.subscriber.link.age();
                self.subscriber.state().deaf(now);
            }
            Done::Opened(None) => self.lost(),
            Done::Subscribed(_, names, Ok(())) => {
                self.backoff = RECONNECT[0];
                let mut state = self.subscriber.state();
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
            Done::Looked(name, looked) => self.looked(&name, looked, now),
        }
    }

    fn looked(&mut self, name: &str, looked: Result<i64, StorageError>, now: Duration) {
        let mut state = self.subscriber.state();
        let Some(slot) = state.slots.get_mut(name) else {
            return;
        };
        let [first, longest] = match (&self.ear, slot.subscription) {
            (Ear::Open(..), Subscription::Confirmed) => TOLD,
            (Ear::Open(..) | Ear::Opening, _) => SOON_TOLD,
            (Ear::Closed { .. }, _) => UNTOLD,
        };
        slot.is_looked_at = false;
        if slot.waiting == 0 {
            return;
        }
        slot.pause = (slot.pause * 2).clamp(first, longest);
        let mut next = jittered(&self.subscriber.env, slot.pause);
        match looked {
            Ok(left) if left >= 0 => {
                // A little later than its end.
                let left = Duration::from_millis(left.unsigned_abs()) + Duration::from_millis(2);
                next = next.min(left);
                if slot.is_stale {
                    next = Duration::ZERO;
                }
            }
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

impl Drop for Attendant {
    /// Its runtime has ended. Who waits on another one has to wait anew, and gets another task.
    fn drop(&mut self) {
        if self.leaving || self.is_superseded() {
            return;
        }
        let mut state = self.subscriber.state();
        state.attendant = None;
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

async fn open(subscriber: Arc<Subscriber>) -> Done {
    let Subscriber {
        tellers, env, link, ..
    } = &*subscriber;
    Done::Opened(tellers.open(env, link.limit).await)
}

async fn hear(
    subscriber: Arc<Subscriber>,
    mut sink: PubSubSink,
    generation: u64,
    names: Vec<String>,
) -> Done {
    let Subscriber { env, link, .. } = &*subscriber;
    let asked = match env.within(link.limit, sink.subscribe(&names)).await {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) if error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoPerm) => {
            Err(Unheard::Forbidden(error))
        }
        Some(Err(_)) | None => Err(Unheard::Lost),
    };
    Done::Subscribed(generation, names, asked)
}

async fn leave(subscriber: Arc<Subscriber>, mut sink: PubSubSink, names: Vec<String>) -> Done {
    let Subscriber { env, link, .. } = &*subscriber;
    // Where it fails the connection is lost, which is noticed elsewhere.
    let _ = env.within(link.limit, sink.unsubscribe(&names)).await;
    Done::Unsubscribed
}

async fn look(subscriber: Arc<Subscriber>, name: String) -> Done {
    let script = &scripts::LEASE_LEFT;
    let left = subscriber
        .link
        .run(script, &name, &[], Repeatable::Yes)
        .await;
    Done::Looked(name, left)
}

/// `pause`, give or take a fifth.
fn jittered(env: &Env, pause: Duration) -> Duration {
    let mut random = [0];
    env.fill_random(&mut random);
    pause * 4 / 5 + pause * 2 / 5 * u32::from(random[0]) / 255
}
