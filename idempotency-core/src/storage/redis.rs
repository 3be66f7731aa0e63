//! Claims and records in Redis, for any number of processes.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt as _;
use redis::{Client, Cmd, aio::ConnectionLike};

use self::{
    commands::{
        Commands, Mode, bytes_of, command, milliseconds, refuses_writes, storage_error, unexpected,
    },
    connect::{RedisConnect, Replicas},
    connector::{Sentinels, with_tcp},
    layout::Stored,
    prefix::Prefix,
    reconnecting::Reconnecting,
    scripts::Script,
    source::NotifySource,
};
use crate::{
    Begin, EncodedKey, Entry, Env, Held, NewClaim, Record, Storage, StorageError, StorageErrorKind,
    Token,
    storage::waits::{Seen, Waits},
};

mod cluster;
pub(crate) mod commands;
pub(crate) mod connect;
mod connector;
mod layout;
pub(crate) mod prefix;
mod reconnecting;
mod scripts;
mod source;

/// How long a command may take.
const DEFAULT_LIMIT: Duration = Duration::from_secs(1);

/// Keeps claims and records in Redis 7 or newer, or Valkey: any number of processes, one execution. Clones share the connection.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use idempotency_core::RedisStorage;
///
/// let storage = RedisStorage::connect("redis://127.0.0.1:6379")
///     .prefix("shop")
///     .require_noeviction()
///     .await?;
/// # let _ = storage;
/// # Ok(())
/// # }
/// ```
#[doc = include_str!("redis/storage.md")]
#[derive(Clone)]
#[must_use]
pub struct RedisStorage {
    pub(crate) commands: Commands,
    source: NotifySource,
    waits: Arc<Waits>,
    prefix: Prefix,
    replicas: Option<Replicas>,
}

