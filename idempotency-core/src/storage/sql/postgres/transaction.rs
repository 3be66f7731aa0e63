//! [`Transactions`] of PostgreSQL.
//!
//! Each holds an advisory lock of its key, exclusively and to its end; every other statement that claims the key tries to share that lock.
//! So nobody waits at the row that an open transaction has inserted and nobody else can see.
//!
//! The record is written by a statement that changes the row only if this transaction has written it. It fails in a transaction that an
//! error has aborted, and it finds nothing after a `COMMIT` or `ROLLBACK` of the operation. PostgreSQL answers the `COMMIT` of an aborted
//! transaction with `ROLLBACK` and no error; after the record was written there is nothing left that could abort it unnoticed.
//!
//! A recovery point is two columns of the key's row (`schema.sql`): the statement `advance` writes them, and `enter` takes the key over once
//! the lease is over, for a request of the same fingerprint, until `resume_until`.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    time::Duration,
};

use futures_util::future::BoxFuture;
use sqlx::{
    Executor as _, Postgres, Row as _, TransactionManager,
    postgres::{PgConnection, PgRow},
};
use tokio::sync::OwnedSemaphorePermit;

use super::{
    PostgresStorage,
    error::{self, Cure},
    link::{Lent, Link, Value, with_literals},
    row,
    statements::Statements,
};
use crate::{
    BeginTransaction, Committed, EncodedKey, NewTransaction, PhaseError, Record, RolledBack,
    StorageError, StorageErrorKind, Token, Transaction, TransactionDatabase, Transactions, Writes,
    storage::sql::{committed_by_hand, not_acquired},
};

/// How often a claim is begun again that met another transaction.
const TRIES: u32 = 8;

/// How often the server is asked what became of a commit.
const QUESTIONS: u32 = 20;

/// Ends the process of a transaction.
const TERMINATE: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
    WHERE backend_xid = ($1::bigint & 4294967295::bigint)::text::xid";

/// The first version that limits a whole transaction.
const TRANSACTION_TIMEOUT: u32 = 170_000;

type Manager = <Postgres as sqlx::Database>::TransactionManager;

/// How strictly concurrent transactions are kept apart; see [`PostgresStorage::isolation`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IsolationLevel {
    /// Each statement sees what was committed before it.
    ReadCommitted,
    /// All statements see what was committed before the first.
    RepeatableRead,
    /// As if the transactions ran one after another.
    Serializable,
}

/// How transactions are opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct TransactionOptions {
    pub(super) max_duration: Duration,
    pub(super) isolation: Option<IsolationLevel>,
}

impl Default for TransactionOptions {
    fn default() -> Self {
        Self {
            max_duration: Duration::from_secs(30),
            isolation: None,
        }
    }
}

impl TransactionOptions {
    /// The statement that begins one, with the limits that end it if this process falls silent.
    fn begin(self, connection: &PgConnection) -> String {
        let isolation = match self.isolation {
            None => "",
            Some(IsolationLevel::ReadCommitted) => " ISOLATION LEVEL READ COMMITTED",
            Some(IsolationLevel::RepeatableRead) => " ISOLATION LEVEL REPEATABLE READ",
            Some(IsolationLevel::Serializable) => " ISOLATION LEVEL SERIALIZABLE",
        };
        let limit = milliseconds(self.max_duration);
        let idle = format!("SET LOCAL idle_in_transaction_session_timeout = {limit}");
        match connection.server_version_num() {
            Some(TRANSACTION_TIMEOUT..) => {
                format!("BEGIN{isolation}; {idle}; SET LOCAL transaction_timeout = {limit}")
            }
            // Each statement is limited at least. A stricter limit of the user's own stays.
            _ => format!(
                "BEGIN{isolation}; {idle}; SELECT set_config('statement_timeout', '{limit}', true) \
                 WHERE current_setting('statement_timeout')::interval \
                 NOT BETWEEN interval '1 ms' AND interval '{limit} ms'"
            ),
        }
    }
}

