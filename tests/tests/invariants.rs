//! The invariants of the design, one section each, at the level of a request wherever they can be seen there.
//!
//! What a number stands for is in the first line of its section. Crowds and blocked threads are in `stress.rs`, the engine's
//! own corners in `engine.rs`.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::{
    convert::Infallible,
    panic::AssertUnwindSafe,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, future::BoxFuture, stream};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use idempotency_axum::{
    Begin, Config, Decision, Engine, Entry, Env, Environment, Held, IdempotencyHandler,
    IdempotencyKey, IdempotencyLayer, KeyPolicy, LockPolicy, MemoryStorage, NewClaim, OnUnreadable,
    Operation, Outcome, Problem, Record, Refusal, Scope, SimulatedClock, Spawner, Storage, StoreOn,
    StoredResponse, Token, TombstoneReason, WhenFull,
};
use idempotency_tests::{
    Answer, Events, Fault, FaultyStorage, Gate, Logs, PATIENCE, Runs, Server,
    node::{LEASE, idle, operation, pass, record},
};
use tokio::sync::Semaphore;
use tower::{Layer, Service, ServiceExt};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;

/// Longer than any test runs.
const LONG: Duration = Duration::from_secs(300);

fn patient() -> LockPolicy {
    LockPolicy::default().timeout(LONG)
}

fn post_with(path: &str, headers: &[(&str, &str)], body: &'static str) -> Request<Body> {
    let mut request = Request::post(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Body::from(body)).unwrap()
}

/// Asks without a network in between.
async fn ask<S>(app: &S, request: Request<Body>) -> Answer
where
    S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone,
{
    let Ok(response) = app.clone().oneshot(request).await;
    let (parts, body) = response.into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: body.collect().await.unwrap().to_bytes(),
    }
}

async fn ask_for<S>(app: &S, key: &str) -> Answer
where
    S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone,
{
    ask(app, post_with("/orders", &[("idempotency-key", key)], "")).await
}

/// A handler that counts its runs and waits at the gate.
fn gated(runs: &Runs, gate: &Gate) -> axum::routing::MethodRouter {
    let (runs, gate) = (runs.clone(), gate.clone());
    post(async move || {
        let run = runs.next();
        gate.enter().await;
        (StatusCode::CREATED, format!("order {run}"))
    })
}

async fn in_time<F: Future>(what: &str, work: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(output) => output,
        Err(_) => panic!("{what} does not end"),
    }
}

// ---- 1. Between Acquired and complete no second execution starts, on any node ----

#[tokio::test]
async fn invariant_01_one_execution_at_a_time_on_all_nodes() {
    let memory = MemoryStorage::new();
    let (runs, gate) = (Runs::new(), Gate::new());
    let mut nodes = Vec::new();
    let mut engines = Vec::new();
    let events = Events::new();
    for _ in 0..3 {
        let config = Config::ietf().lock(patient()).observer(events.clone());
        let layer = IdempotencyLayer::enforce(memory.clone()).config(config);
        engines.push(layer.engine().clone());
        let app = Router::new()
            .route("/orders", gated(&runs, &gate))
            .layer(layer);
        nodes.push(Server::start(app).await);
    }
    let calls: Vec<_> = (0..30)
        .map(|n| nodes[n % 3].post("/orders").key("k").start())
        .collect();
    gate.arrived(1).await;
    events.until("waiting", 29).await;
    assert_eq!((runs.count(), memory.claims()), (1, 1));
    gate.open(30);
    let mut replays = 0;
    for call in calls {
        let answer = call.await.unwrap();
        assert_eq!((answer.code(), answer.text()), (201, "order 1"));
        replays += usize::from(answer.is_replay());
    }
    assert_eq!((runs.count(), replays), (1, 29));
    for engine in engines {
        engine.drain().await;
    }
    assert_eq!(memory.claims(), 0);
}

// ---- 2. A holder whose claim another took changes nothing, and is told ----

#[tokio::test]
async fn invariant_02_a_token_that_lost_its_claim_changes_nothing() {
    let (env, clock) = Env::simulated(2);
    let memory = MemoryStorage::builder().env(env).build();
    let key = operation(1).key;
    let [old, new] = [Token::random(), Token::random()];
    let claim = |token| NewClaim {
        token,
        fingerprint: None,
        lease: LEASE,
    };
    let (late, late_ttl) = (record("late"), LONG);
    assert_eq!(
        memory.begin(&key, &claim(old)).await.unwrap(),
        Begin::Acquired
    );
    clock.advance(LEASE);
    assert_eq!(
        memory.begin(&key, &claim(new)).await.unwrap(),
        Begin::Acquired
    );

    let assert_lost = async || {
        let completed = memory.complete(&key, old, &late, late_ttl).await.unwrap();
        assert_eq!(completed, Held::Lost);
        assert_eq!(memory.renew(&key, old, LONG).await.unwrap(), Held::Lost);
        assert_eq!(memory.release(&key, old).await.unwrap(), Held::Lost);
    };
    assert_lost().await;
    let entry = memory.get(&key).await.unwrap();
    let Some(Entry::Claimed { lease_left, .. }) = entry else {
        panic!("{entry:?}")
    };
    assert_eq!(lease_left, Some(LEASE));

    let stored = memory.complete(&key, new, &record("new"), LONG).await;
    assert_eq!(stored.unwrap(), Held::Yes);
    assert_lost().await;
    let entry = memory.get(&key).await.unwrap();
    assert_eq!(entry, Some(Entry::Completed(record("new"))));
}

