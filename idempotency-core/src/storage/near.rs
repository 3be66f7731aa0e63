//! A cache level in this process, in front of any storage.

use std::{fmt, sync::Arc, time::Duration};

use super::memory::{Shelf, WhenFull};
use crate::{
    Begin, EncodedKey, Entry, Env, Held, NewClaim, Outcome, Record, Storage, StorageError, Token,
    record::Packed,
};

#[cfg(all(test, feature = "conformance"))]
mod tests;

/// The maximum near TTL.
const MAX_TTL: Duration = Duration::from_secs(60);

/// Replays recent records from this process, without a round trip to the storage behind it. Clones share the cached records.
///
/// Most retries come within seconds of the first answer. A record that passes through here, stored by `complete` or found by
/// `begin` or `get`, is kept for at most 60 s ([`ttl`](Self::ttl)), and `begin` and `get` return it from here. Every other call goes to the
/// storage: it alone decides who runs an operation, and claims are never kept here.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), idempotency_core::StorageError> {
/// use std::time::Duration;
/// use idempotency_core::{EncodedKey, MemoryStorage, NearCache, Storage};
///
/// // It pays in front of a remote storage.
/// let storage = NearCache::new(MemoryStorage::new())
///     .ttl(Duration::from_secs(10))
///     .max_bytes(16 << 20);
/// assert_eq!(storage.get(&EncodedKey::from_bytes([7; 32])).await?, None);
/// # Ok(())
/// # }
/// ```
///
/// # When changes are seen
///
/// * `remove` and `replace` through this handle and its clones are seen here at once. Those of another process, or those that
///   bypass this level, are seen when the near TTL is over. So is the loss of a record in the storage.
/// * A record stored by `complete` is returned no longer than its TTL. For a record that was found, the storage does not report
///   the remaining TTL, so it may be returned for up to the near TTL after its own. No operation runs because of that; one that
///   could run again is refused a little longer.
/// * A `remove` or `replace` that is dropped or fails may take effect in the storage later, and is then seen like one of another
///   process.
/// * A `complete` that is repeated with one token, because the first call failed, is expected to carry the same answer or a
///   tombstone, as drivers and the engine do.
#[must_use]
pub struct NearCache<S> {
    storage: Arc<S>,
    near: Near,
}

/// The cached records, and the counters that keep stale ones out.
#[derive(Clone)]
struct Near {
    shelf: Arc<Shelf<Changes, Kept>>,
    ttl: Duration,
}

/// A cached record.
#[derive(Clone)]
struct Kept {
    record: Packed,
    /// When the near TTL is over, whatever its own TTL.
    near_end: Duration,
}

/// Counts the changes of a shard's keys. A change of one key may keep another key of its shard from being cached once.
#[derive(Default)]
struct Changes {
    begun: u64,
    under_way: usize,
}

impl<S: Storage> NearCache<S> {
    /// A cache level of 32 MiB in front of `storage`.
    pub fn new(storage: S) -> Self {
        Self {
            storage: Arc::new(storage),
            near: Near::new(MAX_TTL, 32 << 20, Env::system()),
        }
    }

    /// How long a record is returned from here; at most 60 s, which is also the default. Zero caches nothing.
    ///
    /// Like the other setters it starts empty, and shares nothing with earlier clones.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        let Shelf { max_bytes, env, .. } = &*self.near.shelf;
        self.near = Near::new(ttl.min(MAX_TTL), *max_bytes, env.clone());
        self
    }

    /// The byte limit of the cached records; the least recently used are evicted. Default: 32 MiB.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.near = Near::new(self.near.ttl, bytes, self.near.shelf.env.clone());
        self
    }

    /// The clock for the near TTL. Default: [`Env::system`].
    pub fn env(mut self, env: Env) -> Self {
        self.near = Near::new(self.near.ttl, self.near.shelf.max_bytes, env);
        self
    }

    /// The storage behind this level.
    #[must_use]
    pub fn inner(&self) -> &S {
        &self.storage
    }
}

impl<S> Clone for NearCache<S> {
    fn clone(&self) -> Self {
        Self {
            storage: self.storage.clone(),
            near: self.near.clone(),
        }
    }
}

