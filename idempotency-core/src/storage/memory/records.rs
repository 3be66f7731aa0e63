//! The completed records: a moka cache, and what it takes to keep its promises. What exactly a record is, `V`, is up to whom
//! they belong to.

use std::{
    collections::VecDeque,
    hash::{Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use moka::{Equivalent, policy::EvictionPolicy, sync::Cache};

use super::{
    SHARDS,
    ledger::{Ledger, Page},
    shard_of,
};
use crate::{EncodedKey, key::HashKeys};

/// What a record takes besides its body and its headers, in bytes: [`Stored`], its place among the expiries, and moka's nodes,
/// table and buffers. With moka 0.12.16 that is 414 at most, and 437 once it was read; the rest is for what the allocator rounds up
/// nine blocks by. `tests/memory_limits.rs` holds the whole to its limit.
const OVERHEAD: usize = 560;

/// After so many reads and writes moka does its housekeeping, which is before it would do it by itself: after 64 reads or 64 writes.
const HOUSEKEEPING: u64 = 60;

/// After so long, too, so that it is not before 300 ms are over, when moka would do it by itself.
const PERIOD: Duration = Duration::from_millis(200);

/// The part of the capacity after which it does so too, because so many of the largest answers would be much more than the limit.
const SLACK: u64 = 32;

/// How many steps crossbeam's epochs, in which moka puts what it evicts, are asked to go after its housekeeping. By then that is dropped,
/// unless another thread is in moka just now.
const STEPS: usize = 3;

/// The same for all that moka has put off, since little is dropped in one step.
const STEPS_FOR_ALL: usize = 128;

pub(super) struct Records<V> {
    cache: Cache<Place<V>, Arc<Stored<V>>, HashKeys>,
    ledger: Arc<Ledger>,
    /// `None` where nothing is evicted.
    capacity: Option<u64>,
    /// For each shard, its records by deadline. moka has no expiry by a clock that can be moved. Only locked under the shard's lock,
    /// and never by what drops a record.
    expiries: Box<[Mutex<Expiries<V>>]>,
    /// What moka has put off since its last housekeeping: reads and writes, large ones many times.
    booked: AtomicU64,
    /// By the storage's clock, see [`nanos`]: when the next housekeeping is due, however little was put off.
    due: AtomicU64,
    /// Held by the one that does it.
    housekeeping: Mutex<()>,
}

/// The next to expire is first. Nearly all records have the same time to live, so nearly each is appended.
type Expiries<V> = VecDeque<Weak<Stored<V>>>;

/// A record as the key of itself in moka, so that its 32 bytes are there once. What is hashed lies beside the pointer: when moka rebuilds
/// its table, it hashes every key, and following each pointer would be a cache miss. moka keeps the key of what has left for a
/// while, so the pointer keeps nothing alive: a place whose record was dropped is equal to none.
struct Place<V> {
    folded: u64,
    stored: Weak<Stored<V>>,
}

impl<V> Place<V> {
    fn is_of(&self, key: &EncodedKey) -> bool {
        self.stored
            .upgrade()
            .is_some_and(|stored| stored.key == *key)
    }
}

impl<V> Hash for Place<V> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.folded);
    }
}

impl<V> PartialEq for Place<V> {
    fn eq(&self, other: &Self) -> bool {
        self.folded == other.folded
            && (self.stored.ptr_eq(&other.stored)
                || other
                    .stored
                    .upgrade()
                    .is_some_and(|stored| self.is_of(&stored.key)))
    }
}

impl<V> Eq for Place<V> {}

/// A key that is looked up.
struct Sought<'a>(&'a EncodedKey);

impl Hash for Sought<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(folded(self.0));
    }
}

impl<V> Equivalent<Place<V>> for Sought<'_> {
    fn equivalent(&self, place: &Place<V>) -> bool {
        folded(self.0) == place.folded && place.is_of(self.0)
    }
}

/// Of every bit of a key, since an encoder of a user's may make keys that are no hashes.
fn folded(key: &EncodedKey) -> u64 {
    let (words, _) = key.as_bytes().as_chunks::<8>();
    words
        .iter()
        .fold(0, |folded, word| folded ^ u64::from_le_bytes(*word))
}

