//! The way of a request to its decision.
//!
//! Each attempt looks at what runs in this process and, if that does not know the key, takes one atomic step at the storage. A
//! duplicate of a running operation waits, and then attempts again.

use std::{future::Future, ops::ControlFlow, sync::Arc, time::Duration};

use futures_util::FutureExt;

use super::{
    Claim, Decision, Progress, Refused, Replay, Shared,
    run::{Answer, Phase, Run},
    waiters::{Permit, Waiter, Waiting},
};
use crate::{
    Begin, Encoded, EncodedKey, Entry, Event, Fingerprint, Held, NewClaim, OnStorageError,
    OnUnreadable, Operation, Outcome, Record, Refusal, Storage, StorageError, StorageErrorKind,
};

/// How long a duplicate pauses where the storage would say at once that nothing is to be waited for.
const PAUSE: Duration = Duration::from_millis(50);

/// A request on its way to its decision.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) encoded: &'a Encoded,
    pub(super) progress: &'a Progress,
}

/// What one attempt came to.
pub(super) enum Attempt<C> {
    Decided(Decision<C>),
    /// The key has this record.
    Found(Record),
    /// An operation with this fingerprint runs. Its end is waited for after a pause.
    Running(Option<Fingerprint>, Waiter, Duration),
}

/// How a key is taken.
pub(super) trait Means: Sync {
    type Claim: Send;

    /// Takes a place for the operation, unless this process knows something of the key. `None` if all are taken.
    fn enter(&self, request: Request<'_>, now: Duration) -> ControlFlow<Answer, Option<Claim>>;

    /// Asks the storage for the key.
    fn ask(
        &self,
        request: Request<'_>,
        claim: Claim,
        now: Duration,
    ) -> impl Future<Output = Attempt<Self::Claim>> + Send;
}

/// By a claim with a lease.
pub(super) struct Lease;

impl Means for Lease {
    type Claim = Claim;

    fn enter(&self, request: Request<'_>, now: Duration) -> ControlFlow<Answer, Option<Claim>> {
        Claim::enter(request, now)
    }

    /// The lease counts from `since` at the earliest.
    async fn ask(&self, request: Request<'_>, claim: Claim, mut since: Duration) -> Attempt<Claim> {
        let (shared, encoded) = (request.shared, request.encoded);
        if !shared.config.lock.is_enabled() {
            return Box::pin(request.look_up(claim)).await;
        }
        let key = &encoded.key;
        let new = NewClaim {
            token: claim.token(),
            fingerprint: encoded.fingerprint,
            lease: shared.lease(),
        };
        // Held until the run is listed, or it is known that there is none.
        let mut clearing = None;
        loop {
            let mut begun = shared.limited(shared.storage.begin(key, &new)).await;
            if shared.is_to_be_cleared(&begun) {
                clearing = clearing.or_else(|| shared.runs.clear(key));
                if clearing.is_none() {
                    claim.leave();
                    return request.subscribe(None, Duration::ZERO);
                }
                since = shared.now();
                begun = Box::pin(shared.clear_and_begin(key, &new)).await;
            }
            match begun {
                Ok(Begin::Acquired) => {
                    // The answer may have taken so long that the lease is over by now.
                    let renewed = match shared.has_aged(since) {
                        true => {
                            since = shared.now();
                            Box::pin(shared.renew_aged(key, &new, since)).await
                        }
                        false => Ok(Held::Yes),
                    };
                    match renewed {
                        Ok(Held::Yes) => {
                            let run = request.new_run(Phase::Held, since);
                            return Attempt::Decided(Decision::Execute(claim.run(run)));
                        }
                        Ok(Held::Lost) => since = shared.now(),
                        Err(error) => {
                            drop(claim);
                            let decision = shared.storage_failed(key, Operation::Renew, error);
                            return Attempt::Decided(decision);
                        }
                    }
                }
                Ok(Begin::Completed(record)) => {
                    claim.leave();
                    return Attempt::Found(record);
                }
                Ok(Begin::InFlight {
                    fingerprint,
                    lease_left,
                }) => {
                    claim.leave();
                    // An abandoned recovery point is left to an operation in a transaction, and `Storage::wait` returns at once.
                    let is_abandoned = lease_left == Some(Duration::ZERO);
                    let pause = if is_abandoned { PAUSE } else { Duration::ZERO };
                    return request.subscribe(fingerprint, pause);
                }
                Err(error) => {
                    match error.kind() {
                        // The storage answered, so it is known that nothing was claimed.
                        StorageErrorKind::Full | StorageErrorKind::Unreadable => claim.leave(),
                        _ => drop(claim),
                    }
                    let decision = shared.storage_failed(key, Operation::Begin, error);
                    return Attempt::Decided(decision);
                }
            }
        }
    }
}

impl Request<'_> {
    /// Decides, waiting up to `limit` for a running original. Emits no event for the decision.
    pub(super) async fn decide<M: Means>(self, means: &M, limit: Duration) -> Decision<M::Claim> {
        let (shared, encoded) = (self.shared, self.encoded);
        let key = &encoded.key;
        let mut waiting: Option<Waiting<'_>> = None;
        let mut waited_here = false;
        let mut permit = Permit {
            shared,
            key,
            is_held: false,
        };
        loop {
            let waited = waiting.as_ref().map_or(Duration::ZERO, Waiting::waited);
            let (waiter, pause) = match self.attempt(means).await {
                Attempt::Running(running, ..) if differ(running, encoded.fingerprint) => {
                    return refused(Refusal::KeyReused);
                }
                Attempt::Running(_, waiter, pause) => (waiter, pause),
                Attempt::Found(record) => return replay(encoded, record, waited),
                Attempt::Decided(decision) => {
                    permit.is_held &= !matches!(decision, Decision::Execute(_));
                    return decision;
                }
            };
            // An operation runs, and wakes a waiter when it ends.
            permit.is_held = false;
            if waited_here && !waiter.is_local() {
                // The key is claimed elsewhere now, which the waiters of this process do not know.
                shared.runs.waiters.wake_one_here(key);
            }
            waited_here = waiter.is_local();
            if waiting.is_none() {
                waiting = shared.start_waiting(key);
            }
            let Some(waiting) = &waiting else {
                return refused(Refusal::Overloaded);
            };
            let left = limit.saturating_sub(waiting.waited());
            if left.is_zero() {
                return refused(Refusal::InFlight);
            }
            let outcome = Box::pin(async {
                let pause = pause.min(left);
                if !pause.is_zero() {
                    shared.config.env.sleep(pause).await;
                }
                shared.wait(key, waiter, left - pause).await
            });
            if let Some(record) = outcome.await {
                return replay(encoded, record, waiting.waited());
            }
            permit.is_held = true;
        }
    }

