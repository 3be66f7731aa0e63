//! What others got wrong, and what their users ask for: each a test by its name.
//!
//! [`DEFECTS`] has a line for each of them, and the tests that show that it can't happen here. The tests below go over TCP and each
//! shows one thing; where another suite shows it better, the line names that one too.
//! [`every_defect_has_a_test_that_exists`] keeps the table true.

use std::{collections::BTreeSet, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{HeaderValue, Method, StatusCode, header},
    response::IntoResponse,
    routing::{MethodRouter, any, post},
};
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use idempotency_axum::{
    Config, Encoded, EncodedKey, Env, IdempotencyHandler, IdempotencyLayer, Key, KeyEncoder,
    KeyPolicy, LockPolicy, ManualIdempotency, MemoryStorage, NewClaim, Operation, RequestView,
    Storage, Token, idempotency_key,
};
use idempotency_tests::{
    Answer, Events, Fault, FaultyStorage, Gate, Runs, Server,
    catalogue::{
        Ours::{self, NoMeaning, NotYet, Tests},
        assert_all_named,
    },
};
use tokio::{net::TcpStream, sync::Semaphore, task::JoinHandle};

/// Whose defect, or wish; what it is; and what we have of it.
const DEFECTS: &[(&str, &str, Ours)] = &[
    (
        "idempotent",
        "the path is taken after `nest` stripped it: `/refunds/create` replays `/payments/create`",
        Tests(&[
            "peers::a_path_below_nest_is_not_another_routes_key",
            "answers/conflicts::same_path_in_two_nests",
        ]),
    ),
    (
        "idempotent",
        "a `no-store` answer is not recorded, so its retry runs again",
        Tests(&["peers::an_answer_with_no_store_is_recorded_all_the_same"]),
    ),
    (
        "idempotent",
        "a streamed answer is not recorded, so its retry runs again",
        Tests(&["peers::a_streamed_answer_is_replayed_and_its_handler_does_not_run_again"]),
    ),
    (
        "idempotent, autumn-web",
        "an answer over the limit is not recorded, so its retry runs again",
        Tests(&["peers::an_answer_over_the_limit_reaches_its_client_and_does_not_run_again"]),
    ),
    (
        "idempotent",
        "a panic blocks its key until the lease ends",
        Tests(&["peers::a_panic_frees_its_key_at_once"]),
    ),
    (
        "idempotent",
        "`:` and `/` in keys are refused",
        Tests(&["peers::a_key_may_have_colons_and_slashes"]),
    ),
    (
        "idempotent, footing",
        "a quoted key is another key than the bare one, or is refused",
        Tests(&["peers::a_quoted_key_is_the_bare_key"]),
    ),
    (
        "idempotent, users",
        "a 500 is pinned to its key for a day",
        Tests(&["peers::a_500_is_not_pinned_to_its_key"]),
    ),
    (
        "idempotent",
        "Set-Cookie is replayed",
        Tests(&["peers::a_cookie_is_not_replayed"]),
    ),
    (
        "idempotent, django-idempotency-key",
        "memory grows without a bound",
        Tests(&[
            "peers::memory_is_bounded",
            "idempotency-core/tests/memory_limits.rs::a_million_records_stay_within_the_limit_and_spare_the_running_claim",
        ]),
    ),
    (
        "idempotent",
        "60 to 70 µs for each request",
        NoMeaning(
            "a number of a benchmark and not of a test; `allocations.rs` holds what an unprotected request may cost",
        ),
    ),
    (
        "idempotent",
        "a Lua script with two keys, which a Redis cluster refuses",
        Tests(&["redis/conformance::a_cluster_keeps_every_rule"]),
    ),
    (
        "axum-idempotent, django-idempotency-key",
        "nothing is claimed, or only during the look-up: concurrent duplicates both run",
        Tests(&[
            "peers::of_concurrent_duplicates_one_runs",
            "invariants::invariant_01_one_execution_at_a_time_on_all_nodes",
        ]),
    ),
    (
        "axum-idempotent",
        "a key alone names the operation: path, method and body are ignored",
        Tests(&["peers::the_key_alone_does_not_name_the_operation"]),
    ),
    (
        "axum-idempotent",
        "a GET replays a POST",
        Tests(&["peers::a_get_does_not_get_the_answer_of_a_post"]),
    ),
    (
        "axum-idempotent",
        "when the storage fails the handler runs unprotected, and nobody is told",
        Tests(&["peers::a_storage_that_fails_runs_nothing_silently"]),
    ),
    (
        "autumn-web, idemkit",
        "the lease is not renewed, so a slow handler runs twice",
        Tests(&[
            "peers::a_slow_handler_keeps_its_key_from_every_node",
            "stress::a_handler_that_takes_three_leases_runs_once",
            "stress::a_handler_that_blocks_its_thread_for_three_leases_runs_once",
        ]),
    ),
    (
        "autumn-web",
        "an empty or non-ASCII key passes unprotected",
        Tests(&["peers::an_empty_or_non_ascii_key_is_refused"]),
    ),
    (
        "autumn-web",
        "server-sent events are buffered",
        Tests(&["peers::server_sent_events_are_not_held_back"]),
    ),
    (
        "autumn-web, users",
        "Redis keys without a hash tag: CROSSSLOT on a cluster",
        Tests(&["redis/conformance::a_cluster_keeps_every_rule"]),
    ),
    (
        "cratestack",
        "the lease is as long as the TTL, so what a dead process or a client that left had claimed is stuck for a day",
        Tests(&["peers::a_key_is_not_stuck_when_its_process_dies"]),
    ),
    (
        "cratestack, footing",
        "a client that leaves wedges its key, or pins a 500 to it",
        Tests(&["peers::a_client_that_leaves_finds_its_answer_when_it_comes_back"]),
    ),
    (
        "cratestack",
        "a big answer becomes a 500 after its handler ran",
        Tests(&["peers::an_answer_over_the_limit_reaches_its_client_and_does_not_run_again"]),
    ),
    (
        "Powertools, users",
        "a live claim is taken over: double execution",
        Tests(&[
            "peers::a_slow_handler_keeps_its_key_from_every_node",
            "engine::a_clock_that_jumps_over_the_lease_lets_nobody_here_run_twice",
        ]),
    ),
    (
        "django-idempotency-key",
        "one lock for all keys: one slow request holds up all others",
        Tests(&["peers::a_running_key_does_not_hold_up_another"]),
    ),
    (
        "django-idempotency-key",
        "fields are concatenated without their lengths, so two requests are one",
        Tests(&[
            "peers::what_moves_over_the_end_of_a_field_is_another_operation",
            "invariants::invariant_12_what_moves_over_the_end_of_a_field_is_another_operation",
        ]),
    ),
    (
        "django-idempotency-key",
        "records are pickles, which run code when they are read",
        Tests(&["idempotency-core/src/record/codec.rs::garbage_is_an_error"]),
    ),
    (
        "django-idempotency-key",
        "a manual handler's conflict runs go on at once, and the last one to end wins",
        Tests(&["peers::conflict_runs_of_a_manual_handler_come_one_after_another"]),
    ),
    (
        "users",
        "keys stuck after a crash",
        Tests(&["peers::a_key_is_not_stuck_when_its_process_dies"]),
    ),
    (
        "users",
        "an answer is replayed to another user or tenant",
        Tests(&["peers::nobody_is_shown_the_answer_of_another"]),
    ),
    (
        "users",
        "a duplicate should wait for the answer rather than get a 409",
        Tests(&["peers::a_duplicate_may_wait_for_the_answer"]),
    ),
    (
        "users",
        "the record should be committed together with the business database",
        NotYet("needs the PostgreSQL storage, which lends its transaction"),
    ),
    (
        "users",
        "Location and ETag must survive a replay",
        Tests(&["peers::location_and_etag_survive_a_replay"]),
    ),
    (
        "users",
        "a TTL for each route",
        Tests(&["peers::a_route_has_its_own_ttl"]),
    ),
    (
        "users",
        "no secrets at rest",
        Tests(&["invariants::invariant_12_a_storage_sees_hashes_only"]),
    ),
    (
        "users",
        "answers that stream",
        Tests(&[
            "peers::a_streamed_answer_reaches_its_client_frame_by_frame",
            "peers::a_streamed_answer_is_recorded_though_its_client_left",
            "peers::a_stream_that_breaks_off_does_not_run_again",
        ]),
    ),
    (
        "users",
        "metrics",
        Tests(&["peers::everything_that_happens_can_be_counted"]),
    ),
    (
        "users",
        "OpenAPI",
        // `macros/pass/utoipa.rs`.
        Tests(&["macros::what_works_runs"]),
    ),
];

