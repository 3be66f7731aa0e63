//! The claim, the operation's own writes and the record, in one transaction.
//!
//! The row of the key is inserted first, as a tombstone. Nobody sees it before the commit: a duplicate that wants to insert the same
//! key waits for the end of this transaction. An operation that commits by itself leaves the tombstone, so it never runs again.
//!
//! The record is written last, by a statement that changes the row only if this transaction has inserted it. It fails in a transaction
//! that an error has aborted, and it finds nothing after a `COMMIT` or `ROLLBACK` of the operation. PostgreSQL answers the `COMMIT` of
//! an aborted transaction with `ROLLBACK` and no error; after the record was written there is nothing left that could abort it
//! unnoticed.

use std::{
    error::Error,
    fmt,
    ops::{Deref, DerefMut},
    time::Duration,
};

use futures_util::future::BoxFuture;
use serde::{Serialize, de::DeserializeOwned};
use sqlx::{
    Executor as _, Postgres, TransactionManager,
    postgres::{PgConnection, PgRow},
};

use super::{
    PostgresStorage,
    error::{self, Cure},
    link::{Lent, Link, Value, with_literals},
    row,
};
use crate::{
    Encoded, EncodedKey, Entry, Outcome, Ran, Record, Storage as _, StorageError, StorageErrorKind,
    StoredResponse, Token, TombstoneReason,
};

/// How often an operation is run again that met another transaction.
const RUNS: u32 = 8;

/// How often the server is asked what became of a commit.
const QUESTIONS: u32 = 20;

type Manager = <Postgres as sqlx::Database>::TransactionManager;

/// How a transaction with its record runs; see [`PostgresStorage::run_in_transaction`].
///
/// ```
/// use std::time::Duration;
/// use idempotency_core::TransactionTerms;
///
/// let terms = TransactionTerms::default()
///     .ttl(Duration::from_secs(3600))
///     .wait(Duration::from_secs(2))
///     .idle(Duration::from_secs(10));
/// # let _ = terms;
/// ```
#[derive(Clone, Debug)]
#[must_use]
pub struct TransactionTerms {
    ttl: Duration,
    wait: Duration,
    idle: Duration,
}

impl TransactionTerms {
    /// How long the record lives. Default: a day.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// How long a duplicate waits for the transaction that holds the key, at the server (`lock_timeout`), with its connection. At least
    /// 1 ms. Default: 100 ms.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// How long the operation may do other things than talk to the server (`idle_in_transaction_session_timeout`). Then the server ends
    /// its connection, and with it the transaction. At least 1 ms. Default: 60 s.
    pub fn idle(mut self, idle: Duration) -> Self {
        self.idle = idle;
        self
    }
}

impl Default for TransactionTerms {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(24 * 3600),
            wait: Duration::from_millis(100),
            idle: Duration::from_secs(60),
        }
    }
}

// Not `#[non_exhaustive]`: a caller that ignores a case runs an operation twice.
/// What [`PostgresStorage::enter`] found.
#[derive(Debug)]
#[must_use = "only `Acquired` allows the operation to run"]
pub enum Entered {
    /// The key is this transaction's: run the operation in it.
    Acquired(KeyTransaction),
    /// Another transaction or claim holds the key.
    InFlight,
    /// The operation ran before; this is its outcome.
    Completed(Record),
}

// Not `#[non_exhaustive]`: a transaction was committed, or it was not, or nobody knows.
/// What came of [`KeyTransaction::commit`].
#[derive(Debug)]
#[must_use = "an operation that is rolled back did not happen"]
pub enum Committed {
    /// All that the transaction wrote is there, with the record.
    Yes,
    /// Nothing of it is there, and the key is free.
    RolledBack(StorageError),
    /// The connection was lost, and the server can't be asked. The key tells: it has the record, or it is free.
    Unknown(StorageError),
}

/// A transaction that holds a key: a [`PgConnection`] for the operation's own statements.
///
/// Its `begin` makes a savepoint. Dropped before it is [committed](Self::commit), it is rolled back: its connection is closed.
pub struct KeyTransaction {
    lent: Lent,
    link: Link,
    key: EncodedKey,
    token: Token,
    /// The number that the server gave it.
    number: i64,
    ttl: Duration,
}

