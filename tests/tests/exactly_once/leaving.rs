//! Clients that leave, and thousands of requests that end in every way.

use std::pin::pin;

use axum::http::StatusCode;
use futures_util::{StreamExt as _, stream};
use idempotency_axum::sqlx::{PgPool, Postgres};
use idempotency_tests::{Gate, PATIENCE, node::poll_times};

use super::shop::*;

on_each_database!(a_client_that_leaves_cancels_nothing);

async fn a_client_that_leaves_cancels_nothing<D: Database>() {
    let shop = D::start().await;
    let gate = Gate::new();
    let held = gate.clone();
    let app = shop.app(async move |mut tx: Tx<D>| {
        let order = D::order(&mut tx, "left").await.unwrap();
        held.enter().await;
        (CREATED, format!("order {order}"))
    });
    let client = app.start("k");
    gate.arrived(1).await;
    client.abort();
    assert!(client.await.is_err());
    assert_eq!(app.engine().running(), 1);
    gate.open(1);
    soon(app.engine().drain()).await;
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    let again = app.post("k").await;
    assert!(again.is_replay(), "{again:?}");
    assert_eq!((again.code(), again.text()), (201, "order 1"));
}

async fn all_idle(pool: &PgPool) {
    let idle = async {
        while pool.num_idle() < pool.size() as usize {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let all = tokio::time::timeout(PATIENCE, idle).await;
    assert!(
        all.is_ok(),
        "{} of {} are idle",
        pool.num_idle(),
        pool.size()
    );
}

/// What the `n`th request of ten thousand is; its retries are the same.
async fn end(mut tx: Tx<Postgres>, n: usize) -> (StatusCode, String) {
    let order = Postgres::order(&mut tx, "of many").await.unwrap();
    let status = match n % 10 {
        0 => panic!("one of many panics"),
        1 => StatusCode::UNPROCESSABLE_ENTITY,
        2 => {
            let _ = Postgres::execute(&mut tx, "SELECT 1 / 0").await;
            CREATED
        }
        3 => {
            drop(tx);
            tokio::task::yield_now().await;
            StatusCode::INTERNAL_SERVER_ERROR
        }
        _ => CREATED,
    };
    (status, format!("order {order}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_endings_cost_no_connection() {
    const REQUESTS: usize = 10_000;
    const KEYS: usize = 2_500;

    std::panic::set_hook(Box::new(|_| {}));
    let shop = Postgres::start().await;
    let (pool, storage) = shop.peer(8);
    let handler = async move |key: idempotency_axum::IdempotencyKey, tx: Tx<Postgres>| {
        end(tx, key.as_str().parse().unwrap()).await
    };
    let app = App::new::<Postgres, _>(storage, config(), handler);
    let requests = (0..REQUESTS).map(|n| {
        let app = app.clone();
        async move {
            let key = n % KEYS;
            let answer = pin!(app.open("/orders", &key.to_string()));
            if n % 7 == 0 {
                // It leaves, sooner or later.
                poll_times(answer, n % 23).await;
                return;
            }
            let answer = read(answer.await).await;
            let expected = match key % 10 {
                0 | 2 | 3 => 500,
                1 => 422,
                _ => 201,
            };
            assert_eq!(answer.code(), expected, "{key}: {answer:?}");
        }
    });
    let tasks = requests.map(tokio::spawn);
    let all = stream::iter(tasks).buffer_unordered(32);
    soon(all.for_each(async |ended| ended.unwrap())).await;
    soon(app.engine().drain()).await;
    assert_eq!(app.engine().running(), 0);
    all_idle(&pool).await;

    // All places among the transactions are free.
    for n in 0..KEYS {
        if n % 10 > 3 && n % 100 < 10 {
            assert_eq!(app.post(&n.to_string()).await.code(), 201);
        }
    }
    let expected = i64::try_from(KEYS / 10 * 6).unwrap();
    let missing = expected - shop.orders().await;
    // Of those whose clients left before they were begun.
    assert!(missing >= 0, "{missing}");
    assert_eq!(shop.records().await, shop.orders().await);
    all_idle(&pool).await;
    assert!(pool.size() <= 8);
}
