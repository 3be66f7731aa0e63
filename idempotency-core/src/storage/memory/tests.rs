//! What the public suite can't see: slots, wakes, odd clocks and odd arguments.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::{
    collections::HashSet,
    future::pending,
    pin::pin,
    sync::{
        Barrier, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
    thread,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, StatusCode};

use super::*;
use crate::{Env, Environment, Outcome, Spawner, StoredResponse};

const LEASE: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 3600);

fn now<T>(operation: impl Future<Output = Result<T, StorageError>>) -> T {
    operation
        .now_or_never()
        .expect("an operation is over at its first poll")
        .unwrap()
}

fn poll<F: Future + Unpin>(future: &mut F) -> Poll<F::Output> {
    future.poll_unpin(&mut Context::from_waker(Waker::noop()))
}

fn key(number: u8) -> EncodedKey {
    EncodedKey::from_bytes([number; 32])
}

fn token(number: u8) -> Token {
    Token::from_bytes([number; 16])
}

fn claim(number: u8, lease: Duration) -> NewClaim {
    NewClaim {
        token: token(number),
        fingerprint: None,
        lease,
    }
}

fn response(body: &'static str) -> Record {
    Record {
        fingerprint: None,
        outcome: Outcome::Response(StoredResponse::new(StatusCode::OK, &HeaderMap::new(), body)),
    }
}

fn begin(storage: &MemoryStorage, number: u8, lease: Duration) -> Begin {
    now(storage.begin(&key(1), &claim(number, lease)))
}

/// A call of `wait` for the key that `begin` takes, not yet polled.
fn wait(
    storage: &MemoryStorage,
    timeout: Duration,
) -> impl Future<Output = Result<(), StorageError>> + Unpin {
    Box::pin(async move { storage.wait(&key(1), timeout).await })
}

fn slots(storage: &MemoryStorage) -> usize {
    (0..SHARDS)
        .map(|shard| lease::lock(&storage.0.shards[shard]).slots())
        .sum()
}

/// A clock that can be set, also back.
#[derive(Default)]
struct SetClock(Arc<AtomicU64>);

impl SetClock {
    fn storage(&self) -> MemoryStorage {
        let seconds = self.0.clone();
        let clock = Clock(move || Duration::from_secs(seconds.load(SeqCst)));
        MemoryStorage::builder().env(Env::new(clock)).build()
    }

    fn set(&self, seconds: u64) {
        self.0.store(seconds, SeqCst);
    }
}

/// An environment whose time is what a function says.
struct Clock<N>(N);

impl<N: Fn() -> Duration + Send + Sync + 'static> Environment for Clock<N> {
    fn now(&self) -> Duration {
        (self.0)()
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        Box::pin(pending())
    }

    fn fill_random(&self, buffer: &mut [u8]) {
        buffer.fill(4);
    }

    fn spawner(&self) -> Option<Spawner> {
        None
    }
}

#[test]
fn nothing_stays_of_waiters() {
    let storage = SetClock::default().storage();
    assert_eq!(begin(&storage, 1, LEASE), Begin::Acquired);
    let mut waiters: Vec<_> = (0..10).map(|_| wait(&storage, DAY)).collect();
    assert_eq!(storage.waiters(), 0);
    for waiter in &mut waiters {
        assert!(poll(waiter).is_pending());
    }
    assert_eq!((storage.waiters(), slots(&storage)), (10, 1));

    waiters.truncate(7);
    assert_eq!((storage.waiters(), slots(&storage)), (7, 1));
    assert_eq!(now(storage.release(&key(1), token(1))), Held::Yes);
    assert_eq!((storage.claims(), slots(&storage)), (0, 1));
    drop(waiters);
    assert_eq!((storage.waiters(), slots(&storage)), (0, 0));
    assert_eq!(storage.weight(), 0);

    // The other way round: they leave before the claim does.
    assert_eq!(begin(&storage, 1, LEASE), Begin::Acquired);
    drop(wait(&storage, DAY).now_or_never());
    assert_eq!((storage.waiters(), slots(&storage)), (0, 1));
    assert_eq!(now(storage.release(&key(1), token(1))), Held::Yes);
    assert_eq!(slots(&storage), 0);
}

