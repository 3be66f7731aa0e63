//! Crowds, disconnects, blocked threads, panics: whatever happens, no key runs twice and nothing is left behind.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body, extract::Path, response::Response, routing::post};
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use idempotency_axum::{
    Completion, Config, Decision, Encoded, Engine, Env, IdempotencyKey, IdempotencyLayer,
    LockPolicy, MemoryStorage, Operation, Outcome, Refusal, StorageError,
};
use idempotency_tests::{
    Answer, Call, Events, Fault, FaultyStorage, Gate, Hook, Hooked, PATIENCE, Runs, Server,
    StorageCall,
    node::{answer, operation, poll_times},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, oneshot},
    task::JoinSet,
};
use tower::{Service, ServiceExt};
use tower_http::{catch_panic::CatchPanicLayer, timeout::TimeoutLayer};

/// Longer than any test runs: whoever waits for this was forgotten.
const LONG: Duration = Duration::from_secs(300);

/// For crowds on a small machine: whatever takes its time is not an error.
fn crowded(events: &Events) -> Config {
    Config::default()
        .lock(patient())
        .storage_timeout(LONG)
        .observer(events.clone())
}

/// A lock policy under which a duplicate waits until it is told.
fn patient() -> LockPolicy {
    LockPolicy::default().timeout(LONG)
}

/// SplitMix64: the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 33) as usize % limit
    }
}

async fn yields(times: usize) {
    for _ in 0..times {
        tokio::task::yield_now().await;
    }
}

/// Fails a test that would hang.
async fn in_time<F: Future>(what: &str, work: F) -> F::Output {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(output) => output,
        Err(_) => panic!("{what} does not end"),
    }
}

/// Returns once nothing runs and nobody waits; what is left then is left for ever.
async fn assert_quiet(engine: &Engine, memory: &MemoryStorage) {
    in_time("what the clients left behind", async {
        // A duplicate whose client left while it claimed is adopted, and may wait for others.
        loop {
            engine.drain().await;
            if engine.waiting() == 0 && memory.waiters() == 0 {
                break;
            }
            tokio::task::yield_now().await;
        }
        engine.drain().await;
    })
    .await;
    assert_eq!((engine.running(), engine.waiting()), (0, 0));
    assert_eq!((memory.claims(), memory.waiters()), (0, 0));
}

fn request(path: &str, key: &str) -> Request<Body> {
    Request::post(path)
        .header("idempotency-key", key)
        .body(Body::empty())
        .unwrap()
}

async fn ask<S>(app: &S, path: &str, key: &str) -> Answer
where
    S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone,
{
    let Ok(response) = app.clone().oneshot(request(path, key)).await;
    let (parts, body) = response.into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: body.collect().await.unwrap().to_bytes(),
    }
}

/// Each connection takes two descriptors here: both of its ends are in this process.
fn assert_descriptors(connections: usize) {
    let Ok(limits) = std::fs::read_to_string("/proc/self/limits") else {
        return;
    };
    let limit: usize = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .and_then(|line| line.split_whitespace().nth(3)?.parse().ok())
        .unwrap_or(usize::MAX);
    let needed = 2 * connections + 100;
    assert!(
        limit >= needed,
        "this test opens {needed} files and may open {limit}: run it under `ulimit -n {needed}`"
    );
}

// ---- Crowds ----

