//! What `MemoryStorage` holds on the heap, and what it does at its limit.
//!
//! This binary counts what is allocated, by whichever thread, so its tests take turns.

#![cfg(all(feature = "memory", feature = "conformance"))]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ops::Range,
    sync::{
        Arc, Barrier, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use idempotency_core::{
    Begin, EncodedKey, Entry, Env, Event, Held, MemoryStorage, NewClaim, Outcome, Record, Storage,
    StorageError, StorageErrorKind, StoredResponse, Token, TombstoneReason, WhenFull,
};
use tokio::task::JoinSet;

/// Bytes that were asked for and not given back.
static LIVE: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Counting;

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), SeqCst);
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), SeqCst);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        LIVE.fetch_add(new_size, SeqCst);
        LIVE.fetch_sub(layout.size(), SeqCst);
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, new_size) }
    }
}

/// One test at a time: another's allocations would count.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

const DAY: Duration = Duration::from_secs(24 * 3600);
const LEASE: Duration = Duration::from_secs(30);

/// What every operation but `wait` allows.
fn now<T>(operation: impl Future<Output = Result<T, StorageError>>) -> Result<T, StorageError> {
    operation
        .now_or_never()
        .expect("an operation of `MemoryStorage` is over at its first poll")
}

/// SplitMix64.
fn scramble(seed: u64) -> u64 {
    let z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn key(number: u64) -> EncodedKey {
    let mut bytes = [0; 32];
    for (at, word) in bytes.chunks_mut(8).enumerate() {
        word.copy_from_slice(&scramble(number * 4 + at as u64).to_be_bytes());
    }
    EncodedKey::from_bytes(bytes)
}

fn token(number: u64) -> Token {
    Token::from_bytes((u128::from(number) + 1).to_be_bytes())
}

fn claim(number: u64) -> NewClaim {
    NewClaim {
        token: token(number),
        fingerprint: None,
        lease: LEASE,
    }
}

fn response(body: Vec<u8>) -> Record {
    let mut headers = HeaderMap::new();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    Record {
        fingerprint: None,
        outcome: Outcome::Response(StoredResponse::new(StatusCode::CREATED, &headers, body)),
    }
}

/// Many small answers, some empty, a few of up to 64 KiB.
fn mixed(number: u64) -> usize {
    let random = scramble(number ^ 0x5eed);
    let most = match random % 20 {
        0 | 1 => 1,
        2..14 => 1 << 10,
        14..19 => 8 << 10,
        _ => (64 << 10) + 1,
    };
    (random >> 32) as usize % most
}

/// How much the heap has grown since `before`.
fn grown(before: usize) -> usize {
    LIVE.load(SeqCst).saturating_sub(before)
}

/// Completes the operations `numbers`, on two threads.
fn run(storage: &MemoryStorage, numbers: Range<u64>, size: fn(u64) -> usize) {
    let middle = u64::midpoint(numbers.start, numbers.end);
    thread::scope(|scope| {
        for part in [numbers.start..middle, middle..numbers.end] {
            scope.spawn(move || {
                for number in part {
                    let key = key(number);
                    // The claim makes no difference to what is left, and takes time.
                    if number % 8 == 0 {
                        let begin = now(storage.begin(&key, &claim(number))).unwrap();
                        assert_eq!(begin, Begin::Acquired);
                    }
                    let record = response(vec![7; size(number)]);
                    let held = now(storage.complete(&key, token(number), &record, DAY)).unwrap();
                    assert_eq!(held, Held::Yes);
                }
            });
        }
    });
}

/// Runs `operations`, and checks after each tenth that the heap has not grown beyond 1.2 times `max_bytes`.
fn assert_bounded(
    storage: &MemoryStorage,
    before: usize,
    max_bytes: usize,
    operations: u64,
    size: fn(u64) -> usize,
) {
    let step = operations / 10;
    for round in 0..10 {
        run(storage, round * step..(round + 1) * step, size);
        let grown = grown(before);
        assert!(
            grown as f64 <= 1.2 * max_bytes as f64,
            "{grown} bytes on the heap after {} operations, for max_bytes({max_bytes})",
            (round + 1) * step
        );
    }
    assert_eq!(
        storage.records() + storage.evicted(),
        operations,
        "a record is neither there nor counted as evicted"
    );
}

#[test]
fn a_million_records_stay_within_the_limit_and_spare_the_running_claim() {
    let _turn = turn();
    const MAX_BYTES: usize = 16 << 20;
    let told = Arc::new(Mutex::new(Vec::new()));
    let (env, _clock) = Env::simulated(1);
    let before = LIVE.load(SeqCst);
    let storage = MemoryStorage::builder()
        .max_bytes(MAX_BYTES)
        .env(env)
        .observer({
            let told = told.clone();
            move |event: &Event<'_>| {
                if let Event::Evicted { total, .. } = event {
                    told.lock().unwrap().push(*total);
                }
            }
        })
        .build();

    let running = u64::MAX / 8;
    let begin = now(storage.begin(&key(running), &claim(running))).unwrap();
    assert_eq!(begin, Begin::Acquired);

    assert_bounded(&storage, before, MAX_BYTES, 1_000_000, mixed);

    let entry = now(storage.get(&key(running))).unwrap();
    assert!(matches!(entry, Some(Entry::Claimed { .. })), "{entry:?}");
    let record = response(b"at last".to_vec());
    let held = now(storage.complete(&key(running), token(running), &record, DAY)).unwrap();
    assert_eq!(held, Held::Yes);
    let begin = now(storage.begin(&key(running), &claim(0))).unwrap();
    assert_eq!(begin, Begin::Completed(record));

    let told = told.lock().unwrap();
    // moka evicts in batches, so the first time there may be more than one.
    assert!(told[0] >= 1);
    assert!(
        told.windows(2).all(|pair| pair[1] >= 2 * pair[0]),
        "{told:?}"
    );
    assert!(told.last().unwrap() * 2 > storage.evicted(), "{told:?}");
}