impl PostgresStorage {
    /// Begins a transaction that holds `encoded.key`, if the key is free.
    ///
    /// While another transaction holds the key, this waits for its end: at most [`TransactionTerms::wait`].
    ///
    /// ```no_run
    /// # async fn example(
    /// #     storage: idempotency_core::PostgresStorage,
    /// #     encoded: idempotency_core::Encoded,
    /// #     record: idempotency_core::Record,
    /// # ) -> Result<(), Box<dyn std::error::Error>> {
    /// use idempotency_core::{Committed, Entered, TransactionTerms, sqlx};
    ///
    /// match storage.enter(&encoded, &TransactionTerms::default()).await? {
    ///     Entered::Acquired(mut transaction) => {
    ///         sqlx::query("INSERT INTO orders DEFAULT VALUES")
    ///             .execute(&mut *transaction)
    ///             .await?;
    ///         assert!(matches!(transaction.commit(&record).await, Committed::Yes));
    ///     }
    ///     Entered::InFlight => println!("try again later"),
    ///     Entered::Completed(record) => println!("{record:?}"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// If the storage fails. Nothing was done then.
    pub async fn enter(
        &self,
        encoded: &Encoded,
        terms: &TransactionTerms,
    ) -> Result<Entered, StorageError> {
        let env = &self.link.env;
        let deadline = env.now().saturating_add(terms.wait);
        let mut tries = 0;
        loop {
            tries += 1;
            let left = deadline.saturating_sub(env.now());
            match self.try_to_enter(encoded, terms, left).await? {
                Attempt::Entered(entered) => return Ok(entered),
                // The row was committed while this waited for it. The next statement sees it.
                Attempt::Again if tries < RUNS => env.sleep(self.link.pause(tries)).await,
                // A claim of `begin`, which may end sooner.
                Attempt::Claimed if !left.is_zero() => self.wait(&encoded.key, left).await?,
                Attempt::Again | Attempt::Claimed => return Ok(Entered::InFlight),
            }
        }
    }

    async fn try_to_enter(
        &self,
        encoded: &Encoded,
        terms: &TransactionTerms,
        wait: Duration,
    ) -> Result<Attempt, StorageError> {
        let (link, key) = (&self.link, encoded.key);
        let token = Token::random_from(&link.env);
        // What an operation that commits by itself leaves behind.
        let tombstone = Record {
            fingerprint: encoded.fingerprint,
            outcome: Outcome::Tombstone(TombstoneReason::HandlerFailed),
        };
        let begin = format!(
            "BEGIN; SET LOCAL lock_timeout = {}; SET LOCAL idle_in_transaction_session_timeout = {}",
            milliseconds(wait),
            milliseconds(terms.idle),
        );
        let values = [
            Value::Bytes(key.as_bytes()),
            Value::Bytes(token.as_bytes()),
            Value::Bytes(&tombstone.encode()),
            Value::Number(row::record_checksum(&key, token)),
            Value::Interval(terms.ttl),
        ];
        let claim = with_literals(&link.statements()?.enter, &values);
        // One message. The operation's own locks are not limited.
        let claim = format!("{claim}; SET LOCAL lock_timeout TO DEFAULT");
        let limit = link.limit.saturating_add(wait);
        let entering = async {
            let mut lost = 0;
            loop {
                let mut lent = link.lend().await?;
                match start(&mut lent, &begin, &claim).await {
                    Err(error) if error::cure(&error) == Cure::AnotherConnection => {
                        lost += 1;
                        if lost > link.most_lost() {
                            return Err(error);
                        }
                    }
                    Err(error) if error::cure(&error) == Cure::Close => return Err(error),
                    Err(error) => {
                        roll_back(lent).await;
                        return Err(error);
                    }
                    Ok(rows) => return Ok((lent, rows)),
                }
            }
        };
        let (lent, rows) = match link.env.within(limit, entering).await {
            Some(Ok(entered)) => entered,
            Some(Err(error)) => {
                return match &*error::code(&error) {
                    // lock_not_available
                    "55P03" => Ok(Attempt::Entered(Entered::InFlight)),
                    "40001" | "40P01" => Ok(Attempt::Again),
                    _ => Err(error::into_storage_error(error)),
                };
            }
            None => return Err(StorageError::timeout()),
        };
        let Some(found) = rows.first() else {
            roll_back(lent).await;
            return Ok(Attempt::Again);
        };
        if row::column(found, "taken")? {
            return Ok(Attempt::Entered(Entered::Acquired(KeyTransaction {
                number: row::column(found, "transaction")?,
                lent,
                link: link.clone(),
                key,
                token,
                ttl: terms.ttl,
            })));
        }
        let entry = row::read(&key, found);
        roll_back(lent).await;
        Ok(match entry? {
            Entry::Completed(record) => Attempt::Entered(Entered::Completed(record)),
            Entry::Claimed { .. } => Attempt::Claimed,
        })
    }

