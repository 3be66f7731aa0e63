//! What the storage holds: how many bytes and records.
//!
//! Each record is booked when it comes and when it leaves, by whatever way, so the ledger is exact where moka's own counters lag.
//! Each shard has a page of its own, since two cores that write to the same few bytes wait for each other.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicIsize, AtomicU64, Ordering::Relaxed},
};

use super::SHARDS;
use crate::{EncodedKey, storage::lease::lock};

/// What a claim weighs: its slot in a hash table that may be a little less than half full. A test in `tests/memory_limits.rs`
/// compares it with the heap.
pub(super) const CLAIM_WEIGHT: u64 = 288;

pub(in crate::storage) struct Ledger {
    pub(super) pages: Box<[Arc<Page>]>,
    whole: Arc<Whole>,
}

/// What one shard holds. As large as what two cores exchange at once.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Page {
    weight: AtomicU64,
    /// What the records weigh that are in memory, with those that have left and are not dropped yet.
    held: AtomicU64,
    records: AtomicU64,
    /// How many of the records that have left are still among the shard's expiries. Below zero for an instant, where one is forgotten
    /// there before it is booked here.
    pub(super) departed: AtomicIsize,
    whole: Arc<Whole>,
}

/// What is counted over all shards. Records may outlive their storage for a while, so nothing of a user's is in here.
#[derive(Default)]
struct Whole {
    /// Where new claims are refused rather than records evicted: once records and claims weigh so much.
    most: Option<u64>,
    /// Of records and claims together, if there is a `most`: one number, so that "is there room? then take it" is one atomic step.
    weight: AtomicU64,
    evicted: AtomicU64,
    /// How many evicted records were last told of.
    reported: AtomicU64,
    /// The first key evicted since then.
    to_report: Mutex<Option<EncodedKey>>,
    /// The time at the last housekeeping. A record is dropped by any thread at any time, so no clock is asked then.
    now: AtomicU64,
}

impl Ledger {
    /// No claim is started once records and claims weigh `most`.
    pub(super) fn new(most: Option<usize>) -> Self {
        let whole = Arc::new(Whole {
            most: most.map(|most| most as u64),
            ..Whole::default()
        });
        let page = |_| Page {
            whole: whole.clone(),
            ..Page::default()
        };
        Self {
            pages: (0..SHARDS).map(page).map(Arc::new).collect(),
            whole,
        }
    }

    /// What the records weigh, without the claims.
    pub(in crate::storage) fn record_weight(&self) -> u64 {
        let pages = self.pages.iter();
        pages.map(|page| page.weight.load(Relaxed)).sum()
    }

    /// The same with what has left, but is not dropped yet.
    pub(super) fn held(&self) -> u64 {
        let pages = self.pages.iter();
        pages.map(|page| page.held.load(Relaxed)).sum()
    }

    pub(in crate::storage) fn records(&self) -> u64 {
        let pages = self.pages.iter();
        pages.map(|page| page.records.load(Relaxed)).sum()
    }

    pub(in crate::storage) fn evicted(&self) -> u64 {
        self.whole.evicted.load(Relaxed)
    }

    /// Tells the time, in nanoseconds by the storage's clock.
    pub(super) fn is_now(&self, now: u64) {
        self.whole.now.fetch_max(now, Relaxed);
    }

    /// Whether a new claim would be refused.
    pub(super) fn is_full(&self) -> bool {
        let weight = self.whole.weight.load(Relaxed);
        self.whole.most.is_some_and(|most| weight >= most)
    }

    /// Books a claim unless the storage is full. Says whether it did.
    #[must_use]
    pub(super) fn claim_started(&self) -> bool {
        self.whole.most.is_none_or(|most| {
            let grown = |weight| (weight < most).then_some(weight + CLAIM_WEIGHT);
            let weight = &self.whole.weight;
            weight.fetch_update(Relaxed, Relaxed, grown).is_ok()
        })
    }

    pub(super) fn claims_ended(&self, count: usize) {
        self.whole.lighter_by(count as u64 * CLAIM_WEIGHT);
    }

    /// The first key evicted since the last report and how many were in all, if that is due: at the first, and when the number has doubled.
    pub(super) fn evictions_to_report(&self) -> Option<(EncodedKey, u64)> {
        let whole = &*self.whole;
        if !whole.is_report_due() {
            return None;
        }
        let mut first = lock(&whole.to_report);
        let key = first.take()?;
        let total = self.evicted();
        whole.reported.store(total, Relaxed);
        Some((key, total))
    }
}

impl Page {
    /// Counts a record. Before moka has it, because moka may evict it as soon as it has.
    pub(super) fn record_came(&self, weight: u32) {
        let weight = u64::from(weight);
        self.records.fetch_add(1, Relaxed);
        self.weight.fetch_add(weight, Relaxed);
        self.held.fetch_add(weight, Relaxed);
        if self.whole.most.is_some() {
            self.whole.weight.fetch_add(weight, Relaxed);
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

    /// Counts what a record took as free.
    pub(super) fn record_dropped(&self, weight: u32) {
        self.held.fetch_sub(weight.into(), Relaxed);
    }

    /// Counts a record that left to make room, if it was still live.
    pub(super) fn record_evicted(&self, key: &EncodedKey, deadline: u64) {
        let whole = &*self.whole;
        if whole.now.load(Relaxed) < deadline {
            whole.evicted.fetch_add(1, Relaxed);
            if whole.is_report_due() {
                lock(&whole.to_report).get_or_insert(*key);
            }
        }
    }
}

impl Whole {
    fn lighter_by(&self, weight: u64) {
        if self.most.is_some() {
            self.weight.fetch_sub(weight, Relaxed);
        }
    }

    fn is_report_due(&self) -> bool {
        let reported = self.reported.load(Relaxed);
        self.evicted.load(Relaxed) >= reported.saturating_mul(2).max(1)
    }
}
