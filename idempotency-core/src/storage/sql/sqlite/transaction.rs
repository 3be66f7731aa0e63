//! [`Transactions`] of SQLite.
//!
//! A transaction begins with the write lock (`BEGIN IMMEDIATE`), and has a connection of its own. It inserts the row of its key first and
//! then makes a savepoint, so what the operation writes can be undone by itself. A savepoint ends with its transaction: if it is gone at
//! the commit, the operation has ended the transaction itself.
//!
//! Nobody else can write meanwhile, so there is nothing that a transaction could meet. A statement that fails is undone by itself and
//! aborts nothing.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    time::Duration,
};

use futures_util::future::BoxFuture;
use sqlx::{Row as _, Sqlite, SqliteConnection, TransactionManager, sqlite::SqliteRow};

use super::{
    SqliteStorage,
    database::{self, Patience, Statement},
    error::{self, SqliteStorageError, SqliteStorageErrorKind},
    holds::Hold,
    rows,
    turn::{Manager, Turn, Writer},
};
use crate::{
    BeginTransaction, Committed, EncodedKey, Entry, Env, InvalidTableName, NewTransaction,
    PhaseError, Record, RolledBack, StorageError, Transaction, TransactionDatabase, Transactions,
    Writes, storage::waits::Whom,
};

impl TransactionDatabase for Sqlite {
    const NAME: &'static str = <Sqlite as sqlx::Database>::NAME;
    type Connection = SqliteConnection;
    type Transaction = SqliteTransaction;
}

/// A transaction of a [`SqliteStorage`] that holds a key, and the write lock of the file.
///
/// Its `begin` makes a savepoint. Dropped before its end, it is rolled back, and its connection is closed.
pub struct SqliteTransaction {
    storage: SqliteStorage,
    key: EncodedKey,
    claim: NewTransaction,
    number: i64,
    point: Option<String>,
    /// A phase was committed, so the key has a claim of this token unless the record takes its place.
    has_claim: bool,
    /// A phase could not be ended or begun, so nothing is written any more.
    is_read_only: bool,
    /// There is one until this ends.
    writer: Option<Writer>,
    /// While it is open.
    held: Option<Held>,
}

/// What an open transaction keeps others from. The turn passes on last.
struct Held {
    hold: Hold,
    turn: Turn,
}

impl Transactions for SqliteStorage {
    fn database(&self) -> &'static str {
        <Sqlite as TransactionDatabase>::NAME
    }

    fn max_duration(&self) -> Duration {
        self.max_transaction
    }

    fn max_open(&self) -> usize {
        1
    }

    fn delays_renewals(&self) -> bool {
        true
    }

    fn begin<'a>(
        &'a self,
        key: &'a EncodedKey,
        claim: &'a NewTransaction,
    ) -> BoxFuture<'a, Result<BeginTransaction, StorageError>> {
        Box::pin(self.begin_transaction(key, claim))
    }
}

impl SqliteStorage {
    async fn begin_transaction(
        &self,
        key: &EncodedKey,
        claim: &NewTransaction,
    ) -> Result<BeginTransaction, StorageError> {
        let statement = self.statements()?.enter(self.now(), key, claim);
        let mut patience = self.patience();
        if let Some(fingerprint) = self.holds.holder(key) {
            return Ok(BeginTransaction::InFlight { fingerprint });
        }
        // Read first: a replay waits for no writer.
        match self.look(key).await?.map(|found| found.entry) {
            Some(Entry::Completed(record)) => return Ok(BeginTransaction::Completed(record)),
            Some(Entry::Claimed {
                fingerprint,
                lease_left,
            }) if lease_left != Some(Duration::ZERO) || fingerprint != claim.fingerprint => {
                return Ok(BeginTransaction::InFlight { fingerprint });
            }
            _ => {}
        }
        let mut turn = self.turn(&patience).await?;
        let writer = loop {
            match self.database.turns.writer(&mut turn).await {
                Ok(writer) => break writer,
                Err(busy) if error::is_busy(&busy) && patience.pause().await => {}
                Err(error) => return self.failed(error).await,
            }
        };
        // Dropped on the way, it is rolled back.
        let mut transaction = SqliteTransaction {
            storage: self.clone(),
            key: *key,
            claim: claim.clone(),
            number: self.database.turns.number(),
            point: None,
            has_claim: false,
            is_read_only: false,
            writer: Some(writer),
            held: Some(Held {
                hold: Hold::new(&self.holds, key, claim.fingerprint),
                turn,
            }),
        };
        match transaction.open(&mut patience, statement).await {
            Ok(rows) if rows.is_empty() => {
                let found = transaction.look().await;
                transaction.undo().await;
                found
            }
            Ok(rows) => {
                transaction.point = rows.first().and_then(|row| row.try_get(0).ok()?);
                Ok(BeginTransaction::Acquired(Box::new(transaction)))
            }
            Err(error) => {
                transaction.undo().await;
                self.failed(error).await
            }
        }
    }