#[test]
fn a_release_wakes_one_and_a_completion_all() {
    let storage = SetClock::default().storage();
    assert_eq!(begin(&storage, 1, LEASE), Begin::Acquired);
    let mut waiters: Vec<_> = (0..4).map(|_| wait(&storage, DAY)).collect();
    for waiter in &mut waiters {
        assert!(poll(waiter).is_pending());
    }
    assert_eq!(now(storage.release(&key(1), token(1))), Held::Yes);
    let mut left = Vec::new();
    for mut waiter in waiters {
        if poll(&mut waiter).is_pending() {
            left.push(waiter);
        }
    }
    assert_eq!(left.len(), 3);

    // One that is woken and finds another claim goes on to wait.
    assert_eq!(begin(&storage, 2, LEASE), Begin::Acquired);
    assert_eq!(now(storage.release(&key(1), token(2))), Held::Yes);
    assert_eq!(begin(&storage, 3, LEASE), Begin::Acquired);
    for waiter in &mut left {
        assert!(poll(waiter).is_pending());
    }
    let held = now(storage.complete(&key(1), token(3), &response("done"), DAY));
    assert_eq!(held, Held::Yes);
    for waiter in &mut left {
        assert!(poll(waiter).is_ready());
    }
    drop(left);
    assert_eq!((storage.waiters(), slots(&storage)), (0, 0));
}

/// Its caller may have stopped waiting too. The key is free, so somebody should learn of it.
#[test]
fn a_waiter_whose_time_is_over_passes_its_wake_on() {
    let clock = SetClock::default();
    let storage = clock.storage();
    assert_eq!(begin(&storage, 1, DAY), Begin::Acquired);
    let mut short = wait(&storage, LEASE);
    let mut long = wait(&storage, DAY);
    assert!(poll(&mut short).is_pending());
    assert!(poll(&mut long).is_pending());
    clock.set(LEASE.as_secs());
    assert_eq!(now(storage.release(&key(1), token(1))), Held::Yes);
    assert!(poll(&mut long).is_pending());
    assert!(poll(&mut short).is_ready());
    assert!(poll(&mut long).is_ready());
}

#[test]
fn a_shorter_lease_wakes_who_slept_for_the_longer() {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env).build();
    assert_eq!(begin(&storage, 1, DAY), Begin::Acquired);
    let mut waiter = wait(&storage, DAY);
    assert!(poll(&mut waiter).is_pending());
    assert_eq!(now(storage.renew(&key(1), token(1), LEASE)), Held::Yes);
    assert!(poll(&mut waiter).is_pending());
    clock.advance(LEASE);
    assert!(poll(&mut waiter).is_ready());
}

/// The first claim was released, but another of those who waited learnt of that.
#[test]
fn a_claim_that_ends_before_the_one_before_it_wakes_who_slept_for_that() {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env).build();
    assert_eq!(begin(&storage, 1, DAY), Begin::Acquired);
    let mut told = wait(&storage, DAY);
    let mut asleep = wait(&storage, DAY);
    assert!(poll(&mut told).is_pending());
    assert!(poll(&mut asleep).is_pending());
    assert_eq!(now(storage.release(&key(1), token(1))), Held::Yes);
    assert!(poll(&mut told).is_ready());
    assert_eq!(begin(&storage, 2, LEASE), Begin::Acquired);
    assert!(poll(&mut asleep).is_pending());
    clock.advance(LEASE);
    assert!(poll(&mut asleep).is_ready());
}

