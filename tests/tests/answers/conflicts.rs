//! What a second request with a key gets: a replay, a wait, a refusal, or a run of its own.

use std::time::Duration;

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{Method, StatusCode, request::Parts},
    routing::post,
};
use idempotency_axum::{
    Config, Env, IdempotencyLayer, LockPolicy, MemoryStorage, Operation, Scope,
};
use idempotency_tests::{FaultyStorage, Runs, Server};

use crate::{Column, Shop, Work, assert_ran, assert_refused, impatient, patient};

columns!(
    retry_after_completion,
    duplicate_while_the_first_runs,
    duplicate_that_waits_gets_the_answer,
    duplicate_waits_for_a_tenth_of_a_second,
    duplicate_gives_up_after_a_tenth_of_a_second,
    duplicate_runs_when_the_first_is_not_stored,
    same_key_other_body,
    same_key_other_body_while_the_first_runs,
    same_key_other_path,
    same_key_other_path_while_the_first_runs,
    same_key_other_query,
    same_key_other_method,
    same_key_other_method_while_the_first_runs,
    same_key_other_authorization,
    same_key_other_authorization_while_the_first_runs,
    same_key_other_scope,
    other_key_while_the_first_runs,
    same_path_in_two_nests,
    many_duplicates_run_once,
);