#[tokio::test(start_paused = true)]
async fn invariant_02_a_node_that_lost_its_claim_answers_and_stores_nothing() {
    let (env, clock) = Env::simulated(2);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let storage = FaultyStorage::new(memory.clone());
    let events = Events::new();
    let config = || Config::default().env(env.clone());
    let layer =
        IdempotencyLayer::enforce(storage.clone()).config(config().observer(events.clone()));
    let other = IdempotencyLayer::enforce(memory.clone()).config(config());
    let (runs, gate) = (Runs::new(), Gate::new());
    let app = Router::new()
        .route("/orders", gated(&runs, &gate))
        .layer(layer.clone());
    let other_app = Router::new()
        .route("/orders", post(async || "other"))
        .layer(other.clone());

    let first = tokio::spawn({
        let app = app.clone();
        async move { ask_for(&app, "k").await }
    });
    idle().await;
    storage.set(Operation::Renew, Fault::FailBefore);
    pass(&clock, LEASE).await;
    assert_eq!(ask_for(&other_app, "k").await.text(), "other");
    gate.open(1);
    // The operation ran, so its client is told what it came to.
    let first = first.await.unwrap();
    assert_eq!((first.code(), first.text()), (201, "order 1"));
    assert_eq!(events.count("lost"), 1);
    assert_eq!(events.count("completed"), 0);
    for app in [&app, &other_app] {
        assert_eq!(ask_for(app, "k").await.text(), "other");
    }
    layer.drain().await;
}

// ---- 3. One keeper renews all claims; what is held too long becomes a tombstone ----

/// Counts what an engine costs: tasks and timers.
struct Counting {
    clock: SimulatedClock,
    spawned: Arc<AtomicUsize>,
    slept: Arc<AtomicUsize>,
}

impl Environment for Counting {
    fn now(&self) -> Duration {
        self.clock.now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.slept.fetch_add(1, Ordering::SeqCst);
        self.clock.sleep(duration)
    }

    fn fill_random(&self, buffer: &mut [u8]) {
        self.clock.fill_random(buffer);
    }

    fn spawner(&self) -> Option<Spawner> {
        let spawner = self.clock.spawner()?;
        let spawned = self.spawned.clone();
        Some(Spawner::new(move |task| {
            spawned.fetch_add(1, Ordering::SeqCst);
            spawner.spawn(task);
        }))
    }
}

/// An environment that counts tasks and timers, the clock that moves it, and the counts.
fn counting() -> (Env, SimulatedClock, [Arc<AtomicUsize>; 2]) {
    let (_, clock) = Env::simulated(3);
    let [spawned, slept] = [Arc::default(), Arc::default()];
    let env = Env::new(Counting {
        clock: clock.clone(),
        spawned: Arc::clone(&spawned),
        slept: Arc::clone(&slept),
    });
    (env, clock, [spawned, slept])
}

#[tokio::test(start_paused = true)]
async fn invariant_03_one_keeper_renews_all_claims() {
    let (env, clock, [spawned, slept]) = counting();
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let engine = Engine::new(memory.clone(), Config::default().env(env));
    let mut claims = Vec::new();
    for n in 0..200 {
        let Decision::Execute(claim) = engine.begin(&operation(n)).await else {
            panic!("a new key")
        };
        claims.push(claim);
        idle().await;
    }
    assert_eq!(spawned.load(Ordering::SeqCst), 1);
    assert_eq!(slept.load(Ordering::SeqCst), 1);
    for _ in 0..60 {
        pass(&clock, LEASE / 4).await;
        assert_eq!(memory.claims(), 200);
    }
    // One task still, and a timer for each round, not for each claim.
    assert_eq!(spawned.load(Ordering::SeqCst), 1);
    assert!(slept.load(Ordering::SeqCst) < 100);
    for claim in claims {
        claim.release().await;
    }
    engine.drain().await;
    assert_eq!(memory.claims(), 0);
    // It ends when there is nothing to keep, and comes back.
    pass(&clock, LEASE).await;
    assert_eq!(clock.sleeping(), 0);
    let Decision::Execute(claim) = engine.begin(&operation(1)).await else {
        panic!("a free key")
    };
    pass(&clock, 2 * LEASE).await;
    assert_eq!((memory.claims(), spawned.load(Ordering::SeqCst)), (1, 2));
    claim.release().await;
}

#[tokio::test(start_paused = true)]
async fn invariant_03_a_slow_handler_keeps_its_claim_until_max_hold() {
    let (env, clock) = Env::simulated(3);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let lock = LockPolicy::default()
        .timeout(Duration::ZERO)
        .max_hold(10 * LEASE);
    let config = Config::default().env(env).lock(lock);
    let layer = IdempotencyLayer::enforce(memory.clone()).config(config);
    let (runs, gate) = (Runs::new(), Gate::new());
    let app = Router::new()
        .route("/orders", gated(&runs, &gate))
        .layer(layer.clone());
    let first = tokio::spawn({
        let app = app.clone();
        async move { ask_for(&app, "k").await }
    });
    for _ in 0..19 {
        pass(&clock, LEASE / 2).await;
        assert_eq!(memory.claims(), 1);
        assert_eq!(ask_for(&app, "k").await.code(), 423);
    }
    pass(&clock, LEASE / 2).await;
    assert_eq!(memory.claims(), 0);
    let retry = ask_for(&app, "k").await;
    assert_eq!(retry.code(), 409);
    assert_eq!(retry.problem().as_deref(), Some("not-replayable"));
    gate.open(1);
    assert_eq!(first.await.unwrap().text(), "order 1");
    let retry = ask_for(&app, "k").await;
    assert_eq!(retry.problem().as_deref(), Some("not-replayable"));
    assert_eq!(runs.count(), 1);
    layer.drain().await;
}

