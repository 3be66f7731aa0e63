//! Unusual schedules and inputs: storages and environments that panic, threads that are missing, runtimes that end.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::{
    convert::Infallible,
    future::{Ready, ready},
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake},
    time::Duration,
};

use axum::{body::Body, extract::Request, response::Response};
use futures_util::{FutureExt, future::BoxFuture};
use http::StatusCode;
use idempotency_axum::{
    Completion, Config, Engine, Env, Environment, IdempotencyLayer, LockPolicy, MemoryStorage,
    Operation, Outcome, Ran, Scope, Spawner, StorageError, TombstoneReason,
};
use idempotency_tests::{
    Events, Fault, FaultyStorage, Hook, Hooked, StorageCall,
    node::{LEASE, Node, answer, assert_replays, claim_of, config, operation, replay_of},
};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;
use tower::{Layer, Service, ServiceExt};

fn paused() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
}

async fn drains(engine: &Engine) -> bool {
    tokio::time::timeout(Duration::from_secs(3600), engine.drain())
        .await
        .is_ok()
}

// ---- Keepers that are lost ----

#[test]
fn a_keeper_that_is_dropped_with_a_release_under_way_holds_no_drain_up() {
    let node = Node::new();
    let first = paused();
    first.block_on(async {
        let claim = claim_of(node.engine.begin(&operation(1)).await);
        node.storage.set(Operation::Release, Fault::Hang);
        drop(claim);
        node.storage.called(Operation::Release, 1).await;
    });
    drop(first);
    node.storage.heal(Operation::Release);
    assert!(paused().block_on(drains(&node.engine)));
}

#[test]
fn a_drain_starts_a_keeper_for_an_outcome_that_nobody_keeps() {
    let node = Node::new();
    let first = paused();
    first.block_on(async {
        let claim = claim_of(node.engine.begin(&operation(1)).await);
        node.storage.set(Operation::Complete, Fault::FailBefore);
        assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    });
    drop(first);
    node.storage.heal(Operation::Complete);
    node.clock.advance(LEASE / 3);
    assert!(paused().block_on(drains(&node.engine)));
}

/// An environment with faults of its own.
struct Faulty {
    env: Env,
    /// How often `background` still panics.
    panics: AtomicUsize,
    nows: Arc<AtomicUsize>,
}

impl Environment for Faulty {
    fn now(&self) -> Duration {
        let nows = self.nows.fetch_add(1, Ordering::SeqCst);
        assert!(nows < 100_000, "somebody asks for the time again and again");
        self.env.now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.env.sleep(duration).boxed()
    }

    fn fill_random(&self, buffer: &mut [u8]) {
        self.env.fill_random(buffer);
    }

    fn spawner(&self) -> Option<Spawner> {
        self.env.spawner()
    }

    fn background(&self) -> Option<Spawner> {
        let left = self.panics.load(Ordering::SeqCst);
        if left > 0 {
            self.panics.store(left - 1, Ordering::SeqCst);
            panic!("no background");
        }
        self.env.background()
    }
}

#[tokio::test(start_paused = true)]
async fn a_background_that_panics_once_costs_no_later_claim_its_renewal() {
    let node = Node::with(|config| {
        let env = Env::new(Faulty {
            env: config.env.clone(),
            panics: AtomicUsize::new(1),
            nows: Arc::default(),
        });
        config.env(env)
    });
    let one = operation(1);
    let first = AssertUnwindSafe(node.engine.begin(&one)).catch_unwind();
    drop(first.await);
    let claim = claim_of(node.engine.begin(&operation(2)).await);
    node.pass(2 * LEASE).await;
    assert!(node.storage.calls(Operation::Renew) > 0);
    let stored = claim.complete(answer("two")).await;
    assert_eq!(stored, Completion::Stored);
    node.assert_quiet().await;
}

/// As a process that may start no more threads: no stack is as large as that of each thread that it starts.
#[test]
fn a_process_without_threads_renews_claims_on_the_runtime_of_the_request() {
    const STACK: &str = "RUST_MIN_STACK";
    const TOO_LARGE: &str = "140737488355328";
    if std::env::var(STACK).is_ok_and(|stack| stack == TOO_LARGE) {
        let storage = FaultyStorage::new(MemoryStorage::new());
        let lock = LockPolicy::default().ttl(Duration::from_millis(30));
        let engine = Engine::new(storage.clone(), Config::default().lock(lock));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            let claim = claim_of(engine.begin(&operation(1)).await);
            storage.called(Operation::Renew, 2).await;
            claim.release().await;
            engine.drain().await;
        });
        return;
    }
    let this = "a_process_without_threads_renews_claims_on_the_runtime_of_the_request";
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", this, "--nocapture", "--test-threads=1"])
        .env(STACK, TOO_LARGE)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{said}");
}

