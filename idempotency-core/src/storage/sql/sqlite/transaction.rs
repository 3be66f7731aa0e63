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
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use sqlx::{Row as _, Sqlite, SqliteConnection, TransactionManager, sqlite::SqliteRow};

use super::{
    SqliteStorage,
    database::{self, Patience, Statement},
    error::{self, SqliteStorageError, SqliteStorageErrorKind},
    holds::Hold,
    statements::Statements,
    turn::{Manager, Turn, Writer},
};
use crate::{
    BeginTransaction, Committed, EncodedKey, Entry, Env, NewTransaction, PhaseError, Record,
    RolledBack, StorageError, Transaction, TransactionDatabase, Transactions, Writes,
    storage::{sql::not_acquired, waits::Whom},
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
    statements: Arc<Statements>,
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
        let statements = self.statements.clone()?;
        let enter = statements.enter(self.now(), key, claim);
        let mut patience = self.patience();
        if let Some(fingerprint) = self.holds.holder(key) {
            return Ok(BeginTransaction::InFlight { fingerprint });
        }
        // Read first: a replay waits for no writer.
        let found = self.look(key).await?.map(|found| found.entry);
        let goes_on = Entry::Claimed {
            fingerprint: claim.fingerprint,
            lease_left: Some(Duration::ZERO),
        };
        if found.as_ref().is_some_and(|found| *found != goes_on) {
            return Ok(not_acquired(found));
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
            statements,
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
        match transaction.open(&mut patience, enter).await {
            Ok(Some(row)) => {
                transaction.point = row.try_get(0).ok().flatten();
                Ok(BeginTransaction::Acquired(Box::new(transaction)))
            }
            Ok(None) => {
                transaction.undo().await;
                let found = self.look(key).await?;
                Ok(not_acquired(found.map(|found| found.entry)))
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
    ) -> Result<Option<SqliteRow>, sqlx::Error> {
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
        let row = self.fetch(&statement).await?;
        if row.is_some() {
            self.exclusive().run("SAVEPOINT idempotency").await?;
        }
        Ok(row)
    }

    /// Runs a statement to its end.
    async fn fetch(&mut self, statement: &Statement) -> Result<Option<SqliteRow>, sqlx::Error> {
        let connection = &mut self.exclusive().connection;
        let rows = statement.query().fetch_all(connection).await?;
        Ok(rows.into_iter().next())
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
        let (now, token) = (self.storage.now(), self.claim.token);
        let statement = self.statements.record(now, &self.key, token, record, ttl);
        Ok(self.fetch(&statement).await?.is_some())
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
            Err(error) => return self.fail(error).await,
        }
        match self.commit_open().await {
            Ok(()) => {
                self.wakes(Whom::All);
                self.end().await;
                Committed::Yes
            }
            // SQLite says so: it is not committed.
            Err(error) if error.as_database_error().is_some() => self.fail(error).await,
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

    /// Rolls back because of this.
    async fn fail(&mut self, error: sqlx::Error) -> Committed {
        self.roll_back_and_release().await;
        let is_final = error::is_final(&error);
        let error = SqliteStorageError::of(error).into();
        match is_final {
            true => Committed::Failed(error),
            false => Committed::RolledBack(error),
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
        if self.held.is_none() {
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
        let statement = self.statements.stop(storage.now(), key, self.claim.token);
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
        let Some(held) = &mut self.held else {
            return self.close().await;
        };
        if let Some(writer) = self.writer.take() {
            held.turn.keep(writer);
        }
        self.held = None;
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

    /// `false` if the row of this transaction is gone.
    async fn end_open_phase(&mut self, point: &str, lease: Duration) -> Result<bool, sqlx::Error> {
        if !self.leave_savepoint(Writes::Keep).await? {
            return Ok(false);
        }
        let now = self.storage.now();
        let statement = self
            .statements
            .advance(now, &self.key, &self.claim, point, lease);
        if self.fetch(&statement).await?.is_none() {
            return Ok(false);
        }
        self.commit_open().await?;
        self.has_claim = true;
        self.point = Some(point.to_owned());
        self.held = None;
        Ok(true)
    }

    /// `false` if the claim at the recovery point is gone.
    async fn open_next_phase(&mut self) -> Result<bool, SqliteStorageError> {
        let storage = &self.storage;
        let statement = self
            .statements
            .resume(storage.now(), &self.key, &self.claim);
        let mut patience = storage.patience();
        self.held = Some(Held {
            turn: storage.turn(&patience).await?,
            hold: Hold::new(&storage.holds, &self.key, self.claim.fingerprint),
        });
        let row = self.open(&mut patience, statement).await;
        Ok(row.map_err(SqliteStorageError::of)?.is_some())
    }

    /// After a phase that could not be ended or begun nothing is written any more.
    async fn go_on(&mut self, phase: Result<bool, SqliteStorageError>) -> Result<(), PhaseError> {
        let error = match phase {
            Ok(true) => return Ok(()),
            Ok(false) => PhaseError::Lost,
            Err(error) => PhaseError::Failed(error.into()),
        };
        self.make_read_only().await;
        Err(error)
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
            self.go_on(ended.map_err(SqliteStorageError::of)).await
        })
    }

    fn begin_phase(&mut self) -> BoxFuture<'_, Result<(), PhaseError>> {
        Box::pin(async move {
            let begun = self.open_next_phase().await;
            self.go_on(begun).await
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
