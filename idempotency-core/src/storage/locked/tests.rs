//! What the public suite can't see: parts that fail, stop or answer late, and what is left in them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::{
    collections::{HashMap, VecDeque},
    future::pending,
    pin::{Pin, pin},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, StatusCode};

use super::*;
use crate::{MokaCache, ProcessLock, SimulatedClock, StoredResponse, TombstoneReason};

const LEASE: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 3600);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Call {
    Get,
    Set,
    Acquire,
    Renew,
    Release,
}

#[derive(Clone, Copy)]
enum Fault {
    Works,
    Fails,
    Full,
    /// Works when it is polled again.
    Pauses,
    /// Never answers, and has no effect.
    Stops,
    /// Never answers, and has its effect.
    StopsAfter,
}

/// A cache and a lock whose next calls have faults.
#[derive(Clone)]
struct Faulty {
    cache: MokaCache,
    lock: ProcessLock,
    faults: Arc<Mutex<HashMap<Call, VecDeque<Fault>>>>,
}

impl Faulty {
    fn next(&self, call: Call, faults: impl Into<VecDeque<Fault>>) {
        self.faults.lock().unwrap().insert(call, faults.into());
    }

    async fn run<T>(
        &self,
        call: Call,
        work: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        let fault = {
            let mut faults = self.faults.lock().unwrap();
            faults.get_mut(&call).and_then(VecDeque::pop_front)
        };
        match fault {
            None | Some(Fault::Works) => work.await,
            Some(Fault::Fails) => Err(StorageError::unavailable("injected")),
            Some(Fault::Full) => Err(StorageError::full()),
            Some(Fault::Pauses) => {
                tokio::task::yield_now().await;
                work.await
            }
            Some(Fault::Stops) => pending().await,
            Some(Fault::StopsAfter) => {
                let _ = work.await;
                pending().await
            }
        }
    }
}

impl Cache for Faulty {
    async fn get(&self, key: &EncodedKey) -> Result<Option<Bytes>, StorageError> {
        self.run(Call::Get, self.cache.get(key)).await
    }

    async fn set(&self, key: &EncodedKey, value: Bytes, ttl: Duration) -> Result<(), StorageError> {
        self.run(Call::Set, self.cache.set(key, value, ttl)).await
    }

    async fn remove(&self, key: &EncodedKey) -> Result<(), StorageError> {
        self.cache.remove(key).await
    }
}

impl Lock for Faulty {
    async fn acquire(
        &self,
        key: &EncodedKey,
        ttl: Duration,
    ) -> Result<Option<Token>, StorageError> {
        self.run(Call::Acquire, self.lock.acquire(key, ttl)).await
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        self.run(Call::Renew, self.lock.renew(key, token, ttl))
            .await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        self.run(Call::Release, self.lock.release(key, token)).await
    }
}

struct Node {
    storage: LockedStorage<Faulty, Faulty>,
    parts: Faulty,
    clock: SimulatedClock,
}

impl Node {
    fn new() -> Self {
        Self::with(1 << 20)
    }

    fn with(max_bytes: usize) -> Self {
        let (env, clock) = Env::simulated(1);
        let parts = Faulty {
            cache: MokaCache::new().max_bytes(max_bytes).env(env.clone()),
            lock: ProcessLock::new().env(env.clone()),
            faults: Arc::default(),
        };
        let storage = LockedStorage::new(parts.clone(), parts.clone()).env(env);
        Self {
            storage,
            parts,
            clock,
        }
    }

    fn begin(&self, number: u8) -> Begin {
        now(self.storage.begin(&key(), &claim(number)))
    }

    fn complete(&self, number: u8, record: &Record) -> Held {
        now(self.storage.complete(&key(), token(number), record, DAY))
    }

    /// Nothing is locked, and nothing remembered.
    fn assert_empty(&self) {
        assert_eq!(self.parts.lock.locked(), 0, "locked");
        assert_eq!(self.storage.remembered(), (0, 0), "claims and doubts");
    }
}

impl<C: Cache, L: Lock> LockedStorage<C, L> {
    /// How many claims and unanswered calls are remembered.
    fn remembered(&self) -> (usize, usize) {
        let doubts = lease::lock(&self.parts.doubts).slots();
        (self.known().slots(), doubts)
    }
}

fn now<T>(call: impl Future<Output = Result<T, StorageError>>) -> T {
    call.now_or_never().expect("the call is over").unwrap()
}