    /// One look at the runs and, if they do not know the key, one atomic step of the storage.
    async fn attempt<M: Means>(self, means: &M) -> Attempt<M::Claim> {
        let now = self.shared.now();
        let claim = match means.enter(self, now) {
            ControlFlow::Continue(Some(claim)) => claim,
            ControlFlow::Continue(None) => return Box::pin(self.replay_only()).await,
            ControlFlow::Break(Answer::Running(running)) => {
                return self.subscribe(running, Duration::ZERO);
            }
            ControlFlow::Break(Answer::Outcome(record) | Answer::GivenUp(record)) => {
                return Attempt::Found(record);
            }
        };
        self.progress.set(true);
        let attempt = means.ask(self, claim, now).await;
        if !matches!(attempt, Attempt::Decided(Decision::Execute(_))) {
            self.progress.set(false);
        }
        attempt
    }

    /// Subscribes to the end of an operation that runs, unless its outcome is here already.
    pub(super) fn subscribe<C>(self, running: Option<Fingerprint>, pause: Duration) -> Attempt<C> {
        let (shared, encoded) = (self.shared, self.encoded);
        match shared.runs.subscribe(&encoded.key, shared.now()) {
            Ok(waiter) => Attempt::Running(running, waiter, pause),
            Err(record) => Attempt::Found(record),
        }
    }

    /// For `LockPolicy::disabled`: looks for a record and claims nothing.
    async fn look_up(self, claim: Claim) -> Attempt<Claim> {
        let (shared, encoded) = (self.shared, self.encoded);
        Attempt::Decided(match shared.get(&encoded.key).await {
            Ok(Some(Entry::Completed(record))) => return Attempt::Found(record),
            Ok(Some(Entry::Claimed { fingerprint, .. }))
                if differ(fingerprint, encoded.fingerprint) =>
            {
                refused(Refusal::KeyReused)
            }
            Ok(_) => {
                let run = self.new_run(Phase::Unclaimed, shared.now());
                Decision::Execute(claim.run(run))
            }
            Err(error) => shared.storage_failed(&encoded.key, Operation::Get, error),
        })
    }

    /// At `max_running`: answers retries, and refuses operations that would run.
    async fn replay_only<C>(self) -> Attempt<C> {
        let (shared, encoded) = (self.shared, self.encoded);
        Attempt::Decided(match shared.get(&encoded.key).await {
            Ok(Some(Entry::Completed(record))) => return Attempt::Found(record),
            Ok(_) => refused(Refusal::Overloaded),
            Err(error) => Decision::Refuse(shared.unavailable(&encoded.key, Operation::Get, error)),
        })
    }

