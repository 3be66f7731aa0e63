//! What a policy sets otherwise than the configuration: TTL, statuses, scope, limit.

use std::time::Duration;

use axum::{
    Router,
    extract::{Path, State},
    http::StatusCode,
    routing::post,
};
use idempotency_axum::{
    Config, IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage, Scope, StoreOn,
};
use idempotency_tests::{Runs, Server};

use crate::{
    assert_ran, assert_refused, assert_replay, enforce, modes, rows::order, serve, simulated,
};

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 3600);

#[tokio::test]
async fn ttl() {
    let (layer, _, clock) = simulated();
    let short = KeyPolicy::required().ttl(60 * SECOND);
    let long = KeyPolicy::required().ttl(2 * DAY);
    let router = Router::new()
        .route("/short", post(order.idempotency_key(short)))
        .route("/usual", post(order))
        .route("/long", post(order.idempotency_key(long)))
        .layer(layer)
        .with_state(Runs::new());
    let server = Server::start(router).await;
    let call = |path| server.post(path).key("abc").send();
    for (run, path) in [(1, "/short"), (2, "/usual"), (3, "/long")] {
        assert_ran(&call(path).await, run);
    }

    clock.advance(59 * SECOND);
    assert_replay(&call("/short").await, 1);
    clock.advance(SECOND);
    assert_ran(&call("/short").await, 4);
    assert_replay(&call("/usual").await, 2);
    clock.advance(DAY - 61 * SECOND);
    assert_replay(&call("/usual").await, 2);
    clock.advance(SECOND);
    assert_ran(&call("/usual").await, 5);
    assert_replay(&call("/long").await, 3);
    clock.advance(DAY);
    assert_ran(&call("/long").await, 6);
}

#[tokio::test]
async fn a_ttl_of_zero_keeps_nothing() {
    let zero = KeyPolicy::required().ttl(Duration::ZERO);
    let served = serve(enforce(), order.idempotency_key(zero)).await;
    for run in 1..=3 {
        assert_ran(&served.post(Some("abc")).await, run);
    }
    let served = serve(
        enforce().config(Config::default().ttl(Duration::ZERO)),
        order,
    )
    .await;
    for run in 1..=3 {
        assert_ran(&served.post(Some("abc")).await, run);
    }
}

/// A tombstone lives as long as an answer would.
#[tokio::test]
async fn ttl_of_a_tombstone() {
    let (layer, storage, clock) = simulated();
    let config = layer.engine().config().clone().max_response_body(0);
    let layer = IdempotencyLayer::enforce(storage).config(config);
    let policy = KeyPolicy::required().ttl(60 * SECOND);
    let served = serve(layer, order.idempotency_key(policy)).await;
    assert_ran(&served.post(Some("abc")).await, 1);
    clock.advance(59 * SECOND);
    assert_refused(&served.post(Some("abc")).await, 409, "not-replayable");
    clock.advance(SECOND);
    assert_ran(&served.post(Some("abc")).await, 2);
}

#[tokio::test]
async fn ttl_in_a_named_cache() {
    let (layer, storage, clock) = simulated();
    let layer = layer.cache("orders", storage);
    let policy = KeyPolicy::required().cache_name("orders").ttl(60 * SECOND);
    let served = serve(layer, order.idempotency_key(policy)).await;
    assert_ran(&served.post(Some("abc")).await, 1);
    clock.advance(59 * SECOND);
    assert_replay(&served.post(Some("abc")).await, 1);
    clock.advance(SECOND);
    assert_ran(&served.post(Some("abc")).await, 2);
}

async fn status(State(runs): State<Runs>, Path(status): Path<u16>) -> StatusCode {
    runs.next();
    StatusCode::from_u16(status).unwrap()
}

/// Which of these statuses a handler with this policy has stored.
async fn stored(store_on: StoreOn, statuses: &[u16]) -> Vec<u16> {
    let policy = KeyPolicy::required().store_on(store_on);
    // The policy's statuses, not the configuration's.
    let config = Config::default().store_on(StoreOn::statuses([StatusCode::IM_A_TEAPOT]));
    let router = Router::new()
        .route("/status/{status}", post(status.idempotency_key(policy)))
        .layer(enforce().config(config))
        .with_state(Runs::new());
    let server = Server::start(router).await;
    let mut stored = Vec::new();
    for &status in statuses {
        let path = format!("/status/{status}");
        assert_eq!(server.post(&path).key("abc").send().await.code(), status);
        if server.post(&path).key("abc").send().await.is_replay() {
            stored.push(status);
        }
    }
    stored
}

