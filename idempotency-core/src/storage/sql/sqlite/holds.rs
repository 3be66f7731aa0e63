//! The keys of this process's open transactions, and who waits for a key.
//!
//! The row of an open transaction is seen by nobody else, so the key that one of this process holds is known here.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    EncodedKey, Env, Fingerprint,
    key::HashKeys,
    storage::waits::{Waits, Whom},
};

/// The first and the longest pause between two looks of requests that wait for another process. A look is a read of the file.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(500)];

pub(super) struct Holds {
    pub(super) waits: Waits,
    /// The keys of open transactions, and what their requests were. `std`'s lock, because no section awaits.
    held: Mutex<HashMap<EncodedKey, Option<Fingerprint>, HashKeys>>,
}

impl Holds {
    pub(super) fn new(env: Env) -> Self {
        Self {
            waits: Waits::new(env, PAUSES, None),
            held: Mutex::default(),
        }
    }

    /// The request whose transaction holds a key, if one of this process does.
    pub(super) fn holder(&self, key: &EncodedKey) -> Option<Option<Fingerprint>> {
        self.held().get(key).copied()
    }

    /// Nothing panics while they are locked.
    fn held(&self) -> MutexGuard<'_, HashMap<EncodedKey, Option<Fingerprint>, HashKeys>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whom a statement wakes if it changes the key.
pub(super) struct Wake {
    pub(super) holds: Arc<Holds>,
    pub(super) key: EncodedKey,
    pub(super) whom: Whom,
}

impl Wake {
    pub(super) fn wake(&self) {
        let Self { holds, key, whom } = self;
        holds.waits.table.notified(&key.to_string(), *whom);
    }
}

/// The key of an open transaction of this process. Dropped, it wakes those who wait for the key.
pub(super) struct Hold(pub(super) Wake);

impl Hold {
    pub(super) fn new(
        holds: &Arc<Holds>,
        key: &EncodedKey,
        fingerprint: Option<Fingerprint>,
    ) -> Self {
        holds.held().insert(*key, fingerprint);
        Self(Wake {
            holds: holds.clone(),
            key: *key,
            whom: Whom::One,
        })
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.holds.held().remove(&self.0.key);
        self.0.wake();
    }
}