impl RedisStorage {
    /// Connects to the server at `location`: a URL, `host` or `host:port`; or to a Cluster, of which it names one node or, with
    /// commas between, several.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), idempotency_core::RedisConnectError> {
    /// use idempotency_core::RedisStorage;
    ///
    /// let one = RedisStorage::connect("rediss://shop:password@cache:6380/2").await?;
    /// let cluster = RedisStorage::connect("redis://n1:6379,redis://n2:6379").await?;
    /// # let _ = (one, cluster);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// All [options](RedisConnect) can be set before it is awaited:
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), idempotency_core::RedisConnectError> {
    /// use std::time::Duration;
    /// use idempotency_core::RedisStorage;
    ///
    /// let storage = RedisStorage::connect("redis://cache")
    ///     .prefix("shop")
    ///     .time_limit(Duration::from_secs(2))
    ///     .wait_replicas(1, Duration::from_millis(500))
    ///     .require_noeviction()
    ///     .await?;
    /// # let _ = storage;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Refused are a version older than Redis 7, a replica, a sentinel, and several servers that are no Cluster. A server that may
    /// evict records is warned of in the log ([`require_noeviction`](RedisConnect::require_noeviction) refuses it); in a Cluster
    /// every master is checked. The storage reconnects by itself: when the connection is lost or went silent, when the server has
    /// become a replica (the name in `location` may lead to the new master), and on another tokio runtime when the first one has
    /// ended. A second connection serves [calls in the background](Self#several-runtimes).
    ///
    /// # Errors
    ///
    /// [`RedisConnectError`](crate::RedisConnectError), when it is awaited.
    pub fn connect(location: impl AsRef<str>) -> RedisConnect<Self> {
        RedisConnect::new(location.as_ref(), prefix(), |storage| storage)
    }

    /// A storage that sends its commands through `connection`: a `ConnectionManager`, a `ClusterConnection`, or anything else of the crate
    /// [`redis`](crate::redis) of which clones share one connection.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), idempotency_core::redis::RedisError> {
    /// use idempotency_core::{RedisStorage, redis::{Client, aio::ConnectionManager}};
    ///
    /// let client = Client::open("redis://127.0.0.1:6379")?;
    /// let connection = ConnectionManager::new(client.clone()).await?;
    /// let storage = RedisStorage::new(connection).subscriber(client);
    /// # let _ = storage;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Nothing is checked. `connection` should reconnect by itself when it is lost. A `ConnectionManager` does, but unlike
    /// [`connect`](Self::connect) it keeps a connection to a master that has become a replica, a password that was refused once,
    /// and a connection that went silent. A `ClusterConnection` must not read from replicas. It resends a command whose answer was
    /// lost, so a successful release may be reported as lost, and a silent node delays the others. Claims are
    /// renewed through `connection` too, so the runtime that drives it must not block: see [Several
    /// runtimes](Self#several-runtimes). Without a [`subscriber`](Self::subscriber) waiting requests
    /// poll.
    pub fn new<C>(connection: C) -> Self
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        let commands = Commands::new(connection.clone(), connection, DEFAULT_LIMIT);
        Self::over(commands, NotifySource::none())
    }

    /// A storage in the master that sentinels name. They are asked when the first command is sent, and again when the connection
    /// is lost or leads to a replica.
    ///
    /// Nothing is checked, as with [`new`](Self::new). The master notifies waiting requests of the end of a claim.
    ///
    /// ```
    /// use idempotency_core::{RedisStorage, redis::sentinel::{SentinelClient, SentinelServerType}};
    ///
    /// # fn main() -> Result<(), idempotency_core::redis::RedisError> {
    /// let sentinels = vec!["redis://s1:26379", "redis://s2:26379", "redis://s3:26379"];
    /// let client = SentinelClient::build(sentinels, "mymaster", None, SentinelServerType::Master)?;
    /// let storage = RedisStorage::sentinel(client).prefix("shop");
    /// # let _ = storage;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A failover can lose claims and records that the replica has not received yet: see [`wait_replicas`](Self::wait_replicas).
    pub fn sentinel(client: redis::sentinel::SentinelClient) -> Self {
        let sentinels = Sentinels::new(client);
        let source = NotifySource::Master(sentinels.clone());
        let connect = move || sentinels.clone().connect().boxed();
        let connection = Reconnecting::new(Arc::new(connect), Env::system());
        let background = connection.apart();
        let commands = Commands::new(connection, background, DEFAULT_LIMIT);
        Self::over(commands, source)
    }

    fn over(commands: Commands, source: NotifySource) -> Self {
        Self {
            waits: source.waits(&commands),
            source,
            commands,
            prefix: prefix(),
            replicas: None,
        }
    }

    /// The prefix of all keys: the name of the key is `prefix`, a colon, and the encoded key in hex. Default: `idempotency`, of
    /// which the log warns at the first claim.
    ///
    /// Storages of different prefixes share nothing. Two services that share a Redis need different ones: with the same prefix a key
    /// that a client sent to one may be answered by the other.
    pub fn prefix(mut self, prefix: impl AsRef<str>) -> Self {
        self.prefix = self.prefix.chosen(prefix.as_ref());
        self
    }

    /// The same, with keys of another kind.
    pub(crate) fn with_prefix(self, prefix: Prefix) -> Self {
        Self { prefix, ..self }
    }

    /// The server that notifies waiting requests of the end of a claim, for a storage made by [`new`](Self::new). It gets one
    /// connection while a request waits. In a Cluster any node will do. Default: none; waiting requests then poll, first after 20 ms,
    /// at last every 500 ms. [`connect`](Self::connect) sets it.
    pub fn subscriber(self, client: Client) -> Self {
        // It was opened before, so it can be opened again.
        let client = Client::open(with_tcp(client.get_connection_info())).unwrap_or(client);
        self.notified_by(NotifySource::Any(vec![client]))
    }

    /// How long a command may take; then it fails with [`StorageErrorKind::Timeout`]. Default: 1 s.
    ///
    /// The engine has a limit of its own, [`Config::storage_timeout`](crate::Config::storage_timeout), and so may a connection that was
    /// given to [`new`](Self::new): the shortest one counts.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.commands.limit = limit;
        let source = self.source.clone();
        self.notified_by(source)
    }

    fn notified_by(mut self, source: NotifySource) -> Self {
        self.waits = source.waits(&self.commands);
        self.source = source;
        self
    }

    /// Waits after every claim until `count` replicas have it, `timeout` at most. If they are fewer by then, the claim is released
    /// and `begin` fails. Default: none.
    ///
    /// It makes the loss of a claim by a failover less likely, not impossible: a replica without the claim may become the master. It
    /// costs a round trip, during which all commands on the connection wait. It is for one server with replicas; in a Cluster every
    /// claim fails ([`connect`](Self::connect) refuses a Cluster if this was set before it is awaited). `timeout` should be shorter
    /// than the [time limit](Self::time_limit). With a connection of your own ([`new`](Self::new)) the storage does not notice that
    /// the connection was replaced between claim and `WAIT`; the claim then counts as replicated although nothing was checked.
    pub fn wait_replicas(mut self, count: u32, timeout: Duration) -> Self {
        self.replicas = Some((count, timeout));
        self
    }

    /// A command on `key`, with room for what else it is about.
    pub(crate) fn command(&self, name: &str, key: &EncodedKey, bytes: usize) -> Cmd {
        let key = self.prefix.name(key);
        let mut command = command(name, 8, key.len() + bytes);
        command.arg(key);
        command
    }

    /// The bytes that a command returns, if there are any.
    pub(crate) async fn bytes(&self, command: &Cmd) -> Result<Option<Bytes>, StorageError> {
        let answer = self.commands.ask(command, Mode::Repeatable).await;
        bytes_of(answer.map_err(storage_error)?)
    }

    /// Runs a script that returns whether the token held the key.
    async fn held(
        &self,
        script: &Script,
        key: &EncodedKey,
        arguments: &[&[u8]],
        mode: Mode,
    ) -> Result<Held, StorageError> {
        let key = self.prefix.name(key);
        match self.commands.run(script, &key, arguments, mode).await? {
            scripts::DONE => Ok(Held::Yes),
            scripts::NOT_HELD => Ok(Held::Lost),
            scripts::FOREIGN => Err(layout::foreign()),
            _ => Err(unexpected()),
        }
    }

    /// Sets `key` to `claim` if it does not exist, and returns the existing value otherwise. One command, or two if Redis refuses
    /// to write.
    async fn claim(
        &self,
        key: &EncodedKey,
        claim: &NewClaim,
    ) -> Result<Option<Stored>, StorageError> {
        let mut set = self.command("SET", key, 96);
        set.arg(layout::claim(claim)).arg("NX").arg("GET");
        set.arg("PX").arg(milliseconds(claim.lease));
        let found = match self.commands.ask(&set, Mode::Repeatable).await {
            // On OOM, MISCONF (its disk) and NOREPLICAS, `SET` fails before it checks existence.
            Err(refused) if refuses_writes(&refused) => {
                let get = self.command("GET", key, 0);
                let found = Box::pin(self.bytes(&get)).await?;
                Some(found.ok_or_else(|| storage_error(refused))?)
            }
            answer => bytes_of(answer.map_err(storage_error)?)?,
        };
        found.map(layout::read).transpose()
    }

    /// Waits until `count` replicas have the claim of `token`. If they do not have it in time, the claim is released.
    async fn wait_for_replicas(
        &self,
        key: &EncodedKey,
        token: Token,
        (count, timeout): Replicas,
    ) -> Result<(), StorageError> {
        let mut wait = redis::cmd("WAIT");
        wait.arg(count).arg(milliseconds(timeout));
        let failed = match self.commands.ask(&wait, Mode::Once).await {
            Ok(redis::Value::Int(reached)) if reached >= i64::from(count) => return Ok(()),
            Ok(_) => StorageError::unavailable("too few replicas have the claim"),
            Err(error) => storage_error(error),
        };
        // Where this fails too, the claim ends with its lease.
        let _ = Box::pin(self.release(key, token)).await;
        Err(failed)
    }
}