#[test]
fn a_repeated_begin_never_shortens_the_lease() {
    let clock = SetClock::default();
    let storage = clock.storage();
    assert_eq!(begin(&storage, 1, DAY), Begin::Acquired);
    assert_eq!(begin(&storage, 1, LEASE), Begin::Acquired);
    clock.set(LEASE.as_secs());
    assert!(matches!(
        begin(&storage, 2, LEASE),
        Begin::InFlight { lease_left: Some(left), .. } if left == DAY - LEASE
    ));
}

#[test]
fn a_claim_that_is_over_is_no_longer_its_holders() {
    let clock = SetClock::default();
    let storage = clock.storage();
    assert_eq!(begin(&storage, 1, LEASE), Begin::Acquired);
    clock.set(LEASE.as_secs());
    assert_eq!(now(storage.renew(&key(1), token(1), LEASE)), Held::Lost);
    assert_eq!(now(storage.release(&key(1), token(1))), Held::Lost);
    assert_eq!((storage.claims(), slots(&storage)), (0, 0));
}

#[test]
fn odd_durations() {
    let storage = SetClock::default().storage();
    // No lease at all: acquired, and over at once.
    assert_eq!(begin(&storage, 1, Duration::ZERO), Begin::Acquired);
    assert_eq!(begin(&storage, 2, Duration::ZERO), Begin::Acquired);
    assert_eq!(now(storage.get(&key(1))), None);
    let held = now(storage.complete(&key(1), token(1), &response("x"), Duration::ZERO));
    assert_eq!(held, Held::Yes);
    assert_eq!(now(storage.get(&key(1))), None);
    assert!(!now(storage.remove(&key(1))));

    assert_eq!(begin(&storage, 3, Duration::MAX), Begin::Acquired);
    assert_eq!(
        now(storage.renew(&key(1), token(3), Duration::MAX)),
        Held::Yes
    );
    now(storage.wait(&key(1), Duration::ZERO));
    assert!(
        storage
            .wait(&key(1), Duration::MAX)
            .now_or_never()
            .is_none()
    );
    let held = now(storage.complete(&key(1), token(3), &response("x"), Duration::MAX));
    assert_eq!(held, Held::Yes);
    assert_eq!(begin(&storage, 4, LEASE), Begin::Completed(response("x")));
}

#[test]
fn a_clock_that_goes_back_corrupts_nothing() {
    let clock = SetClock::default();
    let storage = clock.storage();
    for (at, seconds) in (0..).zip([1000, 10, 1_000_000, 0, u64::MAX, 5, 100_000]) {
        clock.set(seconds);
        for number in 0..100 {
            let (key, token) = (key(number), token(number));
            let claim = claim(number, LEASE);
            match now(storage.begin(&key, &claim)) {
                Begin::Acquired if (number + at) % 3 == 0 => {
                    assert_eq!(now(storage.renew(&key, token, DAY)), Held::Yes);
                }
                Begin::Acquired => {
                    let held = now(storage.complete(&key, token, &response("x"), LEASE));
                    assert_eq!(held, Held::Yes);
                }
                Begin::InFlight { .. } => unreachable!("the token is the key's own"),
                Begin::Completed(record) => now(storage.replace(&key, &record, DAY)),
            }
        }
        assert!(storage.records() + storage.claims() as u64 <= 100);
    }
    for number in 0..100 {
        now(storage.remove(&key(number)));
    }
    assert_eq!(
        (storage.records(), storage.claims(), storage.weight()),
        (0, 0, 0)
    );
    assert_eq!(slots(&storage), 0);
}

