//! Statements and commits that fail.

use idempotency_axum::{
    IsolationLevel, StoreOn,
    sqlx::{Postgres, Row as _},
};
use idempotency_tests::{Gate, Runs};

use super::shop::*;

on_each_database!(a_refused_statement_that_the_answer_reports_is_undone,);

/// The order fails with it; a record of a refusal does not.
async fn a_refused_statement_that_the_answer_reports_is_undone<D: Database>() {
    let shop = D::start().await;
    let app = shop.app_with(
        config().store_on(StoreOn::below(500)),
        async move |mut tx: Tx<D>| {
            D::order(&mut tx, "refused").await.unwrap();
            let failed = D::execute(&mut tx, "INSERT INTO nowhere VALUES (1)").await;
            assert!(failed.is_err());
            (axum::http::StatusCode::UNPROCESSABLE_ENTITY, "refused")
        },
    );
    let first = app.post("k").await;
    assert_status(&first, 422);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!((shop.orders().await, shop.records().await), (0, 1));
}

#[tokio::test]
async fn an_error_that_a_handler_swallows_is_a_500() {
    let shop = Postgres::start().await;
    let runs = Runs::new();
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "swallowed").await.unwrap();
        if runs.next() == 1 {
            let failed = Postgres::execute(&mut tx, "SELECT 1 / 0").await;
            assert!(failed.is_err());
        }
        (CREATED, "order")
    });
    assert_status(&app.post("k").await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    assert_status(&app.post("k").await, 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

/// It stays one when the handler has asked that its writes be kept.
#[tokio::test]
async fn a_swallowed_error_keeps_no_writes() {
    let shop = Postgres::start().await;
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        tx.keep_writes();
        Postgres::order(&mut tx, "swallowed").await.unwrap();
        let _ = Postgres::execute(&mut tx, "SELECT 1 / 0").await;
        (axum::http::StatusCode::UNPROCESSABLE_ENTITY, "refused")
    });
    assert_status(&app.post("k").await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
}

#[tokio::test]
async fn an_error_within_a_savepoint_is_the_handlers_own() {
    let shop = Postgres::start().await;
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "first").await.unwrap();
        for n in 0..2 {
            let mut inner = idempotency_axum::sqlx::Connection::begin(&mut *tx)
                .await
                .unwrap();
            Postgres::order(&mut inner, "inner").await.unwrap();
            let failed = Postgres::execute(&mut inner, "SELECT 1 / 0").await;
            assert!(failed.is_err());
            match n {
                0 => inner.rollback().await.unwrap(),
                _ => drop(inner),
            }
        }
        (CREATED, "order")
    });
    let first = app.post("k").await;
    assert_status(&first, 201);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!(shop.orders().await, 1);
}

/// The driver still counts it when the record is written.
#[tokio::test]
async fn a_forgotten_savepoint_changes_nothing() {
    let shop = Postgres::start().await;
    for (key, status, orders) in [("created", 201, 2), ("refused", 422, 2), ("failed", 500, 2)] {
        let app = shop.app_with(
            config().store_on(StoreOn::below(500)),
            async move |mut tx: Tx<Postgres>| {
                Postgres::order(&mut tx, "first").await.unwrap();
                let mut inner = idempotency_axum::sqlx::Connection::begin(&mut *tx)
                    .await
                    .unwrap();
                Postgres::order(&mut inner, "inner").await.unwrap();
                std::mem::forget(inner);
                axum::http::StatusCode::from_u16(status).unwrap()
            },
        );
        let first = app.post(key).await;
        assert_status(&first, status);
        assert_eq!(shop.orders().await, orders, "{key}");
        if status != 500 {
            assert_repeats(&app.post(key).await, &first);
        }
    }
}

#[tokio::test]
async fn a_constraint_that_fails_at_the_commit_is_a_500() {
    let shop = Postgres::start().await;
    shop.server
        .execute("ALTER TABLE orders ADD UNIQUE (note) DEFERRABLE INITIALLY DEFERRED")
        .await;
    let runs = Runs::new();
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "one").await.unwrap();
        if runs.next() == 1 {
            Postgres::order(&mut tx, "one").await.unwrap();
        }
        (CREATED, "order")
    });
    assert_status(&app.post("k").await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    assert_status(&app.post("k").await, 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

#[tokio::test]
async fn a_conflict_at_the_commit_is_a_503() {
    let shop = Postgres::start().await;
    let (_, storage) = shop.peer(8);
    let storage = storage.isolation(IsolationLevel::Serializable);
    let (gate, held) = (Gate::new(), Gate::new());
    let (reads, writes) = (gate.clone(), held.clone());
    let handler = async move |mut tx: Tx<Postgres>| {
        let count = "SELECT count(*) FROM orders";
        let count = idempotency_axum::sqlx::Executor::fetch_one(&mut *tx, count).await;
        let count: i64 = count.unwrap().get(0);
        reads.enter().await;
        Postgres::order(&mut tx, "next").await.unwrap();
        writes.enter().await;
        (CREATED, format!("order {count}"))
    };
    let app = App::new::<Postgres, _>(storage, config(), handler);
    let both = ["a", "b"].map(|key| app.start(key));
    gate.arrived(2).await;
    gate.open(2);
    held.arrived(2).await;
    held.open(1);
    // The first to go on is committed; the other one has seen what is not so any more.
    app.events.until("completed", 1).await;
    held.open(1);
    let [a, b] = both.map(|answer| async { soon(answer).await.unwrap() });
    let answers = [a.await, b.await];
    let loses = answers
        .iter()
        .position(|answer| answer.code() != 201)
        .unwrap();
    assert_try_again(&answers[loses], "rolled-back");
    assert_status(&answers[1 - loses], 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    gate.open(1);
    held.open(1);
    let again = app.post(["a", "b"][loses]).await;
    assert_status(&again, 201);
    assert_eq!(again.text(), "order 1");
    assert_eq!((shop.orders().await, shop.records().await), (2, 2));
}
