//! Requests whose handler does not run: too large, no storage, too many.

use std::{borrow::Cow, sync::Arc, time::Duration};

use axum::{Router, body::Bytes, extract::State, routing::post};
use idempotency_axum::{
    Config, Encoded, Env, FingerprintKeyEncoder, Key, KeyEncoder, KeyOnlyEncoder, MemoryStorage,
    OnStorageError, OnUnreadable, Operation, RequestView,
};
use idempotency_tests::{Answer, Fault, FaultyStorage, PATIENCE};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Semaphore,
};

use crate::{Column, Shop, Work, assert_ran, assert_refused, impatient, patient};

columns!(
    request_body_at_the_limit,
    request_body_over_the_limit,
    request_body_over_the_limit_in_chunks,
    request_body_announced_over_the_limit,
    request_body_unreadable,
    request_body_silent,
    storage_down,
    storage_too_slow,
    storage_that_waits_is_not_too_slow,
    record_unreadable,
    too_many_running,
    too_many_waiting,
    too_many_bytes_buffered,
    too_many_bytes_buffered_by_duplicates_that_wait,
);

async fn limited_shop(column: Column) -> Shop {
    Shop::open(column.config().max_request_body(8)).await
}

async fn request_body_at_the_limit(column: Column) {
    let shop = limited_shop(column).await;
    let call = || shop.server.post("/orders").key("abc").body("12345678");
    assert_ran(&call().send().await, 1);
    column.assert_replay(&call().send().await, 201, "order 1");
}

async fn request_body_over_the_limit(column: Column) {
    let shop = limited_shop(column).await;
    let call = |body: &'static str| shop.server.post("/orders").key("abc").body(body);
    let refused = call("123456789").send().await;
    assert_too_large(&refused);
    assert_eq!(shop.runs(), 0);
    // It did not use up the key.
    assert_ran(&call("12345678").send().await, 1);
    // Nor is it compared with what did.
    assert_too_large(&call("123456789").send().await);
    assert_eq!(shop.runs(), 1);
}

#[track_caller]
fn assert_too_large(answer: &Answer) {
    assert_refused(answer, 413, "body-too-large");
    assert_eq!(answer.header("retry-after"), None);
    assert!(answer.text().contains(" 8 bytes"), "{}", answer.text());
}

async fn request_body_over_the_limit_in_chunks(column: Column) {
    let shop = limited_shop(column).await;
    let head = "POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key: abc\r\n\
                transfer-encoding: chunked\r\n\r\n";
    let over = format!("{head}5\r\n12345\r\n4\r\n6789\r\n0\r\n\r\n");
    assert_too_large(&shop.server.raw(over).await);
    assert_eq!(shop.runs(), 0);
    let at = format!("{head}5\r\n12345\r\n3\r\n678\r\n0\r\n\r\n");
    assert_eq!(shop.server.raw(at).await.code(), 201);
    // The same body in one piece is the same request.
    let retry = shop.server.post("/orders").key("abc").body("12345678");
    column.assert_replay(&retry.send().await, 201, "order 1");
}

/// Answered by its `Content-Length`, of which not a byte is sent.
async fn request_body_announced_over_the_limit(column: Column) {
    let shop = limited_shop(column).await;
    let request = "POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key: abc\r\n\
                   content-length: 9\r\n\r\n";
    assert_too_large(&shop.server.raw(request).await);
    assert_eq!(shop.runs(), 0);
}

/// A refusal like others, and not a bare 400.
async fn request_body_unreadable(column: Column) {
    let shop = Shop::open(column.config()).await;
    let head = "POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key: abc\r\n\
                transfer-encoding: chunked\r\n\r\n";
    let refused = shop
        .server
        .raw(format!("{head}2\r\nhi\r\nno length\r\n"))
        .await;
    assert_refused(&refused, 400, "body-unreadable");
    assert_eq!(refused.header("retry-after"), None);
    assert_eq!((shop.runs(), shop.events.count("refused")), (0, 1));
    assert_eq!(shop.events.count("executing"), 0, "before any claim");
    let whole = shop.server.raw(format!("{head}2\r\nhi\r\n0\r\n\r\n")).await;
    assert_eq!((whole.code(), shop.runs()), (201, 1));
}