#[test]
fn every_defect_has_a_test_that_exists() {
    let mut seen = BTreeSet::new();
    for (peer, defect, ours) in DEFECTS {
        assert!(!peer.is_empty() && seen.insert(defect), "{defect}");
        ours.check();
    }
    let rows = DEFECTS.iter().map(|(_, _, ours)| *ours);
    assert_all_named("peers", rows, &["every_defect_has_a_test_that_exists"]);
}

// ---- what the tests share

const KEY: &str = "the-key";
/// What a test that hangs is given.
const LONG: Duration = idempotency_tests::PATIENCE;

fn enforce(config: Config) -> IdempotencyLayer {
    IdempotencyLayer::enforce(MemoryStorage::new()).config(config)
}

/// Duplicates are refused at once.
fn impatient() -> LockPolicy {
    LockPolicy::default().timeout(Duration::ZERO)
}

/// Duplicates wait for as long as it takes.
fn patient() -> LockPolicy {
    LockPolicy::default().timeout(LONG)
}

/// `POST` that counts its run, and answers once the gate lets it.
fn gated(runs: &Runs, gate: &Gate) -> MethodRouter {
    let (runs, gate) = (runs.clone(), gate.clone());
    post(async move || {
        let run = runs.next();
        gate.enter().await;
        (StatusCode::CREATED, format!("order {run}"))
    })
}

