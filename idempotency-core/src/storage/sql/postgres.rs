//! Claims and records in PostgreSQL, for any number of processes.

use std::{fmt, sync::Arc, time::Duration};

use sqlx::PgPool;

use self::{
    connect::PostgresConnect,
    link::{Link, Protocol, Value},
    notifications::Notifications,
    statements::Statements,
    transaction::{IsolationLevel, TransactionOptions},
};
use super::{purge_timer::Purger, table::TableName};
use crate::{
    Begin, EncodedKey, Entry, Fingerprint, Held, NewClaim, Record, Storage, StorageError,
    StorageErrorKind, Token, Transactions,
    storage::waits::{POLLED, Waits},
};

pub(crate) mod connect;
mod error;
mod link;
mod notifications;
mod row;
mod statements;
pub(crate) mod transaction;

/// How many rows a purge removes in one transaction. A `begin` of one of these keys waits for that transaction.
const BATCH: i64 = 500;

/// How long a batch may take, and a migration: a busy disk takes its time, and nobody waits for them.
const LONG_LIMIT: Duration = Duration::from_secs(60);

/// How often `begin` looks again at a row that was committed while it looked.
const LOOKS: u32 = 16;

/// Keeps claims and records in a table of PostgreSQL 12 or newer: any number of processes, one execution. Clones share the connections.
///
/// ```no_run
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use idempotency_core::PostgresStorage;
///
/// let storage = PostgresStorage::connect("postgres://shop:password@db/shop")
///     .table("shop_idempotency")
///     .await?;
/// storage.migrate().await?;
/// # Ok(())
/// # }
/// ```
#[doc = include_str!("postgres/storage.md")]
#[derive(Clone)]
#[must_use]
pub struct PostgresStorage {
    link: Link,
    table: TableName,
    waits: Arc<Waits>,
    transactions: TransactionOptions,
    /// For a storage of settings, whose purger nobody else holds.
    _purger: Option<Arc<Purger>>,
}

impl PostgresStorage {
    /// The table as SQL, with its default name and index: what [`migrate`](Self::migrate) makes, for migrations of your own.
    ///
    /// ```
    /// use idempotency_core::PostgresStorage;
    ///
    /// assert!(PostgresStorage::SCHEMA.contains("CREATE TABLE IF NOT EXISTS \"idempotency\" ("));
    /// ```
    pub const SCHEMA: &str = include_str!("postgres/schema.sql");

    const DEFAULT_LIMIT: Duration = Duration::from_secs(5);

    /// Connects to the database at `url`, as [`sqlx`](crate::sqlx::postgres::PgConnectOptions) and `libpq` read it.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), idempotency_core::PostgresConnectError> {
    /// use std::time::Duration;
    /// use idempotency_core::PostgresStorage;
    ///
    /// let storage = PostgresStorage::connect("postgres://shop@db/shop?sslmode=verify-full")
    ///     .table("shop_idempotency")
    ///     .max_connections(20)
    ///     .time_limit(Duration::from_secs(2))
    ///     .await?;
    /// # let _ = storage;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// All [options](PostgresConnect) can be set before it is awaited. Refused are a version older than PostgreSQL 12, a server that
    /// takes no writes, and a proxy that pools transactions unless
    /// [`transaction_pooling`](PostgresConnect::transaction_pooling) is said. A server that may lose what it confirmed
    /// (`synchronous_commit` or `fsync` is off) is warned of in the log.
    ///
    /// # Errors
    ///
    /// [`PostgresConnectError`](crate::PostgresConnectError), when it is awaited.
    pub fn connect(url: impl AsRef<str>) -> PostgresConnect {
        PostgresConnect::new(url.as_ref())
    }