fn poll<F: Future>(call: Pin<&mut F>) -> Poll<F::Output> {
    call.poll(&mut Context::from_waker(Waker::noop()))
}

/// Polls the call once and drops it.
fn dropped<T>(call: impl Future<Output = T>) {
    assert!(call.now_or_never().is_none(), "the call is over");
}

fn key() -> EncodedKey {
    EncodedKey::from_bytes([1; 32])
}

fn token(number: u8) -> Token {
    Token::from_bytes([number; 16])
}

fn claim(number: u8) -> NewClaim {
    NewClaim {
        token: token(number),
        fingerprint: Some(Fingerprint::from_bytes([number; 32])),
        lease: LEASE,
    }
}

fn response(body: impl Into<Bytes>) -> Record {
    Record {
        fingerprint: None,
        outcome: Outcome::Response(StoredResponse::new(StatusCode::OK, &HeaderMap::new(), body)),
    }
}

fn failed<T: fmt::Debug>(call: impl Future<Output = Result<T, StorageError>>) -> StorageErrorKind {
    let result = call.now_or_never().expect("the call is over");
    result.unwrap_err().kind()
}

#[test]
fn who_completes_between_the_look_and_the_lock_is_seen() {
    let node = Node::new();
    assert_eq!(node.begin(1), Begin::Acquired);
    node.parts.next(Call::Acquire, [Fault::Pauses]);
    let (key, second) = (key(), claim(2));
    let mut late = pin!(node.storage.begin(&key, &second));
    assert!(poll(late.as_mut()).is_pending());
    assert_eq!(node.complete(1, &response("one")), Held::Yes);
    let Poll::Ready(Ok(begin)) = poll(late) else {
        panic!("the lock was free");
    };
    assert_eq!(begin, Begin::Completed(response("one")));
    node.assert_empty();
}

#[test]
fn who_lost_the_lock_stores_nothing() {
    let node = Node::new();
    assert_eq!(node.begin(1), Begin::Acquired);
    // The look is over, and the lock about to be asked for.
    node.parts.next(Call::Renew, [Fault::Pauses]);
    let (key, late_record) = (key(), response("late"));
    let mut late = pin!(node.storage.complete(&key, token(1), &late_record, DAY));
    assert!(poll(late.as_mut()).is_pending());
    node.clock.advance(LEASE);
    assert_eq!(node.begin(2), Begin::Acquired);
    assert!(matches!(poll(late.as_mut()), Poll::Ready(Ok(Held::Lost))));
    assert_eq!(node.complete(2, &response("two")), Held::Yes);
    assert_eq!(node.begin(3), Begin::Completed(response("two")));

    // And where the successor is done already.
    now(node.storage.remove(&key));
    assert_eq!(node.begin(4), Begin::Acquired);
    node.parts.next(Call::Renew, [Fault::Pauses]);
    let mut late = pin!(node.storage.complete(&key, token(4), &late_record, DAY));
    assert!(poll(late.as_mut()).is_pending());
    node.clock.advance(LEASE);
    assert_eq!(node.begin(5), Begin::Acquired);
    assert_eq!(node.complete(5, &response("five")), Held::Yes);
    assert!(matches!(poll(late.as_mut()), Poll::Ready(Ok(Held::Lost))));
    assert_eq!(node.begin(6), Begin::Completed(response("five")));
    node.assert_empty();
}

/// Of a claim that nobody knows any more, as after a restart of the lock, or without claims at all.
#[test]
fn a_key_without_a_claim_is_locked_to_be_completed() {
    let node = Node::new();
    node.parts.next(Call::Set, [Fault::Stops]);
    let record = response("one");
    dropped(node.storage.complete(&key(), token(1), &record, DAY));
    assert_eq!(node.complete(2, &response("two")), Held::Lost);
    assert!(matches!(node.begin(2), Begin::InFlight { .. }));
    assert_eq!(node.complete(1, &record), Held::Yes);
    assert_eq!(node.complete(2, &response("two")), Held::Lost);
    assert_eq!(node.begin(2), Begin::Completed(record));
    node.assert_empty();
}

#[test]
fn a_complete_that_stopped_after_the_record_is_repeated() {
    for call in [Call::Set, Call::Release] {
        let node = Node::new();
        assert_eq!(node.begin(1), Begin::Acquired);
        node.parts.next(call, [Fault::StopsAfter]);
        let record = response("one");
        dropped(node.storage.complete(&key(), token(1), &record, DAY));
        assert_eq!(node.begin(2), Begin::Completed(record));
        assert_eq!(node.complete(1, &response("again")), Held::Yes);
        assert_eq!(node.begin(2), Begin::Completed(response("one")));
        node.assert_empty();
    }
}

