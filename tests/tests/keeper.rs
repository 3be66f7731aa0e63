//! What the keeper of an engine sees to: operations that take too long, storages that refuse or hang, runtimes that stand still.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use futures_util::future::BoxFuture;
use idempotency_axum::{
    Completion, Config, Decision, Encoded, EncodedKey, Engine, Env, Environment, LockPolicy,
    MemoryStorage, Operation, Outcome, Progress, Refusal, Spawner, Storage, TombstoneReason,
};
use idempotency_tests::{
    Events, Fault, FaultyStorage,
    node::{
        LEASE, Node, answer, assert_replays, begin, claim_of, config, idle, operation, poll_times,
        refusal_of, replay_of,
    },
};
use tokio::runtime::Runtime;

const MAX_HOLD: Duration = Duration::from_secs(600);
const TTL: Duration = Duration::from_secs(24 * 3600);

fn numbered(n: u32) -> Encoded {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&n.to_be_bytes());
    Encoded {
        key: EncodedKey::from_bytes(key),
        fingerprint: None,
    }
}

fn tombstone_of(decision: Decision) -> TombstoneReason {
    match replay_of(decision).record.outcome {
        Outcome::Tombstone(reason) => reason,
        other => panic!("expected a tombstone: {other:?}"),
    }
}

// ---- Operations that take too long ----