    /// How long a transaction waits to be opened.
    fn patience(&self) -> Patience {
        Patience::new(Env::system().now(), self.database.limit)
    }

    async fn turn(&self, patience: &Patience) -> Result<Turn, SqliteStorageError> {
        let turn = self.database.turns.next();
        // By the real time, as the limit of every statement.
        let turn = Env::system().within(patience.time_left(), turn).await;
        match self.database.turns.is_closed() {
            true => Err(database::closed()),
            false => turn.ok_or_else(|| SqliteStorageError::new(SqliteStorageErrorKind::Busy)),
        }
    }

    async fn failed<T>(&self, error: sqlx::Error) -> Result<T, StorageError> {
        let error = SqliteStorageError::of(error);
        Err(self.explained(error).await)
    }
}

impl SqliteTransaction {
    /// Takes the write lock and runs `statement`. If that returns a row, everything from here on can be undone by itself.
    async fn open(
        &mut self,
        patience: &mut Patience,
        statement: Statement,
    ) -> Result<Vec<SqliteRow>, sqlx::Error> {
        let writer = self.exclusive();
        // By the driver's own count of transactions, a `begin` in this one is a savepoint.
        while let Err(error) =
            Manager::begin(&mut writer.connection, Some("BEGIN IMMEDIATE".into())).await
        {
            // Another process writes.
            if !error::is_busy(&error) || !patience.pause().await {
                return Err(error);
            }
        }
        let rows = self.fetch(&statement).await?;
        if !rows.is_empty() {
            self.exclusive().run("SAVEPOINT idempotency").await?;
        }
        Ok(rows)
    }

    /// What is under a key that could not be taken.
    async fn look(&mut self) -> Result<BeginTransaction, StorageError> {
        let storage = &self.storage;
        let statement = storage.statements()?.look(storage.now(), &self.key);
        let rows = match self.fetch(&statement).await {
            Ok(rows) => rows,
            Err(error) => return self.storage.failed(error).await,
        };
        // Without a row, it has expired just now.
        let found = rows.first().map(|row| rows::read(&self.key, row));
        Ok(match found.transpose()?.map(|found| found.entry) {
            Some(Entry::Completed(record)) => BeginTransaction::Completed(record),
            Some(Entry::Claimed { fingerprint, .. }) => BeginTransaction::InFlight { fingerprint },
            None => BeginTransaction::InFlight { fingerprint: None },
        })
    }

    /// Runs a statement to its end.
    async fn fetch(&mut self, statement: &Statement) -> Result<Vec<SqliteRow>, sqlx::Error> {
        let connection = &mut self.exclusive().connection;
        statement.query().fetch_all(connection).await
    }

    /// Ends the savepoint. `false` if there is none: the operation has ended the transaction itself.
    async fn leave_savepoint(&mut self, writes: Writes) -> Result<bool, sqlx::Error> {
        let writer = self.exclusive();
        // Those that the operation has made by the driver lie within.
        while writer.depth() > 1 {
            let connection = &mut writer.connection;
            let left = match writes {
                Writes::Keep => Manager::commit(connection).await,
                Writes::Undo => Manager::rollback(connection).await,
            };
            if !is_there(left)? {
                return Ok(false);
            }
        }
        if writes == Writes::Undo && !is_there(writer.run("ROLLBACK TO idempotency").await)? {
            return Ok(false);
        }
        is_there(writer.run("RELEASE idempotency").await)
    }

    /// Writes the record. `false` if the row of this transaction is gone.
    async fn record(
        &mut self,
        record: &Record,
        ttl: Duration,
        writes: Writes,
    ) -> Result<bool, sqlx::Error> {
        if !self.leave_savepoint(writes).await? {
            return Ok(false);
        }
        let (storage, token) = (&self.storage, self.claim.token);
        let Ok(statements) = storage.statements() else {
            return Ok(false);
        };
        let statement = statements.record(storage.now(), &self.key, token, record, ttl);
        Ok(!self.fetch(&statement).await?.is_empty())
    }

