//! The requests that wait in this process for a key, and how they are woken.

use std::{
    collections::{HashMap, hash_map},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use tokio::sync::{Notify, futures::OwnedNotified};

use crate::{EncodedKey, Record, key::HashKeys};

/// The waiting duplicates of an engine by key.
///
/// A `std` mutex guards them: every section is a few map operations, and none spans an await or runs code that is not ours.
#[derive(Debug, Default)]
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
                by_key: self.by_key.clone(),
                wakes: queue.wakes.clone(),
                key: *key,
                is_local,
            },
        }
    }

    /// Wakes one waiter: the key is free, or the waiter that was woken before does not run.
    pub(super) fn wake_one(&self, key: &EncodedKey) {
        if let Some(queue) = self.lock().get(key) {
            queue.wake_one();
        }
    }

    /// Wakes one waiter of an operation that ran in this process and runs elsewhere now, so that it waits at the storage.
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

    fn lock(&self) -> MutexGuard<'_, HashMap<EncodedKey, KeyWaiters, HashKeys>> {
        lock(&self.by_key)
    }
}

/// The map stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
fn lock(
    by_key: &Mutex<HashMap<EncodedKey, KeyWaiters, HashKeys>>,
) -> MutexGuard<'_, HashMap<EncodedKey, KeyWaiters, HashKeys>> {
    by_key.lock().unwrap_or_else(PoisonError::into_inner)
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
    by_key: Arc<Mutex<HashMap<EncodedKey, KeyWaiters, HashKeys>>>,
    wakes: Arc<Wakes>,
    key: EncodedKey,
    is_local: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_key = lock(&self.by_key);
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