impl TransactionDatabase for Postgres {
    const NAME: &'static str = <Postgres as sqlx::Database>::NAME;
    type Connection = PgConnection;
    type Transaction = PostgresTransaction;
}

/// A transaction of a [`PostgresStorage`] that holds a key.
///
/// Its `begin` makes a savepoint. Dropped before its end, its connection is closed, and the server rolls it back.
pub struct PostgresTransaction {
    lent: Lent,
    link: Link,
    options: TransactionOptions,
    key: EncodedKey,
    claim: NewTransaction,
    number: i64,
    point: Option<String>,
    /// A phase was committed, so the key has a claim of this token unless the record takes its place.
    has_claim: bool,
    /// The transaction that has written the key's row is open, unless the operation has ended it.
    is_open: bool,
    _place: OwnedSemaphorePermit,
}

impl Transactions for PostgresStorage {
    fn database(&self) -> &'static str {
        <Postgres as TransactionDatabase>::NAME
    }

    fn max_duration(&self) -> Duration {
        self.transactions.max_duration
    }

    fn max_open(&self) -> usize {
        self.link.max_open()
    }

    fn begin<'a>(
        &'a self,
        key: &'a EncodedKey,
        claim: &'a NewTransaction,
    ) -> BoxFuture<'a, Result<BeginTransaction, StorageError>> {
        let link = &self.link;
        let begun = async move {
            for tries in 1..=TRIES {
                let place = link.transaction_place().await?;
                if let Some(begun) = self.try_to_begin(key, claim, place).await? {
                    return Ok(begun);
                }
                link.env.sleep(link.pause(tries)).await;
            }
            Ok(BeginTransaction::InFlight { fingerprint: None })
        };
        Box::pin(async move {
            let begun = link.env.within(link.limit, begun).await;
            begun.unwrap_or_else(|| Err(StorageError::timeout()))
        })
    }

    fn terminate(&self, number: i64) -> BoxFuture<'_, Result<(), StorageError>> {
        Box::pin(async move {
            self.link.run(TERMINATE, &[Value::Number(number)]).await?;
            Ok(())
        })
    }
}

impl PostgresStorage {
    /// `None`: it met another transaction, and may do better now.
    async fn try_to_begin(
        &self,
        key: &EncodedKey,
        claim: &NewTransaction,
        place: OwnedSemaphorePermit,
    ) -> Result<Option<BeginTransaction>, StorageError> {
        let link = &self.link;
        let statement = claiming(&link.statements()?.enter, key, claim);
        let mut lost = 0;
        let (lent, rows) = loop {
            let mut lent = link.lend().await.map_err(error::into_storage_error)?;
            match start(&mut lent, self.transactions, &statement).await {
                Ok(rows) => break (lent, rows),
                Err(error) => match error::cure(&error) {
                    Cure::AnotherConnection if lost < link.most_lost() => lost += 1,
                    Cure::AnotherTry => {
                        roll_back(lent).await;
                        return Ok(None);
                    }
                    Cure::Keep => {
                        roll_back(lent).await;
                        return Err(error::into_storage_error(error));
                    }
                    _ => return Err(error::into_storage_error(error)),
                },
            }
        };
        // Without a row, somebody committed one after this statement had looked. The next one sees it.
        let Some(found) = rows.first() else {
            roll_back(lent).await;
            return Ok(None);
        };
        if row::column(found, "taken")? {
            return Ok(Some(BeginTransaction::Acquired(Box::new(
                PostgresTransaction {
                    number: row::column(found, "transaction")?,
                    point: row::column(found, "recovery_point")?,
                    has_claim: false,
                    is_open: true,
                    lent,
                    link: link.clone(),
                    options: self.transactions,
                    key: *key,
                    claim: claim.clone(),
                    _place: place,
                },
            ))));
        }
        let entry = match row::column(found, "busy")? {
            true => Ok(None),
            false => row::read(key, found).map(Some),
        };
        roll_back(lent).await;
        Ok(Some(not_acquired(entry?)))
    }
}

