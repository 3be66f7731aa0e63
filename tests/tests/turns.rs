//! Conflicts that the caller answers itself: turns, one at a time, and what they put in the place of the record.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use idempotency_axum::{
    Claim, Completion, Decision, Encoded, Engine, Entry, LockPolicy, OnStorageError, Operation,
    Outcome, Progress, Record, Refusal, Storage, TombstoneReason,
};
use idempotency_tests::{
    Fault,
    node::{
        LEASE, Node, answer, assert_replays, claim_of, idle, operation, poll_times, printed, record,
    },
};
use tokio::task::JoinHandle;

async fn manual(engine: &Engine, encoded: &Encoded) -> Decision {
    engine.begin_manual(encoded, &Progress::new()).await
}

/// A `begin_manual` in a task of its own.
fn ask(engine: &Engine, encoded: Encoded) -> JoinHandle<Decision> {
    let engine = engine.clone();
    tokio::spawn(async move { manual(&engine, &encoded).await })
}

#[track_caller]
fn turn_of(decision: Decision) -> Claim {
    match decision {
        Decision::Execute(claim) if claim.previous().is_some() => claim,
        other => panic!("expected a turn: {other:?}"),
    }
}

#[track_caller]
fn previous(turn: &Claim) -> &Record {
    turn.previous().expect("a turn knows the record")
}

/// The claim of an operation that has no record.
#[track_caller]
fn first_of(decision: Decision) -> Claim {
    match decision {
        Decision::Execute(claim) if claim.previous().is_none() => claim,
        other => panic!("expected a first run: {other:?}"),
    }
}

#[track_caller]
fn manual_refusal_of(decision: Decision) -> Refusal {
    match decision {
        Decision::Refuse(refused) => refused.refusal,
        other => panic!("expected a refusal: {other:?}"),
    }
}

/// The operation ran, and answered with `text`.
async fn ran(engine: &Engine, encoded: &Encoded, text: &'static str) {
    let claim = first_of(manual(engine, encoded).await);
    assert_eq!(claim.complete(answer(text)).await, Completion::Stored);
}

#[tokio::test(start_paused = true)]
async fn a_turn_has_what_the_last_one_left() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;

    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(turn.key(), key.key);
    assert_eq!(*previous(&turn), record("one"));
    assert_eq!(turn.complete(answer("two")).await, Completion::Stored);

    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(*previous(&turn), record("two"));
    turn.release().await;
    assert_replays(node.engine.begin(&key).await, "two");
    assert_eq!(node.events.count("conflict"), 2);
    assert_eq!(node.events.count("replaced"), 1);
    assert_eq!(node.events.count("replayed"), 1);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_dropped_turn_keeps_the_record_and_lets_the_next_one_in() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    drop(turn_of(manual(&node.engine, &key).await));
    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(*previous(&turn), record("one"));
    turn.release().await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_new_record_has_a_ttl_of_its_own() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    node.clock.advance(Duration::from_secs(3600));
    let turn = turn_of(manual(&node.engine, &key).await);
    let ttl = Duration::from_secs(60);
    let _ = turn.ttl(ttl).complete(answer("two")).await;
    node.clock.advance(ttl - Duration::from_millis(1));
    assert_replays(node.engine.begin(&key).await, "two");
    node.clock.advance(Duration::from_millis(1));
    claim_of(node.engine.begin(&key).await).release().await;
}

