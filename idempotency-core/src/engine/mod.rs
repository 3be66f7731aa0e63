//! Decides what a request gets, and keeps the claim while its operation runs. Knows nothing of HTTP.
//!
//! [`Engine::begin`] answers with a [`Decision`]. On [`Decision::Execute`] the caller runs the operation and ends the
//! [`Claim`]; the engine's *keeper*, one task for all claims, renews it meanwhile, so how long an operation takes, or whether
//! it blocks its thread, does not matter. The [`Runs`] list the operations of this process: their
//! duplicates wait here and do not ask the storage, whatever the storage says about the lease.

use std::{
    fmt,
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio::sync::Notify;

use self::{
    options::Options,
    runs::{Found, Runs},
    waiters::Waiter,
};
use crate::{
    AnyStorage, Begin, Config, Encoded, EncodedKey, Entry, Event, Fingerprint, Held, NewClaim,
    OnStorageError, OnUnreadable, Operation, Record, Refusal, Storage, StorageError,
    StorageErrorKind,
};

mod call;
mod claim;
mod keeper;
mod options;
mod releases;
mod run;
mod runs;
mod turn;
mod waiters;

pub use self::{
    call::Ran,
    claim::{Claim, Completion},
    turn::{ManualDecision, Turn},
};

/// Runs operations at most once per key; clones share everything.
///
/// ```
/// # #[cfg(feature = "memory")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use http::{HeaderMap, StatusCode};
/// use idempotency_core::{
///     Config, Decision, Encoded, EncodedKey, Engine, MemoryStorage, Outcome, StoredResponse,
/// };
///
/// let engine = Engine::new(MemoryStorage::new(), Config::default());
/// let message = Encoded { key: EncodedKey::from_bytes([7; 32]), fingerprint: None };
///
/// let Decision::Execute(claim) = engine.begin(&message).await else { panic!("the key is new") };
/// let answer = StoredResponse::new(StatusCode::CREATED, &HeaderMap::new(), "order 1");
/// let _ = claim.complete(answer.clone()).await;
///
/// let Decision::Replay(replay) = engine.begin(&message).await else { panic!("the key has a record") };
/// assert_eq!(replay.record.outcome, Outcome::Response(answer));
/// # }
/// # #[cfg(not(feature = "memory"))]
/// # fn main() {}
/// ```
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    storage: AnyStorage,
    options: Options,
    runs: Runs,
    /// For [`Engine::config`]. The engine itself reads its `options`.
    config: Config,
}

// Not `#[non_exhaustive]`: a caller that ignores a case runs an operation twice or not at all.
/// What to do with a request; see [`Engine::begin`].
#[derive(Debug)]
#[must_use = "only `Execute` and `Unprotected` allow the operation to run"]
pub enum Decision {
    /// Run the operation, then end the claim.
    Execute(Claim),
    /// It ran before: answer with its outcome.
    Replay(Replay),
    /// Don't run it, and tell the client why.
    Refuse(Refused),
    /// The storage failed, and the configuration says to run the operation all the same.
    Unprotected,
}

/// A recorded outcome, for a retry; see [`Decision::Replay`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Replay {
    /// The record of the first execution.
    pub record: Record,
    /// How long this duplicate waited for the running original; zero if the record was there at once.
    pub waited: Duration,
}

/// Why the operation does not run; see [`Decision::Refuse`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// The kind of refusal.
    pub refusal: Refusal,
    /// The error of the storage, if it caused the refusal.
    pub error: Option<StorageError>,
}

impl Refused {
    fn new(refusal: Refusal) -> Self {
        Self {
            refusal,
            error: None,
        }
    }
}

/// Tells whether an unfinished [`Engine::begin_with`] may be dropped without leaving a claim behind.
///
/// Once a claim may have been taken, the future and the operation that follows it should be run to their end.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<ProgressState>);

#[derive(Debug, Default)]
struct ProgressState {
    committed: AtomicBool,
    given_up: AtomicBool,
    gave_up: Notify,
}