/// The statement `enter` or `resume`, which claims a key by what an operation leaves that commits by itself.
fn claiming(statement: &str, key: &EncodedKey, claim: &NewTransaction) -> String {
    let tombstone = committed_by_hand(claim).encode();
    let print = claim.fingerprint.as_ref();
    let values = [
        Value::Bytes(key.as_bytes()),
        Value::Bytes(claim.token.as_bytes()),
        Value::Bytes(&tombstone),
        Value::Number(row::record_checksum(key, claim.token)),
        Value::Interval(claim.ttl),
        Value::NullableBytes(print.map(|print| &print.as_bytes()[..])),
    ];
    with_literals(statement, &values)
}

/// Two messages. After the second, everything that the operation writes can be undone by itself.
async fn start(
    lent: &mut Lent,
    options: TransactionOptions,
    claim: &str,
) -> Result<Vec<PgRow>, sqlx::Error> {
    let connection = lent.connection()?;
    let begin = options.begin(connection);
    // By the driver's own count of transactions, a `begin` in this one is a savepoint.
    Manager::begin(connection, Some(begin.into())).await?;
    let claim = format!("{claim}; SAVEPOINT idempotency");
    connection.fetch_all(&*claim).await
}

/// Gives the connection back, if the server answers.
async fn roll_back(mut lent: Lent) {
    let Ok(connection) = lent.connection() else {
        return;
    };
    if roll_back_to(connection, 0).await.is_ok() {
        lent.give_back();
    }
}

/// Rolls back to so many transactions, by the driver's own count.
async fn roll_back_to(connection: &mut PgConnection, depth: usize) -> Result<(), sqlx::Error> {
    while Manager::get_transaction_depth(connection) > depth {
        Manager::rollback(connection).await?;
    }
    Ok(())
}

/// Whether our savepoint is gone, and with it our transaction.
fn is_ended_by_hand(error: &sqlx::Error) -> bool {
    // no_active_sql_transaction, invalid_savepoint_specification
    matches!(&*error::code(error), "25P01" | "3B001")
}

impl PostgresTransaction {
    fn statements(&self) -> Result<&Statements, sqlx::Error> {
        let statements = self.link.statements.as_ref().as_ref();
        statements.map_err(|invalid| sqlx::Error::Configuration(invalid.clone().into()))
    }

    /// Writes the record. `false` if the row of this transaction is gone.
    async fn record(
        &mut self,
        record: &Record,
        ttl: Duration,
        writes: Writes,
    ) -> Result<bool, sqlx::Error> {
        let token = self.claim.token;
        let record = record.encode();
        let values = [
            Value::Bytes(self.key.as_bytes()),
            Value::Bytes(token.as_bytes()),
            Value::Bytes(&record),
            Value::Interval(ttl),
            Value::Number(row::record_checksum(&self.key, token)),
        ];
        let mut statement = with_literals(&self.statements()?.record, &values);
        let connection = self.lent.connection()?;
        if writes == Writes::Undo {
            // The driver must not count savepoints that are undone.
            roll_back_to(connection, 1).await?;
            statement = format!("ROLLBACK TO SAVEPOINT idempotency; {statement}");
        }
        let rows = connection.fetch_all(&*statement).await?;
        Ok(!rows.is_empty())
    }

    async fn record_and_commit(
        mut self,
        record: Record,
        ttl: Duration,
        writes: Writes,
    ) -> Committed {
        let link = self.link.clone();
        let recorded = self.record(&record, ttl, writes);
        match link.env.within(link.limit, recorded).await {
            Some(Ok(true)) => {}
            // Its connection is closed, whatever state it is in.
            Some(Ok(false)) => return Committed::EndedByHand,
            Some(Err(error)) if is_ended_by_hand(&error) => return Committed::EndedByHand,
            None => return Committed::RolledBack(StorageError::timeout()),
            Some(Err(error)) => return self.fail(error).await,
        }
        self.is_open = false;
        let error = match link.env.within(link.limit, self.commit_phase()).await {
            Some(Ok(())) => {
                self.lent.give_back();
                return Committed::Yes;
            }
            Some(Err(error)) if error::cure(&error) == Cure::AnotherConnection => {
                error::into_storage_error(error)
            }
            // The server says so: it is not committed.
            Some(Err(error)) => return self.fail(error).await,
            None => StorageError::timeout(),
        };
        let (key, token, number) = (self.key, self.claim.token, self.number);
        drop(self);
        let fate = fate(&link, &key, token, number);
        match link.env.within(link.limit, fate).await.flatten() {
            Some(true) => Committed::Yes,
            Some(false) => Committed::RolledBack(error),
            None => Committed::Unknown(StorageError::new(StorageErrorKind::Timeout, error)),
        }
    }