/// 30 s since the last byte, by the clock that the test moves; what it held is given back.
async fn request_body_silent(column: Column) {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let config = column.config().env(env);
    let budget = config.budget.clone();
    let shop = Shop::on(storage, config).await;
    let mut stream = TcpStream::connect(shop.server.address()).await.unwrap();
    let head = "POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key: abc\r\n\
                content-length: 3\r\n\r\n";
    stream
        .write_all(format!("{head}1").as_bytes())
        .await
        .unwrap();
    until(|| budget.used() == 1 && clock.sleeping() == 1).await;
    clock.advance(Duration::from_secs(29));
    stream.write_all(b"2").await.unwrap();
    until(|| budget.used() == 2 && clock.sleeping() == 1).await;
    clock.advance(Duration::from_secs(29));
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(shop.events.count("refused"), 0, "it was not silent so long");
    clock.advance(Duration::from_secs(1));

    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("#body-unreadable"), "{answer}");
    assert_eq!((shop.runs(), budget.used()), (0, 0));
    assert_eq!(shop.events.count("refused"), 1);
    assert_ran(&shop.server.post("/orders").key("abc").send().await, 1);
}

/// All tasks run on this thread.
async fn until(mut is: impl FnMut() -> bool) {
    let limit = tokio::time::Instant::now() + PATIENCE;
    while !is() {
        assert!(tokio::time::Instant::now() < limit, "it never is so");
        tokio::task::yield_now().await;
    }
}

/// An encoder that does not read the body does not limit it either, nor hold it.
#[tokio::test]
async fn request_body_that_is_not_read_has_no_limit() {
    struct WithoutBody;
    impl KeyEncoder for WithoutBody {
        fn encode(&self, key: &Key, request: &RequestView<'_>) -> Encoded {
            assert!(request.body.is_empty());
            KeyOnlyEncoder.encode(key, request)
        }

        fn reads_body(&self) -> bool {
            false
        }
    }
    let length = |State(work): State<Work>, body: Bytes| async move {
        work.runs.next();
        body.len().to_string()
    };
    let routes = Router::new().route("/length", post(length));
    let config = Config::ietf().encoder(WithoutBody).max_request_body(8);
    let config = config.max_buffered(8);
    let shop = Shop::with(MemoryStorage::new(), config, routes).await;
    let call = |body: &'static str| shop.server.post("/length").key("abc").body(body);
    assert_eq!(call("123456789").send().await.text(), "9");
    Column::Ietf.assert_replay(&call("other").send().await, 200, "9");
}

#[tokio::test]
async fn fingerprint_of_chosen_fields() {
    let encoder = FingerprintKeyEncoder.fields(|body| {
        let end = body.iter().position(|byte| *byte == b'|');
        Cow::Borrowed(&body[..end.unwrap_or(body.len())])
    });
    let shop = Shop::open(Config::ietf().encoder(encoder)).await;
    let call = |body: &'static str| shop.server.post("/orders").key("abc").body(body);
    assert_ran(&call("book|sent at 1").send().await, 1);
    Column::Ietf.assert_replay(&call("book|sent at 2").send().await, 201, "order 1");
    assert_refused(&call("lamp|sent at 3").send().await, 422, "key-reused");
}

async fn storage_down(column: Column) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let shop = Shop::on(storage.clone(), column.config()).await;
    let call = || shop.server.post("/orders").key("abc");
    storage.set(Operation::Begin, Fault::FailBefore);
    assert_unavailable(&call().send().await);
    assert_eq!((shop.runs(), shop.events.count("storage_failed")), (0, 1));

    storage.heal(Operation::Begin);
    assert_ran(&call().send().await, 1);
    // Not even a retry is answered from a storage that is down.
    storage.set(Operation::Begin, Fault::FailBefore);
    assert_unavailable(&call().send().await);
    storage.heal(Operation::Begin);
    column.assert_replay(&call().send().await, 201, "order 1");
    assert_eq!(shop.runs(), 1);
}