/// Here the overhead is all.
#[test]
fn empty_bodies_stay_within_the_limit() {
    let _turn = turn();
    for mib in [4, 32] {
        let before = LIVE.load(SeqCst);
        let storage = MemoryStorage::builder().max_bytes(mib << 20).build();
        assert_bounded(&storage, before, mib << 20, 100_000, |_| 0);
        assert!(storage.evicted() > 0);
    }
}

/// Here it is what moka has not looked at yet, and what its epochs keep of what is evicted: 64 answers of 64 KiB are as much
/// as the whole limit.
#[test]
fn large_bodies_stay_within_a_small_limit() {
    let _turn = turn();
    const MAX_BYTES: usize = 4 << 20;
    const THREADS: u64 = 8;
    let before = LIVE.load(SeqCst);
    let storage = MemoryStorage::builder().max_bytes(MAX_BYTES).build();
    let step = Barrier::new(THREADS as usize);
    let most = AtomicUsize::new(0);
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (storage, step, most) = (&storage, &step, &most);
            scope.spawn(move || {
                for number in 0..300 {
                    let number = thread * 300 + number;
                    let record = response(vec![7; 64 << 10]);
                    let held = now(storage.complete(&key(number), token(number), &record, DAY));
                    assert_eq!(held.unwrap(), Held::Yes);
                    drop(record);
                    if number % 10 == 0 {
                        step.wait();
                        most.fetch_max(grown(before), SeqCst);
                        step.wait();
                    }
                }
            });
        }
    });
    let most = most.into_inner();
    assert!(most as f64 <= 1.2 * MAX_BYTES as f64, "{most}");
    assert!(storage.evicted() > 0);
}

