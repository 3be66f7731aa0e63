//! The engine without HTTP: every end of a claim, every way to wait, every fault of a storage, and what races between them.
//!
//! All tests here run on one thread, with tokio's clock paused and the engine on a simulated one. So [`idle`] returns once
//! nothing is left to do, however many steps that takes, and no outcome depends on how fast the machine is.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::{
    collections::HashSet,
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use idempotency_axum::{
    Completion, Decision, EncodedKey, Engine, Entry, Env, Event, Held, LockPolicy, MemoryStorage,
    OnStorageError, OnUnreadable, Operation, Outcome, Progress, Refusal, Storage, StorageError,
    StorageErrorKind, Token, TombstoneReason,
};
use idempotency_tests::{
    Events, Fault, FaultyStorage, Gate, Hook, Hooked, Moment, StorageCall, Waits,
    node::{
        LEASE, Node, WAIT, answer, assert_replays, begin, claim_of, config, idle, operation, pass,
        poll_times, printed, record, refusal_of, replay_of,
    },
};
use tokio::task::JoinHandle;

const MAX_HOLD: Duration = Duration::from_secs(600);
const TTL: Duration = Duration::from_secs(24 * 3600);
const STORAGE_TIMEOUT: Duration = Duration::from_secs(1);

// ---- The ends of a claim ----

#[tokio::test(start_paused = true)]
async fn a_completed_operation_is_replayed_until_its_ttl_is_over() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    assert_eq!(claim.key(), operation(1).key);
    assert_eq!(node.engine.running(), 1);
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_eq!(node.engine.running(), 0);

    let replay = replay_of(node.engine.begin(&operation(1)).await);
    assert_eq!(replay.record, record("one"));
    assert_eq!(replay.waited, Duration::ZERO);
    assert_eq!(
        node.engine.get(&operation(1).key).await.unwrap(),
        Some(Entry::Completed(record("one")))
    );
    assert_replays(node.peer().begin(&operation(1)).await, "one");

    node.clock.advance(TTL - Duration::from_millis(1));
    assert_replays(node.engine.begin(&operation(1)).await, "one");
    node.clock.advance(Duration::from_millis(1));
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_has_its_own_ttl() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await).ttl(Duration::from_secs(5));
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    node.clock.advance(Duration::from_secs(5));
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_tombstone_is_replayed_as_one() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let completion = claim.tombstone(TombstoneReason::StreamBroken).await;
    assert_eq!(completion, Completion::Stored);
    for engine in [&node.engine, &node.peer()] {
        let replay = replay_of(engine.begin(&operation(1)).await);
        let tombstone = Outcome::Tombstone(TombstoneReason::StreamBroken);
        assert_eq!(replay.record.outcome, tombstone);
    }
    assert_eq!(node.events.count("tombstoned"), 1);
    assert_eq!(node.events.count("completed"), 0);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_released_key_is_free_at_once() {
    let node = Node::new();
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
    assert_eq!(node.memory.claims(), 0);
    claim_of(node.peer().begin(&operation(1)).await)
        .release()
        .await;
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
    assert_eq!(node.events.count("released"), 2);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_dropped_claim_is_released_and_drain_waits_for_that() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    drop(claim);
    node.engine.drain().await;
    assert_eq!(node.memory.claims(), 0);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn drain_waits_for_what_runs_and_not_for_more() {
    let node = Node::new();
    node.engine.drain().await;
    let one = claim_of(node.engine.begin(&operation(1)).await);
    let two = claim_of(node.engine.begin(&operation(2)).await);
    let engine = node.engine.clone();
    let drain = tokio::spawn(async move { engine.drain().await });
    idle().await;
    assert!(!drain.is_finished());
    assert_eq!(one.complete(answer("one")).await, Completion::Stored);
    idle().await;
    assert!(!drain.is_finished());
    two.release().await;
    drain.await.unwrap();
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_may_be_dropped_on_a_thread_without_a_runtime() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    std::thread::spawn(move || drop(claim)).join().unwrap();
    node.engine.drain().await;
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
    node.assert_quiet().await;
}

#[test]
fn a_claim_that_outlives_its_runtime_is_released_on_the_next() {
    let (env, _) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let engine = Engine::new(memory.clone(), config(&env));
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
    };
    let first = runtime();
    let claim = first.block_on(async { claim_of(engine.begin(&operation(1)).await) });
    drop(first);
    drop(claim);
    assert_eq!(engine.running(), 0);

    assert_eq!(memory.claims(), 1);
    runtime().block_on(engine.drain());
    assert_eq!(memory.claims(), 0);
}

#[test]
fn a_runtime_may_end_in_the_midst_of_everything() {
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let storage = FaultyStorage::new(memory.clone());
    let engine = Engine::new(storage.clone(), config(&env));
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap()
    };

    let first = runtime();
    first.block_on(async {
        // One that runs, one that waits for it, one whose outcome is being stored, one that is being released, one whose
        // outcome is left to the keeper, and one that is just being claimed.
        let run = |n| {
            let engine = engine.clone();
            tokio::spawn(async move {
                let _claim = claim_of(engine.begin(&operation(n)).await);
                std::future::pending::<()>().await;
            })
        };
        run(1);
        idle().await;
        begin(&engine, operation(1));
        let storing = claim_of(engine.begin(&operation(2)).await);
        let released = claim_of(engine.begin(&operation(3)).await);
        let deferred = claim_of(engine.begin(&operation(4)).await);
        storage.set(Operation::Complete, Fault::FailBefore);
        assert_eq!(
            deferred.complete(answer("four")).await,
            Completion::Deferred
        );
        storage.set(Operation::Complete, Fault::Hang);
        storage.set(Operation::Release, Fault::Hang);
        storage.set(Operation::Begin, Fault::Hang);
        tokio::spawn(storing.complete(answer("two")));
        tokio::spawn(released.release());
        run(5);
        idle().await;
    });
    drop(first);

    for operation in [Operation::Begin, Operation::Complete, Operation::Release] {
        storage.heal(operation);
    }
    runtime().block_on(async {
        // The claims of the first runtime end with their leases. What was to be stored is stored: the next claim wakes a keeper.
        pass(&clock, LEASE).await;
        for n in [1, 3, 5, 6] {
            claim_of(engine.begin(&operation(n)).await).release().await;
        }
        for (n, text) in [(2, "two"), (4, "four")] {
            assert_replays(engine.begin(&operation(n)).await, text);
        }
        pass(&clock, LEASE).await;
        engine.drain().await;
        assert_eq!((engine.running(), engine.waiting()), (0, 0));
        assert_eq!((memory.claims(), memory.waiters()), (0, 0));
        let peer = Engine::new(memory.clone(), config(&env));
        for (n, text) in [(2, "two"), (4, "four")] {
            assert_replays(peer.begin(&operation(n)).await, text);
        }
    });
}

// ---- Waiting ----

