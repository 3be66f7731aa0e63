//! Records in this process.
//!
//! Two kinds of things lie under keys, and they are kept apart. A running claim (in a [`LeaseTable`]) protects an operation that is
//! under way, so nothing but its holder, its lease or `remove` ends it. A completed record ([`records`]) lies in a moka cache,
//! which may evict it. [`ledger`] counts both, and knows when which record expires.
//!
//! A key belongs to one of a fixed number of shards. Every operation on it holds that shard's lock for its whole step, which
//! never awaits: that is what makes it atomic. Locks are nested in this order only: a shard's, that of its expiries, moka's own, the
//! ledger's. No code of a user runs under any of them, except `Env::now` of the builder's environment.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use self::{
    ledger::{Ledger, Page},
    records::Records,
};
use super::lease::{self, Lease, LeaseTable, Wake};
use crate::{
    Begin, EncodedKey, Entry, Env, Event, Fingerprint, Held, NewClaim, Record, Storage,
    StorageError, StorageErrorKind, Token, TombstoneReason, record::Packed,
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
/// Leases and TTLs follow the clock of the builder's [`Env`], `tokio`'s by default, and nothing else. What is over is gone for
/// every call at once. Its memory comes back with later calls, a few expired ones at each: a storage that nobody calls frees
/// nothing.
#[derive(Clone)]
pub struct MemoryStorage(Arc<Inner>);

struct Inner {
    /// `std`'s lock, because sections are short and never await.
    shards: Box<[Mutex<Claims>]>,
    records: Records<Completed>,
    ledger: Arc<Ledger>,
    env: Env,
    max_bytes: usize,
    when_full: WhenFull,
}

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

    /// How many records there are. Clears expired ones away first, as the other counts do.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.0.catch_up();
        self.0.ledger.records()
    }

    /// How many operations run: claims whose lease is not over.
    #[must_use]
    pub fn claims(&self) -> usize {
        self.0.purge(|| false);
        self.0.ledger.claims()
    }

    /// How many calls of [`wait`](Storage::wait) are under way.
    #[must_use]
    pub fn waiters(&self) -> usize {
        self.0.waiters()
    }

    /// What records and claims weigh, in bytes; see [Memory](Self#memory).
    #[must_use]
    pub fn weight(&self) -> u64 {
        self.0.catch_up();
        self.0.ledger.weight()
    }

    /// How many live records were evicted since the storage was built. Each is an operation that a retry runs again.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.0.catch_up();
        self.0.ledger.evicted()
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
        let inner = &*self.0;
        f.debug_struct("MemoryStorage")
            .field("max_bytes", &inner.max_bytes)
            .field("when_full", &inner.when_full)
            .field("weight", &inner.ledger.weight())
            .field("records", &inner.ledger.records())
            .field("claims", &inner.ledger.claims())
            .field("waiters", &inner.waiters())
            .field("evicted", &inner.ledger.evicted())
            .finish()
    }
}

impl Storage for MemoryStorage {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        let inner = &*self.0;
        let now = inner.env.now();
        let mut begun = inner.begin(key, claim, now);
        if begun.is_none() {
            // Full. The shards are visited one by one, so none may be locked here.
            inner.purge(|| !inner.ledger.is_full());
            begun = inner.begin(key, claim, now);
        }
        inner.settle(now);
        begun.ok_or_else(|| {
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
        let inner = &*self.0;
        // Copied before the lock is taken: nobody should wait for that.
        let (record, too_large) = inner.pack(record);
        let now = inner.env.now();
        let held = inner.complete(key, token, record, ttl, now);
        if too_large && held == Held::Yes {
            inner.tell_too_large(key);
        }
        inner.settle(now);
        Ok(held)
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        Ok(self.0.renew(key, token, lease, self.0.env.now()))
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        Ok(self.0.release(key, token, self.0.env.now()))
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        let now = self.0.env.now();
        let entry = self.0.get(key, now);
        self.0.settle(now);
        Ok(entry)
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let inner = &*self.0;
        let (record, too_large) = inner.pack(record);
        let now = inner.env.now();
        let replaced = inner.replace(key, record, ttl, now);
        if too_large && replaced {
            inner.tell_too_large(key);
        }
        inner.settle(now);
        Ok(())
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let now = self.0.env.now();
        let removed = self.0.remove(key, now);
        self.0.settle(now);
        Ok(removed)
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let inner = &*self.0;
        lease::wait(&inner.shards[shard_of(key)], key, &inner.env, timeout).await;
        Ok(())
    }
}

/// The steps. Each holds the shard's lock from its beginning to its end.
impl Inner {
    /// `None` when the storage is full.
    fn begin(&self, key: &EncodedKey, claim: &NewClaim, now: Duration) -> Option<Begin> {
        let mut claims = self.lock(key, now);
        let lease_end = now.saturating_add(claim.lease);
        if let Some(running) = claims.get(key) {
            if running.token == claim.token {
                // Sent again. An earlier answer may have promised more.
                let lease_end = lease_end.max(running.end);
                claims.renew(key, claim.token, lease_end);
                return Some(Begin::Acquired);
            }
            return Some(Begin::InFlight {
                fingerprint: running.of,
                lease_left: Some(running.end - now),
            });
        }
        if let Some(found) = self.records.get(key, now) {
            return Some(Begin::Completed(found.record.record()));
        }
        if !self.page(key).claim_started() {
            return None;
        }
        let lease = Lease {
            token: claim.token,
            end: lease_end,
            of: claim.fingerprint,
        };
        claims.start(key, lease);
        Some(Begin::Acquired)
    }

    fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: Packed,
        ttl: Duration,
        now: Duration,
    ) -> Held {
        let mut claims = self.lock(key, now);
        match claims.get(key) {
            Some(running) if running.token != token => return Held::Lost,
            Some(_) => {}
            None => match self.records.get(key, now) {
                Some(found) if found.by == token => {
                    // Repeated: the first record stays, and its TTL starts anew.
                    self.records.remove(key);
                    self.insert(key, found.record, token, now.saturating_add(ttl));
                    return Held::Yes;
                }
                Some(_) => return Held::Lost,
                None => {}
            },
        }
        // First the record, so that what is woken finds it; both are behind the lock anyway.
        self.insert(key, record, token, now.saturating_add(ttl));
        let ended = claims.end(key, token, Wake::All);
        self.page(key).claims_ended(usize::from(ended));
        Held::Yes
    }

    fn renew(&self, key: &EncodedKey, token: Token, lease: Duration, now: Duration) -> Held {
        let mut claims = self.lock(key, now);
        match claims.renew(key, token, now.saturating_add(lease)) {
            Some(_) => Held::Yes,
            None => Held::Lost,
        }
    }

    fn release(&self, key: &EncodedKey, token: Token, now: Duration) -> Held {
        let mut claims = self.lock(key, now);
        if !claims.end(key, token, Wake::One) {
            return Held::Lost;
        }
        self.page(key).claims_ended(1);
        Held::Yes
    }

    fn get(&self, key: &EncodedKey, now: Duration) -> Option<Entry> {
        let claims = self.lock(key, now);
        if let Some(running) = claims.get(key) {
            return Some(Entry::Claimed {
                fingerprint: running.of,
                lease_left: Some(running.end - now),
            });
        }
        let found = self.records.get(key, now)?;
        Some(Entry::Completed(found.record.record()))
    }

    /// Says whether there was a record to replace.
    fn replace(&self, key: &EncodedKey, record: Packed, ttl: Duration, now: Duration) -> bool {
        // Locked, though claims are not looked at: a claim and a record are never under one key.
        let _claims = self.lock(key, now);
        let Some(found) = self.records.get(key, now) else {
            return false;
        };
        self.records.remove(key);
        self.insert(key, record, found.by, now.saturating_add(ttl));
        true
    }

    fn insert(&self, key: &EncodedKey, record: Packed, by: Token, deadline: Duration) {
        let weight = records::weight(record.weight());
        let completed = Completed { record, by };
        self.records.insert(key, completed, weight, deadline);
    }

    fn remove(&self, key: &EncodedKey, now: Duration) -> bool {
        let mut claims = self.lock(key, now);
        let claimed = claims.remove(key, Wake::All);
        self.page(key).claims_ended(usize::from(claimed));
        let completed = self.records.get(key, now).is_some();
        if completed {
            self.records.remove(key);
        }
        claimed || completed
    }

    fn waiters(&self) -> usize {
        let shards = self.shards.iter();
        shards.map(|shard| lease::lock(shard).waiters()).sum()
    }

    /// Locks the shard of `key` and clears away a few things whose time is over. A claim of `key` is among them, so one that is
    /// found under the lock is alive.
    fn lock(&self, key: &EncodedKey, now: Duration) -> MutexGuard<'_, Claims> {
        let shard = shard_of(key);
        let mut claims = self.lock_shard(shard);
        let ended = usize::from(claims.end_if_over(key, now)) + claims.sweep(now);
        self.ledger.page(shard).claims_ended(ended);
        self.records.sweep(shard, now, SWEEP);
        claims
    }

    /// What panics under this lock, if anything, is moka or an `Env`. Each step makes its changes after everything else, so the
    /// claims under a poisoned lock are whole.
    fn page(&self, key: &EncodedKey) -> &Page {
        self.ledger.page(shard_of(key))
    }

    fn lock_shard(&self, shard: usize) -> MutexGuard<'_, Claims> {
        lease::lock(&self.shards[shard])
    }

    /// Clears away all whose time is over, or as much as is `enough`.
    fn purge(&self, enough: impl Fn() -> bool) {
        let now = self.env.now();
        for shard in 0..SHARDS {
            loop {
                if enough() {
                    return;
                }
                // Locked anew for every few, so that requests get their turn.
                let mut claims = self.lock_shard(shard);
                let ended = claims.end_all_over(now);
                self.ledger.page(shard).claims_ended(ended);
                if !self.records.sweep(shard, now, 8 * SWEEP) {
                    break;
                }
            }
        }
    }

    /// Clears away all that is over or evicted, so that what is left can be counted.
    fn catch_up(&self) {
        self.purge(|| false);
        self.records.catch_up();
    }

    /// A copy of `record`, or of a tombstone in its place if it is larger than all that can be kept (a retry would run the operation
    /// again), and whether it is.
    fn pack(&self, record: &Record) -> (Packed, bool) {
        if self.records.fits(records::weight(record.weight())) {
            return (Packed::of(record), false);
        }
        let tombstone = Record::tombstone(record.fingerprint, TOO_LARGE);
        (Packed::of(&tombstone), true)
    }

    fn tell_too_large(&self, key: &EncodedKey) {
        self.ledger.emit(&Event::Tombstoned {
            key: *key,
            reason: TOO_LARGE,
        });
    }

    /// What is left to do after a step, with no lock held: bring moka down to its limit, tell observers what was evicted.
    fn settle(&self, now: Duration) {
        self.records.settle(now);
        self.ledger.report_evictions();
    }
}

/// Keys are hashes, so every bit is as good as any other. Should an encoder make keys that are not, the locks are shared
/// unevenly, and nothing else happens.
fn shard_of(key: &EncodedKey) -> usize {
    let bytes = key.as_bytes();
    usize::from(bytes[0] ^ bytes[31]) % SHARDS
}
