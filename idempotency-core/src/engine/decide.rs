//! The way of a request to its decision.
//!
//! Each attempt looks at what runs in this process and, if that does not know the key, takes one atomic step at the storage. A
//! duplicate of a running operation waits, and then attempts again.

use std::{future::Future, ops::ControlFlow, time::Duration};

use super::{
    Claim, Decision, Engine, Progress, Refused, Replay, Shared,
    runs::Found,
    waiters::{Permit, Waiter, Waiting},
};
use crate::{
    Begin, Encoded, EncodedKey, Entry, Event, Fingerprint, Held, NewClaim, OnStorageError,
    OnUnreadable, Operation, Record, Refusal, Storage, StorageError, StorageErrorKind,
};

/// How a key is taken.
pub(super) trait Means: Sync {
    type Claim: Send;

    /// One attempt of a request that has `waited` so long. `Continue`: the operation runs.
    fn attempt(
        &self,
        engine: &Engine,
        encoded: &Encoded,
        progress: &Progress,
        waited: Duration,
    ) -> impl Future<Output = ControlFlow<Decision<Self::Claim>, Waiter>> + Send;
}

/// By a claim with a lease.
pub(super) struct Lease;

impl Means for Lease {
    type Claim = Claim;

    async fn attempt(
        &self,
        engine: &Engine,
        encoded: &Encoded,
        progress: &Progress,
        waited: Duration,
    ) -> ControlFlow<Decision, Waiter> {
        engine.attempt(encoded, progress, waited).await
    }
}

impl Engine {
    /// Decides, waiting up to `limit` for a running original. Emits no event for the decision.
    pub(super) async fn decide<M: Means>(
        &self,
        means: &M,
        encoded: &Encoded,
        progress: &Progress,
        limit: Duration,
    ) -> Decision<M::Claim> {
        let shared = &self.shared;
        let waiters = &shared.runs.waiters;
        let mut waiting: Option<Waiting<'_>> = None;
        let mut waited_here = false;
        let mut permit = Permit {
            shared,
            key: &encoded.key,
            is_held: false,
        };
        loop {
            let waited = waiting.as_ref().map_or(Duration::ZERO, Waiting::waited);
            let waiter = match means.attempt(self, encoded, progress, waited).await {
                ControlFlow::Continue(waiter) => waiter,
                ControlFlow::Break(decision) => {
                    permit.is_held &= !matches!(decision, Decision::Execute(_));
                    return decision;
                }
            };
            // An operation runs, and wakes a waiter when it ends.
            permit.is_held = false;
            if waited_here && !waiter.is_local() {
                // The key is claimed elsewhere now, which the waiters of this process do not know.
                waiters.wake_one_here(&encoded.key);
            }
            waited_here = waiter.is_local();
            if waiting.is_none() {
                waiting = shared.start_waiting(&encoded.key);
            }
            let Some(waiting) = &waiting else {
                return refused(Refusal::Overloaded);
            };
            let left = limit.saturating_sub(waiting.waited());
            if left.is_zero() {
                return refused(Refusal::InFlight);
            }
            let outcome = Box::pin(shared.wait(&encoded.key, waiter, left)).await;
            if let Some(record) = outcome {
                return replay(encoded, record, waiting.waited());
            }
            permit.is_held = true;
        }
    }

    /// One look at the runs and, if they do not know the key, one atomic step of the storage. `Continue`: the operation runs.
    async fn attempt(
        &self,
        encoded: &Encoded,
        progress: &Progress,
        waited: Duration,
    ) -> ControlFlow<Decision, Waiter> {
        let shared = &self.shared;
        let now = shared.options.now();
        let entered = match shared.options.lock.is_enabled() {
            true => Claim::find_or_enter(shared, encoded, now),
            false => ControlFlow::Break(shared.runs.find(&encoded.key, now)),
        };
        let claim = match entered {
            ControlFlow::Break(Found::Outcome(record) | Found::GivenUp(record)) => {
                return ControlFlow::Break(replay(encoded, record, waited));
            }
            ControlFlow::Break(Found::Running {
                fingerprint,
                waiter,
            }) => return in_flight(encoded, fingerprint, waiter),
            ControlFlow::Break(Found::Nothing) => {
                return ControlFlow::Break(self.look_up(encoded, progress, waited).await);
            }
            ControlFlow::Continue(None) => {
                return ControlFlow::Break(self.replay_only(encoded, waited).await);
            }
            ControlFlow::Continue(Some(claim)) => claim,
        };
        progress.set(true);
        let attempt = self.ask(encoded, claim, progress, waited, now).await;
        if !matches!(attempt, ControlFlow::Break(Decision::Execute(_))) {
            progress.set(false);
        }
        attempt
    }

