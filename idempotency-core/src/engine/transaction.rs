//! Operations that run in a transaction of the storage's database: claim, writes and record are committed together.
//!
//! There is no lease: the open transaction is the claim. Its run is listed here before the storage is asked, so the duplicates of this
//! process wait in memory, without a connection.

use std::{
    any::Any,
    fmt,
    ops::{ControlFlow, Deref, DerefMut},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use futures_util::future::{Either, select};
use http::{HeaderMap, StatusCode};
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::Notify;

use super::{
    Claim, Decision, Engine, Progress, Shared,
    call::{Ran, not_run, replayed},
    decide::{Means, in_flight, refused, replay},
    keeper,
    runs::Found,
    waiters::Waiter,
};
use crate::{
    BeginTransaction, Committed, Encoded, EncodedKey, Event, Held, NewTransaction, Operation,
    Outcome, PhaseError, Record, Refusal, RolledBack, Storage, StorageError, StoredResponse, Token,
    TombstoneReason, Transaction, TransactionDatabase, Transactions, Writes,
};

/// By a transaction of the storage's database.
struct ByTransaction {
    transactions: Arc<dyn Transactions>,
    ttl: Duration,
}

impl Engine {
    /// What lends transactions of the storage's database, if that has any.
    #[must_use]
    pub fn transactions(&self) -> Option<&Arc<dyn Transactions>> {
        self.shared.transactions.as_ref()
    }

    /// [`begin_with`](Self::begin_with) for an operation that runs in a transaction, whose record is kept for `ttl`. Default:
    /// [`Config::ttl`](crate::Config::ttl).
    ///
    /// Where the storage has no transactions, or fails, the operation is refused: it never runs unprotected.
    pub async fn begin_in_transaction(
        &self,
        encoded: &Encoded,
        progress: &Progress,
        ttl: Option<Duration>,
    ) -> Decision<TransactionClaim> {
        let shared = &self.shared;
        let Some(transactions) = shared.transactions.clone() else {
            let error = StorageError::unavailable("the storage has no transactions to lend");
            let refused = shared.unavailable(&encoded.key, Operation::Begin, error);
            return Decision::Refuse(refused);
        };
        let means = ByTransaction {
            transactions,
            ttl: ttl.unwrap_or(shared.options.ttl),
        };
        let limit = shared.options.lock.wait_timeout();
        let decision = self.decide(&means, encoded, progress, limit).await;
        shared.announce_new(&encoded.key, &decision);
        decision
    }

    /// Runs `operation` exactly once per key, if all that it does is written through the transaction that it is given: its writes and the
    /// record of its value are committed together, or not at all.
    ///
    /// An `Ok` value is recorded as JSON, for [`Config::ttl`](crate::Config::ttl). An `Err` rolls back, and the next call runs the
    /// operation again. So does an operation that meets another transaction (`40001`, `40P01`), or is open for longer than
    /// [`Transactions::max_duration`]: [`Ran::StorageFailed`]. Dropping the future, or a panic, rolls back too. What an operation does
    /// elsewhere is not rolled back.
    ///
    #[cfg_attr(feature = "sqlite", doc = "```")]
    #[cfg_attr(not(feature = "sqlite"), doc = "```ignore")]
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("run-in-{}.db", std::process::id()));
    /// use idempotency_core::{
    ///     Config, Encoded, EncodedKey, Engine, Ran, SqliteStorage,
    ///     sqlx::{self, Sqlite},
    /// };
    ///
    /// let storage = SqliteStorage::open(&path).await?;
    /// storage.migrate().await?;
    /// sqlx::query("CREATE TABLE parcels (id INTEGER PRIMARY KEY)").execute(storage.pool()).await?;
    ///
    /// let engine = Engine::new(storage.clone(), Config::default());
    /// let message = Encoded { key: EncodedKey::from_bytes([7; 32]), fingerprint: None };
    /// for _ in 0..2 {
    ///     let ran: Ran<i64, sqlx::Error> = engine
    ///         .run_in::<Sqlite, _, _>(&message, async |transaction| {
    ///             let statement = "INSERT INTO parcels DEFAULT VALUES RETURNING id";
    ///             sqlx::query_scalar(statement).fetch_one(&mut **transaction).await
    ///         })
    ///         .await;
    ///     assert!(matches!(ran, Ran::Executed(1) | Ran::Replayed(1)), "{ran:?}");
    /// }
    /// # drop((engine, storage));
    /// # std::fs::remove_file(path)?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn run_in<DB, T, E>(
        &self,
        encoded: &Encoded,
        operation: impl AsyncFnOnce(&mut KeyTransaction<DB>) -> Result<T, E>,
    ) -> Ran<T, E>
    where
        DB: TransactionDatabase,
        T: Serialize + DeserializeOwned,
    {
        let progress = Progress::new();
        let claim = match self.begin_in_transaction(encoded, &progress, None).await {
            Decision::Execute(claim) => claim,
            Decision::Replay(replay) => return replayed(&replay.record.outcome),
            Decision::Refuse(refused) => return not_run(refused.refusal, refused.error),
            Decision::Unprotected => return not_run(Refusal::StorageUnavailable, None),
        };
        let mut transaction = match claim.slot().take::<DB>() {
            Ok(transaction) => transaction,
            Err(error) => {
                let _ = claim.roll_back().await;
                return Ran::StorageFailed(StorageError::unavailable(error));
            }
        };
        let ran = {
            let ran = pin!(operation(&mut transaction));
            let expired = pin!(claim.expired());
            match select(ran, expired).await {
                Either::Left((ran, _)) => Some(ran),
                Either::Right(_) => None,
            }
        };
        drop(transaction);
        let value = match ran {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                return match claim.roll_back().await {
                    RolledBack::Yes => Ran::Failed(error),
                    RolledBack::EndedByHand => Ran::NotReplayable(TombstoneReason::HandlerFailed),
                };
            }
            None => {
                let _ = claim.roll_back().await;
                return Ran::StorageFailed(StorageError::timeout());
            }
        };
        let written = catch_unwind(AssertUnwindSafe(|| serde_json::to_vec(&value)));
        let json = match written {
            Ok(Ok(json)) => json,
            Ok(Err(error)) => {
                let _ = claim.roll_back().await;
                return Ran::StorageFailed(StorageError::unavailable(error));
            }
            Err(panic) => {
                let _ = claim.roll_back().await;
                resume_unwind(panic);
            }
        };
        let response = StoredResponse::new(StatusCode::OK, &HeaderMap::new(), json);
        let outcome = Outcome::Response(response);
        match claim.commit(outcome, Writes::Keep).await {
            TransactionEnd::Committed => Ran::Executed(value),
            TransactionEnd::RolledBack(error)
            | TransactionEnd::Failed(error)
            | TransactionEnd::Unknown(error) => Ran::StorageFailed(error),
            TransactionEnd::EndedByHand | TransactionEnd::NotGivenBack => {
                Ran::NotReplayable(TombstoneReason::HandlerFailed)
            }
        }
    }
}

