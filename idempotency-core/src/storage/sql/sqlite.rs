//! Claims and records in one SQLite file.

use std::{fmt, path::Path, str::FromStr as _, sync::Arc, time::Duration};

use sqlx::{
    Row as _, SqlitePool,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
    },
};

use self::{
    database::{Database, Statement},
    error::{SqliteStorageError, SqliteStorageErrorKind},
    holds::{Holds, Wake},
    rows::Found,
    statements::{COLUMNS, Now, Statements},
};
use super::{
    purge_timer::Purger,
    table::{InvalidTableName, TableName},
};
use crate::{
    Begin, EncodedKey, Entry, Env, Held, NewClaim, Record, Storage, StorageError, StorageErrorKind,
    Token, Transactions,
    storage::waits::{Seen, Whom},
};

mod database;
pub(crate) mod error;
mod holds;
mod rows;
mod statements;
pub(crate) mod transaction;
mod turn;

/// Keeps claims and records in one SQLite file: through restarts and crashes, for the processes of one machine. Clones share the
/// connections.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let path = std::env::temp_dir().join(format!("sqlite-storage-{}.db", std::process::id()));
/// use std::time::Duration;
/// use idempotency_core::{Begin, EncodedKey, NewClaim, SqliteStorage, Storage, Token};
///
/// let storage = SqliteStorage::open(&path).await?; // or "orders.db"
/// storage.migrate().await?;
///
/// let key = EncodedKey::from_bytes([7; 32]);
/// let claim = |token| NewClaim { token, fingerprint: None, lease: Duration::from_secs(30) };
/// assert_eq!(storage.begin(&key, &claim(Token::random())).await?, Begin::Acquired);
///
/// // A duplicate meanwhile, perhaps in another process:
/// let other = SqliteStorage::open(&path).await?;
/// assert!(matches!(other.begin(&key, &claim(Token::random())).await?, Begin::InFlight { .. }));
/// # drop((storage, other));
/// # std::fs::remove_file(path)?;
/// # Ok(())
/// # }
/// ```
#[doc = include_str!("sqlite/storage.md")]
/// ```sql
#[doc = include_str!("sqlite/schema.sql")]
/// ```
#[derive(Clone)]
#[must_use]
pub struct SqliteStorage {
    pool: SqlitePool,
    owns_pool: bool,
    database: Database,
    table: TableName,
    /// An invalid name of the table is reported by every use.
    statements: Result<Arc<Statements>, InvalidTableName>,
    holds: Arc<Holds>,
    env: Env,
    max_transaction: Duration,
    /// For a storage of settings, whose purger nobody else holds.
    _purger: Option<Arc<Purger>>,
}

impl SqliteStorage {
    /// How long a statement may take, unless [`time_limit`](Self::time_limit) says otherwise.
    const DEFAULT_LIMIT: Duration = Duration::from_secs(1);

    /// How long a transaction may be open, unless [`max_transaction`](Self::max_transaction) says otherwise.
    const DEFAULT_MAX_TRANSACTION: Duration = Duration::from_secs(5);

    /// The least limit of what is done when a program starts: other processes may start too, and a file is switched by one at a time.
    const LIMIT_AT_START: Duration = Duration::from_secs(10);

    /// How many rows a statement of [`purge_expired`](Self::purge_expired) removes. Others write in between.
    const PURGED_AT_ONCE: i64 = 100;

    /// How often a key is looked at that others change meanwhile.
    const TRIES: usize = 4;

    /// Opens the file at a path, or at a URL of sqlx (`sqlite:orders.db`). A file that does not exist is created; its directory must
    /// exist. The file is switched to a write-ahead log (`journal_mode = WAL`), which it keeps.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("sqlite-open-{}.db", std::process::id()));
    /// use idempotency_core::SqliteStorage;
    ///
    /// let storage = SqliteStorage::open(&path).await?.table("shop_idempotency");
    /// storage.migrate().await?;
    /// # drop(storage);
    /// # std::fs::remove_file(path)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If the file can't be opened or created, is no database, or can't be switched because it is read-only; if the location names no
    /// file (`:memory:`), because a database in memory is gone with its last connection.
    pub async fn open(location: impl AsRef<Path>) -> Result<Self, SqliteStorageError> {
        let options = options(location.as_ref())?
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        let pool = SqlitePoolOptions::new().connect_lazy_with(options);
        let storage = Self {
            owns_pool: true,
            ..Self::new(pool)
        };
        storage.check().await?;
        Ok(storage)
    }

