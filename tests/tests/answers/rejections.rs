//! The cell *rejections by extractors before the handler was entered*, and its neighbours.

use axum::{
    Json, Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use idempotency_axum::{
    Config, IdempotencyHandler, KeyPolicy, MemoryStorage, StoreOn, idempotency_key,
};
use serde::Deserialize;

use crate::{Column, Shop, Work, assert_ran};

columns!(
    rejection_of_an_extractor,
    rejection_then_the_body_is_corrected,
    the_same_status_from_the_handler,
    answer_of_a_closure_with_a_policy,
);

#[derive(Deserialize)]
struct Order {
    amount: i64,
}

/// 422 from `Json` if there is no amount, and from the handler itself if it is negative.
#[idempotency_key]
async fn create(State(work): State<Work>, Json(order): Json<Order>) -> Response {
    let run = work.runs.next();
    if order.amount < 0 {
        return (StatusCode::UNPROCESSABLE_ENTITY, "negative").into_response();
    }
    (StatusCode::CREATED, format!("order {run}")).into_response()
}

async fn json_shop(config: Config) -> Shop {
    let routes = Router::new().route("/json", post(create));
    Shop::with(MemoryStorage::new(), config, routes).await
}

/// A 422 is stored by `ietf`, and would be by `stripe`, had the handler given it.
async fn rejection_of_an_extractor(column: Column) {
    let shop = json_shop(column.config()).await;
    let call = || shop.server.post("/json").key("abc").json(r#"{"x":1}"#);
    assert_eq!(call().send().await.code(), 422);
    let retry = call().send().await;
    assert_eq!(retry.code(), 422);
    assert_eq!(column.is_replay(&retry), column == Column::Ietf);
    assert_eq!(shop.runs(), 0);
}

async fn rejection_then_the_body_is_corrected(column: Column) {
    let shop = json_shop(column.config()).await;
    let call = |body: &'static str| shop.server.post("/json").key("abc").json(body);
    assert_eq!(call(r#"{"x":1}"#).send().await.code(), 422);
    let corrected = call(r#"{"amount":1}"#).send().await;
    if column == Column::Ietf {
        assert_eq!(corrected.problem().as_deref(), Some("key-reused"));
    } else {
        assert_ran(&corrected, 1);
    }
}

async fn the_same_status_from_the_handler(column: Column) {
    let shop = json_shop(column.config()).await;
    let call = || {
        shop.server
            .post("/json")
            .key("abc")
            .json(r#"{"amount":-1}"#)
    };
    assert_eq!(call().send().await.code(), 422);
    let retry = call().send().await;
    assert_eq!((retry.code(), retry.text()), (422, "negative"));
    assert_eq!(column.is_replay(&retry), column != Column::Default);
    assert_eq!(shop.runs(), column.pick(2, 1, 1));
}

/// Nobody can say when a closure is entered, so all that comes from it counts.
async fn answer_of_a_closure_with_a_policy(column: Column) {
    let closure = |State(work): State<Work>| async move {
        (StatusCode::CREATED, format!("order {}", work.runs.next()))
    };
    let closure = closure.idempotency_key(KeyPolicy::required());
    let routes = Router::new().route("/closure", post(closure));
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    let call = || shop.server.post("/closure").key("abc").send();
    assert_ran(&call().await, 1);
    column.assert_replay(&call().await, 201, "order 1");
    assert_eq!(shop.runs(), 1);
}

#[tokio::test]
async fn store_on_except_rejections() {
    let store_on = StoreOn::below(500).except_rejections();
    let shop = json_shop(Config::ietf().store_on(store_on)).await;
    let call = |body: &'static str| shop.server.post("/json").key("abc").json(body);
    assert_eq!(call(r#"{"x":1}"#).send().await.code(), 422);
    assert_eq!(call("not JSON").send().await.code(), 400);
    assert_ran(&call(r#"{"amount":1}"#).send().await, 1);
    let retry = call(r#"{"amount":1}"#).send().await;
    Column::Ietf.assert_replay(&retry, 201, "order 1");
}