impl Progress {
    /// Nothing has begun.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a claim is, or may have been, taken.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        self.0.committed.load(Ordering::Relaxed)
    }

    fn set(&self, committed: bool) {
        // Read only when the future is dropped, never while it is polled, so no order has to be kept.
        self.0.committed.store(committed, Ordering::Relaxed);
    }

    /// Whether the claim was held longer than [`LockPolicy::max_hold`](crate::LockPolicy::max_hold) and has been given up: its key
    /// has a tombstone, and an operation whose client is gone is of no use any more.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        self.0.given_up.load(Ordering::Acquire)
    }

    /// Returns once the claim has been [given up](Self::is_given_up); never, if it ends before.
    pub async fn given_up(&self) {
        let mut gave_up = pin!(self.0.gave_up.notified());
        // Enabled before the look, so that a claim that is given up in between is not missed.
        gave_up.as_mut().enable();
        if !self.is_given_up() {
            gave_up.await;
        }
    }

    /// Marks the claim as given up, as the engine does; for tests.
    #[doc(hidden)]
    pub fn give_up(&self) {
        self.0.given_up.store(true, Ordering::Release);
        self.0.gave_up.notify_waiters();
    }
}

/// How long a duplicate pauses after the storage failed to wait for it.
const WAIT_FAILED_PAUSE: Duration = Duration::from_millis(50);

/// The result of one look at the runs and the storage.
enum Attempt {
    Decided(Decision),
    InFlight(Waiter),
    Again,
}

impl Engine {
    /// An engine that keeps claims and records in `storage`.
    pub fn new(storage: impl Storage, config: Config) -> Self {
        let options = Options::of(&config);
        Self {
            shared: Arc::new(Shared {
                storage: AnyStorage::new(storage),
                runs: Runs::new(options.max_running, options.max_waiting),
                options,
                config,
            }),
        }
    }

    /// Decides what a request gets, waiting up to [`LockPolicy::timeout`](crate::LockPolicy::timeout) for a running original.
    ///
    /// If the future is dropped, a background task releases the claim that it may have taken, as far as the storage answers. To leave
    /// no claim behind, don't drop it: see [`begin_with`](Self::begin_with).
    pub async fn begin(&self, encoded: &Encoded) -> Decision {
        self.begin_with(encoded, &Progress::new()).await
    }

    /// [`begin`](Self::begin), with a `progress` that tells whether the future may be dropped.
    pub async fn begin_with(&self, encoded: &Encoded, progress: &Progress) -> Decision {
        let limit = self.shared.options.lock.wait_timeout();
        let decision = self.decide(encoded, progress, limit).await;
        self.shared.announce(&encoded.key, &decision);
        decision
    }

    /// Decides, waiting up to `limit` for a running original. Emits no event for the decision.
    async fn decide(&self, encoded: &Encoded, progress: &Progress, limit: Duration) -> Decision {
        let shared = &self.shared;
        let waiters = &shared.runs.waiters;
        let env = &shared.options.env;
        let mut waiting: Option<Waiting<'_>> = None;
        let mut waited_here = false;
        let mut wake = Wake {
            shared,
            key: &encoded.key,
            is_ours: false,
        };
        loop {
            let waited = waiting.as_ref().map_or(Duration::ZERO, Waiting::waited);
            let waiter = match self.attempt(encoded, progress, waited).await {
                Attempt::Decided(decision) => {
                    wake.is_ours &= !matches!(decision, Decision::Execute(_));
                    return decision;
                }
                Attempt::InFlight(waiter) => waiter,
                Attempt::Again => continue,
            };
            progress.set(false);
            // An operation runs, and wakes a waiter when it ends.
            wake.is_ours = false;
            if waited_here && !waiter.is_local() {
                // The key is claimed elsewhere now, which the waiters of this process do not know.
                waiters.wake_one_here(&encoded.key);
            }
            waited_here = waiter.is_local();
            if waiting.is_none() {
                waiting = shared.start_waiting(&encoded.key, env.now());
                if waiting.is_none() {
                    return Decision::Refuse(Refused::new(Refusal::Overloaded));
                }
            }
            let waited = waiting.as_ref().map_or(Duration::ZERO, Waiting::waited);
            let left = limit.saturating_sub(waited);
            if left.is_zero() {
                return Decision::Refuse(Refused::new(Refusal::InFlight));
            }
            let outcome = Box::pin(shared.wait(&encoded.key, waiter, left)).await;
            if let Some(record) = outcome {
                let waited = waiting.as_ref().map_or(Duration::ZERO, Waiting::waited);
                return replay(encoded, record, waited);
            }
            wake.is_ours = true;
        }
    }