async fn retry_after_completion(column: Column) {
    let shop = Shop::open(column.config()).await;
    let call = || shop.server.post("/orders").key("abc").json(r#"{"item":1}"#);
    let first = call().send().await;
    assert_ran(&first, 1);
    for _ in 0..2 {
        let retry = call().send().await;
        column.assert_replay(&retry, 201, "order 1");
        assert_eq!(retry.header("location"), Some("/orders/1"));
        assert_eq!(retry.header("content-type"), first.header("content-type"));
        assert_eq!(retry.header("retry-after"), None);
        assert_eq!(retry.problem(), None);
    }
    assert_eq!(shop.runs(), 1);
}

async fn duplicate_while_the_first_runs(column: Column) {
    let shop = Shop::open(column.config().lock(impatient())).await;
    let call = || shop.server.post("/gated").key("abc").body("x");
    let first = call().start();
    shop.work.gate.arrived(1).await;

    let duplicate = call().send().await;
    assert_refused(&duplicate, column.pick(423, 409, 409), "in-flight");
    assert_eq!(duplicate.header("retry-after"), Some("1"));

    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    column.assert_replay(&call().send().await, 201, "order 1");
    assert_eq!(shop.runs(), 1);
}

async fn duplicate_that_waits_gets_the_answer(column: Column) {
    let shop = Shop::open(column.config().lock(patient())).await;
    let call = || shop.server.post("/gated").key("abc").body("x");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    let duplicates = [call().start(), call().start()];
    shop.events.until("waiting", 2).await;

    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    for duplicate in duplicates {
        column.assert_replay(&duplicate.await.unwrap(), 201, "order 1");
    }
    assert_eq!(shop.runs(), 1);
}

/// Just before the tenth of a second is over the duplicate is still there to get the answer.
async fn duplicate_waits_for_a_tenth_of_a_second(column: Column) {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let shop = Shop::on(storage, column.config().env(env)).await;
    let call = || shop.server.post("/gated").key("abc").body("x");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    let duplicate = call().start();
    shop.events.until("waiting", 1).await;

    clock.advance(Duration::from_millis(99));
    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    column.assert_replay(&duplicate.await.unwrap(), 201, "order 1");
}

/// The first is still at the gate when the duplicate is answered.
async fn duplicate_gives_up_after_a_tenth_of_a_second(column: Column) {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let shop = Shop::on(storage, column.config().env(env)).await;
    let call = || shop.server.post("/gated").key("abc").body("x");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    let duplicate = call().start();
    shop.events.until("waiting", 1).await;

    clock.advance(Duration::from_millis(100));
    let duplicate = duplicate.await.unwrap();
    assert_refused(&duplicate, column.pick(423, 409, 409), "in-flight");
    assert_eq!(duplicate.header("retry-after"), Some("1"));
    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
}

/// A 429 is stored by no column: the key is free, and of the two that wait one runs and the other gets its answer.
async fn duplicate_runs_when_the_first_is_not_stored(column: Column) {
    let routes = Router::new().route("/busy-once", post(busy_once));
    let config = column.config().lock(patient());
    let shop = Shop::with(MemoryStorage::new(), config, routes).await;
    let call = || shop.server.post("/busy-once").key("abc");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    let duplicates = [call().start(), call().start()];
    shop.events.until("waiting", 2).await;

    shop.work.gate.open(2);
    assert_eq!(first.await.unwrap().code(), 429);
    let mut answers = Vec::new();
    for duplicate in duplicates {
        answers.push(duplicate.await.unwrap());
    }
    answers.sort_by_key(|answer| column.is_replay(answer));
    assert_ran(&answers[0], 2);
    column.assert_replay(&answers[1], 201, "order 2");
    assert_eq!(shop.runs(), 2);
}

async fn busy_once(State(work): State<Work>) -> (StatusCode, String) {
    work.gate.enter().await;
    match work.runs.next() {
        1 => (StatusCode::TOO_MANY_REQUESTS, String::new()),
        run => (StatusCode::CREATED, format!("order {run}")),
    }
}

async fn same_key_other_body(column: Column) {
    let shop = Shop::open(column.config()).await;
    let call = |body: &'static str| shop.server.post("/orders").key("abc").body(body);
    assert_ran(&call("one").send().await, 1);
    let other = call("two").send().await;
    match column {
        Column::Default => assert_ran(&other, 2),
        Column::Ietf => assert_refused(&other, 422, "key-reused"),
        Column::Stripe => assert_refused(&other, 400, "key-reused"),
    }
    assert_eq!(other.header("retry-after"), None);
    column.assert_replay(&call("one").send().await, 201, "order 1");
    assert_eq!(shop.runs(), column.pick(2, 1, 1));
}

/// The other body is answered while the first is at the gate, though duplicates would wait for it.
async fn same_key_other_body_while_the_first_runs(column: Column) {
    let shop = Shop::open(column.config().lock(patient())).await;
    let call = |body: &'static str| shop.server.post("/gated").key("abc").body(body);
    let first = call("one").start();
    shop.work.gate.arrived(1).await;
    let other = call("two").start();
    if column == Column::Default {
        shop.work.gate.arrived(2).await;
        shop.work.gate.open(2);
        let (first, other) = (first.await.unwrap(), other.await.unwrap());
        assert_eq!((first.code(), other.code()), (201, 201));
        assert_ne!(first.text(), other.text());
        return;
    }
    let other = other.await.unwrap();
    assert_refused(&other, column.pick(0, 422, 400), "key-reused");
    assert_eq!(other.header("retry-after"), None);
    assert_eq!(shop.events.count("waiting"), 0);
    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
}

async fn same_key_other_path(column: Column) {
    other_request(column, Method::POST, "/payments").await;
}

async fn same_key_other_query(column: Column) {
    other_request(column, Method::POST, "/orders?dry=1").await;
}

async fn same_key_other_method(column: Column) {
    other_request(column, Method::PUT, "/orders").await;
}

/// `POST /orders`, then another request with the same key and body.
async fn other_request(column: Column, method: Method, path: &str) {
    let shop = Shop::open(column.config()).await;
    let first = || shop.server.post("/orders").key("abc").body("x");
    let other = || shop.server.call(method.clone(), path).key("abc").body("x");
    assert_ran(&first().send().await, 1);
    let answer = other().send().await;
    if column == Column::Stripe {
        assert_refused(&answer, 400, "key-reused");
        assert_eq!(answer.header("retry-after"), None);
    } else {
        assert_ran(&answer, 2);
        column.assert_replay(&other().send().await, 201, "order 2");
    }
    column.assert_replay(&first().send().await, 201, "order 1");
}

async fn same_key_other_path_while_the_first_runs(column: Column) {
    let shop = Shop::open(column.config().lock(patient())).await;
    let first = shop.server.post("/gated").key("abc").body("x").start();
    shop.work.gate.arrived(1).await;
    let other = shop
        .server
        .post("/orders")
        .key("abc")
        .body("x")
        .send()
        .await;
    match column {
        Column::Default | Column::Ietf => assert_ran(&other, 1),
        Column::Stripe => assert_refused(&other, 400, "key-reused"),
    }
    shop.work.gate.open(1);
    assert_eq!(first.await.unwrap().code(), 201);
}

async fn same_key_other_authorization(column: Column) {
    let shop = Shop::open(column.config()).await;
    let call = |token: &'static str| {
        let call = shop.server.post("/orders").key("abc").body("x");
        call.header("authorization", token)
    };
    assert_ran(&call("Bearer alice").send().await, 1);
    assert_ran(&call("Bearer bob").send().await, 2);
    // Without any, it is nobody's.
    let anonymous = || shop.server.post("/orders").key("abc").body("x");
    assert_ran(&anonymous().send().await, 3);

    column.assert_replay(&call("Bearer alice").send().await, 201, "order 1");
    column.assert_replay(&call("Bearer bob").send().await, 201, "order 2");
    column.assert_replay(&anonymous().send().await, 201, "order 3");
    // Nor does the other body of one caller concern another.
    let bob = call("Bearer carol").body("y").send().await;
    assert_ran(&bob, 4);
}

