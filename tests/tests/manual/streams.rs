//! A conflict that is answered with a stream: recorded as any other answer, or the old record stays.

use std::{sync::Arc, time::Duration};

use http::HeaderMap;
use idempotency_axum::{Config, MemoryStorage, Operation};
use idempotency_tests::{End, Fault, FaultyStorage};
use tokio::sync::Semaphore;

use crate::{LIMIT, Shop, patient};

async fn shop() -> Shop {
    let shop = Shop::with(Config::default().lock(patient())).await;
    shop.assert_runs(1, "nothing").await;
    shop
}

#[tokio::test]
async fn within_the_limit_replaces_the_record() {
    let shop = shop().await;
    let mut conflict = shop.ask("stream").open().await;
    shop.work.feed.data("one");
    assert_eq!(conflict.read(3).await, "one");
    shop.work.feed.data("two");
    shop.work.feed.end();
    assert_eq!(conflict.finish().await.whole(), "two");
    assert_eq!(shop.sees().await, "200 onetwo");
}

#[tokio::test]
async fn its_end_comes_once_the_record_is_replaced() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let gate = Arc::new(Semaphore::new(0));
    let config = Config::default()
        .lock(patient())
        .storage_timeout(Duration::from_secs(60));
    let shop = Shop::on(storage.clone(), config).await;
    shop.assert_runs(1, "nothing").await;
    storage.set(Operation::Replace, Fault::Gate(gate.clone()));
    let mut conflict = shop.ask("stream").open().await;
    shop.work.feed.data("one");
    assert_eq!(conflict.read(3).await, "one");
    shop.work.feed.end();
    storage.called(Operation::Replace, 1).await;
    // The time of some round trips for what should not come.
    for path in ["/a", "/b", "/c"] {
        assert_eq!(shop.server.get(path).send().await.code(), 404);
    }
    assert_eq!(conflict.read_ready(), "");
    gate.add_permits(1);
    assert_eq!(conflict.finish().await.whole(), "");
    assert_eq!(shop.sees().await, "200 one");
}

#[tokio::test]
async fn the_next_turn_begins_at_its_end() {
    let shop = shop().await;
    let mut conflict = shop.ask("stream").open().await;
    shop.work.feed.data("one");
    assert_eq!(conflict.read(3).await, "one");
    let next = shop.call().start();
    shop.events.until("waiting", 1).await;
    shop.work.feed.data("two");
    assert_eq!(conflict.read(3).await, "two");
    assert_eq!(shop.runs(), 2);
    shop.work.feed.end();
    let next = next.await.unwrap();
    crate::assert_ran(&next, 3, "200 onetwo");
    assert_eq!(conflict.finish().await.whole(), "");
}

#[tokio::test]
async fn over_the_limit_keeps_the_record() {
    let shop = shop().await;
    let mut conflict = shop.ask("stream").open().await;
    shop.work.feed.data(vec![b'x'; LIMIT]);
    conflict.read(LIMIT).await;
    shop.work.feed.data("!");
    assert_eq!(conflict.read(1).await, "!");
    // It can't be stored any more, so nothing is to be waited for.
    assert_eq!(shop.sees().await, "201 run 1");
    shop.work.feed.data("more");
    shop.work.feed.end();
    assert_eq!(conflict.finish().await.whole(), "more");
    assert_eq!(shop.sees().await, "201 run 1");
    assert_eq!(shop.events.count("tombstoned"), 0);
}

#[tokio::test]
async fn a_break_keeps_the_record() {
    breaks(|shop| shop.work.feed.fail()).await;
}

#[tokio::test]
async fn a_panic_of_the_body_keeps_the_record() {
    breaks(|shop| shop.work.feed.panic()).await;
}

async fn breaks(end: fn(&Shop)) {
    let shop = shop().await;
    let mut conflict = shop.ask("stream").open().await;
    shop.work.feed.data("one");
    assert_eq!(conflict.read(3).await, "one");
    end(&shop);
    assert!(conflict.finish().await.is_broken);
    assert_eq!(shop.sees().await, "201 run 1");
    shop.layer.drain().await;
}

#[tokio::test]
async fn trailers_keep_the_record() {
    let shop = shop().await;
    let mut conflict = shop.ask("stream").open().await;
    shop.work.feed.data("one");
    assert_eq!(conflict.read(3).await, "one");
    shop.work.feed.trailers(HeaderMap::new());
    shop.work.feed.end();
    assert_eq!(conflict.finish().await.data, "");
    assert_eq!(shop.sees().await, "201 run 1");
}

#[tokio::test]
async fn an_event_stream_keeps_the_record_and_nobody_waits_for_its_end() {
    let shop = shop().await;
    let mut conflict = shop.ask("events").open().await;
    shop.work.feed.data("data: one\n\n");
    assert_eq!(conflict.read(11).await, "data: one\n\n");
    assert_eq!(shop.sees().await, "201 run 1");
    shop.work.feed.data("data: two\n\n");
    assert_eq!(conflict.read(11).await, "data: two\n\n");
}

#[tokio::test]
async fn a_client_that_leaves_does_not_stop_it() {
    let shop = shop().await;
    let mut conflict = shop.ask("stream").open().await;
    shop.work.feed.data("one");
    assert_eq!(conflict.read(3).await, "one");
    drop(conflict);
    shop.work.feed.data("two");
    shop.work.feed.end();
    assert_eq!(shop.work.feed.ended().await, End::Read);
    shop.layer.drain().await;
    assert_eq!(shop.sees().await, "200 onetwo");
}
