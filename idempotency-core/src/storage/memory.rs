//! Records in this process.
//!
//! Two kinds of things lie under keys, and they are kept apart. A running claim (in a [`LeaseTable`]) protects an operation that is
//! under way, so nothing but its holder, its lease or `remove` ends it. A completed record ([`records`]) lies in a moka cache,
//! which may evict it; [`ledger`] counts them. Both lie in one [`Shelf`].
//!
//! A key belongs to one of a fixed number of shards. Every operation on it holds that shard's lock for its whole step, which
//! never awaits: that is what makes it atomic. Locks are nested in this order only: a shard's, that of its expiries, moka's own, the
//! ledger's. No code of a user runs under any of them, except `Env::now` of the builder's environment.

use std::{fmt, sync::Arc, time::Duration};

use self::{ledger::CLAIM_WEIGHT, shelf::Shard};
use super::lease::{self, Lease, LeaseTable, Wake};
use crate::{
    Begin, EncodedKey, Entry, Event, Fingerprint, Held, NewClaim, Record, Storage, StorageError,
    StorageErrorKind, Token, TombstoneReason, record::Packed,
};

mod builder;
mod ledger;
mod records;
mod shelf;
#[cfg(test)]
mod tests;

pub use self::builder::{MemoryStorageBuilder, WhenFull};
pub(super) use self::shelf::Shelf;

/// A power of two: enough that two of a machine's threads rarely meet, few enough to visit all when the storage is full.
const SHARDS: usize = 32;

/// How many expired records an operation clears away in passing. It adds one at most, so more than one keeps up; few, so that
/// no request pays for a crowd.
const SWEEP: usize = 8;

/// Why a record that can't be kept has no answer to replay.
const TOO_LARGE: TombstoneReason = TombstoneReason::ResponseTooLarge;

/// Keeps claims and records in this process, up to a number of bytes. Clones share them.
///
/// For one process, and for tests. Another process doesn't see the claims, and a restart forgets the records: an operation
/// that is retried after it runs again.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), idempotency_core::StorageError> {
/// use std::time::Duration;
/// use idempotency_core::{Begin, EncodedKey, MemoryStorage, NewClaim, Storage, Token};
///
/// let storage = MemoryStorage::new();
/// let key = EncodedKey::from_bytes([7; 32]);
/// let claim = |token| NewClaim { token, fingerprint: None, lease: Duration::from_secs(30) };
///
/// assert_eq!(storage.begin(&key, &claim(Token::random())).await?, Begin::Acquired);
/// // A duplicate meanwhile:
/// assert!(matches!(storage.begin(&key, &claim(Token::random())).await?, Begin::InFlight { .. }));
/// assert_eq!(storage.claims(), 1);
/// # Ok(())
/// # }
/// ```
///
/// # Memory
///
/// A record weighs its body, its headers and a fixed overhead that covers all that this storage allocates for it. What lies
/// on the heap stays within 1.2 times [`max_bytes`](MemoryStorageBuilder::max_bytes), if that is 4 MiB or more; [`WhenFull`]
/// says what happens at the limit. A body is copied when it is recorded: a `Bytes` of ten bytes may hold on to a buffer of a
/// megabyte.
///
/// Running claims are never evicted. Under [`WhenFull::Evict`] they come on top of `max_bytes`, less than 300 bytes each, and
/// so do the waiters; `Config::max_running` and `Config::max_waiting` bound them.
///
/// # Expiry
///
/// Leases and TTLs follow the clock of the builder's [`Env`](crate::Env), `tokio`'s by default, and nothing else. What is over is gone for
/// every call at once. Its memory comes back with later calls, a few expired ones at each: a storage that nobody calls frees
/// nothing.
#[derive(Clone)]
pub struct MemoryStorage(Arc<Shelf<Claims, Completed>>);

/// The claims of one shard, each with its fingerprint.
type Claims = LeaseTable<EncodedKey, Option<Fingerprint>>;

/// What lies under a completed key.
#[derive(Clone)]
struct Completed {
    record: Packed,
    by: Token,
}