/// A record as it lies in moka, which alone holds on to it.
struct Stored<V> {
    key: EncodedKey,
    /// By the storage's clock, see [`nanos`]. The record has expired from then on.
    deadline: u64,
    weight: u32,
    /// Whether the ledger knows that it is no longer there.
    has_left: AtomicBool,
    value: V,
    page: Arc<Page>,
}

impl<V> Stored<V> {
    /// Books that the record is no longer there, once. Says whether this was the time.
    fn leave(&self) -> bool {
        let leaves = !self.has_left.swap(true, Relaxed);
        if leaves {
            self.page.record_left(self.weight);
        }
        leaves
    }
}

impl<V> Drop for Stored<V> {
    /// What left by itself was evicted. moka could call a listener at the eviction, but would take a lock for each key then.
    fn drop(&mut self) {
        if self.leave() {
            let deadline = Duration::from_nanos(self.deadline);
            self.page.record_evicted(&self.key, deadline);
        }
    }
}

/// Except for [`settle`](Records::settle), [`catch_up`](Records::catch_up) and [`fits`](Records::fits), call these under the lock of the key's shard.
/// Then only moka changes anything meanwhile, and all that moka does is evict.
impl<V: Clone + Send + Sync + 'static> Records<V> {
    /// Records of `max_bytes` that are evicted when there are more of them, or that are never evicted.
    pub(super) fn new(ledger: Arc<Ledger>, max_bytes: Option<usize>) -> Self {
        // The least that can be kept is a tombstone. Without it, a completed operation would be forgotten at once.
        let capacity = max_bytes.map(|bytes| bytes.max(OVERHEAD) as u64);
        let mut cache = Cache::builder()
            // moka's default, TinyLFU, refuses new records when it is full. They are the ones whose retries are still to come.
            .eviction_policy(EvictionPolicy::lru())
            // No expiry of moka's: it would follow another clock than the leases, and a clock can't be moved in moka.
            .weigher(|_, stored: &Arc<Stored<V>>| stored.weight);
        if let Some(capacity) = capacity {
            cache = cache.max_capacity(capacity);
        }
        Self {
            cache: cache.build_with_hasher(HashKeys::default()),
            ledger,
            capacity,
            expiries: (0..SHARDS).map(|_| Mutex::default()).collect(),
            booked: AtomicU64::new(0),
            due: AtomicU64::new(0),
            housekeeping: Mutex::new(()),
        }
    }

    /// Whether something of this weight can be kept at all: moka would drop it at once, and nobody would know.
    pub(super) fn fits(&self, weight: u32) -> bool {
        self.capacity
            .is_none_or(|capacity| u64::from(weight) <= capacity)
    }

    /// The record of `key` if there is one and it is not expired.
    pub(super) fn get(&self, key: &EncodedKey, now: Duration) -> Option<V> {
        let stored = self.find(key)?;
        if stored.deadline <= nanos(now) {
            self.remove(key);
            return None;
        }
        Some(stored.value.clone())
    }

    fn find(&self, key: &EncodedKey) -> Option<Arc<Stored<V>>> {
        self.book(1);
        self.cache.get(&Sought(key))
    }

    /// Stores a record where none is.
    pub(super) fn insert(&self, key: &EncodedKey, value: V, weight: u32, deadline: Duration) {
        let shard = shard_of(key);
        let page = self.ledger.page(shard);
        page.record_came(weight);
        let stored = Arc::new(Stored {
            key: *key,
            deadline: nanos(deadline),
            weight,
            has_left: AtomicBool::new(false),
            value,
            page: page.clone(),
        });
        let mut expiries = self.expiries(shard);
        let before = expiries.len();
        if page.departed() > (before / 4 + 32) as isize {
            // They hold on to memory: without this, until their time is over.
            expiries.retain(|stored| live(stored).is_some());
            page.forgotten(before - expiries.len());
        }
        let at = position(&expiries, stored.deadline);
        expiries.insert(at, Arc::downgrade(&stored));
        let place = Place {
            folded: folded(key),
            stored: Arc::downgrade(&stored),
        };
        self.book(self.operations(weight));
        self.cache.insert(place, stored);
    }

    pub(super) fn remove(&self, key: &EncodedKey) {
        if let Some(stored) = self.cache.remove(&Sought(key)) {
            stored.leave();
            // So that its memory is given back with this operation.
            self.book(HOUSEKEEPING);
        }
    }

    /// Forgets up to `at_most` records of `shard` that have expired or left, those that expire first. Says whether there may be more.
    pub(super) fn sweep(&self, shard: usize, now: Duration, at_most: usize) -> bool {
        let now = nanos(now);
        let mut expiries = self.expiries(shard);
        for _ in 0..at_most {
            let Some(next) = expiries.front().map(live) else {
                return false;
            };
            if let Some(stored) = next {
                if stored.deadline > now {
                    return false;
                }
                self.book(self.operations(stored.weight));
                let found = self.cache.get(&Sought(&stored.key));
                if found.is_some_and(|found| Arc::ptr_eq(&found, &stored)) {
                    self.cache.invalidate(&Sought(&stored.key));
                }
                // Also if moka has just evicted it.
                stored.leave();
            }
            expiries.pop_front();
            self.ledger.page(shard).forgotten(1);
        }
        true
    }

    /// Nothing under this lock panics but moka, after the queue was changed, so a poisoned one is whole.
    fn expiries(&self, shard: usize) -> MutexGuard<'_, Expiries<V>> {
        self.expiries[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn book(&self, operations: u64) {
        self.booked.fetch_add(operations, Relaxed);
    }

    /// For how many operations a record of this weight counts.
    fn operations(&self, weight: u32) -> u64 {
        1 + self.capacity.map_or(0, |capacity| {
            u64::from(weight) * SLACK * HOUSEKEEPING / capacity
        })
    }

    /// Does moka's housekeeping where that is due. Call it after each operation, without a lock: moka would do it in the middle of a
    /// later operation, under the lock of a shard, where other requests would wait for it, and what it evicted would stay with the
    /// thread of that request.
    pub(super) fn settle(&self, now: Duration) {
        let booked = self.booked.load(Relaxed);
        if booked < HOUSEKEEPING && nanos(now) < self.due.load(Relaxed) {
            return;
        }
        // One does it and the others go on, unless it can't keep up.
        let _housekeeping = match self.housekeeping.try_lock() {
            Ok(housekeeping) => housekeeping,
            Err(_) if booked < 4 * HOUSEKEEPING => return,
            Err(_) => self
                .housekeeping
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        };
        self.booked.store(0, Relaxed);
        self.due.store(nanos(now.saturating_add(PERIOD)), Relaxed);
        self.cache.run_pending_tasks();
        for _ in 0..STEPS {
            crossbeam_epoch::pin().flush();
        }
    }

    /// Has moka do all that it has put off, and drops all that it evicted, unless other threads are in moka.
    pub(super) fn catch_up(&self) {
        self.cache.run_pending_tasks();
        for _ in 0..STEPS_FOR_ALL {
            if self.ledger.records() <= self.cache.entry_count() {
                return;
            }
            crossbeam_epoch::pin().flush();
        }
    }
}