    /// Rolls back because of this: nothing is committed.
    async fn fail(self, error: sqlx::Error) -> Committed {
        let _ = self.roll_back_and_release().await;
        let is_temporary = error::cure(&error) != Cure::Keep;
        let error = error::into_storage_error(error);
        // Out of room, or out of time: the operation is not to blame.
        match is_temporary || error.kind() != StorageErrorKind::Unavailable {
            true => Committed::RolledBack(error),
            false => Committed::Failed(error),
        }
    }

    /// Commits, with what is left of savepoints that the operation made by the driver.
    async fn commit_phase(&mut self) -> Result<(), sqlx::Error> {
        let connection = self.lent.connection()?;
        while Manager::get_transaction_depth(connection) > 0 {
            Manager::commit(connection).await?;
        }
        Ok(())
    }

    async fn roll_back_and_release(mut self) -> RolledBack {
        let link = self.link.clone();
        let (key, token) = (self.key, self.claim.token);
        match link.env.within(link.limit, self.undo_all()).await {
            Some(Ok(())) => self.lent.give_back(),
            // Its connection is closed, whatever state it is in.
            Some(Err(error)) if is_ended_by_hand(&error) => return RolledBack::EndedByHand,
            // The connection is lost.
            Some(Err(_)) => {}
            // The server goes on with the operation's last statement, also when its connection is closed.
            None => {
                if let Err(error) = link.run(TERMINATE, &[Value::Number(self.number)]).await {
                    tracing::warn!(target: "idempotency", %key, %error, "a transaction could not be rolled back: its key is taken until the server ends it");
                }
            }
        }
        if self.has_claim
            && let Ok(statements) = link.statements()
        {
            let values = [Value::Bytes(key.as_bytes()), Value::Bytes(token.as_bytes())];
            if let Err(error) = link.run(&statements.stop, &values).await {
                tracing::warn!(target: "idempotency", %key, %error, "a claim at a recovery point could not be given back: a retry goes on when its lease is over");
            }
        }
        RolledBack::Yes
    }

    /// Rolls back, and fails if the operation has ended the transaction itself: PostgreSQL would answer that `ROLLBACK` with a warning.
    async fn undo_all(&mut self) -> Result<(), sqlx::Error> {
        let is_open = self.is_open;
        let connection = self.lent.connection()?;
        if is_open {
            roll_back_to(connection, 1).await?;
            connection
                .execute("ROLLBACK TO SAVEPOINT idempotency")
                .await?;
        }
        roll_back_to(connection, 0).await
    }

    /// `false` if the row of this transaction is gone.
    async fn end(&mut self, point: &str, lease: Duration) -> Result<bool, sqlx::Error> {
        let NewTransaction {
            token,
            ref fingerprint,
            ttl,
        } = self.claim;
        let print = fingerprint.as_ref();
        let values = [
            Value::Bytes(self.key.as_bytes()),
            Value::Bytes(token.as_bytes()),
            Value::NullableBytes(print.map(|print| &print.as_bytes()[..])),
            Value::Number(row::claim_checksum(&self.key, token, print)),
            Value::Interval(lease),
            Value::Bytes(point.as_bytes()),
            Value::Interval(ttl),
        ];
        let statement = with_literals(&self.statements()?.advance, &values);
        let connection = self.lent.connection()?;
        if connection.fetch_all(&*statement).await?.is_empty() {
            return Ok(false);
        }
        self.is_open = false;
        self.commit_phase().await?;
        self.has_claim = true;
        self.point = Some(point.to_owned());
        Ok(true)
    }