#[track_caller]
fn assert_ran(answer: &Answer, run: usize) {
    let body = format!("order {run}");
    assert_eq!((answer.code(), answer.text()), (201, &*body));
    assert!(!answer.is_replay());
}

/// That it is a replay, under `Config::ietf`, of run number `run`.
#[track_caller]
fn assert_replay(answer: &Answer, run: usize) {
    let body = format!("order {run}");
    assert_eq!((answer.code(), answer.text()), (201, &*body));
    assert!(answer.is_replay());
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, problem: &str) {
    let found = (answer.code(), answer.problem());
    assert_eq!(found, (status, Some(problem.to_owned())), "{answer:?}");
}

/// Every request is one operation, of this name.
struct Constant;

const CONSTANT: EncodedKey = EncodedKey::from_bytes([7; 32]);

impl KeyEncoder for Constant {
    fn encode(&self, _: &Key, _: &RequestView<'_>) -> Encoded {
        Encoded {
            key: CONSTANT,
            fingerprint: None,
        }
    }
}

// ---- what names an operation

#[tokio::test]
async fn a_path_below_nest_is_not_another_routes_key() {
    let runs = Runs::new();
    let layer = enforce(Config::ietf());
    let nested = || {
        let router = Router::new().route("/create", post(runs.handler()));
        router.layer(layer.clone())
    };
    let router = Router::new()
        .nest("/payments", nested())
        .nest("/refunds", nested());
    let server = Server::start(router).await;
    let create = |what| server.post(what).key(KEY).send();
    assert_ran(&create("/payments/create").await, 1);
    assert_ran(&create("/refunds/create").await, 2);
    assert_replay(&create("/payments/create").await, 1);
}

#[tokio::test]
async fn the_key_alone_does_not_name_the_operation() {
    for config in [Config::default(), Config::ietf(), Config::stripe()] {
        let runs = Runs::new();
        let router = Router::new()
            .route("/orders", any(runs.handler()))
            .route("/refunds", any(runs.handler()))
            .layer(enforce(config));
        let server = Server::start(router).await;
        let call = |method, path| server.call(method, path).key(KEY);
        let first = call(Method::POST, "/orders").body("one").send().await;
        assert_ran(&first, 1);
        for other in [
            call(Method::POST, "/refunds").body("one"),
            call(Method::PUT, "/orders").body("one"),
            call(Method::POST, "/orders").body("two"),
        ] {
            // It runs as what it is or is refused; it never gets the answer of the first.
            let other = other.send().await;
            assert!(!other.is_replay() && other.body != first.body, "{other:?}");
        }
    }
}

#[tokio::test]
async fn what_moves_over_the_end_of_a_field_is_another_operation() {
    let runs = Runs::new();
    let order = {
        let runs = runs.clone();
        async move |Path(_): Path<String>| (StatusCode::CREATED, format!("order {}", runs.next()))
    };
    let router = Router::new()
        .route("/orders/{id}", post(order))
        .layer(enforce(Config::default()));
    let server = Server::start(router).await;
    // One after another these are the same bytes.
    for (run, key, path, body) in [
        (1, "abc", "/orders/12", "3"),
        (2, "abc", "/orders/1", "23"),
        (3, "abc", "/orders/123", ""),
    ] {
        assert_ran(&server.post(path).key(key).body(body).send().await, run);
    }
}

#[tokio::test]
async fn a_get_does_not_get_the_answer_of_a_post() {
    for config in [Config::default(), Config::ietf(), Config::stripe()] {
        let runs = Runs::new();
        let router = Router::new()
            .route("/orders", any(runs.handler()))
            .layer(enforce(config));
        let server = Server::start(router).await;
        assert_ran(&server.post("/orders").key(KEY).send().await, 1);
        for run in 2..=3 {
            assert_ran(&server.get("/orders").key(KEY).send().await, run);
        }
    }
}

