//! The records without the claims, for whatever else keeps things in this process.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{
    SHARDS, SWEEP,
    ledger::Ledger,
    records::{self, Records},
    shard_of,
};
use crate::{EncodedKey, Env, event::Observers};

/// Values by key: up to a number of bytes, those least used leave first, and each until its time is over. Beside each lock lies
/// a `G`, for what has to be decided in one step with a change.
pub(in crate::storage) struct Shelf<G, V> {
    /// `std`'s locks, because sections are short and never await.
    shards: Box<[Mutex<G>]>,
    records: Records<V>,
    ledger: Arc<Ledger>,
    pub(in crate::storage) max_bytes: usize,
    pub(in crate::storage) env: Env,
}

/// The shard of a key, locked.
pub(in crate::storage) struct Shard<'a, G, V> {
    shelf: &'a Shelf<G, V>,
    key: &'a EncodedKey,
    /// By the shelf's clock, when the shard was locked.
    pub(in crate::storage) now: Duration,
    pub(in crate::storage) beside: MutexGuard<'a, G>,
}

impl<G: Default, V: Clone + Send + Sync + 'static> Shelf<G, V> {
    pub(in crate::storage) fn new(max_bytes: usize, env: Env) -> Self {
        let ledger = Arc::new(Ledger::new(Observers::default(), None));
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            records: Records::new(ledger.clone(), Some(max_bytes)),
            ledger,
            max_bytes,
            env,
        }
    }

    /// Locks the shard of `key`, and clears a few values of it away whose time is over.
    ///
    /// Steps under this lock make their changes after everything else that could panic, so a poisoned one is whole.
    pub(in crate::storage) fn lock<'a>(&'a self, key: &'a EncodedKey) -> Shard<'a, G, V> {
        let now = self.env.now();
        let shard = shard_of(key);
        let beside = self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.records.sweep(shard, now, SWEEP);
        Shard {
            shelf: self,
            key,
            now,
            beside,
        }
    }

    /// Whether a value of so many bytes can be kept at all.
    pub(in crate::storage) fn fits(&self, bytes: usize) -> bool {
        self.records.fits(records::weight(bytes))
    }

    /// Evicts at once where moka is too far behind. Call it after an insertion, without a lock.
    pub(in crate::storage) fn settle(&self) {
        self.records.settle(self.env.now());
    }

    /// Logs evictions: the first, and then whenever their number has doubled. Call it without a lock.
    pub(in crate::storage) fn report_evictions(&self) {
        self.ledger.report_evictions();
    }

    pub(in crate::storage) fn len(&self) -> u64 {
        self.records.catch_up();
        self.ledger.records()
    }

    pub(in crate::storage) fn weight(&self) -> u64 {
        self.records.catch_up();
        self.ledger.weight()
    }

    pub(in crate::storage) fn evicted(&self) -> u64 {
        self.records.catch_up();
        self.ledger.evicted()
    }
}

impl<G, V: Clone + Send + Sync + 'static> Shard<'_, G, V> {
    pub(in crate::storage) fn get(&self) -> Option<V> {
        self.shelf.records.get(self.key, self.now)
    }

    /// Puts `value` in the place of what is there, until `deadline` by the shelf's clock.
    pub(in crate::storage) fn insert(&self, value: V, bytes: usize, deadline: Duration) {
        self.remove();
        let weight = records::weight(bytes);
        self.shelf.records.insert(self.key, value, weight, deadline);
    }

    pub(in crate::storage) fn remove(&self) {
        self.shelf.records.remove(self.key);
    }
}