/// A thread that is taken off its core inside of moka keeps the others from dropping what has left, so they must not go on as if it
/// were dropped.
#[test]
fn more_threads_than_cores_stay_within_the_limit() {
    let _turn = turn();
    const MAX_BYTES: usize = 64 << 20;
    const THREADS: u64 = 16;
    const LEN: usize = 256 << 10;
    let record = response(vec![7; LEN]);
    let put = |storage: &MemoryStorage, number: u64| {
        let held = now(storage.complete(&key(number), token(number), &record, DAY));
        assert_eq!(held.unwrap(), Held::Yes);
    };
    type Load<'a> = &'a (dyn Fn(&MemoryStorage, u64) + Sync);
    let loads: [Load<'_>; 3] = [
        &put,
        &|storage, number| {
            put(storage, number);
            assert!(now(storage.remove(&key(number))).unwrap());
        },
        &|storage, number| {
            let number = number % THREADS;
            if now(storage.get(&key(number))).unwrap().is_none() {
                let _ = now(storage.complete(&key(number), token(0), &record, DAY)).unwrap();
            }
            now(storage.replace(&key(number), &record, DAY)).unwrap();
        },
    ];
    for when_full in [WhenFull::Evict, WhenFull::Refuse] {
        // Where nothing is evicted, nothing refuses what is completed.
        let first = usize::from(when_full == WhenFull::Refuse);
        for load in &loads[first..] {
            let before = LIVE.load(SeqCst);
            let storage = MemoryStorage::builder()
                .max_bytes(MAX_BYTES)
                .when_full(when_full)
                .build();
            let most = AtomicUsize::new(0);
            thread::scope(|scope| {
                for thread in 0..THREADS {
                    let (storage, most) = (&storage, &most);
                    scope.spawn(move || {
                        for number in 0..300 {
                            load(storage, thread + THREADS * number);
                            most.fetch_max(grown(before), SeqCst);
                        }
                    });
                }
            });
            // Each may be at work with one more.
            let most = most.into_inner().saturating_sub(THREADS as usize * LEN);
            assert!(most as f64 <= 1.2 * MAX_BYTES as f64, "{most}");
        }
    }
}

/// moka before the fix of its issue 590 stopped evicting for ever when keys came again under its LRU policy.
#[test]
fn keys_that_come_again_do_not_stop_eviction() {
    let _turn = turn();
    const MAX_BYTES: usize = 4 << 20;
    let before = LIVE.load(SeqCst);
    let storage = MemoryStorage::builder().max_bytes(MAX_BYTES).build();
    thread::scope(|scope| {
        for thread in 0..8_u64 {
            let storage = &storage;
            scope.spawn(move || {
                for step in 0..5_000 {
                    let dice = scramble(thread << 32 | step);
                    // Twice as many as there is room for.
                    let key = key(dice % 800);
                    let record = response(vec![7; 10 << 10]);
                    match dice >> 32 & 7 {
                        0 => drop(now(storage.remove(&key)).unwrap()),
                        1 | 2 => now(storage.replace(&key, &record, DAY)).unwrap(),
                        _ => {
                            let _ = now(storage.complete(&key, token(dice), &record, DAY)).unwrap();
                        }
                    }
                }
            });
        }
    });
    assert!(storage.evicted() > 0);
    assert!(
        storage.weight() as f64 <= 1.05 * MAX_BYTES as f64,
        "{storage:?}"
    );
    assert!(
        grown(before) as f64 <= 1.2 * MAX_BYTES as f64,
        "{}",
        grown(before)
    );
    for number in 0..800 {
        now(storage.remove(&key(number))).unwrap();
    }
    assert_eq!((storage.records(), storage.weight()), (0, 0));
}

/// A reader makes moka and `Bytes` allocate too.
#[test]
fn records_that_are_read_stay_within_the_limit() {
    let _turn = turn();
    const MAX_BYTES: usize = 8 << 20;
    let before = LIVE.load(SeqCst);
    let storage = MemoryStorage::builder().max_bytes(MAX_BYTES).build();
    for round in 0..10 {
        let numbers = round * 5_000..(round + 1) * 5_000;
        run(&storage, numbers.clone(), |number| number as usize % 100);
        for number in numbers {
            let _ = now(storage.get(&key(number))).unwrap();
        }
        let grown = grown(before);
        assert!(grown as f64 <= 1.2 * MAX_BYTES as f64, "{grown}");
    }
}

