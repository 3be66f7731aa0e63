//! Which answers are recorded, for how long, and what stands in for those that can't be.

use std::{convert::Infallible, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderName, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use futures_util::stream;
use idempotency_axum::{Config, Env, MemoryStorage, StoreOn};
use idempotency_tests::Answer;
use tower_http::catch_panic::CatchPanicLayer;

use crate::{Column, Shop, Work, assert_ran, assert_refused};

columns!(
    status_stored,
    answer_at_the_size_limit,
    answer_over_the_size_limit,
    answer_in_chunks_over_the_size_limit,
    answer_in_chunks_within_the_size_limit,
    answer_that_breaks_off,
    event_stream,
    event_stream_of_another_spelling,
    handler_panics_and_nobody_catches_it,
    handler_panics_and_it_is_caught_outside,
    handler_panics_while_a_duplicate_waits,
    replay_header,
    ttl_of_a_record,
    ttl_of_a_tombstone,
);

async fn status_stored(column: Column) {
    let shop = Shop::open(column.config()).await;
    for status in 200..=599 {
        let is_stored = match column {
            Column::Default => status <= 207,
            // A 405 of a handler without a policy may be a router's.
            Column::Ietf => {
                status < 500 && ![401, 403, 405, 408, 409, 423, 425, 429].contains(&status)
            }
            Column::Stripe => ![401, 403, 405, 408, 425, 429].contains(&status),
        };
        let before = shop.runs();
        let call = || shop.server.post(&format!("/status/{status}")).key("abc");
        // Stripe's keys are not tied to a path.
        let call = || call().header("authorization", status.to_string());
        let first = call().send().await;
        assert_eq!(first.code(), status);
        assert!(!column.is_replay(&first));

        let retry = call().send().await;
        assert_eq!(column.is_replay(&retry), is_stored, "{status}");
        let replayed = column.pick(409, status, status);
        assert_eq!(retry.code(), if is_stored { replayed } else { status });
        assert_eq!(shop.runs() - before, if is_stored { 1 } else { 2 });
    }
}

/// An answer of as many bytes as the request has.
async fn echo(State(work): State<Work>, body: Bytes) -> Bytes {
    work.runs.next();
    body
}

/// The same, a byte a chunk, all there at once.
async fn echo_in_chunks(State(work): State<Work>, body: Bytes) -> Body {
    work.runs.next();
    let bytes: Vec<_> = body.into_iter().map(|byte| vec![byte]).collect();
    Body::from_stream(stream::iter(bytes.into_iter().map(Ok::<_, Infallible>)))
}

async fn echo_shop(column: Column) -> Shop {
    let routes = Router::new()
        .route("/echo", post(echo))
        .route("/chunks", post(echo_in_chunks));
    let config = column.config().max_response_body(8);
    Shop::with(MemoryStorage::new(), config, routes).await
}

async fn answer_at_the_size_limit(column: Column) {
    let shop = echo_shop(column).await;
    let call = || shop.server.post("/echo").key("abc").body("12345678");
    assert_eq!(call().send().await.text(), "12345678");
    column.assert_replay(&call().send().await, 200, "12345678");
    assert_eq!(shop.runs(), 1);
}

async fn answer_over_the_size_limit(column: Column) {
    let shop = echo_shop(column).await;
    assert_tombstone(&shop, "/echo", "123456789", column).await;
}

async fn answer_in_chunks_within_the_size_limit(column: Column) {
    let shop = echo_shop(column).await;
    let call = || shop.server.post("/chunks").key("abc").body("12345678");
    let first = call().send().await;
    assert_eq!((first.code(), first.text()), (200, "12345678"));
    let retry = call().send().await;
    column.assert_replay(&retry, 200, "12345678");
    assert_eq!(retry.header("content-length"), Some("8"));
    assert_eq!(shop.runs(), 1);
}

async fn answer_in_chunks_over_the_size_limit(column: Column) {
    let shop = echo_shop(column).await;
    assert_tombstone(&shop, "/chunks", "123456789 and more", column).await;
}

/// The first client gets `body`, and retries a conflict that says so.
async fn assert_tombstone(shop: &Shop, path: &str, body: &'static str, column: Column) {
    let call = || shop.server.post(path).key("abc").body(body);
    let first = call().send().await;
    assert_eq!((first.code(), first.text()), (200, body));
    for _ in 0..2 {
        let retry = call().send().await;
        assert_not_replayable(&retry);
        assert!(!column.is_replay(&retry));
    }
    assert_eq!(shop.runs(), 1);
    assert_eq!(shop.events.count("tombstoned"), 1);
}

#[track_caller]
fn assert_not_replayable(retry: &Answer) {
    assert_refused(retry, 409, "not-replayable");
    assert_eq!(retry.header("retry-after"), None);
}

/// Two chunks and an error.
async fn breaks_off(State(work): State<Work>) -> Body {
    work.runs.next();
    let broken = std::io::Error::other("the source is gone");
    let chunks = [Ok("1234"), Ok("5678"), Err(broken)];
    Body::from_stream(stream::iter(chunks))
}

async fn answer_that_breaks_off(column: Column) {
    let routes = Router::new().route("/broken", post(breaks_off));
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    let call = || shop.server.post("/broken").key("abc");
    assert!(
        call().try_send().await.is_err(),
        "the client must see that it broke"
    );
    assert_not_replayable(&call().send().await);
    assert_eq!(shop.runs(), 1);
}

const EVENTS: &str = "data: one\n\ndata: two\n\n";

async fn event_stream(column: Column) {
    event_stream_as(column, "text/event-stream").await;
}

async fn event_stream_of_another_spelling(column: Column) {
    event_stream_as(column, "Text/Event-Stream ; charset=utf-8").await;
}

async fn event_stream_as(column: Column, content_type: &'static str) {
    let events = move |State(work): State<Work>| async move {
        work.runs.next();
        ([("content-type", content_type)], EVENTS)
    };
    let routes = Router::new().route("/events", post(events));
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    assert_tombstone(&shop, "/events", EVENTS, column).await;
}

/// Panics on its first run.
async fn panics_once(State(work): State<Work>) -> Response {
    let run = work.runs.next();
    assert!(run > 1, "the first run panics, as it should");
    (StatusCode::CREATED, format!("order {run}")).into_response()
}

#[track_caller]
fn assert_after_panic(column: Column, retry: &Answer) {
    match column {
        Column::Default | Column::Ietf => assert_ran(retry, 2),
        Column::Stripe => assert_not_replayable(retry),
    }
}

async fn handler_panics_and_nobody_catches_it(column: Column) {
    let routes = Router::new().route("/panics", post(panics_once));
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    let call = || shop.server.post("/panics").key("abc");
    assert!(call().try_send().await.is_err(), "the panic goes on");
    assert_after_panic(column, &call().send().await);
    assert_eq!(shop.runs(), column.pick(2, 2, 1));
}

async fn handler_panics_and_it_is_caught_outside(column: Column) {
    use idempotency_axum::IdempotencyLayer;
    use idempotency_tests::Server;

    let work = Work::default();
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(column.config());
    let router = Router::new()
        .route("/panics", post(panics_once))
        .layer(layer)
        .layer(CatchPanicLayer::new())
        .with_state(work.clone());
    let server = Server::start(router).await;
    let call = || server.post("/panics").key("abc");
    assert_eq!(call().send().await.code(), 500);
    assert_after_panic(column, &call().send().await);
    assert_eq!(work.runs.count(), column.pick(2, 2, 1));
}

/// At the gate first, then as [`panics_once`].
async fn panics_once_at_the_gate(State(work): State<Work>) -> Response {
    work.gate.enter().await;
    panics_once(State(work)).await
}

async fn handler_panics_while_a_duplicate_waits(column: Column) {
    let routes = Router::new().route("/panics", post(panics_once_at_the_gate));
    let config = column.config().lock(crate::patient());
    let shop = Shop::with(MemoryStorage::new(), config, routes).await;
    let call = || shop.server.post("/panics").key("abc");
    let address = shop.server.address();
    let first = async {
        let first = idempotency_tests::Call::new(address, axum::http::Method::POST, "/panics");
        first.key("abc").try_send().await
    };
    let duplicate = async {
        shop.work.gate.arrived(1).await;
        let duplicate = call().start();
        shop.events.until("waiting", 1).await;
        shop.work.gate.open(2);
        duplicate.await.unwrap()
    };
    let (first, duplicate) = tokio::join!(first, duplicate);
    assert!(first.is_err(), "the panic goes on");
    assert_after_panic(column, &duplicate);
}

async fn replay_header(column: Column) {
    let shop = Shop::open(column.config()).await;
    let call = || shop.server.post("/orders").key("abc");
    let first = call().send().await;
    let retry = call().send().await;
    let names = ["idempotency-replayed", "idempotent-replayed"];
    assert_eq!(names.map(|name| first.header(name)), [None, None]);
    let expected = column.pick(
        [Some("true"), None],
        [Some("true"), None],
        [None, Some("true")],
    );
    assert_eq!(names.map(|name| retry.header(name)), expected);
}

#[tokio::test]
async fn replay_header_of_ones_own() {
    let config = Config::ietf().replay_header(HeaderName::from_static("x-replayed"));
    let shop = Shop::open(config).await;
    let call = || shop.server.post("/orders").key("abc");
    assert_eq!(call().send().await.header("x-replayed"), None);
    let retry = call().send().await;
    assert_eq!(retry.header("x-replayed"), Some("true"));
    assert_eq!(retry.header("idempotency-replayed"), None);
}

#[tokio::test]
async fn no_replay_header() {
    let shop = Shop::open(Config::ietf().replay_header(None)).await;
    let call = || shop.server.post("/orders").key("abc");
    let first = call().send().await;
    let retry = call().send().await;
    assert_eq!(retry.header("idempotency-replayed"), None);
    assert_eq!((retry.code(), retry.text()), (201, first.text()));
    assert_eq!(shop.runs(), 1);
}

const DAY: Duration = Duration::from_secs(24 * 3600);
const SECOND: Duration = Duration::from_secs(1);

async fn ttl_of_a_record(column: Column) {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let shop = Shop::on(storage, column.config().env(env)).await;
    let call = || shop.server.post("/orders").key("abc").send();
    assert_ran(&call().await, 1);
    clock.advance(DAY - SECOND);
    // A replay does not make the record live longer.
    column.assert_replay(&call().await, 201, "order 1");
    clock.advance(SECOND);
    assert_ran(&call().await, 2);
    clock.advance(DAY - SECOND);
    column.assert_replay(&call().await, 201, "order 2");
}

async fn ttl_of_a_tombstone(column: Column) {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let config = column.config().env(env).max_response_body(0);
    let shop = Shop::on(storage, config).await;
    let call = || shop.server.post("/orders").key("abc").send();
    assert_ran(&call().await, 1);
    clock.advance(DAY - SECOND);
    assert_not_replayable(&call().await);
    clock.advance(SECOND);
    assert_ran(&call().await, 2);
}

#[tokio::test]
async fn ttl_of_ones_own() {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let shop = Shop::on(storage, Config::ietf().ttl(60 * SECOND).env(env)).await;
    let call = || shop.server.post("/orders").key("abc").send();
    assert_ran(&call().await, 1);
    clock.advance(59 * SECOND);
    Column::Ietf.assert_replay(&call().await, 201, "order 1");
    clock.advance(SECOND);
    assert_ran(&call().await, 2);
}

/// The handler takes longer than the TTL: the record lives from its end.
#[tokio::test]
async fn ttl_counts_from_the_end_of_the_operation() {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let shop = Shop::on(storage, Config::ietf().ttl(10 * SECOND).env(env)).await;
    let call = || shop.server.post("/gated").key("abc");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    clock.advance(20 * SECOND);
    shop.work.gate.open(2);
    assert_ran(&first.await.unwrap(), 1);
    clock.advance(9 * SECOND);
    Column::Ietf.assert_replay(&call().send().await, 201, "order 1");
    clock.advance(SECOND);
    assert_ran(&call().send().await, 2);
}

/// Which of these statuses are stored.
async fn stored(store_on: StoreOn, statuses: &[u16]) -> Vec<u16> {
    let shop = Shop::open(Config::ietf().store_on(store_on)).await;
    let mut stored = Vec::new();
    for &status in statuses {
        let path = format!("/status/{status}");
        assert_eq!(
            shop.server.post(&path).key("abc").send().await.code(),
            status
        );
        let retry = shop.server.post(&path).key("abc").send().await;
        assert_eq!(retry.code(), status);
        if retry.is_replay() {
            stored.push(status);
        }
    }
    stored
}

const STATUSES: [u16; 11] = [200, 201, 207, 208, 226, 303, 400, 404, 409, 429, 500];

#[tokio::test]
async fn store_on_success() {
    assert_eq!(stored(StoreOn::success(), &STATUSES).await, [200, 201, 207]);
}

#[tokio::test]
async fn store_on_statuses() {
    let store_on = StoreOn::statuses([StatusCode::CREATED, StatusCode::NOT_FOUND]);
    assert_eq!(stored(store_on, &STATUSES).await, [201, 404]);
}

#[tokio::test]
async fn store_on_statuses_of_any_iterator() {
    let numbers = [208, 500];
    let statuses = numbers
        .iter()
        .filter_map(|number| StatusCode::from_u16(*number).ok());
    assert_eq!(
        stored(StoreOn::statuses(statuses), &STATUSES).await,
        [208, 500]
    );
}

#[tokio::test]
async fn store_on_below() {
    let below_400 = stored(StoreOn::below(400), &STATUSES).await;
    assert_eq!(below_400, [200, 201, 207, 208, 226, 303]);
}

#[tokio::test]
async fn store_on_all() {
    assert_eq!(stored(StoreOn::all(), &STATUSES).await, STATUSES);
}

#[tokio::test]
async fn store_on_all_except() {
    let store_on = StoreOn::all()
        .except([StatusCode::TOO_MANY_REQUESTS])
        .except([StatusCode::OK, StatusCode::CREATED]);
    let stored = stored(store_on, &STATUSES).await;
    assert_eq!(stored, [207, 208, 226, 303, 400, 404, 409, 500]);
}

#[tokio::test]
async fn store_on_from_fn() {
    let store_on = StoreOn::from_fn(|status| status.as_u16() % 2 == 1);
    assert_eq!(stored(store_on, &STATUSES).await, [201, 207, 303, 409, 429]);
}

#[tokio::test]
async fn store_on_nothing() {
    assert_eq!(stored(StoreOn::statuses([]), &STATUSES).await, [0; 0]);
}