    /// The claim or record of `key` in the storage.
    ///
    /// # Errors
    ///
    /// If the storage fails, or the record can't be read.
    pub async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        let shared = &self.shared;
        shared.limited(shared.storage.get(key)).await
    }

    /// Replaces the completed record of `key`, or one that is still to be stored, and restarts its TTL. Does nothing if there is none.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    pub async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let shared = &self.shared;
        let expires = shared.options.now().saturating_add(ttl);
        if shared.runs.replace(key, record, expires) {
            return Ok(());
        }
        shared
            .limited(shared.storage.replace(key, record, ttl))
            .await
    }

    /// Removes the record or claim of `key`, readable or not, so that the next request runs. Returns whether there was one.
    ///
    /// Removing a claim does not stop the operation that holds it.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    pub async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let shared = &self.shared;
        // Read first: a run that claims the key after the removal must not be forgotten.
        let holder = shared.runs.holder(key);
        let removed = shared.limited(shared.storage.remove(key)).await?;
        let forgotten = shared.runs.forget(key, holder);
        Ok(removed || forgotten)
    }

    /// How many operations of this engine run, or have an outcome that is still to be stored.
    #[must_use]
    pub fn running(&self) -> usize {
        self.shared.runs.running()
    }

    /// How many duplicates wait in this engine.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.runs.waiting()
    }

    /// Returns once no operation of this engine runs and every outcome is stored or given up.
    ///
    /// For shutdown: stop taking requests, then drain, under a time limit of your own (an outcome that a dead storage can't
    /// take is tried until its TTL is over).
    pub async fn drain(&self) {
        // Runs that ended outside a runtime, or in one that has ended, are still to be released at the storage.
        keeper::wake(&self.shared);
        self.shared.runs.drained().await;
    }

    /// The configuration of this engine.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// Where this engine keeps claims and records.
    #[must_use]
    pub fn storage(&self) -> &AnyStorage {
        &self.shared.storage
    }

    /// One look at the runs and, where they do not know, one atomic step of the storage.
    async fn attempt(&self, encoded: &Encoded, progress: &Progress, waited: Duration) -> Attempt {
        let shared = &self.shared;
        let key = &encoded.key;
        match shared.runs.find(key, shared.options.now()) {
            Found::Outcome(record) | Found::GivenUp(record) => {
                return Attempt::Decided(replay(encoded, record, waited));
            }
            Found::Running {
                fingerprint,
                waiter,
            } => return in_flight(encoded, fingerprint, waiter),
            Found::Nothing => {}
        }
        if !shared.options.lock.is_enabled() {
            return Attempt::Decided(self.look_up(encoded, progress, waited).await);
        }
        let Some(begun) = claim::Begun::enter(shared, *key) else {
            return Attempt::Decided(self.replay_only(encoded, waited).await);
        };
        progress.set(true);
        let attempt = self.claim(encoded, begun, progress, waited).await;
        if !matches!(attempt, Attempt::Decided(Decision::Execute(_))) {
            progress.set(false);
        }
        attempt
    }

    /// The atomic step.
    async fn claim(
        &self,
        encoded: &Encoded,
        begun: claim::Begun,
        progress: &Progress,
        waited: Duration,
    ) -> Attempt {
        let shared = &self.shared;
        let new = NewClaim {
            token: begun.token(),
            fingerprint: encoded.fingerprint,
            lease: shared.options.lease(),
        };
        let mut since = shared.options.now();
        let mut clearing = None;
        let mut answer = shared
            .limited(shared.storage.begin(&encoded.key, &new))
            .await;
        if shared.is_to_be_cleared(&answer) {
            clearing = shared.runs.clear(&encoded.key);
            if clearing.is_none() {
                begun.not_acquired();
                return match shared.runs.subscribe(&encoded.key, shared.options.now()) {
                    Ok(waiter) => Attempt::InFlight(waiter),
                    Err(record) => Attempt::Decided(replay(encoded, record, waited)),
                };
            }
            since = shared.options.now();
            answer = Box::pin(shared.clear_and_begin(&encoded.key, &new)).await;
        }
        // Until the run is listed, or it is known that there is none.
        let _clearing = clearing;
        match answer {
            Ok(Begin::Acquired) => {
                // The answer may have taken so long that the lease is over by now.
                if shared.has_aged(since) {
                    since = shared.options.now();
                    let renewed = shared.storage.renew(&encoded.key, new.token, new.lease);
                    match shared.limited(renewed).await {
                        Ok(Held::Yes) => {}
                        Ok(Held::Lost) => {
                            begun.not_acquired();
                            return Attempt::Again;
                        }
                        Err(error) => {
                            begun.unknown();
                            let refused =
                                shared.storage_failed(&encoded.key, Operation::Renew, error);
                            return Attempt::Decided(refused);
                        }
                    }
                    if shared.has_aged(since) {
                        // Too slow for this lease: it would be over before the keeper could renew it.
                        begun.unknown();
                        let error = StorageError::timeout();
                        let refused = shared.storage_failed(&encoded.key, Operation::Renew, error);
                        return Attempt::Decided(refused);
                    }
                }
                let claim = begun.acquired(encoded.fingerprint, since, progress);
                Attempt::Decided(Decision::Execute(claim))
            }
            Ok(Begin::Completed(record)) => {
                begun.not_acquired();
                Attempt::Decided(replay(encoded, record, waited))
            }
            Ok(Begin::InFlight { fingerprint, .. }) => {
                begun.not_acquired();
                match shared.runs.subscribe(&encoded.key, shared.options.now()) {
                    Ok(waiter) => in_flight(encoded, fingerprint, waiter),
                    Err(record) => Attempt::Decided(replay(encoded, record, waited)),
                }
            }
            Err(error) => {
                match error.kind() {
                    // The storage answered, so it is known that nothing was claimed.
                    StorageErrorKind::Full | StorageErrorKind::Unreadable => begun.not_acquired(),
                    _ => begun.unknown(),
                }
                Attempt::Decided(shared.storage_failed(&encoded.key, Operation::Begin, error))
            }
        }
    }
}