// ---- 4. A client that leaves cancels nothing ----

#[tokio::test]
async fn invariant_04_a_client_that_leaves_cancels_nothing() {
    let memory = MemoryStorage::new();
    let (events, runs, gate) = (Events::new(), Runs::new(), Gate::new());
    let layer = IdempotencyLayer::enforce(memory.clone())
        .config(Config::default().observer(events.clone()));
    let app = Router::new()
        .route("/orders", gated(&runs, &gate))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let call = server.post("/orders").key("k").start();
    gate.arrived(1).await;
    call.abort();
    events.until("adopted", 1).await;
    assert_eq!((memory.claims(), layer.engine().running()), (1, 1));
    gate.open(1);
    layer.drain().await;
    assert_eq!((memory.claims(), memory.records()), (0, 1));
    let retry = server.post("/orders").key("k").send().await;
    assert_eq!((retry.code(), retry.text()), (409, "order 1"));
    assert!(retry.is_replay());
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn invariant_04_a_client_that_leaves_during_the_claim_leaves_no_orphan() {
    let memory = MemoryStorage::new();
    let storage = FaultyStorage::new(memory.clone());
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Begin, Fault::Gate(gate.clone()));
    let (events, runs) = (Events::new(), Runs::new());
    let config = Config::default()
        .storage_timeout(LONG)
        .observer(events.clone());
    let layer = IdempotencyLayer::enforce(storage.clone()).config(config);
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let call = server.post("/orders").key("k").start();
    in_time("begin", async {
        while storage.calls(Operation::Begin) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    call.abort();
    events.until("adopted", 1).await;
    gate.add_permits(1);
    layer.drain().await;
    assert_eq!((memory.claims(), memory.records(), runs.count()), (0, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn invariant_04_an_adopted_request_stays_in_its_span() {
    let (logs, _guard) = Logs::install();
    let events = Events::new();
    let layer = IdempotencyLayer::enforce(MemoryStorage::new())
        .config(Config::default().observer(events.clone()));
    let gate = Gate::new();
    let spans = Arc::new(Mutex::new(Vec::new()));
    let handler = {
        let (gate, spans) = (gate.clone(), spans.clone());
        async move || {
            let note = || {
                let span = tracing::Span::current();
                spans
                    .lock()
                    .unwrap()
                    .push(span.metadata().map(|it| it.name()));
            };
            note();
            gate.enter().await;
            note();
        }
    };
    let app = Router::new()
        .route("/orders", post(handler))
        .layer(layer.clone());
    let span = tracing::info_span!("the_request");
    let request = tokio::spawn(async move { ask_for(&app, "k").await }.instrument(span));
    idle().await;
    request.abort();
    idle().await;
    assert_eq!(events.count("adopted"), 1);
    gate.open(1);
    layer.drain().await;
    assert_eq!(*spans.lock().unwrap(), [Some("the_request"); 2]);
    assert!(!logs.lines().is_empty());
}

#[tokio::test(start_paused = true)]
async fn invariant_04_the_common_path_spawns_nothing() {
    let (env, clock, [spawned, slept]) = counting();
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let layer = IdempotencyLayer::enforce(memory).config(Config::default().env(env));
    let runs = Runs::new();
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer.clone());
    for n in 0..100 {
        let key = format!("k{n}");
        assert_eq!(ask_for(&app, &key).await.code(), 201);
        assert!(ask_for(&app, &key).await.is_replay());
    }
    assert_eq!(runs.count(), 100);
    // The keeper, once, and its timer.
    assert!(spawned.load(Ordering::SeqCst) <= 1);
    assert!(slept.load(Ordering::SeqCst) <= 1);
    layer.drain().await;
    drop(clock);
}

#[tokio::test]
async fn invariant_04_a_panic_of_ours_releases_the_claim() {
    // Whatever panics between the claim and the record, here a function of the configuration.
    let memory = MemoryStorage::new();
    let panics = Arc::new(AtomicUsize::new(0));
    let store_on = {
        let panics = panics.clone();
        StoreOn::from_fn(move |_| {
            assert!(panics.fetch_add(1, Ordering::SeqCst) > 0, "injected");
            true
        })
    };
    let layer =
        IdempotencyLayer::enforce(memory.clone()).config(Config::default().store_on(store_on));
    let runs = Runs::new();
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer.clone())
        .layer(CatchPanicLayer::new());
    assert_eq!(ask_for(&app, "k").await.code(), 500);
    layer.drain().await;
    assert_eq!((memory.claims(), layer.engine().running()), (0, 0));
}

// ---- 5. The first client gets its answer in full, and its end once the record is stored ----

#[tokio::test]
async fn invariant_05_what_is_not_recorded_reaches_the_first_client_in_full() {
    async fn large() -> Vec<u8> {
        vec![b'x'; 5000]
    }
    async fn large_stream() -> Body {
        Body::from_stream(stream::iter(0..5).then(async |_| {
            tokio::task::yield_now().await;
            Ok::<_, Infallible>(Bytes::from(vec![b'x'; 1000]))
        }))
    }
    async fn sse() -> impl IntoResponse {
        ([("content-type", "text/event-stream")], "data: 1\n\n")
    }
    let layer = IdempotencyLayer::enforce(MemoryStorage::new())
        .config(Config::default().max_response_body(4999));
    let app = Router::new()
        .route("/large", post(large))
        .route("/large_stream", post(large_stream))
        .route("/sse", post(sse))
        .layer(layer);
    let server = Server::start(app).await;
    for (path, whole) in [
        ("/large", "x".repeat(5000)),
        ("/large_stream", "x".repeat(5000)),
        ("/sse", "data: 1\n\n".to_owned()),
    ] {
        let first = server.post(path).key("k").send().await;
        assert_eq!((first.code(), first.text()), (200, &*whole));
        let retry = server.post(path).key("k").send().await;
        assert_eq!(retry.code(), 409, "{path}");
        assert_eq!(retry.problem().as_deref(), Some("not-replayable"), "{path}");
    }
}

/// Whoever has seen the end of an answer finds its record.
#[tokio::test]
async fn invariant_05_a_streamed_answer_is_recorded_before_it_ends() {
    async fn streamed() -> Body {
        Body::from_stream(stream::iter(0..5).then(async |n| {
            tokio::task::yield_now().await;
            Ok::<_, Infallible>(Bytes::from(format!("part {n};")))
        }))
    }
    let storage = FaultyStorage::new(MemoryStorage::new());
    let app = Router::new()
        .route("/streamed", post(streamed))
        .layer(IdempotencyLayer::enforce(storage.clone()));
    let server = Server::start(app).await;
    let whole = "part 0;part 1;part 2;part 3;part 4;";
    for n in 0..20 {
        let key = format!("k{n}");
        let first = server.post("/streamed").key(&key).send().await;
        assert_eq!((first.code(), first.text()), (200, whole));
        let retry = server.post("/streamed").key(&key).send().await;
        assert_eq!((retry.code(), retry.text()), (409, whole));
        assert!(retry.is_replay());
    }
}

// ---- 6. What is not stored frees its key at once ----

#[tokio::test]
async fn invariant_06_a_status_that_is_not_stored_frees_its_key() {
    for (config, statuses) in [
        (
            Config::default(),
            &[208, 302, 303, 400, 404, 409, 422, 500, 503][..],
        ),
        (
            Config::ietf(),
            &[401, 403, 408, 409, 423, 425, 429, 500, 503],
        ),
        (Config::stripe(), &[401, 403, 408, 425, 429]),
    ] {
        let memory = MemoryStorage::new();
        let layer = IdempotencyLayer::enforce(memory.clone()).config(config);
        let runs = Runs::new();
        let handler = {
            let runs = runs.clone();
            async move |request: Request<Body>| {
                runs.next();
                let status = request.uri().query().unwrap();
                StatusCode::from_bytes(status.as_bytes()).unwrap()
            }
        };
        let app = Router::new()
            .route("/orders", post(handler))
            .layer(layer.clone());
        for status in statuses {
            let path = format!("/orders?{status}");
            for _ in 0..2 {
                let key = format!("k{status}");
                let request = post_with(&path, &[("idempotency-key", &key)], "");
                let answer = ask(&app, request).await;
                assert_eq!(answer.code(), *status);
                assert!(!answer.is_replay());
                // When the client has its answer, the key is free.
                assert_eq!((memory.claims(), memory.records()), (0, 0), "{status}");
            }
        }
        assert_eq!(runs.count(), 2 * statuses.len());
        layer.drain().await;
    }
}

#[tokio::test]
async fn invariant_06_a_panic_counts_as_a_500() {
    let five_hundred = StoreOn::statuses([StatusCode::INTERNAL_SERVER_ERROR]);
    for (config, stored) in [
        (Config::default(), false),
        (Config::ietf(), false),
        (Config::stripe(), true),
        (Config::default().store_on(five_hundred), true),
    ] {
        let runs = Runs::new();
        let handler = {
            let runs = runs.clone();
            async move || {
                assert!(runs.next() > 1, "injected");
                "second"
            }
        };
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
        let app = Router::new()
            .route("/orders", post(handler))
            .layer(layer.clone())
            .layer(CatchPanicLayer::new());
        assert_eq!(ask_for(&app, "k").await.code(), 500);
        let retry = ask_for(&app, "k").await;
        if stored {
            assert_eq!(retry.code(), 409);
            assert_eq!(retry.problem().as_deref(), Some("not-replayable"));
            assert_eq!(runs.count(), 1);
        } else {
            assert_eq!((retry.code(), retry.text()), (200, "second"));
            assert_eq!(runs.count(), 2);
        }
        layer.drain().await;
    }
}

/// What becomes of the first request; those after it are answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum First {
    Answered,
    Panics,
    Fails,
    NeverReady,
}

/// A service that is no handler, and counts its runs.
#[derive(Clone)]
struct Work {
    first: First,
    runs: Runs,
}

impl Service<Request<Body>> for Work {
    type Response = Response;
    type Error = &'static str;
    type Future = BoxFuture<'static, Result<Response, &'static str>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
        if self.first == First::NeverReady && self.runs.count() == 0 {
            self.runs.next();
            return Poll::Ready(Err("not ready"));
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        let (first, run) = (self.first, self.runs.next());
        Box::pin(async move {
            match first {
                First::Panics if run == 1 => panic!("injected: the handler"),
                First::Fails if run == 1 => Err("failed"),
                _ => Ok(format!("order {run}").into_response()),
            }
        })
    }
}

/// Sends the same request twice to [`Work`]: what the first came to, in words, the answer to the retry, and the number of runs.
async fn twice_to_work(first: First, store_on: StoreOn) -> (String, Response, usize) {
    let runs = Runs::new();
    let layer = IdempotencyLayer::enforce(MemoryStorage::new())
        .config(Config::default().store_on(store_on))
        .policy(KeyPolicy::required());
    let service = layer.layer(Work {
        first,
        runs: runs.clone(),
    });
    let send = || {
        let request = post_with("/orders", &[("idempotency-key", "k")], "");
        AssertUnwindSafe(service.clone().oneshot(request)).catch_unwind()
    };
    let end = match send().await {
        Ok(Ok(response)) => response.status().to_string(),
        Ok(Err(error)) => error.to_owned(),
        Err(panic) => panic.downcast_ref::<&str>().unwrap().to_string(),
    };
    let retry = send().await.expect("a retry does not panic");
    let retry = retry.expect("a retry does not fail");
    layer.drain().await;
    (end, retry, runs.count())
}

#[tokio::test]
async fn invariant_06_an_error_counts_as_a_500() {
    for (first, end) in [
        (First::Panics, "injected: the handler"),
        (First::Fails, "failed"),
    ] {
        let (said, retry, runs) = twice_to_work(first, StoreOn::success()).await;
        assert_eq!((&*said, retry.status(), runs), (end, StatusCode::OK, 2));
        let (said, retry, runs) = twice_to_work(first, StoreOn::all()).await;
        assert_eq!(
            (&*said, retry.status(), runs),
            (end, StatusCode::CONFLICT, 1)
        );
    }
    // What was never ready was never called.
    for store_on in [StoreOn::success(), StoreOn::all()] {
        let (said, retry, _) = twice_to_work(First::NeverReady, store_on).await;
        assert_eq!((&*said, retry.status()), ("not ready", StatusCode::OK));
    }
}

/// Nobody says whether the outcome is to be stored, so it must not run again.
#[tokio::test]
async fn invariant_06_a_store_on_that_panics_leaves_a_tombstone() {
    for (first, end) in [
        (First::Answered, "injected: which are stored?"),
        (First::Panics, "injected: the handler"),
        (First::Fails, "failed"),
    ] {
        let store_on = StoreOn::from_fn(|_| panic!("injected: which are stored?"));
        let (said, retry, runs) = twice_to_work(first, store_on).await;
        assert_eq!(said, end);
        assert_eq!(
            (retry.status(), runs),
            (StatusCode::CONFLICT, 1),
            "{first:?}"
        );
        let problem = retry.extensions().get::<Problem>().expect("no replay");
        assert_eq!(problem.refusal(), Refusal::NotReplayable);
    }
}

// ---- 7. An answer that can't be stored is answered from memory until it can ----

#[tokio::test(start_paused = true)]
async fn invariant_07_an_answer_that_can_not_be_stored_is_not_lost() {
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let storage = FaultyStorage::new(memory.clone());
    let (events, runs) = (Events::new(), Runs::new());
    let config = || {
        Config::default()
            .env(env.clone())
            .lock(LockPolicy::default().timeout(Duration::ZERO))
    };
    let layer =
        IdempotencyLayer::enforce(storage.clone()).config(config().observer(events.clone()));
    let other = IdempotencyLayer::enforce(memory.clone()).config(config());
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer.clone());
    let other_app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(other);
    storage.set(Operation::Complete, Fault::FailBefore);
    let first = ask_for(&app, "k").await;
    assert_eq!((first.code(), first.text()), (201, "order 1"));

    for _ in 0..10 {
        pass(&clock, LEASE / 2).await;
        let retry = ask_for(&app, "k").await;
        assert_eq!((retry.code(), retry.text()), (409, "order 1"));
        // Renewed meanwhile, so other nodes do not run it either.
        assert_eq!(ask_for(&other_app, "k").await.code(), 423);
    }
    let tries = storage.calls(Operation::Complete);
    // With backoff: by 10 s at most, and not in a rush.
    assert!((10..60).contains(&tries), "{tries}");
    storage.heal(Operation::Complete);
    pass(&clock, LEASE / 2).await;
    layer.drain().await;
    for app in [&app, &other_app] {
        let retry = ask_for(app, "k").await;
        assert_eq!((retry.code(), retry.text()), (409, "order 1"));
    }
    assert_eq!((runs.count(), memory.claims()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn invariant_07_it_is_tried_until_its_ttl_is_over() {
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let storage = FaultyStorage::new(memory.clone());
    let (events, runs) = (Events::new(), Runs::new());
    let config = Config::default()
        .env(env)
        .ttl(4 * LEASE)
        .observer(events.clone());
    let layer = IdempotencyLayer::enforce(storage.clone()).config(config);
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer.clone());
    storage.set(Operation::Complete, Fault::FailBefore);
    assert_eq!(ask_for(&app, "k").await.code(), 201);
    pass(&clock, 4 * LEASE - Duration::from_secs(1)).await;
    assert!(ask_for(&app, "k").await.is_replay());
    pass(&clock, Duration::from_secs(1)).await;
    layer.drain().await;
    assert_eq!(events.count("abandoned"), 1);
    pass(&clock, LEASE).await;
    assert_eq!(memory.claims(), 0);
    assert_eq!(ask_for(&app, "k").await.text(), "order 2");
}

// ---- 8. A running claim is never evicted ----

#[tokio::test]
async fn invariant_08_memory_pressure_ends_no_claim() {
    for when_full in [WhenFull::Evict, WhenFull::Refuse] {
        let told = Events::new();
        let memory = MemoryStorage::builder()
            .max_bytes(64 << 10)
            .when_full(when_full)
            .observer(told.clone())
            .build();
        let lock = LockPolicy::default().timeout(Duration::ZERO);
        let layer = IdempotencyLayer::enforce(memory.clone()).config(Config::default().lock(lock));
        let (runs, gate) = (Runs::new(), Gate::new());
        let app = Router::new()
            .route("/orders", gated(&runs, &gate))
            .route("/flood", post(async || vec![b'x'; 1000]))
            .layer(layer.clone());
        let server = Server::start(app.clone()).await;
        let running = server.post("/orders").key("running").start();
        gate.arrived(1).await;

        let (mut stored, mut refused) = (0, 0);
        for n in 0..1000 {
            let key = format!("k{n}");
            let request = post_with("/flood", &[("idempotency-key", &key)], "");
            let answer = ask(&app, request).await;
            match answer.code() {
                200 => stored += 1,
                503 => {
                    assert_eq!(answer.problem().as_deref(), Some("storage-unavailable"));
                    assert_eq!(answer.header("retry-after"), Some("1"));
                    refused += 1;
                }
                other => panic!("{other}"),
            }
        }
        assert_eq!(memory.claims(), 1);
        assert_eq!(
            server.post("/orders").key("running").send().await.code(),
            423
        );
        gate.open(1);
        assert_eq!(running.await.unwrap().text(), "order 1");
        assert!(
            server
                .post("/orders")
                .key("running")
                .send()
                .await
                .is_replay()
        );
        assert_eq!(runs.count(), 1);

        if when_full == WhenFull::Evict {
            assert_eq!((stored, refused), (1000, 0));
            assert!(memory.evicted() > 500);
            assert!(told.count("evicted") > 0);
            assert!(memory.weight() < (64 << 10) * 6 / 5);
        } else {
            assert!(stored > 10 && refused > 500, "{stored} {refused}");
            assert_eq!((memory.evicted(), told.count("evicted")), (0, 0));
            // None of those that were stored is lost.
            let request = post_with("/flood", &[("idempotency-key", "k0")], "");
            assert!(ask(&app, request).await.is_replay());
        }
    }
}

// ---- 9. The path in the key is the original one; never scheme or authority ----

#[tokio::test]
async fn invariant_09_the_original_path_and_query_is_in_the_key() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let runs = Runs::new();
    // Two mounts of the same routes, which see the same path.
    let orders = || {
        Router::new()
            .route("/orders", post(runs.handler()))
            .layer(layer.clone())
    };
    let app = Router::new()
        .nest("/shop", orders())
        .nest("/depot", orders())
        .nest("/deep", Router::new().nest("/er", orders()));
    let server = Server::start(app).await;
    let paths = [
        "/shop/orders",
        "/depot/orders",
        "/deep/er/orders",
        "/shop/orders?page=1",
        "/shop/orders?page=2",
        "/shop/orders?",
    ];
    for (n, path) in paths.iter().enumerate() {
        let answer = server.post(path).key("k").send().await;
        assert_eq!(answer.text(), format!("order {}", n + 1), "{path}");
    }
    for (n, path) in paths.iter().enumerate() {
        let answer = server.post(path).key("k").send().await;
        assert!(answer.is_replay());
        assert_eq!(answer.text(), format!("order {}", n + 1), "{path}");
    }
}

#[tokio::test]
async fn invariant_09_scheme_and_authority_are_not_in_the_key() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let runs = Runs::new();
    let orders = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer);
    let server = Server::start(Router::new().nest("/shop", orders)).await;
    for (target, host) in [
        ("/shop/orders", "a.example"),
        ("/shop/orders", "b.example"),
        ("http://c.example/shop/orders", "c.example"),
        ("https://d.example:444/shop/orders", "d.example:444"),
    ] {
        let request = format!(
            "POST {target} HTTP/1.1\r\nhost: {host}\r\nidempotency-key: k\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
        let answer = server.raw(request).await;
        assert_eq!(answer.text(), "order 1", "{target} {host}");
    }
    assert_eq!(runs.count(), 1);
}

// ---- 10. A record that can't be read is a storage error for its key ----

#[tokio::test]
async fn invariant_10_what_can_not_be_read_is_an_error_and_told() {
    let (logs, _guard) = Logs::install();
    let storage = FaultyStorage::new(MemoryStorage::new());
    let (events, runs) = (Events::new(), Runs::new());
    let config = Config::default().observer(events.clone());
    let layer = IdempotencyLayer::enforce(storage.clone()).config(config);
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer);
    storage.set(Operation::Begin, Fault::Unreadable);
    let answer = ask_for(&app, "k").await;
    assert_eq!(answer.code(), 503);
    assert_eq!(answer.problem().as_deref(), Some("storage-unavailable"));
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!((runs.count(), events.count("storage_failed")), (0, 1));
    assert_eq!(logs.with(&["WARN", "begin", "can't be read"]).len(), 1);
    storage.heal(Operation::Begin);
    assert_eq!(ask_for(&app, "k").await.code(), 201);
    // The default, spelled out.
    assert_eq!(Config::default().on_unreadable, OnUnreadable::Reject);
}