    /// `false` if the claim at the recovery point is gone.
    async fn open_next(&mut self) -> Result<bool, sqlx::Error> {
        let statement = claiming(&self.statements()?.resume, &self.key, &self.claim);
        let rows = start(&mut self.lent, self.options, &statement).await?;
        let Some(row) = rows.first() else {
            return Ok(false);
        };
        self.number = row.try_get("transaction")?;
        self.is_open = true;
        Ok(true)
    }

    /// After a phase that could not be ended or begun nothing is written any more.
    async fn go_on(&mut self, phase: Option<Result<bool, sqlx::Error>>) -> Result<(), PhaseError> {
        let error = match phase {
            Some(Ok(true)) => return Ok(()),
            Some(Ok(false)) => PhaseError::Lost,
            Some(Err(error)) => PhaseError::Failed(error::into_storage_error(error)),
            None => PhaseError::Failed(StorageError::timeout()),
        };
        self.make_read_only().await;
        Err(error)
    }

    async fn make_read_only(&mut self) {
        self.is_open = false;
        let Ok(connection) = self.lent.connection() else {
            return;
        };
        let read_only = async {
            // No statement goes through a connection that is lost.
            roll_back_to(connection, 0).await?;
            Manager::begin(connection, Some("BEGIN READ ONLY".into())).await
        };
        let _ = self.link.env.within(self.link.limit, read_only).await;
    }
}

impl Transaction for PostgresTransaction {
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

    fn roll_back(self: Box<Self>) -> BoxFuture<'static, RolledBack> {
        Box::pin(self.roll_back_and_release())
    }

    fn end_phase<'a>(
        &'a mut self,
        point: &'a str,
        lease: Duration,
    ) -> BoxFuture<'a, Result<(), PhaseError>> {
        Box::pin(async move {
            let link = self.link.clone();
            let ended = link.env.within(link.limit, self.end(point, lease)).await;
            self.go_on(ended).await
        })
    }

    fn begin_phase(&mut self) -> BoxFuture<'_, Result<(), PhaseError>> {
        Box::pin(async move {
            let link = self.link.clone();
            let begun = link.env.within(link.limit, self.open_next()).await;
            self.go_on(begun).await
        })
    }

    fn refuse_writes(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(self.make_read_only())
    }
}

/// Whether the transaction was committed, if the server knows.
///
/// The row decides. The transaction's number only tells whether it has ended: a server that crashed may have given it to another one
/// since, because it forgets numbers of which no record reached its log.
async fn fate(link: &Link, key: &EncodedKey, token: Token, number: i64) -> Option<bool> {
    let statements = link.statements().ok()?;
    for question in 1..=QUESTIONS {
        let values = [Value::Bytes(key.as_bytes()), Value::Bytes(token.as_bytes())];
        if let Ok(rows) = link.run(IS_IN_PROGRESS, &[Value::Number(number)]).await
            && !row::column::<bool>(rows.first()?, "is_in_progress").ok()?
            // Not in the same statement, which may see the table as it was before the commit.
            && let Ok(rows) = link.run(&statements.recorded, &values).await
        {
            return Some(!rows.is_empty());
        }
        link.env.sleep(link.pause(question)).await;
    }
    None
}

/// True until the process of the transaction has noticed that its connection is gone. A number that no transaction has yet is one from
/// before a crash.
const IS_IN_PROGRESS: &str = "SELECT CASE \
    WHEN $1::bigint < txid_snapshot_xmax(txid_current_snapshot()) \
    THEN coalesce(txid_status($1::bigint) = 'in progress', false) ELSE false END AS is_in_progress";

/// As PostgreSQL counts: 0 would be no limit.
fn milliseconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis())
        .unwrap_or(i32::MAX)
        .max(1)
}

impl Deref for PostgresTransaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.lent.shared()
    }
}

impl DerefMut for PostgresTransaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.lent.exclusive()
    }
}

impl fmt::Debug for PostgresTransaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresTransaction")
            .field("key", &format_args!("{}", self.key))
            .field("recovery_point", &self.point)
            .finish_non_exhaustive()
    }
}
