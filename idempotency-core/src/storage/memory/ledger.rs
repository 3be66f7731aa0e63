//! What the storage holds: how many bytes, records and claims.
//!
//! Each record is booked when it comes and when it leaves, by whatever way, so the ledger is exact where moka's own counters lag.
//! Each shard has a page of its own, since two cores that write to the same few bytes wait for each other.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicIsize, AtomicU64, AtomicUsize, Ordering::Relaxed},
};

use super::SHARDS;
use crate::{EncodedKey, Event, event::Observers};

/// What a claim weighs: its slot in a hash table that may be a little less than half full. A test in `tests/memory_limits.rs`
/// compares it with the heap.
pub(super) const CLAIM_WEIGHT: u64 = 288;

pub(super) struct Ledger {
    pages: Box<[Arc<Page>]>,
    whole: Arc<Whole>,
    observers: Observers,
}

/// What one shard holds. As large as what two cores exchange at once.
#[repr(align(128))]
pub(super) struct Page {
    /// Of the records.
    weight: AtomicU64,
    records: AtomicU64,
    claims: AtomicUsize,
    /// How many of the records that have left are still among the shard's expiries.
    departed: AtomicIsize,
    whole: Arc<Whole>,
}

/// What is counted over all shards. Records may outlive their storage for a while, so nothing of a user's is in here.
struct Whole {
    limit: Option<Limit>,
    evicted: AtomicU64,
    /// The number of evicted records at which observers are told again.
    report_at: AtomicU64,
    /// The first key evicted since then.
    to_report: Mutex<Option<EncodedKey>>,
    /// The time at the last housekeeping. A record is dropped by any thread at any time, so no clock is asked then.
    now: AtomicU64,
}

/// Where new claims are refused rather than records evicted.
struct Limit {
    most: u64,
    /// Of records and claims together: one number, so that "is there room? then take it" is one atomic step.
    weight: AtomicU64,
}

impl Ledger {
    /// No claim is started once records and claims weigh `most`.
    pub(super) fn new(observers: Observers, most: Option<usize>) -> Self {
        let whole = Arc::new(Whole {
            limit: most.map(|most| Limit {
                most: most as u64,
                weight: AtomicU64::new(0),
            }),
            evicted: AtomicU64::new(0),
            report_at: AtomicU64::new(1),
            to_report: Mutex::new(None),
            now: AtomicU64::new(0),
        });
        let page = || {
            Arc::new(Page {
                weight: AtomicU64::new(0),
                records: AtomicU64::new(0),
                claims: AtomicUsize::new(0),
                departed: AtomicIsize::new(0),
                whole: whole.clone(),
            })
        };
        Self {
            pages: (0..SHARDS).map(|_| page()).collect(),
            whole,
            observers,
        }
    }

    pub(super) fn page(&self, shard: usize) -> &Arc<Page> {
        &self.pages[shard]
    }

    pub(super) fn weight(&self) -> u64 {
        self.record_weight() + self.claims() as u64 * CLAIM_WEIGHT
    }

    /// What the records weigh, without the claims.
    pub(super) fn record_weight(&self) -> u64 {
        self.sum(|page| page.weight.load(Relaxed))
    }

    pub(super) fn records(&self) -> u64 {
        self.sum(|page| page.records.load(Relaxed))
    }

    pub(super) fn claims(&self) -> usize {
        self.sum(|page| page.claims.load(Relaxed))
    }

    pub(super) fn evicted(&self) -> u64 {
        self.whole.evicted.load(Relaxed)
    }

    /// Tells the time, in nanoseconds by the storage's clock.
    pub(super) fn is_now(&self, now: u64) {
        self.whole.now.store(now, Relaxed);
    }

    /// Whether a new claim would be refused.
    pub(super) fn is_full(&self) -> bool {
        let limit = self.whole.limit.as_ref();
        limit.is_some_and(|limit| limit.weight.load(Relaxed) >= limit.most)
    }

    /// Tells observers of evictions: of the first, and then whenever their number has doubled. Call it with no lock held: an
    /// observer may call the storage.
    pub(super) fn report_evictions(&self) {
        let whole = &*self.whole;
        if self.evicted() < whole.report_at.load(Relaxed) {
            return;
        }
        let (key, total) = {
            let mut first = whole.to_report();
            let Some(key) = first.take() else {
                return;
            };
            let total = self.evicted();
            whole.report_at.store(total.saturating_mul(2), Relaxed);
            (key, total)
        };
        self.emit(&Event::Evicted { key, total });
    }

    /// Tells every observer of `event`.
    pub(super) fn emit(&self, event: &Event<'_>) {
        self.observers.emit(event);
    }

    fn sum<N: std::iter::Sum>(&self, count: impl Fn(&Page) -> N) -> N {
        self.pages.iter().map(|page| count(page)).sum()
    }
}

impl Page {
    /// Books a claim unless the storage is full. Says whether it did.
    #[must_use]
    pub(super) fn claim_started(&self) -> bool {
        let is_booked = self.whole.limit.as_ref().is_none_or(|limit| {
            let grown = |weight| (weight < limit.most).then_some(weight + CLAIM_WEIGHT);
            limit.weight.fetch_update(Relaxed, Relaxed, grown).is_ok()
        });
        if is_booked {
            self.claims.fetch_add(1, Relaxed);
        }
        is_booked
    }

    pub(super) fn claims_ended(&self, count: usize) {
        if count > 0 {
            self.claims.fetch_sub(count, Relaxed);
            self.whole.lighter_by(count as u64 * CLAIM_WEIGHT);
        }
    }

    /// Counts a record. Before moka has it, because moka may evict it as soon as it has.
    pub(super) fn record_came(&self, weight: u32) {
        let weight = u64::from(weight);
        self.records.fetch_add(1, Relaxed);
        self.weight.fetch_add(weight, Relaxed);
        if let Some(limit) = &self.whole.limit {
            limit.weight.fetch_add(weight, Relaxed);
        }
    }

    /// Counts a record no longer: it was removed, has expired, or was evicted.
    pub(super) fn record_left(&self, weight: u32) {
        let weight = u64::from(weight);
        self.records.fetch_sub(1, Relaxed);
        self.weight.fetch_sub(weight, Relaxed);
        self.departed.fetch_add(1, Relaxed);
        self.whole.lighter_by(weight);
    }

    /// Counts a record that left to make room, if it was still live.
    pub(super) fn record_evicted(&self, key: &EncodedKey, deadline: u64) {
        let whole = &*self.whole;
        if whole.now.load(Relaxed) < deadline {
            let total = whole.evicted.fetch_add(1, Relaxed) + 1;
            if total >= whole.report_at.load(Relaxed) {
                whole.to_report().get_or_insert(*key);
            }
        }
    }

    /// Below zero for an instant, where an expiry is forgotten before its record is booked as gone.
    pub(super) fn departed(&self) -> isize {
        self.departed.load(Relaxed)
    }

    /// Expiries of records that had left were forgotten.
    pub(super) fn forgotten(&self, count: usize) {
        self.departed.fetch_sub(count as isize, Relaxed);
    }
}

impl Whole {
    fn lighter_by(&self, weight: u64) {
        if let Some(limit) = &self.limit {
            limit.weight.fetch_sub(weight, Relaxed);
        }
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn to_report(&self) -> MutexGuard<'_, Option<EncodedKey>> {
        self.to_report
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