    /// A storage on `pool`, in the table `idempotency`. Nothing is checked.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), idempotency_core::sqlx::Error> {
    /// use idempotency_core::{PostgresStorage, sqlx::PgPool};
    ///
    /// let pool = PgPool::connect("postgres://shop@db/shop").await?;
    /// let storage = PostgresStorage::new(pool.clone());
    /// # let _ = storage;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A statement waits for a free connection of `pool`, [`time_limit`](Self::time_limit) at most: handlers that hold a connection
    /// each can starve the storage. Give it a pool of its own, or one that is larger than the number of running handlers.
    pub fn new(pool: PgPool) -> Self {
        Self::with(pool, TableName::default(), Self::DEFAULT_LIMIT)
    }

    fn with(pool: PgPool, table: TableName, limit: Duration) -> Self {
        let link = Link::new(pool, Statements::new(&table), limit);
        Self::over(link, table)
    }

    fn over(link: Link, table: TableName) -> Self {
        Self {
            waits: waits(&link),
            link,
            table,
            transactions: TransactionOptions::default(),
            _purger: None,
        }
    }

    fn relinked(self, link: Link) -> Self {
        Self {
            waits: waits(&link),
            link,
            ..self
        }
    }

    /// The pool that was given, or that [`connect`](Self::connect) made, for other tables in the same database.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        self.link.main_pool()
    }

    /// The table. Default: `idempotency`.
    ///
    /// A name has 1 to 48 lower-case letters, digits and underscores, no digit first; the name of a schema and a dot may precede it.
    /// With another name every call fails, with [`InvalidTableName`](crate::InvalidTableName) as the source of its error.
    ///
    /// Storages of different tables share nothing. Two services that share a database need different ones: with the same table a key
    /// that a client sent to one may be answered by the other.
    pub fn table(self, name: impl AsRef<str>) -> Self {
        let table = TableName::new(name.as_ref());
        let link = Link {
            statements: Arc::new(Statements::new(&table)),
            ..self.link.clone()
        };
        Self {
            table,
            ..self.relinked(link)
        }
    }

    /// How long a statement may take, with the wait for a connection and its repetitions; then it fails with
    /// [`StorageErrorKind::Timeout`]. Default: 5 s.
    ///
    /// The engine has a limit of its own, [`Config::storage_timeout`](crate::Config::storage_timeout): the shorter one counts.
    pub fn time_limit(self, limit: Duration) -> Self {
        let link = Link {
            limit,
            ..self.link.clone()
        };
        self.relinked(link)
    }

    /// Works through a proxy that gives each transaction to another connection of the server, as PgBouncer does with
    /// `pool_mode = transaction`. Default: not.
    ///
    /// Then no statement is prepared: each is one message with its values in it. A record is sent in hexadecimal digits, which are twice
    /// as long. Such a proxy passes no notifications on, so who waits looks at the key, first after 20 ms, at last every 500 ms.
    pub fn transaction_pooling(self) -> Self {
        let link = Link {
            protocol: Protocol::Simple,
            ..self.link.clone()
        };
        self.relinked(link)
    }

    /// How long a [transaction](crate::KeyTransaction) may be open, from its first statement to its commit or to the end of a phase.
    /// Then its operation is dropped and it is rolled back. Default: 30 s.
    ///
    /// The server is told too, so that a process which falls silent does not hold its key for ever: by `transaction_timeout` from version
    /// 17 on; before, by `statement_timeout` (a stricter one stays) and `idle_in_transaction_session_timeout`, which counts from its last
    /// statement. Zero counts as 1 ms.
    pub fn max_transaction(mut self, limit: Duration) -> Self {
        self.transactions.max_duration = limit.max(Duration::from_millis(1));
        self
    }

    /// The isolation level of [transactions](crate::KeyTransaction). Default: the server's, `READ COMMITTED` unless it is configured.
    pub fn isolation(mut self, level: IsolationLevel) -> Self {
        self.transactions.isolation = Some(level);
        self
    }

    /// Makes the table if it is not there. Several processes may do so at once: they wait for each other at an advisory lock.
    ///
    /// The user needs the right to create tables in the schema; where the table exists already, none. The SQL is
    /// [`SCHEMA`](Self::SCHEMA) with the name of the table. No other table is touched, so it goes along with `sqlx::migrate!`.
    ///
    /// # Errors
    ///
    /// If the server refuses it, or a table of this name exists and has not the columns of this version.
    pub async fn migrate(&self) -> Result<(), StorageError> {
        let statements = self.link.statements()?;
        let limit = self.link.limit.max(LONG_LIMIT);
        let exists = self.link.run_within(limit, &statements.exists, &[]).await?;
        let exists: bool = match exists.first() {
            Some(row) => sqlx::Row::try_get(row, 0).map_err(error::decoding)?,
            None => false,
        };
        if !exists {
            self.link.run_script(limit, &statements.create).await?;
        }
        self.link
            .run_within(limit, &statements.columns, &[])
            .await?;
        Ok(())
    }

    /// Removes what has expired, and returns how many claims and records that were.
    ///
    /// Expired rows count as absent whether they are removed or not; removing them gives their room back. Each 500 are a transaction
    /// of their own, and a row that somebody uses at the moment is left to the next purge, so no `begin` waits for long. Several
    /// processes may purge at once.
    ///
    /// # Errors
    ///
    /// If the storage fails. What was removed before is removed.
    pub async fn purge_expired(&self) -> Result<u64, StorageError> {
        let statements = self.link.statements()?;
        let limit = self.link.limit.max(LONG_LIMIT);
        let mut purged = 0;
        loop {
            let values = [Value::Number(BATCH)];
            let rows = self
                .link
                .run_within(limit, &statements.purge, &values)
                .await?;
            let batch: i64 = match rows.first() {
                Some(row) => sqlx::Row::try_get(row, 0).map_err(error::decoding)?,
                None => 0,
            };
            purged += batch.unsigned_abs();
            if batch < BATCH {
                return Ok(purged);
            }
        }
    }

    /// [Purges](Self::purge_expired) about every `period`, in the background, until the handle is stopped or dropped.
    ///
    /// ```no_run
    /// # async fn example(storage: idempotency_core::PostgresStorage) {
    /// use std::time::Duration;
    ///
    /// let purger = storage.purge_every(Duration::from_secs(600));
    /// # purger.stop().await;
    /// # }
    /// ```
    pub fn purge_every(&self, period: Duration) -> Purger {
        let storage = self.clone();
        Purger::start(self.link.env.clone(), period, move || {
            let storage = storage.clone();
            async move { storage.purge_expired().await }
        })
    }

    /// Purges about every `period` for as long as a clone of the result exists.
    #[cfg(feature = "settings")]
    pub(crate) fn purging(self, period: Duration) -> Self {
        let purger = self.purge_every(period);
        Self {
            _purger: Some(Arc::new(purger)),
            ..self
        }
    }

    /// Sends a statement that changes the row that it returns, if there is one to change.
    async fn held(&self, statement: &str, values: &[Value<'_>]) -> Result<Held, StorageError> {
        let rows = self.link.run(statement, values).await?;
        Ok(match rows.is_empty() {
            true => Held::Lost,
            false => Held::Yes,
        })
    }

    async fn store(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let values = [
            Value::Bytes(key.as_bytes()),
            Value::Bytes(token.as_bytes()),
            Value::Bytes(&record.encode()),
            Value::Number(row::record_checksum(key, token)),
            Value::Interval(ttl),
        ];
        self.held(&self.link.statements()?.complete, &values).await
    }
}