impl MemoryStorage {
    /// A storage of 64 MiB that evicts when it is full.
    #[must_use]
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// Sets up a storage.
    pub fn builder() -> MemoryStorageBuilder {
        MemoryStorageBuilder::default()
    }

    /// How many records there are. Clears expired ones away first, as `weight` and `evicted` do.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.0.counted().records()
    }

    /// How many operations run: claims whose lease is not over.
    #[must_use]
    pub fn claims(&self) -> usize {
        let now = self.0.env.now();
        let shards = self.0.shards.iter();
        shards.map(|shard| lease::lock(shard).count(now)).sum()
    }

    /// How many calls of [`wait`](Storage::wait) are under way.
    #[must_use]
    pub fn waiters(&self) -> usize {
        let shards = self.0.shards.iter();
        shards.map(|shard| lease::lock(shard).waiters()).sum()
    }

    /// What records and claims weigh, in bytes; see [Memory](Self#memory).
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.0.counted().record_weight() + self.claims() as u64 * CLAIM_WEIGHT
    }

    /// How many live records were evicted since the storage was built. Each is an operation that a retry runs again.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.0.counted().evicted()
    }
}

impl Default for MemoryStorage {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts and limits only.
impl fmt::Debug for MemoryStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ledger = self.0.ledger();
        let claims = self.claims();
        let weight = ledger.record_weight() + claims as u64 * CLAIM_WEIGHT;
        f.debug_struct("MemoryStorage")
            .field("max_bytes", &self.0.max_bytes)
            .field("when_full", &self.0.when_full)
            .field("weight", &weight)
            .field("records", &ledger.records())
            .field("claims", &claims)
            .field("waiters", &self.waiters())
            .field("evicted", &ledger.evicted())
            .finish()
    }
}

/// Each holds the lock of the key's shard from its beginning to its end, but for what is copied or told.
impl Storage for MemoryStorage {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        if let Some(begun) = self.try_begin(key, claim) {
            return Ok(begun);
        }
        // Full. The shards are visited one by one, so none may be locked here.
        self.0.purge(|claims, now| {
            self.0.ledger().claims_ended(claims.end_all_over(now));
            !self.0.ledger().is_full()
        });
        self.try_begin(key, claim).ok_or_else(|| {
            StorageError::new(
                StorageErrorKind::Full,
                "the records in memory weigh as much as they may: raise `max_bytes` of the `MemoryStorage`",
            )
        })
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        // Copied before the lock is taken: nobody should wait for that.
        let (record, too_large) = self.pack(record);
        let held = self.store(key, token, record, ttl);
        if too_large && held == Held::Yes {
            self.tell_too_large(key);
        }
        Ok(held)
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let mut shard = self.locked(key);
        let end = shard.now.saturating_add(lease);
        Ok(match shard.beside.renew(key, token, end) {
            Some(_) => Held::Yes,
            None => Held::Lost,
        })
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        let mut shard = self.locked(key);
        if !shard.beside.end(key, token, Wake::One) {
            return Ok(Held::Lost);
        }
        self.0.ledger().claims_ended(1);
        Ok(Held::Yes)
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        let shard = self.locked(key);
        Ok(match shard.beside.get(key) {
            Some(running) => Some(Entry::Claimed {
                fingerprint: running.of,
                lease_left: Some(running.end - shard.now),
            }),
            None => shard
                .get()
                .map(|found| Entry::Completed(found.record.record())),
        })
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let (record, too_large) = self.pack(record);
        let replaced = self.store_over(key, record, ttl);
        if too_large && replaced {
            self.tell_too_large(key);
        }
        Ok(())
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let mut shard = self.locked(key);
        let claimed = shard.beside.remove(key, Wake::All);
        self.0.ledger().claims_ended(usize::from(claimed));
        let completed = shard.get().is_some();
        shard.remove();
        Ok(claimed || completed)
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let shard = &self.0.shards[shard_of(key)];
        lease::wait(shard, key, &self.0.env, timeout).await;
        Ok(())
    }
}