    pub(super) fn new_run(self, phase: Phase, since: Duration) -> Run {
        Run::new(
            phase,
            self.encoded,
            since,
            &self.shared.config,
            self.progress,
        )
    }
}

impl Shared {
    pub(super) async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        self.limited(self.storage.get(key)).await
    }

    /// Whether half the lease has passed since `since`.
    fn has_aged(&self, since: Duration) -> bool {
        let age = self.now().saturating_sub(since);
        age >= self.lease() / 2
    }

    /// Renews a claim, `since` now, whose answer took long. Fails if that takes long too: the lease would be over before the keeper could
    /// renew it.
    async fn renew_aged(
        &self,
        key: &EncodedKey,
        new: &NewClaim,
        since: Duration,
    ) -> Result<Held, StorageError> {
        let renewed = self.storage.renew(key, new.token, new.lease);
        let held = self.limited(renewed).await?;
        match held == Held::Yes && self.has_aged(since) {
            true => Err(StorageError::timeout()),
            false => Ok(held),
        }
    }

    /// Whether an unreadable record is in the way and is to be treated as absent.
    fn is_to_be_cleared(&self, begin: &Result<Begin, StorageError>) -> bool {
        let unreadable =
            matches!(begin, Err(error) if error.kind() == StorageErrorKind::Unreadable);
        unreadable && self.config.on_unreadable == OnUnreadable::TreatAsAbsent
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
    pub(super) fn announce<C>(&self, key: &EncodedKey, decision: &Decision<C>) {
        let key = *key;
        self.emit(&match decision {
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

    pub(super) fn failed(&self, key: &EncodedKey, operation: Operation, error: &StorageError) {
        self.emit(&Event::StorageFailed {
            key: *key,
            operation,
            error,
        });
    }

    pub(super) fn storage_failed(
        &self,
        key: &EncodedKey,
        operation: Operation,
        error: StorageError,
    ) -> Decision {
        let refused = self.unavailable(key, operation, error);
        match self.config.on_storage_error {
            OnStorageError::RunUnprotected => Decision::Unprotected,
            OnStorageError::Reject => Decision::Refuse(refused),
        }
    }

    /// The refusal where the storage failed.
    pub(super) fn unavailable(
        &self,
        key: &EncodedKey,
        operation: Operation,
        error: StorageError,
    ) -> Refused {
        self.failed(key, operation, &error);
        Refused {
            refusal: Refusal::StorageUnavailable,
            error: Some(error),
        }
    }

    /// The storage took the outcome of a run.
    pub(super) fn announce_stored(&self, key: &EncodedKey, since: Duration, record: &Record) {
        let key = *key;
        self.emit(&match &record.outcome {
            Outcome::Tombstone(reason) => Event::Tombstoned {
                key,
                reason: *reason,
            },
            Outcome::Response(response) => Event::Completed {
                key,
                status: response.status(),
                took: self.now().saturating_sub(since),
            },
        });
    }

    /// The storage said that the key is another's.
    pub(super) fn lost(&self, key: &EncodedKey, operation: Operation) {
        self.emit(&Event::Lost {
            key: *key,
            operation,
        });
        self.runs.waiters.wake_all(key);
    }

    /// `operation` under the storage's time limit.
    pub(super) fn limited<T>(
        &self,
        operation: impl Future<Output = Result<T, StorageError>>,
    ) -> impl Future<Output = Result<T, StorageError>> {
        self.limited_to(self.config.storage_timeout, operation)
    }

    pub(super) fn limited_to<T>(
        &self,
        limit: Duration,
        operation: impl Future<Output = Result<T, StorageError>>,
    ) -> impl Future<Output = Result<T, StorageError>> {
        let done = self.config.env.within(limit, operation);
        done.map(|done| done.unwrap_or_else(|| Err(StorageError::timeout())))
    }
}

/// Decides about a request whose key has a record: a retry gets it, another request under the key is refused.
pub(super) fn replay<C>(encoded: &Encoded, record: Record, waited: Duration) -> Decision<C> {
    match differ(record.fingerprint, encoded.fingerprint) {
        true => refused(Refusal::KeyReused),
        false => Decision::Replay(Replay { record, waited }),
    }
}

pub(super) fn refused<C>(refusal: Refusal) -> Decision<C> {
    Decision::Refuse(Refused {
        refusal,
        error: None,
    })
}

/// Whether both requests are known, and not the same. Then the one that came later is refused as
/// [`Refusal::KeyReused`], with [`Config::mismatch_status`](crate::Config::mismatch_status), 422 by default.
pub(super) fn differ(one: Option<Fingerprint>, other: Option<Fingerprint>) -> bool {
    matches!((one, other), (Some(one), Some(other)) if one != other)
}