#[tokio::test(start_paused = true)]
async fn a_run_longer_than_max_hold_and_ttl_stays_alone() {
    let (lease, ttl) = (Duration::from_millis(60), Duration::from_millis(100));
    let change = |config: Config| {
        config.ttl(ttl).lock(
            LockPolicy::default()
                .timeout(Duration::ZERO)
                .ttl(lease)
                .max_hold(Duration::from_millis(200)),
        )
    };
    let node = Node::with(change);
    let peer = Engine::new(node.memory.clone(), change(config(&node.env)));
    let engines = [&node.engine, &peer];
    let step = Duration::from_millis(10);
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    for at in 0..150 {
        idle().await;
        for engine in engines {
            let decision = engine.begin(&operation(1)).await;
            assert!(!matches!(decision, Decision::Execute(_)), "at {at}0 ms");
        }
        node.clock.advance(step);
    }
    idle().await;
    assert_eq!(claim.complete(answer("late")).await, Completion::Expired);
    for at in 0..10 {
        for engine in engines {
            let reason = tombstone_of(engine.begin(&operation(1)).await);
            assert_eq!(reason, TombstoneReason::MaxHold, "{at}0 ms afterwards");
        }
        node.clock.advance(step);
        idle().await;
    }
    for _ in 0..lease.as_millis() / step.as_millis() {
        node.clock.advance(step);
        idle().await;
    }
    claim_of(peer.begin(&operation(1)).await).release().await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn the_ttl_of_a_tombstone_begins_when_its_operation_ends() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.pass(MAX_HOLD).await;
    assert_eq!(node.events.count("tombstoned"), 1);
    node.storage.set(Operation::Complete, Fault::FailBefore);
    node.pass(2 * LEASE).await;
    node.storage.heal(Operation::Complete);
    assert_eq!(claim.complete(answer("late")).await, Completion::Expired);
    node.pass(LEASE / 2).await;
    node.clock.advance(TTL - LEASE);
    let reason = tombstone_of(node.peer().begin(&operation(1)).await);
    assert_eq!(reason, TombstoneReason::MaxHold);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_that_is_given_up_is_answered_here_in_an_outage() {
    let node = Node::new();
    let waits = node.engine.clone();
    let _claim = claim_of(node.engine.begin(&operation(1)).await);
    node.pass(MAX_HOLD - Duration::from_secs(2)).await;
    let waiting = begin(&waits, operation(1));
    for operation in [
        Operation::Begin,
        Operation::Complete,
        Operation::Renew,
        Operation::Get,
    ] {
        node.storage.set(operation, Fault::FailBefore);
    }
    node.pass(Duration::from_secs(2)).await;
    assert!(waiting.is_finished(), "the tombstone wakes who waits");
    for decision in [
        waiting.await.unwrap(),
        node.engine.begin(&operation(1)).await,
    ] {
        assert_eq!(tombstone_of(decision), TombstoneReason::MaxHold);
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_never_ends_gives_its_place_back() {
    for lost in [false, true] {
        let node = Node::with(|config| config.max_running(1));
        let progress = Progress::new();
        let decision = node.engine.begin_with(&operation(1), &progress).await;
        let hung = claim_of(decision);
        if lost {
            // The key is another's, so no tombstone is stored for this run.
            assert!(node.memory.remove(&operation(1).key).await.unwrap());
            let other = claim_of(node.peer().begin(&operation(1)).await);
            assert_eq!(other.complete(answer("other")).await, Completion::Stored);
        }
        let refused = refusal_of(node.engine.begin(&operation(2)).await);
        assert_eq!(refused.refusal, Refusal::Overloaded);
        let given_up = tokio::spawn({
            let progress = progress.clone();
            async move { progress.given_up().await }
        });
        node.pass(MAX_HOLD - Duration::from_secs(2)).await;
        assert!(!progress.is_given_up() && !given_up.is_finished());
        node.pass(Duration::from_secs(2)).await;
        assert!(progress.is_given_up() && given_up.is_finished(), "{lost}");
        progress.given_up().await;

        let claim = claim_of(node.engine.begin(&operation(2)).await);
        assert_eq!(claim.complete(answer("two")).await, Completion::Stored);
        assert_eq!(node.engine.running(), 1, "it still runs, and drain waits");
        drop(hung);
        node.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_without_locks_gives_its_place_back_too() {
    let node = Node::with(|config| {
        config
            .max_running(1)
            .lock(LockPolicy::disabled().max_hold(MAX_HOLD))
    });
    let hung = claim_of(node.engine.begin(&operation(1)).await);
    node.pass(MAX_HOLD).await;
    claim_of(node.engine.begin(&operation(2)).await)
        .release()
        .await;
    drop(hung);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_removed_tombstone_of_a_run_is_not_put_back_here() {
    let node = Node::new();
    let hung = claim_of(node.engine.begin(&operation(1)).await);
    node.pass(MAX_HOLD).await;
    assert!(node.engine.remove(&operation(1).key).await.unwrap());
    let again = claim_of(node.engine.begin(&operation(1)).await);
    node.pass(LEASE).await;
    assert_eq!(again.complete(answer("again")).await, Completion::Stored);
    assert_eq!(hung.complete(answer("late")).await, Completion::Lost);
    assert_replays(node.peer().begin(&operation(1)).await, "again");
    node.assert_quiet().await;
}

// ---- Runtimes that stand still ----

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// What becomes of the runtime on which the first claim was made.
#[derive(Clone, Copy, Debug)]
enum Fate {
    NotDriven,
    Blocked,
    Ended,
}

#[test]
fn a_runtime_that_stands_still_costs_no_claim_its_renewal() {
    let fates = [Fate::NotDriven, Fate::Blocked, Fate::Ended];
    let tests = fates.map(|fate| thread::spawn(move || renewed_whatever_becomes_of(fate)));
    for test in tests {
        test.join().unwrap();
    }
}

/// In real time: what is tested is that the keeper needs no runtime of the program's. The lease is long, for a busy machine.
fn renewed_whatever_becomes_of(fate: Fate) {
    let lease = Duration::from_millis(1500);
    let config = |events: &Events| {
        Config::default()
            .lock(LockPolicy::default().ttl(lease).timeout(Duration::ZERO))
            .observer(events.clone())
    };
    let memory = MemoryStorage::new();
    let storage = FaultyStorage::new(memory.clone());
    let events = Events::new();
    let engine = Engine::new(storage.clone(), config(&events));
    let other = Engine::new(memory, config(&Events::new()));

    let first = runtime();
    let claim = first.block_on(async { claim_of(engine.begin(&operation(1)).await) });
    let (unblock, blocked) = std::sync::mpsc::channel::<()>();
    let first = match fate {
        Fate::NotDriven => Some(thread::spawn(move || {
            let _ = blocked.recv();
            drop((first, claim));
        })),
        Fate::Blocked => Some(thread::spawn(move || {
            first.block_on(async {
                let _claim = claim;
                let _ = blocked.recv();
            });
        })),
        Fate::Ended => {
            drop((first, claim));
            None
        }
    };
    runtime().block_on(async {
        let held = claim_of(engine.begin(&operation(2)).await);
        let renewed = storage.calls(Operation::Renew);
        // Each claim is renewed every third of a lease, so this is more than a lease later.
        let times = if first.is_some() { 8 } else { 4 };
        storage.called(Operation::Renew, renewed + times).await;
        let refused = refusal_of(other.begin(&operation(2)).await);
        assert_eq!(refused.refusal, Refusal::InFlight, "{fate:?}");

        // An outcome is stored late without that runtime as well.
        storage.set(Operation::Complete, Fault::FailBefore);
        let completion = held.complete(answer("two")).await;
        assert_eq!(completion, Completion::Deferred, "{fate:?}");
        storage.heal(Operation::Complete);
        storage.called(Operation::Complete, 2).await;
    });
    drop(unblock);
    if let Some(first) = first {
        first.join().unwrap();
    }
    runtime().block_on(engine.drain());
    runtime().block_on(async {
        assert_replays(other.begin(&operation(2)).await, "two");
    });
    assert_eq!(events.count("lost"), 0, "{fate:?}");
    assert_eq!(events.count("reclaimed"), 0, "{fate:?}");
}

#[test]
fn a_claim_made_outside_of_a_runtime_is_renewed() {
    let lease = Duration::from_millis(1500);
    let storage = FaultyStorage::new(MemoryStorage::new());
    let lock = LockPolicy::default().ttl(lease).timeout(Duration::ZERO);
    let engine = Engine::new(storage.clone(), Config::default().lock(lock));
    let begun = Box::pin(async { engine.begin(&operation(1)).await });
    let claim = claim_of(futures_util::FutureExt::now_or_never(begun).unwrap());
    runtime().block_on(storage.called(Operation::Renew, 2));
    drop(claim);
    runtime().block_on(engine.drain());
}

// ---- Storages that hang ----

#[tokio::test(start_paused = true)]
async fn a_renewal_that_hangs_delays_only_itself() {
    let lease = Duration::from_secs(5);
    let lock = LockPolicy::default().ttl(lease).timeout(Duration::ZERO);
    let node = Node::with(|config| config.lock(lock.clone()));
    let peer = Engine::new(node.memory.clone(), config(&node.env).lock(lock));
    let mut hung = Vec::new();
    for n in 0..300 {
        let key = numbered(n);
        node.storage.set_for(key.key, Operation::Renew, Fault::Hang);
        hung.push(claim_of(node.engine.begin(&key).await));
    }
    let healthy = claim_of(node.engine.begin(&numbered(300)).await);
    for _ in 0..60 {
        pass_by(&node, Duration::from_millis(250)).await;
        let refused = refusal_of(peer.begin(&numbered(300)).await);
        assert_eq!(refused.refusal, Refusal::InFlight);
    }
    assert_eq!(node.events.count("reclaimed"), 0);
    let stored = healthy.complete(answer("one")).await;
    assert_eq!(stored, Completion::Stored);
    node.storage.heal(Operation::Renew);
    drop(hung);
    node.engine.drain().await;
}

async fn pass_by(node: &Node, step: Duration) {
    node.clock.advance(step);
    idle().await;
}

#[tokio::test(start_paused = true)]
async fn a_woken_duplicate_that_leaves_a_full_process_passes_it_on() {
    let node = Node::with(|config| config.max_running(2));
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let encoded = operation(1);
    let mut first = Box::pin(node.engine.begin(&encoded));
    assert!(poll_times(first.as_mut(), 3).await.is_none());
    let second = begin(&node.engine, operation(1));
    idle().await;
    let other = claim_of(node.engine.begin(&operation(2)).await);
    claim.release().await;
    // The process is full when the first one is woken, so it only looks for a record.
    let third = claim_of(node.engine.begin(&operation(3)).await);
    node.storage.set(Operation::Get, Fault::Hang);
    assert!(poll_times(first.as_mut(), 3).await.is_none());
    assert_eq!(node.storage.calls(Operation::Get), 1);
    third.release().await;
    node.storage.heal(Operation::Get);
    drop(first);
    idle().await;
    assert!(second.is_finished(), "the wake was not passed on");
    claim_of(second.await.unwrap()).release().await;
    other.release().await;
    node.assert_quiet().await;
}

// ---- Storages that refuse ----

#[tokio::test(start_paused = true)]
async fn an_answer_that_is_refused_for_good_becomes_a_tombstone() {
    let node = Node::with(|config| config.max_running(1));
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Complete, Fault::RefuseAnswer);
    let completion = claim.complete(answer("too large")).await;
    assert_eq!(completion, Completion::Deferred);
    assert_replays(node.engine.begin(&operation(1)).await, "too large");
    node.pass(Duration::from_secs(60)).await;
    assert_eq!(node.engine.running(), 0);
    assert_eq!(node.events.count("tombstoned"), 1);
    for engine in [&node.engine, &node.peer()] {
        let reason = tombstone_of(engine.begin(&operation(1)).await);
        assert_eq!(reason, TombstoneReason::Unstorable);
    }
    claim_of(node.engine.begin(&operation(2)).await)
        .release()
        .await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_keeps_the_answer() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    for operation in [Operation::Complete, Operation::Renew, Operation::Get] {
        node.storage.set(operation, Fault::FailBefore);
    }
    let completion = claim.complete(answer("one")).await;
    assert_eq!(completion, Completion::Deferred);
    node.pass(TTL / 24).await;
    assert_replays(node.engine.begin(&operation(1)).await, "one");
    for operation in [Operation::Complete, Operation::Renew, Operation::Get] {
        node.storage.heal(operation);
    }
    node.pass(LEASE).await;
    assert_replays(node.peer().begin(&operation(1)).await, "one");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_has_arrived_is_not_sent_again() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    // It takes longer to send than the time limit.
    node.storage.set(Operation::Complete, Fault::HangAfter);
    let completing = tokio::spawn(claim.complete(answer("large")));
    idle().await;
    node.clock.advance(Duration::from_secs(1));
    assert_eq!(completing.await.unwrap(), Completion::Deferred);
    node.pass(LEASE).await;
    assert_eq!(node.storage.calls(Operation::Complete), 1);
    assert_eq!(node.events.count("completed"), 1);
    assert_replays(node.peer().begin(&operation(1)).await, "large");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_answer_too_large_to_look_at_is_not_sent_again() {
    let node = Node::new();
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    node.storage.set(Operation::Complete, Fault::HangAfter);
    // What is there takes too long to arrive as well.
    node.storage.set(Operation::Begin, Fault::Hang);
    let completing = tokio::spawn(claim.complete(answer("large")));
    idle().await;
    node.clock.advance(Duration::from_secs(1));
    assert_eq!(completing.await.unwrap(), Completion::Deferred);
    node.storage.heal(Operation::Complete);
    node.pass(LEASE).await;
    assert_eq!(node.engine.running(), 0);
    assert_replays(node.peer().begin(&operation(1)).await, "large");
    node.storage.heal(Operation::Begin);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn late_answers_count_as_buffered() {
    let node = Node::with(|config| config.max_buffered(1000));
    let budget = node.engine.config().budget.clone();
    node.storage.set(Operation::Complete, Fault::FailBefore);
    node.storage.set(Operation::Renew, Fault::FailBefore);
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let completion = claim.complete(answer("0123456789")).await;
    assert_eq!(completion, Completion::Deferred);
    assert_eq!(budget.used(), 10);
    node.storage.heal(Operation::Complete);
    node.storage.heal(Operation::Renew);
    node.pass(LEASE).await;
    assert_eq!(budget.used(), 0);
    node.assert_quiet().await;
}

// ---- Outages ----

#[tokio::test(start_paused = true)]
async fn ten_thousand_failed_begins_cost_few_releases_and_no_place() {
    const REQUESTS: u32 = 10_000;
    let node = Node::with(|config| config.max_running(10));
    node.storage.set(Operation::Begin, Fault::FailAfter);
    node.storage.set(Operation::Release, Fault::FailBefore);
    for n in 0..REQUESTS {
        let refused = refusal_of(node.engine.begin(&numbered(n)).await);
        assert_eq!(refused.refusal, Refusal::StorageUnavailable, "{n}");
    }
    node.pass(LEASE / 2).await;
    let releases = node.storage.calls(Operation::Release);
    // As many as are told at once before the first fails, and then one now and then.
    assert!((2..100).contains(&releases), "{releases}");
    assert_eq!(node.memory.claims(), REQUESTS as usize);
    node.storage.heal(Operation::Release);
    node.pass(LEASE / 3).await;
    assert_eq!(node.memory.claims(), 0, "each is released once that works");
    let releases = node.storage.calls(Operation::Release) - releases;
    assert!(releases < REQUESTS as usize + 10, "{releases}");
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_late_answers_are_tried_at_a_bounded_pace() {
    const REQUESTS: u32 = 10_000;
    let sleeps = Arc::new(AtomicUsize::new(0));
    let node = Node::with(|config| {
        let env = Env::new(CountedSleeps {
            env: config.env.clone(),
            sleeps: sleeps.clone(),
        });
        config.env(env)
    });
    let mut claims = Vec::new();
    for n in 0..REQUESTS {
        claims.push(claim_of(node.engine.begin(&numbered(n)).await));
    }
    for operation in [Operation::Complete, Operation::Renew] {
        node.storage.set(operation, Fault::FailBefore);
    }
    for claim in claims {
        assert_eq!(claim.complete(answer("one")).await, Completion::Deferred);
    }
    assert_eq!(node.storage.calls(Operation::Complete), REQUESTS as usize);
    let before = node.storage.calls(Operation::Renew);
    node.pass(LEASE / 3).await;
    // The storage is asked what it has, and not sent the answers while it says nothing.
    let renewals = node.storage.calls(Operation::Renew) - before;
    assert!(renewals < 12 * REQUESTS as usize, "{renewals}");
    // The keeper sleeps once for each look at its work, and sees to many outcomes each time.
    let looks = sleeps.load(Ordering::SeqCst);
    assert!(looks < renewals / 10, "{looks} for {renewals}");
    assert_eq!(node.storage.calls(Operation::Complete), REQUESTS as usize);
    for operation in [Operation::Complete, Operation::Renew] {
        node.storage.heal(operation);
    }
    node.pass(LEASE).await;
    assert_eq!(node.engine.running(), 0);
    assert_eq!(node.memory.records(), u64::from(REQUESTS));
    node.assert_quiet().await;
}

/// An environment that counts how often somebody sleeps.
struct CountedSleeps {
    env: Env,
    sleeps: Arc<AtomicUsize>,
}

impl Environment for CountedSleeps {
    fn now(&self) -> Duration {
        self.env.now()
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        self.sleeps.fetch_add(1, Ordering::SeqCst);
        Box::pin(self.env.sleep(duration))
    }

    fn fill_random(&self, buffer: &mut [u8]) {
        self.env.fill_random(buffer);
    }

    fn spawner(&self) -> Option<Spawner> {
        self.env.spawner()
    }
}

#[tokio::test(start_paused = true)]
async fn an_outcome_whose_future_stands_still_is_stored_all_the_same() {
    for drops in [false, true] {
        let node = Node::new();
        let claim = claim_of(node.engine.begin(&operation(1)).await);
        node.storage.set(Operation::Complete, Fault::Hang);
        let mut completing = Box::pin(claim.complete(answer("one")));
        assert!(poll_times(completing.as_mut(), 1).await.is_none());
        node.storage.heal(Operation::Complete);
        // Its runtime is not driven any more.
        node.pass(2 * LEASE).await;
        assert_replays(node.peer().begin(&operation(1)).await, "one");
        if drops {
            drop(completing);
        } else {
            let completion = completing.await;
            assert_eq!(completion, Completion::Lost, "nothing is left to store");
        }
        assert_replays(node.peer().begin(&operation(1)).await, "one");
        node.assert_quiet().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_claim_beside_a_lost_one_is_renewed() {
    let no_wait = LockPolicy::default().timeout(Duration::ZERO);
    let node = Node::with(|config| config.lock(no_wait.clone()));
    let peer = Engine::new(node.memory.clone(), config(&node.env).lock(no_wait));
    let lost = claim_of(node.engine.begin(&operation(1)).await);
    assert!(node.memory.remove(&operation(1).key).await.unwrap());
    let other = claim_of(peer.begin(&operation(1)).await);
    node.pass(LEASE).await;
    assert_eq!(node.events.count("lost"), 1);
    // The keeper has nothing to do for the lost one until `max_hold`.
    let held = claim_of(node.engine.begin(&operation(2)).await);
    for _ in 0..4 {
        node.pass(LEASE / 2).await;
        let refused = refusal_of(peer.begin(&operation(2)).await);
        assert_eq!(refused.refusal, Refusal::InFlight);
    }
    assert_eq!(node.events.count("reclaimed"), 0);
    drop((lost, held));
    other.release().await;
    peer.drain().await;
    node.assert_quiet().await;
}