/// The record that expires first stays, as it is used all the time. The evicted ones leave nothing behind it.
#[test]
fn records_behind_a_used_one_give_their_memory_back() {
    let _turn = turn();
    const MAX_BYTES: usize = 8 << 20;
    let before = LIVE.load(SeqCst);
    let storage = MemoryStorage::builder().max_bytes(MAX_BYTES).build();
    run(&storage, 0..1_000, |_| 0);
    for round in 1..100 {
        run(&storage, round * 1_000..(round + 1) * 1_000, |_| 0);
        for number in 0..1_000 {
            assert!(now(storage.get(&key(number))).unwrap().is_some());
        }
        let grown = grown(before);
        assert!(grown as f64 <= 1.2 * MAX_BYTES as f64, "{grown}");
    }
    assert!(storage.evicted() > 50_000);
}

#[test]
fn claims_weigh_what_they_take() {
    let _turn = turn();
    let before = LIVE.load(SeqCst);
    let storage = MemoryStorage::new();
    for number in 0..100_000 {
        let begin = now(storage.begin(&key(number), &claim(number))).unwrap();
        assert_eq!(begin, Begin::Acquired);
        if [1_000, 29_000, 60_000, 99_999].contains(&number) {
            let (grown, weight) = (grown(before) as u64, storage.weight());
            assert!(grown <= weight + (64 << 10), "{grown} for {weight}");
            assert!(grown >= weight / 3, "{grown} for {weight}");
        }
    }
}

/// A `Bytes` may be a part of a buffer that is much larger than the answer.
#[test]
fn a_small_part_does_not_keep_a_large_buffer() {
    let _turn = turn();
    let storage = MemoryStorage::new();
    let before = LIVE.load(SeqCst);
    for number in 0..20 {
        let buffer = Bytes::from(vec![7; 1 << 20]);
        let record = Record {
            fingerprint: None,
            outcome: Outcome::Response(StoredResponse::new(
                StatusCode::OK,
                &HeaderMap::new(),
                buffer.slice(10..20),
            )),
        };
        let held = now(storage.complete(&key(number), token(number), &record, DAY)).unwrap();
        assert_eq!(held, Held::Yes);
    }
    assert!(grown(before) < 1 << 20, "{}", grown(before));
}

/// moka keeps what it removed in its queues and epochs for a while. Bodies must not be in there: they are what weighs.
#[test]
fn a_removed_body_is_gone_at_once() {
    let _turn = turn();
    let storage = MemoryStorage::new();
    let before = LIVE.load(SeqCst);
    for number in 0..20 {
        let record = response(vec![7; 1 << 20]);
        let held = now(storage.complete(&key(number), token(number), &record, DAY)).unwrap();
        assert_eq!(held, Held::Yes);
        if number % 2 == 0 {
            now(storage.replace(&key(number), &response(Vec::new()), DAY)).unwrap();
        } else {
            assert!(now(storage.remove(&key(number))).unwrap());
        }
        drop(record);
        assert!(grown(before) < 1 << 18, "{}", grown(before));
    }
}

