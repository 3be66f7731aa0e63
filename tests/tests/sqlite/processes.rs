//! Several processes with one file, which are killed and stopped.

use std::time::Duration;

use idempotency_tests::{
    Answer, assert_replays,
    redis::{Process, Spec, assert_fifty_of_two_thousand_run},
    sqlite::SqliteFile,
};

use super::SERVICE;

async fn order(process: &Process, key: &str) -> Answer {
    process.post("/orders").key(key).send().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_requests_at_four_processes_are_fifty_executions() {
    let file = SqliteFile::new();
    let spec = Spec::sqlite(SERVICE, &file.url()).wait(Duration::from_secs(20));
    assert_fifty_of_two_thousand_run(&spec).await;
}

#[tokio::test]
async fn what_a_killed_process_held_runs_when_its_lease_is_over() {
    let file = SqliteFile::new();
    let spec = Spec::sqlite(SERVICE, &file.url()).lease(Duration::from_secs(4));
    let mut dies = spec.clone().held().start().await;
    let refuses = spec.clone().wait(Duration::ZERO).start().await;
    let waits = spec.wait(Duration::from_secs(20)).start().await;
    let lost = tokio::spawn(dies.post("/orders").key("k").try_send());
    dies.until("ran k", 1).await;
    dies.kill().await;
    let lost = lost.await.expect("no panic");
    assert!(lost.is_err(), "an answer of a dead process");

    let refused = order(&refuses, "k").await;
    assert_eq!(refused.code(), 423, "{refused:?}");
    let first = order(&waits, "k").await;
    assert_eq!(first.code(), 201, "{first:?}");
    for process in [&refuses, &waits] {
        assert_replays(&order(process, "k").await, first.text());
    }
    assert_eq!(refuses.count("ran k") + waits.count("ran k"), 1);
}

#[tokio::test]
async fn what_a_killed_process_had_answered_is_replayed() {
    let file = SqliteFile::new();
    let spec = Spec::sqlite(SERVICE, &file.url());
    let mut dies = spec.start().await;
    let first = order(&dies, "k").await;
    assert_eq!(first.code(), 201, "{first:?}");
    dies.kill().await;
    let next = spec.start().await;
    assert_replays(&order(&next, "k").await, first.text());
    assert_eq!(next.count("ran "), 0);
}

#[tokio::test]
async fn a_process_that_stopped_past_its_lease_changes_nothing() {
    let file = SqliteFile::new();
    let spec = Spec::sqlite(SERVICE, &file.url()).lease(Duration::from_millis(600));
    let mut stopped = spec.clone().held().start().await;
    let other = spec.wait(Duration::from_secs(20)).start().await;
    let late = stopped.post("/orders").key("k").start();
    stopped.until("ran k", 1).await;
    stopped.pause();

    // It waits until the lease is over, and runs.
    let second = order(&other, "k").await;
    assert_eq!(second.code(), 201, "{second:?}");

    stopped.go_on().await;
    stopped.resume();
    let late = late.await.expect("no panic");
    assert_eq!(late.code(), 201, "its own client gets its own answer");
    assert_ne!(late.text(), second.text());
    stopped.until("event lost", 1).await;
    for process in [&stopped, &other] {
        assert_replays(&order(process, "k").await, second.text());
    }
    assert_eq!(stopped.count("ran k") + other.count("ran k"), 2);
}
