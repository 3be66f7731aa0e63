//! What the check before the server listens finds, and what a service answers that was not checked.

use axum::{Router, http::StatusCode, routing::post};
use idempotency_axum::{
    AnyStorage, IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage, NearCache,
    PostgresStorage, idempotency_key,
    sqlx::{Postgres, postgres::PgPoolOptions},
};
use idempotency_tests::sqlite::SqliteFile;

use super::shop::*;

#[idempotency_key]
async fn create_order(mut tx: Tx<Postgres>) -> StatusCode {
    Postgres::order(&mut tx, "misused").await.unwrap();
    CREATED
}

type Writes = Option<Tx<Postgres>>;

/// Found by type, behind an alias and an `Option`.
#[idempotency_key(optional)]
async fn may_create_order(tx: Writes) -> StatusCode {
    let Some(mut tx) = tx else {
        return StatusCode::ACCEPTED;
    };
    Postgres::order(&mut tx, "optional").await.unwrap();
    CREATED
}

fn routes() -> Router {
    Router::new().route("/orders", post(create_order))
}

/// Nobody connects.
fn pool_of(connections: u32) -> PostgresStorage {
    let pool = PgPoolOptions::new()
        .max_connections(connections)
        .connect_lazy("postgres://nobody@localhost:1/nothing");
    PostgresStorage::new(pool.unwrap())
}

/// The check names the cure, and so does the answer of a service that was not checked.
async fn assert_misuse(storage: impl Into<AnyStorage>, routes: Router, cures: &[&str]) {
    let storage: AnyStorage = storage.into();
    let layer = IdempotencyLayer::enforce(storage.clone());
    let misuse = layer
        .check(routes.clone().layer(layer.clone()))
        .unwrap_err();
    let message = misuse.to_string();
    for cure in cures {
        assert!(message.contains(cure), "{message}");
    }
    let app = App::of(storage, config(), |layer| routes.layer(layer.clone()));
    let answer = app.post("k").await;
    assert_eq!(answer.code(), 500, "{answer:?}");
}

#[tokio::test]
async fn a_storage_without_transactions_is_a_misuse() {
    let cures = &["create_order", "PostgreSQL", "cache_name"];
    assert_misuse(AnyStorage::new(MemoryStorage::new()), routes(), cures).await;
}

#[tokio::test]
async fn a_near_cache_before_the_storage_is_a_misuse() {
    let near = NearCache::new(pool_of(4));
    assert_misuse(
        AnyStorage::new(near),
        routes(),
        &["create_order", "NearCache"],
    )
    .await;
}

#[tokio::test]
async fn a_storage_in_another_database_is_a_misuse() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    assert_misuse(
        AnyStorage::new(storage),
        routes(),
        &["create_order", "PostgreSQL", "cache_name"],
    )
    .await;
}

#[tokio::test]
async fn a_pool_of_one_connection_is_a_misuse() {
    let cures = &["create_order", "max_connections"];
    assert_misuse(AnyStorage::new(pool_of(1)), routes(), cures).await;
}

#[tokio::test]
async fn a_manual_handler_with_a_transaction_is_a_misuse() {
    let policy = KeyPolicy::required().manual().transaction::<Postgres>();
    let handler = async move |_: Tx<Postgres>| CREATED;
    let routes = Router::new().route("/orders", post(handler.idempotency_key(policy)));
    assert_misuse(AnyStorage::new(pool_of(4)), routes, &["manual"]).await;
}

/// Without its policy, the layer does not know that the handler needs one.
#[tokio::test]
async fn a_transaction_that_no_policy_asks_for_is_a_500() {
    let shop = Postgres::start().await;
    let handler = async move |_: Tx<Postgres>| CREATED;
    for policy in [KeyPolicy::required(), KeyPolicy::exempt()] {
        let app = App::of(shop.storage.clone(), config(), |layer| {
            let handler = handler.idempotency_key(policy);
            Router::new()
                .route("/orders", post(handler))
                .layer(layer.clone())
        });
        assert_status(&app.post("k").await, 500);
        assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    }
}

#[tokio::test]
async fn an_attribute_finds_the_transaction_by_its_type() {
    let shop = Postgres::start().await;
    let app = App::of(shop.storage.clone(), config(), |layer| {
        let router = Router::new()
            .route("/orders", post(create_order))
            .route("/optional", post(may_create_order));
        layer.check(router.layer(layer.clone())).unwrap()
    });
    for (n, path) in [(1, "/orders"), (2, "/optional")] {
        let first = app.post_to(path, "k").await;
        assert_status(&first, 201);
        assert_repeats(&app.post_to(path, "k").await, &first);
        assert_eq!((shop.orders().await, shop.records().await), (n, n));
    }
    let without_key = axum::http::Request::post("/optional").body(axum::body::Body::empty());
    let answer = read(app.send(without_key.unwrap()).await).await;
    assert_eq!(answer.code(), 202, "{answer:?}");
    assert_eq!((shop.orders().await, shop.records().await), (2, 2));
}
