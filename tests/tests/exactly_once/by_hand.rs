//! Handlers that do with their transaction what they should not.

use axum::{extract::FromRequestParts as _, extract::Request, http::StatusCode};
use idempotency_axum::{StoreOn, sqlx::Postgres};
use idempotency_tests::{Gate, Runs};

use super::shop::*;

on_each_database!(
    a_commit_by_hand_never_runs_again,
    a_rollback_by_hand_never_runs_again,
    a_commit_by_hand_before_an_error_never_runs_again,
    a_rollback_by_hand_before_an_error_never_runs_again,
    an_early_drop_changes_nothing,
    taking_it_twice_commits_nothing,
    it_can_be_taken_again_after_a_drop,
);

/// A service whose handler writes an order, sends `statement`, writes another one, and answers with `status`.
fn ending<D: Database>(shop: &Shop<D>, statement: &'static str, status: u16) -> (App, Runs) {
    let runs = Runs::new();
    let counted = runs.clone();
    let app = shop.app(async move |mut tx: Tx<D>| {
        counted.next();
        D::order(&mut tx, "before").await.unwrap();
        D::execute(&mut tx, statement).await.unwrap();
        D::order(&mut tx, "after").await.unwrap();
        StatusCode::from_u16(status).unwrap()
    });
    (app, runs)
}

async fn a_commit_by_hand_never_runs_again<D: Database>() {
    let shop = D::start().await;
    for (orders, statement) in [(2, "COMMIT"), (3, "COMMIT; BEGIN")] {
        let (app, runs) = ending(&shop, statement, 201);
        assert_status(&app.post(statement).await, 500);
        for _ in 0..2 {
            assert_tombstone(&app.post(statement).await);
        }
        assert_eq!(runs.count(), 1);
        // After a COMMIT each statement commits itself; after a BEGIN it is in a transaction that is rolled back.
        assert_eq!(shop.orders().await, orders, "{statement}");
    }
}

async fn a_rollback_by_hand_never_runs_again<D: Database>() {
    let shop = D::start().await;
    for (orders, statement) in [(1, "ROLLBACK"), (1, "ROLLBACK; BEGIN")] {
        let (app, runs) = ending(&shop, statement, 201);
        assert_status(&app.post(statement).await, 500);
        for _ in 0..2 {
            assert_tombstone(&app.post(statement).await);
        }
        assert_eq!(runs.count(), 1);
        assert_eq!(shop.orders().await, orders, "{statement}");
    }
}

/// The answer would undo the writes, and can't.
async fn a_commit_by_hand_before_an_error_never_runs_again<D: Database>() {
    let shop = D::start().await;
    let (app, runs) = ending(&shop, "COMMIT", 422);
    let first = app.post("k").await;
    assert_status(&first, 500);
    for _ in 0..2 {
        assert_tombstone(&app.post("k").await);
    }
    assert_eq!((shop.orders().await, runs.count()), (2, 1));
}

/// What was written after it is committed, so a retry must not write it again.
async fn a_rollback_by_hand_before_an_error_never_runs_again<D: Database>() {
    let shop = D::start().await;
    for (orders, key) in [(1, "success"), (2, "all")] {
        let store_on = match key {
            "all" => StoreOn::below(500),
            _ => StoreOn::success(),
        };
        let runs = Runs::new();
        let counted = runs.clone();
        let config = config().store_on(store_on);
        let app = shop.app_with(config, async move |mut tx: Tx<D>| {
            counted.next();
            D::execute(&mut tx, "ROLLBACK").await.unwrap();
            D::order(&mut tx, "after").await.unwrap();
            StatusCode::UNPROCESSABLE_ENTITY
        });
        assert_status(&app.post(key).await, 500);
        assert_tombstone(&app.post(key).await);
        assert_eq!((shop.orders().await, runs.count()), (orders, 1));
    }
}

async fn an_early_drop_changes_nothing<D: Database>() {
    let shop = D::start().await;
    let app = shop.app(async move |mut tx: Tx<D>| {
        D::order(&mut tx, "early").await.unwrap();
        drop(tx);
        tokio::task::yield_now().await;
        (CREATED, "order")
    });
    let first = app.post("k").await;
    assert_status(&first, 201);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

async fn taking_it_twice_commits_nothing<D: Database>() {
    let shop = D::start().await;
    let app = shop.app_with(
        config().store_on(StoreOn::all()),
        async move |one: Tx<D>, other: Tx<D>| {
            drop((one, other));
            (CREATED, "order")
        },
    );
    assert_status(&app.post("k").await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
}

async fn it_can_be_taken_again_after_a_drop<D: Database>() {
    let shop = D::start().await;
    let app = shop.app(async move |request: Request| {
        let (mut parts, _) = request.into_parts();
        for n in 0..3 {
            let mut tx = Tx::<D>::from_request_parts(&mut parts, &()).await.unwrap();
            D::order(&mut tx, &format!("part {n}")).await.unwrap();
        }
        (CREATED, "order")
    });
    let first = app.post("k").await;
    assert_status(&first, 201);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!((shop.orders().await, shop.records().await), (3, 1));
}

const OPEN: &str = "SELECT count(*) FROM pg_stat_activity \
    WHERE application_name = 'shop' AND state LIKE 'idle in transaction%'";

/// The server ends the connection, and the key is free.
async fn assert_given_up(shop: &Shop<Postgres>, app: &App) {
    assert_status(&soon(app.post("k")).await, 500);
    let none = format!("SELECT (({OPEN}) = 0)::int::bigint");
    shop.server.until(&none).await;
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    let again = soon(app.post("k")).await;
    assert_status(&again, 201);
    assert_repeats(&app.post("k").await, &again);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

#[tokio::test]
async fn a_leaked_transaction_is_rolled_back() {
    let shop = Postgres::start().await;
    let runs = Runs::new();
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "leaked").await.unwrap();
        if runs.next() == 1 {
            std::mem::forget(tx);
        }
        (CREATED, "order")
    });
    assert_given_up(&shop, &app).await;
}

#[tokio::test]
async fn a_transaction_moved_into_a_task_is_rolled_back() {
    let shop = Postgres::start().await;
    let (runs, gate) = (Runs::new(), Gate::new());
    let held = gate.clone();
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "moved").await.unwrap();
        if runs.next() == 1 {
            let held = held.clone();
            tokio::spawn(async move {
                held.enter().await;
                let written = Postgres::order(&mut tx, "late").await;
                assert!(written.is_err(), "{written:?}");
                drop(tx);
                held.enter().await;
            });
        }
        (CREATED, "order")
    });
    assert_given_up(&shop, &app).await;
    gate.open(1);
    gate.arrived(2).await;
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

/// A leak that answers with an error is no other than one that answers with a success.
#[tokio::test]
async fn a_leak_behind_an_error_frees_its_key() {
    let shop = Postgres::start().await;
    let runs = Runs::new();
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "leaked").await.unwrap();
        if runs.next() == 1 {
            std::mem::forget(tx);
            return StatusCode::INTERNAL_SERVER_ERROR;
        }
        CREATED
    });
    assert_given_up(&shop, &app).await;
}
