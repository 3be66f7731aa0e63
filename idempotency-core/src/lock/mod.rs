//! The lock policy (how long a claim is held and waited for), and the `Lock` trait that a `LockedStorage` builds claims on.

use std::{future::Future, sync::Arc, time::Duration};

use crate::{EncodedKey, Env, Held, StorageError, Token};

mod process;
#[cfg(feature = "redis")]
mod redis;

pub use self::process::ProcessLock;
#[cfg(feature = "redis")]
pub use self::redis::RedisLock;

/// How claims behave: how long a duplicate waits, how long a claim outlives its holder, how long it may be held.
///
/// ```
/// use std::time::Duration;
/// use idempotency_core::LockPolicy;
///
/// let policy = LockPolicy::default()
///     .timeout(Duration::from_secs(5))
///     .ttl(Duration::from_secs(60));
/// assert!(policy.is_enabled());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct LockPolicy {
    enabled: bool,
    wait_timeout: Duration,
    lease: Duration,
    hold_limit: Duration,
}

impl LockPolicy {
    /// The shortest lease that can be configured: a shorter one would end between two renewals.
    pub const MIN_TTL: Duration = Duration::from_millis(10);

    /// No claims: only completed records are looked up, so concurrent duplicates may run. A claim that someone else made is
    /// never overwritten.
    pub fn disabled() -> Self {
        Self {
            enabled: false,
            ..Self::default()
        }
    }

    /// How long a duplicate waits for the running original before it is refused. Default: 100 ms.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.wait_timeout = timeout;
        self
    }

    /// The lease: how long a claim outlives a holder that died. It is renewed while the operation runs, so this bounds not
    /// the operation, but how long a key stays blocked after a crash. Default: 30 s. At least [`MIN_TTL`](Self::MIN_TTL).
    pub fn ttl(mut self, lease: Duration) -> Self {
        self.lease = lease.max(Self::MIN_TTL);
        self
    }

    /// After how long a running operation is given up. Its key gets a tombstone, which stays for as long as the operation runs and for
    /// the TTL after that, so it never runs twice. Its place among [`Config::max_running`](crate::Config::max_running) is free, and the
    /// middleware drops it if its client is gone. Default: 10 min. At least [`MIN_TTL`](Self::MIN_TTL).
    pub fn max_hold(mut self, limit: Duration) -> Self {
        self.hold_limit = limit.max(Self::MIN_TTL);
        self
    }

    /// Whether claims are made at all.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    pub(crate) fn wait_timeout(&self) -> Duration {
        self.wait_timeout
    }

    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    pub(crate) fn hold_limit(&self) -> Duration {
        self.hold_limit
    }
}

impl Default for LockPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            wait_timeout: Duration::from_millis(100),
            lease: Duration::from_secs(30),
            hold_limit: Duration::from_secs(600),
        }
    }
}

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
