//! Locks that all processes of one Redis see.

use std::time::Duration;

use redis::aio::ConnectionLike;

use crate::{
    Begin, EncodedKey, Held, Lock, NewClaim, RedisStorage, Storage as _, StorageError, Token,
    storage::redis::{connect::RedisConnect, prefix::Prefix},
};

/// Locks keys in Redis, for all processes that use it. Clones share the connection.
///
/// The lock of a key is one key of Redis with the random token of its holder, which ends by itself; only the token releases it.
/// With it a [`LockedStorage`](crate::LockedStorage) of any cache serves several processes, as the original's
/// `MultiProcessRedisLock` does. Where the records are in Redis too, a [`RedisStorage`](crate::RedisStorage) takes fewer
/// round trips and promises more.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use idempotency_core::{LockedStorage, RedisCache, RedisLock};
///
/// let lock = RedisLock::connect("redis://127.0.0.1:6379").name("MyLock").await?;
/// let cache = RedisCache::connect("redis://127.0.0.1:6379").prefix("MyCache").await?;
/// let storage = LockedStorage::new(cache, lock);
/// # let _ = storage;
/// # Ok(())
/// # }
/// ```
///
/// A failover to a replica that has not heard of a lock yet, and a restart without data, lose locks.
#[derive(Clone, Debug)]
#[must_use]
pub struct RedisLock(RedisStorage);

impl RedisLock {
    /// Connects to the server or Cluster at `location`, as [`RedisStorage::connect`](crate::RedisStorage::connect) does.
    ///
    /// # Errors
    ///
    /// [`RedisConnectError`](crate::RedisConnectError), when it is awaited.
    pub fn connect(location: impl AsRef<str>) -> RedisConnect<Self> {
        RedisConnect::new(location.as_ref(), prefix(), Self)
    }

    /// A lock that asks through `connection`, of which clones share one connection. Claims are renewed and records stored
    /// through it in the background too, so the runtime that drives it must not block.
    pub fn new<C>(connection: C) -> Self
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        Self(RedisStorage::new(connection).with_prefix(prefix()))
    }

    /// What the keys begin with: the name of the key is `name`, `:lock:` and the encoded key in hex. Default: `idempotency`, of
    /// which the log warns at the first lock: two services that share a Redis need different names.
    pub fn name(self, name: impl AsRef<str>) -> Self {
        Self(self.0.prefix(name))
    }

    /// How long a command may take. Default: 1 s.
    pub fn time_limit(self, limit: Duration) -> Self {
        Self(self.0.time_limit(limit))
    }
}

fn prefix() -> Prefix {
    Prefix::new(":lock:", "RedisLock::name")
}

impl Lock for RedisLock {
    async fn acquire(
        &self,
        key: &EncodedKey,
        ttl: Duration,
    ) -> Result<Option<Token>, StorageError> {
        let claim = NewClaim {
            token: Token::random_from(&self.0.commands.env),
            fingerprint: None,
            lease: ttl,
        };
        let begun = self.0.begin(key, &claim).await?;
        Ok((begun == Begin::Acquired).then_some(claim.token))
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        self.0.renew(key, token, ttl).await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        self.0.release(key, token).await
    }

    /// Returns when the key is free: first for one of those who wait, and soon for the others if that one leaves it free.
    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        self.0.wait(key, timeout).await
    }
}