#[tokio::test]
async fn a_key_may_have_colons_and_slashes() {
    let runs = Runs::new();
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(enforce(Config::ietf()));
    let server = Server::start(router).await;
    let keys = ["shop:7/order:8", "shop:7/order", "a=b;c?d#e", "{tag}"];
    for (run, key) in (1..).zip(keys) {
        assert_ran(&server.post("/orders").key(key).send().await, run);
        assert_replay(&server.post("/orders").key(key).send().await, run);
    }
}

#[tokio::test]
async fn a_quoted_key_is_the_bare_key() {
    let runs = Runs::new();
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(enforce(Config::ietf()));
    let server = Server::start(router).await;
    assert_ran(&server.post("/orders").key("8e03978e").send().await, 1);
    for quoted in [r#""8e03978e""#, r#""8e03978e";attempt=2"#] {
        assert_replay(&server.post("/orders").key(quoted).send().await, 1);
    }
}

#[tokio::test]
async fn an_empty_or_non_ascii_key_is_refused() {
    let runs = Runs::new();
    let optional = KeyPolicy::optional();
    let router = Router::new()
        .route("/required", post(runs.handler()))
        .route("/optional", post(runs.handler().idempotency_key(optional)))
        .layer(enforce(Config::default()));
    let server = Server::start(router).await;
    for path in ["/required", "/optional"] {
        for key in [&b""[..], b"  ", br#""""#, "schlüssel".as_bytes(), b"\xff"] {
            let answer = server.post(path).key(key).send().await;
            assert_refused(&answer, 400, "invalid-key");
        }
    }
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn nobody_is_shown_the_answer_of_another() {
    let runs = Runs::new();
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(enforce(Config::ietf()));
    let server = Server::start(router).await;
    let call = |token| {
        let call = server.post("/orders").key(KEY);
        call.header("authorization", token).send()
    };
    assert_ran(&call("Bearer alice").await, 1);
    assert_ran(&call("Bearer bob").await, 2);
    assert_ran(&server.post("/orders").key(KEY).send().await, 3);
    assert_replay(&call("Bearer alice").await, 1);
}

// ---- who runs

#[tokio::test]
async fn of_concurrent_duplicates_one_runs() {
    for lock in [impatient(), patient()] {
        let (runs, gate, events) = (Runs::new(), Gate::new(), Events::new());
        let config = Config::ietf().lock(lock.clone()).observer(events.clone());
        let router = Router::new()
            .route("/orders", gated(&runs, &gate))
            .layer(enforce(config));
        let server = Server::start(router).await;
        let first = server.post("/orders").key(KEY).start();
        gate.arrived(1).await;
        let others: Vec<_> = (0..9)
            .map(|_| server.post("/orders").key(KEY).start())
            .collect();
        if lock == patient() {
            events.until("waiting", 9).await;
        } else {
            events.until("refused", 9).await;
        }
        gate.open(10);
        assert_ran(&first.await.unwrap(), 1);
        for other in others {
            let other = other.await.unwrap();
            assert!(other.is_replay() || other.code() == 409, "{other:?}");
        }
        assert_eq!(runs.count(), 1);
    }
}

#[tokio::test]
async fn a_duplicate_may_wait_for_the_answer() {
    let (runs, gate, events) = (Runs::new(), Gate::new(), Events::new());
    let config = Config::ietf().lock(patient()).observer(events.clone());
    let router = Router::new()
        .route("/orders", gated(&runs, &gate))
        .layer(enforce(config));
    let server = Server::start(router).await;
    let first = server.post("/orders").key(KEY).start();
    gate.arrived(1).await;
    let duplicate = server.post("/orders").key(KEY).start();
    events.until("waiting", 1).await;
    gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    assert_replay(&duplicate.await.unwrap(), 1);
}

#[tokio::test]
async fn a_running_key_does_not_hold_up_another() {
    let (runs, gate) = (Runs::new(), Gate::new());
    let router = Router::new()
        .route("/slow", gated(&runs, &gate))
        .route("/quick", post(runs.handler()))
        .layer(enforce(Config::ietf()));
    let server = Server::start(router).await;
    let slow = server.post("/slow").key("slow").start();
    gate.arrived(1).await;
    assert_ran(&server.post("/quick").key("quick").send().await, 2);
    gate.open(1);
    assert_ran(&slow.await.unwrap(), 1);
}

/// Nine leases long the claim is renewed, here and for another node that shares the storage.
#[tokio::test]
async fn a_slow_handler_keeps_its_key_from_every_node() {
    let (env, clock) = Env::simulated(1);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let storage = FaultyStorage::new(memory);
    let config = Config::ietf().lock(impatient()).env(env);
    let (runs, gate) = (Runs::new(), Gate::new());
    let mut nodes = Vec::new();
    for _ in 0..2 {
        let layer = IdempotencyLayer::enforce(storage.clone()).config(config.clone());
        let router = Router::new().route("/orders", gated(&runs, &gate));
        nodes.push(Server::start(router.layer(layer)).await);
    }
    let first = nodes[0].post("/orders").key(KEY).start();
    gate.arrived(1).await;
    for renewals in 1..=27 {
        // A third of the default lease of 30 s.
        clock.advance(Duration::from_secs(10));
        until(|| storage.calls(Operation::Renew) >= renewals).await;
    }
    for node in &nodes {
        let duplicate = node.post("/orders").key(KEY).send().await;
        assert_refused(&duplicate, 409, "in-flight");
    }
    gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    for node in &nodes {
        assert_replay(&node.post("/orders").key(KEY).send().await, 1);
    }
    assert_eq!(runs.count(), 1);
}

/// Returns once `is_so`; other tasks run meanwhile.
async fn until(is_so: impl Fn() -> bool) {
    let wait = async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, wait).await.expect("in time");
}