// ---- 11. What a key is ----

#[tokio::test]
async fn invariant_11_an_invalid_key_is_an_error_where_it_is_optional_too() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let runs = Runs::new();
    let optional = runs.handler().idempotency_key(KeyPolicy::optional());
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .route("/optional", post(optional))
        .layer(layer);
    let long = "k".repeat(256);
    for key in [
        "",
        " ",
        "\"\"",
        "\"abc",
        "abc\"",
        "a\"b",
        "a,b",
        "\"a\", \"b\"",
        "\"abc\"x",
        "\"a\\b\"",
        "\" a\"",
        &long,
    ] {
        for path in ["/orders", "/optional"] {
            let request = post_with(path, &[("idempotency-key", key)], "");
            let answer = ask(&app, request).await;
            assert_eq!(answer.code(), 400, "{path} {key:?}");
            assert_eq!(answer.problem().as_deref(), Some("invalid-key"), "{key:?}");
        }
    }
    for path in ["/orders", "/optional"] {
        let twice = [("idempotency-key", "a"), ("idempotency-key", "a")];
        let answer = ask(&app, post_with(path, &twice, "")).await;
        assert_eq!(answer.problem().as_deref(), Some("invalid-key"));
    }
    assert_eq!(runs.count(), 0);
    assert_eq!(ask(&app, post_with("/optional", &[], "")).await.code(), 201);
}