#[track_caller]
fn assert_unavailable(answer: &Answer) {
    assert_refused(answer, 503, "storage-unavailable");
    assert_eq!(answer.header("retry-after"), Some("1"));
}

/// A second, by the clock that the test moves.
async fn storage_too_slow(column: Column) {
    let (env, clock) = Env::simulated(1);
    let storage = FaultyStorage::new(MemoryStorage::builder().env(env.clone()).build());
    let shop = Shop::on(storage.clone(), column.config().env(env)).await;
    storage.set(Operation::Begin, Fault::Hang);
    let call = shop.server.post("/orders").key("abc").start();
    while clock.sleeping() == 0 {
        tokio::task::yield_now().await;
    }
    clock.advance(Duration::from_secs(1));
    assert_unavailable(&call.await.unwrap());
    assert_eq!(shop.runs(), 0);
}

async fn storage_that_waits_is_not_too_slow(column: Column) {
    let (env, clock) = Env::simulated(1);
    let storage = FaultyStorage::new(MemoryStorage::builder().env(env.clone()).build());
    let shop = Shop::on(storage.clone(), column.config().env(env)).await;
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Begin, Fault::Gate(gate.clone()));
    let call = shop.server.post("/orders").key("abc").start();
    while clock.sleeping() == 0 {
        tokio::task::yield_now().await;
    }
    clock.advance(Duration::from_millis(999));
    gate.add_permits(1);
    assert_ran(&call.await.unwrap(), 1);
}

async fn record_unreadable(column: Column) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let shop = Shop::on(storage.clone(), column.config()).await;
    storage.set(Operation::Begin, Fault::Unreadable);
    let call = || shop.server.post("/orders").key("abc");
    assert_unavailable(&call().send().await);
    assert_unavailable(&call().send().await);
    assert_eq!(shop.runs(), 0);
    assert!(
        shop.events.count("storage_failed") >= 2,
        "it must be counted"
    );
}

/// Other keys go on.
#[tokio::test]
async fn storage_error_of_one_operation_is_not_kept_for_others() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let shop = Shop::on(storage.clone(), Config::default()).await;
    storage.set(Operation::Begin, Fault::FailBefore);
    assert_unavailable(&shop.server.post("/orders").key("abc").send().await);
    // What needs no storage does not need it to work.
    assert_eq!(shop.server.get("/orders").send().await.code(), 201);
    let missing = shop.server.post("/orders").send().await;
    assert_refused(&missing, 400, "missing-key");
}

#[tokio::test]
async fn storage_down_and_run_unprotected() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let config = Config::default().on_storage_error(OnStorageError::RunUnprotected);
    let shop = Shop::on(storage.clone(), config).await;
    storage.set(Operation::Begin, Fault::FailBefore);
    let call = || shop.server.post("/orders").key("abc");
    assert_ran(&call().send().await, 1);
    assert_ran(&call().send().await, 2);
    assert_eq!(shop.events.count("unprotected"), 2);
}

#[tokio::test]
async fn record_unreadable_and_treated_as_absent() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let config = Config::ietf().on_unreadable(OnUnreadable::TreatAsAbsent);
    let shop = Shop::on(storage.clone(), config).await;
    let call = || shop.server.post("/orders").key("abc");
    assert_ran(&call().send().await, 1);
    // It removes what it can't read. Here it can't read what it finds then either.
    storage.set(Operation::Begin, Fault::Unreadable);
    assert_unavailable(&call().send().await);
    assert_eq!(storage.calls(Operation::Remove), 1);
    storage.heal(Operation::Begin);
    assert_ran(&call().send().await, 2);
}

async fn too_many_running(column: Column) {
    let shop = Shop::open(column.config().max_running(1).lock(impatient())).await;
    let call = || shop.server.post("/gated").key("abc");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    assert_overloaded(&shop.server.post("/orders").key("other").send().await);

    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    let other = shop.server.post("/orders").key("other").send().await;
    assert_ran(&other, 2);
}

#[track_caller]
fn assert_overloaded(answer: &Answer) {
    assert_refused(answer, 503, "overloaded");
    assert_eq!(answer.header("retry-after"), Some("1"));
}

