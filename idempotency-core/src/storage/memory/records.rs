//! The completed records: a moka cache, and what it takes to keep its promises. What exactly a record is, `V`, is up to whom
//! they belong to.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use moka::{policy::EvictionPolicy, sync::Cache};

use super::{
    SHARDS, WhenFull,
    ledger::{Ledger, Page},
    shard_of,
};
use crate::{EncodedKey, key::HashKeys, storage::lease::lock};

/// What a record takes besides its body and its headers, in bytes: [`Stored`], its place among the expiries, and moka's nodes,
/// table and buffers. With moka 0.12.16 that is 414 at most, and 437 once it was read; the rest is for what the allocator rounds up
/// nine blocks by. `tests/memory_limits.rs` holds the whole to its limit.
const OVERHEAD: usize = 560;

/// After so many reads and writes moka does its housekeeping, which is before it would do it by itself: after 64 reads or 64 writes.
const HOUSEKEEPING: u64 = 60;

/// After so long, too, so that it is not before 300 ms are over, when moka would do it by itself.
const PERIOD: Duration = Duration::from_millis(200);

/// The part of the limit after which it does so too, because so many of the largest answers would be much more than the limit; and by
/// which what is held may be over it.
const SLACK: u64 = 32;

/// How many steps crossbeam's epochs, in which moka puts what it evicts, are asked to go before anybody looks whether that is dropped.
const STEPS: usize = 3;

/// How many they are asked to go at most: a thread that stands still inside of moka holds them up, for some milliseconds where many
/// threads share a core.
const MOST_STEPS: usize = 10_000;

pub(super) struct Records<V> {
    cache: Cache<Place, Arc<Stored<V>>, HashKeys>,
    places: [HashKeys; 2],
    pub(super) ledger: Ledger,
    max_bytes: u64,
    /// The same, or where nothing is evicted, more than can be.
    pub(super) capacity: u64,
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

/// Where the record of a key lies in moka: half as long as the key, which lies in [`Stored`]. Two keys of one place are as unlikely as two
/// equal tokens; then a record would be lost, but none mistaken for another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Place([u64; 2]);

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
            self.page.record_evicted(&self.key, self.deadline);
        }
        self.page.record_dropped(self.weight);
    }
}