#[tokio::test]
async fn invariant_11_quoted_and_bare_are_one_key() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let runs = Runs::new();
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer);
    let groups: [&[&str]; 3] = [
        &[
            "abc",
            "\"abc\"",
            " abc ",
            "\"abc\";attempt=2",
            "\"abc\"; a; b=\"c\"",
        ],
        &["a\\b", "\"a\\\\b\""],
        &["\"say \\\"hi\\\"\"", "\"say \\\"hi\\\"\" "],
    ];
    for (n, spellings) in groups.iter().enumerate() {
        for spelling in *spellings {
            let answer = ask_for(&app, spelling).await;
            assert_eq!(answer.text(), format!("order {}", n + 1), "{spelling}");
        }
    }
    assert_eq!(runs.count(), groups.len());
}

// ---- 12. Nothing reaches a storage key unhashed ----

/// Answers with the storage key of the request.
async fn storage_key(key: IdempotencyKey) -> String {
    key.encoded().to_string()
}

#[tokio::test]
async fn invariant_12_the_storage_key_is_a_golden_hash_of_the_request() {
    // The vector of `idempotency-core/tests/golden.rs`, through a server.
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let app = Router::new()
        .route("/orders", post(storage_key))
        .layer(layer);
    let server = Server::start(app).await;
    let answer = server
        .post("/orders?source=app")
        .key("8e03978e-40d5-43dd-bc93-6894a57f9324")
        .header("authorization", "Bearer alice")
        .json(r#"{"item":"book"}"#)
        .send()
        .await;
    assert_eq!(
        answer.text(),
        "92fc6d4c5c81d6085c2a90779d003725b0b4fcd63fe759a78f0708d140c6ca7f"
    );
}

#[tokio::test]
async fn invariant_12_what_moves_over_the_end_of_a_field_is_another_operation() {
    for config in [Config::default(), Config::ietf(), Config::stripe()] {
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
        let app = Router::new()
            .route("/{*path}", post(storage_key))
            .layer(layer);
        let mut keys = Vec::new();
        for (path, key, scope) in [
            ("/a", "bc", "de"),
            ("/ab", "c", "de"),
            ("/a", "b", "cde"),
            ("/a", "bcd", "e"),
        ] {
            let headers = [("idempotency-key", key), ("authorization", scope)];
            keys.push(ask(&app, post_with(path, &headers, "")).await.body);
        }
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 4);
    }
}

