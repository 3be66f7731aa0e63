//! The runs of a key are one at a time, the first one and those on conflicts.

use idempotency_axum::{Config, KeyPolicy, MemoryStorage};
use idempotency_tests::Gate;

use crate::{Shop, Work, assert_ran, assert_refused, impatient, patient, saw};

#[tokio::test]
async fn two_conflicts_at_once() {
    let shop = Shop::with(Config::default().lock(patient())).await;
    shop.assert_runs(1, "nothing").await;
    let one = shop.call().header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    let two = shop.call().start();
    shop.events.until("waiting", 1).await;
    assert_eq!(shop.runs(), 2, "the second waits for its turn");
    shop.work.gate.open(1);
    assert_ran(&one.await.unwrap(), 2, "201 run 1");
    assert_ran(&two.await.unwrap(), 3, "201 run 2");
}

/// Whatever was stored by one is seen by the next one.
async fn is_a_chain(shops: &[&Shop], conflicts: usize) {
    shops[0].assert_runs(1, "nothing").await;
    let mut calls = Vec::new();
    for conflict in 0..conflicts {
        let shop = shops[conflict % shops.len()];
        calls.push(shop.call().start());
    }
    let mut answers = Vec::new();
    for call in calls {
        let answer = call.await.unwrap();
        assert_eq!(answer.code(), 201, "{answer:?}");
        let run: usize = answer.text().strip_prefix("run ").unwrap().parse().unwrap();
        answers.push((run, saw(&answer).to_owned()));
    }
    answers.sort_unstable();
    let expected: Vec<_> = (2..conflicts + 2)
        .map(|run| (run, format!("201 run {}", run - 1)))
        .collect();
    assert_eq!(answers, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fifty_conflicts_at_once() {
    let shop = Shop::with(Config::default().lock(patient())).await;
    is_a_chain(&[&shop], 50).await;
    shop.layer.drain().await;
    assert_eq!(shop.layer.engine().running(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn conflicts_on_two_servers() {
    let (storage, work) = (MemoryStorage::new(), Work::default());
    let open = async || {
        let config = Config::default().lock(patient());
        Shop::sharing(work.clone(), storage.clone(), config, KeyPolicy::required()).await
    };
    let (one, two) = (open().await, open().await);
    is_a_chain(&[&one, &two], 30).await;
}

/// Whoever is on another key waits for nobody.
#[tokio::test]
async fn another_key_has_turns_of_its_own() {
    let work = Work::default();
    // Two handlers are at work at once here, as they may; so each shop has its own.
    let storage = MemoryStorage::new();
    let config = || Config::default().lock(patient());
    let shop = Shop::sharing(
        work.clone(),
        storage.clone(),
        config(),
        KeyPolicy::required(),
    )
    .await;
    let other = Shop::on(storage, config()).await;
    let other_call = || other.server.post("/orders").key("def").send();
    shop.assert_runs(1, "nothing").await;
    assert_ran(&other_call().await, 1, "nothing");
    let conflict = shop.call().header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    assert_ran(&other_call().await, 2, "201 run 1");
    assert_ran(&other_call().await, 3, "201 run 2");
    shop.work.gate.open(1);
    assert_ran(&conflict.await.unwrap(), 2, "201 run 1");
}

#[tokio::test]
async fn a_turn_that_panics_or_is_not_stored_lets_the_next_one_in() {
    for answer in ["panic", "503"] {
        let shop = Shop::with(Config::default().lock(patient())).await;
        shop.assert_runs(1, "nothing").await;
        let address = shop.server.address();
        let one = tokio::spawn(async move {
            let call = idempotency_tests::Call::new(address, http::Method::POST, "/orders");
            let call = call.key("abc").header("x-gate", "");
            call.header("x-answer", answer).try_send().await.is_ok()
        });
        shop.work.gate.arrived(1).await;
        let two = shop.call().start();
        shop.events.until("waiting", 1).await;
        shop.work.gate.open(1);
        assert_eq!(one.await.unwrap(), answer == "503");
        assert_ran(&two.await.unwrap(), 3, "201 run 1");
    }
}

#[tokio::test]
async fn a_client_that_leaves_cancels_no_turn() {
    let shop = Shop::with(Config::default().lock(patient())).await;
    shop.assert_runs(1, "nothing").await;
    let conflict = shop.call().header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    conflict.abort();
    shop.events.until("adopted", 1).await;
    assert!(
        shop.layer.engine().running() > 0,
        "drain has to wait for it"
    );
    let drained = tokio::spawn({
        let layer = shop.layer.clone();
        async move { layer.drain().await }
    });
    let next = shop.call().start();
    shop.events.until("waiting", 1).await;
    assert!(!drained.is_finished());
    assert_eq!(shop.runs(), 2);
    shop.work.gate.open(1);
    assert_ran(&next.await.unwrap(), 3, "201 run 2");
    drained.await.unwrap();
}

/// A client that leaves while it waits for its turn takes none.
#[tokio::test]
async fn a_client_that_leaves_before_its_turn_does_not_run() {
    let shop = Shop::with(Config::default().lock(patient())).await;
    shop.assert_runs(1, "nothing").await;
    let one = shop.call().header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    let two = shop.call().start();
    shop.events.until("waiting", 1).await;
    two.abort();
    while shop.layer.engine().waiting() > 0 {
        tokio::task::yield_now().await;
    }
    shop.work.gate.open(1);
    assert_ran(&one.await.unwrap(), 2, "201 run 1");
    shop.layer.drain().await;
    shop.assert_runs(3, "201 run 2").await;
}

#[tokio::test]
async fn a_duplicate_of_the_first_run_waits_and_is_a_conflict() {
    let shop = Shop::with(Config::default().lock(patient())).await;
    let first = shop.call().header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    let duplicate = shop.call().start();
    shop.events.until("waiting", 1).await;
    assert_eq!(shop.runs(), 1);
    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1, "nothing");
    assert_ran(&duplicate.await.unwrap(), 2, "201 run 1");
}

#[tokio::test]
async fn a_duplicate_of_the_first_run_is_refused_when_its_time_is_over() {
    let shop = Shop::with(Config::default().lock(impatient())).await;
    let first = shop.call().header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    let duplicate = shop.call().send().await;
    assert_refused(&duplicate, 423, "in-flight");
    assert_eq!(duplicate.header("retry-after"), Some("1"));
    assert_eq!(shop.runs(), 1);
    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1, "nothing");
    shop.assert_runs(2, "201 run 1").await;
}

/// Two that wait for a first run which is not stored: one becomes the first, the other its conflict.
#[tokio::test]
async fn duplicates_of_a_first_run_that_is_not_stored() {
    let shop = Shop::with(Config::default().lock(patient())).await;
    let first = shop.ask("503").header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    let duplicates = [shop.call().start(), shop.call().start()];
    shop.events.until("waiting", 2).await;
    shop.work.gate.open(1);
    assert_eq!(first.await.unwrap().code(), 503);
    let mut seen = Vec::new();
    for duplicate in duplicates {
        seen.push(saw(&duplicate.await.unwrap()).to_owned());
    }
    seen.sort_unstable();
    assert_eq!(seen, ["201 run 2", "nothing"]);
}

/// A gate is the same for all that go through it, so this one proves that no two are ever inside.
#[tokio::test]
async fn a_burst_while_a_turn_is_held() {
    let shop = Shop::with(Config::default().lock(patient())).await;
    shop.assert_runs(1, "nothing").await;
    let gate: &Gate = &shop.work.gate;
    let calls: Vec<_> = (0..10)
        .map(|_| shop.call().header("x-gate", "").start())
        .collect();
    for arrived in 1..=10 {
        gate.arrived(arrived).await;
        assert_eq!(shop.runs(), arrived + 1);
        gate.open(1);
    }
    for call in calls {
        assert_eq!(call.await.unwrap().code(), 201);
    }
    assert_eq!(shop.sees().await, "201 run 11");
}