    /// Runs `operation` exactly once per key, if all that it does is written through the connection that it is given: its writes and the
    /// record of its value are committed together, or not at all.
    ///
    /// `Ok` values are recorded as JSON. An `Err` rolls back: the next call runs it again. An operation that meets another transaction
    /// (SQLSTATE 40001 or 40P01, in it or at the commit) is rolled back and run again, a few times. What an operation does elsewhere is
    /// not rolled back.
    ///
    /// ```no_run
    /// # async fn example(storage: idempotency_core::PostgresStorage, encoded: idempotency_core::Encoded) {
    /// use idempotency_core::{Ran, TransactionTerms, sqlx};
    ///
    /// let terms = TransactionTerms::default();
    /// let ran: Ran<i64, sqlx::Error> = storage
    ///     .run_in_transaction(&encoded, &terms, |connection| {
    ///         Box::pin(async move {
    ///             let statement = "INSERT INTO orders DEFAULT VALUES RETURNING id";
    ///             sqlx::query_scalar(statement).fetch_one(connection).await
    ///         })
    ///     })
    ///     .await;
    /// # let _ = ran;
    /// # }
    /// ```
    ///
    /// Dropping the future rolls back, and so does a panic of the operation. [`Ran::StorageFailed`] of kind
    /// [`Timeout`](StorageErrorKind::Timeout) may mean that the connection was lost while it was committed, and that the server could
    /// not be asked since: call again, and the key tells.
    pub async fn run_in_transaction<T, E>(
        &self,
        encoded: &Encoded,
        terms: &TransactionTerms,
        mut operation: impl for<'c> FnMut(&'c mut PgConnection) -> BoxFuture<'c, Result<T, E>>,
    ) -> Ran<T, E>
    where
        T: Serialize + DeserializeOwned,
        E: Error + 'static,
    {
        let mut run = 0;
        loop {
            run += 1;
            let mut transaction = match self.enter(encoded, terms).await {
                Ok(Entered::Acquired(transaction)) => transaction,
                Ok(Entered::InFlight) => return Ran::InFlight,
                Ok(Entered::Completed(record)) => return replayed(encoded, &record),
                Err(error) => return Ran::StorageFailed(error),
            };
            let value = match operation(&mut transaction).await {
                Ok(value) => value,
                Err(error) => {
                    transaction.roll_back().await;
                    if run < RUNS && met_another(&error) {
                        self.link.env.sleep(self.link.pause(run)).await;
                        continue;
                    }
                    return Ran::Failed(error);
                }
            };
            let json = match serde_json::to_vec(&value) {
                Ok(json) => json,
                Err(error) => {
                    transaction.roll_back().await;
                    return Ran::StorageFailed(StorageError::unavailable(error));
                }
            };
            let headers = http::HeaderMap::new();
            let record = Record {
                fingerprint: encoded.fingerprint,
                outcome: Outcome::Response(StoredResponse::new(
                    http::StatusCode::OK,
                    &headers,
                    json,
                )),
            };
            match transaction.commit(&record).await {
                Committed::Yes => return Ran::Executed(value),
                Committed::RolledBack(error) if run < RUNS && met_another(&error) => {
                    self.link.env.sleep(self.link.pause(run)).await;
                }
                Committed::RolledBack(error) | Committed::Unknown(error) => {
                    return Ran::StorageFailed(error);
                }
            }
        }
    }
}

/// What came of one transaction.
enum Attempt {
    Entered(Entered),
    Claimed,
    Again,
}

async fn start(lent: &mut Lent, begin: &str, claim: &str) -> Result<Vec<PgRow>, sqlx::Error> {
    let connection = lent.connection()?;
    // By the driver's own count of transactions, a `begin` in this one is a savepoint.
    Manager::begin(connection, Some(begin.to_owned().into())).await?;
    connection.fetch_all(claim).await
}

/// Gives the connection back, if the server answers.
async fn roll_back(mut lent: Lent) {
    if let Ok(connection) = lent.connection()
        && Manager::rollback(connection).await.is_ok()
    {
        lent.give_back();
    }
}