/// One of the callers does not wait for the other, nor is its body compared.
async fn same_key_other_authorization_while_the_first_runs(column: Column) {
    let shop = Shop::open(column.config().lock(patient())).await;
    let alice = || {
        let call = shop.server.post("/gated").key("abc").body("x");
        call.header("authorization", "Bearer alice")
    };
    let first = alice().start();
    shop.work.gate.arrived(1).await;
    let bob = shop.server.post("/orders").key("abc").body("y");
    let bob = bob.header("authorization", "Bearer bob").send().await;
    assert_ran(&bob, 1);
    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 2);
    column.assert_replay(&alice().send().await, 201, "order 2");
}

async fn same_key_other_scope(column: Column) {
    for scope in [Scope::header("x-tenant"), Scope::from_fn(tenant)] {
        let shop = Shop::open(column.config().scope(scope)).await;
        let call = |tenant: &'static str| {
            let call = shop.server.post("/orders").key("abc").body("x");
            call.header("x-tenant", tenant)
        };
        assert_ran(&call("one").send().await, 1);
        assert_ran(&call("two").send().await, 2);
        column.assert_replay(&call("one").send().await, 201, "order 1");
        let one = call("two").header("authorization", "Bearer alice");
        column.assert_replay(&one.send().await, 201, "order 2");
        assert_eq!(shop.runs(), 2);
    }
}

fn tenant(request: &Parts) -> Option<Vec<u8>> {
    let tenant = request.headers.get("x-tenant")?;
    Some(tenant.as_bytes().to_vec())
}

/// The same again with another method, while the first is at the gate.
async fn same_key_other_method_while_the_first_runs(column: Column) {
    let shop = Shop::open(column.config().lock(patient())).await;
    let call = |method| shop.server.call(method, "/gated").key("abc").body("x");
    let first = call(Method::POST).start();
    shop.work.gate.arrived(1).await;
    let other = call(Method::PUT).start();
    if column == Column::Stripe {
        assert_refused(&other.await.unwrap(), 400, "key-reused");
        shop.work.gate.open(1);
        assert_ran(&first.await.unwrap(), 1);
        return;
    }
    shop.work.gate.arrived(2).await;
    shop.work.gate.open(2);
    for call in [first, other] {
        assert_eq!(call.await.unwrap().code(), 201);
    }
    assert_eq!(shop.runs(), 2);
}

/// Claims are per key: both handlers are at the gate at once.
async fn other_key_while_the_first_runs(column: Column) {
    let shop = Shop::open(column.config().lock(patient())).await;
    let call = |key: &'static str| shop.server.post("/gated").key(key).body("x");
    let running = [call("abc").start(), call("def").start()];
    shop.work.gate.arrived(2).await;
    shop.work.gate.open(2);
    for call in running {
        assert_eq!(call.await.unwrap().code(), 201);
    }
    assert_eq!((shop.runs(), shop.events.count("waiting")), (2, 0));
}

/// The layer inside a nest sees `/create` in both, and must tell them apart by the path that the client sent.
async fn same_path_in_two_nests(column: Column) {
    let runs = Runs::new();
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(column.config());
    let nested = || {
        Router::new()
            .route("/create", post(runs.handler()))
            .layer(layer.clone())
    };
    let deep = Router::new().nest("/eu", nested());
    let router = Router::new()
        .nest("/refunds", nested())
        .nest("/payments", nested())
        .nest("/regions", deep);
    let server = Server::start(router).await;
    let call = |path: &str| server.post(path).key("abc").body("x");

    assert_ran(&call("/refunds/create").send().await, 1);
    for (run, path) in [(2, "/payments/create"), (3, "/regions/eu/create")] {
        let other = call(path).send().await;
        match column {
            Column::Default | Column::Ietf => {
                assert_ran(&other, run);
                let body = format!("order {run}");
                column.assert_replay(&call(path).send().await, 201, &body);
            }
            Column::Stripe => assert_refused(&other, 400, "key-reused"),
        }
    }
    column.assert_replay(&call("/refunds/create").send().await, 201, "order 1");
}

async fn many_duplicates_run_once(column: Column) {
    let shop = Shop::open(column.config().lock(patient())).await;
    let calls: Vec<_> = (0..32)
        .map(|_| shop.server.post("/orders").key("abc").body("x").start())
        .collect();
    let mut replays = 0;
    for call in calls {
        let answer = call.await.unwrap();
        assert_eq!(answer.text(), "order 1");
        replays += usize::from(column.is_replay(&answer));
    }
    assert_eq!((shop.runs(), replays), (1, 31));
}

#[tokio::test]
async fn the_layer_outside_the_nest_sees_the_same_path() {
    let runs = Runs::new();
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let nested = || Router::new().route("/create", post(runs.handler()));
    let router = Router::new()
        .nest("/refunds", nested())
        .nest("/payments", nested())
        .layer(layer);
    let server = Server::start(router).await;
    let refund = || server.post("/refunds/create").key("abc").send();
    assert_ran(&refund().await, 1);
    assert_ran(&server.post("/payments/create").key("abc").send().await, 2);
    Column::Default.assert_replay(&refund().await, 201, "order 1");
}

