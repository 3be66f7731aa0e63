//! Requests with one key while its transaction is open.

use std::time::Duration;

use axum::{Router, http::StatusCode, routing::post};
use futures_util::future::join_all;
use idempotency_axum::{
    IdempotencyHandler, KeyOnlyEncoder, KeyPolicy, PostgresStorage, sqlx::Postgres,
};
use idempotency_tests::{Gate, Runs};

use super::shop::*;

on_each_database!(duplicates_get_the_answer_of_the_original);

async fn duplicates_get_the_answer_of_the_original<D: Database>() {
    let shop = D::start().await;
    let gate = Gate::new();
    let held = gate.clone();
    let app = shop.app(async move |mut tx: Tx<D>| {
        let order = D::order(&mut tx, "one").await.unwrap();
        held.enter().await;
        (CREATED, format!("order {order}"))
    });
    let first = app.start("k");
    gate.arrived(1).await;
    let duplicates: Vec<_> = (0..20).map(|_| app.start("k")).collect();
    app.events.until("waiting", 20).await;
    gate.open(1);
    let first = soon(first).await.unwrap();
    assert_status(&first, 201);
    for duplicate in duplicates {
        assert_repeats(&soon(duplicate).await.unwrap(), &first);
    }
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

#[tokio::test]
async fn a_duplicate_that_waits_holds_no_connection() {
    let shop = Postgres::start().await;
    let (pool, storage) = shop.peer(8);
    let gate = Gate::new();
    let held = gate.clone();
    let app = App::new::<Postgres, _>(storage, config(), async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "one").await.unwrap();
        held.enter().await;
        CREATED
    });
    let first = app.start("k");
    gate.arrived(1).await;
    let duplicates: Vec<_> = (0..50).map(|_| app.start("k")).collect();
    app.events.until("waiting", 50).await;
    assert_eq!((pool.size(), pool.num_idle()), (1, 0));
    gate.open(1);
    assert_eq!(soon(first).await.unwrap().code(), 201);
    for answer in soon(join_all(duplicates)).await {
        assert_eq!(answer.unwrap().code(), 201);
    }
    assert_eq!(shop.orders().await, 1);
}

/// The handlers need two connections each, of four.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_connection_of_the_pool_is_no_deadlock() {
    let shop = Postgres::start().await;
    let (pool, storage) = shop.peer(4);
    let runs = Runs::new();
    let (counted, second) = (runs.clone(), pool.clone());
    let app = App::new::<Postgres, _>(storage, config(), async move |mut tx: Tx<Postgres>| {
        counted.next();
        Postgres::order(&mut tx, "one").await.unwrap();
        let mut second = second.acquire().await.unwrap();
        Postgres::execute(&mut second, "SELECT 1").await.unwrap();
        CREATED
    });
    let answers = (0..100).map(|n| app.start(&format!("k{}", n % 10)));
    for answer in soon(join_all(answers)).await {
        assert_eq!(answer.unwrap().code(), 201);
    }
    assert_eq!((shop.orders().await, runs.count()), (10, 10));
}

/// A service whose handler waits at a gate and answers with `status`; and one of another process, whose duplicates wait for `timeout`.
fn two(shop: &Shop<Postgres>, status: u16, timeout: Duration) -> (App, Gate, App) {
    let gate = Gate::new();
    let held = gate.clone();
    let status = StatusCode::from_u16(status).unwrap();
    let first = shop.app(async move |mut tx: Tx<Postgres>| {
        let order = Postgres::order(&mut tx, "here").await.unwrap();
        held.enter().await;
        (status, format!("order {order} here"))
    });
    let (_, peer) = shop.peer(4);
    let handler = async move |mut tx: Tx<Postgres>| {
        let order = Postgres::order(&mut tx, "there").await.unwrap();
        (CREATED, format!("order {order} there"))
    };
    let other = App::new::<Postgres, _>(peer, waiting(timeout), handler);
    (first, gate, other)
}

#[tokio::test]
async fn a_duplicate_elsewhere_is_refused_when_its_time_is_over() {
    let shop = Postgres::start().await;
    let (app, gate, other) = two(&shop, 201, Duration::from_millis(300));
    let first = app.start("k");
    gate.arrived(1).await;
    let refused = soon(other.post("k")).await;
    assert_eq!(refused.code(), 423, "{refused:?}");
    assert_eq!(refused.problem().as_deref(), Some("in-flight"));
    assert!(refused.header("retry-after").is_some());
    gate.open(1);
    assert_repeats(&other.post("k").await, &soon(first).await.unwrap());
}

#[tokio::test]
async fn a_duplicate_elsewhere_replays_what_is_committed() {
    let shop = Postgres::start().await;
    let (app, gate, other) = two(&shop, 201, idempotency_tests::PATIENCE);
    let first = app.start("k");
    gate.arrived(1).await;
    let duplicate = other.start("k");
    other.events.until("waiting", 1).await;
    gate.open(1);
    let first = soon(first).await.unwrap();
    assert_repeats(&soon(duplicate).await.unwrap(), &first);
    assert_eq!(shop.orders().await, 1);
}

#[tokio::test]
async fn a_duplicate_elsewhere_runs_after_a_rollback() {
    let shop = Postgres::start().await;
    let (app, gate, other) = two(&shop, 422, idempotency_tests::PATIENCE);
    let first = app.start("k");
    gate.arrived(1).await;
    let duplicate = other.start("k");
    other.events.until("waiting", 1).await;
    gate.open(1);
    assert_status(&soon(first).await.unwrap(), 422);
    let answer = soon(duplicate).await.unwrap();
    assert_status(&answer, 201);
    assert_eq!(answer.text(), "order 2 there");
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

/// It would wait at the row that it can't see, until its time limit.
#[tokio::test]
async fn a_plain_handler_is_refused_while_a_transaction_is_open() {
    let shop = Postgres::start().await;
    let gate = Gate::new();
    let held = gate.clone();
    let encoder = |config: idempotency_axum::Config| config.encoder(KeyOnlyEncoder);
    let app = shop.app_with(encoder(config()), async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "one").await.unwrap();
        held.enter().await;
        CREATED
    });
    let (_, peer) = shop.peer(4);
    let peer: PostgresStorage = peer.time_limit(Duration::from_secs(5));
    let runs = Runs::new();
    let plain = runs.handler();
    let other = App::of(
        peer,
        encoder(waiting(Duration::from_millis(300))),
        |layer| {
            let plain = plain.idempotency_key(KeyPolicy::required());
            Router::new()
                .route("/orders", post(plain))
                .layer(layer.clone())
        },
    );
    let first = app.start("k");
    gate.arrived(1).await;
    let refused = soon(other.post("k")).await;
    assert_eq!(
        refused.problem().as_deref(),
        Some("in-flight"),
        "{refused:?}"
    );
    gate.open(1);
    let first = soon(first).await.unwrap();
    assert_repeats(&other.post("k").await, &first);
    assert_eq!(runs.count(), 0);
}
