//! The completed records: a moka cache, and what it takes to keep its promises.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use moka::{policy::EvictionPolicy, sync::Cache};

use super::ledger::Ledger;
use crate::{EncodedKey, Outcome, Record, Token, TombstoneReason};

/// What a record takes besides its body and its headers, in bytes: [`Stored`], its place in the ledger, and moka's nodes,
/// table and buffers. With moka 0.12.16 that is 550, and 573 once it was read; the rest is for what the allocator rounds up
/// ten blocks by. `tests/memory_limits.rs` holds the whole to its limit.
const OVERHEAD: usize = 704;

/// The part of the capacity by which records may be over it before moka is told to evict at once. Otherwise moka takes its
/// time: it looks after every 64 writes, which may be 64 of the largest answers.
const SLACK: u64 = 32;

/// Why a record that can't be kept has no answer to replay.
pub(super) const TOO_LARGE: TombstoneReason = TombstoneReason::ResponseTooLarge;

pub(super) struct Records {
    cache: Cache<EncodedKey, Arc<Stored>>,
    ledger: Arc<Ledger>,
    /// `None` where nothing is evicted.
    capacity: Option<u64>,
}

/// A record as it lies in moka.
pub(super) struct Stored {
    /// Unique within the storage.
    pub(super) id: u64,
    pub(super) completed_by: Token,
    /// By the storage's clock. The record has expired from then on.
    pub(super) deadline: Duration,
    pub(super) weight: u32,
    /// Taken out when the record leaves the cache.
    record: Mutex<Option<Record>>,
}

impl Stored {
    pub(super) fn clear(&self) {
        self.record().take();
    }

    /// Nothing but a clone happens under this lock, so a poisoned one is whole.
    fn record(&self) -> MutexGuard<'_, Option<Record>> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A live record.
pub(super) struct Found {
    pub(super) record: Record,
    pub(super) completed_by: Token,
}

/// Except for [`settle`](Records::settle) and [`fitting`](Records::fitting), call these under the lock of the key's shard.
/// Then only moka changes anything meanwhile, and all that moka does is evict.
impl Records {
    /// Records of `max_bytes` that are evicted when there are more of them, or that are never evicted.
    pub(super) fn new(ledger: Arc<Ledger>, max_bytes: Option<usize>) -> Self {
        // The least that can be kept is a tombstone. Without it, a completed operation would be forgotten at once.
        let capacity = max_bytes.map(|bytes| bytes.max(OVERHEAD) as u64);
        let listener = ledger.clone();
        let mut cache = Cache::builder()
            // moka's default, TinyLFU, refuses new records when it is full. They are the ones whose retries are still to come.
            .eviction_policy(EvictionPolicy::lru())
            .weigher(|_, stored: &Arc<Stored>| stored.weight)
            // No expiry of moka's: it would follow another clock than the leases, and a clock can't be moved in moka.
            .eviction_listener(move |key: Arc<EncodedKey>, stored: Arc<Stored>, cause| {
                listener.record_left(&key, &stored, cause);
            });
        if let Some(capacity) = capacity {
            cache = cache.max_capacity(capacity);
        }
        Self {
            cache: cache.build(),
            ledger,
            capacity,
        }
    }

    /// `record`, or a tombstone in its place if it is larger than all that can be kept, and whether it is: moka would drop it
    /// at once, and a retry would run the operation again.
    pub(super) fn fitting(&self, record: Record) -> (Record, bool) {
        let fits = self
            .capacity
            .is_none_or(|capacity| u64::from(weight(&record)) <= capacity);
        if fits {
            return (record, false);
        }
        let tombstone = Record {
            fingerprint: record.fingerprint,
            outcome: Outcome::Tombstone(TOO_LARGE),
        };
        (tombstone, true)
    }

    /// The record of `key` if there is one and it is not expired.
    pub(super) fn get(&self, key: &EncodedKey, now: Duration) -> Option<Found> {
        let stored = self.cache.get(key)?;
        if stored.deadline <= now {
            self.remove(key);
            return None;
        }
        // `None` if moka evicted it this instant.
        let record = stored.record().clone()?;
        Some(Found {
            record,
            completed_by: stored.completed_by,
        })
    }

    /// Stores a record where none is.
    pub(super) fn insert(
        &self,
        key: &EncodedKey,
        record: Record,
        completed_by: Token,
        deadline: Duration,
    ) {
        let stored = Stored {
            id: self.ledger.next_id(),
            completed_by,
            deadline,
            weight: weight(&record),
            record: Mutex::new(Some(record)),
        };
        self.ledger.record_came(key, &stored);
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

/// moka's weights are 32 bits wide. A record of 4 GiB weighs less than it should, by what it is larger.
fn weight(record: &Record) -> u32 {
    u32::try_from(record.weight().saturating_add(OVERHEAD)).unwrap_or(u32::MAX)
}
