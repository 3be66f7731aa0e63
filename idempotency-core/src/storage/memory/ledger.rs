//! What the storage holds: how many bytes, records and claims.
//!
//! moka tells the ledger of everything that leaves it, by whatever way, so the ledger is exact where moka's own counters lag.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use moka::notification::RemovalCause;

use crate::{EncodedKey, Env, Event, event::Observers};

/// What a claim weighs: its slot in a hash table that may be a little less than half full. A test in `tests/memory_limits.rs`
/// compares it with the heap.
pub(super) const CLAIM_WEIGHT: u64 = 288;

pub(super) struct Ledger {
    /// Of records and claims together: one number, so that "is there room? then take it" is one atomic step.
    weight: AtomicU64,
    records: AtomicU64,
    claims: AtomicUsize,
    evicted: AtomicU64,
    /// The number of evicted records at which observers are told again.
    report_at: AtomicU64,
    /// The first key evicted since then.
    to_report: Mutex<Option<EncodedKey>>,
    env: Env,
    observers: Observers,
}

impl Ledger {
    pub(super) fn new(env: Env, observers: Observers) -> Self {
        Self {
            weight: AtomicU64::new(0),
            records: AtomicU64::new(0),
            claims: AtomicUsize::new(0),
            evicted: AtomicU64::new(0),
            report_at: AtomicU64::new(1),
            to_report: Mutex::new(None),
            env,
            observers,
        }
    }

    pub(super) fn weight(&self) -> u64 {
        self.weight.load(Relaxed)
    }

    /// What the records weigh, without the claims. Two numbers read one after the other: good for a hint.
    pub(super) fn record_weight(&self) -> u64 {
        self.weight()
            .saturating_sub(self.claims() as u64 * CLAIM_WEIGHT)
    }

    pub(super) fn records(&self) -> u64 {
        self.records.load(Relaxed)
    }

    pub(super) fn claims(&self) -> usize {
        self.claims.load(Relaxed)
    }

    pub(super) fn evicted(&self) -> u64 {
        self.evicted.load(Relaxed)
    }

    /// Books a claim unless the weight has reached `limit`. Says whether it did.
    #[must_use]
    pub(super) fn claim_started(&self, limit: Option<u64>) -> bool {
        let booked = self.weight.fetch_update(Relaxed, Relaxed, |weight| {
            let room = limit.is_none_or(|limit| weight < limit);
            room.then_some(weight + CLAIM_WEIGHT)
        });
        if booked.is_ok() {
            self.claims.fetch_add(1, Relaxed);
        }
        booked.is_ok()
    }

    pub(super) fn claims_ended(&self, count: usize) {
        if count > 0 {
            self.claims.fetch_sub(count, Relaxed);
            self.weight.fetch_sub(count as u64 * CLAIM_WEIGHT, Relaxed);
        }
    }

    /// Counts a record. Before moka has it, because moka may evict it as soon as it has.
    pub(super) fn record_came(&self, weight: u32) {
        self.weight.fetch_add(u64::from(weight), Relaxed);
        self.records.fetch_add(1, Relaxed);
    }

    /// For moka's eviction listener.
    pub(super) fn record_left(
        &self,
        key: &EncodedKey,
        weight: u32,
        deadline: Duration,
        cause: RemovalCause,
    ) {
        self.records.fetch_sub(1, Relaxed);
        self.weight.fetch_sub(u64::from(weight), Relaxed);
        if cause == RemovalCause::Size && self.env.now() < deadline {
            let total = self.evicted.fetch_add(1, Relaxed) + 1;
            if total >= self.report_at.load(Relaxed) {
                self.to_report().get_or_insert(*key);
            }
        }
    }

    /// Tells observers of evictions: of the first, and then whenever their number has doubled. Call it with no lock held: an
    /// observer may call the storage.
    pub(super) fn report_evictions(&self) {
        if self.evicted() < self.report_at.load(Relaxed) {
            return;
        }
        let (key, total) = {
            let mut first = self.to_report();
            let Some(key) = first.take() else {
                return;
            };
            let total = self.evicted();
            self.report_at.store(total.saturating_mul(2), Relaxed);
            (key, total)
        };
        self.emit(&Event::Evicted { key, total });
    }

    /// Tells every observer of `event`.
    pub(super) fn emit(&self, event: &Event<'_>) {
        self.observers.emit(event);
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn to_report(&self) -> MutexGuard<'_, Option<EncodedKey>> {
        self.to_report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
