//! How a duplicate waits for the running original, and how it is woken.
//!
//! [`Shared::wait`] waits; `decide` calls it, and then attempts again. If the original runs in this process, its end (in `runs`)
//! wakes the duplicates, and hands them the record. If it runs elsewhere, [`Storage::wait`] returns at its end.

use std::{
    collections::{HashMap, hash_map},
    future::pending,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio::sync::{Notify, futures::OwnedNotified};

use super::Shared;
use crate::{EncodedKey, Event, Operation, Record, Storage, key::HashKeys};

/// How long a duplicate pauses after the storage failed to wait for it.
const WAIT_FAILED_PAUSE: Duration = Duration::from_millis(50);

impl Shared {
    /// Takes a place under `max_waiting`, if there is one.
    pub(super) fn start_waiting(&self, key: &EncodedKey) -> Option<Waiting<'_>> {
        let since = self.now();
        if !self.runs.start_waiting() {
            return None;
        }
        let waiting = Waiting {
            shared: self,
            since,
        };
        self.emit(&Event::Waiting { key: *key });
        Some(waiting)
    }

    /// Waits until the running original may have ended, `limit` at most. Returns its record, if this process has it.
    pub(super) async fn wait(
        &self,
        key: &EncodedKey,
        waiter: Waiter,
        limit: Duration,
    ) -> Option<Record> {
        let is_local = waiter.is_local();
        let woken = pin!(waiter.woken());
        let over = pin!(self.config.env.sleep(limit));
        // The storage pushes or polls. What this process does to the key meanwhile wakes us too: it may begin to run here.
        let elsewhere = pin!(async {
            if is_local {
                return pending().await;
            }
            if let Err(error) = self.storage.wait(key, limit).await {
                self.failed(key, Operation::Wait, &error);
                // The caller asks the storage again, but not in a tight loop.
                self.config.env.sleep(WAIT_FAILED_PAUSE).await;
            }
        });
        match select(woken, select(elsewhere, over)).await {
            Either::Left((outcome, _)) => outcome,
            Either::Right(_) => None,
        }
    }
}

/// The permit of a release, which one waiter gets. If that one does not run, it passes the permit on.
pub(super) struct Permit<'a> {
    pub(super) shared: &'a Shared,
    pub(super) key: &'a EncodedKey,
    pub(super) is_held: bool,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if self.is_held {
            self.shared.runs.waiters.wake_one(self.key);
        }
    }
}

/// A duplicate that waits: since when, and its place under `max_waiting`.
pub(super) struct Waiting<'a> {
    shared: &'a Shared,
    since: Duration,
}

impl Waiting<'_> {
    pub(super) fn waited(&self) -> Duration {
        self.shared.now().saturating_sub(self.since)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.runs.stop_waiting();
    }
}

/// The waiting duplicates of an engine by key. Clones share them.
///
/// A `std` mutex guards them: every section is a few map operations, and none spans an await or runs code that is not ours.
#[derive(Clone, Debug, Default)]
pub(super) struct Waiters {
    by_key: Arc<Mutex<HashMap<EncodedKey, KeyWaiters, HashKeys>>>,
}

/// The waiters of one run of a key.
#[derive(Debug, Default)]
struct KeyWaiters {
    wakes: Arc<Wakes>,
    count_here: usize,
    count_elsewhere: usize,
}

/// Waiters for an operation that runs in this process are woken only from here, so they come first; the others wait at the storage too.
#[derive(Debug, Default)]
struct Wakes {
    here: Arc<Notify>,
    elsewhere: Arc<Notify>,
    /// The record of the run, handed to every waiter, so that none has to fetch it.
    outcome: OnceLock<Record>,
}

impl KeyWaiters {
    fn count(&mut self, is_local: bool) -> &mut usize {
        match is_local {
            true => &mut self.count_here,
            false => &mut self.count_elsewhere,
        }
    }

