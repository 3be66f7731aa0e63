//! Redis as a plain cache.

use std::time::Duration;

use bytes::Bytes;
use redis::{Cmd, aio::ConnectionLike};

use crate::{
    Cache, EncodedKey, RedisStorage, StorageError,
    storage::redis::{
        commands::{Mode, milliseconds, storage_error},
        connect::RedisConnect,
        prefix::Prefix,
    },
};

/// Redis as a [`Cache`] of bytes, for a [`LockedStorage`](crate::LockedStorage). Clones share the connection.
///
/// With a [`RedisLock`](crate::RedisLock) it is what the original composes. A [`RedisStorage`](crate::RedisStorage) does the
/// same in fewer round trips and promises more.
#[derive(Clone, Debug)]
#[must_use]
pub struct RedisCache(RedisStorage);

impl RedisCache {
    /// Connects to the server or Cluster at `location`, as [`RedisStorage::connect`](crate::RedisStorage::connect) does.
    ///
    /// # Errors
    ///
    /// [`RedisConnectError`](crate::RedisConnectError), when it is awaited.
    pub fn connect(location: impl AsRef<str>) -> RedisConnect<Self> {
        RedisConnect::new(location.as_ref(), prefix(), Self)
    }

    /// A cache that asks through `connection`, of which clones share one connection. Claims are renewed and records stored
    /// through it in the background too, so the runtime that drives it must not block.
    pub fn new<C>(connection: C) -> Self
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        Self(RedisStorage::new(connection).with_prefix(prefix()))
    }

    /// What the keys begin with: the name of the key is `prefix`, `:cache:` and the encoded key in hex. Default: `idempotency`, of
    /// which the log warns at the first look: two services that share a Redis need different ones.
    pub fn prefix(self, prefix: impl AsRef<str>) -> Self {
        Self(self.0.prefix(prefix))
    }

    /// How long a command may take. Default: 1 s.
    pub fn time_limit(self, limit: Duration) -> Self {
        Self(self.0.time_limit(limit))
    }

    async fn ask(&self, command: &Cmd) -> Result<(), StorageError> {
        let answer = self.0.commands.ask(command, Mode::Repeatable).await;
        answer.map(drop).map_err(storage_error)
    }
}

fn prefix() -> Prefix {
    Prefix::new(":cache:", "RedisCache::prefix")
}

impl Cache for RedisCache {
    async fn get(&self, key: &EncodedKey) -> Result<Option<Bytes>, StorageError> {
        self.0.bytes(&self.0.command("GET", key, 0)).await
    }

    async fn set(&self, key: &EncodedKey, value: Bytes, ttl: Duration) -> Result<(), StorageError> {
        let mut set = self.0.command("SET", key, value.len() + 16);
        set.arg(&value[..]).arg("PX").arg(milliseconds(ttl));
        self.ask(&set).await
    }

    async fn remove(&self, key: &EncodedKey) -> Result<(), StorageError> {
        self.ask(&self.0.command("DEL", key, 0)).await
    }
}
