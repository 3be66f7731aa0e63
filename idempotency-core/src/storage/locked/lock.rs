//! The locks that a `LockedStorage` builds its claims on.

use std::{future::Future, sync::Arc, time::Duration};

use crate::{EncodedKey, Env, Held, StorageError, Token};

mod process;
#[cfg(feature = "redis")]
mod redis;

pub use self::process::ProcessLock;
#[cfg(feature = "redis")]
pub use self::redis::RedisLock;

/// Locks keys, each for a limited time. A [`LockedStorage`](crate::LockedStorage) builds its claims on one; [`ProcessLock`] is an
/// implementation.
///
/// # Rules
///
/// 1. Every call is atomic. Of any number of concurrent [`acquire`](Self::acquire)s of a free key exactly one gets a token.
/// 2. A lock expires when its `ttl` is over and it was not renewed. Then, and not before, the key can be acquired again.
/// 3. Tokens are random: each names one lock of one key. `renew` and `release` change nothing, and are
///    [`Held::Lost`], unless it is the token that holds the key.
/// 4. Any of the futures may be dropped at any point. A dropped `acquire` may leave the key locked, under a token that nobody
///    knows, until `ttl` is over; not for longer.
///
/// A lock of several servers that loses locks when one of them fails (a Redis without persistence, a replica that is promoted)
/// breaks rule 2, and two executions may hold one key: see [`LockedStorage`](crate::LockedStorage#what-it-cant-promise).
pub trait Lock: Send + Sync + 'static {
    /// Locks `key` for `ttl` and returns a fresh token; `None` if it is locked.
    ///
    /// # Errors
    ///
    /// If the lock fails. Whether the key was locked is then unknown.
    fn acquire(
        &self,
        key: &EncodedKey,
        ttl: Duration,
    ) -> impl Future<Output = Result<Option<Token>, StorageError>> + Send;

    /// Extends the lock of `token`: it expires `ttl` from now.
    ///
    /// # Errors
    ///
    /// If the lock fails.
    fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        ttl: Duration,
    ) -> impl Future<Output = Result<Held, StorageError>> + Send;

    /// Ends the lock of `token`.
    ///
    /// # Errors
    ///
    /// If the lock fails. Repeating the call is safe.
    fn release(
        &self,
        key: &EncodedKey,
        token: Token,
    ) -> impl Future<Output = Result<Held, StorageError>> + Send;

    /// Returns when another [`acquire`](Self::acquire) is worth a try, or when `timeout` is over. A hint, for a key that another
    /// process holds.
    ///
    /// The default returns after 50 ms, so a waiter tries again at that pace. A lock that can notify, or check cheaply, should.
    ///
    /// # Errors
    ///
    /// If the lock fails.
    fn wait(
        &self,
        key: &EncodedKey,
        timeout: Duration,
    ) -> impl Future<Output = Result<(), StorageError>> + Send {
        const PACE: Duration = Duration::from_millis(50);

        let _ = key;
        async move {
            Env::system().sleep(timeout.min(PACE)).await;
            Ok(())
        }
    }
}

impl<L: Lock> Lock for Arc<L> {
    async fn acquire(
        &self,
        key: &EncodedKey,
        ttl: Duration,
    ) -> Result<Option<Token>, StorageError> {
        L::acquire(self, key, ttl).await
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        L::renew(self, key, token, ttl).await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        L::release(self, key, token).await
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        L::wait(self, key, timeout).await
    }
}
