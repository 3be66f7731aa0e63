//! The engine on storages that are put together, and without locks on every kind of storage.
//!
//! One thread, tokio's clock paused, the engine and the storages on a simulated one, as in `engine.rs`.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, StatusCode};
use idempotency_axum::{
    AnyStorage, Claim, Completion, Config, Decision, Encoded, EncodedKey, Engine, Entry, Env,
    Fingerprint, IdempotencyLayer, LockPolicy, LockedStorage, MemoryStorage, MokaCache, NearCache,
    Operation, Outcome, ProcessLock, Refusal, SimulatedClock, StoredResponse, TombstoneReason,
};
use idempotency_tests::{Call, Fault, FaultyStorage, Gate, Runs, Server};
use tokio::task::JoinHandle;

const LEASE: Duration = Duration::from_secs(30);
const WAIT: Duration = Duration::from_secs(10);
const TTL: Duration = Duration::from_secs(24 * 3600);

/// Engines in two processes that share what can be shared.
struct Processes {
    name: &'static str,
    here: AnyStorage,
    there: AnyStorage,
    env: Env,
    clock: SimulatedClock,
}

impl Processes {
    /// Every kind of storage.
    fn all() -> [Self; 4] {
        [
            Self::with("memory", |env| {
                let memory = MemoryStorage::builder().env(env.clone()).build();
                [memory.clone(), memory].map(AnyStorage::new)
            }),
            Self::locked(),
            Self::with("locked, in one process", |env| {
                let storage = locked(env, &cache(env), &lock(env));
                [storage.clone(), storage].map(AnyStorage::new)
            }),
            Self::with("near, over locked", |env| {
                let (cache, lock) = (cache(env), lock(env));
                let near = || NearCache::new(locked(env, &cache, &lock)).env(env.clone());
                [near(), near()].map(AnyStorage::new)
            }),
        ]
    }

    fn locked() -> Self {
        Self::with("locked", |env| {
            let (cache, lock) = (cache(env), lock(env));
            [locked(env, &cache, &lock), locked(env, &cache, &lock)].map(AnyStorage::new)
        })
    }

    fn with(name: &'static str, storages: impl FnOnce(&Env) -> [AnyStorage; 2]) -> Self {
        let (env, clock) = Env::simulated(7);
        let [here, there] = storages(&env);
        Self {
            name,
            here,
            there,
            env,
            clock,
        }
    }

    fn here(&self, policy: LockPolicy) -> Engine {
        Engine::new(self.here.clone(), self.config(policy))
    }

    fn there(&self, policy: LockPolicy) -> Engine {
        Engine::new(self.there.clone(), self.config(policy))
    }

    fn config(&self, policy: LockPolicy) -> Config {
        Config::default().env(self.env.clone()).lock(policy)
    }

    /// In steps small enough for every renewal to happen in time.
    async fn pass(&self, time: Duration) {
        let step = LEASE / 30;
        let mut left = time;
        while !left.is_zero() {
            idle().await;
            self.clock.advance(step.min(left));
            left = left.saturating_sub(step);
        }
        idle().await;
    }
}

fn cache(env: &Env) -> MokaCache {
    MokaCache::new().env(env.clone())
}

fn lock(env: &Env) -> ProcessLock {
    ProcessLock::new().env(env.clone())
}

fn locked(
    env: &Env,
    cache: &MokaCache,
    lock: &ProcessLock,
) -> LockedStorage<Arc<MokaCache>, Arc<ProcessLock>> {
    LockedStorage::new(Arc::new(cache.clone()), Arc::new(lock.clone())).env(env.clone())
}

fn waiting() -> LockPolicy {
    LockPolicy::default().timeout(WAIT)
}

/// Returns once every other task waits for something that only the test can give: tokio moves a paused clock only then.
async fn idle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn operation(n: u8) -> Encoded {
    Encoded {
        key: EncodedKey::from_bytes([n; 32]),
        fingerprint: None,
    }
}

fn printed(n: u8, print: u8) -> Encoded {
    Encoded {
        fingerprint: Some(Fingerprint::from_bytes([print; 32])),
        ..operation(n)
    }
}

fn answer(text: &'static str) -> StoredResponse {
    StoredResponse::new(StatusCode::CREATED, &HeaderMap::new(), text)
}

#[track_caller]
fn claim_of(decision: Decision) -> Claim {
    match decision {
        Decision::Execute(claim) => claim,
        other => panic!("expected to execute: {other:?}"),
    }
}

#[track_caller]
fn assert_replays(decision: Decision, text: &'static str) {
    let Decision::Replay(replay) = decision else {
        panic!("expected a replay: {decision:?}");
    };
    assert_eq!(replay.record.outcome, Outcome::Response(answer(text)));
}

#[track_caller]
fn assert_refused(decision: Decision, refusal: Refusal) {
    match decision {
        Decision::Refuse(refused) => assert_eq!(refused.refusal, refusal),
        other => panic!("expected a refusal: {other:?}"),
    }
}

fn begin(engine: &Engine, encoded: Encoded) -> JoinHandle<Decision> {
    let engine = engine.clone();
    tokio::spawn(async move { engine.begin(&encoded).await })
}

