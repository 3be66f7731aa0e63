//! Storages against a plain model, by calls that nobody thought of.
//!
//! [`calls`] makes up sequences of calls over a few keys and tokens, with leases and TTLs that end exactly when the clock gets
//! there, a nanosecond before, or never. [`model`] says what the rules of `Storage` allow as answers: it is written from them,
//! and shares no line with any storage. A sequence that is answered otherwise is shortened until nothing can be left out of it,
//! and shown.

#![cfg(all(feature = "memory", feature = "conformance"))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod calls;
mod model;

mod waiting;

use std::time::Duration;

use futures_util::FutureExt as _;
use idempotency_core::{
    Env, LockedStorage, MemoryStorage, MokaCache, ProcessLock, SimulatedClock, Storage,
    StorageError, StorageErrorKind, TombstoneReason, WhenFull,
};
use proptest::prelude::*;

use self::{
    calls::{Call, Content},
    model::{Answer, Model, Room},
    waiting::Waiters,
};

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 1_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// What all calls here allow: no part of these storages has anything to wait for.
fn now<T>(call: impl Future<Output = T>) -> T {
    call.now_or_never().expect("the call is over")
}

/// Runs `call` on `storage`, as far as it is one of a storage.
fn ask<S: Storage>(storage: &S, call: &Call) -> Answer {
    let answer = match call {
        Call::Begin { key, claim } => now(storage.begin(key, claim)).map(Answer::Begin),
        Call::Complete {
            key,
            token,
            content,
            ttl,
        } => now(storage.complete(key, *token, &content.record(), *ttl)).map(Answer::Held),
        Call::Renew { key, token, lease } => {
            now(storage.renew(key, *token, *lease)).map(Answer::Held)
        }
        Call::Release { key, token, .. } => now(storage.release(key, *token)).map(Answer::Held),
        Call::Get { key } => now(storage.get(key)).map(Answer::Entry),
        Call::Replace { key, content, ttl } => {
            now(storage.replace(key, &content.record(), *ttl)).map(|()| Answer::Nothing)
        }
        Call::Remove { key } => now(storage.remove(key)).map(Answer::Removed),
        Call::Wait { .. } | Call::Leave { .. } | Call::Advance { .. } => Ok(Answer::Nothing),
    };
    answer.unwrap_or_else(|error: StorageError| {
        assert_eq!(error.kind(), StorageErrorKind::Full, "{call:?}");
        Answer::Full
    })
}

/// Runs `calls` on `storage` and on `model`, and compares what they answer, who is woken and, by `assert_counts`, what is left.
fn compare<S: Storage + Clone>(
    storage: &S,
    clock: &SimulatedClock,
    mut model: Model,
    calls: &[Call],
    assert_counts: impl Fn(&S, &Model, usize),
) {
    let mut waiters = Waiters::new();
    for call in calls {
        if let Call::Advance { by } = call {
            clock.advance(*by);
        }
        let answer = ask(storage, call);
        let (expected, end) = model.answer(call);
        assert_eq!(answer, expected, "{call:?}");
        match call {
            Call::Wait { key, timeout } => waiters.wait(storage, *key, *timeout, &model),
            Call::Leave { who } | Call::Release { leaves: who, .. } => waiters.leave(*who),
            _ => {}
        }
        waiters.assert_woken(end, &model);
        assert_counts(storage, &model, waiters.len());
    }
    drop(waiters);
    clock.advance(Duration::MAX);
    model.answer(&Call::Advance { by: Duration::MAX });
    assert_eq!((model.claims(), model.records().len()), (0, 0));
    assert_counts(storage, &model, 0);
}

/// What an empty record and a claim weigh in a [`MemoryStorage`]. Their numbers are no promise; that they stay the same is.
fn weights() -> (u64, u64) {
    let (env, _clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env).build();
    let begin = Call::begin(0, 0, None, Duration::MAX);
    ask(&storage, &begin);
    let claim = storage.weight();
    ask(
        &storage,
        &Call::complete(0, 0, Content::Tombstone, Duration::MAX),
    );
    (storage.weight(), claim)
}

fn memory(when_full: WhenFull, room: Room, calls: &[Call]) {
    let (record_weight, claim_weight) = weights();
    let weight = move |model: &Model| {
        let records = model.records();
        let bytes: usize = records.iter().map(|record| record.weight()).sum();
        bytes as u64 + records.len() as u64 * record_weight + model.claims() as u64 * claim_weight
    };
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder()
        .env(env)
        .max_bytes(calls::ROOM)
        .when_full(when_full)
        .build();
    let model = Model::new(room, move |model| weight(model) >= calls::ROOM as u64);
    compare(&storage, &clock, model, calls, |storage, model, waiting| {
        assert_eq!(storage.claims(), model.claims());
        assert_eq!(storage.records(), model.records().len() as u64);
        assert_eq!(storage.weight(), weight(model));
        assert_eq!(storage.waiters(), waiting);
        assert_eq!(storage.evicted(), 0);
    });
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn memory_storage_that_evicts(calls in calls::any()) {
        memory(WhenFull::Evict, Room::Tombstones(TombstoneReason::ResponseTooLarge), &calls);
    }

    #[test]
    fn memory_storage_that_refuses(calls in calls::any()) {
        memory(WhenFull::Refuse, Room::RefusesNewKeys, &calls);
    }

    #[test]
    fn locked_storage(calls in calls::any()) {
        let (env, clock) = Env::simulated(1);
        let cache = MokaCache::new().env(env.clone()).max_bytes(calls::ROOM);
        let lock = ProcessLock::new().env(env.clone());
        let storage = LockedStorage::new(cache, lock).env(env);
        let model = Model::new(Room::Tombstones(TombstoneReason::NoRoom), |_| false);
        compare(&storage, &clock, model, &calls, |storage, model, _| {
            assert_eq!(storage.claims(), model.claims());
            assert_eq!(storage.lock().locked(), model.claims());
            assert_eq!(storage.cache().evicted(), 0);
        });
    }
}