    fn wake_one(&self) {
        match self.count_here {
            0 => self.wakes.elsewhere.notify_one(),
            _ => self.wakes.here.notify_one(),
        }
    }
}

impl Wakes {
    fn wake_all(&self) {
        self.here.notify_waiters();
        self.elsewhere.notify_waiters();
    }
}

impl Waiters {
    /// A waiter that is woken by whatever happens to `key` here from now on. `is_local`: its operation runs in this process.
    pub(super) fn subscribe(&self, key: &EncodedKey, is_local: bool) -> Waiter {
        let mut by_key = self.lock();
        let queue = by_key.entry(*key).or_default();
        *queue.count(is_local) += 1;
        let notify = match is_local {
            true => &queue.wakes.here,
            false => &queue.wakes.elsewhere,
        };
        Waiter {
            // Made under the lock: it is told of everything that happens from here on, polled or not.
            woken: notify.clone().notified_owned(),
            place: Place {
                waiters: self.clone(),
                wakes: queue.wakes.clone(),
                key: *key,
                is_local,
            },
        }
    }

    /// Wakes one waiter: the key is free, or the waiter woken before did not run.
    pub(super) fn wake_one(&self, key: &EncodedKey) {
        if let Some(queue) = self.lock().get(key) {
            queue.wake_one();
        }
    }

    /// Wakes one of the waiters for a run of this process, so that it attempts again: the key is claimed elsewhere now.
    pub(super) fn wake_one_here(&self, key: &EncodedKey) {
        if let Some(queue) = self.lock().get(key)
            && queue.count_here > 0
        {
            queue.wakes.here.notify_one();
        }
    }

    pub(super) fn wake_all(&self, key: &EncodedKey) {
        if let Some(queue) = self.lock().get(key) {
            queue.wakes.wake_all();
        }
    }

    /// Hands `record` to all that wait. A request that comes later waits for another run.
    pub(super) fn hand_over(&self, key: &EncodedKey, record: &Record) {
        self.hand(key, record).wake();
    }

    /// The same, without waking them yet.
    pub(super) fn hand(&self, key: &EncodedKey, record: &Record) -> Handed {
        let queue = self.lock().remove(key);
        Handed(queue.map(|queue| {
            // Set once: the queue is out of the map.
            let _ = queue.wakes.outcome.set(record.clone());
            queue.wakes
        }))
    }

    /// The map stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, HashMap<EncodedKey, KeyWaiters, HashKeys>> {
        self.by_key.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waiters that have a record and are still to be woken.
#[must_use]
pub(super) struct Handed(Option<Arc<Wakes>>);

impl Handed {
    pub(super) fn wake(self) {
        if let Some(wakes) = self.0 {
            wakes.wake_all();
        }
    }
}

/// A request that waits for a key.
pub(super) struct Waiter {
    woken: OwnedNotified,
    place: Place,
}

impl Waiter {
    /// Whether the operation runs in this process.
    pub(super) fn is_local(&self) -> bool {
        self.place.is_local
    }

    /// Returns when a run of the key has ended, with its record if this process has it. A waiter that is dropped after a release woke it
    /// passes the wake on.
    pub(super) async fn woken(self) -> Option<Record> {
        let Self { woken, place } = self;
        woken.await;
        place.wakes.outcome.get().cloned()
    }
}

/// A waiter's place; the last one to leave takes the key's queue with it.
struct Place {
    waiters: Waiters,
    wakes: Arc<Wakes>,
    key: EncodedKey,
    is_local: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_key = self.waiters.lock();
        if let hash_map::Entry::Occupied(mut queue) = by_key.entry(self.key)
            && Arc::ptr_eq(&queue.get().wakes, &self.wakes)
        {
            *queue.get_mut().count(self.is_local) -= 1;
            if queue.get().count_here + queue.get().count_elsewhere == 0 {
                queue.remove();
            }
        }
    }
}