/// The permit of a release, which one waiter got. If that one does not run, it passes the permit on.
struct Wake<'a> {
    shared: &'a Shared,
    key: &'a EncodedKey,
    is_ours: bool,
}

impl Drop for Wake<'_> {
    fn drop(&mut self) {
        if self.is_ours {
            self.shared.runs.waiters.wake_one(self.key);
        }
    }
}

/// A duplicate that waits: since when, and its place under `max_waiting`.
struct Waiting<'a> {
    shared: &'a Shared,
    since: Duration,
}

impl Waiting<'_> {
    fn waited(&self) -> Duration {
        self.shared.options.now().saturating_sub(self.since)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.runs.stop_waiting();
    }
}

impl Engine {
    /// For `LockPolicy::disabled`: looks for a record and claims nothing.
    async fn look_up(&self, encoded: &Encoded, progress: &Progress, waited: Duration) -> Decision {
        let shared = &self.shared;
        match self.get(&encoded.key).await {
            Ok(Some(Entry::Completed(record))) => replay(encoded, record, waited),
            Ok(Some(Entry::Claimed { fingerprint, .. }))
                if differ(fingerprint, encoded.fingerprint) =>
            {
                Decision::Refuse(Refused::new(Refusal::KeyReused))
            }
            Ok(_) => match claim::Begun::enter(shared, encoded.key) {
                Some(begun) => {
                    let claim = begun.without_claim(encoded.fingerprint, progress);
                    progress.set(true);
                    Decision::Execute(claim)
                }
                None => Decision::Refuse(Refused::new(Refusal::Overloaded)),
            },
            Err(error) => shared.storage_failed(&encoded.key, Operation::Get, error),
        }
    }

    /// At `max_running`: answers retries, and refuses operations that would run.
    async fn replay_only(&self, encoded: &Encoded, waited: Duration) -> Decision {
        let shared = &self.shared;
        match self.get(&encoded.key).await {
            Ok(Some(Entry::Completed(record))) => replay(encoded, record, waited),
            Ok(_) => Decision::Refuse(Refused::new(Refusal::Overloaded)),
            Err(error) => shared.storage_failed(&encoded.key, Operation::Get, error),
        }
    }
}

impl Shared {
    /// Whether half the lease has passed since `since`.
    fn has_aged(&self, since: Duration) -> bool {
        let age = self.options.now().saturating_sub(since);
        age >= self.options.lease() / 2
    }

    /// Whether an unreadable record is in the way and is to be treated as absent.
    fn is_to_be_cleared(&self, begin: &Result<Begin, StorageError>) -> bool {
        let unreadable =
            matches!(begin, Err(error) if error.kind() == StorageErrorKind::Unreadable);
        unreadable && self.options.on_unreadable == OnUnreadable::TreatAsAbsent
    }