#[tokio::test]
async fn invariant_12_a_storage_sees_hashes_only() {
    let sesame = "sesamesesamesesamesesamesesame32";
    for config in [Config::default(), Config::ietf(), Config::stripe()] {
        let layer = IdempotencyLayer::enforce(MemoryStorage::new())
            .config(config.scope(Scope::header("x-tenant")));
        let app = Router::new()
            .route(
                "/{*path}",
                post(async |key: IdempotencyKey| key.encoded().as_bytes().to_vec()),
            )
            .layer(layer);
        let headers = [("idempotency-key", sesame), ("x-tenant", sesame)];
        let request = post_with(&format!("/{sesame}"), &headers, "sesamesesame");
        let key = ask(&app, request).await.body;
        assert_eq!(key.len(), 32);
        for part in sesame.as_bytes()[..6].windows(3) {
            assert!(!key.windows(3).any(|window| window == part));
        }
    }
}

// ---- 13. What is recorded of an answer ----

#[tokio::test]
async fn invariant_13_a_replay_has_the_headers_that_belong_to_the_answer() {
    async fn handler() -> impl IntoResponse {
        (
            StatusCode::CREATED,
            [
                ("location", "/orders/1"),
                ("x-order", "1"),
                ("x-hop", "1"),
                ("connection", "X-Hop, close"),
                ("keep-alive", "timeout=5"),
                ("proxy-authenticate", "Basic"),
                ("te", "trailers"),
                ("upgrade", "h2c"),
                ("set-cookie", "session=sesame"),
                ("date", "Mon, 01 Jan 2001 00:00:00 GMT"),
                ("cache-control", "no-store"),
                ("content-type", "text/plain"),
            ],
            "order 1",
        )
    }
    let app = |config| {
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
        Router::new().route("/orders", post(handler)).layer(layer)
    };
    let server = Server::start(app(Config::ietf())).await;
    let first = server.post("/orders").key("k").send().await;
    assert_eq!(first.header("set-cookie"), Some("session=sesame"));
    assert_eq!(first.header("x-hop"), Some("1"));
    let replay = server.post("/orders").key("k").send().await;
    assert!(replay.is_replay());
    assert_eq!((replay.code(), replay.text()), (201, "order 1"));
    for (name, value) in [
        ("location", "/orders/1"),
        ("x-order", "1"),
        ("cache-control", "no-store"),
        ("content-type", "text/plain"),
        ("content-length", "7"),
    ] {
        assert_eq!(replay.header(name), Some(value), "{name}");
    }
    for name in [
        "x-hop",
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "te",
        "upgrade",
        "set-cookie",
        "transfer-encoding",
    ] {
        assert_eq!(replay.header(name), None, "{name}");
    }
    assert_ne!(replay.header("date"), Some("Mon, 01 Jan 2001 00:00:00 GMT"));

    let config = Config::ietf()
        .keep_header(http::header::SET_COOKIE)
        .strip_header(http::header::LOCATION);
    let app = app(config);
    assert_eq!(ask_for(&app, "k").await.code(), 201);
    let replay = ask_for(&app, "k").await;
    assert_eq!(replay.header("set-cookie"), Some("session=sesame"));
    assert_eq!(replay.header("location"), None);
}