    /// A storage in the file of `pool`. It makes connections of its own, with the options of the pool, so that requests which hold all
    /// connections of the pool don't delay a claim or its renewal.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("sqlite-new-{}.db", std::process::id()));
    /// use idempotency_core::{
    ///     SqliteStorage,
    ///     sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool},
    /// };
    ///
    /// let options = SqliteConnectOptions::new()
    ///     .filename(&path)
    ///     .create_if_missing(true)
    ///     .journal_mode(SqliteJournalMode::Wal);
    /// let pool = SqlitePool::connect_with(options).await?;
    /// let storage = SqliteStorage::new(pool);
    /// storage.migrate().await?;
    /// # drop(storage);
    /// # std::fs::remove_file(path)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// | option | what the storage needs |
    /// |---|---|
    /// | `journal_mode` | WAL, so that replays don't wait for writers. It is a property of the file. [`migrate`](Self::migrate) warns of another one |
    /// | `synchronous` | the storage's own connections have `FULL`, whatever the pool's have |
    /// | `busy_timeout` | the storage waits for a lock until its own [time limit](Self::time_limit) |
    /// | a file | [`migrate`](Self::migrate) refuses a database in memory |
    ///
    /// An `after_connect` of the pool is not called for the storage's connections. Nothing is opened before the first use.
    pub fn new(pool: SqlitePool) -> Self {
        let options = SqliteConnectOptions::clone(&pool.connect_options());
        let table = TableName::default();
        Self {
            pool,
            owns_pool: false,
            database: Database::new(options, Self::DEFAULT_LIMIT),
            statements: Statements::new(&table).map(Arc::new),
            table,
            holds: Arc::new(Holds::new(Env::system())),
            env: Env::system(),
            max_transaction: Self::DEFAULT_MAX_TRANSACTION,
            _purger: None,
        }
    }

    /// The table of the claims and records. Default: `idempotency`.
    ///
    /// A name has 1 to 48 lower-case letters, digits and underscores, and begins with no digit. Any other name is an error of
    /// [`migrate`](Self::migrate) and of each call, with [`InvalidTableName`] as its source. Storages of different tables share nothing.
    pub fn table(mut self, name: impl AsRef<str>) -> Self {
        self.table = TableName::new(name.as_ref());
        self.statements = Statements::new(&self.table).map(Arc::new);
        self.holds = Arc::new(Holds::new(self.env.clone()));
        self
    }

