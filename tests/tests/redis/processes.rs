//! Several processes behind one Redis, which are killed and stopped.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use idempotency_tests::redis::{Redis, Spec, assert_fifty_of_two_thousand_run};

use super::{SERVICE, assert_replays, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_requests_at_four_processes_are_fifty_executions() {
    let redis = Redis::start();
    let spec = Spec::new(SERVICE, &redis.url()).wait(Duration::from_secs(20));
    assert_fifty_of_two_thousand_run(&spec).await;
}

#[tokio::test]
async fn what_a_killed_process_held_is_free_when_its_lease_is_over() {
    const LEASE: Duration = Duration::from_secs(4);

    let redis = Redis::start();
    let spec = Spec::new(SERVICE, &redis.url())
        .lease(LEASE)
        .wait(Duration::ZERO);
    let mut dies = spec.clone().held().start().await;
    let others = [spec.start().await, spec.start().await];
    let lost = tokio::spawn(dies.post("/orders").key("k").try_send());
    dies.until("ran k", 1).await;
    dies.kill().await;
    let killed = Instant::now();
    assert!(
        lost.await.expect("no panic").is_err(),
        "an answer of a dead process"
    );

    let refused = others[0].post("/orders").key("k").send().await;
    assert_eq!(refused.code(), 423, "{refused:?}");
    let first = until(async || {
        let duplicates = others
            .iter()
            .map(|other| other.post("/orders").key("k").send());
        let answers = join_all(duplicates).await;
        let done = answers.iter().find(|answer| answer.code() == 201).cloned();
        if done.is_none() {
            assert!(
                answers.iter().all(|answer| answer.code() == 423),
                "{answers:?}"
            );
            assert!(
                // The default would be 30 s.
                killed.elapsed() < LEASE + Duration::from_secs(20),
                "still refused"
            );
        }
        done
    });
    let first = first.await;
    for other in &others {
        assert_replays(&other.post("/orders").key("k").send().await, first.text());
    }
    assert_eq!(
        others
            .iter()
            .map(|other| other.count("ran k"))
            .sum::<usize>(),
        1
    );
}

#[tokio::test]
async fn a_process_that_stopped_past_its_lease_changes_nothing() {
    let redis = Redis::start();
    let spec = Spec::new(SERVICE, &redis.url()).lease(Duration::from_millis(600));
    let mut stopped = spec.clone().held().start().await;
    let other = spec.wait(Duration::from_secs(20)).start().await;
    let late = stopped.post("/orders").key("k").start();
    stopped.until("ran k", 1).await;
    stopped.pause();

    // It waits until the lease is over, and runs.
    let second = other.post("/orders").key("k").send().await;
    assert_eq!(second.code(), 201, "{second:?}");
    assert_eq!(other.count("ran k"), 1);

    stopped.go_on().await;
    stopped.resume();
    let late = late.await.expect("no panic");
    assert_eq!(late.code(), 201, "its own client gets its own answer");
    assert_ne!(late.text(), second.text());
    stopped.until("event lost", 1).await;
    assert_eq!(stopped.count("event completed"), 0);
    for process in [&stopped, &other] {
        assert_replays(
            &process.post("/orders").key("k").send().await,
            second.text(),
        );
    }
    assert_eq!(stopped.count("ran k") + other.count("ran k"), 2);
}