/// Except for [`settle`](Records::settle) and [`catch_up`](Records::catch_up), call these under the lock of the key's shard.
/// Then only moka changes anything meanwhile, and all that moka does is evict.
impl<V: Clone + Send + Sync + 'static> Records<V> {
    pub(super) fn new(max_bytes: usize, when_full: WhenFull) -> Self {
        // The least that can be kept is a tombstone. Without it, a completed operation would be forgotten at once.
        let at_least_one = max_bytes.max(OVERHEAD) as u64;
        let (capacity, limit) = match when_full {
            WhenFull::Evict => (at_least_one, None),
            WhenFull::Refuse => (u64::MAX, Some(max_bytes)),
        };
        let cache = Cache::builder()
            // moka's default, TinyLFU, refuses new records when it is full. They are the ones whose retries are still to come.
            .eviction_policy(EvictionPolicy::lru())
            // No expiry of moka's: it would follow another clock than the leases, and a clock can't be moved in moka.
            .weigher(|_, stored: &Arc<Stored<V>>| stored.weight)
            .max_capacity(capacity)
            .build_with_hasher(HashKeys::default());
        Self {
            cache,
            places: Default::default(),
            ledger: Ledger::new(limit),
            max_bytes: at_least_one,
            capacity,
            expiries: (0..SHARDS).map(|_| Mutex::default()).collect(),
            booked: AtomicU64::new(0),
            due: AtomicU64::new(0),
            housekeeping: Mutex::new(()),
        }
    }

    /// The record of `key` if there is one and it is not expired.
    pub(super) fn get(&self, key: &EncodedKey, now: Duration) -> Option<V> {
        self.booked.fetch_add(1, Relaxed);
        let found = self.cache.get(&self.place(key));
        let stored = found.filter(|stored| stored.key == *key)?;
        if stored.deadline <= nanos(now) {
            self.remove(key);
            return None;
        }
        Some(stored.value.clone())
    }

    fn place(&self, key: &EncodedKey) -> Place {
        Place(self.places.each_ref().map(|half| half.hash_one(key)))
    }

    /// Stores a record where none is.
    pub(super) fn insert(&self, key: &EncodedKey, value: V, weight: u32, deadline: Duration) {
        let shard = shard_of(key);
        let page = &self.ledger.pages[shard];
        page.record_came(weight);
        let stored = Arc::new(Stored {
            key: *key,
            deadline: nanos(deadline),
            weight,
            has_left: AtomicBool::new(false),
            value,
            page: page.clone(),
        });
        let mut expiries = lock(&self.expiries[shard]);
        let before = expiries.len();
        if page.departed.load(Relaxed) > (before / 4 + 32) as isize {
            // They hold on to memory: without this, until their time is over.
            expiries.retain(|stored| live(stored).is_some());
        }
        let at = position(&mut expiries, stored.deadline);
        let forgotten = (before - expiries.len()) as isize;
        page.departed.fetch_sub(forgotten, Relaxed);
        expiries.insert(at, Arc::downgrade(&stored));
        self.booked.fetch_add(self.operations(weight), Relaxed);
        self.cache.insert(self.place(key), stored);
    }

    pub(super) fn remove(&self, key: &EncodedKey) {
        if let Some(stored) = self.cache.remove(&self.place(key)) {
            stored.leave();
            // So that its memory is given back with this operation.
            self.booked.fetch_add(HOUSEKEEPING, Relaxed);
        }
    }

    /// Forgets up to `at_most` records of `shard` that have expired or left, those that expire first. Says whether there may be more.
    pub(super) fn sweep(&self, shard: usize, now: Duration, at_most: usize) -> bool {
        let now = nanos(now);
        let mut expiries = lock(&self.expiries[shard]);
        for _ in 0..at_most {
            let Some(next) = expiries.front().map(live) else {
                return false;
            };
            if let Some(stored) = next {
                if stored.deadline > now {
                    return false;
                }
                self.booked
                    .fetch_add(self.operations(stored.weight), Relaxed);
                let place = self.place(&stored.key);
                let found = self.cache.get(&place);
                if found.is_some_and(|found| Arc::ptr_eq(&found, &stored)) {
                    self.cache.invalidate(&place);
                }
                // Also if moka has just evicted it.
                stored.leave();
            }
            expiries.pop_front();
            self.ledger.pages[shard].departed.fetch_sub(1, Relaxed);
        }
        true
    }

    /// For how many operations a record of this weight counts.
    fn operations(&self, weight: u32) -> u64 {
        1 + u64::from(weight) * SLACK * HOUSEKEEPING / self.max_bytes
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
            Err(_) if booked < 2 * HOUSEKEEPING => return,
            Err(_) => lock(&self.housekeeping),
        };
        self.booked.store(0, Relaxed);
        self.due.store(nanos(now.saturating_add(PERIOD)), Relaxed);
        self.ledger.is_now(nanos(now));
        self.keep_house(|| {
            let live = self.ledger.record_weight().max(self.max_bytes);
            self.ledger.held() <= self.capacity.min(live) + self.max_bytes / SLACK
        });
    }

    /// Drops all that has left, unless other threads are in moka.
    pub(super) fn catch_up(&self, now: Duration) {
        self.ledger.is_now(nanos(now));
        self.keep_house(|| self.ledger.records() <= self.cache.entry_count());
    }

    /// Has moka do all that it has put off, and drops what has left until that is enough.
    fn keep_house(&self, is_enough: impl Fn() -> bool) {
        self.cache.run_pending_tasks();
        for step in 1..=MOST_STEPS {
            crossbeam_epoch::pin().flush();
            if step >= STEPS {
                if is_enough() {
                    return;
                }
                // To a thread that was taken off its core inside of moka.
                thread::yield_now();
                self.cache.run_pending_tasks();
            }
        }
    }
}

/// What an entry of the expiries stands for, if it is still there.
fn live<V>(stored: &Weak<Stored<V>>) -> Option<Arc<Stored<V>>> {
    let stored = stored.upgrade()?;
    (!stored.has_left.load(Relaxed)).then_some(stored)
}

/// Where a record of this deadline belongs: behind all that expire before it. Entries that are in the way, but stand for nothing any more,
/// are taken out.
fn position<V>(expiries: &mut Expiries<V>, deadline: u64) -> usize {
    loop {
        match expiries.back().map(live) {
            Some(None) => drop(expiries.pop_back()),
            Some(Some(last)) if last.deadline > deadline => break,
            _ => return expiries.len(),
        }
    }
    let (mut from, mut to) = (0, expiries.len());
    while from < to {
        let middle = from.midpoint(to);
        match live(&expiries[middle]) {
            Some(stored) if stored.deadline > deadline => to = middle,
            Some(_) => from = middle + 1,
            None => {
                let is_live = |at: &usize| live(&expiries[*at]).is_some();
                let gone = (from..middle).rev().find(is_live).map_or(from, |at| at + 1);
                expiries.drain(gone..=middle);
                to -= middle + 1 - gone;
            }
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