#[tokio::test]
async fn a_key_is_not_stuck_when_its_process_dies() {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let config = Config::ietf().encoder(Constant).lock(impatient()).env(env);
    // What a process that is killed leaves: its claim, and nobody who renews it.
    let lease = Duration::from_secs(30);
    let claim = NewClaim {
        token: Token::random(),
        fingerprint: None,
        lease,
    };
    let _ = storage.begin(&CONSTANT, &claim).await.unwrap();

    let runs = Runs::new();
    let layer = IdempotencyLayer::enforce(storage).config(config);
    let router = Router::new().route("/orders", post(runs.handler()));
    let server = Server::start(router.layer(layer)).await;
    let call = || server.post("/orders").key(KEY).send();
    assert_refused(&call().await, 409, "in-flight");
    clock.advance(lease);
    assert_ran(&call().await, 1);
}

#[tokio::test]
async fn a_client_that_leaves_finds_its_answer_when_it_comes_back() {
    let (runs, gate, events) = (Runs::new(), Gate::new(), Events::new());
    let layer = enforce(Config::ietf().observer(events.clone()));
    let router = Router::new()
        .route("/orders", gated(&runs, &gate))
        .layer(layer.clone());
    let server = Server::start(router).await;
    let leaves = server.post("/orders").key(KEY).start();
    gate.arrived(1).await;
    leaves.abort();
    events.until("adopted", 1).await;
    gate.open(1);
    layer.drain().await;
    assert_replay(&server.post("/orders").key(KEY).send().await, 1);
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn a_panic_frees_its_key_at_once() {
    let runs = Runs::new();
    let panics_once = {
        let runs = runs.clone();
        async move || {
            let run = runs.next();
            assert!(run > 1, "the first run panics, as it should");
            (StatusCode::CREATED, format!("order {run}"))
        }
    };
    let router = Router::new()
        .route("/orders", post(panics_once))
        .layer(enforce(Config::ietf().lock(impatient())));
    let server = Server::start(router).await;
    let call = || server.post("/orders").key(KEY);
    assert!(call().try_send().await.is_err(), "as without us");
    assert_ran(&call().send().await, 2);
    assert_replay(&call().send().await, 2);
}

#[tokio::test]
async fn a_500_is_not_pinned_to_its_key() {
    for config in [Config::default(), Config::ietf()] {
        let runs = Runs::new();
        let fails_once = {
            let runs = runs.clone();
            async move || match runs.next() {
                1 => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
                run => (StatusCode::CREATED, format!("order {run}")),
            }
        };
        let router = Router::new()
            .route("/orders", post(fails_once))
            .layer(enforce(config));
        let server = Server::start(router).await;
        let call = || server.post("/orders").key(KEY).send();
        assert_eq!(call().await.code(), 500);
        assert_ran(&call().await, 2);
        assert!(call().await.is_replay());
    }
}

#[tokio::test]
async fn a_storage_that_fails_runs_nothing_silently() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let (runs, events) = (Runs::new(), Events::new());
    let layer =
        IdempotencyLayer::enforce(storage.clone()).config(Config::ietf().observer(events.clone()));
    let router = Router::new().route("/orders", post(runs.handler()));
    let server = Server::start(router.layer(layer)).await;
    let call = || server.post("/orders").key(KEY).send();
    for fault in [Fault::FailBefore, Fault::Unreadable] {
        storage.set(Operation::Begin, fault);
        let refused = call().await;
        assert_refused(&refused, 503, "storage-unavailable");
        assert!(refused.header("retry-after").is_some());
    }
    assert_eq!((runs.count(), events.count("storage_failed")), (0, 2));
    storage.heal(Operation::Begin);
    assert_ran(&call().await, 1);
}