#[test]
fn what_expired_gives_its_memory_back() {
    let _turn = turn();
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env).build();
    let before = LIVE.load(SeqCst);
    run(&storage, 0..10_000, |_| 1000);
    // Holders that died.
    for number in 10_000..20_000 {
        let begin = now(storage.begin(&key(number), &claim(number))).unwrap();
        assert_eq!(begin, Begin::Acquired);
    }
    let full = grown(before);
    assert!(full > 10_000_000, "{full}");
    assert_eq!((storage.records(), storage.claims()), (10_000, 10_000));

    clock.advance(DAY);
    // Whoever comes next clears a few away: that is enough in the long run, without anybody asking for it.
    let weight = || {
        let shown = format!("{storage:?}");
        let (_, rest) = shown.split_once(" weight: ").unwrap();
        rest.split(',').next().unwrap().parse::<u64>().unwrap()
    };
    let stale = weight();
    for number in 30_000..32_000 {
        let _ = now(storage.get(&key(number))).unwrap();
    }
    assert!(weight() < stale / 4, "{} of {stale} are left", weight());

    assert_eq!(
        (storage.records(), storage.claims(), storage.weight()),
        (0, 0, 0)
    );
    assert_eq!(
        storage.evicted(),
        0,
        "an expired record is not an evicted one"
    );
    // Tables keep their size, and moka's epochs some nodes.
    assert!(
        grown(before) < full / 5,
        "{} of {full} are left",
        grown(before)
    );
}

/// Nothing is evicted here, so only what has expired makes room, and moka keeps that until its housekeeping.
#[test]
fn large_records_that_expire_give_their_memory_back_in_time() {
    let _turn = turn();
    const MAX_BYTES: usize = 64 << 20;
    let (env, clock) = Env::simulated(1);
    let before = LIVE.load(SeqCst);
    let storage = MemoryStorage::builder()
        .max_bytes(MAX_BYTES)
        .when_full(WhenFull::Refuse)
        .env(env)
        .build();
    let record = response(vec![7; MAX_BYTES / 12]);
    let before_storage = grown(before);
    for round in 0..5 {
        for number in round * 12..(round + 1) * 12 {
            let begin = now(storage.begin(&key(number), &claim(number))).unwrap();
            assert_eq!(begin, Begin::Acquired);
            let second = Duration::from_secs(1);
            let held = now(storage.complete(&key(number), token(number), &record, second));
            assert_eq!(held.unwrap(), Held::Yes);
            let grown = grown(before) - before_storage;
            assert!(grown as f64 <= 1.2 * MAX_BYTES as f64, "{grown}");
        }
        clock.advance(Duration::from_secs(2));
    }
}

#[test]
fn a_record_that_can_not_be_kept_becomes_a_tombstone() {
    let _turn = turn();
    let told = Arc::new(AtomicU64::new(0));
    let storage = MemoryStorage::builder()
        .max_bytes(64 << 10)
        .observer({
            let told = told.clone();
            move |event: &Event<'_>| {
                if let Event::Tombstoned { reason, .. } = event {
                    assert_eq!(*reason, TombstoneReason::ResponseTooLarge);
                    told.fetch_add(1, SeqCst);
                }
            }
        })
        .build();
    let (small, large) = (response(vec![7; 50 << 10]), response(vec![7; 70 << 10]));
    for (number, record) in [(1, &large), (2, &small)] {
        for _ in 0..2 {
            let held = now(storage.complete(&key(number), token(number), record, DAY)).unwrap();
            assert_eq!(held, Held::Yes);
        }
    }
    let tombstone = Record {
        fingerprint: None,
        outcome: Outcome::Tombstone(TombstoneReason::ResponseTooLarge),
    };
    let begin = |number| now(storage.begin(&key(number), &claim(9))).unwrap();
    assert_eq!(begin(1), Begin::Completed(tombstone.clone()));
    assert_eq!(begin(2), Begin::Completed(small));
    now(storage.replace(&key(2), &large, DAY)).unwrap();
    assert_eq!(begin(2), Begin::Completed(tombstone.clone()));
    assert_eq!(told.load(SeqCst), 3);

    // However little there is, the last operation is remembered.
    let storage = MemoryStorage::builder().max_bytes(0).build();
    for number in 0..10 {
        let record = response(b"x".to_vec());
        let held = now(storage.complete(&key(number), token(number), &record, DAY)).unwrap();
        assert_eq!(held, Held::Yes);
        let begin = now(storage.begin(&key(number), &claim(99))).unwrap();
        assert_eq!(begin, Begin::Completed(tombstone.clone()));
    }
}

