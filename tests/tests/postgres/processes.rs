//! Several processes behind one PostgreSQL.

use std::{collections::HashMap, time::Duration};

use futures_util::future::join_all;
use idempotency_tests::{postgres::Postgres, redis::Spec};

use super::{SERVICE, assert_replays};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_requests_at_four_processes_are_fifty_executions() {
    let postgres = Postgres::start();
    drop(postgres.storage().await);
    let spec = Spec::postgres(SERVICE, &postgres.url()).wait(Duration::from_secs(60));
    let processes = join_all((0..4).map(|_| spec.start())).await;

    let requests = (0..2_000).map(|n| {
        let (process, key) = (&processes[n % 4], format!("key-{}", n / 4 % 50));
        async move {
            let answer = process.post("/orders").key(&key).send().await;
            (key, answer)
        }
    });
    let mut firsts = HashMap::new();
    let mut replays = Vec::new();
    for (key, answer) in join_all(requests).await {
        match answer.code() {
            201 => assert!(
                firsts.insert(key, answer.text().to_owned()).is_none(),
                "{answer:?}"
            ),
            _ => replays.push((key, answer)),
        }
    }
    assert_eq!(firsts.len(), 50);
    assert_eq!(replays.len(), 1_950);
    for (key, answer) in &replays {
        assert_replays(answer, &firsts[key]);
    }
    let runs: usize = processes.iter().map(|process| process.count("ran ")).sum();
    assert_eq!(runs, 50);
}

#[tokio::test]
async fn what_a_killed_process_held_is_free_when_its_lease_is_over() {
    let postgres = Postgres::start();
    drop(postgres.storage().await);
    let spec = Spec::postgres(SERVICE, &postgres.url()).lease(Duration::from_secs(2));
    let mut dies = spec.clone().held().start().await;
    let other = spec.wait(Duration::from_secs(60)).start().await;
    let lost = tokio::spawn(dies.post("/orders").key("k").try_send());
    dies.until("ran k", 1).await;
    let duplicate = other.post("/orders").key("k").start();
    other.until("event waiting", 1).await;
    dies.kill().await;
    assert!(lost.await.unwrap().is_err(), "an answer of a dead process");
    let first = duplicate.await.unwrap();
    assert_eq!(first.code(), 201, "{first:?}");
    assert_eq!(other.count("ran k"), 1);
}