// ---- what is recorded

#[tokio::test]
async fn an_answer_with_no_store_is_recorded_all_the_same() {
    let runs = Runs::new();
    let order = {
        let runs = runs.clone();
        async move || {
            let no_store = [(header::CACHE_CONTROL, "no-store")];
            (
                StatusCode::CREATED,
                no_store,
                format!("order {}", runs.next()),
            )
        }
    };
    let router = Router::new()
        .route("/orders", post(order))
        .layer(enforce(Config::ietf()));
    let server = Server::start(router).await;
    assert_ran(&server.post("/orders").key(KEY).send().await, 1);
    let retry = server.post("/orders").key(KEY).send().await;
    assert_replay(&retry, 1);
    assert_eq!(retry.header("cache-control"), Some("no-store"));
}

#[tokio::test]
async fn location_and_etag_survive_a_replay() {
    let order = async || {
        let headers = [(header::LOCATION, "/orders/1"), (header::ETAG, "\"v1\"")];
        (StatusCode::CREATED, headers, "order 1")
    };
    let router = Router::new()
        .route("/orders", post(order))
        .layer(enforce(Config::ietf()));
    let server = Server::start(router).await;
    let first = server.post("/orders").key(KEY).send().await;
    let retry = server.post("/orders").key(KEY).send().await;
    assert!(retry.is_replay());
    for name in ["location", "etag", "content-type"] {
        assert!(first.header(name).is_some());
        assert_eq!(retry.header(name), first.header(name));
    }
}

#[tokio::test]
async fn a_cookie_is_not_replayed() {
    let order = async || ([(header::SET_COOKIE, "session=alice")], "order 1");
    let router = Router::new()
        .route("/orders", post(order))
        .layer(enforce(Config::ietf()));
    let server = Server::start(router).await;
    let first = server.post("/orders").key(KEY).send().await;
    assert_eq!(first.header("set-cookie"), Some("session=alice"));
    let retry = server.post("/orders").key(KEY).send().await;
    assert!(retry.is_replay());
    assert_eq!(retry.header("set-cookie"), None);
}

#[tokio::test]
async fn an_answer_over_the_limit_reaches_its_client_and_does_not_run_again() {
    for chunks in [false, true] {
        let runs = Runs::new();
        let export = {
            let runs = runs.clone();
            async move || {
                runs.next();
                let bytes = vec![b'x'; 100_000];
                match chunks {
                    false => Body::from(bytes),
                    true => Body::from_stream(
                        stream::iter(
                            bytes
                                .chunks(1000)
                                .map(Bytes::copy_from_slice)
                                .collect::<Vec<_>>(),
                        )
                        .map(Ok::<_, Infallible>),
                    ),
                }
            }
        };
        let router = Router::new()
            .route("/exports", post(export))
            .layer(enforce(Config::ietf().max_response_body(5000)));
        let server = Server::start(router).await;
        let first = server.post("/exports").key(KEY).send().await;
        assert_eq!((first.code(), first.body.len()), (200, 100_000));
        let retry = server.post("/exports").key(KEY).send().await;
        assert_refused(&retry, 409, "not-replayable");
        assert_eq!(runs.count(), 1);
    }
}

#[tokio::test]
async fn a_route_has_its_own_ttl() {
    #[idempotency_key(ttl = "1h")]
    async fn mail(State(runs): State<Runs>) -> (StatusCode, String) {
        order(State(runs)).await
    }
    async fn order(State(runs): State<Runs>) -> (StatusCode, String) {
        (StatusCode::CREATED, format!("order {}", runs.next()))
    }
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let layer = IdempotencyLayer::enforce(storage).config(Config::ietf().env(env));
    let router = Router::new()
        .route("/mails", post(mail))
        .route("/orders", post(order))
        .layer(layer)
        .with_state(Runs::new());
    let server = Server::start(router).await;
    let call = |path| server.post(path).key(KEY).send();
    assert_ran(&call("/mails").await, 1);
    assert_ran(&call("/orders").await, 2);
    clock.advance(Duration::from_secs(3600));
    assert_ran(&call("/mails").await, 3);
    assert_replay(&call("/orders").await, 2);
}