    async fn record_and_commit(
        mut self,
        record: Record,
        ttl: Duration,
        writes: Writes,
    ) -> Committed {
        if self.is_read_only {
            self.roll_back_and_release().await;
            return Committed::Failed(StorageError::unavailable(PhaseError::Lost));
        }
        match self.record(&record, ttl, writes).await {
            Ok(true) => {}
            Ok(false) => {
                self.close().await;
                return Committed::EndedByHand;
            }
            Err(error) => {
                self.roll_back_and_release().await;
                return not_committed(error);
            }
        }
        match self.commit_open().await {
            Ok(()) => {
                self.wakes(Whom::All);
                self.end().await;
                Committed::Yes
            }
            Err(error) if error.as_database_error().is_some() => {
                // SQLite says so: it is not committed.
                self.roll_back_and_release().await;
                not_committed(error)
            }
            Err(error) => {
                // The thread of the connection is gone. The file tells.
                self.wakes(Whom::All);
                self.close().await;
                let error = SqliteStorageError::of(error).into();
                match self.storage.look(&self.key).await {
                    Ok(Some(found)) if found.entry == Entry::Completed(record) => Committed::Yes,
                    Ok(_) => Committed::RolledBack(error),
                    Err(_) => Committed::Unknown(error),
                }
            }
        }
    }

    /// Its limit does not count: it is known at the end whether it is committed.
    async fn commit_open(&mut self) -> Result<(), sqlx::Error> {
        let mut patience = self.storage.patience();
        let writer = self.exclusive();
        while writer.depth() > 0 {
            match Manager::commit(&mut writer.connection).await {
                // Without a write-ahead log it waits for those who read.
                Err(error) if error::is_busy(&error) && patience.pause().await => {}
                committed => committed?,
            }
        }
        Ok(())
    }

    /// Whether the operation has ended its transaction itself, so that what it wrote since is committed. (SQLite may have done so too, on
    /// a full disk say; that can't be told apart.)
    async fn is_ended_by_hand(&mut self) -> bool {
        if self.is_read_only || self.held.is_none() {
            return false;
        }
        self.exclusive().stop();
        matches!(self.leave_savepoint(Writes::Undo).await, Ok(false))
    }

    async fn roll_back_and_release(&mut self) {
        self.undo().await;
        if !self.has_claim {
            return;
        }
        let (storage, key) = (&self.storage, &self.key);
        let Ok(statements) = storage.statements() else {
            return;
        };
        let statement = statements.stop(storage.now(), key, self.claim.token);
        if let Err(error) = storage.end(key, statement, Whom::One).await {
            tracing::warn!(target: "idempotency", %key, %error, "a claim at a recovery point could not be given back: a retry goes on when its lease is over");
        }
    }

    /// Rolls back, and gives back what it holds.
    async fn undo(&mut self) {
        match self.exclusive().roll_back().await {
            true => self.end().await,
            false => self.close().await,
        }
    }

    /// Gives back what it holds. No transaction is open.
    async fn end(&mut self) {
        match &mut self.held {
            Some(held) if !self.is_read_only => {
                if let Some(writer) = self.writer.take() {
                    held.turn.keep(writer);
                }
                self.held = None;
            }
            _ => self.close().await,
        }
    }

    async fn close(&mut self) {
        if let Some(writer) = self.writer.take() {
            writer.close().await;
        }
        self.held = None;
    }

    /// Whom its end wakes.
    fn wakes(&mut self, whom: Whom) {
        if let Some(held) = &mut self.held {
            held.hold.0.whom = whom;
        }
    }

    async fn end_open_phase(&mut self, point: &str, lease: Duration) -> Result<(), PhaseError> {
        let is_whole = self.leave_savepoint(Writes::Keep).await;
        if !is_whole.map_err(unphased)? {
            return Err(PhaseError::Lost);
        }
        let storage = &self.storage;
        let statements = storage.statements().map_err(invalid)?;
        let statement = statements.advance(storage.now(), &self.key, &self.claim, point, lease);
        if self.fetch(&statement).await.map_err(unphased)?.is_empty() {
            return Err(PhaseError::Lost);
        }
        self.commit_open().await.map_err(unphased)?;
        self.has_claim = true;
        self.point = Some(point.to_owned());
        self.held = None;
        Ok(())
    }