impl Storage for RedisStorage {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        // The claim of this token, or the connection, may end between the steps, so there is a second try.
        for _ in 0..2 {
            let age = self.replicas.map(|_| self.commands.age());
            if let Some(found) = self.claim(key, claim).await? {
                match found.entry {
                    Entry::Completed(record) => return Ok(Begin::Completed(record)),
                    Entry::Claimed { .. } if found.token == claim.token => {
                        // The answer to an earlier call was lost. The lease counts from now.
                        let renewed = self.renew(key, claim.token, claim.lease);
                        if Box::pin(renewed).await? == Held::Lost {
                            continue;
                        }
                    }
                    Entry::Claimed {
                        fingerprint,
                        lease_left,
                    } => {
                        return Ok(Begin::InFlight {
                            fingerprint,
                            lease_left,
                        });
                    }
                }
            }
            let Some(replicas) = self.replicas else {
                return Ok(Begin::Acquired);
            };
            Box::pin(self.wait_for_replicas(key, claim.token, replicas)).await?;
            // A new connection has written nothing, so `WAIT` on it returns at once.
            if age == Some(self.commands.age()) {
                return Ok(Begin::Acquired);
            }
        }
        Err(StorageError::unavailable(
            "the lease or the connection is over sooner than Redis answers",
        ))
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let ttl = milliseconds(ttl).to_string();
        let completed = async |script, record| {
            let value = layout::record(token, record);
            let arguments = [&token.as_bytes()[..], &value, ttl.as_bytes()];
            let completed = self.held(script, key, &arguments, Mode::Repeatable);
            completed.await
        };
        let error = match completed(&scripts::COMPLETE, record).await {
            Err(error) if error.kind() == StorageErrorKind::Full => error,
            stored => return stored,
        };
        tracing::warn!(target: "idempotency", %key, source = ?std::error::Error::source(&error), "Redis has no room for the answer: its key gets a tombstone");
        let tombstone = record.without_answer();
        Box::pin(completed(&scripts::COMPLETE_SMALL, &tombstone)).await
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let lease = milliseconds(lease).to_string();
        let arguments = [&token.as_bytes()[..], lease.as_bytes()];
        self.held(&scripts::RENEW, key, &arguments, Mode::Repeatable)
            .await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        let arguments = [&token.as_bytes()[..]];
        self.held(&scripts::RELEASE, key, &arguments, Mode::Once)
            .await
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        let get = self.command("GET", key, 0);
        let found = self.bytes(&get).await?.map(layout::read);
        Ok(found.transpose()?.map(|found| found.entry))
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let ttl = milliseconds(ttl).to_string();
        let arguments = [&record.encode()[..], ttl.as_bytes()];
        let replaced = self.held(&scripts::REPLACE, key, &arguments, Mode::Repeatable);
        // It makes no difference whether there was a record.
        let _ = replaced.await?;
        Ok(())
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        const TRIES: usize = 3;