#[tokio::test]
async fn memory_is_bounded() {
    const LIMIT: usize = 64 * 1024;
    let storage = MemoryStorage::builder().max_bytes(LIMIT).build();
    let layer = IdempotencyLayer::enforce(storage.clone()).config(Config::ietf());
    let echo = async |body: Bytes| body;
    let router = Router::new().route("/echo", post(echo)).layer(layer);
    let server = Server::start(router).await;
    for n in 0..100 {
        let call = server.post("/echo").key(format!("key-{n}"));
        let answer = call.body(vec![b'x'; 2000]).send().await;
        assert_eq!(answer.body.len(), 2000);
        // Claims, and what the map itself takes, come on top.
        let weight = storage.weight() as f64;
        assert!(weight <= 1.2 * LIMIT as f64, "{weight}");
    }
    assert!(storage.evicted() > 0);
    // The last one is still there.
    let call = server.post("/echo").key("key-99");
    assert!(call.body(vec![b'x'; 2000]).send().await.is_replay());
}

#[tokio::test]
async fn everything_that_happens_can_be_counted() {
    let (runs, events) = (Runs::new(), Events::new());
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(enforce(Config::ietf().observer(events.clone())));
    let server = Server::start(router).await;
    let call = |body: &'static str| server.post("/orders").key(KEY).body(body).send();
    assert_ran(&call("one").await, 1);
    assert_replay(&call("one").await, 1);
    assert_refused(&call("two").await, 422, "key-reused");
    let counts = ["executing", "completed", "replayed", "refused"].map(|name| events.count(name));
    assert_eq!(counts, [1, 1, 1, 1]);
}

// ---- answers that stream

/// A handler whose rows come one by one, as the test lets them; `None` breaks the stream off.
#[derive(Clone)]
struct Rows {
    runs: Runs,
    passes: Arc<Semaphore>,
    content_type: HeaderValue,
    rows: Vec<Option<&'static str>>,
}

impl Rows {
    fn new(content_type: &'static str, rows: &[Option<&'static str>]) -> Self {
        Self {
            runs: Runs::new(),
            passes: Arc::new(Semaphore::new(0)),
            content_type: HeaderValue::from_static(content_type),
            rows: rows.to_vec(),
        }
    }

    fn let_pass(&self, rows: usize) {
        self.passes.add_permits(rows);
    }

    async fn serve(&self, layer: &IdempotencyLayer) -> Server {
        let rows = self.clone();
        let handler = async move || rows.answer();
        let router = Router::new().route("/rows", post(handler));
        Server::start(router.layer(layer.clone())).await
    }

    fn answer(self) -> impl IntoResponse {
        self.runs.next();
        let content_type = [(header::CONTENT_TYPE, self.content_type)];
        let rows = stream::iter(self.rows).then(move |row| {
            let passes = self.passes.clone();
            async move {
                passes.acquire().await.unwrap().forget();
                row.ok_or_else(|| std::io::Error::other("the source is gone"))
            }
        });
        (content_type, Body::from_stream(rows))
    }
}

/// A client that reads an answer frame by frame.
struct Reader {
    body: Incoming,
    connection: JoinHandle<()>,
}

impl Reader {
    async fn post(server: &Server, path: &str) -> Self {
        let stream = TcpStream::connect(server.address()).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(async move {
            // How it ends is seen in the body.
            let _ = connection.await;
        });
        let request = http::Request::post(path)
            .header("host", "rows")
            .header("idempotency-key", KEY)
            .body(Empty::<Bytes>::new())
            .unwrap();
        let answer = sender.send_request(request);
        let answer = tokio::time::timeout(LONG, answer).await;
        let answer = answer.expect("the head of the answer").unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        Self {
            body: answer.into_body(),
            connection,
        }
    }

    /// The next frame; `None` at the end.
    async fn frame(&mut self) -> Option<Result<Bytes, hyper::Error>> {
        let frame = tokio::time::timeout(LONG, self.body.frame()).await;
        let frame = frame.expect("a frame or the end")?;
        Some(frame.map(|frame| frame.into_data().expect("data")))
    }

    fn leave(self) {
        self.connection.abort();
    }
}

const CSV: &str = "text/csv";

#[tokio::test]
async fn a_streamed_answer_reaches_its_client_frame_by_frame() {
    let rows = Rows::new(CSV, &[Some("1,one\n"), Some("2,two\n"), Some("3,three\n")]);
    let server = rows.serve(&enforce(Config::ietf())).await;
    let mut reader = Reader::post(&server, "/rows").await;
    for row in ["1,one\n", "2,two\n", "3,three\n"] {
        // The row after it does not exist yet.
        rows.let_pass(1);
        assert_eq!(reader.frame().await.unwrap().unwrap(), row);
    }
    assert!(reader.frame().await.is_none());
}