    /// Asks the storage for the claim. A lease counts from `since` at the earliest.
    async fn ask(
        &self,
        encoded: &Encoded,
        claim: Claim,
        progress: &Progress,
        waited: Duration,
        mut since: Duration,
    ) -> ControlFlow<Decision, Waiter> {
        let shared = &self.shared;
        let key = &encoded.key;
        let new = NewClaim {
            token: claim.token(),
            fingerprint: encoded.fingerprint,
            lease: shared.options.lease(),
        };
        // Held until the run is listed, or it is known that there is none.
        let mut clearing = None;
        loop {
            let mut answer = shared.limited(shared.storage.begin(key, &new)).await;
            if shared.is_to_be_cleared(&answer) {
                if clearing.is_none() {
                    clearing = shared.runs.clear(key);
                }
                if clearing.is_none() {
                    claim.leave();
                    return self.subscribe(encoded, None, waited);
                }
                since = shared.options.now();
                answer = Box::pin(shared.clear_and_begin(key, &new)).await;
            }
            // The answer may have taken so long that the lease is over by now.
            if let Ok(Begin::Acquired) = answer
                && shared.has_aged(since)
            {
                since = shared.options.now();
                match Box::pin(shared.renew_aged(key, &new, since)).await {
                    Ok(Held::Yes) => {}
                    Ok(Held::Lost) => {
                        since = shared.options.now();
                        continue;
                    }
                    Err(error) => {
                        drop(claim);
                        let decision = shared.storage_failed(key, Operation::Renew, error);
                        return ControlFlow::Break(decision);
                    }
                }
            }
            return match answer {
                Ok(Begin::Acquired) => {
                    ControlFlow::Break(Decision::Execute(claim.run(since, progress)))
                }
                Ok(Begin::Completed(record)) => {
                    claim.leave();
                    ControlFlow::Break(replay(encoded, record, waited))
                }
                Ok(Begin::InFlight { fingerprint, .. }) => {
                    claim.leave();
                    self.subscribe(encoded, fingerprint, waited)
                }
                Err(error) => {
                    match error.kind() {
                        // The storage answered, so it is known that nothing was claimed.
                        StorageErrorKind::Full | StorageErrorKind::Unreadable => claim.leave(),
                        _ => drop(claim),
                    }
                    ControlFlow::Break(shared.storage_failed(key, Operation::Begin, error))
                }
            };
        }
    }

    /// Subscribes to the end of an operation that the storage knows, unless its outcome is here already.
    pub(super) fn subscribe<C>(
        &self,
        encoded: &Encoded,
        running: Option<Fingerprint>,
        waited: Duration,
    ) -> ControlFlow<Decision<C>, Waiter> {
        let shared = &self.shared;
        match shared.runs.subscribe(&encoded.key, shared.options.now()) {
            Ok(waiter) => in_flight(encoded, running, waiter),
            Err(record) => ControlFlow::Break(replay(encoded, record, waited)),
        }
    }

    /// For `LockPolicy::disabled`: looks for a record and claims nothing.
    async fn look_up(&self, encoded: &Encoded, progress: &Progress, waited: Duration) -> Decision {
        let shared = &self.shared;
        match self.get(&encoded.key).await {
            Ok(Some(Entry::Completed(record))) => replay(encoded, record, waited),
            Ok(Some(Entry::Claimed { fingerprint, .. }))
                if differ(fingerprint, encoded.fingerprint) =>
            {
                refused(Refusal::KeyReused)
            }
            Ok(_) => match Claim::enter(shared, encoded) {
                Some(claim) => {
                    let claim = claim.run_unclaimed(progress);
                    progress.set(true);
                    Decision::Execute(claim)
                }
                None => refused(Refusal::Overloaded),
            },
            Err(error) => shared.storage_failed(&encoded.key, Operation::Get, error),
        }
    }

    /// At `max_running`: answers retries, and refuses operations that would run.
    pub(super) async fn replay_only<C>(&self, encoded: &Encoded, waited: Duration) -> Decision<C> {
        let shared = &self.shared;
        match self.get(&encoded.key).await {
            Ok(Some(Entry::Completed(record))) => replay(encoded, record, waited),
            Ok(_) => refused(Refusal::Overloaded),
            Err(error) => Decision::Refuse(shared.unavailable(&encoded.key, Operation::Get, error)),
        }
    }
}

impl Shared {
    /// Whether half the lease has passed since `since`.
    fn has_aged(&self, since: Duration) -> bool {
        let age = self.options.now().saturating_sub(since);
        age >= self.options.lease() / 2
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
    pub(super) fn announce(&self, key: &EncodedKey, decision: &Decision) {
        match decision {
            Decision::Execute(claim) if claim.previous().is_some() => {
                self.options.emit(&Event::Conflict { key: *key });
            }
            decision => self.announce_new(key, decision),
        }
    }

    /// The same, where it is on no conflict.
    pub(super) fn announce_new<C>(&self, key: &EncodedKey, decision: &Decision<C>) {
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

    pub(super) fn failed(&self, key: &EncodedKey, operation: Operation, error: &StorageError) {
        self.options.emit(&Event::StorageFailed {
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
        match self.options.on_storage_error {
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

    /// `operation` under the storage's time limit.
    pub(super) async fn limited<T>(
        &self,
        operation: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        self.limited_to(self.options.storage_timeout, operation)
            .await
    }

    pub(super) async fn limited_to<T>(
        &self,
        limit: Duration,
        operation: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        let done = self.options.env.within(limit, operation).await;
        done.unwrap_or_else(|| Err(StorageError::timeout()))
    }
}

/// Decides about a request whose key runs: a duplicate waits, another request under the key is refused.
pub(super) fn in_flight<C>(
    encoded: &Encoded,
    running: Option<Fingerprint>,
    waiter: Waiter,
) -> ControlFlow<Decision<C>, Waiter> {
    match differ(running, encoded.fingerprint) {
        true => ControlFlow::Break(refused(Refusal::KeyReused)),
        false => ControlFlow::Continue(waiter),
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
