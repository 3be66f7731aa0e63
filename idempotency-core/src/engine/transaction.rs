//! Operations that run in a transaction of the storage's database: claim, writes and record are committed together.
//!
//! There is no lease: the open transaction is the claim. Its run is listed here before the storage is asked, so the duplicates of this
//! process wait in memory, without a connection.

use std::{
    any::Any,
    fmt,
    ops::{ControlFlow, Deref, DerefMut},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::Duration,
};

use futures_util::future::select;
use tokio::sync::Notify;

use super::{
    Claim, Decision, Engine, Progress, Shared,
    decide::{Attempt, Means, Request},
    keeper,
    run::Answer,
};
use crate::{
    BeginTransaction, Committed, Encoded, EncodedKey, Event, NewTransaction, Operation, Outcome,
    PhaseError, RolledBack, StorageError, Token, TombstoneReason, Transaction, TransactionDatabase,
    Transactions, Writes,
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
            ttl: ttl.unwrap_or(shared.config.ttl),
        };
        let request = self.request(encoded, progress);
        let decision = request.decide(&means, self.wait_limit()).await;
        shared.announce(&encoded.key, &decision);
        decision
    }
}

impl Means for ByTransaction {
    type Claim = TransactionClaim;

    fn enter(&self, request: Request<'_>, now: Duration) -> ControlFlow<Answer, Option<Claim>> {
        Claim::list(request, now, self.ttl)
    }

    async fn ask(
        &self,
        request: Request<'_>,
        mut claim: Claim,
        since: Duration,
    ) -> Attempt<TransactionClaim> {
        let (shared, encoded) = (request.shared, request.encoded);
        let new = NewTransaction {
            token: claim.token(),
            fingerprint: encoded.fingerprint,
            ttl: self.ttl,
        };
        let begun = self.transactions.begin(&encoded.key, &new);
        match shared.limited(begun).await {
            Ok(BeginTransaction::Acquired(transaction)) => {
                let deadline = since.saturating_add(self.transactions.max_duration());
                Attempt::Decided(Decision::Execute(TransactionClaim {
                    slot: TransactionSlot::new(&claim, transaction, deadline),
                    claim,
                    transactions: self.transactions.clone(),
                    ttl: self.ttl,
                    since,
                }))
            }
            Ok(BeginTransaction::Completed(record)) => {
                claim.end_with(&record);
                Attempt::Found(record)
            }
            Ok(BeginTransaction::InFlight { fingerprint }) => {
                // Wakes one of those who wait for this run, who then waits for the one elsewhere too.
                drop(claim);
                request.subscribe(fingerprint, Duration::ZERO)
            }
            Err(error) => {
                drop(claim);
                let refused = shared.unavailable(&encoded.key, Operation::Begin, error);
                Attempt::Decided(Decision::Refuse(refused))
            }
        }
    }
}

/// The right to run an operation in a transaction. End it with [`commit`](Self::commit) or [`roll_back`](Self::roll_back).
///
/// Dropped before, the transaction is rolled back, as far as the database notices that its connection is closed.
#[must_use = "a claim that is dropped is rolled back, and the operation may run again"]
pub struct TransactionClaim {
    claim: Claim,
    slot: TransactionSlot,
    transactions: Arc<dyn Transactions>,
    ttl: Duration,
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
        let record = self.claim.record(outcome);
        let Some(transaction) = self.take_back() else {
            self.terminate().await;
            return TransactionEnd::NotGivenBack;
        };
        let committed = transaction.commit(record.clone(), self.ttl, writes).await;
        match committed {
            Committed::Yes => {
                let key = self.claim.key();
                self.claim.shared.announce_stored(&key, self.since, &record);
                self.claim.end_with(&record);
                TransactionEnd::Committed
            }
            Committed::EndedByHand => {
                self.leave_tombstone().await;
                TransactionEnd::EndedByHand
            }
            Committed::RolledBack(error) => {
                self.failed(&error);
                TransactionEnd::RolledBack(error)
            }
            Committed::Failed(error) => TransactionEnd::Failed(error),
            Committed::Unknown(error) => {
                self.failed(&error);
                TransactionEnd::Unknown(error)
            }
        }
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
                let key = self.claim.key();
                self.claim.shared.emit(&Event::Released { key });
            }
        }
        rolled_back
    }

    /// What the operation has committed by hand can't be undone, so it must not run again.
    async fn leave_tombstone(&mut self) {
        let tombstone = Outcome::Tombstone(TombstoneReason::HandlerFailed);
        let _ = self.claim.finish(tombstone).await;
    }

    fn failed(&self, error: &StorageError) {
        let Claim { shared, .. } = &self.claim;
        shared.failed(&self.claim.key(), Operation::Complete, error);
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
        let lent = match std::mem::replace(&mut state.place, Place::Lent) {
            Place::Here(lent) if (&*lent as &dyn Any).is::<DB::Transaction>() => lent,
            other => {
                let not_lent = match &other {
                    Place::Here(_) => NotLent::OtherDatabase,
                    Place::Lent | Place::Closed => NotLent::Taken,
                };
                state.place = other;
                return Err(not_lent);
            }
        };
        let lent: Box<dyn Any> = lent;
        let transaction = lent.downcast().map_err(|_| NotLent::OtherDatabase)?;
        Ok(KeyTransaction {
            transaction: Some(transaction),
            slot: self.clone(),
        })
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
        let shared = &self.0.shared;
        loop {
            let changed = self.0.changed.notified();
            let deadline = self.state().deadline;
            match deadline.map(|deadline| deadline.saturating_sub(shared.now())) {
                Some(Duration::ZERO) => return,
                Some(left) => {
                    select(pin!(shared.config.env.sleep(left)), pin!(changed)).await;
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
        self.transaction.as_ref()?.recovery_point()
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
        // There is one until this is dropped.
        let transaction = self.transaction.as_mut().ok_or(PhaseError::Lost)?;
        transaction.end_phase(point, shared.lease()).await?;
        slot.set_deadline(None);
        let now = shared.now();
        let hold_limit = shared.config.lock.longest_hold();
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
            let deadline = shared.now().saturating_add(transactions.max_duration());
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
}

impl<DB: TransactionDatabase> Deref for KeyTransaction<DB> {
    type Target = DB::Connection;

    #[expect(clippy::expect_used, reason = "it is taken by `drop` alone")]
    fn deref(&self) -> &DB::Connection {
        self.transaction
            .as_ref()
            .expect("a transaction until it is dropped")
    }
}

impl<DB: TransactionDatabase> DerefMut for KeyTransaction<DB> {
    #[expect(clippy::expect_used, reason = "it is taken by `drop` alone")]
    fn deref_mut(&mut self) -> &mut DB::Connection {
        self.transaction
            .as_mut()
            .expect("a transaction until it is dropped")
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