#[tokio::test]
async fn a_streamed_answer_is_replayed_and_its_handler_does_not_run_again() {
    let rows = Rows::new(CSV, &[Some("1,one\n"), Some("2,two\n")]);
    let server = rows.serve(&enforce(Config::ietf())).await;
    let mut reader = Reader::post(&server, "/rows").await;
    rows.let_pass(2);
    let mut read = Vec::new();
    while let Some(frame) = reader.frame().await {
        read.extend(frame.unwrap());
    }
    // Once the first client has seen the end, the record is there.
    let retry = server.post("/rows").key(KEY).send().await;
    assert_eq!((retry.code(), retry.is_replay()), (200, true));
    assert_eq!(retry.body, read);
    assert_eq!(retry.header("content-type"), Some(CSV));
    assert_eq!(rows.runs.count(), 1);
}

#[tokio::test]
async fn a_streamed_answer_is_recorded_though_its_client_left() {
    let rows = Rows::new(CSV, &[Some("1,one\n"), Some("2,two\n")]);
    let layer = enforce(Config::ietf());
    let server = rows.serve(&layer).await;
    let mut reader = Reader::post(&server, "/rows").await;
    rows.let_pass(1);
    assert_eq!(reader.frame().await.unwrap().unwrap(), "1,one\n");
    reader.leave();
    rows.let_pass(1);
    tokio::time::timeout(LONG, layer.drain()).await.unwrap();
    let retry = server.post("/rows").key(KEY).send().await;
    assert_eq!((retry.code(), retry.is_replay()), (200, true));
    assert_eq!(retry.text(), "1,one\n2,two\n");
    assert_eq!(rows.runs.count(), 1);
}

#[tokio::test]
async fn a_stream_that_breaks_off_does_not_run_again() {
    let rows = Rows::new(CSV, &[Some("1,one\n"), None]);
    let server = rows.serve(&enforce(Config::ietf())).await;
    let mut reader = Reader::post(&server, "/rows").await;
    rows.let_pass(1);
    assert_eq!(reader.frame().await.unwrap().unwrap(), "1,one\n");
    rows.let_pass(1);
    assert!(reader.frame().await.unwrap().is_err(), "it is not the end");
    let retry = server.post("/rows").key(KEY).send().await;
    assert_refused(&retry, 409, "not-replayable");
    assert_eq!(rows.runs.count(), 1);
}

#[tokio::test]
async fn server_sent_events_are_not_held_back() {
    let rows = Rows::new(
        "text/event-stream",
        &[Some("data: 1\n\n"), Some("data: 2\n\n")],
    );
    let server = rows.serve(&enforce(Config::ietf().lock(impatient()))).await;
    let mut reader = Reader::post(&server, "/rows").await;
    rows.let_pass(1);
    assert_eq!(reader.frame().await.unwrap().unwrap(), "data: 1\n\n");
    // It has no end to wait for: a retry is told so while it still goes on.
    let retry = server.post("/rows").key(KEY).send().await;
    assert_refused(&retry, 409, "not-replayable");
    rows.let_pass(1);
    assert_eq!(reader.frame().await.unwrap().unwrap(), "data: 2\n\n");
    assert!(reader.frame().await.is_none());
    assert_eq!(rows.runs.count(), 1);
}

// ---- manual handlers

/// Two retries come while the first of them is at the gate: the second one sees what the first has stored.
#[tokio::test]
async fn conflict_runs_of_a_manual_handler_come_one_after_another() {
    let gate = Gate::new();
    let count = {
        let gate = gate.clone();
        async move |manual: ManualIdempotency| {
            let calls = match manual.response() {
                None => 0,
                Some(last) => String::from_utf8_lossy(last.body()).parse::<u32>().unwrap(),
            };
            gate.enter().await;
            (calls + 1).to_string()
        }
    };
    let manual = KeyPolicy::required().manual();
    let router = Router::new()
        .route("/count", post(count.idempotency_key(manual)))
        .layer(enforce(Config::ietf().lock(patient())));
    let server = Server::start(router).await;
    let call = || server.post("/count").key(KEY);
    gate.open(1);
    assert_eq!(call().send().await.text(), "1");

    let retries: Vec<_> = (0..5).map(|_| call().start()).collect();
    for arrived in 2..=6 {
        gate.arrived(arrived).await;
        gate.open(1);
    }
    let mut answers = Vec::new();
    for retry in retries {
        answers.push(retry.await.unwrap().text().to_owned());
    }
    answers.sort();
    assert_eq!(answers, ["2", "3", "4", "5", "6"]);
}