#[tokio::test(start_paused = true)]
async fn a_keeper_does_not_spin_where_nothing_may_be_held() {
    let nows = Arc::new(AtomicUsize::new(0));
    let node = Node::with(|config| {
        let env = Env::new(Faulty {
            env: config.env.clone(),
            panics: AtomicUsize::new(0),
            nows: nows.clone(),
        });
        config
            .env(env)
            .lock(LockPolicy::default().max_hold(Duration::ZERO))
    });
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.pass(LEASE).await;
    let asked = nows.load(Ordering::SeqCst);
    assert!(asked < 50_000, "{asked}");
    assert_eq!(claim.complete(answer("late")).await, Completion::Expired);
    node.assert_quiet().await;
}

// ---- Storages that fail for one key, or panic ----

#[tokio::test(start_paused = true)]
async fn a_key_that_is_never_released_holds_up_no_other() {
    let node = Node::new();
    let stuck = claim_of(node.engine.begin(&operation(1)).await);
    let other = claim_of(node.engine.begin(&operation(2)).await);
    let key = operation(1).key;
    node.storage
        .set_for(key, Operation::Release, Fault::FailBefore);
    drop(stuck);
    node.pass(Duration::from_secs(1)).await;
    drop(other);
    node.pass(LEASE / 2).await;
    assert_eq!(node.memory.claims(), 1);
    node.storage.heal(Operation::Release);
    node.pass(LEASE).await;
    node.assert_quiet().await;
}

/// Panics when it is to keep an answer.
struct Panicking;