#[test]
fn a_full_storage_refuses_new_keys_until_records_expire() {
    let _turn = turn();
    const MINUTE: Duration = Duration::from_secs(60);
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder()
        .max_bytes(100 << 10)
        .when_full(WhenFull::Refuse)
        .env(env)
        .build();
    let begin = |number| now(storage.begin(&key(number), &claim(number)));
    let complete = |number: u64, size: usize| {
        let record = response(vec![7; size]);
        now(storage.complete(&key(number), token(number), &record, MINUTE)).unwrap()
    };
    // One that runs the whole time.
    assert_eq!(begin(1000).unwrap(), Begin::Acquired);
    let mut stored = 0;
    let refused = loop {
        match begin(stored) {
            Ok(begin) => assert_eq!(begin, Begin::Acquired),
            Err(error) => break error,
        }
        assert_eq!(complete(stored, 10 << 10), Held::Yes);
        stored += 1;
    };
    assert_eq!(refused.kind(), StorageErrorKind::Full);
    let cure = std::error::Error::source(&refused).unwrap().to_string();
    assert!(
        cure.contains("`max_bytes` of the `MemoryStorage`"),
        "{cure}"
    );
    assert_eq!(stored, 10);
    assert!(storage.weight() >= 100 << 10);

    // Only a new key is refused.
    assert!(matches!(begin(0).unwrap(), Begin::Completed(_)));
    assert_eq!(begin(1000).unwrap(), Begin::Acquired);
    let duplicate = now(storage.begin(&key(1000), &claim(0))).unwrap();
    assert!(matches!(duplicate, Begin::InFlight { .. }));
    // What runs is stored, however large.
    assert_eq!(complete(1000, 200 << 10), Held::Yes);
    assert!(matches!(begin(1000).unwrap(), Begin::Completed(_)));
    assert_eq!(storage.records(), 11);
    assert_eq!(storage.evicted(), 0);
    assert_eq!(begin(500).unwrap_err().kind(), StorageErrorKind::Full);

    clock.advance(MINUTE);
    assert_eq!(begin(500).unwrap(), Begin::Acquired);
    assert_eq!((storage.records(), storage.claims()), (0, 1));
    // Claims of dead holders don't fill it for ever either.
    let mut claimed = 0;
    while begin(2000 + claimed).is_ok() {
        claimed += 1;
    }
    assert!(claimed > 100);
    clock.advance(LEASE);
    assert_eq!(begin(5000).unwrap(), Begin::Acquired);
    let released = now(storage.release(&key(5000), token(5000))).unwrap();
    assert_eq!(released, Held::Yes);
    assert_eq!(storage.weight(), 0);
}

#[test]
fn concurrent_claims_fill_the_last_room_exactly() {
    let _turn = turn();
    let probe = MemoryStorage::new();
    let _ = now(probe.begin(&key(0), &claim(0))).unwrap();
    let weight = probe.weight();

    let storage = MemoryStorage::builder()
        .max_bytes(weight as usize * 1000)
        .when_full(WhenFull::Refuse)
        .build();
    let acquired = AtomicU64::new(0);
    thread::scope(|scope| {
        for thread in 0..8 {
            let (storage, acquired) = (&storage, &acquired);
            scope.spawn(move || {
                for number in thread * 1000..(thread + 1) * 1000 {
                    match now(storage.begin(&key(number), &claim(number))) {
                        Ok(begin) => {
                            assert_eq!(begin, Begin::Acquired);
                            acquired.fetch_add(1, SeqCst);
                        }
                        Err(error) => assert_eq!(error.kind(), StorageErrorKind::Full),
                    }
                }
            });
        }
    });
    assert_eq!(acquired.load(SeqCst), 1000);
    assert_eq!(storage.weight(), weight * 1000);
}

