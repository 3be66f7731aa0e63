//! Whose turn it is to write, in this process.
//!
//! SQLite has one writer. Transactions and the statements of the storage wait for it here, in memory and in order, so within a process
//! they don't find the file locked by each other. The turn passes on only after the lock of the file is free.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
};

use sqlx::{
    Connection as _, Executor as _, Sqlite, SqliteConnection, TransactionManager,
    sqlite::SqliteConnectOptions,
};
use tokio::sync::{Mutex, OwnedMutexGuard};

pub(super) type Manager = <Sqlite as sqlx::Database>::TransactionManager;

/// After so many steps of a statement SQLite asks whether it is to go on.
const STEPS: i32 = 10_000;

/// The turns of one file; clones share them.
#[derive(Clone)]
pub(super) struct Turns(Arc<Shared>);

struct Shared {
    options: SqliteConnectOptions,
    /// Who has the lock writes. It keeps the connection of the last transaction for the next one.
    turn: Arc<Mutex<Option<Writer>>>,
    begun: AtomicI64,
    is_closed: AtomicBool,
}

/// The right to write. Dropped, it passes on to the next who waits.
pub(super) struct Turn(OwnedMutexGuard<Option<Writer>>);

impl Turns {
    pub(super) fn new(options: SqliteConnectOptions) -> Self {
        Self(Arc::new(Shared {
            // A connection may be closed because it is in a bad state.
            options: options.optimize_on_close(false, None),
            turn: Arc::default(),
            begun: AtomicI64::new(0),
            is_closed: AtomicBool::new(false),
        }))
    }

    /// The turn, if it is free.
    pub(super) fn free(&self) -> Option<Turn> {
        self.0.turn.clone().try_lock_owned().ok().map(Turn)
    }

    pub(super) async fn next(&self) -> Turn {
        Turn(self.0.turn.clone().lock_owned().await)
    }

    /// Lets no more transactions begin, waits until none is open, and closes the connection that is kept for the next one.
    pub(super) async fn close(&self) {
        self.0.is_closed.store(true, Ordering::Relaxed);
        let mut turn = self.next().await;
        if let Some(writer) = turn.0.take() {
            writer.close().await;
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.is_closed.load(Ordering::Relaxed)
    }

    /// Tells one transaction from another.
    pub(super) fn number(&self) -> i64 {
        self.0.begun.fetch_add(1, Ordering::Relaxed)
    }

    /// A connection for a transaction.
    pub(super) async fn writer(&self, turn: &mut Turn) -> Result<Writer, sqlx::Error> {
        match turn.0.take() {
            Some(writer) => Ok(writer),
            None => Writer::open(&self.0.options).await,
        }
    }
}

impl Turn {
    /// Keeps a connection that is in no transaction for the next one.
    pub(super) fn keep(&mut self, writer: Writer) {
        *self.0 = Some(writer);
    }
}

impl fmt::Debug for Turns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turns").finish_non_exhaustive()
    }
}

/// A connection for transactions.
pub(super) struct Writer {
    pub(super) connection: SqliteConnection,
    /// Ends the statement that runs, if one does: nobody waits for it any more.
    is_stopped: Arc<AtomicBool>,
}

impl Writer {
    async fn open(options: &SqliteConnectOptions) -> Result<Self, sqlx::Error> {
        let mut connection = SqliteConnection::connect_with(options).await?;
        let is_stopped = Arc::new(AtomicBool::new(false));
        let stopped = is_stopped.clone();
        let mut handle = connection.lock_handle().await?;
        handle.set_progress_handler(STEPS, move || !stopped.load(Ordering::Relaxed));
        drop(handle);
        Ok(Self {
            connection,
            is_stopped,
        })
    }

    /// How many transactions are open by the driver's count: one, and the savepoints in it.
    pub(super) fn depth(&self) -> usize {
        Manager::get_transaction_depth(&self.connection)
    }

    pub(super) async fn run(&mut self, sql: &str) -> Result<(), sqlx::Error> {
        self.connection.execute(sqlx::raw_sql(sql)).await?;
        Ok(())
    }

    /// Ends the statement of the operation that runs, if one does. What takes a few steps, as the end of a transaction, still runs.
    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
    }

    /// Rolls back, if a transaction is open. Says whether the connection is good for another one.
    pub(super) async fn roll_back(&mut self) -> bool {
        self.stop();
        while self.depth() > 0 {
            if Manager::rollback(&mut self.connection).await.is_err() {
                // The driver counts otherwise than SQLite, because the operation has begun or ended something past the driver.
                let _ = self.run("ROLLBACK").await;
                return false;
            }
        }
        self.is_stopped.store(false, Ordering::Relaxed);
        true
    }

    /// Returns when it is closed, and has released the lock of the file.
    pub(super) async fn close(self) {
        self.stop();
        let _ = self.connection.close().await;
    }
}