const STATUSES: [u16; 7] = [200, 207, 208, 303, 404, 418, 500];

#[tokio::test]
async fn store_on_success() {
    assert_eq!(stored(StoreOn::success(), &STATUSES).await, [200, 207]);
}

#[tokio::test]
async fn store_on_statuses() {
    let store_on = StoreOn::statuses([StatusCode::NOT_FOUND, StatusCode::OK]);
    assert_eq!(stored(store_on, &STATUSES).await, [200, 404]);
}

#[tokio::test]
async fn store_on_below() {
    assert_eq!(
        stored(StoreOn::below(400), &STATUSES).await,
        [200, 207, 208, 303]
    );
}

#[tokio::test]
async fn store_on_all() {
    assert_eq!(stored(StoreOn::all(), &STATUSES).await, STATUSES);
}

#[tokio::test]
async fn store_on_all_except() {
    let store_on = StoreOn::all().except([StatusCode::IM_A_TEAPOT, StatusCode::OK]);
    assert_eq!(stored(store_on, &STATUSES).await, [207, 208, 303, 404, 500]);
}

#[tokio::test]
async fn store_on_from_fn() {
    let store_on = StoreOn::from_fn(|status| status.is_redirection());
    assert_eq!(stored(store_on, &STATUSES).await, [303]);
}

#[tokio::test]
async fn scope() {
    for layer in modes() {
        let policy = KeyPolicy::required().scope(Scope::cookie("session"));
        let served = serve(layer(), order.idempotency_key(policy)).await;
        let call = |session, token| {
            let call = served.server.post("/orders").key("abc");
            call.header("cookie", session)
                .header("authorization", token)
        };
        assert_ran(&call("session=alice", "1").send().await, 1);
        assert_ran(&call("session=bob", "1").send().await, 2);
        assert_replay(&call("session=alice", "2").send().await, 1);
    }
}

#[tokio::test]
async fn scope_required() {
    let policy = KeyPolicy::required().scope(Scope::authorization().required());
    let router = Router::new()
        .route("/strict", post(order.idempotency_key(policy)))
        .route("/usual", post(order))
        .layer(enforce())
        .with_state(Runs::new());
    let server = Server::start(router).await;
    let strict = server.post("/strict").key("abc").send().await;
    assert_refused(&strict, 403, "scope-required");
    assert_ran(&server.post("/usual").key("abc").send().await, 1);
}

#[tokio::test]
async fn scope_required_does_not_concern_requests_without_a_key() {
    let policy = KeyPolicy::optional();
    let policy = policy.scope(Scope::authorization().required());
    let served = serve(enforce(), order.idempotency_key(policy)).await;
    assert_ran(&served.post(None).await, 1);
    assert_refused(&served.post(Some("abc")).await, 403, "scope-required");
}

#[tokio::test]
async fn max_request_body() {
    for layer in modes() {
        let layer = layer().config(Config::ietf().max_request_body(4));
        let policy = KeyPolicy::required().max_request_body(8);
        let served = serve(layer, order.idempotency_key(policy)).await;
        let call = |body: &'static str| served.server.post("/orders").key("abc").body(body);
        assert_refused(&call("123456789").send().await, 413, "body-too-large");
        assert_eq!(served.runs.count(), 0);
        assert_ran(&call("12345678").send().await, 1);
    }
}

/// A request that is not protected is not buffered.
#[tokio::test]
async fn max_request_body_does_not_concern_requests_without_a_key() {
    let length = |body: axum::body::Bytes| async move { body.len().to_string() };
    for layer in modes() {
        let policy = KeyPolicy::optional().max_request_body(8);
        let served = serve(layer(), length.idempotency_key(policy)).await;
        let long = served.server.post("/orders").body("123456789");
        assert_eq!(long.send().await.text(), "9");

        let layer = layer().config(Config::default().max_request_body(8));
        let served = serve(layer, length.idempotency_exempt()).await;
        let long = served.server.post("/orders").key("abc").body("123456789");
        assert_eq!(long.send().await.text(), "9");
    }
}

#[tokio::test]
async fn a_limit_of_zero_lets_empty_bodies_through() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new())
        .config(Config::default().max_request_body(0));
    let served = serve(layer, order).await;
    served.assert_required().await;
    let call = served.server.post("/orders").key("def").body("x");
    assert_refused(&call.send().await, 413, "body-too-large");
}