impl Means for ByTransaction {
    type Claim = TransactionClaim;

    async fn attempt(
        &self,
        engine: &Engine,
        encoded: &Encoded,
        progress: &Progress,
        waited: Duration,
    ) -> ControlFlow<Decision<TransactionClaim>, Waiter> {
        let shared = &engine.shared;
        let claim = match Claim::find_or_list(shared, encoded, progress) {
            ControlFlow::Continue(Some(claim)) => claim,
            ControlFlow::Continue(None) => {
                return ControlFlow::Break(engine.replay_only(encoded, waited).await);
            }
            ControlFlow::Break(Found::Outcome(record) | Found::GivenUp(record)) => {
                return ControlFlow::Break(replay(encoded, record, waited));
            }
            ControlFlow::Break(Found::Running {
                fingerprint,
                waiter,
            }) => return in_flight(encoded, fingerprint, waiter),
            ControlFlow::Break(Found::Nothing) => {
                return ControlFlow::Break(refused(Refusal::InFlight));
            }
        };
        progress.set(true);
        let attempt = self.ask(engine, encoded, claim, waited).await;
        if !matches!(attempt, ControlFlow::Break(Decision::Execute(_))) {
            progress.set(false);
        }
        attempt
    }
}

impl ByTransaction {
    /// Asks the storage for a transaction that holds the key.
    async fn ask(
        &self,
        engine: &Engine,
        encoded: &Encoded,
        claim: Claim,
        waited: Duration,
    ) -> ControlFlow<Decision<TransactionClaim>, Waiter> {
        let shared = &engine.shared;
        let new = NewTransaction {
            token: claim.token(),
            fingerprint: encoded.fingerprint,
            ttl: self.ttl,
        };
        let since = shared.options.now();
        let begun = self.transactions.begin(&encoded.key, &new);
        match shared.limited(begun).await {
            Ok(BeginTransaction::Acquired(transaction)) => {
                let deadline = since.saturating_add(self.transactions.max_duration());
                ControlFlow::Break(Decision::Execute(TransactionClaim {
                    slot: TransactionSlot::new(&claim, transaction, deadline),
                    claim: Some(claim),
                    transactions: self.transactions.clone(),
                    new,
                    since,
                }))
            }
            Ok(BeginTransaction::Completed(record)) => {
                claim.end_with(&record);
                ControlFlow::Break(replay(encoded, record, waited))
            }
            Ok(BeginTransaction::InFlight { fingerprint }) => {
                // Wakes one of those who wait for this run, who then waits for the one elsewhere too.
                drop(claim);
                engine.subscribe(encoded, fingerprint, waited)
            }
            Err(error) => {
                drop(claim);
                let refused = shared.unavailable(&encoded.key, Operation::Begin, error);
                ControlFlow::Break(Decision::Refuse(refused))
            }
        }
    }
}