impl<S> fmt::Debug for NearCache<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NearCache")
            .field("storage", &std::any::type_name::<S>())
            .field("ttl", &self.near.ttl)
            .field("max_bytes", &self.near.shelf.max_bytes)
            .field("records", &self.near.shelf.ledger().records())
            .finish_non_exhaustive()
    }
}

impl<S: Storage> Storage for NearCache<S> {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        if let Some(record) = self.near.get(key) {
            return Ok(Begin::Completed(record));
        }
        let asked = self.near.ask(key);
        let begin = self.storage.begin(key, claim).await?;
        if let Begin::Completed(record) = &begin {
            self.near.keep(key, asked, record, None);
        }
        Ok(begin)
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let asked = self.near.ask(key);
        let held = self.storage.complete(key, token, record, ttl).await?;
        if held == Held::Yes {
            self.near.keep(key, asked, record, Some(ttl));
        }
        Ok(held)
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        self.storage.renew(key, token, lease).await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        self.storage.release(key, token).await
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        if let Some(record) = self.near.get(key) {
            return Ok(Some(Entry::Completed(record)));
        }
        let asked = self.near.ask(key);
        let entry = self.storage.get(key).await?;
        if let Some(Entry::Completed(record)) = &entry {
            self.near.keep(key, asked, record, None);
        }
        Ok(entry)
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let _change = self.near.change(key);
        self.storage.replace(key, record, ttl).await
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let _change = self.near.change(key);
        self.storage.remove(key).await
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        self.storage.wait(key, timeout).await
    }
}

/// Taken before the storage is called: its response is cached only if nothing changed since.
#[derive(Clone, Copy)]
struct Asked {
    at: Duration,
    changes_begun: u64,
}

impl Near {
    fn new(ttl: Duration, max_bytes: usize, env: Env) -> Self {
        Self {
            shelf: Arc::new(Shelf::new(max_bytes, WhenFull::Evict, env, None)),
            ttl,
        }
    }

    fn get(&self, key: &EncodedKey) -> Option<Record> {
        let kept = self.shelf.lock(key).get()?;
        Some(kept.record.record())
    }

    fn ask(&self, key: &EncodedKey) -> Asked {
        let shard = self.shelf.lock(key);
        Asked {
            at: shard.now,
            changes_begun: shard.beside.begun,
        }
    }

    /// Caches `record`, which the storage returned, or stored for a `ttl` that counts from when the call was `asked`.
    fn keep(&self, key: &EncodedKey, asked: Asked, record: &Record, ttl: Option<Duration>) {
        if self.ttl.is_zero() || !self.shelf.fits(record.weight()) {
            return;
        }
        // Copied before the lock is taken, so that nobody waits for the copy.
        let packed = Packed::of(record);
        let shard = self.shelf.lock(key);
        let ttl_end = asked.at.saturating_add(ttl.unwrap_or(Duration::MAX));
        let kept = match shard.get() {
            // The first one stays. A `complete` was repeated: the storage restarted the TTL of its record. Others may have
            // changed the record since, so the near TTL is not extended.
            Some(kept) if ttl.is_some() => kept,
            Some(_) => return,
            // The response may be from before or after a change that is under way.
            None if shard.beside.begun != asked.changes_begun || shard.beside.under_way > 0 => {
                return;
            }
            // The caller may send a tombstone although the storage already has the answer.
            None if ttl.is_some() && matches!(record.outcome, Outcome::Tombstone(_)) => return,
            None => Kept {
                record: packed,
                near_end: shard.now.saturating_add(self.ttl),
            },
        };
        let (bytes, end) = (kept.record.weight(), kept.near_end.min(ttl_end));
        shard.replace(kept, bytes, end);
    }

    /// Drops the cached record of `key`. Until the result is dropped nothing is cached for it, nor by calls that began before.
    fn change<'a>(&'a self, key: &'a EncodedKey) -> Change<'a> {
        let mut shard = self.shelf.lock(key);
        shard.beside.begun += 1;
        shard.beside.under_way += 1;
        shard.remove();
        Change { near: self, key }
    }
}

/// A change of a key that is under way.
struct Change<'a> {
    near: &'a Near,
    key: &'a EncodedKey,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut shard = self.near.shelf.lock(self.key);
        // Calls made meanwhile may have got the old or the new record.
        shard.beside.begun += 1;
        shard.beside.under_way -= 1;
        shard.remove();
    }
}
