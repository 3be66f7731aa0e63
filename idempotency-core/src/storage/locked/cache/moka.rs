//! A cache in this process.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;

use super::Cache;
use crate::{
    EncodedKey, Env, StorageError, StorageErrorKind, WhenFull, event::Observers,
    storage::memory::Shelf,
};

/// Keeps bytes in this process, up to a number of them. Clones share it.
///
/// It is what [`MemoryStorage`](crate::MemoryStorage) keeps its records in, as a [`Cache`]: for tests of a composition, and for
/// one process whose claims are to be a [`Lock`](crate::Lock)'s. When it is full, the values leave that were not used for
/// longest (moka's LRU policy). **A retry of a record that left runs its operation again**: evictions are counted
/// ([`evicted`](Self::evicted)) and logged as a warning, the first and then whenever their number has doubled.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), idempotency_core::StorageError> {
/// use std::time::Duration;
/// use idempotency_core::{Cache, EncodedKey, MokaCache};
///
/// let cache = MokaCache::new().max_bytes(1 << 20);
/// let key = EncodedKey::from_bytes([7; 32]);
/// cache.set(&key, "value".into(), Duration::from_secs(60)).await?;
/// assert_eq!(cache.get(&key).await?, Some("value".into()));
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
#[must_use]
pub struct MokaCache {
    shelf: Arc<Shelf<(), Bytes>>,
}

impl MokaCache {
    /// A cache of 64 MiB.
    pub fn new() -> Self {
        Self::with(64 << 20, Env::system())
    }

    fn with(max_bytes: usize, env: Env) -> Self {
        let observers = Some(Observers::default());
        Self {
            shelf: Arc::new(Shelf::new(max_bytes, WhenFull::Evict, env, observers)),
        }
    }

    /// An empty cache of so many bytes, which are counted as [`MemoryStorage`](crate::MemoryStorage#memory) counts them.
    /// Default: 64 MiB.
    pub fn max_bytes(self, bytes: usize) -> Self {
        Self::with(bytes, self.shelf.env.clone())
    }

    /// An empty cache whose TTLs follow the clock of `env`. Default: [`Env::system`].
    pub fn env(self, env: Env) -> Self {
        Self::with(self.shelf.max_bytes, env)
    }

    /// How many live values were evicted since the cache was built.
    #[must_use]
    pub fn evicted(&self) -> u64 {
        self.shelf.counted().evicted()
    }
}

impl Default for MokaCache {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts and limits only.
impl fmt::Debug for MokaCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ledger = self.shelf.ledger();
        f.debug_struct("MokaCache")
            .field("max_bytes", &self.shelf.max_bytes)
            .field("weight", &ledger.record_weight())
            .field("values", &ledger.records())
            .field("evicted", &ledger.evicted())
            .finish()
    }
}

impl Cache for MokaCache {
    async fn get(&self, key: &EncodedKey) -> Result<Option<Bytes>, StorageError> {
        Ok(self.shelf.lock(key).get())
    }

    /// As the trait says. A value that is larger than the whole cache is [`StorageErrorKind::Full`].
    async fn set(&self, key: &EncodedKey, value: Bytes, ttl: Duration) -> Result<(), StorageError> {
        if !self.shelf.fits(value.len()) {
            return Err(StorageError::new(
                StorageErrorKind::Full,
                "the value is larger than the whole cache: raise `max_bytes` of the `MokaCache`",
            ));
        }
        // `Bytes` may be a part of something larger, and would keep all of it.
        let value = Bytes::copy_from_slice(&value);
        let bytes = value.len();
        let shard = self.shelf.lock(key);
        shard.replace(value, bytes, shard.now.saturating_add(ttl));
        Ok(())
    }

    async fn remove(&self, key: &EncodedKey) -> Result<(), StorageError> {
        self.shelf.lock(key).remove();
        Ok(())
    }
}

#[cfg(all(test, feature = "conformance"))]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        reason = "a test fails by panicking"
    )]

    use futures_util::FutureExt as _;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn now<T>(call: impl Future<Output = Result<T, StorageError>>) -> T {
        call.now_or_never().expect("the call is over").unwrap()
    }

    fn key(number: u16) -> EncodedKey {
        let mut bytes = [0; 32];
        bytes[30..].copy_from_slice(&number.to_be_bytes());
        EncodedKey::from_bytes(bytes)
    }

    #[test]
    fn a_value_stays_for_its_ttl() {
        let (env, clock) = Env::simulated(1);
        let cache = MokaCache::new().env(env);
        now(cache.set(&key(1), "first".into(), DAY));
        now(cache.set(&key(1), "second".into(), Duration::from_secs(2)));
        now(cache.set(&key(2), "for ever".into(), Duration::MAX));
        clock.advance(Duration::from_secs(1));
        assert_eq!(now(cache.clone().get(&key(1))), Some("second".into()));
        clock.advance(Duration::from_secs(1));
        assert_eq!(now(cache.get(&key(1))), None);
        clock.advance(100 * DAY);
        assert_eq!(now(cache.get(&key(2))), Some("for ever".into()));
        now(cache.remove(&key(2)));
        now(cache.remove(&key(2)));
        assert_eq!(now(cache.get(&key(2))), None);
        let counted = cache.shelf.counted();
        assert_eq!((counted.records(), counted.record_weight()), (0, 0));
        assert_eq!(cache.evicted(), 0);
    }

    /// What was used last stays, and the new ones do. A value is counted as it is, not as what it is a part of.
    #[test]
    fn the_bytes_are_bounded() {
        let cache = MokaCache::new().max_bytes(100_000);
        let large = Bytes::from(vec![7; 1 << 20]);
        for number in 0..2_000 {
            now(cache.set(&key(number), large.slice(..100), DAY));
            for kept in [number, 0] {
                let value = now(cache.get(&key(kept)));
                assert_eq!(value.unwrap().len(), 100, "{kept} after {number}");
            }
            assert!(cache.shelf.counted().record_weight() <= 104_000);
        }
        assert!(cache.evicted() > 1_500);
        assert!(large.is_unique());

        let error = cache.set(&key(1), large, DAY).now_or_never();
        let error = error.expect("the call is over").unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Full);
    }

    #[test]
    fn what_has_expired_is_not_evicted() {
        let (env, clock) = Env::simulated(1);
        let cache = MokaCache::new().max_bytes(100_000).env(env);
        let second = Duration::from_secs(1);
        for number in 0..153 {
            now(cache.set(&key(number), vec![7; 100].into(), second));
        }
        clock.advance(second);
        assert_eq!(cache.evicted(), 0);
    }
}