impl Hook for Panicking {
    async fn around<T: Send>(
        &self,
        call: StorageCall<'_>,
        work: impl Future<Output = Result<T, StorageError>> + Send,
    ) -> Result<T, StorageError> {
        let outcome = call.record.map(|record| &record.outcome);
        assert!(!matches!(outcome, Some(Outcome::Response(_))), "an answer");
        work.await
    }
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_panics_over_an_answer_refuses_it() {
    let node = Node::new();
    let storage = Hooked::around(node.memory.clone(), Panicking);
    let engine = Engine::new(storage, config(&node.env).max_running(1));
    let claim = claim_of(engine.begin(&operation(1)).await);
    let completed = AssertUnwindSafe(claim.complete(answer("one"))).catch_unwind();
    drop(completed.await);
    assert_replays(engine.begin(&operation(1)).await, "one");
    node.pass(2 * LEASE).await;
    let next = claim_of(engine.begin(&operation(2)).await);
    next.release().await;
    for engine in [&engine, &node.peer()] {
        let replay = replay_of(engine.begin(&operation(1)).await);
        let tombstone = Outcome::Tombstone(TombstoneReason::Unstorable);
        assert_eq!(replay.record.outcome, tombstone);
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_kept_though_nobody_can_look_after_an_outage() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    for operation in [Operation::Complete, Operation::Renew, Operation::Get] {
        node.storage.set(operation, Fault::FailBefore);
    }
    let completion = claim.complete(answer("one")).await;
    assert_eq!(completion, Completion::Deferred);
    // The claim is over.
    node.pass(2 * LEASE).await;
    assert_eq!(node.memory.claims(), 0);
    node.storage.set(Operation::Get, Fault::Hang);
    node.storage.heal(Operation::Complete);
    node.storage.heal(Operation::Renew);
    node.pass(2 * LEASE).await;
    assert_eq!(node.engine.running(), 0);
    assert_replays(node.peer().begin(&operation(1)).await, "one");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_refused_after_its_claim_was_lost_becomes_a_tombstone() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    for operation in [Operation::Complete, Operation::Renew] {
        node.storage.set(operation, Fault::FailBefore);
    }
    let completion = claim.complete(answer("too large")).await;
    assert_eq!(completion, Completion::Deferred);
    node.pass(2 * LEASE).await;
    assert_eq!(node.memory.claims(), 0);
    node.storage.heal(Operation::Renew);
    node.storage.set(Operation::Complete, Fault::RefuseAnswer);
    node.pass(2 * LEASE).await;
    let replay = replay_of(node.peer().begin(&operation(1)).await);
    let tombstone = Outcome::Tombstone(TombstoneReason::Unstorable);
    assert_eq!(replay.record.outcome, tombstone);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn who_drains_finds_everybody_told() {
    struct Told(Events, AtomicUsize);
    impl Wake for Told {
        fn wake(self: Arc<Self>) {
            self.1.store(self.0.count("completed"), Ordering::SeqCst);
        }
    }
    let node = Node::new();
    for fails in [false, true] {
        let claim = claim_of(node.engine.begin(&operation(u8::from(fails))).await);
        let told = Arc::new(Told(node.events.clone(), AtomicUsize::new(0)));
        let waker = told.clone().into();
        let mut drain = Box::pin(node.engine.drain());
        assert!(
            drain
                .as_mut()
                .poll(&mut Context::from_waker(&waker))
                .is_pending()
        );
        if fails {
            node.storage.set(Operation::Complete, Fault::FailBefore);
        }
        let completion = claim.complete(answer("one")).await;
        node.storage.heal(Operation::Complete);
        node.pass(LEASE).await;
        assert_eq!(
            told.1.load(Ordering::SeqCst),
            1 + usize::from(fails),
            "{completion:?}"
        );
    }
}

// ---- Values and services that fail ----

#[derive(Debug, Deserialize)]
struct Fragile;

impl Serialize for Fragile {
    fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        panic!("a value that can't be written")
    }
}

#[tokio::test(start_paused = true)]
async fn a_value_whose_serialization_panics_is_not_made_again() {
    let (node, runs) = (Node::new(), AtomicUsize::new(0));
    let run = || async {
        runs.fetch_add(1, Ordering::SeqCst);
        Ok::<_, Infallible>(Fragile)
    };
    let one = operation(1);
    let first = AssertUnwindSafe(node.engine.run(&one, run)).catch_unwind();
    assert!(first.await.is_err());
    node.pass(Duration::from_secs(1)).await;
    let again = AssertUnwindSafe(node.engine.run(&one, run)).catch_unwind();
    let again = again.await;
    assert_eq!(runs.load(Ordering::SeqCst), 1);
    let Ok(Ran::NotReplayable(reason)) = again else {
        panic!("{again:?}");
    };
    assert_eq!(reason, TombstoneReason::Unstorable);
    node.assert_quiet().await;
}

/// A service that fails to become ready.
#[derive(Clone)]
struct Unready {
    fails: Arc<AtomicBool>,
    panics: bool,
    calls: Arc<AtomicUsize>,
}

impl Service<Request> for Unready {
    type Response = Response;
    type Error = &'static str;
    type Future = Ready<Result<Response, &'static str>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        if self.fails.load(Ordering::SeqCst) {
            assert!(!self.panics, "not ready");
            return Poll::Ready(Err("not ready"));
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request) -> Self::Future {
        self.calls.fetch_add(1, Ordering::SeqCst);
        ready(Ok(Response::new(Body::from("made"))))
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_was_never_ready_has_not_run() {
    for panics in [false, true] {
        let inner = Unready {
            fails: Arc::new(AtomicBool::new(true)),
            panics,
            calls: Arc::default(),
        };
        let service = IdempotencyLayer::enforce(MemoryStorage::new())
            .config(Config::stripe())
            .layer(inner.clone());
        let request = || {
            let request = Request::post("/orders").header("idempotency-key", "one");
            request.body(Body::from("{}")).unwrap()
        };
        let first = AssertUnwindSafe(service.clone().oneshot(request())).catch_unwind();
        assert!(!matches!(first.await, Ok(Ok(_))));
        inner.fails.store(false, Ordering::SeqCst);
        let retry = service.oneshot(request()).await.unwrap();
        assert_eq!(retry.status(), StatusCode::OK, "panics: {panics}");
        assert_eq!(inner.calls.load(Ordering::SeqCst), 1);
    }
}

// ---- Callers ----

#[test]
fn a_caller_is_not_found_in_values_that_are_all_empty() {
    let parts = |name: &str, values: &[&str]| {
        let mut request = http::Request::builder();
        for value in values {
            request = request.header(name, *value);
        }
        request.body(()).unwrap().into_parts().0
    };
    let tenants = parts("x-tenant", &["", ""]);
    assert!(Scope::header("x-tenant").of(&tenants).is_err());
    let sessions = parts("cookie", &["session=; session="]);
    assert!(Scope::cookie("session").of(&sessions).is_err());
    let mut keys = parts("x-api-key", &["", ""]);
    assert_eq!(Scope::default().of(&keys), Ok(None));
    keys.headers
        .insert("cookie", "session=alice".parse().unwrap());
    assert!(Scope::default().of(&keys).is_err());
    let credentials = parts("authorization", &["", ""]);
    assert!(Scope::authorization().required().of(&credentials).is_err());
}