    async fn open_next_phase(&mut self) -> Result<(), PhaseError> {
        let storage = &self.storage;
        let statements = storage.statements().map_err(invalid)?;
        let statement = statements.resume(storage.now(), &self.key, &self.claim);
        let mut patience = storage.patience();
        let turn = storage.turn(&patience).await;
        self.held = Some(Held {
            turn: turn.map_err(|error| PhaseError::Failed(error.into()))?,
            hold: Hold::new(&storage.holds, &self.key, self.claim.fingerprint),
        });
        let rows = self.open(&mut patience, statement).await;
        match rows.map_err(unphased)?.is_empty() {
            true => Err(PhaseError::Lost),
            false => Ok(()),
        }
    }

    /// Rolls back, lets others write, and keeps the connection for reading.
    async fn make_read_only(&mut self) {
        self.is_read_only = true;
        let writer = self.exclusive();
        writer.roll_back().await;
        // If this fails, the thread of the connection is gone.
        let _ = writer.run("PRAGMA query_only = ON").await;
        self.held = None;
    }

    #[expect(clippy::expect_used, reason = "its end takes it, and consumes `self`")]
    fn exclusive(&mut self) -> &mut Writer {
        self.writer.as_mut().expect("a connection until its end")
    }
}

impl Transaction for SqliteTransaction {
    fn number(&self) -> i64 {
        self.number
    }

    fn recovery_point(&self) -> Option<&str> {
        self.point.as_deref()
    }

    fn commit(
        self: Box<Self>,
        record: Record,
        ttl: Duration,
        writes: Writes,
    ) -> BoxFuture<'static, Committed> {
        Box::pin(self.record_and_commit(record, ttl, writes))
    }

    fn roll_back(mut self: Box<Self>) -> BoxFuture<'static, RolledBack> {
        Box::pin(async move {
            if self.is_ended_by_hand().await {
                self.close().await;
                return RolledBack::EndedByHand;
            }
            self.roll_back_and_release().await;
            RolledBack::Yes
        })
    }

    fn end_phase<'a>(
        &'a mut self,
        point: &'a str,
        lease: Duration,
    ) -> BoxFuture<'a, Result<(), PhaseError>> {
        Box::pin(async move {
            let ended = self.end_open_phase(point, lease).await;
            if ended.is_err() {
                self.make_read_only().await;
            }
            ended
        })
    }

    fn begin_phase(&mut self) -> BoxFuture<'_, Result<(), PhaseError>> {
        Box::pin(async move {
            let begun = self.open_next_phase().await;
            if begun.is_err() {
                self.make_read_only().await;
            }
            begun
        })
    }

    fn refuse_writes(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(self.make_read_only())
    }
}

impl Drop for SqliteTransaction {
    fn drop(&mut self) {
        let Some(writer) = self.writer.take() else {
            return;
        };
        let held = self.held.take();
        // Closed, it is rolled back. A statement that runs is stopped, and waited for.
        if let Some(spawner) = Env::system().background() {
            spawner.spawn(Box::pin(async move {
                writer.close().await;
                drop(held);
            }));
        }
    }
}

/// Whether a savepoint was there to be ended.
fn is_there(ended: Result<(), sqlx::Error>) -> Result<bool, sqlx::Error> {
    match ended {
        Ok(()) => Ok(true),
        Err(error) if error::is_no_savepoint(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// It is rolled back because of this.
fn not_committed(error: sqlx::Error) -> Committed {
    let is_final = error::is_final(&error);
    let error = StorageError::from(SqliteStorageError::of(error));
    match is_final {
        true => Committed::Failed(error),
        false => Committed::RolledBack(error),
    }
}

fn unphased(error: sqlx::Error) -> PhaseError {
    PhaseError::Failed(SqliteStorageError::of(error).into())
}

fn invalid(name: InvalidTableName) -> PhaseError {
    PhaseError::Failed(name.into())
}

impl Deref for SqliteTransaction {
    type Target = SqliteConnection;

    #[expect(clippy::expect_used, reason = "its end takes it, and consumes `self`")]
    fn deref(&self) -> &SqliteConnection {
        let writer = self.writer.as_ref();
        &writer.expect("a connection until its end").connection
    }
}

impl DerefMut for SqliteTransaction {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.exclusive().connection
    }
}

impl fmt::Debug for SqliteTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteTransaction")
            .field("key", &format_args!("{}", self.key))
            .field("recovery_point", &self.point)
            .finish_non_exhaustive()
    }
}
