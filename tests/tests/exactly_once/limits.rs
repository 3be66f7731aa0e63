//! How long a transaction may be open.

use std::{future::pending, time::Duration};

use idempotency_axum::{PostgresStorage, sqlx::Postgres};
use idempotency_tests::{PATIENCE, Runs};
use tokio::time::Instant;

use super::shop::*;

on_each_database!(a_handler_that_takes_too_long_is_rolled_back);

const LIMIT: Duration = Duration::from_millis(300);

async fn a_handler_that_takes_too_long_is_rolled_back<D: Database>() {
    let shop = D::start().await;
    let runs = Runs::new();
    let storage = D::max_transaction(&shop.storage, LIMIT);
    let app = App::new::<D, _>(storage, config(), async move |mut tx: Tx<D>| {
        D::order(&mut tx, "slow").await.unwrap();
        if runs.next() == 1 {
            pending::<()>().await;
        }
        (CREATED, "order")
    });
    assert_try_again(&soon(app.post("k")).await, "rolled-back");
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    let again = app.post("k").await;
    assert_status(&again, 201);
    assert_repeats(&app.post("k").await, &again);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    assert_eq!(app.engine().running(), 0);
}

#[tokio::test]
async fn a_slow_handler_costs_no_connection() {
    let shop = Postgres::start().await;
    let (pool, storage) = shop.peer(2);
    let app = App::new::<Postgres, _>(storage.max_transaction(LIMIT), config(), {
        async move |mut tx: Tx<Postgres>| {
            Postgres::order(&mut tx, "slow").await.unwrap();
            pending::<()>().await;
        }
    });
    for n in 0..3 {
        assert_try_again(&soon(app.post(&n.to_string())).await, "rolled-back");
    }
    // The pool has both, in order. (The server may have ended one: it has the same limit.)
    let _other = soon(pool.acquire()).await.unwrap();
    let mut connection = soon(pool.acquire()).await.unwrap();
    Postgres::order(&mut connection, "next").await.unwrap();
    assert_eq!((shop.orders().await, shop.records().await), (1, 0));
}

/// The server would go on with it for a minute.
#[tokio::test]
async fn a_statement_that_takes_too_long_frees_its_key() {
    let shop = Postgres::start().await;
    let runs = Runs::new();
    let storage = PostgresStorage::connect(shop.server.url()).time_limit(Duration::from_secs(2));
    let storage = storage.await.unwrap().max_transaction(LIMIT);
    let app = App::new::<Postgres, _>(storage, config(), async move |mut tx: Tx<Postgres>| {
        if runs.next() == 1 {
            Postgres::execute(&mut tx, "SELECT pg_sleep(600)")
                .await
                .unwrap();
        }
        Postgres::order(&mut tx, "order").await.unwrap();
        (CREATED, "order")
    });
    let start = Instant::now();
    assert_try_again(&soon(app.post("k")).await, "rolled-back");
    let (_, peer) = shop.peer(2);
    let other = App::new::<Postgres, _>(peer, config(), async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "order").await.unwrap();
        (CREATED, "order")
    });
    assert_status(&soon(other.post("k")).await, 201);
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());
}
