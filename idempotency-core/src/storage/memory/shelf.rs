//! Records in shards, and what is decided in one step with them.

use std::{
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use super::{
    SHARDS, SWEEP, WhenFull,
    ledger::Ledger,
    records::{self, Records},
    shard_of,
};
use crate::{EncodedKey, Env, Event, event::Observers, storage::lease::lock};

/// Values by key: up to a number of bytes, those least used leave first, and each until its time is over. Beside each lock lies
/// a `G`, for what has to be decided in one step with a change.
pub(in crate::storage) struct Shelf<G, V> {
    /// `std`'s locks, because sections are short and never await.
    pub(super) shards: Box<[Mutex<G>]>,
    pub(super) records: Records<V>,
    /// `None` where nobody need be told of evictions, as the values are elsewhere too.
    pub(super) observers: Option<Observers>,
    pub(super) when_full: WhenFull,
    pub(in crate::storage) max_bytes: usize,
    pub(in crate::storage) env: Env,
}

/// The shard of a key, locked.
pub(in crate::storage) struct Shard<'a, G, V: Clone + Send + Sync + 'static> {
    key: &'a EncodedKey,
    /// By the shelf's clock, when the shard was locked.
    pub(in crate::storage) now: Duration,
    pub(in crate::storage) beside: MutexGuard<'a, G>,
    /// The last field: dropped when the lock is free.
    settled: Settled<'a, V>,
}

impl<G: Default, V: Clone + Send + Sync + 'static> Shelf<G, V> {
    pub(in crate::storage) fn new(
        max_bytes: usize,
        when_full: WhenFull,
        env: Env,
        observers: Option<Observers>,
    ) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            records: Records::new(max_bytes, when_full),
            observers,
            when_full,
            max_bytes,
            env,
        }
    }

    /// Locks the shard of `key`, and clears a few values of it away whose time is over. A step makes its changes after everything else
    /// that could panic.
    pub(in crate::storage) fn lock<'a>(&'a self, key: &'a EncodedKey) -> Shard<'a, G, V> {
        let (shard, now) = (shard_of(key), self.env.now());
        let beside = lock(&self.shards[shard]);
        self.records.sweep(shard, now, SWEEP);
        Shard {
            key,
            now,
            beside,
            settled: Settled {
                records: &self.records,
                observers: self.observers.as_ref(),
                now,
            },
        }
    }

    /// Whether a value of so many bytes can be kept at all: moka would drop it at once, and nobody would know.
    pub(in crate::storage) fn fits(&self, bytes: usize) -> bool {
        u64::from(records::weight(bytes)) <= self.records.capacity
    }

    /// Clears away all values whose time is over, shard by shard, until `is_enough`, which may also clear away what lies beside.
    pub(super) fn purge(&self, is_enough: impl Fn(&mut G, Duration) -> bool) {
        let now = self.env.now();
        for shard in 0..SHARDS {
            // Locked anew for every few, so that requests get their turn.
            loop {
                let mut beside = lock(&self.shards[shard]);
                if is_enough(&mut beside, now) {
                    return;
                }
                if !self.records.sweep(shard, now, 8 * SWEEP) {
                    break;
                }
            }
        }
    }

    /// The counts as they are.
    pub(in crate::storage) fn ledger(&self) -> &Ledger {
        &self.records.ledger
    }

    /// The counts, once all is cleared away that is over or evicted.
    pub(in crate::storage) fn counted(&self) -> &Ledger {
        self.purge(|_, _| false);
        self.records.catch_up(self.env.now());
        self.ledger()
    }
}

/// Does what is left to do after a step, with no lock held: evicts down to the limit, and tells observers of evictions, of the first
/// and then whenever their number has doubled.
struct Settled<'a, V: Clone + Send + Sync + 'static> {
    records: &'a Records<V>,
    observers: Option<&'a Observers>,
    now: Duration,
}

impl<V: Clone + Send + Sync + 'static> Drop for Settled<'_, V> {
    fn drop(&mut self) {
        self.records.settle(self.now);
        // Taken also where nobody is told: else each eviction would leave its key.
        if let Some((key, total)) = self.records.ledger.evictions_to_report()
            && let Some(observers) = self.observers
        {
            observers.emit(&Event::Evicted { key, total });
        }
    }
}

impl<G, V: Clone + Send + Sync + 'static> Shard<'_, G, V> {
    pub(in crate::storage) fn get(&self) -> Option<V> {
        self.settled.records.get(self.key, self.now)
    }

    /// Puts `value` where none is, until `deadline` by the shelf's clock.
    pub(super) fn insert(&self, value: V, bytes: usize, deadline: Duration) {
        let weight = records::weight(bytes);
        self.settled
            .records
            .insert(self.key, value, weight, deadline);
    }

    /// Puts `value` in the place of what is there.
    pub(in crate::storage) fn replace(&self, value: V, bytes: usize, deadline: Duration) {
        self.remove();
        self.insert(value, bytes, deadline);
    }

    pub(in crate::storage) fn remove(&self) {
        self.settled.records.remove(self.key);
    }
}