#[test]
fn a_repeated_complete_restarts_the_ttl_of_what_is_there() {
    let node = Node::new();
    assert_eq!(node.begin(1), Begin::Acquired);
    assert_eq!(node.complete(1, &response("one")), Held::Yes);
    // Beside a `replace`, of which it sees either all or nothing.
    let (key, other, again) = (key(), response("other"), response("again"));
    node.parts.next(Call::Acquire, [Fault::Pauses]);
    let mut repeated = pin!(node.storage.complete(&key, token(1), &again, DAY));
    assert!(poll(repeated.as_mut()).is_pending());
    now(node.storage.replace(&key, &other, DAY));
    assert!(matches!(poll(repeated), Poll::Ready(Ok(Held::Yes))));
    assert_eq!(node.begin(2), Begin::Completed(other.clone()));
    node.clock.advance(DAY - LEASE);
    assert_eq!(node.complete(1, &again), Held::Yes);
    node.clock.advance(DAY - LEASE);
    assert_eq!(node.begin(2), Begin::Completed(other.clone()));
    node.assert_empty();

    // A lock of another's keeps the TTL from being restarted, and says so.
    let held = now(node.parts.lock.acquire(&key, LEASE)).unwrap();
    let error = failed(node.storage.complete(&key, token(1), &again, DAY));
    assert_eq!(error, StorageErrorKind::Unavailable);
    assert_eq!(now(node.parts.lock.release(&key, held)), Held::Yes);
    // Where there is no room for it a second time, it stays as it is.
    node.parts.next(Call::Set, [Fault::Full]);
    let error = failed(node.storage.complete(&key, token(1), &again, DAY));
    assert_eq!(error, StorageErrorKind::Full);
    assert_eq!(node.begin(2), Begin::Completed(other));
    node.assert_empty();
}

/// To be told that the claim is lost would cost the answer: the lock is held by nobody but the earlier call.
#[test]
fn a_lock_that_may_be_ones_own_is_not_anothers() {
    let node = Node::new();
    node.parts.next(Call::Acquire, [Fault::StopsAfter]);
    let record = response("one");
    dropped(node.storage.complete(&key(), token(1), &record, DAY));
    assert_eq!(node.parts.lock.locked(), 1);
    for _ in 0..2 {
        let again = failed(node.storage.complete(&key(), token(1), &record, DAY));
        assert_eq!(again, StorageErrorKind::Unavailable);
    }
    assert_eq!(node.complete(2, &response("two")), Held::Lost);
    node.clock.advance(COMPLETING);
    assert_eq!(node.complete(1, &record), Held::Yes);
    assert_eq!(node.begin(2), Begin::Completed(record));
    node.assert_empty();
}

/// The worst that a dropped `begin` does.
#[test]
fn a_begin_that_is_dropped_while_the_lock_answers_blocks_the_key_for_one_lease() {
    let node = Node::new();
    node.parts.next(Call::Acquire, [Fault::StopsAfter]);
    dropped(node.storage.begin(&key(), &claim(1)));
    assert!(matches!(node.begin(1), Begin::InFlight { .. }));
    assert!(matches!(node.begin(2), Begin::InFlight { .. }));
    node.clock.advance(LEASE);
    assert_eq!(node.begin(2), Begin::Acquired);
    assert_eq!(now(node.storage.release(&key(), token(2))), Held::Yes);
    assert_eq!(node.storage.remembered(), (0, 1));
    // What is left of it goes with later claims.
    node.clock.advance(DAY);
    assert_eq!(node.begin(3), Begin::Acquired);
    assert_eq!(now(node.storage.release(&key(), token(3))), Held::Yes);
    node.assert_empty();
}

#[test]
fn a_begin_that_stops_or_fails_later_can_be_released() {
    for fault in [Fault::Stops, Fault::Fails] {
        let node = Node::new();
        node.parts.next(Call::Get, [Fault::Works, fault]);
        let begin = node.storage.begin(&key(), &claim(1)).now_or_never();
        assert!(matches!(begin, None | Some(Err(_))));
        assert!(matches!(node.begin(2), Begin::InFlight { .. }));
        assert_eq!(node.begin(1), Begin::Acquired);
        assert_eq!(now(node.storage.release(&key(), token(1))), Held::Yes);
        assert_eq!(node.begin(2), Begin::Acquired);
    }
}