        let name = self.prefix.name(key);
        // Kind and token: the version that compare-and-delete checks.
        let mut range = self.command("GETRANGE", key, 3);
        range.arg(0).arg(17);
        for _ in 0..TRIES {
            let seen = match self.bytes(&range).await {
                Err(error) if error.kind() == StorageErrorKind::Unreadable => {
                    scripts::NOT_BYTES.into()
                }
                seen => seen?.unwrap_or_default(),
            };
            let arguments = [&seen[..]];
            let removed = self
                .commands
                .run(&scripts::REMOVE, &name, &arguments, Mode::Repeatable);
            match removed.await? {
                scripts::DONE => return Ok(true),
                scripts::CHANGED => {}
                // Removed meanwhile, perhaps by an earlier attempt of this call.
                _ => return Ok(!seen.is_empty()),
            }
        }
        Err(StorageError::unavailable(
            "the key changes faster than it can be removed",
        ))
    }

    /// Returns when `key` has no claim, or after `timeout`. A release wakes one waiter, and soon more if the key stays free.
    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let name = &self.prefix.name(key);
        let look = async |_| {
            let look = &scripts::LEASE_LEFT;
            let left = self.commands.run(look, name, &[], Mode::ForWaiters);
            Ok(match left.await? {
                left @ 0.. => Seen::Claimed(Duration::from_millis(left.unsigned_abs())),
                scripts::FREE => Seen::Free,
                _ => Seen::Completed,
            })
        };
        self.waits.wait(name, timeout, look).await
    }
}