/// A retry of what is done needs no place among those that run.
#[tokio::test]
async fn too_many_running_does_not_stop_replays() {
    let shop = Shop::open(Config::default().max_running(1)).await;
    let order = || shop.server.post("/orders").key("abc").send();
    assert_ran(&order().await, 1);
    let running = shop.server.post("/gated").key("def").start();
    shop.work.gate.arrived(1).await;
    Column::Default.assert_replay(&order().await, 201, "order 1");
    shop.work.gate.open(1);
    assert_ran(&running.await.unwrap(), 2);
}

async fn too_many_waiting(column: Column) {
    let shop = Shop::open(column.config().max_waiting(1).lock(patient())).await;
    let call = || shop.server.post("/gated").key("abc");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    let waiting = call().start();
    shop.events.until("waiting", 1).await;
    assert_overloaded(&call().send().await);

    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    column.assert_replay(&waiting.await.unwrap(), 201, "order 1");
}

async fn too_many_bytes_buffered(column: Column) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let config = column.config().max_buffered(10).lock(impatient());
    let budget = config.budget.clone();
    let shop = Shop::on(storage.clone(), config).await;
    let order = |key, body: &'static str| shop.server.post("/orders").key(key).body(body).send();
    let running = shop
        .server
        .post("/gated")
        .key("abc")
        .body("12345678")
        .start();
    shop.work.gate.arrived(1).await;
    assert_overloaded(&order("def", "123").await);
    assert_eq!(shop.events.count("refused"), 1);
    assert_eq!(storage.calls(Operation::Begin), 1, "before any claim");
    // What fits runs.
    assert_ran(&order("ghi", "12").await, 1);

    shop.work.gate.open(1);
    assert_ran(&running.await.unwrap(), 2);
    assert_eq!(budget.used(), 0);
    assert_ran(&order("def", "123").await, 3);
}

/// Its size counts for as long as its request runs.
#[tokio::test]
async fn request_body_that_the_handler_ignores_is_counted() {
    let ignores = |State(work): State<Work>| async move { work.gate.enter().await };
    let routes = Router::new().route("/ignores", post(ignores));
    let config = Config::default().max_buffered(8);
    let shop = Shop::with(MemoryStorage::new(), config, routes).await;
    let running = shop
        .server
        .post("/ignores")
        .key("abc")
        .body("12345678")
        .start();
    shop.work.gate.arrived(1).await;
    assert_overloaded(&shop.server.post("/orders").key("other").send().await);
    shop.work.gate.open(1);
    assert_eq!(running.await.unwrap().code(), 200);
    assert_ran(&shop.server.post("/orders").key("other").send().await, 1);
}

async fn too_many_bytes_buffered_by_duplicates_that_wait(column: Column) {
    let config = column.config().max_buffered(16).lock(patient());
    let budget = config.budget.clone();
    let shop = Shop::open(config).await;
    let call = || shop.server.post("/gated").key("abc").body("12345678");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    let waiting = call().start();
    shop.events.until("waiting", 1).await;
    // All is used up, so nothing fits, not even nothing.
    assert_overloaded(&shop.server.post("/orders").key("other").send().await);

    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    column.assert_replay(&waiting.await.unwrap(), 201, "order 1");
    assert_eq!(budget.used(), 0);
    assert_ran(&shop.server.post("/orders").key("other").send().await, 2);
}

/// It is there already. While it is being stored, others are refused.
#[tokio::test]
async fn an_answer_that_is_there_at_once_is_counted_and_recorded() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let config = Config::default()
        .max_buffered(4)
        .storage_timeout(Duration::from_secs(60));
    let budget = config.budget.clone();
    let shop = Shop::on(storage.clone(), config).await;
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Complete, Fault::Gate(gate.clone()));
    let call = || shop.server.post("/orders").key("abc");
    let first = call().start();
    storage.called(Operation::Complete, 1).await;
    assert_eq!(budget.used(), "order 1".len());
    assert_overloaded(&shop.server.post("/orders").key("other").send().await);
    gate.add_permits(1);
    assert_ran(&first.await.unwrap(), 1);
    assert_eq!(budget.used(), 0);
    Column::Default.assert_replay(&call().send().await, 201, "order 1");
}