    /// `Storage::begin` in the place of an unreadable record, if it is still there.
    async fn clear_and_begin(
        &self,
        key: &EncodedKey,
        new: &NewClaim,
    ) -> Result<Begin, StorageError> {
        let begin = self.limited(self.storage.begin(key, new)).await;
        if !self.is_to_be_cleared(&begin) {
            return begin;
        }
        if let Err(error) = &begin {
            self.failed(key, Operation::Begin, error);
        }
        self.limited(self.storage.remove(key)).await?;
        self.limited(self.storage.begin(key, new)).await
    }

    /// Emits the event of a decision.
    fn announce(&self, key: &EncodedKey, decision: &Decision) {
        let key = *key;
        self.options.emit(&match decision {
            Decision::Execute(_) => Event::Executing { key },
            Decision::Replay(replay) => Event::Replayed {
                key,
                waited: replay.waited,
            },
            Decision::Refuse(refused) => Event::Refused {
                key: Some(key),
                refusal: refused.refusal,
            },
            Decision::Unprotected => Event::Unprotected { key },
        });
    }

    fn failed(&self, key: &EncodedKey, operation: Operation, error: &StorageError) {
        self.options.emit(&Event::StorageFailed {
            key: *key,
            operation,
            error,
        });
    }

    fn storage_failed(
        &self,
        key: &EncodedKey,
        operation: Operation,
        error: StorageError,
    ) -> Decision {
        self.failed(key, operation, &error);
        match self.options.on_storage_error {
            OnStorageError::RunUnprotected => Decision::Unprotected,
            OnStorageError::Reject => Decision::Refuse(Refused {
                refusal: Refusal::StorageUnavailable,
                error: Some(error),
            }),
        }
    }

    /// Takes a place under `max_waiting`, if there is one.
    fn start_waiting(&self, key: &EncodedKey, now: Duration) -> Option<Waiting<'_>> {
        if !self.runs.start_waiting() {
            return None;
        }
        self.options.emit(&Event::Waiting { key: *key });
        Some(Waiting {
            shared: self,
            since: now,
        })
    }

    /// Waits until the running original may have ended, `limit` at most. Returns its record, if this process has it.
    async fn wait(&self, key: &EncodedKey, waiter: Waiter, limit: Duration) -> Option<Record> {
        let is_local = waiter.is_local();
        let woken = pin!(waiter.woken());
        let over = pin!(self.options.env.sleep(limit));
        if is_local {
            return outcome_of(select(woken, over).await);
        }
        // The storage pushes or polls. What this process does to the key meanwhile wakes us too: it may begin to run here.
        let elsewhere = pin!(async {
            if let Err(error) = self.storage.wait(key, limit).await {
                self.failed(key, Operation::Wait, &error);
                // The caller asks the storage again, but not in a tight loop.
                self.options.env.sleep(WAIT_FAILED_PAUSE).await;
            }
        });
        outcome_of(select(woken, select(elsewhere, over)).await)
    }

    /// `operation` under the storage's time limit.
    async fn limited<T>(
        &self,
        operation: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        self.limited_to(self.options.storage_timeout, operation)
            .await
    }

    async fn limited_to<T>(
        &self,
        limit: Duration,
        operation: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        let done = self.options.env.within(limit, operation).await;
        done.unwrap_or_else(|| Err(StorageError::timeout()))
    }
}

/// The record that the waiter was handed, unless something else came first.
fn outcome_of<A, B>(first: Either<(Option<Record>, A), B>) -> Option<Record> {
    match first {
        Either::Left((outcome, _)) => outcome,
        Either::Right(_) => None,
    }
}

/// A duplicate of a running operation, or another request under its key.
fn in_flight(encoded: &Encoded, running: Option<Fingerprint>, waiter: Waiter) -> Attempt {
    if differ(running, encoded.fingerprint) {
        return Attempt::Decided(Decision::Refuse(Refused::new(Refusal::KeyReused)));
    }
    Attempt::InFlight(waiter)
}

/// A retry of the operation that left `record`, or another request under its key.
fn replay(encoded: &Encoded, record: Record, waited: Duration) -> Decision {
    if differ(record.fingerprint, encoded.fingerprint) {
        return Decision::Refuse(Refused::new(Refusal::KeyReused));
    }
    Decision::Replay(Replay { record, waited })
}

/// Whether both requests are known, and not the same.
fn differ(one: Option<Fingerprint>, other: Option<Fingerprint>) -> bool {
    matches!((one, other), (Some(one), Some(other)) if one != other)
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("storage", &self.shared.storage)
            .field("running", &self.running())
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}
