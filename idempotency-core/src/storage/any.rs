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

/// Passes the methods of [`Storage`] to a macro: the one list of what is forwarded. References have the lifetime that is asked for.
macro_rules! methods {
    ($pass_to:ident!($lifetime:lifetime $($arguments:tt)*)) => {
        $pass_to! { $($arguments)*
            begin(key: &$lifetime EncodedKey, claim: &$lifetime NewClaim) -> Begin;
            complete(key: &$lifetime EncodedKey, token: Token, record: &$lifetime Record, ttl: Duration) -> Held;
            renew(key: &$lifetime EncodedKey, token: Token, lease: Duration) -> Held;
            release(key: &$lifetime EncodedKey, token: Token) -> Held;
            get(key: &$lifetime EncodedKey) -> Option<Entry>;
            replace(key: &$lifetime EncodedKey, record: &$lifetime Record, ttl: Duration) -> ();
            remove(key: &$lifetime EncodedKey) -> bool;
            wait(key: &$lifetime EncodedKey, timeout: Duration) -> ();
        }
    };
}

macro_rules! erase {
    ($($method:ident($($argument:ident: $type:ty),*) -> $done:ty;)*) => {
        /// [`Storage`] with boxed futures.
        trait Erased: Send + Sync {
            $(fn $method<'a>(&'a self, $($argument: $type),*) -> BoxFuture<'a, Result<$done, StorageError>>;)*

            fn transactions(&self) -> Option<Arc<dyn Transactions>>;

            fn type_name(&self) -> &'static str;
        }

        impl<S: Storage> Erased for S {
            $(fn $method<'a>(&'a self, $($argument: $type),*) -> BoxFuture<'a, Result<$done, StorageError>> {
                Box::pin(Storage::$method(self, $($argument),*))
            })*

            fn transactions(&self) -> Option<Arc<dyn Transactions>> {
                Storage::transactions(self)
            }

            fn type_name(&self) -> &'static str {
                std::any::type_name::<S>()
            }
        }
    };
}
methods!(erase!('a));

/// Implements [`Storage`] by passing every call to what `self` points to.
macro_rules! forward {
    ([$($implementor:tt)*] [$self:ident => $pointee:expr]
     $($method:ident($($argument:ident: $type:ty),*) -> $done:ty;)*) => {
        $($implementor)* {
            $(async fn $method(&$self, $($argument: $type),*) -> Result<$done, StorageError> {
                $pointee.$method($($argument),*).await
            })*

            fn transactions(&$self) -> Option<Arc<dyn Transactions>> {
                $pointee.transactions()
            }
        }
    };
}
methods!(forward!('_ [impl Storage for AnyStorage] [self => self.0]));
methods!(forward!('_ [impl<S: Storage> Storage for Arc<S>] [self => (**self)]));
