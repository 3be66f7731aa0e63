//! Any key-value cache, as a place for records.

use std::{future::Future, sync::Arc, time::Duration};

use bytes::Bytes;

use crate::{EncodedKey, StorageError};

#[cfg(feature = "memory")]
pub(super) mod moka;
#[cfg(feature = "redis")]
pub(super) mod redis;

/// Any key-value cache that can keep bytes for a while: three functions, and a [`LockedStorage`](crate::LockedStorage) makes a
/// [`Storage`](crate::Storage) of it.
///
/// ```
/// use std::{collections::HashMap, sync::Mutex, time::Duration};
/// use bytes::Bytes;
/// use idempotency_core::{Cache, EncodedKey, LockedStorage, ProcessLock, StorageError};
///
/// #[derive(Default)]
/// struct Forgetful(Mutex<HashMap<EncodedKey, Bytes>>);
///
/// impl Forgetful {
///     fn map(&self) -> Result<std::sync::MutexGuard<'_, HashMap<EncodedKey, Bytes>>, StorageError> {
///         self.0.lock().map_err(|_| StorageError::unavailable("a thread panicked with the map"))
///     }
/// }
///
/// impl Cache for Forgetful {
///     async fn get(&self, key: &EncodedKey) -> Result<Option<Bytes>, StorageError> {
///         Ok(self.map()?.get(key).cloned())
///     }
///
///     // A real one forgets the value when its TTL is over, and no earlier.
///     async fn set(&self, key: &EncodedKey, value: Bytes, _ttl: Duration) -> Result<(), StorageError> {
///         self.map()?.insert(*key, value);
///         Ok(())
///     }
///
///     async fn remove(&self, key: &EncodedKey) -> Result<(), StorageError> {
///         self.map()?.remove(key);
///         Ok(())
///     }
/// }
///
/// let storage = LockedStorage::new(Forgetful::default(), ProcessLock::new());
/// # let _ = storage;
/// ```
///
/// # Rules
///
/// 1. `get` returns the bytes of the last `set` that returned, whole, until their TTL is over or they are removed. A cache of
///    several nodes answers from the one that was written, not from a replica that lags: what a `get` misses runs again.
/// 2. A value may leave early only where running its operation again is acceptable: a cache that evicts is one that forgets
///    payments. Turn eviction off, and let it refuse new values instead.
/// 3. What fails is an error ([`StorageError::unavailable`] keeps its cause), never an absent value.
/// 4. Any of the futures may be dropped at any point.
pub trait Cache: Send + Sync + 'static {
    /// The bytes under `key`, if there are any and their TTL is not over.
    ///
    /// # Errors
    ///
    /// If the cache can't tell.
    fn get(
        &self,
        key: &EncodedKey,
    ) -> impl Future<Output = Result<Option<Bytes>, StorageError>> + Send;

    /// Puts `value` under `key`, in the place of what is there, for `ttl`, which is not zero and may be as long as
    /// [`Duration::MAX`].
    ///
    /// # Errors
    ///
    /// If the value may not be there. [`StorageErrorKind::Full`](crate::StorageErrorKind::Full) says that it is not, for lack of room;
    /// its source should name the limit to raise.
    fn set(
        &self,
        key: &EncodedKey,
        value: Bytes,
        ttl: Duration,
    ) -> impl Future<Output = Result<(), StorageError>> + Send;

    /// Removes what is under `key`; nothing may be there.
    ///
    /// # Errors
    ///
    /// If it may still be there.
    fn remove(&self, key: &EncodedKey) -> impl Future<Output = Result<(), StorageError>> + Send;
}

impl<C: Cache> Cache for Arc<C> {
    async fn get(&self, key: &EncodedKey) -> Result<Option<Bytes>, StorageError> {
        C::get(self, key).await
    }

    async fn set(&self, key: &EncodedKey, value: Bytes, ttl: Duration) -> Result<(), StorageError> {
        C::set(self, key, value, ttl).await
    }

    async fn remove(&self, key: &EncodedKey) -> Result<(), StorageError> {
        C::remove(self, key).await
    }
}