impl MemoryStorage {
    /// `None` when the storage is full.
    fn try_begin(&self, key: &EncodedKey, claim: &NewClaim) -> Option<Begin> {
        let mut shard = self.locked(key);
        let lease_end = shard.now.saturating_add(claim.lease);
        if let Some(running) = shard.beside.get(key) {
            if running.token == claim.token {
                // Sent again. An earlier answer may have promised more.
                let lease_end = lease_end.max(running.end);
                shard.beside.renew(key, claim.token, lease_end);
                return Some(Begin::Acquired);
            }
            return Some(Begin::InFlight {
                fingerprint: running.of,
                lease_left: Some(running.end - shard.now),
            });
        }
        if let Some(found) = shard.get() {
            return Some(Begin::Completed(found.record.record()));
        }
        if !self.0.ledger().claim_started() {
            return None;
        }
        let lease = Lease {
            token: claim.token,
            end: lease_end,
            of: claim.fingerprint,
        };
        shard.beside.start(key, lease);
        Some(Begin::Acquired)
    }

    fn store(&self, key: &EncodedKey, token: Token, record: Packed, ttl: Duration) -> Held {
        let mut shard = self.locked(key);
        let deadline = shard.now.saturating_add(ttl);
        match shard.beside.get(key) {
            Some(running) if running.token != token => return Held::Lost,
            Some(_) => {}
            None => match shard.get() {
                Some(found) if found.by == token => {
                    // Repeated: the first record stays, and its TTL starts anew.
                    let bytes = found.record.weight();
                    shard.replace(found, bytes, deadline);
                    return Held::Yes;
                }
                Some(_) => return Held::Lost,
                None => {}
            },
        }
        // First the record, so that what is woken finds it; both are behind the lock anyway.
        let bytes = record.weight();
        shard.insert(Completed { record, by: token }, bytes, deadline);
        let ended = shard.beside.end(key, token, Wake::All);
        self.0.ledger().claims_ended(usize::from(ended));
        Held::Yes
    }

    /// Says whether there was a record to replace.
    fn store_over(&self, key: &EncodedKey, record: Packed, ttl: Duration) -> bool {
        let shard = self.locked(key);
        let Some(found) = shard.get() else {
            return false;
        };
        let (bytes, deadline) = (record.weight(), shard.now.saturating_add(ttl));
        shard.replace(Completed { record, ..found }, bytes, deadline);
        true
    }

    /// Locks the shard of `key` and clears away a few things whose time is over. A claim of `key` is among them, so one that is
    /// found under the lock is alive.
    fn locked<'a>(&'a self, key: &'a EncodedKey) -> Shard<'a, Claims, Completed> {
        let mut shard = self.0.lock(key);
        let (now, claims) = (shard.now, &mut shard.beside);
        let ended = usize::from(claims.end_if_over(key, now)) + claims.sweep(now);
        self.0.ledger().claims_ended(ended);
        shard
    }

    /// A copy of `record`, or of a tombstone in its place if it is larger than all that can be kept (a retry would run the operation
    /// again), and whether it is.
    fn pack(&self, record: &Record) -> (Packed, bool) {
        if self.0.fits(record.weight()) {
            return (Packed::of(record), false);
        }
        let tombstone = Record::tombstone(record.fingerprint, TOO_LARGE);
        (Packed::of(&tombstone), true)
    }

    fn tell_too_large(&self, key: &EncodedKey) {
        let (key, reason) = (*key, TOO_LARGE);
        if let Some(observers) = &self.0.observers {
            observers.emit(&Event::Tombstoned { key, reason });
        }
    }
}

/// Keys are hashes, so every bit is as good as any other. Should an encoder make keys that are not, the locks are shared
/// unevenly, and nothing else happens.
fn shard_of(key: &EncodedKey) -> usize {
    let bytes = key.as_bytes();
    usize::from(bytes[0] ^ bytes[31]) % SHARDS
}