/// The right to run an operation in a transaction. End it with [`commit`](Self::commit) or [`roll_back`](Self::roll_back).
///
/// Dropped before, the transaction is rolled back, as far as the database notices that its connection is closed.
#[must_use = "a claim that is dropped is rolled back, and the operation may run again"]
pub struct TransactionClaim {
    /// `None` once it has ended.
    claim: Option<Claim>,
    slot: TransactionSlot,
    transactions: Arc<dyn Transactions>,
    new: NewTransaction,
    since: Duration,
}

// Not `#[non_exhaustive]`: a caller that ignores a case tells a client that something was done which was not.
/// What came of a transaction; see [`TransactionClaim::commit`].
#[derive(Debug)]
#[must_use = "an operation that is rolled back did not happen"]
pub enum TransactionEnd {
    /// Writes and record are there.
    Committed,
    /// Nothing of it is there: it met another transaction, or the database failed. A retry may succeed.
    RolledBack(StorageError),
    /// A statement of the operation failed, and the operation took no notice; or a constraint does not hold at the commit. Nothing of it
    /// is there.
    Failed(StorageError),
    /// The connection was lost during the commit, and the database can't be asked. The next request with the key reads what became of it.
    Unknown(StorageError),
    /// The operation has ended the transaction itself. Its key has a tombstone, because what it had committed stays.
    EndedByHand,
    /// The operation has kept the transaction. It is rolled back from outside, where the database can do so.
    NotGivenBack,
}

impl TransactionClaim {
    /// Where the operation takes its transaction from.
    #[must_use]
    pub fn slot(&self) -> TransactionSlot {
        self.slot.clone()
    }

    /// Returns when the transaction has been open for longer than [`Transactions::max_duration`]. Then the operation is to be dropped
    /// and this claim to be rolled back.
    pub async fn expired(&self) {
        self.slot.expired().await;
    }

    /// Whether the operation has asked that its writes be kept whatever it answers.
    #[must_use]
    pub fn keeps_writes(&self) -> bool {
        self.slot.0.keeps_writes.load(Ordering::Relaxed)
    }