#[tokio::test(start_paused = true)]
async fn a_duplicate_is_woken_by_the_answer_here_and_elsewhere() {
    let node = Node::new();
    let peer = node.peer();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let here: Vec<_> = (0..10).map(|_| begin(&node.engine, operation(1))).collect();
    let elsewhere: Vec<_> = (0..10).map(|_| begin(&peer, operation(1))).collect();
    idle().await;
    assert_eq!((node.engine.waiting(), peer.waiting()), (10, 10));
    node.clock.advance(Duration::from_secs(3));
    idle().await;
    assert_eq!((node.engine.waiting(), peer.waiting()), (10, 10));

    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    for duplicate in here.into_iter().chain(elsewhere) {
        // The clock stands still: nobody polls for this.
        let replay = replay_of(duplicate.await.unwrap());
        assert_eq!(replay.record, record("one"));
        assert_eq!(replay.waited, Duration::from_secs(3));
    }
    // Those here never asked the storage: they were handed what this process has just stored.
    assert_eq!(node.storage.calls(Operation::Begin), 1);
    assert_eq!(node.storage.calls(Operation::Wait), 0);
    assert_eq!(node.storage.calls(Operation::Get), 0);
    assert_eq!((node.engine.waiting(), peer.waiting()), (0, 0));
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_is_refused_when_its_time_is_over() {
    let node = Node::new();
    let peer = node.peer();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let here = begin(&node.engine, operation(1));
    let elsewhere = begin(&peer, operation(1));
    node.pass(WAIT - Duration::from_millis(1)).await;
    assert!(!here.is_finished() && !elsewhere.is_finished());
    node.pass(Duration::from_millis(1)).await;
    for duplicate in [here, elsewhere] {
        let refused = refusal_of(duplicate.await.unwrap());
        assert_eq!(refused.refusal, Refusal::InFlight);
    }
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_that_may_not_wait_is_refused_at_once() {
    let node = Node::with(|config| config.lock(LockPolicy::default().timeout(Duration::ZERO)));
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let refused = refusal_of(node.engine.begin(&operation(1)).await);
    assert_eq!(refused.refusal, Refusal::InFlight);
    claim.release().await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn another_request_under_the_key_is_refused_at_once() {
    let node = Node::new();
    let peer = node.peer();
    let claim = claim_of(node.engine.begin(&printed(1, 1)).await);
    for engine in [&node.engine, &peer] {
        let refused = refusal_of(engine.begin(&printed(1, 2)).await);
        assert_eq!(refused.refusal, Refusal::KeyReused);
    }
    // Also while its outcome is in this process only.
    node.storage.set(Operation::Complete, Fault::FailBefore);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    let refused = refusal_of(node.engine.begin(&printed(1, 2)).await);
    assert_eq!(refused.refusal, Refusal::KeyReused);
    let _ = replay_of(node.engine.begin(&printed(1, 1)).await);

    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    for engine in [&node.engine, &peer] {
        let refused = refusal_of(engine.begin(&printed(1, 2)).await);
        assert_eq!(refused.refusal, Refusal::KeyReused);
        let _ = replay_of(engine.begin(&printed(1, 1)).await);
    }
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_release_lets_one_duplicate_run() {
    let node = Node::new();
    let peer = node.peer();
    let mut claim = claim_of(node.engine.begin(&operation(1)).await);
    let mut duplicates: Vec<_> = (0..3)
        .flat_map(|_| {
            [
                begin(&node.engine, operation(1)),
                begin(&peer, operation(1)),
            ]
        })
        .collect();
    idle().await;
    while !duplicates.is_empty() {
        claim.release().await;
        idle().await;
        let (done, left): (Vec<_>, Vec<_>) =
            duplicates.into_iter().partition(JoinHandle::is_finished);
        assert_eq!(done.len(), 1, "{} left", left.len());
        duplicates = left;
        let mut decisions = Vec::new();
        for one in done {
            decisions.push(one.await.unwrap());
        }
        claim = claim_of(decisions.remove(0));
    }
    claim.release().await;
    peer.drain().await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_that_leaves_passes_its_wake_on() {
    for remote in [false, true] {
        let node = Node::new();
        let peer = node.peer();
        let waits_at = if remote { &peer } else { &node.engine };
        let claim = claim_of(node.engine.begin(&operation(1)).await);
        let encoded = operation(1);
        let mut first = Box::pin(waits_at.begin(&encoded));
        assert!(poll_times(first.as_mut(), 3).await.is_none());
        let second = begin(waits_at, operation(1));
        idle().await;
        claim.release().await;
        // It is woken and never polled again.
        drop(first);
        idle().await;
        assert!(second.is_finished(), "remote: {remote}");
        claim_of(second.await.unwrap()).release().await;
        peer.drain().await;
        node.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_that_leaves_while_it_claims_passes_its_wake_on() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let encoded = operation(1);
    let mut first = Box::pin(node.engine.begin(&encoded));
    assert!(poll_times(first.as_mut(), 3).await.is_none());
    let second = begin(&node.engine, operation(1));
    idle().await;
    node.storage.set(Operation::Begin, Fault::Hang);
    claim.release().await;
    assert!(poll_times(first.as_mut(), 3).await.is_none());
    assert_eq!(node.storage.calls(Operation::Begin), 2);
    node.storage.heal(Operation::Begin);
    drop(first);
    idle().await;
    assert!(second.is_finished());
    claim_of(second.await.unwrap()).release().await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_that_is_refused_passes_its_wake_on() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let duplicates: Vec<_> = (0..3).map(|_| begin(&node.engine, operation(1))).collect();
    idle().await;
    node.storage.set(Operation::Begin, Fault::FailBefore);
    claim.release().await;
    // None of them needs its time out to learn that.
    for duplicate in duplicates {
        let refused = refusal_of(duplicate.await.unwrap());
        assert_eq!(refused.refusal, Refusal::StorageUnavailable);
    }
    node.storage.heal(Operation::Begin);
    node.pass(Duration::from_secs(5)).await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn who_waits_here_hears_of_an_answer_elsewhere() {
    // The one that a release woke found that another node was faster, and left. The rest waits for that node now.
    let node = Node::new();
    let peer = node.peer();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let leaves = begin(&node.engine, operation(1));
    idle().await;
    let stays = begin(&node.engine, operation(1));
    idle().await;
    claim.release().await;
    let elsewhere = claim_of(peer.begin(&operation(1)).await);
    idle().await;
    leaves.abort();
    idle().await;
    assert_eq!(node.engine.waiting(), 1);
    assert_eq!(elsewhere.complete(answer("one")).await, Completion::Stored);
    idle().await;
    // The clock stands still: it need not wait its time out.
    assert!(stays.is_finished(), "the answer is there, and nobody told");
    assert_replays(stays.await.unwrap(), "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_wait_that_fails_does_not_become_a_storm() {
    let begins = Arc::new(AtomicUsize::new(0));
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let counted = {
        let begins = begins.clone();
        Hooked::waits(memory.clone(), move |operation, moment| {
            if (operation, moment) == (Operation::Begin, Moment::Before) {
                let begins = begins.fetch_add(1, Ordering::SeqCst);
                assert!(begins < 2000, "one duplicate asked for its key 2000 times");
            }
            Box::pin(async {})
        })
    };
    let storage = FaultyStorage::new(counted);
    storage.set(Operation::Wait, Fault::FailBefore);
    let peer = Engine::new(storage, config(&env));
    let engine = Engine::new(memory.clone(), config(&env));

    let claim = claim_of(engine.begin(&operation(1)).await);
    let duplicate = begin(&peer, operation(1));
    pass(&clock, WAIT / 2).await;
    assert!(!duplicate.is_finished());
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    pass(&clock, WAIT / 2).await;
    assert_replays(duplicate.await.unwrap(), "one");
}

#[tokio::test(start_paused = true)]
async fn limits_refuse_what_would_run_and_wait() {
    let node = Node::with(|config| config.max_running(2).max_waiting(1));
    let one = claim_of(node.engine.begin(&operation(1)).await);
    assert_eq!(one.complete(answer("one")).await, Completion::Stored);

    let two = claim_of(node.engine.begin(&operation(2)).await);
    let three = claim_of(node.engine.begin(&operation(3)).await);
    let refused = refusal_of(node.engine.begin(&operation(4)).await);
    assert_eq!(refused.refusal, Refusal::Overloaded);
    assert_eq!(node.memory.claims(), 2);
    // A retry needs no place.
    assert_replays(node.engine.begin(&operation(1)).await, "one");

    let waits = begin(&node.engine, operation(2));
    idle().await;
    for n in [2, 3] {
        let refused = refusal_of(node.engine.begin(&operation(n)).await);
        assert_eq!(refused.refusal, Refusal::Overloaded);
    }
    assert_eq!(two.complete(answer("two")).await, Completion::Stored);
    assert_replays(waits.await.unwrap(), "two");

    // Both places are free again.
    let four = claim_of(node.engine.begin(&operation(4)).await);
    let waits = begin(&node.engine, operation(4));
    idle().await;
    assert_eq!(node.engine.waiting(), 1);
    waits.abort();
    idle().await;
    assert_eq!(node.engine.waiting(), 0);
    drop(four);
    three.release().await;
    node.assert_quiet().await;
}

// ---- Storages that fail ----

#[tokio::test(start_paused = true)]
async fn a_begin_that_fails_runs_nothing_and_leaves_nothing() {
    for (fault, kind) in [
        (Fault::FailBefore, StorageErrorKind::Unavailable),
        (Fault::FailAfter, StorageErrorKind::Unavailable),
        (Fault::Unreadable, StorageErrorKind::Unreadable),
        (Fault::Hang, StorageErrorKind::Timeout),
    ] {
        let node = Node::new();
        node.storage.set(Operation::Begin, fault.clone());
        let first = begin(&node.engine, operation(1));
        idle().await;
        assert_eq!(first.is_finished(), kind != StorageErrorKind::Timeout);
        node.clock.advance(STORAGE_TIMEOUT);
        let refused = refusal_of(first.await.unwrap());
        assert_eq!(refused.refusal, Refusal::StorageUnavailable, "{fault:?}");
        assert_eq!(refused.error.map(|error| error.kind()), Some(kind));
        assert_eq!(node.events.count("executing"), 0);

        node.storage.heal(Operation::Begin);
        idle().await;
        claim_of(node.engine.begin(&operation(1)).await)
            .release()
            .await;
        node.assert_quiet().await;
        // Nobody had the key, so nobody lost it.
        assert_eq!(node.events.count("lost"), 0, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_fails_may_be_configured_to_protect_nothing() {
    for fault in [Fault::FailBefore, Fault::FailAfter, Fault::Hang] {
        let node = Node::with(|config| config.on_storage_error(OnStorageError::RunUnprotected));
        node.storage.set(Operation::Begin, fault);
        let first = begin(&node.engine, operation(1));
        idle().await;
        node.clock.advance(STORAGE_TIMEOUT);
        let decision = first.await.unwrap();
        assert!(matches!(decision, Decision::Unprotected), "{decision:?}");
        assert_eq!(node.events.count("unprotected"), 1);
        node.storage.heal(Operation::Begin);
        idle().await;
        node.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_complete_that_fails_is_answered_from_here_until_it_is_stored() {
    for fault in [
        Fault::FailBefore,
        Fault::FailAfter,
        Fault::Unreadable,
        Fault::Hang,
    ] {
        let node = Node::new();
        let claim = claim_of(node.engine.begin(&operation(1)).await);
        let waits = begin(&node.engine, operation(1));
        idle().await;
        node.storage.set(Operation::Complete, fault.clone());
        let completing = tokio::spawn(claim.complete(answer("one")));
        idle().await;
        node.clock.advance(STORAGE_TIMEOUT);
        assert_eq!(completing.await.unwrap(), Completion::Deferred, "{fault:?}");
        assert_replays(waits.await.unwrap(), "one");
        assert_eq!(node.engine.running(), 1);

        // Four leases later the claim is still there, or the record.
        node.pass(4 * LEASE).await;
        assert_replays(node.engine.begin(&operation(1)).await, "one");
        let entry = node.engine.get(&operation(1).key).await.unwrap();
        assert!(entry.is_some(), "{fault:?}");
        let engine = node.engine.clone();
        let drain = tokio::spawn(async move { engine.drain().await });
        idle().await;
        // The keeper looks first, and finds what has arrived.
        let has_arrived = matches!(fault, Fault::FailAfter);
        assert_eq!(drain.is_finished(), has_arrived, "{fault:?}");

        node.storage.heal(Operation::Complete);
        node.pass(LEASE).await;
        assert!(drain.is_finished(), "{fault:?}");
        assert_replays(node.peer().begin(&operation(1)).await, "one");
        assert_replays(node.engine.begin(&operation(1)).await, "one");
        assert_eq!(node.events.count("executing"), 1);
        assert_eq!(node.events.count("completed"), 1);
        assert_eq!(node.events.count("lost"), 0);
        node.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_tombstone_that_fails_is_stored_later_too() {
    let node = Node::new();
    node.storage.set(Operation::Complete, Fault::FailBefore);
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let completion = claim.tombstone(TombstoneReason::HandlerFailed).await;
    assert_eq!(completion, Completion::Deferred);
    let tombstone = Outcome::Tombstone(TombstoneReason::HandlerFailed);
    let replay = replay_of(node.engine.begin(&operation(1)).await);
    assert_eq!(replay.record.outcome, tombstone);
    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    let replay = replay_of(node.peer().begin(&operation(1)).await);
    assert_eq!(replay.record.outcome, tombstone);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_outcome_is_abandoned_when_its_ttl_is_over() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await).ttl(2 * LEASE);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    node.pass(2 * LEASE - Duration::from_secs(1)).await;
    assert_replays(node.engine.begin(&operation(1)).await, "one");
    assert_eq!(node.events.count("abandoned"), 0);
    node.pass(Duration::from_secs(1)).await;
    assert_eq!(node.events.count("abandoned"), 1);
    node.engine.drain().await;
    // Its claim is not renewed any more.
    node.pass(LEASE).await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_stored_late_has_no_longer_life() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await).ttl(4 * LEASE);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    node.pass(3 * LEASE).await;
    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    assert_eq!(node.events.count("completed"), 1);
    assert_eq!(node.memory.records(), 0);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_record_for_ever_can_be_stored_late() {
    let node = Node::with(|config| config.ttl(Duration::MAX));
    node.clock.advance(Duration::from_secs(1));
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    assert_replays(node.peer().begin(&operation(1)).await, "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn every_duration_may_be_the_longest() {
    let lock = LockPolicy::default()
        .timeout(Duration::MAX)
        .ttl(Duration::MAX)
        .max_hold(Duration::MAX);
    let node = Node::with(|config| {
        config
            .ttl(Duration::MAX)
            .storage_timeout(Duration::MAX)
            .lock(lock)
    });
    node.clock.advance(Duration::from_secs(1));
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let waits = begin(&node.engine, operation(1));
    idle().await;
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(waits.await.unwrap(), "one");
}

#[tokio::test(start_paused = true)]
async fn a_release_that_fails_is_tried_again_and_wakes_who_waits() {
    for fault in [Fault::FailBefore, Fault::FailAfter, Fault::Hang] {
        for drops in [false, true] {
            let node = Node::new();
            let claim = claim_of(node.engine.begin(&operation(1)).await);
            let waits = begin(&node.engine, operation(1));
            idle().await;
            node.storage.set(Operation::Release, fault.clone());
            if drops {
                drop(claim);
            } else {
                let releasing = tokio::spawn(claim.release());
                idle().await;
                node.clock.advance(STORAGE_TIMEOUT);
                releasing.await.unwrap();
            }
            idle().await;
            assert!(node.storage.calls(Operation::Release) > 0);
            assert!(!waits.is_finished());
            node.storage.heal(Operation::Release);
            node.pass(WAIT / 2).await;
            assert!(waits.is_finished(), "{fault:?}, drops: {drops}");
            claim_of(waits.await.unwrap()).release().await;
            node.assert_quiet().await;
            assert_eq!(node.events.count("lost"), 0, "{fault:?}, drops: {drops}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_that_always_fails_ends_with_the_lease() {
    let node = Node::new();
    node.storage.set(Operation::Release, Fault::FailBefore);
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
    node.pass(LEASE).await;
    node.engine.drain().await;
    assert!(node.storage.calls(Operation::Release) > 1);
    assert!(node.storage.calls(Operation::Release) < 10);
    assert_eq!(node.storage.calls(Operation::Renew), 0);
    node.storage.heal(Operation::Release);
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_renewal_that_fails_is_tried_again_before_the_lease_is_over() {
    for fault in [Fault::FailBefore, Fault::FailAfter, Fault::Hang] {
        let node = Node::new();
        let claim = claim_of(node.engine.begin(&operation(1)).await);
        node.storage.set(Operation::Renew, fault.clone());
        node.pass(LEASE / 2).await;
        assert!(node.storage.calls(Operation::Renew) > 0);
        node.storage.heal(Operation::Renew);
        for _ in 0..10 {
            node.pass(LEASE / 2).await;
            assert_eq!(node.memory.claims(), 1, "{fault:?}");
        }
        assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
        assert_eq!(node.events.count("reclaimed"), 0);
        node.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_the_engine_passes_through_fails_as_the_storage_does() {
    let node = Node::new();
    let key = operation(1).key;
    let ops = [Operation::Get, Operation::Remove, Operation::Replace];
    for (fault, kind) in [
        (Fault::FailBefore, StorageErrorKind::Unavailable),
        (Fault::FailAfter, StorageErrorKind::Unavailable),
        (Fault::Hang, StorageErrorKind::Timeout),
    ] {
        for operation in ops {
            node.storage.set(operation, fault.clone());
        }
        let engine = node.engine.clone();
        let calls = tokio::spawn(async move {
            let replacement = record("one");
            let get = engine.get(&key).await.unwrap_err();
            let remove = engine.remove(&key).await.unwrap_err();
            let replace = engine.replace(&key, &replacement, TTL).await.unwrap_err();
            [get.kind(), remove.kind(), replace.kind()]
        });
        for _ in ops {
            idle().await;
            node.clock.advance(STORAGE_TIMEOUT);
        }
        assert_eq!(calls.await.unwrap(), [kind; 3]);
    }
    for operation in ops {
        node.storage.heal(operation);
    }
    assert_eq!(node.engine.get(&key).await.unwrap(), None);
    assert!(!node.engine.remove(&key).await.unwrap());
}

// ---- Records that can't be read ----

#[tokio::test(start_paused = true)]
async fn an_unreadable_record_refuses_until_it_is_removed() {
    let (env, _) = Env::simulated(7);
    let storage = corrupt(&env, operation(1).key).await;
    let engine = Engine::new(storage, config(&env));
    for _ in 0..2 {
        let refused = refusal_of(engine.begin(&operation(1)).await);
        assert_eq!(refused.refusal, Refusal::StorageUnavailable);
        let kind = refused.error.map(|error| error.kind());
        assert_eq!(kind, Some(StorageErrorKind::Unreadable));
    }
    claim_of(engine.begin(&operation(2)).await).release().await;
    assert!(engine.remove(&operation(1).key).await.unwrap());
    claim_of(engine.begin(&operation(1)).await).release().await;
}

#[tokio::test(start_paused = true)]
async fn an_unreadable_record_may_be_configured_to_be_absent() {
    let (env, _) = Env::simulated(7);
    let storage = corrupt(&env, operation(1).key).await;
    let events = Events::new();
    let config = config(&env)
        .on_unreadable(OnUnreadable::TreatAsAbsent)
        .observer(events.clone());
    let engine = Engine::new(storage, config);
    let claim = claim_of(engine.begin(&operation(1)).await);
    // It is still told.
    assert_eq!(events.count("storage_failed"), 1);
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(engine.begin(&operation(1)).await, "one");
}

#[tokio::test(start_paused = true)]
async fn of_two_that_find_an_unreadable_record_one_runs() {
    let (env, _) = Env::simulated(7);
    let storage = FaultyStorage::new(corrupt(&env, operation(1).key).await);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    storage.set(Operation::Remove, Fault::Gate(gate.clone()));
    let config = config(&env).on_unreadable(OnUnreadable::TreatAsAbsent);
    let engine = Engine::new(storage, config);

    let two = [begin(&engine, operation(1)), begin(&engine, operation(1))];
    idle().await;
    gate.add_permits(1);
    idle().await;
    gate.add_permits(10);
    idle().await;
    let mut claims = Vec::new();
    let mut waits = Vec::new();
    for one in two {
        if one.is_finished() {
            claims.push(claim_of(one.await.unwrap()));
        } else {
            waits.push(one);
        }
    }
    assert_eq!(claims.len(), 1, "both run");
    let claim = claims.remove(0);
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(waits.remove(0).await.unwrap(), "one");
}

// ---- Claims that are lost, forgotten, taken over ----

#[tokio::test(start_paused = true)]
async fn a_late_answer_of_a_lost_claim_changes_nothing() {
    let node = Node::new();
    let peer = node.peer();
    let late = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Renew, Fault::FailBefore);
    node.pass(LEASE).await;
    let new = claim_of(peer.begin(&operation(1)).await);

    // While the other runs, and after it is done.
    let too_late = claim_of(node.engine.begin(&operation(2)).await);
    node.pass(LEASE).await;
    let other = claim_of(peer.begin(&operation(2)).await);
    assert_eq!(late.complete(answer("late")).await, Completion::Lost);
    assert_eq!(new.complete(answer("new")).await, Completion::Stored);
    assert_eq!(other.complete(answer("other")).await, Completion::Stored);
    assert_eq!(
        too_late.tombstone(TombstoneReason::StreamBroken).await,
        Completion::Lost
    );

    for engine in [&node.engine, &peer] {
        assert_replays(engine.begin(&operation(1)).await, "new");
        assert_replays(engine.begin(&operation(2)).await, "other");
    }
    assert!(node.events.count("lost") >= 2);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_claim_is_noticed_and_its_duplicates_wait_for_the_new_holder() {
    let node = Node::with(|config| config.lock(LockPolicy::default().timeout(10 * LEASE)));
    let peer = node.peer();
    let late = claim_of(node.engine.begin(&operation(1)).await);
    let duplicate = begin(&node.engine, operation(1));
    node.storage.set(Operation::Renew, Fault::FailBefore);
    node.pass(LEASE).await;
    let new = claim_of(peer.begin(&operation(1)).await);
    node.storage.heal(Operation::Renew);
    node.pass(LEASE / 2).await;
    assert_eq!(node.events.count("lost"), 1);
    assert!(!duplicate.is_finished());
    // The peer keeps its claim, and nobody here renews it or takes it back.
    node.pass(3 * LEASE).await;
    assert_eq!(new.complete(answer("new")).await, Completion::Stored);
    assert_replays(duplicate.await.unwrap(), "new");
    assert_eq!(late.complete(answer("late")).await, Completion::Lost);
    assert_replays(node.engine.begin(&operation(1)).await, "new");
    assert_eq!(node.events.count("reclaimed"), 0);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_lost_claim_that_is_released_frees_nobody_elses() {
    let node = Node::new();
    let peer = node.peer();
    let late = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Renew, Fault::FailBefore);
    node.pass(LEASE).await;
    let new = claim_of(peer.begin(&operation(1)).await);
    late.release().await;
    let dropped = node.memory.claims();
    assert_eq!(dropped, 1);
    assert_eq!(new.complete(answer("new")).await, Completion::Stored);
    assert_replays(node.engine.begin(&operation(1)).await, "new");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_of_a_lost_claim_is_not_kept_for_later() {
    let node = Node::new();
    let peer = node.peer();
    let late = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Renew, Fault::FailBefore);
    node.pass(LEASE).await;
    let new = claim_of(peer.begin(&operation(1)).await);
    node.storage.heal(Operation::Renew);
    node.pass(LEASE / 2).await;
    assert_eq!(node.events.count("lost"), 1);
    // It is known to be lost, so that the storage can't say so makes it no answer.
    node.storage.set(Operation::Complete, Fault::FailBefore);
    assert_eq!(late.complete(answer("late")).await, Completion::Lost);
    let duplicate = begin(&node.engine, operation(1));
    idle().await;
    assert!(!duplicate.is_finished());
    assert_eq!(new.complete(answer("new")).await, Completion::Stored);
    assert_replays(duplicate.await.unwrap(), "new");
    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_the_storage_forgot_is_taken_again() {
    let node = Node::new();
    let peer = node.peer();
    let claim = claim_of(node.engine.begin(&printed(1, 1)).await);
    assert!(node.memory.remove(&operation(1).key).await.unwrap());
    // Until it is noticed, this process protects the key by itself.
    let here = begin(&node.engine, printed(1, 1));
    idle().await;
    assert!(!here.is_finished());
    node.pass(LEASE / 2).await;
    assert_eq!(node.events.count("reclaimed"), 1);
    assert_eq!(node.memory.claims(), 1);
    // With its fingerprint.
    let refused = refusal_of(peer.begin(&printed(1, 2)).await);
    assert_eq!(refused.refusal, Refusal::KeyReused);
    node.pass(3 * LEASE).await;
    assert_eq!(node.memory.claims(), 1);
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    let _ = replay_of(peer.begin(&printed(1, 1)).await);
    let _ = here.await.unwrap();
    assert_eq!(node.events.count("lost"), 0);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_the_storage_forgot_is_completed_all_the_same() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    assert!(node.memory.remove(&operation(1).key).await.unwrap());
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(node.peer().begin(&operation(1)).await, "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_over_the_lease_lets_nobody_here_run_twice() {
    // As when the machine slept. What is in this process protects it, and the keeper takes the claim again.
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    idle().await;
    node.clock.advance(2 * LEASE);
    let duplicate = begin(&node.engine, operation(1));
    idle().await;
    assert!(!duplicate.is_finished());
    assert_eq!(node.memory.claims(), 1);
    assert_eq!(node.events.count("reclaimed"), 1);
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(duplicate.await.unwrap(), "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn what_runs_here_is_known_here_whatever_the_storage_thinks() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Renew, Fault::FailBefore);
    node.pass(2 * LEASE).await;
    assert_eq!(
        node.memory.claims(),
        0,
        "the storage thinks that it is over"
    );
    let duplicate = begin(&node.engine, operation(1));
    idle().await;
    assert!(!duplicate.is_finished());
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(duplicate.await.unwrap(), "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_outcome_that_is_not_stored_yet_answers_while_the_storage_is_down() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    for operation in [Operation::Begin, Operation::Complete, Operation::Renew] {
        node.storage.set(operation, Fault::FailBefore);
    }
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    assert_replays(node.engine.begin(&operation(1)).await, "one");
    for operation in [Operation::Begin, Operation::Complete, Operation::Renew] {
        node.storage.heal(operation);
    }
    node.pass(LEASE).await;
    assert_replays(node.engine.begin(&operation(1)).await, "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_comes_after_a_slow_answer_is_renewed() {
    // The keeper finds that the only claim is completed, whose future does not know it yet: there is nothing to renew.
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let gate = Gate::new();
    let slow = Hooked::waits(memory.clone(), after(Operation::Complete, gate.clone()));
    let engine = Engine::new(slow, config(&env).storage_timeout(LEASE));
    let first = claim_of(engine.begin(&operation(1)).await);
    let completing = tokio::spawn(first.complete(answer("one")));
    gate.arrived(1).await;
    pass(&clock, LEASE / 2).await;
    gate.open(10);
    assert_eq!(completing.await.unwrap(), Completion::Stored);
    let second = claim_of(engine.begin(&operation(2)).await);
    for _ in 0..20 {
        pass(&clock, LEASE / 5).await;
        assert_eq!(memory.claims(), 1, "the second claim is not renewed");
    }
    assert_eq!(second.complete(answer("two")).await, Completion::Stored);
    engine.drain().await;
}

#[tokio::test(start_paused = true)]
async fn an_outcome_that_hangs_while_its_key_is_removed_leaves_nothing() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Complete, Fault::Hang);
    let completing = tokio::spawn(claim.complete(answer("one")));
    idle().await;
    assert!(node.engine.remove(&operation(1).key).await.unwrap());
    node.clock.advance(STORAGE_TIMEOUT);
    assert_eq!(completing.await.unwrap(), Completion::Lost);
    node.storage.heal(Operation::Complete);
    node.engine.drain().await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_whose_lease_is_over_when_it_is_granted_is_no_claim() {
    // The storage granted it, then the machine slept for a lease before the answer was read. Meanwhile another node runs.
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let gate = Gate::new();
    let slow = Hooked::waits(memory.clone(), after(Operation::Begin, gate.clone()));
    let sleeper = Engine::new(slow, config(&env));
    let peer = Engine::new(memory, config(&env));

    let granted = begin(&sleeper, operation(1));
    idle().await;
    clock.advance(LEASE);
    gate.open(10);
    let claim = claim_of(peer.begin(&operation(1)).await);
    idle().await;
    assert!(
        !granted.is_finished(),
        "two run: {:?}",
        granted.await.unwrap()
    );
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(granted.await.unwrap(), "one");
    assert_eq!(sleeper.running(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_was_granted_slowly_is_renewed_in_time() {
    // The lease counts from the grant, not from when its answer was read.
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let gate = Gate::new();
    let slow = Hooked::waits(memory.clone(), after(Operation::Begin, gate.clone()));
    let config = config(&env).storage_timeout(LEASE);
    let engine = Engine::new(slow, config);
    let granted = begin(&engine, operation(1));
    idle().await;
    pass(&clock, LEASE * 9 / 10).await;
    gate.open(10);
    let claim = claim_of(granted.await.unwrap());
    for _ in 0..60 {
        pass(&clock, LEASE / 30).await;
        assert_eq!(memory.claims(), 1);
    }
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
}

// ---- Claims that are held for long ----

#[tokio::test(start_paused = true)]
async fn a_claim_is_renewed_until_it_becomes_a_tombstone() {
    let node = Node::new();
    let peer = node.peer();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let step = LEASE / 3;
    let mut held = Duration::ZERO;
    while held + step < MAX_HOLD {
        node.pass(step).await;
        held += step;
        assert_eq!(node.memory.claims(), 1, "after {held:?}");
    }
    assert_eq!(node.events.count("tombstoned"), 0);
    node.pass(MAX_HOLD - held).await;
    assert_eq!(node.events.count("tombstoned"), 1);
    for engine in [&node.engine, &peer] {
        let replay = replay_of(engine.begin(&operation(1)).await);
        let tombstone = Outcome::Tombstone(TombstoneReason::MaxHold);
        assert_eq!(replay.record.outcome, tombstone);
    }
    // It still runs, and drain knows.
    assert_eq!(node.engine.running(), 1);
    assert_eq!(claim.complete(answer("late")).await, Completion::Expired);
    let replay = replay_of(peer.begin(&operation(1)).await);
    let tombstone = Outcome::Tombstone(TombstoneReason::MaxHold);
    assert_eq!(replay.record.outcome, tombstone);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_is_given_up_is_not_freed_by_its_release() {
    for drops in [false, true] {
        let node = Node::new();
        let claim = claim_of(node.engine.begin(&operation(1)).await);
        node.pass(MAX_HOLD).await;
        if drops {
            drop(claim);
        } else {
            claim.release().await;
        }
        let _ = replay_of(node.engine.begin(&operation(1)).await);
        node.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_can_not_be_given_up_is_kept_until_it_can() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    node.pass(MAX_HOLD + 4 * LEASE).await;
    assert_eq!(node.memory.claims(), 1);
    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    assert_eq!(node.events.count("tombstoned"), 1);
    assert_eq!(node.memory.claims(), 0);
    assert_eq!(claim.complete(answer("late")).await, Completion::Expired);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_comes_while_its_claim_is_given_up_is_not_reported_as_stored() {
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let gate = Gate::new();
    let slow = Hooked::waits(memory.clone(), after(Operation::Complete, gate.clone()));
    let engine = Engine::new(slow, config(&env));
    let claim = claim_of(engine.begin(&operation(1)).await);
    pass(&clock, MAX_HOLD).await;
    // The tombstone is stored, and the storage has not said so yet.
    gate.arrived(1).await;
    let completing = tokio::spawn(claim.complete(answer("late")));
    idle().await;
    gate.open(10);
    let completion = completing.await.unwrap();
    let replay = replay_of(engine.begin(&operation(1)).await);
    let stands = replay.record.outcome == Outcome::Response(answer("late"));
    assert_eq!(
        completion == Completion::Stored,
        stands,
        "{completion:?}, but {:?} is replayed",
        replay.record.outcome
    );
    engine.drain().await;
}

// ---- The keeper ----

#[tokio::test(start_paused = true)]
async fn a_release_beside_a_renewal_leaves_no_claim() {
    for ends in [Moment::Before, Moment::After] {
        let (env, clock) = Env::simulated(7);
        let memory = MemoryStorage::builder().env(env.clone()).build();
        let gate = Gate::new();
        let hook = match ends {
            Moment::Before => before(Operation::Renew, gate.clone()),
            Moment::After => after(Operation::Renew, gate.clone()),
        };
        let engine = Engine::new(Hooked::waits(memory.clone(), hook), config(&env));
        let claim = claim_of(engine.begin(&operation(1)).await);
        pass(&clock, LEASE / 3).await;
        gate.arrived(1).await;
        claim.release().await;
        gate.open(10);
        idle().await;
        engine.drain().await;
        assert_eq!(memory.claims(), 0, "{ends:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_beside_a_reclaim_leaves_no_claim() {
    for removes in [false, true] {
        let (env, clock) = Env::simulated(7);
        let memory = MemoryStorage::builder().env(env.clone()).build();
        let gate = Gate::new();
        let armed = Arc::new(AtomicBool::new(false));
        let hook = {
            let (gate, armed) = (gate.clone(), armed.clone());
            move |operation, moment| -> BoxFuture<'static, ()> {
                let gate = gate.clone();
                let is_reclaim = operation == Operation::Begin && armed.load(Ordering::SeqCst);
                Box::pin(async move {
                    if is_reclaim && moment == Moment::Before {
                        gate.enter().await;
                    }
                })
            }
        };
        let engine = Engine::new(Hooked::waits(memory.clone(), hook), config(&env));
        let claim = claim_of(engine.begin(&operation(1)).await);
        assert!(memory.remove(&operation(1).key).await.unwrap());
        armed.store(true, Ordering::SeqCst);
        pass(&clock, LEASE / 3).await;
        gate.arrived(1).await;
        armed.store(false, Ordering::SeqCst);
        if removes {
            // By hand: the next request is to run.
            assert!(engine.remove(&operation(1).key).await.unwrap());
            gate.open(10);
            let next = begin(&engine, operation(1));
            idle().await;
            assert!(next.is_finished(), "the removed claim is back");
            claim_of(next.await.unwrap()).release().await;
            claim.release().await;
        } else {
            claim.release().await;
            gate.open(10);
            idle().await;
        }
        engine.drain().await;
        idle().await;
        assert_eq!(memory.claims(), 0, "removes: {removes}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_reclaim_that_times_out_after_its_effect_leaves_no_claim() {
    for drops in [false, true] {
        let (env, clock) = Env::simulated(7);
        let memory = MemoryStorage::builder().env(env.clone()).build();
        let gate = Gate::new();
        let armed = Arc::new(AtomicBool::new(false));
        let hook = {
            let (gate, armed) = (gate.clone(), armed.clone());
            move |operation, moment| -> BoxFuture<'static, ()> {
                let gate = gate.clone();
                let is_reclaim = operation == Operation::Begin && armed.load(Ordering::SeqCst);
                Box::pin(async move {
                    match moment {
                        Moment::Before if is_reclaim => gate.enter().await,
                        // It has had its effect, and the answer gets lost.
                        Moment::After if is_reclaim => std::future::pending().await,
                        _ => {}
                    }
                })
            }
        };
        let engine = Engine::new(Hooked::waits(memory.clone(), hook), config(&env));
        let claim = claim_of(engine.begin(&operation(1)).await);
        assert!(memory.remove(&operation(1).key).await.unwrap());
        armed.store(true, Ordering::SeqCst);
        pass(&clock, LEASE / 3).await;
        gate.arrived(1).await;
        if drops {
            drop(claim);
        } else {
            claim.release().await;
        }
        // Now the release, which has found nothing, is over.
        idle().await;
        gate.open(1);
        idle().await;
        assert_eq!(memory.claims(), 1, "the reclaim has had its effect");
        armed.store(false, Ordering::SeqCst);
        pass(&clock, STORAGE_TIMEOUT).await;
        engine.drain().await;
        assert_eq!(memory.claims(), 0, "drops: {drops}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_outcome_that_hangs_costs_no_other_claim_its_renewal() {
    // A storage may be given longer than a lease to answer.
    let node = Node::with(|config| config.storage_timeout(4 * LEASE));
    let peer = node.peer();
    node.storage.set(Operation::Complete, Fault::Hang);
    let gives_up = claim_of(node.engine.begin(&operation(2)).await);
    node.pass(MAX_HOLD - LEASE).await;
    let hangs = claim_of(node.engine.begin(&operation(3)).await);
    let mut completing = Box::pin(hangs.complete(answer("three")));
    assert!(poll_times(completing.as_mut(), 2).await.is_none());
    drop(completing);
    let held = claim_of(node.engine.begin(&operation(4)).await);
    for _ in 0..90 {
        node.pass(LEASE / 15).await;
        let entry = peer.get(&operation(4).key).await.unwrap();
        assert!(matches!(entry, Some(Entry::Claimed { .. })), "{entry:?}");
    }
    node.storage.heal(Operation::Complete);
    assert_eq!(held.complete(answer("four")).await, Completion::Stored);
    node.pass(LEASE).await;
    assert_eq!(gives_up.complete(answer("two")).await, Completion::Expired);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_storage_that_panics_once_costs_no_claim_its_renewal() {
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    for faulty in [Operation::Renew, Operation::Complete] {
        let panics = Arc::new(AtomicUsize::new(0));
        let hook = {
            let panics = panics.clone();
            move |operation, moment| -> BoxFuture<'static, ()> {
                if operation == faulty
                    && moment == Moment::Before
                    && panics.fetch_add(1, Ordering::SeqCst) < 2
                {
                    panic!("injected");
                }
                Box::pin(async {})
            }
        };
        let engine = Engine::new(Hooked::waits(memory.clone(), hook), config(&env));
        let held = claim_of(engine.begin(&operation(1)).await);
        if faulty == Operation::Complete {
            let claim = claim_of(engine.begin(&operation(2)).await);
            let completing = tokio::spawn(claim.complete(answer("two")));
            assert!(completing.await.unwrap_err().is_panic());
        }
        for _ in 0..20 {
            pass(&clock, LEASE / 5).await;
            assert_eq!(memory.claims(), 1, "{faulty}");
        }
        assert!(panics.load(Ordering::SeqCst) > 2);
        if faulty == Operation::Complete {
            // What the operation came to is known, so it is not run again.
            assert_replays(engine.begin(&operation(2)).await, "two");
        }
        held.release().await;
        engine.drain().await;
        assert_eq!(memory.claims(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn an_observer_that_panics_changes_nothing() {
    let node = Node::with(|config| config.observer(|_: &Event<'_>| panic!("injected")));
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let waits = begin(&node.engine, operation(1));
    node.pass(LEASE / 6).await;
    assert!(!waits.is_finished());
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(waits.await.unwrap(), "one");

    let claim = claim_of(node.engine.begin(&operation(2)).await);
    node.storage.set(Operation::Renew, Fault::FailBefore);
    node.pass(LEASE / 2).await;
    node.storage.heal(Operation::Renew);
    node.pass(2 * LEASE).await;
    assert_eq!(node.memory.claims(), 1);
    drop(claim);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_release_that_panics_is_not_tried_for_ever() {
    let releases = Arc::new(AtomicUsize::new(0));
    let hook = {
        let releases = releases.clone();
        move |operation, moment| -> BoxFuture<'static, ()> {
            if (operation, moment) == (Operation::Release, Moment::Before) {
                let releases = releases.fetch_add(1, Ordering::SeqCst);
                if releases > 20 {
                    // Ends the test, where a panic is what the test is about.
                    eprintln!("a release that panics is tried without end");
                    std::process::abort();
                }
                panic!("injected");
            }
            Box::pin(async {})
        }
    };
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let engine = Engine::new(Hooked::waits(memory.clone(), hook), config(&env));
    drop(claim_of(engine.begin(&operation(1)).await));
    pass(&clock, LEASE).await;
    engine.drain().await;
    assert!(releases.load(Ordering::SeqCst) > 0);
    assert_eq!((engine.running(), memory.claims()), (0, 0));
}

// ---- Removal by hand ----

#[tokio::test(start_paused = true)]
async fn a_removed_record_lets_the_next_request_run() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert!(node.engine.remove(&operation(1).key).await.unwrap());
    assert!(!node.engine.remove(&operation(1).key).await.unwrap());
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_removed_claim_lets_one_duplicate_run_and_is_not_taken_again() {
    let node = Node::new();
    let old = claim_of(node.engine.begin(&operation(1)).await);
    let duplicates = [
        begin(&node.engine, operation(1)),
        begin(&node.engine, operation(1)),
    ];
    idle().await;
    assert!(node.engine.remove(&operation(1).key).await.unwrap());
    idle().await;
    let [a, b] = duplicates;
    let (runs, waits) = if a.is_finished() { (a, b) } else { (b, a) };
    assert!(!waits.is_finished());
    let new = claim_of(runs.await.unwrap());
    node.pass(LEASE / 4).await;
    assert_eq!(node.memory.claims(), 1);
    // The old one is told, and does no harm.
    assert_eq!(old.complete(answer("old")).await, Completion::Lost);
    assert_eq!(new.complete(answer("new")).await, Completion::Stored);
    assert_replays(waits.await.unwrap(), "new");
    assert_replays(node.peer().begin(&operation(1)).await, "new");
    assert_eq!(node.events.count("reclaimed"), 0);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_removed_outcome_that_was_not_stored_yet_is_gone() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    assert!(node.engine.remove(&operation(1).key).await.unwrap());
    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    node.assert_quiet().await;
    claim_of(node.engine.begin(&operation(1)).await)
        .release()
        .await;
}

#[tokio::test(start_paused = true)]
async fn a_removal_does_not_touch_the_claim_that_comes_after_it() {
    let (env, clock) = Env::simulated(7);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let gate = Gate::new();
    let slow = Hooked::waits(memory.clone(), after(Operation::Remove, gate.clone()));
    let config = config(&env).storage_timeout(LEASE);
    let engine = Engine::new(slow, config);
    let old = claim_of(engine.begin(&operation(1)).await);
    let removal = {
        let engine = engine.clone();
        tokio::spawn(async move { engine.remove(&operation(1).key).await })
    };
    gate.arrived(1).await;
    // The storage has removed it, and has not said so yet.
    old.release().await;
    let new = claim_of(engine.begin(&operation(1)).await);
    gate.open(1);
    assert!(removal.await.unwrap().unwrap());

    for _ in 0..20 {
        pass(&clock, LEASE / 5).await;
        assert_eq!(memory.claims(), 1, "the new claim is not renewed");
    }
    assert_eq!(new.complete(answer("new")).await, Completion::Stored);
    engine.drain().await;
}

// ---- Without locks ----

#[tokio::test(start_paused = true)]
async fn without_locks_duplicates_run_and_retries_are_answered() {
    let node = Node::with(|config| config.lock(LockPolicy::disabled()));
    let one = claim_of(node.engine.begin(&operation(1)).await);
    let two = claim_of(node.engine.begin(&operation(1)).await);
    assert_eq!((node.memory.claims(), node.engine.running()), (0, 2));
    assert_eq!(one.complete(answer("one")).await, Completion::Stored);
    assert_eq!(two.complete(answer("two")).await, Completion::Lost);
    assert_replays(node.engine.begin(&operation(1)).await, "one");

    drop(claim_of(node.engine.begin(&operation(2)).await));
    claim_of(node.engine.begin(&operation(2)).await)
        .release()
        .await;
    assert_eq!(node.storage.calls(Operation::Begin), 0);
    assert_eq!(node.storage.calls(Operation::Release), 0);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn without_locks_an_answer_is_stored_late_too() {
    let node = Node::with(|config| config.lock(LockPolicy::disabled()));
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    assert_replays(node.engine.begin(&operation(1)).await, "one");
    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    assert_replays(node.peer().begin(&operation(1)).await, "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn without_locks_a_storage_that_fails_refuses() {
    let node = Node::with(|config| config.lock(LockPolicy::disabled()));
    node.storage.set(Operation::Get, Fault::FailBefore);
    let refused = refusal_of(node.engine.begin(&operation(1)).await);
    assert_eq!(refused.refusal, Refusal::StorageUnavailable);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn without_locks_an_operation_that_runs_is_not_to_be_dropped_either() {
    let node = Node::with(|config| config.lock(LockPolicy::disabled()));
    let progress = Progress::new();
    let decision = node.engine.begin_with(&operation(1), &progress).await;
    let claim = claim_of(decision);
    assert!(progress.is_committed());
    claim.release().await;
}

#[tokio::test(start_paused = true)]
async fn progress_tells_when_a_claim_may_be_there() {
    let node = Node::new();
    let encoded = operation(1);
    let progress = Progress::new();
    node.storage.set(Operation::Begin, Fault::Hang);
    let mut hangs = Box::pin(node.engine.begin_with(&encoded, &progress));
    assert!(!progress.is_committed());
    assert!(poll_times(hangs.as_mut(), 1).await.is_none());
    assert!(progress.is_committed());
    drop(hangs);
    node.storage.heal(Operation::Begin);
    idle().await;

    let progress = Progress::new();
    let claim = claim_of(node.engine.begin_with(&encoded, &progress).await);
    assert!(progress.is_committed());

    let progress = Progress::new();
    let mut waits = Box::pin(node.engine.begin_with(&encoded, &progress));
    assert!(poll_times(waits.as_mut(), 3).await.is_none());
    assert!(!progress.is_committed());
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(waits.await, "one");
    assert!(!progress.is_committed());
    node.assert_quiet().await;
}

// ---- Dropped at every point ----

/// A storage that is pending before and after each of its steps.
fn slow(memory: &MemoryStorage, yields: usize) -> Hooked<MemoryStorage, Waits> {
    Hooked::waits(memory.clone(), move |_, _| {
        Box::pin(async move {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
        })
    })
}

#[tokio::test(start_paused = true)]
async fn a_begin_that_is_dropped_at_any_point_leaves_nothing() {
    let mut dropped = 0;
    for times in 0..16 {
        let (env, _) = Env::simulated(7);
        let memory = MemoryStorage::builder().env(env.clone()).build();
        let engine = Engine::new(slow(&memory, 3), config(&env));
        let encoded = operation(1);
        let finished = {
            let mut beginning = Box::pin(engine.begin(&encoded));
            // A claim that comes of it is dropped too.
            poll_times(beginning.as_mut(), times).await.is_some()
        };
        engine.drain().await;
        assert_eq!((engine.running(), memory.claims()), (0, 0), "{times}");
        dropped += usize::from(!finished);
        claim_of(engine.begin(&operation(1)).await).release().await;
        assert_eq!(memory.claims(), 0, "{times}");
    }
    // Before the claim, in its midst and after it; and some that came to their end.
    assert!((6..12).contains(&dropped), "{dropped}");
}

#[tokio::test(start_paused = true)]
async fn a_waiting_begin_that_is_dropped_at_any_point_leaves_nothing() {
    for remote in [false, true] {
        for times in 0..40 {
            let (env, _) = Env::simulated(7);
            let memory = MemoryStorage::builder().env(env.clone()).build();
            let holder = Engine::new(slow(&memory, 1), config(&env));
            let engine = if remote {
                Engine::new(slow(&memory, 1), config(&env))
            } else {
                holder.clone()
            };
            let claim = claim_of(holder.begin(&operation(1)).await);
            let encoded = operation(1);
            let mut leaves = Box::pin(engine.begin(&encoded));
            let mut decision = poll_times(leaves.as_mut(), times / 2).await;
            let stays = begin(&engine, operation(1));
            idle().await;
            claim.release().await;
            if decision.is_none() {
                decision = poll_times(leaves.as_mut(), times / 2).await;
            }
            drop(leaves);
            drop(decision);
            idle().await;
            // The clock stands still: it was woken.
            assert!(stays.is_finished(), "remote: {remote}, {times}");
            claim_of(stays.await.unwrap()).release().await;
            engine.drain().await;
            holder.drain().await;
            assert_eq!((engine.waiting(), memory.waiters()), (0, 0), "{times}");
            assert_eq!((engine.running(), memory.claims()), (0, 0), "{times}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_complete_that_is_dropped_at_any_point_is_stored() {
    // From its first poll on. Before, the claim is all that there is, and it is released.
    for times in 0..16 {
        let (env, clock) = Env::simulated(7);
        let memory = MemoryStorage::builder().env(env.clone()).build();
        let engine = Engine::new(slow(&memory, 3), config(&env));
        let claim = claim_of(engine.begin(&operation(1)).await);
        let waits = begin(&engine, operation(1));
        idle().await;
        let mut completing = Box::pin(claim.complete(answer("one")));
        let _ = poll_times(completing.as_mut(), times).await;
        drop(completing);
        pass(&clock, WAIT / 2).await;
        let waited = waits.await.unwrap();
        if times == 0 {
            claim_of(waited).release().await;
        } else {
            assert_replays(waited, "one");
            engine.drain().await;
            assert_replays(engine.begin(&operation(1)).await, "one");
            let peer = Engine::new(memory.clone(), config(&env));
            assert_replays(peer.begin(&operation(1)).await, "one");
        }
        assert_eq!((engine.running(), memory.claims()), (0, 0), "{times}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_release_that_is_dropped_at_any_point_is_done() {
    for times in 0..16 {
        let (env, _) = Env::simulated(7);
        let memory = MemoryStorage::builder().env(env.clone()).build();
        let engine = Engine::new(slow(&memory, 3), config(&env));
        let claim = claim_of(engine.begin(&operation(1)).await);
        let waits = begin(&engine, operation(1));
        idle().await;
        let mut releasing = Box::pin(claim.release());
        let _ = poll_times(releasing.as_mut(), times).await;
        drop(releasing);
        idle().await;
        assert!(waits.is_finished(), "{times}");
        claim_of(waits.await.unwrap()).release().await;
        engine.drain().await;
        assert_eq!((engine.running(), memory.claims()), (0, 0), "{times}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_is_dropped_disturbs_nobody() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    {
        let mut first = pin!(node.engine.drain());
        assert!(poll_times(first.as_mut(), 2).await.is_none());
    }
    claim.release().await;
    node.assert_quiet().await;
}

// ---- Storages to test with ----

fn at(
    operation: Operation,
    moment: Moment,
    gate: Gate,
) -> impl Fn(Operation, Moment) -> BoxFuture<'static, ()> {
    move |now, when| {
        let gate = gate.clone();
        Box::pin(async move {
            if (now, when) == (operation, moment) {
                gate.enter().await;
            }
        })
    }
}

/// Holds `operation` back before it has its effect.
fn before(
    operation: Operation,
    gate: Gate,
) -> Box<dyn Fn(Operation, Moment) -> BoxFuture<'static, ()> + Send + Sync> {
    Box::new(at(operation, Moment::Before, gate))
}

/// Holds the answer of `operation` back after its effect.
fn after(
    operation: Operation,
    gate: Gate,
) -> Box<dyn Fn(Operation, Moment) -> BoxFuture<'static, ()> + Send + Sync> {
    Box::new(at(operation, Moment::After, gate))
}

/// Records that can't be read, until they are removed.
#[derive(Clone, Default)]
struct Corrupt(Arc<Mutex<HashSet<EncodedKey>>>);

impl Hook for Corrupt {
    async fn around<T: Send>(
        &self,
        call: StorageCall<'_>,
        work: impl Future<Output = Result<T, StorageError>> + Send,
    ) -> Result<T, StorageError> {
        let is_corrupt = match call.operation {
            Operation::Remove => {
                self.0.lock().unwrap().remove(call.key);
                false
            }
            _ => self.0.lock().unwrap().contains(call.key),
        };
        if is_corrupt {
            return Err(StorageError::unreadable(std::io::Error::other("corrupt")));
        }
        work.await
    }
}

/// A storage in which what lies under `key` can't be read.
async fn corrupt(env: &Env, key: EncodedKey) -> Hooked<MemoryStorage, Corrupt> {
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let unread = record("unread");
    let held = memory.complete(&key, Token::random(), &unread, TTL).await;
    assert_eq!(held.unwrap(), Held::Yes);
    let corrupt = Corrupt::default();
    corrupt.0.lock().unwrap().insert(key);
    Hooked::around(memory, corrupt)
}