#[test]
fn a_lock_that_can_not_be_released_keeps_no_record_from_being_stored_or_found() {
    let node = Node::new();
    assert_eq!(node.begin(1), Begin::Acquired);
    node.parts.next(Call::Release, [Fault::Fails]);
    assert_eq!(node.complete(1, &response("one")), Held::Yes);
    assert_eq!(node.begin(2), Begin::Completed(response("one")));
    now(node.storage.wait(&key(), DAY));
    assert_eq!(node.parts.lock.locked(), 1);

    // It does not keep the record from being replaced or removed either.
    now(node.storage.replace(&key(), &response("two"), DAY));
    assert_eq!(node.begin(2), Begin::Completed(response("two")));
    assert!(now(node.storage.remove(&key())));
    assert_eq!(node.begin(2), Begin::Acquired);
    assert_eq!(now(node.storage.release(&key(), token(2))), Held::Yes);
    node.assert_empty();
}

#[test]
fn a_record_that_can_not_be_stored_leaves_the_claim() {
    let node = Node::new();
    assert_eq!(node.begin(1), Begin::Acquired);
    node.parts.next(Call::Set, [Fault::Fails]);
    let record = response("one");
    let error = failed(node.storage.complete(&key(), token(1), &record, DAY));
    assert_eq!(error, StorageErrorKind::Unavailable);
    assert!(matches!(node.begin(2), Begin::InFlight { .. }));
    assert_eq!(now(node.storage.renew(&key(), token(1), LEASE)), Held::Yes);
    assert_eq!(node.complete(1, &record), Held::Yes);
    node.assert_empty();
}

#[test]
fn a_record_that_finds_no_room_becomes_a_tombstone() {
    let node = Node::with(10_000);
    let tombstone = Record {
        fingerprint: None,
        outcome: Outcome::Tombstone(TombstoneReason::NoRoom),
    };
    assert_eq!(node.begin(1), Begin::Acquired);
    assert_eq!(node.complete(1, &response(vec![0; 20_000])), Held::Yes);
    assert_eq!(node.begin(2), Begin::Completed(tombstone.clone()));
    now(node.storage.replace(&key(), &response("fits"), DAY));
    assert_eq!(node.begin(2), Begin::Completed(response("fits")));

    // Where not even that has room, it is an error, and the claim stays.
    let node = Node::with(0);
    assert_eq!(node.begin(1), Begin::Acquired);
    let error = failed(node.storage.complete(&key(), token(1), &tombstone, DAY));
    assert_eq!(error, StorageErrorKind::Full);
    assert!(matches!(node.begin(2), Begin::InFlight { .. }));
}

#[test]
fn a_repeated_begin_never_shortens_the_lease() {
    let node = Node::new();
    assert_eq!(node.begin(1), Begin::Acquired);
    let short = NewClaim {
        lease: Duration::from_secs(1),
        ..claim(1)
    };
    assert_eq!(now(node.storage.begin(&key(), &short)), Begin::Acquired);
    node.clock.advance(LEASE - Duration::from_secs(1));
    let Begin::InFlight {
        fingerprint,
        lease_left,
    } = node.begin(2)
    else {
        panic!("the lease was shortened");
    };
    assert_eq!(fingerprint, claim(1).fingerprint);
    assert_eq!(lease_left, Some(Duration::from_secs(1)));
}

#[test]
fn claims_of_dead_holders_are_forgotten() {
    let node = Node::new();
    for number in 0..200 {
        assert_eq!(node.begin(number), Begin::Acquired);
        assert_eq!(node.storage.claims(), 1);
        node.clock.advance(LEASE);
        assert_eq!(node.storage.claims(), 0);
    }
    assert!(node.storage.remembered().0 <= 4);
    assert!(node.parts.lock.locked() == 0);
}