    /// Writes the record, and commits it with the operation's writes or without them.
    pub async fn commit(mut self, outcome: Outcome, writes: Writes) -> TransactionEnd {
        let record = Record {
            fingerprint: self.new.fingerprint,
            outcome,
        };
        let Some(transaction) = self.take_back() else {
            self.terminate().await;
            return TransactionEnd::NotGivenBack;
        };
        let (key, ttl) = (self.slot.0.key, self.new.ttl);
        let shared = self.slot.0.shared.clone();
        let committed = transaction.commit(record.clone(), ttl, writes).await;
        let end = match committed {
            Committed::Yes => {
                self.end_with(&record);
                return TransactionEnd::Committed;
            }
            Committed::EndedByHand => {
                self.leave_tombstone().await;
                return TransactionEnd::EndedByHand;
            }
            Committed::RolledBack(error) => TransactionEnd::RolledBack(error),
            Committed::Failed(error) => TransactionEnd::Failed(error),
            Committed::Unknown(error) => TransactionEnd::Unknown(error),
        };
        if let TransactionEnd::RolledBack(error) | TransactionEnd::Unknown(error) = &end {
            shared.failed(&key, Operation::Complete, error);
        }
        end
    }

    /// Ends it without a trace: a retry runs. Says whether that could be done: an operation that has ended its transaction itself leaves a
    /// tombstone.
    pub async fn roll_back(mut self) -> RolledBack {
        let rolled_back = match self.take_back() {
            Some(transaction) => transaction.roll_back().await,
            None => {
                self.terminate().await;
                RolledBack::Yes
            }
        };
        match rolled_back {
            RolledBack::EndedByHand => self.leave_tombstone().await,
            RolledBack::Yes => {
                let slot = &self.slot.0;
                slot.shared.options.emit(&Event::Released { key: slot.key });
            }
        }
        rolled_back
    }

    /// What the operation has committed by hand can't be undone, so it must not run again.
    async fn leave_tombstone(&mut self) {
        let tombstone = self.new.committed_by_hand();
        let NewTransaction { token, ttl, .. } = self.new;
        let (shared, key) = (self.slot.0.shared.clone(), self.slot.0.key);
        let stored = shared.storage.complete(&key, token, &tombstone, ttl);
        match shared.limited(stored).await {
            Ok(Held::Yes) => self.end_with(&tombstone),
            Ok(Held::Lost) => {}
            Err(error) => shared.failed(&key, Operation::Complete, &error),
        }
    }

    fn end_with(&mut self, record: &Record) {
        let Some(claim) = self.claim.take() else {
            return;
        };
        let slot = &self.slot.0;
        keeper::tell_observers(&slot.shared, &slot.key, self.since, record, Held::Yes);
        claim.end_with(record);
    }

    /// Closes the slot. `None`: the operation has not given the transaction back.
    fn take_back(&self) -> Option<Box<dyn Transaction>> {
        let mut state = self.slot.state();
        state.deadline = None;
        match std::mem::replace(&mut state.place, Place::Closed) {
            Place::Here(transaction) => Some(transaction),
            Place::Lent | Place::Closed => None,
        }
    }

    async fn terminate(&self) {
        let slot = &self.slot.0;
        let number = slot.number.load(Ordering::Relaxed);
        let terminated = slot.shared.limited(self.transactions.terminate(number));
        let error = terminated.await.err();
        tracing::error!(
            target: "idempotency",
            key = %slot.key,
            database = self.transactions.database(),
            error = error.as_ref().map(tracing::field::display),
            cure = "let the operation drop its transaction before it answers: don't leak it, and don't move it into a task",
            "an operation has not given its transaction back: it is rolled back"
        );
    }
}

impl Drop for TransactionClaim {
    fn drop(&mut self) {
        drop(self.take_back());
        // A claim at a recovery point stays, for a retry to go on there.
        let slot = &self.slot.0;
        let _ = slot.shared.runs.change(slot.token, |run| run.lend());
    }
}

impl fmt::Debug for TransactionClaim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransactionClaim")
            .field("key", &self.slot.0.key)
            .finish_non_exhaustive()
    }
}