/// One service under several names, and through a proxy that sends whole URIs, is one service.
#[tokio::test]
async fn scheme_and_authority_are_not_part_of_the_operation() {
    let shop = Shop::open(Config::ietf()).await;
    assert_ran(&shop.server.post("/orders?a=1").key("abc").send().await, 1);
    for (target, host) in [
        ("/orders?a=1", "shop.example"),
        ("http://shop.example/orders?a=1", "shop.example"),
        ("https://other.example:8443/orders?a=1", "other.example"),
    ] {
        let retry = format!(
            "POST {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\
             idempotency-key: abc\r\ncontent-length: 0\r\n\r\n"
        );
        let retry = shop.server.raw(retry).await;
        Column::Ietf.assert_replay(&retry, 201, "order 1");
    }
}

#[tokio::test]
async fn the_handler_gets_the_body_that_was_buffered() {
    let shout = post(|body: Bytes| async move { body.to_ascii_uppercase() });
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::ietf());
    let server = Server::start(Router::new().route("/shout", shout).layer(layer)).await;
    let body: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let first = server
        .post("/shout")
        .key("abc")
        .body(body.clone())
        .send()
        .await;
    assert_eq!(first.body, body.to_ascii_uppercase());
    let retry = server.post("/shout").key("abc").body(body).send().await;
    assert!(retry.is_replay());
    assert_eq!(retry.body, first.body);
}

#[tokio::test]
async fn conflict_status_none_is_the_original_status() {
    let shop = Shop::open(Config::default().conflict_status(None)).await;
    for status in [200, 201, 202, 204, 206] {
        let call = || shop.server.post(&format!("/status/{status}")).key("abc");
        assert_eq!(call().send().await.code(), status);
        let retry = call().send().await;
        assert!(retry.is_replay());
        assert_eq!(retry.code(), status);
    }
}

#[tokio::test]
async fn conflict_status_of_ones_own() {
    let status = StatusCode::IM_USED;
    let shop = Shop::open(Config::ietf().conflict_status(Some(status))).await;
    assert_ran(&shop.server.post("/orders").key("abc").send().await, 1);
    let retry = shop.server.post("/orders").key("abc").send().await;
    assert!(retry.is_replay());
    assert_eq!((retry.code(), retry.text()), (226, "order 1"));
}

#[tokio::test]
async fn mismatch_status_of_ones_own() {
    let status = StatusCode::PRECONDITION_FAILED;
    let shop = Shop::open(Config::ietf().mismatch_status(status)).await;
    let call = |body: &'static str| shop.server.post("/orders").key("abc").body(body);
    assert_ran(&call("one").send().await, 1);
    assert_refused(&call("two").send().await, 412, "key-reused");
}

/// Ten thirds of a lease: it is renewed for as long as the handler runs.
#[tokio::test]
async fn a_claim_is_renewed_while_the_handler_runs() {
    let (env, clock) = Env::simulated(1);
    let lease = Duration::from_secs(30);
    let storage = FaultyStorage::new(MemoryStorage::builder().env(env.clone()).build());
    let config = Config::default().env(env).lock(impatient().ttl(lease));
    let shop = Shop::on(storage.clone(), config.clone()).await;
    // Another server with the same storage.
    let other = Shop::on(storage.clone(), config).await;
    let call = |shop: &Shop| shop.server.post("/gated").key("abc").body("x");
    let first = call(&shop).start();
    shop.work.gate.arrived(1).await;
    for renewal in 1..=10 {
        while clock.sleeping() == 0 {
            tokio::task::yield_now().await;
        }
        clock.advance(lease / 3);
        storage.called(Operation::Renew, renewal).await;
        for shop in [&shop, &other] {
            assert_refused(&call(shop).send().await, 423, "in-flight");
        }
    }
    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    for shop in [&shop, &other] {
        Column::Default.assert_replay(&call(shop).send().await, 201, "order 1");
    }
    assert_eq!((shop.runs(), other.runs()), (1, 0));
}

#[tokio::test]
async fn without_claims_a_duplicate_runs_and_a_retry_does_not() {
    let shop = Shop::open(Config::default().lock(LockPolicy::disabled())).await;
    let call = || shop.server.post("/gated").key("abc").body("x");
    let running = [call().start(), call().start()];
    shop.work.gate.arrived(2).await;
    shop.work.gate.open(2);
    for call in running {
        assert_eq!(call.await.unwrap().code(), 201);
    }
    assert_eq!(shop.runs(), 2);
    let retry = call().send().await;
    assert!(retry.is_replay());
    assert_eq!(shop.runs(), 2);
}