#[test]
fn observers_may_call_the_storage() {
    let own: Arc<OnceLock<MemoryStorage>> = Arc::default();
    let seen = Arc::new(AtomicU64::new(0));
    let storage = MemoryStorage::builder()
        .max_bytes(10_000)
        .observer({
            let (own, seen) = (own.clone(), seen.clone());
            move |event: &Event<'_>| {
                let storage = own.get().unwrap();
                let Event::Evicted { key, total } = event else {
                    return;
                };
                assert_eq!(now(storage.get(key)), None);
                assert!(storage.evicted() >= *total && storage.claims() <= 1);
                seen.fetch_add(1, SeqCst);
            }
        })
        .build();
    own.set(storage.clone()).unwrap();
    for number in 0..=255 {
        let held = now(storage.complete(&key(number), token(1), &response("x"), DAY));
        assert_eq!(held, Held::Yes);
    }
    assert!(storage.evicted() > 200);
    assert!((2..=9).contains(&seen.load(SeqCst)), "{seen:?}");
}

/// The engine's observers are heard in the same way, see `Observers`.
#[test]
fn an_observer_that_panics_fails_no_call() {
    let seen = Arc::new(AtomicU64::new(0));
    let storage = MemoryStorage::builder()
        .max_bytes(0)
        .observer(|_: &Event<'_>| panic!("an observer of a user's"))
        .observer({
            let seen = seen.clone();
            move |_: &Event<'_>| {
                seen.fetch_add(1, SeqCst);
            }
        })
        .build();
    let held = now(storage.complete(&key(1), token(1), &response("too large"), DAY));
    assert_eq!(held, Held::Yes);
    assert!(matches!(
        begin(&storage, 2, LEASE),
        Begin::Completed(Record {
            outcome: Outcome::Tombstone(_),
            ..
        })
    ));
    assert_eq!(seen.load(SeqCst), 1, "the observer after it hears nothing");
}

/// What is evicted is what was not used for longest, not what is new.
#[test]
fn new_and_used_records_stay() {
    let storage = MemoryStorage::builder().max_bytes(200_000).build();
    let key = |number: u16| {
        let mut bytes = [0; 32];
        bytes[30..].copy_from_slice(&number.to_be_bytes());
        EncodedKey::from_bytes(bytes)
    };
    for number in 0..2_000 {
        let held = now(storage.complete(&key(number), token(1), &response("x"), DAY));
        assert_eq!(held, Held::Yes);
        for kept in [number, 0] {
            let entry = now(storage.get(&key(kept)));
            assert!(entry.is_some(), "{kept} is gone after {number}");
        }
    }
    assert!(storage.evicted() > 1_500);
}

/// moka keeps what it evicted until no thread can be reading it any more, which may be after the storage is gone. Whose thread drops it
/// then may hold any lock of the user's.
#[test]
fn a_record_that_outlives_its_storage_calls_nothing_of_the_users() {
    let is_gone = Arc::new(AtomicBool::new(false));
    let gone = is_gone.clone();
    let clock = Clock(move || {
        assert!(!gone.load(SeqCst), "a clock is asked after its storage");
        Duration::from_secs(1)
    });
    let fill = |storage: &MemoryStorage| {
        for number in 0..=255 {
            let held = now(storage.complete(&key(number), token(1), &response("x"), DAY));
            assert_eq!(held, Held::Yes);
        }
    };

    let observed = Arc::new(());
    let seen = observed.clone();
    let storage = MemoryStorage::builder()
        .max_bytes(10_000)
        .env(Env::new(clock))
        .observer(move |_: &Event<'_>| assert!(Arc::strong_count(&seen) > 1))
        .build();
    let (reads, has_read) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| {
        scope.spawn(|| {
            // As a call of moka's does for as long as it reads.
            let _pinned = crossbeam_epoch::pin();
            reads.wait();
            has_read.wait();
        });
        reads.wait();
        fill(&storage);
        assert!(storage.records() > 200, "nothing is dropped yet");
        drop(storage);
        assert_eq!(Arc::strong_count(&observed), 1);
        is_gone.store(true, SeqCst);
        has_read.wait();
    });
    // It drops what the other one left.
    fill(&MemoryStorage::builder().max_bytes(10_000).build());
}