/// Where an operation takes its transaction from, and where the transaction goes when the operation drops it. Clones share it.
#[derive(Clone)]
pub struct TransactionSlot(Arc<Slot>);

struct Slot {
    shared: Arc<Shared>,
    key: EncodedKey,
    token: Token,
    number: AtomicI64,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<SlotState>,
    /// The deadline is another.
    changed: Notify,
    keeps_writes: AtomicBool,
}

struct SlotState {
    place: Place,
    /// When the open transaction has to end; `None` between two phases.
    deadline: Option<Duration>,
}

enum Place {
    Here(Box<dyn Transaction>),
    Lent,
    /// The operation is over. What is given back now is rolled back.
    Closed,
}

/// Why an operation does not get a transaction; see [`TransactionSlot::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NotLent {
    /// The operation has it already.
    Taken,
    /// The storage lends transactions of another database.
    OtherDatabase,
}

impl fmt::Display for NotLent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Taken => "the transaction is taken already",
            Self::OtherDatabase => "the storage lends transactions of another database",
        })
    }
}

impl std::error::Error for NotLent {}

impl TransactionSlot {
    fn new(claim: &Claim, transaction: Box<dyn Transaction>, deadline: Duration) -> Self {
        Self(Arc::new(Slot {
            shared: claim.shared.clone(),
            key: claim.key(),
            token: claim.token(),
            number: AtomicI64::new(transaction.number()),
            state: Mutex::new(SlotState {
                place: Place::Here(transaction),
                deadline: Some(deadline),
            }),
            changed: Notify::new(),
            keeps_writes: AtomicBool::new(false),
        }))
    }

    /// Lends the transaction, until it is dropped.
    ///
    /// # Errors
    ///
    /// If it is lent already, or is one of another database.
    pub fn take<DB: TransactionDatabase>(&self) -> Result<KeyTransaction<DB>, NotLent> {
        let mut state = self.state();
        match std::mem::replace(&mut state.place, Place::Lent) {
            Place::Here(transaction) => {
                if !(&*transaction as &dyn Any).is::<DB::Transaction>() {
                    state.place = Place::Here(transaction);
                    return Err(NotLent::OtherDatabase);
                }
                let any: Box<dyn Any> = transaction;
                match any.downcast() {
                    Ok(transaction) => Ok(KeyTransaction {
                        transaction: Some(transaction),
                        slot: self.clone(),
                    }),
                    Err(_) => Err(NotLent::OtherDatabase),
                }
            }
            other => {
                state.place = other;
                Err(NotLent::Taken)
            }
        }
    }

    fn give_back(&self, transaction: Box<dyn Transaction>) {
        let mut state = self.state();
        if matches!(state.place, Place::Lent) {
            state.place = Place::Here(transaction);
            return;
        }
        drop(state);
        // Not under the lock: it closes its connection.
        drop(transaction);
    }

    async fn expired(&self) {
        let options = &self.0.shared.options;
        loop {
            let changed = self.0.changed.notified();
            let deadline = self.state().deadline;
            match deadline.map(|deadline| deadline.saturating_sub(options.now())) {
                Some(Duration::ZERO) => return,
                Some(left) => {
                    select(pin!(options.env.sleep(left)), pin!(changed)).await;
                }
                None => changed.await,
            }
        }
    }

    fn set_deadline(&self, deadline: Option<Duration>) {
        self.state().deadline = deadline;
        self.0.changed.notify_one();
    }

    /// The state stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
    fn state(&self) -> MutexGuard<'_, SlotState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for TransactionSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransactionSlot")
            .field("key", &self.0.key)
            .finish_non_exhaustive()
    }
}

/// The transaction of an operation: a connection for its statements, whose writes are committed with the record.
///
/// A `begin` on it makes a savepoint. Dropped, it goes back; how the operation ends decides what becomes of its writes.
///
/// # Recovery points
///
/// An operation that calls others, a payment provider say, can't hold a transaction open meanwhile, and can't undo the call. It commits
/// its work in phases: [`between`](Self::between) ends a phase, makes the call outside of any transaction, and opens the next one. When
/// the process dies, a retry is told [where](Self::recovery_point) the attempt before it stopped. From the first phase's end on the key
/// has a claim with a lease, which is renewed, so nobody goes on there beside the original.
pub struct KeyTransaction<DB: TransactionDatabase> {
    /// There is one until this is dropped.
    transaction: Option<Box<DB::Transaction>>,
    slot: TransactionSlot,
}

