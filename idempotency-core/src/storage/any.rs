//! One type for every storage.

use std::{any::Any, fmt, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;

use super::{Begin, Entry, Held, NewClaim, Storage, Token, Transactions};
use crate::{EncodedKey, Record, StorageError};

/// Any [`Storage`], erased; clones share it. It lets storages of different kinds live in one map of named caches.
///
/// ```
/// # #[cfg(feature = "memory")] {
/// use idempotency_core::{AnyStorage, MemoryStorage};
///
/// let storages = [
///     AnyStorage::new(MemoryStorage::new()),
///     AnyStorage::new(MemoryStorage::builder().max_bytes(1 << 20).build()),
/// ];
/// assert_eq!(storages.len(), 2);
/// # }
/// ```
#[derive(Clone)]
pub struct AnyStorage(Arc<dyn Erased>);

impl AnyStorage {
    /// Erases the type of `storage`. Costs nothing if that was done already.
    pub fn new(storage: impl Storage) -> Self {
        let erased: Option<&Self> = (&storage as &dyn Any).downcast_ref();
        match erased {
            Some(erased) => erased.clone(),
            None => Self(Arc::new(storage)),
        }
    }
}

impl fmt::Debug for AnyStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AnyStorage({})", self.0.type_name())
    }
}

/// [`Storage`] with boxed futures.
trait Erased: Send + Sync {
    fn begin<'a>(
        &'a self,
        key: &'a EncodedKey,
        claim: &'a NewClaim,
    ) -> BoxFuture<'a, Result<Begin, StorageError>>;
    fn complete<'a>(
        &'a self,
        key: &'a EncodedKey,
        token: Token,
        record: &'a Record,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Held, StorageError>>;
    fn renew<'a>(
        &'a self,
        key: &'a EncodedKey,
        token: Token,
        lease: Duration,
    ) -> BoxFuture<'a, Result<Held, StorageError>>;
    fn release<'a>(
        &'a self,
        key: &'a EncodedKey,
        token: Token,
    ) -> BoxFuture<'a, Result<Held, StorageError>>;
    fn get<'a>(&'a self, key: &'a EncodedKey)
    -> BoxFuture<'a, Result<Option<Entry>, StorageError>>;
    fn replace<'a>(
        &'a self,
        key: &'a EncodedKey,
        record: &'a Record,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<(), StorageError>>;
    fn remove<'a>(&'a self, key: &'a EncodedKey) -> BoxFuture<'a, Result<bool, StorageError>>;
    fn wait<'a>(
        &'a self,
        key: &'a EncodedKey,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<(), StorageError>>;
    fn transactions(&self) -> Option<Arc<dyn Transactions>>;
    fn type_name(&self) -> &'static str;
}

impl<S: Storage> Erased for S {
    fn begin<'a>(
        &'a self,
        key: &'a EncodedKey,
        claim: &'a NewClaim,
    ) -> BoxFuture<'a, Result<Begin, StorageError>> {
        Box::pin(Storage::begin(self, key, claim))
    }

    fn complete<'a>(
        &'a self,
        key: &'a EncodedKey,
        token: Token,
        record: &'a Record,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<Held, StorageError>> {
        Box::pin(Storage::complete(self, key, token, record, ttl))
    }

    fn renew<'a>(
        &'a self,
        key: &'a EncodedKey,
        token: Token,
        lease: Duration,
    ) -> BoxFuture<'a, Result<Held, StorageError>> {
        Box::pin(Storage::renew(self, key, token, lease))
    }

    fn release<'a>(
        &'a self,
        key: &'a EncodedKey,
        token: Token,
    ) -> BoxFuture<'a, Result<Held, StorageError>> {
        Box::pin(Storage::release(self, key, token))
    }

    fn get<'a>(
        &'a self,
        key: &'a EncodedKey,
    ) -> BoxFuture<'a, Result<Option<Entry>, StorageError>> {
        Box::pin(Storage::get(self, key))
    }

    fn replace<'a>(
        &'a self,
        key: &'a EncodedKey,
        record: &'a Record,
        ttl: Duration,
    ) -> BoxFuture<'a, Result<(), StorageError>> {
        Box::pin(Storage::replace(self, key, record, ttl))
    }

    fn remove<'a>(&'a self, key: &'a EncodedKey) -> BoxFuture<'a, Result<bool, StorageError>> {
        Box::pin(Storage::remove(self, key))
    }

    fn wait<'a>(
        &'a self,
        key: &'a EncodedKey,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<(), StorageError>> {
        Box::pin(Storage::wait(self, key, timeout))
    }

    fn transactions(&self) -> Option<Arc<dyn Transactions>> {
        Storage::transactions(self)
    }

    fn type_name(&self) -> &'static str {
        std::any::type_name::<S>()
    }
}

/// Implements [`Storage`] by passing every call to what `self.0` points to.
macro_rules! forward_to_pointee {
    ($($implementor:tt)*) => {
        $($implementor)* {
            async fn begin(
                &self,
                key: &EncodedKey,
                claim: &NewClaim,
            ) -> Result<Begin, StorageError> {
                self.pointee().begin(key, claim).await
            }

            async fn complete(
                &self,
                key: &EncodedKey,
                token: Token,
                record: &Record,
                ttl: Duration,
            ) -> Result<Held, StorageError> {
                self.pointee().complete(key, token, record, ttl).await
            }

            async fn renew(
                &self,
                key: &EncodedKey,
                token: Token,
                lease: Duration,
            ) -> Result<Held, StorageError> {
                self.pointee().renew(key, token, lease).await
            }

            async fn release(
                &self,
                key: &EncodedKey,
                token: Token,
            ) -> Result<Held, StorageError> {
                self.pointee().release(key, token).await
            }

            async fn get(
                &self,
                key: &EncodedKey,
            ) -> Result<Option<Entry>, StorageError> {
                self.pointee().get(key).await
            }

            async fn replace(
                &self,
                key: &EncodedKey,
                record: &Record,
                ttl: Duration,
            ) -> Result<(), StorageError> {
                self.pointee().replace(key, record, ttl).await
            }

            async fn remove(
                &self,
                key: &EncodedKey,
            ) -> Result<bool, StorageError> {
                self.pointee().remove(key).await
            }

            async fn wait(
                &self,
                key: &EncodedKey,
                timeout: Duration,
            ) -> Result<(), StorageError> {
                self.pointee().wait(key, timeout).await
            }

            fn transactions(&self) -> Option<Arc<dyn Transactions>> {
                self.pointee().transactions()
            }
        }
    };
}

/// What a pointer to a storage points to; keeps the two forwarding impls alike.
trait Pointer {
    type Pointee: ?Sized;
    fn pointee(&self) -> &Self::Pointee;
}

impl Pointer for AnyStorage {
    type Pointee = dyn Erased + 'static;

    fn pointee(&self) -> &(dyn Erased + 'static) {
        &*self.0
    }
}

impl<S: Storage> Pointer for Arc<S> {
    type Pointee = S;

    fn pointee(&self) -> &S {
        self
    }
}

forward_to_pointee!(impl Storage for AnyStorage);
forward_to_pointee!(impl<S: Storage> Storage for Arc<S>);
