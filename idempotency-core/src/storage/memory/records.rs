//! The completed records: a moka cache, and what it takes to keep its promises. What exactly a record is, `V`, is up to whom
//! they belong to.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use moka::{policy::EvictionPolicy, sync::Cache};

use super::ledger::{Booking, Ledger};
use crate::{EncodedKey, Outcome, Record, TombstoneReason, key::HashKeys};

/// What a record takes besides its body and its headers, in bytes: [`Stored`], its place in the ledger, and moka's nodes,
/// table and buffers. With moka 0.12.16 that is 550, and 573 once it was read; the rest is for what the allocator rounds up
/// ten blocks by. `tests/memory_limits.rs` holds the whole to its limit.
const OVERHEAD: usize = 704;

/// The part of the capacity by which records may be over it before moka is told to evict at once. Otherwise moka takes its
/// time: it looks after every 64 writes, which may be 64 of the largest answers.
const SLACK: u64 = 32;

/// Why a record that can't be kept has no answer to replay.
pub(super) const TOO_LARGE: TombstoneReason = TombstoneReason::ResponseTooLarge;

pub(super) struct Records<V> {
    cache: Cache<EncodedKey, Arc<Stored<V>>, HashKeys>,
    ledger: Arc<Ledger>,
    /// `None` where nothing is evicted.
    capacity: Option<u64>,
}

/// A record as it lies in moka.
struct Stored<V> {
    booking: Booking,
    /// Taken out when the record leaves the cache.
    value: Mutex<Option<V>>,
}

impl<V> Stored<V> {
    fn clear(&self) {
        self.value().take();
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
        let mut cache = Cache::builder()
            // moka's default, TinyLFU, refuses new records when it is full. They are the ones whose retries are still to come.
            .eviction_policy(EvictionPolicy::lru())
            .weigher(|_, stored: &Arc<Stored<V>>| stored.booking.weight)
            // No expiry of moka's: it would follow another clock than the leases, and a clock can't be moved in moka.
            .eviction_listener(move |key: Arc<EncodedKey>, stored: Arc<Stored<V>>, cause| {
                // Now, not when moka's epochs get round to what they hold: a hundred such bodies may be more than the limit.
                stored.clear();
                listener.record_left(&key, &stored.booking, cause);
            });
        if let Some(capacity) = capacity {
            cache = cache.max_capacity(capacity);
        }
        Self {
            cache: cache.build_with_hasher(HashKeys::default()),
            ledger,
            capacity,
        }
    }

    /// Whether something of this weight can be kept at all: moka would drop it at once, and nobody would know.
    pub(super) fn fits(&self, weight: u32) -> bool {
        self.capacity
            .is_none_or(|capacity| u64::from(weight) <= capacity)
    }

    /// The record of `key` if there is one and it is not expired.
    pub(super) fn get(&self, key: &EncodedKey, now: Duration) -> Option<V> {
        let stored = self.cache.get(key)?;
        if stored.booking.deadline <= now {
            self.remove(key);
            return None;
        }
        // `None` if moka evicted it this instant.
        let value = stored.value();
        value.clone()
    }

    /// Stores a record where none is.
    pub(super) fn insert(&self, key: &EncodedKey, value: V, weight: u32, deadline: Duration) {
        let stored = Stored {
            booking: self.ledger.record_came(key, weight, deadline),
            value: Mutex::new(Some(value)),
        };
        self.cache.insert(*key, Arc::new(stored));
    }

    pub(super) fn remove(&self, key: &EncodedKey) {
        self.cache.invalidate(key);
    }

    /// Removes up to `at_most` expired records of `shard`. Says whether there may be more.
    pub(super) fn sweep(&self, shard: usize, now: Duration, at_most: usize) -> bool {
        let expired = self.ledger.expired(shard, now, at_most);
        for key in &expired {
            self.remove(key);
        }
        expired.len() == at_most
    }

    /// Evicts at once where moka is too far behind.
    pub(super) fn settle(&self) {
        let Some(capacity) = self.capacity else {
            return;
        };
        if self.ledger.record_weight() > capacity + capacity / SLACK {
            self.cache.run_pending_tasks();
        }
    }
}

/// `record`, or a tombstone in its place if it is larger than all that `records` can keep, and whether it is: a retry would run
/// the operation again.
pub(super) fn fitting<V>(records: &Records<V>, record: Record) -> (Record, bool)
where
    V: Clone + Send + Sync + 'static,
{
    if records.fits(weight(record.weight())) {
        return (record, false);
    }
    let tombstone = Record {
        fingerprint: record.fingerprint,
        outcome: Outcome::Tombstone(TOO_LARGE),
    };
    (tombstone, true)
}

/// What a record of so many bytes weighs. moka's weights are 32 bits wide: one of 4 GiB weighs less than it should, by what it
/// is larger.
pub(super) fn weight(bytes: usize) -> u32 {
    u32::try_from(bytes.saturating_add(OVERHEAD)).unwrap_or(u32::MAX)
}
