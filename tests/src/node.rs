//! The engine without HTTP, on a clock that only the test moves.
//!
//! With tokio's clock paused and one thread, [`idle`] returns once nothing is left to do, however many steps that takes, so no
//! outcome depends on how fast the machine is.

use std::{pin::Pin, task::Poll, time::Duration};

use http::{HeaderMap, StatusCode};
use idempotency_axum::{
    Claim, Config, Decision, Encoded, EncodedKey, Engine, Env, Fingerprint, LockPolicy,
    MemoryStorage, Outcome, Record, Refused, Replay, SimulatedClock, StoredResponse,
};
use tokio::task::JoinHandle;

use crate::{Events, FaultyStorage};

/// The lease of a [`Node`]'s claims.
pub const LEASE: Duration = Duration::from_secs(30);

/// How long a [`Node`]'s duplicates wait.
pub const WAIT: Duration = Duration::from_secs(10);

/// One node: an engine, its storage with faults, and what both share with other nodes.
#[derive(Debug)]
pub struct Node {
    /// What is under test.
    pub engine: Engine,
    /// What the engine works on: `memory`, with faults.
    pub storage: FaultyStorage<MemoryStorage>,
    /// Where claims and records are.
    pub memory: MemoryStorage,
    /// Moves the time of all nodes of one `env`.
    pub clock: SimulatedClock,
    /// The engine's.
    pub env: Env,
    /// What the engine told.
    pub events: Events,
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

impl Node {
    /// A node with the default settings, except that duplicates wait for [`WAIT`].
    #[must_use]
    pub fn new() -> Self {
        Self::with(|config| config)
    }

    /// A node whose settings `change` has the last word on.
    pub fn with(change: impl FnOnce(Config) -> Config) -> Self {
        let (env, clock) = Env::simulated(7);
        let memory = MemoryStorage::builder().env(env.clone()).build();
        let storage = FaultyStorage::new(memory.clone());
        let events = Events::new();
        let config = change(config(&env).observer(events.clone()));
        Self {
            engine: Engine::new(storage.clone(), config),
            storage,
            memory,
            clock,
            env,
            events,
        }
    }

    /// Another node that works on the same storage, by the same clock.
    pub fn peer(&self) -> Engine {
        Engine::new(self.memory.clone(), config(&self.env))
    }

    /// Moves the clock in steps small enough for every renewal to happen in time.
    pub async fn pass(&self, time: Duration) {
        pass(&self.clock, time).await;
    }

    /// Nothing runs, waits or is claimed any more.
    pub async fn assert_quiet(&self) {
        self.engine.drain().await;
        assert_eq!(self.engine.running(), 0, "running");
        assert_eq!(self.engine.waiting(), 0, "waiting");
        assert_eq!(self.memory.claims(), 0, "claims");
        assert_eq!(self.memory.waiters(), 0, "waiters at the storage");
    }
}

/// The settings of a node.
pub fn config(env: &Env) -> Config {
    Config::default()
        .env(env.clone())
        .lock(LockPolicy::default().timeout(WAIT))
}

/// Returns once every other task waits for something that only the test can give: tokio moves a paused clock only then.
pub async fn idle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

/// Moves the clock in steps small enough for every renewal to happen in time.
pub async fn pass(clock: &SimulatedClock, time: Duration) {
    let step = LEASE / 30;
    let mut left = time;
    while !left.is_zero() {
        idle().await;
        clock.advance(step.min(left));
        left = left.saturating_sub(step);
    }
    idle().await;
}

/// An operation of which nothing is known but its key.
#[must_use]
pub fn operation(n: u8) -> Encoded {
    Encoded {
        key: EncodedKey::from_bytes([n; 32]),
        fingerprint: None,
    }
}

/// An operation with a fingerprint.
#[must_use]
pub fn printed(n: u8, print: u8) -> Encoded {
    Encoded {
        fingerprint: Some(Fingerprint::from_bytes([print; 32])),
        ..operation(n)
    }
}

/// A 201 with this body.
#[must_use]
pub fn answer(text: &'static str) -> StoredResponse {
    StoredResponse::new(StatusCode::CREATED, &HeaderMap::new(), text)
}

/// The record of [`answer`].
#[must_use]
pub fn record(text: &'static str) -> Record {
    Record {
        fingerprint: None,
        outcome: Outcome::Response(answer(text)),
    }
}

/// The claim, if that was the decision.
#[track_caller]
pub fn claim_of(decision: Decision) -> Claim {
    match decision {
        Decision::Execute(claim) => claim,
        other => panic!("expected to execute: {other:?}"),
    }
}

/// The replay, if that was the decision.
#[track_caller]
pub fn replay_of(decision: Decision) -> Replay {
    match decision {
        Decision::Replay(replay) => replay,
        other => panic!("expected a replay: {other:?}"),
    }
}

/// The refusal, if that was the decision.
#[track_caller]
pub fn refusal_of(decision: Decision) -> Refused {
    match decision {
        Decision::Refuse(refused) => refused,
        other => panic!("expected a refusal: {other:?}"),
    }
}

/// The decision is a replay of [`record`].
#[track_caller]
pub fn assert_replays(decision: Decision, text: &'static str) {
    assert_eq!(replay_of(decision).record, record(text));
}

/// A `begin` in a task of its own.
pub fn begin(engine: &Engine, encoded: Encoded) -> JoinHandle<Decision> {
    let engine = engine.clone();
    tokio::spawn(async move { engine.begin(&encoded).await })
}

/// Polls up to `times`, and lets everything else go on in between.
pub async fn poll_times<F: Future>(mut future: Pin<&mut F>, times: usize) -> Option<F::Output> {
    for _ in 0..times {
        let poll = std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await;
        if let Poll::Ready(output) = poll {
            return Some(output);
        }
        tokio::task::yield_now().await;
    }
    None
}