impl KeyTransaction {
    /// Writes the record and commits.
    pub async fn commit(mut self, record: &Record) -> Committed {
        let (link, number) = (self.link.clone(), self.number);
        let recorded = link.env.within(link.limit, self.record(record)).await;
        let failed = match recorded {
            Some(Ok(true)) => None,
            Some(Ok(false)) => Some(StorageError::unavailable(
                "the operation has ended its transaction itself",
            )),
            Some(Err(error)) => Some(error),
            None => Some(StorageError::timeout()),
        };
        if let Some(error) = failed {
            // What it has written is gone once its connection is.
            self.roll_back().await;
            return Committed::RolledBack(error);
        }
        let Ok(connection) = self.lent.connection() else {
            return Committed::RolledBack(StorageError::unavailable("it has no connection"));
        };
        let committed = link.env.within(link.limit, Manager::commit(connection));
        let error = match committed.await {
            Some(Ok(())) => {
                self.lent.give_back();
                return Committed::Yes;
            }
            Some(Err(error)) => match error::cure(&error) {
                Cure::AnotherConnection => error::into_storage_error(error),
                // The server says so: it is not committed.
                _ => return Committed::RolledBack(error::into_storage_error(error)),
            },
            None => StorageError::timeout(),
        };
        drop(self);
        match fate(&link, number).await {
            Some(true) => Committed::Yes,
            Some(false) => Committed::RolledBack(error),
            None => Committed::Unknown(StorageError::new(StorageErrorKind::Timeout, error)),
        }
    }

    /// Ends it without a trace.
    pub async fn roll_back(self) {
        let env = self.link.env.clone();
        // Where the server does not answer, the connection is closed.
        let _ = env.within(self.link.limit, roll_back(self.lent)).await;
    }

    /// Whether the row is this transaction's.
    async fn record(&mut self, record: &Record) -> Result<bool, StorageError> {
        let values = [
            Value::Bytes(self.key.as_bytes()),
            Value::Bytes(self.token.as_bytes()),
            Value::Bytes(&record.encode()),
            Value::Interval(self.ttl),
        ];
        let statement = with_literals(&self.link.statements()?.record, &values);
        let connection = self.lent.connection().map_err(error::into_storage_error)?;
        let rows = connection.fetch_all(&*statement).await;
        Ok(!rows.map_err(error::into_storage_error)?.is_empty())
    }
}

/// Whether the transaction was committed, if the server knows.
async fn fate(link: &Link, number: i64) -> Option<bool> {
    for question in 1..=QUESTIONS {
        let values = [Value::Number(number)];
        let rows = link
            .run("SELECT txid_status($1::bigint) AS status", &values)
            .await;
        if let Ok(rows) = rows {
            let status: Option<String> = row::column(rows.first()?, "status").ok()?;
            match status?.as_str() {
                "committed" => return Some(true),
                "aborted" => return Some(false),
                // Its process has not yet noticed that the connection is gone.
                _ => {}
            }
        }
        link.env.sleep(link.pause(question)).await;
    }
    None
}

fn replayed<T: DeserializeOwned, E>(encoded: &Encoded, record: &Record) -> Ran<T, E> {
    if let (Some(ours), Some(theirs)) = (&encoded.fingerprint, &record.fingerprint)
        && ours != theirs
    {
        return Ran::Mismatch;
    }
    match &record.outcome {
        Outcome::Response(response) => match serde_json::from_slice(response.body()) {
            Ok(value) => Ran::Replayed(value),
            Err(error) => Ran::StorageFailed(StorageError::unreadable(error)),
        },
        Outcome::Tombstone(reason) => Ran::NotReplayable(*reason),
    }
}

/// Whether it was rolled back because of another transaction, and may well succeed when it is run again.
fn met_another(error: &(dyn Error + 'static)) -> bool {
    let mut error = Some(error);
    while let Some(current) = error {
        if let Some(driver) = current.downcast_ref::<sqlx::Error>() {
            return error::cure(driver) == Cure::AnotherTry;
        }
        error = current.source();
    }
    false
}

/// As PostgreSQL counts: 0 would be no limit.
fn milliseconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis())
        .unwrap_or(i32::MAX)
        .max(1)
}

impl Deref for KeyTransaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.lent.shared()
    }
}

impl DerefMut for KeyTransaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.lent.exclusive()
    }
}

impl fmt::Debug for KeyTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyTransaction")
            .field("key", &format_args!("{}", self.key))
            .finish_non_exhaustive()
    }
}
