//! Answers whose bodies stream.

use axum::body::to_bytes;
use axum::{http::header, response::IntoResponse};
use idempotency_axum::{Config, sqlx::Postgres};
use idempotency_tests::{Feed, Length, Runs};

use super::shop::*;

on_each_database!(
    a_stream_is_held_until_the_commit,
    beyond_the_limit_a_tombstone_is_committed_first,
    an_event_stream_is_committed_before_its_head,
    a_body_that_breaks_off_is_rolled_back,
);

/// A service whose handler writes an order and answers with what the test feeds, at first, and then with a short text.
fn feeding<D: Database>(shop: &Shop<D>, config: Config, kind: &'static str) -> (App, Feed) {
    let (feed, runs) = (Feed::new(), Runs::new());
    let fed = feed.clone();
    let app = shop.app_with(config, async move |mut tx: Tx<D>| {
        D::order(&mut tx, "streamed").await.unwrap();
        let kind = [(header::CONTENT_TYPE, kind)];
        match runs.next() {
            1 => (CREATED, kind, fed.body(Length::Unknown)).into_response(),
            run => (CREATED, kind, format!("run {run}")).into_response(),
        }
    });
    (app, feed)
}

async fn a_stream_is_held_until_the_commit<D: Database>() {
    let shop = D::start().await;
    let (app, feed) = feeding(&shop, config(), "text/plain");
    let answer = app.start("k");
    feed.data("first ");
    feed.until_taken(1).await;
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    assert!(!answer.is_finished());
    feed.data("second");
    feed.end();
    let first = soon(answer).await.unwrap();
    assert_status(&first, 201);
    assert_eq!(first.text(), "first second");
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    let again = app.post("k").await;
    assert!(again.is_replay(), "{again:?}");
    assert_eq!((again.code(), again.text()), (201, "first second"));
}

async fn beyond_the_limit_a_tombstone_is_committed_first<D: Database>() {
    let shop = D::start().await;
    let (app, feed) = feeding(&shop, config().max_response_body(10), "text/plain");
    feed.data("01234567");
    feed.data("89abcdef");
    let answer = soon(app.open("/orders", "k")).await;
    assert_eq!(answer.status(), 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    assert_tombstone(&app.post("k").await);
    feed.data("ghij");
    feed.end();
    let body = soon(to_bytes(answer.into_body(), 100)).await.unwrap();
    assert_eq!(body, "0123456789abcdefghij");
    assert_tombstone(&app.post("k").await);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

async fn an_event_stream_is_committed_before_its_head<D: Database>() {
    let shop = D::start().await;
    let (app, feed) = feeding(&shop, config(), "text/event-stream");
    let answer = soon(app.open("/orders", "k")).await;
    assert_eq!(answer.status(), 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    assert_tombstone(&app.post("k").await);
    feed.data("data: 1\n\n");
    feed.end();
    let body = soon(to_bytes(answer.into_body(), 100)).await.unwrap();
    assert_eq!(body, "data: 1\n\n");
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

async fn a_body_that_breaks_off_is_rolled_back<D: Database>() {
    let shop = D::start().await;
    let (app, feed) = feeding(&shop, config(), "text/plain");
    feed.data("first");
    feed.fail();
    assert_status(&soon(app.post("k")).await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    let again = app.post("k").await;
    assert_status(&again, 201);
    assert_eq!(again.text(), "run 2");
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

/// While the body streams, the transaction is open.
#[tokio::test]
async fn a_body_that_stops_coming_is_rolled_back() {
    let shop = Postgres::start().await;
    let limit = std::time::Duration::from_millis(300);
    let shop: Shop<Postgres> = Shop {
        storage: shop.storage.max_transaction(limit),
        server: shop.server,
    };
    let (app, feed) = feeding(&shop, config(), "text/plain");
    feed.data("first");
    assert_try_again(&soon(app.post("k")).await, "rolled-back");
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    assert_status(&app.post("k").await, 201);
}

/// A body that panics is a handler that panics.
#[tokio::test]
async fn a_body_that_panics_is_rolled_back() {
    let shop = Postgres::start().await;
    let (app, feed) = feeding(&shop, config(), "text/plain");
    feed.data("first");
    feed.panic();
    assert_status(&soon(app.post("k")).await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    assert_status(&app.post("k").await, 201);
}