/// What an entry of the expiries stands for, if it is still there.
fn live<V>(stored: &Weak<Stored<V>>) -> Option<Arc<Stored<V>>> {
    let stored = stored.upgrade()?;
    (!stored.has_left.load(Relaxed)).then_some(stored)
}

/// Where a record of this deadline belongs: behind all that expire before it.
fn position<V>(expiries: &Expiries<V>, deadline: u64) -> usize {
    let is_later = |stored: &Stored<V>| stored.deadline > deadline;
    if expiries
        .back()
        .and_then(live)
        .is_some_and(|last| !is_later(&last))
    {
        return expiries.len();
    }
    let (mut from, mut to) = (0, expiries.len());
    while from < to {
        let middle = from.midpoint(to);
        // What has left says nothing: the one before it does.
        let before = (from..=middle)
            .rev()
            .find_map(|at| Some((at, live(&expiries[at])?)));
        match before {
            Some((at, stored)) if is_later(&stored) => to = at,
            _ => from = middle + 1,
        }
    }
    from
}

/// What a record of so many bytes weighs. moka's weights are 32 bits wide: one of 4 GiB weighs less than it should, by what it
/// is larger.
pub(super) fn weight(bytes: usize) -> u32 {
    u32::try_from(bytes.saturating_add(OVERHEAD)).unwrap_or(u32::MAX)
}

/// A time in half the memory. Times from 584 years on are all the same.
fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