/// Tasks that begin, complete, release, remove and wait on a few keys. At most one of them may hold a key at a time, a
/// completed key may not run again, and what is left adds up in the end.
#[test]
fn at_most_one_holder_under_stress() {
    const TASKS: u64 = 8;
    const STEPS: u64 = 4_000;
    /// Keys at a time. All move on to fresh ones together, as completed ones stay completed.
    const KEYS: u64 = 50;
    const STEPS_PER_KEYS: u64 = 100;

    #[derive(Default)]
    struct State {
        held: AtomicBool,
        done: AtomicBool,
    }

    let _turn = turn();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_time()
        .build()
        .unwrap();
    for when_full in [WhenFull::Evict, WhenFull::Refuse] {
        let storage = MemoryStorage::builder().when_full(when_full).build();
        let keys = STEPS / STEPS_PER_KEYS * KEYS;
        let states: Arc<Vec<State>> = Arc::new((0..keys).map(|_| State::default()).collect());
        let executions = Arc::new(AtomicU64::new(0));
        runtime.block_on(async {
            let mut tasks = JoinSet::new();
            for task in 0..TASKS {
                let (storage, states) = (storage.clone(), states.clone());
                let executions = executions.clone();
                tasks.spawn(async move {
                    for step in 0..STEPS {
                        let dice = scramble(task << 32 | step);
                        let number = step / STEPS_PER_KEYS * KEYS + dice % KEYS;
                        let (key, state) = (key(number), &states[number as usize]);
                        let token = Token::random();
                        let claim = NewClaim {
                            token,
                            fingerprint: None,
                            lease: LEASE,
                        };
                        match storage.begin(&key, &claim).await.unwrap() {
                            Begin::Acquired => {}
                            Begin::InFlight { .. } => {
                                let limit = Duration::from_micros(dice >> 52);
                                storage.wait(&key, limit).await.unwrap();
                                continue;
                            }
                            Begin::Completed(record) => {
                                assert!(state.done.load(SeqCst), "a record from nowhere");
                                assert_eq!(record, response(number.to_string().into_bytes()));
                                continue;
                            }
                        }
                        assert!(
                            !state.held.swap(true, SeqCst),
                            "two executions of one key at once"
                        );
                        assert!(!state.done.load(SeqCst), "a completed operation ran again");
                        executions.fetch_add(1, SeqCst);
                        if dice & 1 << 40 == 0 {
                            tokio::task::yield_now().await;
                        }
                        let held = storage.renew(&key, token, LEASE).await.unwrap();
                        assert_eq!(held, Held::Yes, "a running claim is gone");
                        assert!(state.held.swap(false, SeqCst));
                        match dice >> 41 & 7 {
                            0 => {
                                state.done.store(true, SeqCst);
                                let record = response(number.to_string().into_bytes());
                                let held = storage.complete(&key, token, &record, DAY).await;
                                assert_eq!(held.unwrap(), Held::Yes);
                            }
                            1 => assert!(storage.remove(&key).await.unwrap()),
                            _ => {
                                let held = storage.release(&key, token).await.unwrap();
                                assert_eq!(held, Held::Yes);
                            }
                        }
                    }
                });
            }
            tasks.join_all().await;
        });

        let done = states
            .iter()
            .filter(|state| state.done.load(SeqCst))
            .count() as u64;
        assert!(
            executions.load(SeqCst) > done && done > keys / 4,
            "{done} of {keys}"
        );
        assert_eq!(
            (storage.records(), storage.claims(), storage.waiters()),
            (done, 0, 0)
        );
        thread::scope(|scope| {
            // Two at a time for each: exactly one of them takes it.
            for _ in 0..2 {
                scope
                    .spawn(|| (0..keys).for_each(|number| drop(now(storage.remove(&key(number))))));
            }
        });
        assert_eq!((storage.records(), storage.weight()), (0, 0));
        assert_eq!(storage.evicted(), 0);
    }
}