/// Sends `count` requests with one key at once, and lets the handler answer when `ready` says so.
async fn crowd(count: usize, config: Config, waits: bool) -> (Vec<Answer>, Answer, usize) {
    assert_descriptors(count);
    let (events, gate, runs) = (Events::new(), Gate::new(), Runs::new());
    let memory = MemoryStorage::new();
    let layer = IdempotencyLayer::enforce(memory.clone()).config(config.observer(events.clone()));
    let handler = {
        let (gate, runs) = (gate.clone(), runs.clone());
        async move || {
            let run = runs.next();
            gate.enter().await;
            (StatusCode::CREATED, format!("order {run}"))
        }
    };
    let app = Router::new()
        .route("/orders", post(handler))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let calls: Vec<_> = (0..count)
        .map(|_| server.post("/orders").key("crowd").body("one book").start())
        .collect();
    gate.arrived(1).await;
    if waits {
        events.until("waiting", count - 1).await;
    } else {
        events.until("refused", count - 1).await;
    }
    gate.open(count);
    let mut answers = Vec::new();
    for call in calls {
        answers.push(call.await.unwrap());
    }
    let retry = server
        .post("/orders")
        .key("crowd")
        .body("one book")
        .send()
        .await;
    assert_quiet(layer.engine(), &memory).await;
    (answers, retry, runs.count())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_at_once_get_one_answer() {
    let config = Config::ietf().lock(patient());
    let (mut answers, retry, runs) = crowd(1000, config, true).await;
    assert_eq!(runs, 1);
    let replays = answers.iter().filter(|answer| answer.is_replay()).count();
    assert_eq!(replays, 999);
    assert!(retry.is_replay());
    answers.push(retry);
    for answer in &mut answers {
        // The server sets the one for each answer, the other tells a replay.
        answer.headers.remove("date");
        answer.headers.remove("idempotency-replayed");
        assert_eq!((answer.code(), answer.text()), (201, "order 1"));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_that_may_not_wait_are_refused() {
    let impatient = LockPolicy::default().timeout(Duration::ZERO);
    for (config, refused, replayed) in [
        (Config::default().lock(impatient.clone()), 423, 409),
        (Config::ietf().lock(impatient), 409, 201),
    ] {
        let (mut answers, retry, runs) = crowd(1000, config, false).await;
        assert_eq!(runs, 1);
        answers.retain(|answer| answer.code() != 201);
        assert_eq!(answers.len(), 999);
        for answer in answers {
            assert_eq!(answer.code(), refused);
            assert_eq!(answer.problem().as_deref(), Some("in-flight"));
            assert_eq!(answer.header("retry-after"), Some("1"));
            assert!(!answer.is_replay());
        }
        assert_eq!((retry.code(), retry.text()), (replayed, "order 1"));
        assert!(retry.is_replay());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_duplicates_of_an_engine_get_one_answer() {
    let memory = MemoryStorage::new();
    let events = Events::new();
    let config = Config::default().lock(patient()).observer(events.clone());
    let engine = Engine::new(memory.clone(), config);
    let executions = Runs::new();
    let mut duplicates = JoinSet::new();
    for _ in 0..10_000 {
        let (engine, executions) = (engine.clone(), executions.clone());
        duplicates.spawn(async move {
            match engine.begin(&operation(1)).await {
                Decision::Execute(claim) => {
                    executions.next();
                    yields(1000).await;
                    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
                    0
                }
                Decision::Replay(replay) => {
                    assert_eq!(replay.record.outcome, Outcome::Response(answer("one")));
                    1
                }
                other => panic!("{other:?}"),
            }
        });
    }
    let replays: usize = in_time("a duplicate", duplicates.join_all())
        .await
        .into_iter()
        .sum();
    assert_eq!((executions.count(), replays), (1, 9_999));
    assert!(events.count("waiting") > 0);
    assert_quiet(&engine, &memory).await;
}

/// Duplicates that each run when the one before gave up, while others leave. The clock stands still, so who is not woken sleeps
/// for ever.
async fn relay(engines: usize) {
    const DUPLICATES: usize = 2_000;

    let (env, _clock) = Env::simulated(11);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let config = || Config::default().lock(patient()).env(env.clone());
    let engines: Vec<_> = (0..engines)
        .map(|_| Engine::new(memory.clone(), config()))
        .collect();
    let inside = Arc::new(AtomicBool::new(false));
    let mut random = Random(12);
    let (mut stay, mut leave) = (JoinSet::new(), JoinSet::new());
    for n in 0..DUPLICATES {
        let engine = engines[n % engines.len()].clone();
        if random.below(2) == 0 {
            let (polls, drops) = (random.below(60), random.below(2) == 0);
            leave.spawn(async move {
                let encoded = operation(1);
                let mut beginning = Box::pin(engine.begin(&encoded));
                match poll_times(beginning.as_mut(), polls).await {
                    Some(Decision::Execute(claim)) if drops => drop(claim),
                    Some(Decision::Execute(claim)) => claim.release().await,
                    Some(other) => panic!("{other:?}"),
                    None => {}
                }
            });
        } else {
            let inside = inside.clone();
            stay.spawn(async move {
                match engine.begin(&operation(1)).await {
                    Decision::Execute(claim) => {
                        assert!(!inside.swap(true, Ordering::SeqCst), "two at once");
                        tokio::task::yield_now().await;
                        inside.store(false, Ordering::SeqCst);
                        claim.release().await;
                    }
                    other => panic!("{other:?}"),
                }
            });
        }
    }
    in_time("one that left", leave.join_all()).await;
    in_time("one that was not woken", stay.join_all()).await;
    for engine in &engines {
        assert_quiet(engine, &memory).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_duplicate_of_an_engine_has_its_turn() {
    relay(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_duplicate_of_three_nodes_has_its_turn() {
    relay(3).await;
}

// ---- Clients that leave ----

/// Operations by number, and how often each ran.
#[derive(Clone)]
struct Ledger(Arc<Vec<AtomicUsize>>);

impl Ledger {
    fn new(operations: usize) -> Self {
        Self(Arc::new(
            (0..operations).map(|_| AtomicUsize::new(0)).collect(),
        ))
    }

    fn runs(&self, n: usize) -> usize {
        self.0[n].load(Ordering::SeqCst)
    }

    /// Runs operation `n`, which takes a while and always ends with an answer that is stored.
    fn router(&self, layer: &IdempotencyLayer) -> Router {
        let ledger = self.clone();
        let handler = async move |Path(n): Path<usize>| {
            ledger.0[n].fetch_add(1, Ordering::SeqCst);
            yields(n % 16).await;
            (StatusCode::CREATED, format!("order {n}"))
        };
        Router::new()
            .route("/orders/{n}", post(handler))
            .layer(layer.clone())
    }

    /// Every key is usable at once, and ran once.
    async fn assert_once(&self, app: &Router) {
        for n in 0..self.0.len() {
            let answer = ask(app, &format!("/orders/{n}"), "k").await;
            assert_eq!(answer.text(), format!("order {n}"));
            assert_eq!(answer.code(), if answer.is_replay() { 409 } else { 201 });
            assert_eq!(self.runs(n), 1, "runs of {n}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_dropped_at_random_points_leave_nothing() {
    const CLIENTS: usize = 10_000;
    const OPERATIONS: usize = 1_000;

    let memory = MemoryStorage::new();
    let events = Events::new();
    let storage = Jumpy::around(memory.clone());
    let layer = IdempotencyLayer::enforce(storage).config(crowded(&events));
    let ledger = Ledger::new(OPERATIONS);
    let app = ledger.router(&layer);
    let mut random = Random(1);
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let path = format!("/orders/{}", random.below(OPERATIONS));
        let polls = match random.below(4) {
            0 => usize::MAX,
            _ => random.below(40),
        };
        let app = app.clone();
        clients.spawn(async move {
            let mut response = Box::pin(app.oneshot(request(&path, "k")));
            if let Some(Ok(response)) = poll_times(response.as_mut(), polls).await {
                let status = response.status().as_u16();
                assert!(matches!(status, 201 | 409), "{status}");
            }
        });
    }
    in_time("a client", clients.join_all()).await;
    assert_quiet(layer.engine(), &memory).await;
    ledger.assert_once(&app).await;
    // The drops met all of them: those that ran or claimed, and those that waited.
    assert!(events.count("adopted") > 100);
    assert!(events.count("waiting") > 100);
    assert!(events.count("replayed") > 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_connections_closed_at_random_points_leave_nothing() {
    const CLIENTS: usize = 10_000;
    const AT_ONCE: usize = 100;
    const OPERATIONS: usize = 1_000;

    assert_descriptors(AT_ONCE);
    let memory = MemoryStorage::new();
    let events = Events::new();
    let storage = Jumpy::around(memory.clone());
    let layer = IdempotencyLayer::enforce(storage).config(crowded(&events));
    let ledger = Ledger::new(OPERATIONS);
    let app = ledger.router(&layer);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = axum::serve(listener, app.clone()).with_graceful_shutdown(async {
        let _ = stopped.await;
    });
    let server = tokio::spawn(serving.into_future());
    let mut clients = JoinSet::new();
    for client in 0..AT_ONCE {
        clients.spawn(async move {
            let mut random = Random(client as u64);
            for _ in 0..CLIENTS / AT_ONCE {
                let n = random.below(OPERATIONS);
                let request = format!(
                    "POST /orders/{n} HTTP/1.1\r\nhost: x\r\nidempotency-key: k\r\ncontent-length: 0\r\n\r\n"
                );
                let mut connection = TcpStream::connect(address).await.unwrap();
                let sent = match random.below(8) {
                    0 => random.below(request.len()),
                    _ => request.len(),
                };
                connection.write_all(&request.as_bytes()[..sent]).await.unwrap();
                match random.below(4) {
                    0 if sent == request.len() => {
                        let mut status = [0; 12];
                        connection.read_exact(&mut status).await.unwrap();
                        let status = std::str::from_utf8(&status[9..]).unwrap();
                        assert!(matches!(status, "201" | "409"), "{status}");
                    }
                    _ => yields(random.below(30)).await,
                }
            }
        });
    }
    in_time("a client", clients.join_all()).await;
    // Every connection that was made comes to its end before the count.
    stop.send(()).unwrap();
    in_time("a connection", server).await.unwrap().unwrap();
    assert_quiet(layer.engine(), &memory).await;
    ledger.assert_once(&app).await;
    assert!(events.count("adopted") > 100);
    assert!(events.count("replayed") > 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_during_the_claim_and_while_they_wait_leave_nothing() {
    const OPERATIONS: usize = 100;

    assert_descriptors(2 * OPERATIONS);
    let memory = MemoryStorage::new();
    let events = Events::new();
    let storage = FaultyStorage::new(memory.clone());
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Begin, Fault::Gate(gate.clone()));
    let layer = IdempotencyLayer::enforce(storage.clone()).config(
        Config::default()
            .lock(patient())
            .storage_timeout(LONG)
            .observer(events.clone()),
    );
    let ledger = Ledger::new(OPERATIONS);
    let app = ledger.router(&layer);
    let server = Server::start(app.clone()).await;

    let calls: Vec<_> = (0..OPERATIONS)
        .map(|n| server.post(&format!("/orders/{n}")).key("k").start())
        .collect();
    in_time("a claim", async {
        while storage.calls(Operation::Begin) < OPERATIONS {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for call in &calls {
        call.abort();
    }
    events.until("adopted", OPERATIONS).await;
    assert_eq!(events.count("executing"), 0);
    gate.add_permits(OPERATIONS);
    assert_quiet(layer.engine(), &memory).await;
    storage.heal(Operation::Begin);
    for n in 0..OPERATIONS {
        assert_eq!(ledger.runs(n), 1);
    }
    ledger.assert_once(&app).await;

    // Duplicates that leave while they wait are gone, and the original does not mind.
    let (hold, held) = (Gate::new(), Runs::new());
    let handler = {
        let (hold, held) = (hold.clone(), held.clone());
        async move || {
            held.next();
            hold.enter().await;
            "held"
        }
    };
    let router = Router::new()
        .route("/held", post(handler))
        .layer(layer.clone());
    let server = Server::start(router).await;
    let original = server.post("/held").key("k").start();
    hold.arrived(1).await;
    let waiting = events.count("waiting");
    let duplicates: Vec<_> = (0..OPERATIONS)
        .map(|_| server.post("/held").key("k").start())
        .collect();
    events.until("waiting", waiting + OPERATIONS).await;
    for duplicate in &duplicates {
        duplicate.abort();
    }
    in_time("a duplicate that left", async {
        while layer.engine().waiting() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    hold.open(1);
    assert_eq!(original.await.unwrap().text(), "held");
    assert_eq!(held.count(), 1);
    assert_quiet(layer.engine(), &memory).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_leaves_while_its_answer_is_stored_leaves_a_record() {
    let memory = MemoryStorage::new();
    let events = Events::new();
    let storage = FaultyStorage::new(memory.clone());
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Complete, Fault::Gate(gate.clone()));
    let layer = IdempotencyLayer::enforce(storage.clone()).config(
        Config::default()
            .storage_timeout(LONG)
            .observer(events.clone()),
    );
    let runs = Runs::new();
    let app = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let call = server.post("/orders").key("k").start();
    in_time("complete", async {
        while storage.calls(Operation::Complete) < 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    call.abort();
    events.until("adopted", 1).await;
    assert_eq!(memory.records(), 0);
    gate.add_permits(1);
    assert_quiet(layer.engine(), &memory).await;
    assert_eq!(memory.records(), 1);
    let retry = server.post("/orders").key("k").send().await;
    assert_eq!((retry.code(), retry.text()), (409, "order 1"));
    assert!(retry.is_replay());
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn a_handler_that_a_timeout_inside_cancels_is_released() {
    let runs = Runs::new();
    let handler = {
        let runs = runs.clone();
        async move || {
            if runs.next() == 1 {
                std::future::pending::<()>().await;
            }
            "second"
        }
    };
    let memory = MemoryStorage::new();
    let layer = IdempotencyLayer::enforce(memory.clone());
    // The second call has to come in time.
    let limit = TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, Duration::from_secs(2));
    let app = Router::new()
        .route("/orders", post(handler).layer(limit))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let first = server.post("/orders").key("k").send().await;
    assert_eq!(first.code(), 504);
    assert_quiet(layer.engine(), &memory).await;
    let second = server.post("/orders").key("k").send().await;
    assert_eq!((second.code(), second.text()), (200, "second"));
    assert_eq!(runs.count(), 2);
}

#[test]
fn a_server_may_be_shut_down_in_the_midst_of_requests() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let (servers, clients) = (runtime(), runtime());
    let gate = Gate::new();
    let memory = MemoryStorage::new();
    let events = Events::new();
    let layer = IdempotencyLayer::enforce(memory.clone())
        .config(Config::default().lock(patient()).observer(events.clone()));
    let server = servers.block_on(async {
        let gate = gate.clone();
        let handler = async move || gate.enter().await;
        let app = Router::new()
            .route("/orders", post(handler))
            .layer(layer.clone());
        Server::start(app).await
    });
    let address = server.address();
    let call = |key: &str| {
        let call = Call::new(address, Method::POST, "/orders").key(key);
        clients.spawn(call.try_send())
    };
    // One whose client is there, one whose client has left, and a duplicate.
    let stays = call("one");
    let leaves = call("two");
    clients.block_on(gate.arrived(2));
    let waits = call("one");
    clients.block_on(events.until("waiting", 1));
    leaves.abort();
    clients.block_on(events.until("adopted", 1));
    drop(server);
    drop(servers);
    for call in [stays, waits] {
        assert!(clients.block_on(call).unwrap().is_err());
    }
    // What a crash leaves: claims that end with their leases.
    assert_eq!(layer.engine().running(), 0);
    assert_eq!(layer.engine().waiting(), 0);
    assert_eq!(memory.waiters(), 0);
}

// ---- Handlers that take long ----

const LEASE: Duration = Duration::from_millis(1_500);

/// Another node: asks for the key in a runtime of its own until there is an answer. Says whether it might have run.
fn other_node(
    memory: MemoryStorage,
    encoded: Encoded,
    started: Arc<AtomicBool>,
) -> std::thread::JoinHandle<bool> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(async {
            let lock = LockPolicy::default().timeout(Duration::ZERO);
            let node = Engine::new(memory, Config::default().lock(lock));
            started.store(true, Ordering::SeqCst);
            loop {
                match node.begin(&encoded).await {
                    Decision::Execute(claim) => {
                        claim.release().await;
                        return true;
                    }
                    Decision::Replay(_) => return false,
                    Decision::Refuse(refused) => {
                        assert_eq!(refused.refusal, Refusal::InFlight);
                    }
                    Decision::Unprotected => unreachable!("not configured"),
                }
                // How often it looks; nothing depends on it.
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
    })
}

/// Runs a handler for three leases, with duplicates here and on another node.
async fn takes_three_leases(blocks: bool) {
    let memory = MemoryStorage::new();
    let lock = patient().ttl(LEASE);
    let layer = IdempotencyLayer::enforce(memory.clone()).config(Config::ietf().lock(lock));
    let runs = Runs::new();
    let (began, begun) = tokio::sync::mpsc::unbounded_channel();
    let handler = {
        let runs = runs.clone();
        async move |key: IdempotencyKey| {
            let run = runs.next();
            began.send(key.encoded()).unwrap();
            if blocks {
                std::thread::sleep(3 * LEASE);
            } else {
                tokio::time::sleep(3 * LEASE).await;
            }
            format!("run {run}")
        }
    };
    let app = Router::new()
        .route("/orders", post(handler))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let mut begun = begun;
    let first = server.post("/orders").key("k").start();
    let key = begun.recv().await.unwrap();
    let encoded = Encoded {
        key,
        fingerprint: None,
    };
    let started = Arc::new(AtomicBool::new(false));
    let node = other_node(memory.clone(), encoded, started.clone());
    let duplicates: Vec<_> = (0..5)
        .map(|_| server.post("/orders").key("k").start())
        .collect();
    let first = first.await.unwrap();
    assert_eq!((first.code(), first.text()), (200, "run 1"));
    assert!(!first.is_replay());
    for duplicate in duplicates {
        let duplicate = duplicate.await.unwrap();
        assert_eq!((duplicate.code(), duplicate.text()), (200, "run 1"));
        assert!(duplicate.is_replay());
    }
    assert!(started.load(Ordering::SeqCst));
    assert!(!node.join().unwrap(), "another node would have run it too");
    assert_eq!(runs.count(), 1);
    assert_quiet(layer.engine(), &memory).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_blocks_its_thread_for_three_leases_runs_once() {
    takes_three_leases(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_takes_three_leases_runs_once() {
    takes_three_leases(false).await;
}

/// Blocks a thread of a server with two for three leases, while the other sleeps and the keeper runs already, for another
/// claim: so nothing is spawned that would wake the other. `after_io`: after the handler has waited for the network.
fn blocks_while_all_else_sleeps(after_io: bool) {
    let servers = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let clients = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let memory = MemoryStorage::new();
    let lock = patient().ttl(LEASE);
    let layer = IdempotencyLayer::enforce(memory.clone()).config(Config::default().lock(lock));
    let gate = Gate::new();
    let (began, begun) = std::sync::mpsc::channel();
    let (server, upstream) = servers.block_on(async {
        let upstream = Arc::new(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let upstream_address = upstream.local_addr().unwrap();
        let quiet = {
            let gate = gate.clone();
            async move || gate.enter().await
        };
        let blocks = async move |key: IdempotencyKey| {
            began.send(key.encoded()).unwrap();
            if after_io {
                upstream.accept().await.unwrap();
            }
            std::thread::sleep(3 * LEASE);
            "blocked"
        };
        let app = Router::new()
            .route("/quiet", post(quiet))
            .route("/blocks", post(blocks))
            .layer(layer.clone());
        (Server::start(app).await, upstream_address)
    });
    let address = server.address();
    clients.block_on(async {
        let quiet = Call::new(address, Method::POST, "/quiet")
            .key("quiet")
            .start();
        gate.arrived(1).await;
        // A connection that is there already: the request is one event of the network.
        let mut connection = TcpStream::connect(address).await.unwrap();
        let hello = b"POST /unknown HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n";
        connection.write_all(hello).await.unwrap();
        let mut read = [0; 12];
        connection.read_exact(&mut read).await.unwrap();
        // Until the server has gone to sleep. It proves less if it has not.
        tokio::time::sleep(LEASE / 9).await;
        let blocks =
            b"POST /blocks HTTP/1.1\r\nhost: x\r\nidempotency-key: k\r\ncontent-length: 0\r\n\r\n";
        connection.write_all(blocks).await.unwrap();
        let encoded = Encoded {
            key: begun.recv().unwrap(),
            fingerprint: None,
        };
        if after_io {
            tokio::time::sleep(LEASE / 9).await;
            TcpStream::connect(upstream).await.unwrap();
        }
        let node = other_node(memory.clone(), encoded, Arc::default());
        assert!(!node.join().unwrap(), "another node would have run it too");
        gate.open(1);
        quiet.await.unwrap();
    });
    drop(server);
}

#[test]
fn a_handler_that_blocks_its_thread_while_all_else_sleeps_runs_once() {
    blocks_while_all_else_sleeps(false);
}

#[test]
fn a_handler_that_blocks_its_thread_after_it_waited_runs_once() {
    blocks_while_all_else_sleeps(true);
}

#[tokio::test]
async fn a_handler_over_its_time_leaves_a_tombstone() {
    let (env, clock) = Env::simulated(5);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let (events, gate, runs) = (Events::new(), Gate::new(), Runs::new());
    let layer = IdempotencyLayer::enforce(memory.clone())
        .config(Config::default().env(env).observer(events.clone()));
    let handler = {
        let (gate, runs) = (gate.clone(), runs.clone());
        async move || {
            runs.next();
            gate.enter().await;
            "late"
        }
    };
    let app = Router::new()
        .route("/orders", post(handler))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let first = server.post("/orders").key("k").start();
    gate.arrived(1).await;
    clock.advance(Duration::from_secs(600));
    events.until("tombstoned", 1).await;
    let assert_conflict = async || {
        let retry = server.post("/orders").key("k").send().await;
        assert_eq!(retry.code(), 409);
        assert_eq!(retry.problem().as_deref(), Some("not-replayable"));
        assert_eq!(retry.header("retry-after"), None);
        assert!(!retry.is_replay());
    };
    assert_conflict().await;
    gate.open(10);
    let first = first.await.unwrap();
    assert_eq!((first.code(), first.text()), (200, "late"));
    assert_conflict().await;
    assert_eq!(runs.count(), 1);
    assert_quiet(layer.engine(), &memory).await;
}

// ---- Handlers that panic ----

/// Panics at its first run.
fn panics_once(runs: &Runs) -> axum::routing::MethodRouter {
    let runs = runs.clone();
    post(async move || {
        if runs.next() == 1 {
            panic!("injected");
        }
        "second"
    })
}

#[tokio::test]
async fn a_handler_that_panics_breaks_its_connection_as_without_us() {
    let plain = Server::start(Router::new().route("/orders", panics_once(&Runs::new()))).await;
    let without = plain.post("/orders").key("k").try_send().await;
    assert!(without.is_err());

    let runs = Runs::new();
    let memory = MemoryStorage::new();
    let layer = IdempotencyLayer::enforce(memory.clone());
    let app = Router::new()
        .route("/orders", panics_once(&runs))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let with = server.post("/orders").key("k").try_send().await;
    assert_eq!(
        with.unwrap_err().to_string(),
        without.unwrap_err().to_string()
    );
    // Nothing is in the way of the retry: it need not even wait.
    assert_eq!(memory.claims(), 0);
    let retry = server.post("/orders").key("k").send().await;
    assert_eq!((retry.code(), retry.text()), (200, "second"));
    assert!(!retry.is_replay());
    let replay = server.post("/orders").key("k").send().await;
    assert!(replay.is_replay());
    assert_eq!(runs.count(), 2);
    assert_quiet(layer.engine(), &memory).await;
}

#[tokio::test]
async fn a_panic_that_is_caught_outside_is_a_500() {
    let plain = Router::new()
        .route("/orders", panics_once(&Runs::new()))
        .layer(CatchPanicLayer::new());
    let mut without = ask(&plain, "/orders", "k").await;
    assert_eq!(without.code(), 500);

    let runs = Runs::new();
    let memory = MemoryStorage::new();
    let layer = IdempotencyLayer::enforce(memory.clone());
    let app = Router::new()
        .route("/orders", panics_once(&runs))
        .layer(layer.clone())
        .layer(CatchPanicLayer::new());
    let mut with = ask(&app, "/orders", "k").await;
    with.headers.remove("date");
    without.headers.remove("date");
    assert_eq!(with, without);
    let retry = ask(&app, "/orders", "k").await;
    assert_eq!((retry.code(), retry.text()), (200, "second"));
    assert_eq!(runs.count(), 2);
    assert_quiet(layer.engine(), &memory).await;
}

#[tokio::test]
async fn a_panic_is_an_outcome_where_every_outcome_is_stored() {
    let runs = Runs::new();
    let memory = MemoryStorage::new();
    let layer = IdempotencyLayer::enforce(memory.clone()).config(Config::stripe());
    let app = Router::new()
        .route("/orders", panics_once(&runs))
        .layer(layer.clone())
        .layer(CatchPanicLayer::new());
    assert_eq!(ask(&app, "/orders", "k").await.code(), 500);
    for _ in 0..2 {
        let retry = ask(&app, "/orders", "k").await;
        assert_eq!(retry.code(), 409);
        assert_eq!(retry.problem().as_deref(), Some("not-replayable"));
    }
    assert_eq!(runs.count(), 1);
    assert_quiet(layer.engine(), &memory).await;
}

#[tokio::test]
async fn a_panic_after_its_client_left_frees_the_key() {
    let (gate, runs, events) = (Gate::new(), Runs::new(), Events::new());
    let handler = {
        let (gate, runs) = (gate.clone(), runs.clone());
        async move || {
            let run = runs.next();
            gate.enter().await;
            assert!(run > 1, "injected");
            "second"
        }
    };
    let memory = MemoryStorage::new();
    let layer = IdempotencyLayer::enforce(memory.clone())
        .config(Config::default().lock(patient()).observer(events.clone()));
    let app = Router::new()
        .route("/orders", post(handler))
        .layer(layer.clone());
    let server = Server::start(app).await;
    let first = server.post("/orders").key("k").start();
    gate.arrived(1).await;
    let duplicate = server.post("/orders").key("k").start();
    events.until("waiting", 1).await;
    first.abort();
    events.until("adopted", 1).await;
    gate.open(2);
    let duplicate = duplicate.await.unwrap();
    assert_eq!((duplicate.code(), duplicate.text()), (200, "second"));
    assert_eq!(runs.count(), 2);
    assert_quiet(layer.engine(), &memory).await;
}

// ---- Answers that can't be stored ----

#[tokio::test]
async fn an_answer_that_can_not_be_stored_is_answered_from_memory_until_it_can() {
    for fault in [Fault::FailBefore, Fault::FailAfter, Fault::Unreadable] {
        let has_arrived = matches!(fault, Fault::FailAfter);
        let (env, clock) = Env::simulated(5);
        let memory = MemoryStorage::builder().env(env.clone()).build();
        let storage = FaultyStorage::new(memory.clone());
        let (events, runs) = (Events::new(), Runs::new());
        let config = || Config::default().env(env.clone());
        let layer =
            IdempotencyLayer::enforce(storage.clone()).config(config().observer(events.clone()));
        let app = Router::new()
            .route("/orders", post(runs.handler()))
            .layer(layer.clone());
        let server = Server::start(app).await;
        storage.set(Operation::Complete, fault);
        let first = server.post("/orders").key("k").send().await;
        assert_eq!((first.code(), first.text()), (201, "order 1"));
        let assert_replay = async |server: &Server| {
            let retry = server.post("/orders").key("k").send().await;
            assert_eq!((retry.code(), retry.text()), (409, "order 1"));
            assert!(retry.is_replay());
        };
        assert_replay(&server).await;
        // Ten leases later too. What has arrived, though that was not said, is found there at once.
        let failed = events.count("storage_failed");
        for tick in 1..=if has_arrived { 0 } else { 10 } {
            clock.advance(Duration::from_secs(10));
            events.until("storage_failed", failed + tick).await;
            assert_replay(&server).await;
        }
        storage.heal(Operation::Complete);
        clock.advance(Duration::from_secs(10));
        events.until("completed", 1).await;
        assert_quiet(layer.engine(), &memory).await;
        assert_replay(&server).await;
        assert_eq!(runs.count(), 1);

        let other = IdempotencyLayer::enforce(memory.clone()).config(config());
        let app = Router::new()
            .route("/orders", post(runs.handler()))
            .layer(other);
        assert_replay(&Server::start(app).await).await;
        assert_eq!(runs.count(), 1);
    }
}

// ---- A storage that is sometimes slow ----

/// Yields a random number of times before and after each step.
#[derive(Clone)]
struct Jumpy(Arc<AtomicU64>);

impl Jumpy {
    fn around(storage: MemoryStorage) -> Hooked<MemoryStorage, Self> {
        Hooked::around(storage, Self(Arc::new(AtomicU64::new(3))))
    }
}

impl Hook for Jumpy {
    async fn around<T: Send>(
        &self,
        _: StorageCall<'_>,
        work: impl Future<Output = Result<T, StorageError>> + Send,
    ) -> Result<T, StorageError> {
        let mut random = Random(self.0.fetch_add(1, Ordering::Relaxed));
        yields(random.below(4)).await;
        let result = work.await;
        yields(random.below(4)).await;
        result
    }
}
