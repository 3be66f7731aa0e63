//! The completed records: a moka cache, and what it takes to keep its promises. What exactly a record is, `V`, is up to whom
//! they belong to.

use std::{
    collections::VecDeque,
    hash::{Hash, Hasher},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicIsize, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use moka::{Equivalent, policy::EvictionPolicy, sync::Cache};

use super::{SHARDS, ledger::Ledger, shard_of};
use crate::{EncodedKey, key::HashKeys};

/// What a record takes besides its body and its headers, in bytes: [`Stored`], its place among the expiries, and moka's nodes,
/// table and buffers. With moka 0.12.16 that is 414 at most, and 437 once it was read; the rest is for what the allocator rounds up
/// nine blocks by. `tests/memory_limits.rs` holds the whole to its limit.
const OVERHEAD: usize = 560;

/// After so many reads and writes moka does its housekeeping, which is before it would do it by itself: after 64 reads or 64 writes.
const HOUSEKEEPING: usize = 60;

/// The part of the capacity by which records may be over it before each operation has moka evict, and waits for it. Otherwise moka evicts
/// after some operations, which may be as many of the largest answers.
const SLACK: u64 = 32;

pub(super) struct Records<V> {
    cache: Cache<Place<V>, Arc<Stored<V>>, HashKeys>,
    ledger: Arc<Ledger>,
    /// `None` where nothing is evicted.
    capacity: Option<u64>,
    /// For each shard, its records by deadline. moka has no expiry by a clock that can be moved. Only locked under the shard's lock,
    /// and never by moka's listener.
    expiries: Box<[Mutex<Expiries<V>>]>,
    /// For each shard, how many records of its expiries have left the cache.
    departed: Arc<[AtomicIsize]>,
    /// Reads and writes since the last housekeeping.
    booked: AtomicUsize,
    /// Held by the one that does it.
    housekeeping: Mutex<()>,
}

/// The next to expire is first. Nearly all records have the same time to live, so nearly each is appended.
type Expiries<V> = VecDeque<Arc<Stored<V>>>;

/// A record as the key of itself in moka, so that its 32 bytes are there once. What is hashed lies beside the pointer: when moka rebuilds
/// its table, it hashes every key, and following each pointer would be a cache miss.
struct Place<V> {
    folded: u64,
    stored: Arc<Stored<V>>,
}

impl<V> Hash for Place<V> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.folded);
    }
}

impl<V> PartialEq for Place<V> {
    fn eq(&self, other: &Self) -> bool {
        self.folded == other.folded && self.stored.key == other.stored.key
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
        folded(self.0) == place.folded && *self.0 == place.stored.key
    }
}

/// Of every bit of a key, since an encoder of a user's may make keys that are no hashes.
fn folded(key: &EncodedKey) -> u64 {
    let (words, _) = key.as_bytes().as_chunks::<8>();
    words
        .iter()
        .fold(0, |folded, word| folded ^ u64::from_le_bytes(*word))
}

/// A record as it lies in moka.
struct Stored<V> {
    key: EncodedKey,
    /// By the storage's clock, see [`nanos`]. The record has expired from then on.
    deadline: u64,
    weight: u32,
    /// Taken out when the record leaves the cache.
    value: Mutex<Option<V>>,
}

impl<V> Stored<V> {
    fn clear(&self) {
        self.value().take();
    }

    fn is_cleared(&self) -> bool {
        self.value().is_none()
    }

