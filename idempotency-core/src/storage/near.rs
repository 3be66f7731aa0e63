//! A first level in this process, over any storage.

use std::{fmt, sync::Arc, time::Duration};

use super::memory::{Shelf, own};
use crate::{
    Begin, EncodedKey, Entry, Env, Held, NewClaim, Outcome, Record, Storage, StorageError, Token,
};

#[cfg(all(test, feature = "conformance"))]
mod tests;

/// The longest that a record may be answered from here.
const MAX_TTL: Duration = Duration::from_secs(60);

/// Answers retries of what was recorded a moment ago from this process, without a round trip to the storage behind it. Clones
/// share what is near.
///
/// Most retries come within seconds of the first answer. A record that went through here, an answer stored by `complete` or
/// whatever `begin` or `get` found, answers `begin` and `get` here for at most 60 s ([`ttl`](Self::ttl)). All else is asked of the storage: who
/// runs an operation is decided there alone, and claims are never kept here.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), idempotency_core::StorageError> {
/// use std::time::Duration;
/// use idempotency_core::{EncodedKey, MemoryStorage, NearCache, Storage};
///
/// // Over a storage that is far away, it would be worth something.
/// let storage = NearCache::new(MemoryStorage::new())
///     .ttl(Duration::from_secs(10))
///     .max_bytes(16 << 20);
/// assert_eq!(storage.get(&EncodedKey::from_bytes([7; 32])).await?, None);
/// # Ok(())
/// # }
/// ```
///
/// # What is seen when
///
/// * `remove` and `replace` through this handle and its clones are seen here at once. Done by another process, or past this
///   level, they are seen here when the near TTL is over. So is the record that a storage lost.
/// * A record stored here is answered no longer than its TTL. Of one that was found, the storage does not say what is left: it may
///   be answered here for up to the near TTL after its own is over. No operation runs because of that; one that could run again
///   is refused a little longer.
/// * A `remove` or `replace` that is dropped or fails may take effect behind it later, and is then seen as one of another process
///   is.
/// * `complete` that is repeated with one token, because the first call failed, is taken to bring the same answer again or a
///   tombstone, as drivers and the engine do.
#[must_use]
pub struct NearCache<S> {
    storage: Arc<S>,
    near: Arc<Near>,
}

/// Records, and what keeps stale ones out.
struct Near {
    shelf: Shelf<Changes, Kept>,
    ttl: Duration,
    max_bytes: usize,
    env: Env,
}

/// A record that is near.
#[derive(Clone)]
struct Kept {
    record: Record,
    /// When it has been near for long enough, whatever its TTL.
    near_end: Duration,
}

/// What happened to the keys of a shard. One that shares it with a key that changes is not kept near once, and no more.
#[derive(Default)]
struct Changes {
    begun: u64,
    under_way: usize,
}

impl<S: Storage> NearCache<S> {
    /// A first level over `storage`, of 32 MiB.
    pub fn new(storage: S) -> Self {
        Self {
            storage: Arc::new(storage),
            near: Arc::new(Near::new(MAX_TTL, 32 << 20, Env::system())),
        }
    }

    /// How long a record is answered from here; at most 60 s, which is also the default. Zero keeps none.
    ///
    /// Like the other setters it starts with nothing near, and shares nothing with earlier clones.
    pub fn ttl(self, ttl: Duration) -> Self {
        let near = Near::new(ttl.min(MAX_TTL), self.near.max_bytes, self.env_of());
        self.with(near)
    }

    /// How much the near records may weigh, in bytes; the ones that were not used for longest leave. Default: 32 MiB.
    pub fn max_bytes(self, bytes: usize) -> Self {
        let near = Near::new(self.near.ttl, bytes, self.env_of());
        self.with(near)
    }

    /// The clock for the near TTL. Default: [`Env::system`].
    pub fn env(self, env: Env) -> Self {
        let near = Near::new(self.near.ttl, self.near.max_bytes, env);
        self.with(near)
    }

    /// The storage behind this level.
    #[must_use]
    pub fn inner(&self) -> &S {
        &self.storage
    }

    fn env_of(&self) -> Env {
        self.near.env.clone()
    }

    fn with(self, near: Near) -> Self {
        Self {
            storage: self.storage,
            near: Arc::new(near),
        }
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
            .field("max_bytes", &self.near.max_bytes)
            .field("records", &self.near.shelf.len())
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
            self.near.completed(key, asked, record, ttl);
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

/// When the storage was asked: what it answered is kept only if nothing changed since.
#[derive(Clone, Copy)]
struct Asked {
    at: Duration,
    changes_begun: u64,
}

impl Near {
    fn new(ttl: Duration, max_bytes: usize, env: Env) -> Self {
        Self {
            shelf: Shelf::new(max_bytes, env.clone()),
            ttl,
            max_bytes,
            env,
        }
    }

    fn get(&self, key: &EncodedKey) -> Option<Record> {
        let kept = self.shelf.lock(key).get()?;
        Some(kept.record)
    }

    fn ask(&self, key: &EncodedKey) -> Asked {
        let shard = self.shelf.lock(key);
        Asked {
            at: shard.now(),
            changes_begun: shard.beside.begun,
        }
    }

    /// Keeps `record`, which the storage took when it was `asked`, for `ttl` from then on at most.
    fn completed(&self, key: &EncodedKey, asked: Asked, record: &Record, ttl: Duration) {
        {
            let shard = self.shelf.lock(key);
            if let Some(kept) = shard.get() {
                // Repeated: the storage kept the first record, and restarted its TTL. That says nothing of what others did to it
                // since, so it is near no longer than it would have been.
                let end = asked.at.saturating_add(ttl).min(kept.near_end);
                let bytes = kept.record.weight();
                shard.insert(kept, bytes, end);
                return;
            }
        }
        // A tombstone may have come in the place of a record that is there already, unknown to who sent it.
        if matches!(record.outcome, Outcome::Response(_)) {
            self.keep(key, asked, record, Some(ttl));
        }
    }

    /// Keeps `record`, which the storage gave or took when it was `asked`, and keeps for `ttl` from then on if that is known.
    fn keep(&self, key: &EncodedKey, asked: Asked, record: &Record, ttl: Option<Duration>) {
        if self.ttl.is_zero() || !self.shelf.fits(record.weight()) {
            return;
        }
        // Copied before the lock is taken: nobody should wait for that.
        let record = own(record);
        {
            let shard = self.shelf.lock(key);
            // A change that is under way may be done already, or not yet.
            if shard.beside.begun != asked.changes_begun || shard.beside.under_way > 0 {
                return;
            }
            // The first one stays: it may know when its TTL is over, and nothing prolongs it.
            if shard.get().is_some() {
                return;
            }
            let near_end = shard.now().saturating_add(self.ttl);
            let end = asked.at.saturating_add(ttl.unwrap_or(Duration::MAX));
            let bytes = record.weight();
            shard.insert(Kept { record, near_end }, bytes, near_end.min(end));
        }
        self.shelf.settle();
    }

    /// What is near of `key` is gone, and nothing is kept until the result is dropped, nor by who asked before.
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
        // Who asked meanwhile may have been answered with either.
        shard.beside.begun += 1;
        shard.beside.under_way -= 1;
        shard.remove();
    }
}