fn waits(link: &Link) -> Arc<Waits> {
    // A proxy that pools transactions passes no notifications on.
    let source =
        (link.protocol == Protocol::Prepared).then(|| Box::new(Notifications(link.clone())) as _);
    Arc::new(Waits::new(link.env.clone(), POLLED, source))
}

impl Storage for PostgresStorage {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        let statements = self.link.statements()?;
        let fingerprint = claim.fingerprint.as_ref().map(Fingerprint::as_bytes);
        let values = [
            Value::Bytes(key.as_bytes()),
            Value::Bytes(claim.token.as_bytes()),
            Value::NullableBytes(fingerprint.map(|bytes| &bytes[..])),
            Value::Number(row::new_claim_checksum(key, claim)),
            Value::Interval(claim.lease),
        ];
        for tries in 1..=LOOKS {
            let rows = self.link.run(&statements.begin, &values).await?;
            if let Some(found) = rows.first() {
                if row::column(found, "taken")? {
                    return Ok(Begin::Acquired);
                }
                // An open transaction holds the key. What it was asked can't be seen.
                if row::column(found, "busy")? {
                    return Ok(Begin::InFlight {
                        fingerprint: None,
                        lease_left: None,
                    });
                }
                return Ok(match row::read(key, found)? {
                    Entry::Completed(record) => Begin::Completed(record),
                    Entry::Claimed {
                        fingerprint,
                        lease_left,
                    } => Begin::InFlight {
                        fingerprint,
                        lease_left,
                    },
                });
            }
            // The statement saw nothing, and then waited for somebody who committed a row. The next one sees that row.
            if tries > 1 {
                self.link.env.sleep(self.link.pause(tries)).await;
            }
        }
        Err(StorageError::unavailable(
            "others claim and release the key faster than PostgreSQL answers",
        ))
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let error = match self.store(key, token, record, ttl).await {
            Err(error) if error.kind() == StorageErrorKind::Full => error,
            stored => return stored,
        };
        tracing::warn!(target: "idempotency", %key, source = ?std::error::Error::source(&error), "PostgreSQL has no room for the answer: its key gets a tombstone");
        self.store(key, token, &record.without_answer(), ttl).await
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let values = [
            Value::Bytes(key.as_bytes()),
            Value::Bytes(token.as_bytes()),
            Value::Interval(lease),
        ];
        self.held(&self.link.statements()?.renew, &values).await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        let values = [Value::Bytes(key.as_bytes()), Value::Bytes(token.as_bytes())];
        self.held(&self.link.statements()?.release, &values).await
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        let values = [Value::Bytes(key.as_bytes())];
        let rows = self.link.run(&self.link.statements()?.get, &values).await?;
        rows.first().map(|found| row::read(key, found)).transpose()
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let values = [
            Value::Bytes(key.as_bytes()),
            Value::Bytes(&record.encode()),
            Value::Interval(ttl),
        ];
        let statement = &self.link.statements()?.replace;
        let rows = self.link.run(statement, &values).await?;
        let Some(replaced) = rows.first() else {
            return Ok(());
        };
        let token: Vec<u8> = row::column(replaced, "token")?;
        let token = token
            .try_into()
            .map_or(Token::from_bytes([0; 16]), Token::from_bytes);
        row::verify_record(key, token, row::column(replaced, "checksum")?)
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let values = [Value::Bytes(key.as_bytes())];
        let statement = &self.link.statements()?.remove;
        let rows = self.link.run(statement, &values).await?;
        let lives = rows.first().map(|removed| row::column(removed, "lives"));
        lives.unwrap_or(Ok(false))
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let look = |is_notified| notifications::look(&self.link, key, is_notified);
        self.waits.wait(&key.to_string(), timeout, look).await
    }

    fn transactions(&self) -> Option<Arc<dyn Transactions>> {
        Some(Arc::new(self.clone()))
    }
}

impl fmt::Debug for PostgresStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresStorage")
            .field("table", &format_args!("{}", self.table))
            .field("time_limit", &self.link.limit)
            .field(
                "transaction_pooling",
                &(self.link.protocol == Protocol::Simple),
            )
            .finish_non_exhaustive()
    }
}