// ---- 14. Nothing shows a secret ----

#[tokio::test]
async fn invariant_14_no_debug_log_or_refusal_shows_a_secret() {
    let (logs, _guard) = Logs::install();
    let shown = Arc::new(Mutex::new(Vec::new()));
    let seen = {
        let shown = shown.clone();
        move |event: &idempotency_axum::Event<'_>| {
            shown.lock().unwrap().push(format!("{event:?}"));
        }
    };
    let memory = MemoryStorage::new();
    let storage = FaultyStorage::new(memory.clone());
    let config = Config::ietf()
        .max_request_body(100)
        .observer(seen)
        .lock(LockPolicy::default().timeout(Duration::ZERO));
    let layer = IdempotencyLayer::enforce(storage.clone()).config(config);
    let (runs, gate) = (Runs::new(), Gate::new());
    let handler = {
        let shown = shown.clone();
        async move |key: IdempotencyKey, request: Request<Body>| {
            let mut shown = shown.lock().unwrap();
            shown.push(format!("{key:?} {:?}", request.extensions()));
            (
                [("set-cookie", "session=sesame"), ("x-answer", "sesame")],
                "sesame",
            )
        }
    };
    let app = Router::new()
        .route("/orders", post(handler))
        .route("/held", gated(&runs, &gate))
        .layer(layer.clone())
        .layer(CatchPanicLayer::new());
    let secrets = [
        ("idempotency-key", "sesame"),
        ("authorization", "Bearer sesame"),
        ("cookie", "session=sesame"),
        ("x-secret", "sesame"),
    ];
    let mut answers = Vec::new();
    let path = "/orders?token=sesame";
    // Executed, replayed, reused, too large.
    for body in ["sesame", "sesame", "sesame!", &"sesame".repeat(20)] {
        let mut request = post_with(path, &secrets, "");
        *request.body_mut() = Body::from(body.to_owned());
        let answer = ask(&app, request).await;
        shown.lock().unwrap().push(format!("{:?}", answer.code()));
        answers.push(answer);
    }
    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [200, 200, 422, 413]);
    // In flight.
    let held = tokio::spawn({
        let app = app.clone();
        async move { ask(&app, post_with("/held", &secrets, "sesame")).await }
    });
    gate.arrived(1).await;
    answers.push(ask(&app, post_with("/held", &secrets, "sesame")).await);
    gate.open(1);
    held.await.unwrap();
    // Missing and invalid keys, and cookies that the scope overlooks.
    answers.push(ask(&app, post_with(path, &secrets[1..], "sesame")).await);
    for key in ["sesame,sesame", "\"sesame", "sesame\"", "\"sesame\"sesame"] {
        let headers = [("idempotency-key", key), secrets[2]];
        answers.push(ask(&app, post_with(path, &headers, "sesame")).await);
    }
    answers.push(ask(&app, post_with(path, &[secrets[0], secrets[2]], "sesame?")).await);
    // Storages that fail.
    for operation in [Operation::Begin, Operation::Complete] {
        storage.set(operation, Fault::FailBefore);
        let mut request = post_with(path, &secrets, "sesame.");
        request
            .headers_mut()
            .insert("idempotency-key", "sesame-2".parse().unwrap());
        answers.push(ask(&app, request).await);
        storage.heal(operation);
    }
    for answer in &answers[2..] {
        if answer.problem().is_some() {
            shown.lock().unwrap().push(format!("{answer:?}"));
        }
    }
    assert!(
        answers
            .iter()
            .filter(|answer| answer.problem().is_some())
            .count()
            >= 8
    );

    layer.drain().await;
    let mut texts = shown.lock().unwrap().clone();
    texts.extend(logs.lines());
    assert!(texts.len() > 40);
    texts.push(format!("{layer:?} {:?} {memory:?}", layer.engine()));
    texts.push(format!("{:?}", layer.engine().config()));
    let mut headers = HeaderMap::new();
    headers.insert("x-answer", "sesame".parse().unwrap());
    let stored = StoredResponse::new(StatusCode::OK, &headers, "sesame");
    let record = Record {
        fingerprint: None,
        outcome: Outcome::Response(stored),
    };
    texts.push(format!("{record:?} {:?}", Entry::Completed(record.clone())));
    texts.push(format!("{:?}", Begin::Completed(record.clone())));
    texts.push(format!("{:?}", Scope::cookie("session")));
    texts.push(format!("{:?}", TombstoneReason::StreamBroken));
    let corrupt = Record::decode(Bytes::from_static(b"sesame")).unwrap_err();
    texts.push(format!("{corrupt} {corrupt:?}"));
    for text in texts {
        assert!(!text.contains("sesame"), "{text}");
        // Nor as a list of bytes.
        assert!(!text.contains("115, 101, 115"), "{text}");
    }
    assert_eq!(Method::POST.as_str(), "POST");
}
