//! What a manual handler never sees.

use idempotency_axum::{Config, MemoryStorage, Operation};
use idempotency_tests::{Fault, FaultyStorage};

use crate::{Shop, assert_ran, assert_refused, patient};

#[tokio::test]
async fn another_body_comes_first() {
    for (config, status) in [(Config::ietf(), 422), (Config::stripe(), 400)] {
        let shop = Shop::with(config).await;
        let call = |body: &'static str| shop.call().body(body).send();
        assert_ran(&call("one").await, 1, "nothing");
        assert_refused(&call("two").await, status, "key-reused");
        assert_ran(&call("one").await, 2, "201 run 1");
        // Nor after a conflict that was stored.
        assert_refused(&call("two").await, status, "key-reused");
        assert_eq!(shop.runs(), 2);
        assert_ran(&call("one").await, 3, "201 run 2");
    }
}

#[tokio::test]
async fn another_body_does_not_wait_for_a_turn() {
    let shop = Shop::with(Config::ietf().lock(patient())).await;
    let call = |body: &'static str| shop.call().body(body);
    assert_ran(&call("one").send().await, 1, "nothing");
    let conflict = call("one").header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    assert_refused(&call("two").send().await, 422, "key-reused");
    shop.work.gate.open(1);
    assert_ran(&conflict.await.unwrap(), 2, "201 run 1");
}

/// With `BasicKeyEncoder` it is another operation.
#[tokio::test]
async fn another_body_is_another_operation_by_default() {
    let shop = Shop::open().await;
    let call = |body: &'static str| shop.call().body(body).send();
    assert_ran(&call("one").await, 1, "nothing");
    assert_ran(&call("two").await, 2, "nothing");
    assert_ran(&call("one").await, 3, "201 run 1");
}

#[tokio::test]
async fn a_tombstone_of_another_body() {
    let shop = Shop::with(Config::ietf()).await;
    let first = shop.ask("large").body("one").send().await;
    assert_eq!(first.code(), 200);
    let other = shop.call().body("two").send().await;
    assert_refused(&other, 422, "key-reused");
    let retry = shop.call().body("one").send().await;
    assert_ran(&retry, 2, "no answer");
}

#[tokio::test]
async fn no_key_and_no_valid_key() {
    let shop = Shop::open().await;
    let missing = shop.server.post("/orders").send().await;
    assert_refused(&missing, 400, "missing-key");
    let invalid = shop.server.post("/orders").key("a,b").send().await;
    assert_refused(&invalid, 400, "invalid-key");
    assert_eq!(shop.runs(), 0);
}

#[tokio::test]
async fn a_storage_that_is_down() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let shop = Shop::on(storage.clone(), Config::default()).await;
    shop.assert_runs(1, "nothing").await;
    storage.set(Operation::Begin, Fault::FailBefore);
    let refused = shop.call().send().await;
    assert_refused(&refused, 503, "storage-unavailable");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(shop.runs(), 1);
    storage.heal(Operation::Begin);
    shop.assert_runs(2, "201 run 1").await;
}