// ---- Without locks ----

#[tokio::test(start_paused = true)]
async fn without_locks_duplicates_run_and_the_first_answer_stays() {
    for processes in Processes::all() {
        let name = processes.name;
        let here = processes.here(LockPolicy::disabled());
        let there = processes.there(LockPolicy::disabled());
        let one = claim_of(here.begin(&operation(1)).await);
        let two = claim_of(here.begin(&operation(1)).await);
        let three = claim_of(there.begin(&operation(1)).await);
        assert_eq!(here.get(&operation(1).key).await.unwrap(), None, "{name}");

        assert_eq!(two.complete(answer("two")).await, Completion::Stored);
        assert_eq!(one.complete(answer("one")).await, Completion::Lost);
        assert_eq!(three.complete(answer("three")).await, Completion::Lost);
        for engine in [&here, &there] {
            assert_replays(engine.begin(&operation(1)).await, "two");
            engine.drain().await;
            assert_eq!(engine.running(), 0, "{name}");
        }
        processes.clock.advance(TTL);
        claim_of(here.begin(&operation(1)).await).release().await;
    }
}

#[tokio::test(start_paused = true)]
async fn without_locks_anothers_claim_is_never_overwritten() {
    for processes in Processes::all() {
        let name = processes.name;
        let unlocked = processes.here(LockPolicy::disabled());
        let holder = processes.there(waiting());
        for (n, end) in [(1, "answer"), (2, "tombstone"), (3, "release"), (4, "drop")] {
            let held = claim_of(holder.begin(&operation(n)).await);
            let duplicate = claim_of(unlocked.begin(&operation(n)).await);
            let completion = match end {
                "answer" => Some(duplicate.complete(answer("duplicate")).await),
                "tombstone" => Some(duplicate.tombstone(TombstoneReason::HandlerFailed).await),
                "release" => {
                    duplicate.release().await;
                    None
                }
                _ => {
                    drop(duplicate);
                    None
                }
            };
            assert_ne!(completion, Some(Completion::Stored), "{name}, {end}");
            unlocked.drain().await;

            // The claim is as it was: in the way of others, and renewed.
            processes.pass(2 * LEASE).await;
            let found = holder.get(&operation(n).key).await.unwrap();
            assert!(
                matches!(found, Some(Entry::Claimed { .. })),
                "{name}, {end}"
            );
            assert_eq!(held.complete(answer("held")).await, Completion::Stored);
            assert_replays(unlocked.begin(&operation(n)).await, "held");
            assert_replays(holder.begin(&operation(n)).await, "held");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn without_locks_a_holder_finds_the_answer_that_came_first() {
    for processes in Processes::all() {
        let unlocked = processes.here(LockPolicy::disabled());
        let duplicate = claim_of(unlocked.begin(&operation(1)).await);
        assert_eq!(
            duplicate.complete(answer("first")).await,
            Completion::Stored
        );
        let holder = processes.there(waiting());
        assert_replays(holder.begin(&operation(1)).await, "first");
    }
}

#[tokio::test(start_paused = true)]
async fn without_locks_another_request_under_the_key_is_refused() {
    for processes in Processes::all() {
        let engine = processes.here(LockPolicy::disabled());
        let claim = claim_of(engine.begin(&printed(1, 1)).await);
        assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
        assert_refused(engine.begin(&printed(1, 2)).await, Refusal::KeyReused);
        assert_replays(engine.begin(&printed(1, 1)).await, "one");
        let elsewhere = processes.there(LockPolicy::disabled());
        assert_refused(elsewhere.begin(&printed(1, 2)).await, Refusal::KeyReused);
    }
}

#[tokio::test(start_paused = true)]
async fn without_locks_what_is_not_stored_runs_again_and_leaves_nothing() {
    for processes in Processes::all() {
        let engine = processes.here(LockPolicy::disabled());
        claim_of(engine.begin(&operation(1)).await).release().await;
        drop(claim_of(engine.begin(&operation(1)).await));
        let claim = claim_of(engine.begin(&operation(1)).await);
        let tombstone = claim.tombstone(TombstoneReason::StreamBroken).await;
        assert_eq!(tombstone, Completion::Stored);
        let Decision::Replay(replay) = engine.begin(&operation(1)).await else {
            panic!("a tombstone runs nothing");
        };
        assert_eq!(
            replay.record.outcome,
            Outcome::Tombstone(TombstoneReason::StreamBroken)
        );
        assert!(engine.remove(&operation(1).key).await.unwrap());
        // A key that nothing is left of can be had by one who locks.
        let holder = processes.there(waiting());
        processes.clock.advance(NEAR);
        claim_of(holder.begin(&operation(1)).await).release().await;
        engine.drain().await;
    }
}

/// What is near elsewhere is gone by then.
const NEAR: Duration = Duration::from_secs(60);

// ---- A cache and a lock ----

#[tokio::test(start_paused = true)]
async fn a_duplicate_waits_for_the_original_in_another_process() {
    let processes = Processes::locked();
    let (here, there) = (processes.here(waiting()), processes.there(waiting()));
    let claim = claim_of(here.begin(&operation(1)).await);
    let (local, remote) = (begin(&here, operation(1)), begin(&there, operation(1)));
    idle().await;
    assert!(!local.is_finished() && !remote.is_finished());
    assert_eq!((here.waiting(), there.waiting()), (1, 1));
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(local.await.unwrap(), "one");
    assert_replays(remote.await.unwrap(), "one");

    // And where it does not come to an end.
    let claim = claim_of(here.begin(&operation(2)).await);
    let remote = begin(&there, operation(2));
    processes.pass(WAIT).await;
    assert_refused(remote.await.unwrap(), Refusal::InFlight);
    claim.release().await;
    claim_of(there.begin(&operation(2)).await).release().await;
}

#[tokio::test(start_paused = true)]
async fn a_claim_is_renewed_for_as_long_as_its_operation_runs() {
    let processes = Processes::locked();
    let (here, there) = (
        processes.here(waiting()),
        processes.there(LockPolicy::default()),
    );
    let claim = claim_of(here.begin(&operation(1)).await);
    for _ in 0..10 {
        processes.pass(LEASE / 2).await;
        let duplicate = begin(&there, operation(1));
        processes.pass(LEASE / 30).await;
        assert_refused(duplicate.await.unwrap(), Refusal::InFlight);
    }
    assert_eq!(claim.complete(answer("one")).await, Completion::Stored);
    assert_replays(there.begin(&operation(1)).await, "one");
}

#[tokio::test(start_paused = true)]
async fn a_claim_that_is_not_renewed_is_taken_over_and_its_answer_is_lost() {
    let processes = Processes::locked();
    let storage = FaultyStorage::new(processes.here.clone());
    let here = Engine::new(storage.clone(), processes.config(waiting()));
    let there = processes.there(waiting());
    let late = claim_of(here.begin(&operation(1)).await);
    storage.set(Operation::Renew, Fault::FailBefore);
    processes.pass(LEASE + LEASE / 30).await;
    let successor = claim_of(there.begin(&operation(1)).await);
    assert_eq!(late.complete(answer("late")).await, Completion::Lost);
    assert_eq!(successor.complete(answer("new")).await, Completion::Stored);
    assert_replays(here.begin(&operation(1)).await, "new");
}

#[tokio::test(start_paused = true)]
async fn a_late_answer_is_stored_where_nobody_took_over() {
    let processes = Processes::locked();
    let storage = FaultyStorage::new(processes.here.clone());
    let here = Engine::new(storage.clone(), processes.config(waiting()));
    let late = claim_of(here.begin(&operation(1)).await);
    storage.set(Operation::Renew, Fault::FailBefore);
    processes.pass(2 * LEASE).await;
    assert_eq!(late.complete(answer("late")).await, Completion::Stored);
    assert_replays(
        processes.there(waiting()).begin(&operation(1)).await,
        "late",
    );
}

#[tokio::test(start_paused = true)]
async fn a_removed_claim_is_free_for_others() {
    let processes = Processes::locked();
    let (here, there) = (processes.here(waiting()), processes.there(waiting()));
    let removed = claim_of(here.begin(&operation(1)).await);
    // Elsewhere it can't be seen, and so not be removed.
    assert!(!there.remove(&operation(1).key).await.unwrap());
    assert!(here.remove(&operation(1).key).await.unwrap());
    let next = claim_of(there.begin(&operation(1)).await);
    assert_eq!(removed.complete(answer("removed")).await, Completion::Lost);
    assert_eq!(next.complete(answer("next")).await, Completion::Stored);
}

/// With the layer in front, over TCP: one run, and the same answer for all.
#[tokio::test]
async fn a_handler_runs_once_behind_every_composition() {
    let storages = [
        AnyStorage::new(LockedStorage::new(MokaCache::new(), ProcessLock::new())),
        AnyStorage::new(NearCache::new(LockedStorage::new(
            MokaCache::new(),
            ProcessLock::new(),
        ))),
        AnyStorage::new(NearCache::new(MemoryStorage::new())),
    ];
    for storage in storages {
        let (runs, gate) = (Runs::new(), Gate::new());
        let handler = {
            let (runs, gate) = (runs.clone(), gate.clone());
            async move || {
                let number = runs.next();
                gate.enter().await;
                (StatusCode::CREATED, format!("order {number}"))
            }
        };
        let config = Config::ietf().lock(LockPolicy::default().timeout(3 * LEASE));
        let layer = IdempotencyLayer::enforce(storage.clone()).config(config);
        let router = axum::Router::new()
            .route("/orders", axum::routing::post(handler))
            .layer(layer.clone());
        let server = Server::start(router).await;
        let call = || server.post("/orders").key("abc").body("x");
        let calls: Vec<_> = (0..5).map(|_| Call::start(call())).collect();
        gate.arrived(1).await;
        gate.open(5);
        for call in calls {
            let answer = call.await.unwrap();
            assert_eq!(
                (answer.code(), answer.text()),
                (201, "order 1"),
                "{storage:?}"
            );
        }
        assert!(call().send().await.is_replay());
        assert_eq!(runs.count(), 1);
    }
}