#[tokio::test(start_paused = true)]
async fn turns_are_taken_one_at_a_time_here_and_elsewhere() {
    let node = Node::new();
    let peer = node.peer();
    let key = operation(1);
    ran(&node.engine, &key, "0").await;

    let running = Arc::new(AtomicUsize::new(0));
    let texts: Vec<&'static str> = (0..=20).map(|n| &*n.to_string().leak()).collect();
    let mut runs = Vec::new();
    for n in 0..20 {
        let engine = if n % 2 == 0 { &node.engine } else { &peer };
        let (engine, running, texts) = (engine.clone(), running.clone(), texts.clone());
        runs.push(tokio::spawn(async move {
            let turn = turn_of(manual(&engine, &key).await);
            assert_eq!(running.fetch_add(1, Ordering::SeqCst), 0, "two at once");
            let Outcome::Response(last) = &previous(&turn).outcome else {
                panic!("there is an answer");
            };
            let last: usize = std::str::from_utf8(last.body()).unwrap().parse().unwrap();
            tokio::task::yield_now().await;
            running.fetch_sub(1, Ordering::SeqCst);
            let _ = turn.complete(answer(texts[last + 1])).await;
        }));
    }
    for run in runs {
        // A node that waits for a turn elsewhere is told by its storage.
        run.await.unwrap();
    }
    assert_replays(node.engine.begin(&key).await, "20");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_turn_is_waited_for_longer_than_an_original() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    let turn = turn_of(manual(&node.engine, &key).await);
    let next = ask(&node.engine, key);
    node.pass(LEASE * 4).await;
    assert_eq!(node.engine.waiting(), 1);
    turn.release().await;
    turn_of(next.await.unwrap()).release().await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_turn_is_waited_for_as_long_as_one_may_be_held() {
    let max_hold = LEASE * 2;
    let node = Node::with(|config| config.lock(LockPolicy::default().max_hold(max_hold)));
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    let turn = turn_of(manual(&node.engine, &key).await);
    let next = ask(&node.engine, key);
    node.pass(max_hold + LEASE).await;
    assert_eq!(manual_refusal_of(next.await.unwrap()), Refusal::InFlight);

    // While the first run goes on no other begins, and what it answers late is not stored.
    node.pass(LEASE * 4).await;
    let refused = manual_refusal_of(manual(&node.engine, &key).await);
    assert_eq!(refused, Refusal::InFlight);
    assert_eq!(turn.complete(answer("late")).await, Completion::Lost);
    node.pass(LEASE * 2).await;
    let next = turn_of(manual(&node.engine, &key).await);
    assert_eq!(next.complete(answer("two")).await, Completion::Stored);
    assert_replays(node.engine.begin(&key).await, "two");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_turn_that_another_node_took_over_changes_nothing() {
    let node = Node::new();
    let peer = node.peer();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    let stopped = turn_of(manual(&node.engine, &key).await);
    // This process is stopped for longer than its lease; the other goes on.
    node.clock.advance(LEASE * 2);
    let turn = turn_of(manual(&peer, &key).await);
    assert_eq!(turn.complete(answer("two")).await, Completion::Stored);

    assert_eq!(stopped.complete(answer("late")).await, Completion::Lost);
    // What it would have stored, and then its turn.
    assert_eq!(node.events.count("lost"), 2);
    assert_replays(peer.begin(&key).await, "two");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_turn_at_a_tombstone_can_put_an_answer_there() {
    let node = Node::new();
    let key = operation(1);
    let claim = claim_of(node.engine.begin(&key).await);
    let _ = claim.tombstone(TombstoneReason::StreamBroken).await;
    let turn = turn_of(manual(&node.engine, &key).await);
    let tombstone = Outcome::Tombstone(TombstoneReason::StreamBroken);
    assert_eq!(previous(&turn).outcome, tombstone);
    let _ = turn.complete(answer("one")).await;
    assert_replays(node.engine.begin(&key).await, "one");
}

#[tokio::test(start_paused = true)]
async fn another_request_is_refused_before_it_waits_for_a_turn() {
    let node = Node::new();
    ran(&node.engine, &printed(1, 1), "one").await;
    let turn = turn_of(manual(&node.engine, &printed(1, 1)).await);
    let refused = manual_refusal_of(manual(&node.engine, &printed(1, 2)).await);
    assert_eq!(refused, Refusal::KeyReused);
    let _ = turn.complete(answer("two")).await;
    let still = manual_refusal_of(manual(&node.engine, &printed(1, 2)).await);
    assert_eq!(still, Refusal::KeyReused);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_record_that_goes_while_its_turn_is_waited_for_lets_the_operation_run() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    let turn = turn_of(manual(&node.engine, &key).await);
    let next = ask(&node.engine, key);
    idle().await;
    assert!(node.engine.remove(&key.key).await.unwrap());
    // There is nothing to replace any more.
    let _ = turn.complete(answer("two")).await;
    let claim = first_of(next.await.unwrap());
    let _ = claim.complete(answer("three")).await;
    assert_replays(node.engine.begin(&key).await, "three");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn drain_waits_for_a_turn() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(node.engine.running(), 1);
    let engine = node.engine.clone();
    let drained = tokio::spawn(async move { engine.drain().await });
    idle().await;
    assert!(!drained.is_finished());
    turn.release().await;
    drained.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn progress_tells_when_a_turn_may_be_there() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    let first = turn_of(manual(&node.engine, &key).await);
    let progress = Progress::new();
    let mut next = std::pin::pin!(node.engine.begin_manual(&key, &progress));
    assert!(poll_times(next.as_mut(), 20).await.is_none());
    assert!(!progress.is_committed(), "it waits");
    first.release().await;
    let turn = turn_of(next.await);
    assert!(progress.is_committed());
    turn.release().await;
}

#[tokio::test(start_paused = true)]
async fn a_begin_for_a_turn_that_is_dropped_at_any_point_leaves_nothing() {
    for polls in 0..12 {
        let node = Node::new();
        let key = operation(1);
        ran(&node.engine, &key, "one").await;
        {
            let progress = Progress::new();
            let mut begin = std::pin::pin!(node.engine.begin_manual(&key, &progress));
            if let Some(decision) = poll_times(begin.as_mut(), polls).await {
                drop(turn_of(decision));
            }
        }
        idle().await;
        turn_of(manual(&node.engine, &key).await).release().await;
        node.assert_quiet().await;
    }
}

// ---- A storage that fails ----

#[tokio::test(start_paused = true)]
async fn a_record_that_is_still_to_be_stored_can_be_replaced() {
    let node = Node::new();
    let key = operation(1);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    let claim = claim_of(node.engine.begin(&key).await);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);

    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(*previous(&turn), record("one"));
    assert_eq!(turn.complete(answer("two")).await, Completion::Stored);
    assert_replays(node.engine.begin(&key).await, "two");

    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    let stored = node.memory.get(&key.key).await.unwrap();
    assert!(matches!(stored, Some(Entry::Completed(stored)) if stored == record("two")));
    node.assert_quiet().await;
}

/// The storage took the first answer and did not say so: it keeps that one, whatever else it is told to complete.
#[tokio::test(start_paused = true)]
async fn a_record_that_was_stored_unnoticed_is_replaced_all_the_same() {
    let node = Node::new();
    let key = operation(1);
    node.storage.set(Operation::Complete, Fault::FailAfter);
    let claim = claim_of(node.engine.begin(&key).await);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    let turn = turn_of(manual(&node.engine, &key).await);
    let _ = turn.complete(answer("two")).await;

    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    node.assert_quiet().await;
    let stored = node.memory.get(&key.key).await.unwrap();
    assert!(matches!(stored, Some(Entry::Completed(stored)) if stored == record("two")));
}

/// The keeper is just storing the first answer while it is replaced.
#[tokio::test(start_paused = true)]
async fn a_record_that_is_replaced_while_it_is_stored_is_replaced() {
    let node = Node::new();
    let key = operation(1);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    let claim = claim_of(node.engine.begin(&key).await);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    let turn = turn_of(manual(&node.engine, &key).await);

    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    node.storage
        .set(Operation::Complete, Fault::Gate(gate.clone()));
    let before = node.storage.calls(Operation::Complete);
    node.clock.advance(Duration::from_millis(200));
    idle().await;
    assert_eq!(node.storage.calls(Operation::Complete), before + 1);
    let _ = turn.complete(answer("two")).await;
    gate.add_permits(100);

    node.pass(LEASE).await;
    node.assert_quiet().await;
    let stored = node.memory.get(&key.key).await.unwrap();
    assert!(matches!(stored, Some(Entry::Completed(stored)) if stored == record("two")));
}

#[tokio::test(start_paused = true)]
async fn a_replacement_that_fails_is_said_and_keeps_the_record() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    node.storage.set(Operation::Replace, Fault::FailBefore);
    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(turn.complete(answer("two")).await, Completion::Kept);
    assert_eq!(node.events.count("storage_failed"), 1);
    assert_replays(node.engine.begin(&key).await, "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_fails_gives_no_turn() {
    let node = Node::new();
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    node.storage.set(Operation::Get, Fault::FailBefore);
    let refused = manual_refusal_of(manual(&node.engine, &key).await);
    assert_eq!(refused, Refusal::StorageUnavailable);
    node.storage.heal(Operation::Get);
    turn_of(manual(&node.engine, &key).await).release().await;
    node.assert_quiet().await;
}

/// Whoever prefers to run unprotected is still told what is known: that the operation ran before.
#[tokio::test(start_paused = true)]
async fn without_protection_a_conflict_is_still_one() {
    let node = Node::with(|config| config.on_storage_error(OnStorageError::RunUnprotected));
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    node.storage.set(Operation::Get, Fault::FailBefore);
    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(*previous(&turn), record("one"));
    let _ = turn.complete(answer("two")).await;
    assert_replays(node.engine.begin(&key).await, "two");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn without_locks_turns_are_not_waited_for() {
    let node = Node::with(|config| config.lock(LockPolicy::disabled()));
    let key = operation(1);
    ran(&node.engine, &key, "one").await;
    let one = turn_of(manual(&node.engine, &key).await);
    let two = turn_of(manual(&node.engine, &key).await);
    assert_eq!(one.complete(answer("two")).await, Completion::Stored);
    assert_eq!(two.complete(answer("three")).await, Completion::Stored);
    assert_replays(node.engine.begin(&key).await, "three");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_replaced_tombstone_is_shown_where_its_operation_still_runs() {
    let max_hold = LEASE * 2;
    let node = Node::with(|config| config.lock(LockPolicy::default().max_hold(max_hold)));
    let peer = node.peer();
    let key = operation(1);
    let hung = claim_of(node.engine.begin(&key).await);
    node.pass(max_hold).await;
    let turn = turn_of(manual(&peer, &key).await);
    assert_eq!(turn.complete(answer("two")).await, Completion::Stored);

    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(previous(&turn), &record("two"));
    turn.release().await;
    // The tombstone is refreshed while the operation runs, and does not come back.
    node.pass(LEASE).await;
    let turn = turn_of(manual(&node.engine, &key).await);
    assert_eq!(previous(&turn), &record("two"));
    turn.release().await;
    drop(hung);
    node.assert_quiet().await;
}