fn prefix() -> Prefix {
    Prefix::new(":", "RedisStorage::prefix")
}

impl fmt::Debug for RedisStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStorage")
            .field("prefix", &self.prefix)
            .field("time_limit", &self.commands.limit)
            .field("wait_replicas", &self.replicas)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{
        collections::VecDeque,
        sync::{Mutex, atomic::AtomicU64, atomic::Ordering::SeqCst},
    };

    use futures_util::future::{BoxFuture, ready};
    use redis::{Cmd, RedisResult, Value};

    use super::{reconnecting::Connection, *};

    /// Gives these answers, and counts as another connection after the command of this name.
    #[derive(Clone)]
    struct Script {
        answers: Arc<Mutex<VecDeque<Value>>>,
        asked: Arc<Mutex<Vec<String>>>,
        ends_after: &'static str,
        age: Arc<AtomicU64>,
    }

    impl Connection for Script {
        fn send<'a>(&'a self, command: &'a Cmd, _: Duration) -> BoxFuture<'a, RedisResult<Value>> {
            let name = match command.args_iter().next() {
                Some(redis::Arg::Simple(name)) => String::from_utf8_lossy(name).into_owned(),
                _ => String::new(),
            };
            if name == self.ends_after && self.age() == 1 {
                self.age.store(2, SeqCst);
            }
            self.asked.lock().unwrap().push(name);
            let answer = self.answers.lock().unwrap().pop_front().unwrap();
            Box::pin(ready(Ok(answer)))
        }

        fn age(&self) -> u64 {
            self.age.load(SeqCst)
        }
    }

    /// Another caller may have replaced the connection between claim and `WAIT`.
    #[tokio::test]
    async fn replicas_are_waited_for_over_the_connection_of_the_claim() {
        let claim = NewClaim {
            token: Token::from_bytes([7; 16]),
            fingerprint: None,
            lease: Duration::from_secs(30),
        };
        let replicas = Value::Int(1);
        let own = Value::BulkString(layout::claim(&claim));
        for (ends_after, answers, expected) in [
            ("", vec![Value::Nil, replicas.clone()], "SET WAIT"),
            (
                "SET",
                vec![
                    Value::Nil,
                    replicas.clone(),
                    own,
                    Value::Int(scripts::DONE),
                    replicas,
                ],
                "SET WAIT SET EVALSHA WAIT",
            ),
        ] {
            let script = Script {
                answers: Arc::new(Mutex::new(answers.into())),
                asked: Arc::default(),
                ends_after,
                age: Arc::new(AtomicU64::new(1)),
            };
            let commands = Commands::new(script.clone(), script.clone(), DEFAULT_LIMIT);
            let storage = RedisStorage::over(commands, NotifySource::none());
            let storage = storage.wait_replicas(1, Duration::from_millis(100));
            let key = EncodedKey::from_bytes([7; 32]);
            let begun = storage.begin(&key, &claim).await;
            assert_eq!(begun.unwrap(), Begin::Acquired);
            assert_eq!(script.asked.lock().unwrap().join(" "), expected);
        }
    }
}