#[test]
fn odd_durations() {
    let node = Node::new();
    let key = key();
    assert_eq!(node.begin(1), Begin::Acquired);
    let held = now(node
        .storage
        .complete(&key, token(1), &response("x"), Duration::ZERO));
    assert_eq!(held, Held::Yes);
    assert_eq!(now(node.storage.get(&key)), None);

    let claim = |number, lease| NewClaim {
        lease,
        ..claim(number)
    };
    let begin = now(node.storage.begin(&key, &claim(2, Duration::ZERO)));
    assert_eq!(begin, Begin::Acquired);
    let begin = now(node.storage.begin(&key, &claim(3, Duration::MAX)));
    assert_eq!(begin, Begin::Acquired);
    let held = now(node.storage.renew(&key, token(3), Duration::MAX));
    assert_eq!(held, Held::Yes);
    now(node.storage.wait(&key, Duration::ZERO));
    dropped(node.storage.wait(&key, Duration::MAX));
    let held = now(node
        .storage
        .complete(&key, token(3), &response("x"), Duration::MAX));
    assert_eq!(held, Held::Yes);
    now(node.storage.replace(&key, &response("y"), Duration::ZERO));
    assert_eq!(now(node.storage.get(&key)), None);
}

/// A `remove` ends the claim that a `begin` has just made, and takes the record that the `begin` would have found.
#[test]
fn a_begin_that_a_removal_overtakes_starts_anew() {
    let node = Node::new();
    assert_eq!(node.begin(1), Begin::Acquired);
    node.parts.next(Call::Acquire, [Fault::Pauses]);
    let (key, new) = (key(), claim(2));
    let mut begin = pin!(node.storage.begin(&key, &new));
    assert!(poll(begin.as_mut()).is_pending());
    assert_eq!(node.complete(1, &response("x")), Held::Yes);
    node.parts.next(Call::Get, [Fault::Pauses]);
    assert!(poll(begin.as_mut()).is_pending());
    assert!(now(node.storage.remove(&key)));
    assert_eq!(now(begin), Begin::Acquired);
    assert!(matches!(node.begin(3), Begin::InFlight { .. }));
    assert_eq!(node.complete(2, &response("y")), Held::Yes);
    assert_eq!(node.begin(3), Begin::Completed(response("y")));
    node.assert_empty();
}

/// Threads that take turns on a few keys, with strangers in between: one claim per key at a time, and a record stays until it
/// is removed.
#[test]
fn one_claim_per_key_at_a_time() {
    const KEYS: usize = 3;
    let storage = LockedStorage::new(MokaCache::new(), ProcessLock::new());
    let held: [AtomicBool; KEYS] = Default::default();
    let executions = AtomicUsize::new(0);
    let rounds = |seed: u64| {
        let (env, _clock) = Env::simulated(seed);
        for _ in 0..2_000 {
            let mut random = [0; 3];
            env.fill_random(&mut random);
            let at = usize::from(random[0]) % KEYS;
            let key = EncodedKey::from_bytes([random[0] % KEYS as u8; 32]);
            let new = NewClaim {
                token: Token::random_from(&env),
                ..claim(0)
            };
            if now(storage.begin(&key, &new)) != Begin::Acquired {
                assert_eq!(now(storage.renew(&key, new.token, LEASE)), Held::Lost);
                assert_eq!(now(storage.release(&key, new.token)), Held::Lost);
                continue;
            }
            assert!(!held[at].swap(true, SeqCst), "two claims of one key");
            executions.fetch_add(1, SeqCst);
            for _ in 0..random[1] {
                std::hint::spin_loop();
            }
            assert_eq!(now(storage.renew(&key, new.token, LEASE)), Held::Yes);
            held[at].store(false, SeqCst);
            if random[2] % 2 == 0 {
                assert_eq!(now(storage.release(&key, new.token)), Held::Yes);
                continue;
            }
            let record = response(new.token.to_string());
            let stored = now(storage.complete(&key, new.token, &record, DAY));
            assert_eq!(stored, Held::Yes);
            assert_eq!(
                now(storage.begin(&key, &claim(0))),
                Begin::Completed(record)
            );
            assert!(now(storage.remove(&key)));
        }
    };
    std::thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || rounds(seed));
        }
    });
    assert!(executions.load(SeqCst) > 100);
    assert_eq!(storage.lock().locked(), 0);
    assert_eq!(storage.remembered(), (0, 0));
}

#[test]
fn debug_shows_no_record_and_no_key() {
    let node = Node::new();
    assert_eq!(node.begin(0xab), Begin::Acquired);
    let shown = format!(
        "{:?} {:?} {:?}",
        node.storage, node.parts.cache, node.parts.lock
    );
    assert!(
        shown.contains("claims: 1") && shown.contains("locked: 1"),
        "{shown}"
    );
    assert!(
        !shown.contains("abab") && !shown.contains("0101"),
        "{shown}"
    );
}