impl<DB: TransactionDatabase> KeyTransaction<DB> {
    /// The last recovery point that this operation has reached, in this attempt or in one before; `None` if it is at its start.
    #[must_use]
    pub fn recovery_point(&self) -> Option<&str> {
        self.shared().recovery_point()
    }

    /// Commits what was written so far, together with `point`, and opens the next phase.
    ///
    /// # Errors
    ///
    /// As [`between`](Self::between).
    pub async fn advance(&mut self, point: &str) -> Result<(), PhaseError> {
        self.between(point, std::future::ready(())).await
    }

    /// Commits what was written so far, together with `point`, waits for `work` outside of any transaction, and opens the next phase.
    ///
    /// `work` is renewed a claim for, up to [`LockPolicy::max_hold`](crate::LockPolicy::max_hold) for the whole operation. If the process
    /// dies in it, a retry finds `point` and does the work again: give it a stable key of its own,
    /// [`EncodedKey::derive`](crate::EncodedKey::derive).
    ///
    /// # Errors
    ///
    /// If the database fails, or the claim was lost meanwhile. End the operation with an error then: nothing can be written through this
    /// any more.
    pub async fn between<T>(
        &mut self,
        point: &str,
        work: impl Future<Output = T>,
    ) -> Result<T, PhaseError> {
        let slot = self.slot.clone();
        let Slot {
            shared,
            token,
            number,
            ..
        } = &*slot.0;
        let options = &shared.options;
        let transaction = self.exclusive();
        transaction.end_phase(point, options.lease()).await?;
        slot.set_deadline(None);
        let now = options.now();
        let hold_limit = options.lock.longest_hold();
        let _ = shared.runs.change(*token, |run| {
            run.hold(now, run.since.saturating_add(hold_limit));
        });
        keeper::wake(shared);
        let value = work.await;
        if shared.runs.change(*token, |run| run.lend()) != Some(true) {
            transaction.refuse_writes().await;
            return Err(PhaseError::Lost);
        }
        if let Some(transactions) = &shared.transactions {
            let deadline = options.now().saturating_add(transactions.max_duration());
            slot.set_deadline(Some(deadline));
        }
        transaction.begin_phase().await?;
        number.store(transaction.number(), Ordering::Relaxed);
        Ok(value)
    }

    /// Keeps what this operation writes, and records its answer, whatever that is. Without it, an answer that is no success and no
    /// redirect undoes the writes.
    pub fn keep_writes(&mut self) {
        self.slot.0.keeps_writes.store(true, Ordering::Relaxed);
    }

    #[expect(clippy::expect_used, reason = "it is taken by `drop` alone")]
    fn shared(&self) -> &DB::Transaction {
        self.transaction
            .as_ref()
            .expect("a transaction until it is dropped")
    }

    #[expect(clippy::expect_used, reason = "it is taken by `drop` alone")]
    fn exclusive(&mut self) -> &mut DB::Transaction {
        self.transaction
            .as_mut()
            .expect("a transaction until it is dropped")
    }
}

impl<DB: TransactionDatabase> Deref for KeyTransaction<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        self.shared()
    }
}

impl<DB: TransactionDatabase> DerefMut for KeyTransaction<DB> {
    fn deref_mut(&mut self) -> &mut DB::Connection {
        self.exclusive()
    }
}

impl<DB: TransactionDatabase> Drop for KeyTransaction<DB> {
    fn drop(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            self.slot.give_back(transaction);
        }
    }
}

impl<DB: TransactionDatabase> fmt::Debug for KeyTransaction<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyTransaction")
            .field("key", &self.slot.0.key)
            .field("recovery_point", &self.recovery_point())
            .finish_non_exhaustive()
    }
}
