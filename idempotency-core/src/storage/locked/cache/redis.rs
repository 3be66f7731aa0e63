//! Redis as a plain cache.

use std::{fmt, time::Duration};

use bytes::Bytes;
use redis::{Cmd, aio::ConnectionLike};

use crate::{
    Cache, EncodedKey, StorageError,
    storage::redis::{
        connect::{Options, RedisConnect},
        link::{bytes_of, milliseconds},
        prefix::Prefix,
        server::Server,
    },
};

/// Redis as a [`Cache`] of bytes, for a [`LockedStorage`](crate::LockedStorage). Clones share the connection.
///
/// With a [`RedisLock`](crate::RedisLock) it is what the original composes. A [`RedisStorage`](crate::RedisStorage) does the
/// same in fewer round trips and promises more.
#[derive(Clone)]
#[must_use]
pub struct RedisCache {
    server: Server,
    prefix: Prefix,
}

impl RedisCache {
    /// Connects to the server or Cluster at `location`, as [`RedisStorage::connect`](crate::RedisStorage::connect) does.
    ///
    /// # Errors
    ///
    /// [`RedisConnectError`](crate::RedisConnectError), when it is awaited.
    pub fn connect(location: impl AsRef<str>) -> RedisConnect<Self> {
        RedisConnect::new(location.as_ref(), Self::of)
    }

    /// A cache that asks through `connection`, of which clones share one connection. Claims are renewed and records stored
    /// through it in the background too, so the runtime that drives it must not block.
    pub fn new<C>(connection: C) -> Self
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        Self::of(Server::through(connection), Options::default())
    }

    fn of(server: Server, options: Options) -> Self {
        Self {
            server,
            prefix: options.prefix,
        }
    }

    /// What the keys begin with: the name of the key is `prefix`, `:cache:` and the encoded key in hex. Default: `idempotency`, of
    /// which the log warns at the first look: two services that share a Redis need different ones.
    pub fn prefix(mut self, prefix: impl AsRef<str>) -> Self {
        self.prefix = Prefix::chosen(prefix.as_ref());
        self
    }

    /// How long a command may take. Default: 1 s.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.server = self.server.limited(limit);
        self
    }

    fn command(&self, name: &str, key: &EncodedKey) -> Cmd {
        let mut command = redis::cmd(name);
        command.arg(format!("{}:cache:{key}", self.prefix));
        command
    }
}

impl Cache for RedisCache {
    async fn get(&self, key: &EncodedKey) -> Result<Option<Bytes>, StorageError> {
        self.prefix.warn_if_default("RedisCache::prefix");
        bytes_of(self.server.ask(&self.command("GET", key)).await?)
    }

    async fn set(&self, key: &EncodedKey, value: Bytes, ttl: Duration) -> Result<(), StorageError> {
        let mut set = self.command("SET", key);
        set.arg(&value[..]).arg("PX").arg(milliseconds(ttl));
        self.server.ask(&set).await?;
        Ok(())
    }

    async fn remove(&self, key: &EncodedKey) -> Result<(), StorageError> {
        self.server.ask(&self.command("DEL", key)).await?;
        Ok(())
    }
}

impl fmt::Debug for RedisCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisCache")
            .field("prefix", &format_args!("{}", self.prefix))
            .field("time_limit", &self.server.limit())
            .finish_non_exhaustive()
    }
}
