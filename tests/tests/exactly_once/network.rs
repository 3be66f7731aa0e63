//! A database that stalls, nodes that fall silent, and connections that break during a commit.

use std::time::Duration;

use idempotency_axum::{Config, PostgresStorage, sqlx::Postgres};
use idempotency_tests::{Gate, Runs, postgres::Proxy};
use tokio::time::Instant;

use super::shop::*;

const LIMIT: Duration = Duration::from_millis(500);

/// A storage behind a proxy, which gives up a statement after [`LIMIT`].
async fn behind(proxy: &Proxy) -> PostgresStorage {
    let storage = PostgresStorage::connect(proxy.url())
        .max_connections(4)
        .await
        .unwrap();
    storage.time_limit(LIMIT).max_transaction(LIMIT)
}

fn impatient() -> Config {
    config().storage_timeout(LIMIT)
}

/// A service behind a proxy, whose handler waits at the gate after it has written an order.
async fn held(proxy: &Proxy) -> (App, Gate) {
    let gate = Gate::new();
    let held = gate.clone();
    let storage = behind(proxy).await;
    let app = App::new::<Postgres, _>(storage, impatient(), async move |mut tx: Tx<Postgres>| {
        let order = Postgres::order(&mut tx, "held").await?;
        held.enter().await;
        Ok::<_, Failed>((CREATED, format!("order {order}")))
    });
    (app, gate)
}

#[tokio::test]
async fn a_stalled_database_is_answered_with_503() {
    let shop = Postgres::start().await;
    let proxy = Proxy::before(&shop.server).await;
    let (app, gate) = held(&proxy).await;
    let under_way = app.start("under way");
    gate.arrived(1).await;
    proxy.fall_silent();
    let start = Instant::now();
    let began = ["a", "b", "c"].map(|key| app.start(key));
    gate.open(1);
    let answer = soon(under_way).await.unwrap();
    assert_eq!(answer.code(), 503, "{answer:?}");
    for answer in began {
        assert_try_again(&soon(answer).await.unwrap(), "storage-unavailable");
    }
    // A few limits one after another, and what a busy machine takes.
    assert!(start.elapsed() < 20 * LIMIT, "{:?}", start.elapsed());

    proxy.speak();
    gate.open(2);
    for key in ["under way", "a"] {
        // Its old transaction is over at the server, once its limit is.
        let answer = loop {
            let answer = soon(app.post(key)).await;
            if answer.code() != 503 {
                break answer;
            }
        };
        assert_eq!(answer.code(), 201, "{answer:?}");
    }
    assert_eq!((shop.orders().await, shop.records().await), (2, 2));
}

#[tokio::test]
async fn a_node_that_falls_silent_gives_up_its_key() {
    let shop = Postgres::start().await;
    let proxy = Proxy::before(&shop.server).await;
    let (app, gate) = held(&proxy).await;
    let silent = app.start("k");
    gate.arrived(1).await;
    proxy.fall_silent();
    let runs = Runs::new();
    let other = shop.app(async move |mut tx: Tx<Postgres>| {
        let order = Postgres::order(&mut tx, "other").await.unwrap();
        (CREATED, format!("order {order}, run {}", runs.next()))
    });
    let answer = soon(other.post("k")).await;
    assert_status(&answer, 201);
    assert_try_again(&soon(silent).await.unwrap(), "rolled-back");
    proxy.speak();
    assert_repeats(&soon(app.post("k")).await, &answer);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

/// The server is asked what became of it.
#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_committed() {
    let shop = Postgres::start().await;
    let proxy = Proxy::before(&shop.server).await;
    let (app, gate) = held(&proxy).await;
    gate.open(1);
    proxy.lose_the_answer_to(b"COMMIT");
    let first = soon(app.post("k")).await;
    assert!(proxy.has_lost());
    assert_status(&first, 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    assert_repeats(&app.post("k").await, &first);
}

#[tokio::test]
async fn a_commit_that_did_not_arrive_is_rolled_back() {
    let shop = Postgres::start().await;
    let proxy = Proxy::before(&shop.server).await;
    let (app, gate) = held(&proxy).await;
    gate.open(2);
    proxy.lose(b"COMMIT");
    let first = soon(app.post("k")).await;
    assert!(proxy.has_lost());
    assert_try_again(&first, "rolled-back");
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    assert_status(&soon(app.post("k")).await, 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

/// And then nobody can be asked.
#[tokio::test]
async fn a_commit_in_doubt_is_told_by_the_retry() {
    let shop = Postgres::start().await;
    let proxy = Proxy::before(&shop.server).await;
    let (app, gate) = held(&proxy).await;
    let first = app.start("k");
    gate.arrived(1).await;
    let all = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    shop.server.until(all).await;
    proxy.lose_the_answer_to(b"COMMIT");
    // What is asked after the commit is held back, as are new connections.
    proxy.fall_silent_after_loss();
    gate.open(1);
    let start = Instant::now();
    assert_try_again(&soon(first).await.unwrap(), "in-doubt");
    assert!(start.elapsed() < 20 * LIMIT, "{:?}", start.elapsed());
    proxy.speak();
    let again = soon(app.post("k")).await;
    assert!(again.is_replay(), "{again:?}");
    assert_eq!((again.code(), again.text()), (201, "order 1"));
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

#[tokio::test]
async fn a_connection_lost_in_a_handler_leaves_nothing() {
    let shop = Postgres::start().await;
    let proxy = Proxy::before(&shop.server).await;
    let (app, gate) = held(&proxy).await;
    for (words, key) in [
        (&b"INSERT INTO orders"[..], "order"),
        (b"record = decode", "record"),
    ] {
        gate.open(2);
        proxy.lose(words);
        let first = soon(app.post(key)).await;
        assert!(proxy.has_lost(), "{key}");
        assert!([500, 503].contains(&first.code()), "{first:?}");
        let again = soon(app.post(key)).await;
        assert_status(&again, 201);
    }
    assert_eq!((shop.orders().await, shop.records().await), (2, 2));
}
