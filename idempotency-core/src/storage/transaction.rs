//! One database transaction for the claim, the operation's own writes and the record.
//!
//! A storage whose records lie in a database lends transactions of it ([`Storage::transactions`](crate::Storage::transactions)). The
//! row of the key is inserted first, as a tombstone: nobody sees it before the commit, and an operation that commits by itself leaves it
//! behind, so it never runs again. The record takes its place last, and then the transaction is committed.

use std::{any::Any, ops::DerefMut, time::Duration};

use futures_util::future::BoxFuture;

use crate::{EncodedKey, Fingerprint, Record, StorageError, Token};

/// Lends the transactions of a storage.
///
/// While a transaction holds a key, every other `begin` of the key, here and through [`Storage::begin`](crate::Storage::begin), reports
/// it as in flight at once, and [`Storage::wait`](crate::Storage::wait) waits for its end.
pub trait Transactions: Send + Sync {
    /// The database, as the driver names it: `PostgreSQL`. A handler asks for it by the type of its transaction.
    fn database(&self) -> &'static str;

    /// How long a transaction may be open.
    fn max_duration(&self) -> Duration;

    /// How many are open at once in this process; more wait for their turn in [`begin`](Self::begin). Zero if the storage has too few
    /// connections to lend one.
    fn max_open(&self) -> usize;

    /// Whether the renewals of other claims wait for an open transaction, because the database has one writer.
    fn delays_renewals(&self) -> bool {
        false
    }

    /// Begins a transaction that holds `key`, if the key is free. One whose claim met another transaction is begun again.
    ///
    /// # Errors
    ///
    /// If the storage fails. Nothing was done then.
    fn begin<'a>(
        &'a self,
        key: &'a EncodedKey,
        claim: &'a NewTransaction,
    ) -> BoxFuture<'a, Result<BeginTransaction, StorageError>>;

    /// Ends the transaction of this [number](Transaction::number) from outside, because the operation did not give it back. Where the
    /// database has no way to do so, the key stays taken until it is given back; that is the default.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    fn terminate(&self, number: i64) -> BoxFuture<'_, Result<(), StorageError>> {
        let _ = number;
        Box::pin(std::future::ready(Ok(())))
    }
}

// Not `#[non_exhaustive]`: whoever drives a storage builds it, and a storage must keep every field.
/// What [`Transactions::begin`] is asked to store where no claim or record is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewTransaction {
    /// Names the claim.
    pub token: Token,
    /// What the request was, if the encoder tells requests of one key apart.
    pub fingerprint: Option<Fingerprint>,
    /// How long the tombstone lives that an operation leaves which commits by itself, and how long a retry may go on at a recovery
    /// point.
    pub ttl: Duration,
}

// Not `#[non_exhaustive]`: storages build it, and a caller that ignores a case runs an operation twice.
/// What [`Transactions::begin`] found.
#[must_use = "only `Acquired` allows the operation to run"]
pub enum BeginTransaction {
    /// The key is this transaction's: run the operation in it.
    Acquired(Box<dyn Transaction>),
    /// Another transaction or claim holds the key.
    InFlight {
        /// Fingerprint of the request that runs, where it can be seen.
        fingerprint: Option<Fingerprint>,
    },
    /// The operation ran before; this is its outcome.
    Completed(Record),
}

/// An open transaction that holds a key.
///
/// Dropped before it is committed, it is rolled back, as far as the database notices.
pub trait Transaction: Any + Send {
    /// The number by which the database knows it.
    fn number(&self) -> i64;

    /// Where the attempt before this one stopped: the last [phase](Self::end_phase) that was committed, if one was.
    fn recovery_point(&self) -> Option<&str>;

    /// Writes the record and commits it, with the operation's own writes or without them.
    fn commit(
        self: Box<Self>,
        record: Record,
        ttl: Duration,
        writes: Writes,
    ) -> BoxFuture<'static, Committed>;

    /// Ends it without a trace, and frees the key. Phases that were committed before stay.
    fn roll_back(self: Box<Self>) -> BoxFuture<'static, RolledBack>;

    /// Commits what was written so far. The key then has a claim with a lease, which is renewed as any other, and which remembers `point`.
    /// No transaction is open until the [next phase](Self::begin_phase).
    fn end_phase<'a>(
        &'a mut self,
        point: &'a str,
        lease: Duration,
    ) -> BoxFuture<'a, Result<(), PhaseError>>;

    /// Opens the next phase, if the claim is still this one's. After an error nothing can be written through this any more.
    fn begin_phase(&mut self) -> BoxFuture<'_, Result<(), PhaseError>>;

    /// From here on nothing can be written through this.
    fn refuse_writes(&mut self) -> BoxFuture<'_, ()>;
}

/// A database whose transactions an operation can ask for, by its type in the driver.
pub trait TransactionDatabase: 'static {
    /// What [`Transactions::database`] says of it.
    const NAME: &'static str;
    /// What the operation's statements go through.
    type Connection;
    /// What the storage lends.
    type Transaction: Transaction + DerefMut<Target = Self::Connection>;
}

/// What becomes of the operation's own writes when the record is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// They are committed with it.
    Keep,
    /// They are undone first: the record is committed alone.
    Undo,
}

// Not `#[non_exhaustive]`: a caller that ignores a case tells a client that something was done which was not.
/// What came of [`Transaction::commit`].
#[derive(Debug)]
#[must_use = "an operation that is rolled back did not happen"]
pub enum Committed {
    /// All that is to be kept is there, with the record.
    Yes,
    /// Nothing of it is there, and the key is free: it met another transaction, or the database failed. A retry may succeed.
    RolledBack(StorageError),
    /// A statement of the operation failed, and the operation took no notice; or a constraint does not hold at the commit. Nothing of it is
    /// there, and the key is free.
    Failed(StorageError),
    /// The connection was lost, and the database can't be asked. The key tells: it has the record, or it is free.
    Unknown(StorageError),
    /// The operation has ended the transaction itself. What it had committed stays.
    EndedByHand,
}

// Not `#[non_exhaustive]`: a caller that ignores a case lets an operation run again whose writes are committed.
/// What came of [`Transaction::roll_back`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "what an operation has committed by hand can't be undone"]
pub enum RolledBack {
    /// Nothing of it is there, as far as the database answers.
    Yes,
    /// The operation has ended the transaction itself. What it had committed stays.
    EndedByHand,
}

/// Why a phase could not be ended or begun.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PhaseError {
    /// Another holds the key, or it was removed; or the operation has ended the transaction itself.
    #[error("the key is no longer this operation's: end it with an error")]
    Lost,
    /// The storage failed.
    #[error("the database failed between two phases: end the operation with an error")]
    Failed(#[source] StorageError),
}

impl std::fmt::Debug for BeginTransaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Acquired(transaction) => f
                .debug_tuple("Acquired")
                .field(&transaction.number())
                .finish(),
            Self::InFlight { .. } => f.write_str("InFlight"),
            Self::Completed(record) => f.debug_tuple("Completed").field(record).finish(),
        }
    }
}