    /// Nothing but a clone happens under this lock, so a poisoned one is whole.
    fn value(&self) -> MutexGuard<'_, Option<V>> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Except for [`settle`](Records::settle) and [`fits`](Records::fits), call these under the lock of the key's shard.
/// Then only moka changes anything meanwhile, and all that moka does is evict.
impl<V: Clone + Send + Sync + 'static> Records<V> {
    /// Records of `max_bytes` that are evicted when there are more of them, or that are never evicted.
    pub(super) fn new(ledger: Arc<Ledger>, max_bytes: Option<usize>) -> Self {
        // The least that can be kept is a tombstone. Without it, a completed operation would be forgotten at once.
        let capacity = max_bytes.map(|bytes| bytes.max(OVERHEAD) as u64);
        let listener = ledger.clone();
        let departed: Arc<[AtomicIsize]> = (0..SHARDS).map(|_| AtomicIsize::new(0)).collect();
        let departures = departed.clone();
        let mut cache = Cache::builder()
            // moka's default, TinyLFU, refuses new records when it is full. They are the ones whose retries are still to come.
            .eviction_policy(EvictionPolicy::lru())
            .weigher(|_, stored: &Arc<Stored<V>>| stored.weight)
            // No expiry of moka's: it would follow another clock than the leases, and a clock can't be moved in moka.
            .eviction_listener(move |_, stored: Arc<Stored<V>>, cause| {
                // Now, not when moka's epochs get round to what they hold: a hundred such bodies may be more than the limit.
                stored.clear();
                departures[shard_of(&stored.key)].fetch_add(1, Relaxed);
                let deadline = Duration::from_nanos(stored.deadline);
                listener.record_left(&stored.key, stored.weight, deadline, cause);
            });
        if let Some(capacity) = capacity {
            cache = cache.max_capacity(capacity);
        }
        Self {
            cache: cache.build_with_hasher(HashKeys::default()),
            ledger,
            capacity,
            expiries: (0..SHARDS).map(|_| Mutex::default()).collect(),
            departed,
            booked: AtomicUsize::new(0),
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
        // `None` if moka evicted it this instant.
        let value = stored.value();
        value.clone()
    }

    fn find(&self, key: &EncodedKey) -> Option<Arc<Stored<V>>> {
        self.booked.fetch_add(1, Relaxed);
        self.cache.get(&Sought(key))
    }

    /// Stores a record where none is.
    pub(super) fn insert(&self, key: &EncodedKey, value: V, weight: u32, deadline: Duration) {
        self.ledger.record_came(weight);
        let stored = Arc::new(Stored {
            key: *key,
            deadline: nanos(deadline),
            weight,
            value: Mutex::new(Some(value)),
        });
        let shard = shard_of(key);
        let departed = &self.departed[shard];
        let mut expiries = self.expiries(shard);
        let before = expiries.len();
        if departed.load(Relaxed) > (before / 4 + 32) as isize {
            // They hold on to memory: without this, until their time is over.
            expiries.retain(|stored| !stored.is_cleared());
            departed.fetch_sub((before - expiries.len()) as isize, Relaxed);
        }
        let at = match expiries.back() {
            Some(last) if last.deadline > stored.deadline => {
                expiries.partition_point(|other| other.deadline <= stored.deadline)
            }
            _ => expiries.len(),
        };
        expiries.insert(at, stored.clone());
        let place = Place {
            folded: folded(key),
            stored: stored.clone(),
        };
        self.booked.fetch_add(1, Relaxed);
        self.cache.insert(place, stored);
    }

    pub(super) fn remove(&self, key: &EncodedKey) {
        self.booked.fetch_add(1, Relaxed);
        self.cache.invalidate(&Sought(key));
    }

    /// Forgets up to `at_most` records of `shard` that have expired or left, those that expire first. Says whether there may be more.
    pub(super) fn sweep(&self, shard: usize, now: Duration, at_most: usize) -> bool {
        let now = nanos(now);
        let mut expiries = self.expiries(shard);
        for _ in 0..at_most {
            match expiries.front() {
                Some(next) if next.deadline <= now || next.is_cleared() => {}
                _ => return false,
            }
            let Some(stored) = expiries.pop_front() else {
                return false;
            };
            if !stored.is_cleared() {
                let found = self.find(&stored.key);
                if found.is_some_and(|found| Arc::ptr_eq(&found, &stored)) {
                    self.remove(&stored.key);
                }
            }
            self.departed[shard].fetch_sub(1, Relaxed);
        }
        true
    }

    /// Nothing under this lock panics but moka, after the queue was changed, so a poisoned one is whole.
    fn expiries(&self, shard: usize) -> MutexGuard<'_, Expiries<V>> {
        self.expiries[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Does moka's housekeeping where that is due. Call it after each operation, without a lock: moka would do it in the middle of a
    /// later operation, under the lock of a shard, where other requests would wait for it.
    pub(super) fn settle(&self) {
        let is_over = self
            .capacity
            .is_some_and(|capacity| self.ledger.record_weight() > capacity + capacity / SLACK);
        if is_over {
            self.cache.run_pending_tasks();
        } else if self.booked.load(Relaxed) >= HOUSEKEEPING
            // One is enough, the others go on.
            && let Ok(_housekeeping) = self.housekeeping.try_lock()
        {
            self.booked.store(0, Relaxed);
            self.cache.run_pending_tasks();
        }
    }
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