    /// How long a call waits for the write lock and for its turn. Then it fails with [`StorageErrorKind::Timeout`]. Default: 1 s.
    ///
    /// The engine has a limit of its own, [`Config::storage_timeout`](crate::Config::storage_timeout): the shorter one counts.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.database.limit = limit;
        self
    }

    /// How long a transaction of an operation may be open; then it is rolled back. Default: 5 s.
    ///
    /// Nobody else writes to the file meanwhile: no other claim is made or renewed. So it has to be well below the leases,
    /// [`LockPolicy::ttl`](crate::LockPolicy::ttl).
    pub fn max_transaction(mut self, limit: Duration) -> Self {
        self.max_transaction = limit;
        self
    }

    /// Where waiters' sleeps come from. Default: [`Env::system`].
    ///
    /// If its time is not the wall clock's (`Env::simulated`), leases and TTLs follow it too, and all storages of the file need the same
    /// one.
    pub fn env(mut self, env: Env) -> Self {
        self.holds = Arc::new(Holds::new(env.clone()));
        self.env = env;
        self
    }

    /// The pool that was given, or that [`open`](Self::open) made, for other tables in the same file.
    #[must_use]
    pub fn pool(&self) -> &SqlitePool {
        &self.pool
    }

    /// Makes the table if it does not exist, and checks that it can be written. Any number of processes may call it at once, and each time they start.
    ///
    /// It has no other effect, and never touches `_sqlx_migrations`. To make the table by a migration of your own, take the [schema
    /// below](Self#schema).
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open); if a table of this name has other columns; and if the lock is not free within 10 s, or the [time
    /// limit](Self::time_limit) if that is longer.
    pub async fn migrate(&self) -> Result<(), SqliteStorageError> {
        let statements = self.statements()?;
        self.check().await?;
        let database = self.at_start();
        let [table, index] = statements.schema();
        database.write(table).await?;
        let rows = database.read(statements.columns()).await?;
        let names: Vec<&str> = rows.iter().filter_map(|row| row.try_get(0).ok()).collect();
        if !COLUMNS.iter().all(|column| names.contains(column)) {
            return Err(SqliteStorageError::new(
                SqliteStorageErrorKind::ForeignTable,
            ));
        }
        database.write(index).await?;
        // A file that this process may only read would look fine until the first claim.
        database.write(statements.probe()).await?;
        Ok(())
    }

    /// Removes expired claims and records, and returns how many those were.
    ///
    /// An expired row counts as absent, so this only gives their room back: new rows take it, and the file keeps its size. It removes
    /// 100 rows at a time, and claims go on in between.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("sqlite-purge-{}.db", std::process::id()));
    /// # let storage = idempotency_core::SqliteStorage::open(&path).await?;
    /// storage.migrate().await?;
    /// assert_eq!(storage.purge_expired().await?, 0);
    /// # drop(storage);
    /// # std::fs::remove_file(path)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If SQLite fails. What was removed stays removed.
    pub async fn purge_expired(&self) -> Result<u64, StorageError> {
        let statements = self.statements()?;
        let mut purged = 0;
        loop {
            let statement = statements.purge(self.now(), Self::PURGED_AT_ONCE);
            let rows = self.answered(self.database.write(statement).await).await?;
            purged += rows.len() as u64;
            if (rows.len() as u64) < Self::PURGED_AT_ONCE.unsigned_abs() {
                return Ok(purged);
            }
        }
    }

    /// Calls [`purge_expired`](Self::purge_expired) in the background about every `period`, until the handle is stopped or dropped.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("sqlite-purger-{}.db", std::process::id()));
    /// use std::time::Duration;
    /// # let storage = idempotency_core::SqliteStorage::open(&path).await?;
    ///
    /// storage.migrate().await?;
    /// let purger = storage.purge_every(Duration::from_secs(600));
    /// // … serve …
    /// purger.stop().await;
    /// # drop(storage);
    /// # std::fs::remove_file(path)?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn purge_every(&self, period: Duration) -> Purger {
        let storage = self.clone();
        Purger::start(self.env.clone(), period, move || {
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

    /// Closes the connections of the storage and of its clones, and the pool if [`open`](Self::open) made it: once the statements that
    /// are queued are done and the open transaction has ended. The write-ahead log is then gone, unless somebody else has the file open.
    /// Every call after it fails.
    ///
    /// It is not needed: what was answered is on the disk. It leaves one file, to be copied or moved. Stop what serves requests first,
    /// [`Engine::drain`](crate::Engine::drain), and close a pool of your own.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("sqlite-close-{}.db", std::process::id()));
    /// # let storage = idempotency_core::SqliteStorage::open(&path).await?;
    /// storage.migrate().await?;
    /// // … serve, and drain …
    /// storage.close().await?;
    /// # std::fs::remove_file(path)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If a transaction, or a connection of that pool, is not given back within [`max_transaction`](Self::max_transaction) and the [time
    /// limit](Self::time_limit). If the log can't be written into the file; nothing is lost then.
    pub async fn close(&self) -> Result<(), SqliteStorageError> {
        let limit = self.max_transaction.saturating_add(self.database.limit);
        if self.owns_pool {
            let closing = async {
                self.pool.close().await;
                // A connection that came back last is left over by the first call (sqlx 0.8.6).
                self.pool.close().await;
            };
            let closed = Env::system().within(limit, closing).await;
            closed.ok_or_else(|| SqliteStorageError::new(SqliteStorageErrorKind::Busy))?;
        }
        self.database.close(limit).await
    }

    /// Whether the database is a file, and keeps a write-ahead log.
    async fn check(&self) -> Result<(), SqliteStorageError> {
        let database = self.at_start();
        let file = "SELECT file FROM pragma_database_list WHERE name = 'main'";
        let rows = database.write(Statement::new(file)).await?;
        if first::<String>(&rows).is_none_or(|file| file.is_empty()) {
            return Err(SqliteStorageError::new(SqliteStorageErrorKind::InMemory));
        }
        let mode = Statement::new("PRAGMA journal_mode");
        let rows = database.write(mode).await?;
        let mode: String = first(&rows).unwrap_or_default();
        if !mode.eq_ignore_ascii_case("wal") {
            tracing::warn!(
                target: "idempotency",
                mode,
                "the SQLite file has no write-ahead log, so replays wait for writers: set `journal_mode = WAL`"
            );
        }
        Ok(())
    }

    /// The database, with a longer limit.
    fn at_start(&self) -> Database {
        let mut database = self.database.clone();
        database.limit = database.limit.max(Self::LIMIT_AT_START);
        database
    }

    fn statements(&self) -> Result<&Statements, InvalidTableName> {
        match &self.statements {
            Ok(statements) => Ok(statements),
            Err(invalid) => Err(invalid.clone()),
        }
    }

    /// The time for a statement.
    fn now(&self) -> Now {
        let now = (!self.env.is_real_time()).then(|| self.env.now());
        now.map(|now| i64::try_from(now.as_millis()).unwrap_or(i64::MAX))
    }

    /// What lies under a key and has not expired.
    async fn look(&self, key: &EncodedKey) -> Result<Option<Found>, StorageError> {
        let statement = self.statements()?.look(self.now(), key);
        let rows = self.answered(self.database.read(statement).await).await?;
        rows.first().map(|row| rows::read(key, row)).transpose()
    }

    /// Runs a statement that ends a claim, if it returns a row.
    async fn end(
        &self,
        key: &EncodedKey,
        statement: Statement,
        whom: Whom,
    ) -> Result<Vec<SqliteRow>, StorageError> {
        let wake = Wake {
            holds: self.holds.clone(),
            key: *key,
            whom,
        };
        let rows = self.database.write_and_wake(statement, wake).await;
        self.answered(rows).await
    }

    async fn complete_with(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let statement = self
            .statements()?
            .complete(self.now(), key, token, record, ttl);
        Ok(held(&self.end(key, statement, Whom::All).await?))
    }

    /// The rows of a statement. An error of SQLite says so if the table is missing, for which SQLite has no code.
    async fn answered(
        &self,
        answer: Result<Vec<SqliteRow>, SqliteStorageError>,
    ) -> Result<Vec<SqliteRow>, StorageError> {
        match answer {
            Ok(rows) => Ok(rows),
            Err(error) => Err(self.explained(error).await),
        }
    }

    async fn explained(&self, mut error: SqliteStorageError) -> StorageError {
        if error.kind() == SqliteStorageErrorKind::Other
            && let Ok(statements) = self.statements()
        {
            let columns = self.database.read(statements.columns()).await;
            if columns.is_ok_and(|columns| columns.is_empty()) {
                error = error.with_kind(SqliteStorageErrorKind::NotMigrated);
            }
        }
        error.into()
    }
}

/// The options for a path, or for a URL.
fn options(location: &Path) -> Result<SqliteConnectOptions, SqliteStorageError> {
    match location.to_str() {
        Some(":memory:") => Err(SqliteStorageError::new(SqliteStorageErrorKind::InMemory)),
        Some(url) if url.starts_with("sqlite:") => {
            SqliteConnectOptions::from_str(url).map_err(SqliteStorageError::of)
        }
        _ => Ok(SqliteConnectOptions::new().filename(location)),
    }
}

fn first<T>(rows: &[SqliteRow]) -> Option<T>
where
    T: for<'r> sqlx::Decode<'r, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
{
    rows.first()?.try_get(0).ok()
}

fn held(rows: &[SqliteRow]) -> Held {
    match rows {
        [] => Held::Lost,
        _ => Held::Yes,
    }
}

impl Storage for SqliteStorage {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        for _ in 0..Self::TRIES {
            // Read first: a replay needs no lock, and is possible where nothing can be written.
            if let Some(Found { token, entry }) = self.look(key).await? {
                match entry {
                    Entry::Completed(record) => return Ok(Begin::Completed(record)),
                    Entry::Claimed {
                        fingerprint,
                        lease_left,
                    } if token != claim.token => {
                        return Ok(Begin::InFlight {
                            fingerprint,
                            lease_left,
                        });
                    }
                    // An earlier call to which the answer was lost. The lease counts from now.
                    Entry::Claimed { .. } => {}
                }
            }
            // The row of an open transaction is not seen.
            if let Some(fingerprint) = self.holds.holder(key) {
                return Ok(Begin::InFlight {
                    fingerprint,
                    lease_left: None,
                });
            }
            let statement = self.statements()?.claim(self.now(), key, claim);
            let rows = self.answered(self.database.write(statement).await).await?;
            if held(&rows) == Held::Yes {
                return Ok(Begin::Acquired);
            }
        }
        Err(StorageError::unavailable(
            "the key changes faster than it can be claimed",
        ))
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let mut stored = self.complete_with(key, token, record, ttl).await;
        if let Err(error) = &stored
            && error.kind() == StorageErrorKind::Full
        {
            tracing::warn!(target: "idempotency", %key, source = ?std::error::Error::source(error), "SQLite has no room for the answer: its key gets a tombstone");
            let tombstone = record.without_answer();
            stored = self.complete_with(key, token, &tombstone, ttl).await;
        }
        if matches!(stored, Ok(Held::Lost)) {
            // Another's, unless it can't be read.
            self.look(key).await?;
        }
        stored
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let statement = self.statements()?.renew(self.now(), key, token, lease);
        let rows = self.answered(self.database.write(statement).await).await?;
        Ok(held(&rows))
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        let statement = self.statements()?.release(key, token);
        Ok(held(&self.end(key, statement, Whom::One).await?))
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        let found = self.look(key).await?;
        Ok(found.map(|found| found.entry))
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let statement = self.statements()?.replace(self.now(), key, record, ttl);
        let rows = self.answered(self.database.write(statement).await).await?;
        if rows.is_empty() {
            // Nothing or a claim, unless it can't be read.
            self.look(key).await?;
        }
        Ok(())
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let statement = self.statements()?.remove(self.now(), key);
        let rows = self.end(key, statement, Whom::All).await?;
        Ok(first(&rows).unwrap_or(false))
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let look = async |_| {
            if self.holds.holder(key).is_some() {
                return Ok(Seen::Unnotified);
            }
            Ok(match self.look(key).await?.map(|found| found.entry) {
                None => Seen::Free,
                Some(Entry::Completed(_)) => Seen::Completed,
                Some(Entry::Claimed { lease_left, .. }) => match lease_left.unwrap_or_default() {
                    // At a recovery point: free for a retry.
                    Duration::ZERO => Seen::Free,
                    left => Seen::Claimed(left),
                },
            })
        };
        let waits = &self.holds.waits;
        waits.wait(&key.to_string(), timeout, look).await
    }

    fn transactions(&self) -> Option<Arc<dyn Transactions>> {
        Some(Arc::new(self.clone()))
    }
}

impl fmt::Debug for SqliteStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStorage")
            .field("table", &format_args!("{}", self.table))
            .field("time_limit", &self.database.limit)
            .finish_non_exhaustive()
    }
}
