//! Two thousand requests over fifty keys, at four nodes.

use axum::http::StatusCode;
use futures_util::{StreamExt as _, stream};
use idempotency_axum::{IsolationLevel, sqlx::Postgres};
use idempotency_tests::{
    PATIENCE, Runs,
    redis::{Spec, assert_fifty_of_two_thousand_run, runs_of_two_thousand},
};

use super::shop::*;

/// Sends them, each until it is not told to try again, and returns how often a handler ran.
async fn crowd(level: IsolationLevel) -> usize {
    let shop = Postgres::start().await;
    let runs = Runs::new();
    let apps: Vec<App> = (0..4)
        .map(|_| {
            let counted = runs.clone();
            let (_, peer) = shop.peer(8);
            let handler = async move |mut tx: Tx<Postgres>| {
                counted.next();
                let order = Postgres::order(&mut tx, "of a crowd").await?;
                Ok::<_, Failed>((CREATED, format!("order {order}")))
            };
            App::new::<Postgres, _>(peer.isolation(level), config(), handler)
        })
        .collect();
    let requests = (0..2_000).map(|n| {
        let (app, key) = (apps[n % 4].clone(), n / 4 % 50);
        tokio::spawn(async move {
            loop {
                let answer = app.post(&format!("key-{key}")).await;
                // A statement of the handler that meets another transaction is an error of the handler.
                let again = [
                    StatusCode::SERVICE_UNAVAILABLE,
                    StatusCode::INTERNAL_SERVER_ERROR,
                ];
                if !again.contains(&answer.status) {
                    return (key, answer);
                }
            }
        })
    });
    let requests: Vec<_> = requests.collect();
    let answers: Vec<_> = soon(stream::iter(requests).buffer_unordered(2_000).collect()).await;
    let mut texts = vec![None; 50];
    for answer in answers {
        let (key, answer) = answer.unwrap();
        assert_eq!(answer.code(), 201, "{answer:?}");
        let text = texts[key].get_or_insert_with(|| answer.text().to_owned());
        assert_eq!(text, answer.text());
    }
    assert_eq!((shop.orders().await, shop.records().await), (50, 50));
    runs.count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_orders_under_read_committed() {
    assert_eq!(crowd(IsolationLevel::ReadCommitted).await, 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_orders_under_repeatable_read() {
    let runs = crowd(IsolationLevel::RepeatableRead).await;
    assert!(runs >= 50, "{runs}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_orders_under_serializable() {
    let runs = crowd(IsolationLevel::Serializable).await;
    assert!(runs >= 50, "{runs}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_orders_at_four_processes() {
    let shop = Postgres::start().await;
    let spec = Spec::postgres(env!("CARGO_BIN_EXE_service"), &shop.server.url())
        .wait(PATIENCE)
        .variable("TRANSACTIONS", "1".to_owned());
    assert_fifty_of_two_thousand_run(&spec).await;
    assert_eq!((shop.orders().await, shop.records().await), (50, 50));
}

/// Clients send again what met another transaction: 503, or the 500 of a handler whose own statement did.
async fn fifty_orders_at_four_processes_under(isolation: &str) {
    let shop = Postgres::start().await;
    let url = shop.server.url();
    let separator = if url.contains('?') { '&' } else { '?' };
    // A backslash keeps the space in the value.
    let value = isolation.replace(' ', "%5C%20");
    let url = format!("{url}{separator}options=-c%20default_transaction_isolation%3D{value}");
    let spec = Spec::postgres(env!("CARGO_BIN_EXE_service"), &url)
        .wait(PATIENCE)
        .variable("TRANSACTIONS", "1".to_owned());
    let runs = runs_of_two_thousand(&spec, |code| [500, 503].contains(&code)).await;
    assert!(runs >= 50, "{runs}");
    assert_eq!((shop.orders().await, shop.records().await), (50, 50));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_orders_at_four_processes_under_repeatable_read() {
    fifty_orders_at_four_processes_under("repeatable read").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_orders_at_four_processes_under_serializable() {
    fifty_orders_at_four_processes_under("serializable").await;
}