/// Where little happens, moka would evict in the middle of an operation, and what it evicts would stay with that thread.
#[test]
fn what_is_over_the_limit_leaves_in_time_however_little_it_is() {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env).max_bytes(1_000_000);
    let storage = storage.build();
    let complete = |number: u16| {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&number.to_be_bytes());
        let key = EncodedKey::from_bytes(bytes);
        let held = now(storage.complete(&key, token(1), &response("x"), DAY));
        assert_eq!(held, Held::Yes);
    };
    (0..2_000).for_each(complete);
    let before = storage.evicted();
    assert!(before > 0);
    (2_000..2_010).for_each(complete);
    clock.advance(Duration::from_millis(200));
    assert_eq!(now(storage.get(&key(1))), None);
    // Its counts are not asked for: moka would catch up first.
    let shown = format!("{storage:?}");
    assert!(
        shown.contains(&format!("evicted: {}", before + 10)),
        "{before}: {shown}"
    );
}

/// Those that were evicted have no place among the expiries any more, so nothing can be told by them.
#[test]
fn each_expires_at_its_time_also_among_evicted_ones() {
    const HOUR: Duration = Duration::from_secs(3600);
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env).max_bytes(100_000);
    let storage = storage.build();
    let key = |number: u16| {
        let mut bytes = [0; 32];
        // All in one shard.
        bytes[1..3].copy_from_slice(&number.to_be_bytes());
        EncodedKey::from_bytes(bytes)
    };
    let ttl = |number: u16| HOUR * (1 + u32::from(number) * 7 % 5);
    for number in 0..1_000 {
        let held = now(storage.complete(&key(number), token(1), &response("x"), ttl(number)));
        assert_eq!(held, Held::Yes);
        // These stay, between the others that are evicted.
        for used in (0..number).step_by(10).take(20) {
            assert!(now(storage.get(&key(used))).is_some(), "{used}");
        }
    }
    assert!(storage.evicted() > 500);
    let mut kept: Vec<u16> = (0..1_000)
        .filter(|number| now(storage.get(&key(*number))).is_some())
        .collect();
    for hours in 1..=5 {
        assert_eq!(storage.records(), kept.len() as u64, "after {hours} hours");
        clock.advance(HOUR);
        kept.retain(|number| ttl(*number) > HOUR * hours);
    }
    assert_eq!((storage.records(), storage.weight()), (0, 0));
}

#[test]
fn clones_share_and_debug_counts() {
    let storage = MemoryStorage::default();
    assert_eq!(begin(&storage.clone(), 0xab, LEASE), Begin::Acquired);
    let held = now(storage.complete(&key(2), token(2), &response("sesame"), DAY));
    assert_eq!(held, Held::Yes);
    let shown = format!("{storage:?}");
    assert!(
        shown.contains("max_bytes: 67108864, when_full: Evict"),
        "{shown}"
    );
    assert!(
        shown.contains("records: 1, claims: 1, waiters: 0, evicted: 0"),
        "{shown}"
    );
    assert!(
        !shown.contains("sesame") && !shown.contains("abab"),
        "{shown}"
    );
}

#[test]
fn keys_that_count_use_all_shards() {
    let shards: HashSet<_> = (0..64_u64)
        .map(|number| {
            let mut bytes = [0; 32];
            bytes[24..].copy_from_slice(&number.to_be_bytes());
            shard_of(&EncodedKey::from_bytes(bytes))
        })
        .collect();
    assert_eq!(shards.len(), SHARDS);
}

/// Dropped before its first poll, a call has not happened.
#[test]
fn a_call_happens_when_it_is_polled() {
    let storage = MemoryStorage::new();
    drop(storage.begin(&key(1), &claim(1, LEASE)));
    assert_eq!(storage.claims(), 0);
    let (key, first) = (key(1), claim(1, LEASE));
    let mut call = pin!(storage.begin(&key, &first));
    assert_eq!(storage.claims(), 0);
    assert!(matches!(poll(&mut call), Poll::Ready(Ok(Begin::Acquired))));
    assert_eq!(storage.claims(), 1);
}
