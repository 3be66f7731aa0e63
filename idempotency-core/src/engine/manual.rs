//! Conflicts that the caller answers itself, one at a time.
//!
//! The right to answer one is a [`Claim`] like any other, under a key that is derived from the record's. So these claims are taken one at
//! a time on all nodes, live as long as their run, and are known to `drain`.

use std::{ops::ControlFlow, time::Duration};

use super::{
    Claim, Completion, Decision, Engine, Progress,
    decide::{Lease, differ, refused},
    runs::Found,
};
use crate::{
    Encoded, EncodedKey, Entry, Event, Held, Operation, Outcome, Record, Refusal, StorageError,
    StoredResponse,
};

/// The record that a conflict is about.
pub(super) struct Previous {
    pub(super) key: EncodedKey,
    pub(super) record: Record,
    /// How long the record will be kept that replaces it.
    pub(super) ttl: Duration,
}

impl Engine {
    /// [`begin_with`](Self::begin_with) for a caller that answers conflicts itself: where that is a [`Decision::Replay`], this is a
    /// [`Decision::Execute`] with a claim that knows the [record](Claim::previous), after all such claims of the key that began before.
    ///
    /// Such a claim is waited for as long as the run before it may take: [`LockPolicy::max_hold`](crate::LockPolicy::max_hold). A
    /// running *original* is waited for as in [`begin`](Self::begin).
    pub async fn begin_manual(&self, encoded: &Encoded, progress: &Progress) -> Decision {
        let limit = self.shared.options.lock.wait_timeout();
        loop {
            let decision = match self.decide(&Lease, encoded, progress, limit).await {
                Decision::Replay(replay) => {
                    match self.claim_conflict(encoded, replay.record, progress).await {
                        ControlFlow::Break(decision) => decision,
                        // It expired or was removed: the operation may run again.
                        ControlFlow::Continue(()) => continue,
                    }
                }
                decision => decision,
            };
            self.shared.announce(&encoded.key, &decision);
            return decision;
        }
    }

    /// Takes the claim on a conflict over a record, which was `seen` before the claim was waited for. Goes on if the record is gone.
    async fn claim_conflict(
        &self,
        encoded: &Encoded,
        seen: Record,
        progress: &Progress,
    ) -> ControlFlow<Decision> {
        let options = &self.shared.options;
        let turn = Encoded {
            key: encoded.key.turn(),
            fingerprint: None,
        };
        let claim = match self
            .decide(&Lease, &turn, progress, options.lock.longest_hold())
            .await
        {
            // Given up, it leaves a tombstone, which is to block the key's conflicts no longer than a crash would.
            Decision::Execute(claim) => Some(claim.ttl(options.lease())),
            Decision::Unprotected => None,
            // The run before was held too long, and may still be at it.
            Decision::Replay(_) => return ControlFlow::Break(refused(Refusal::InFlight)),
            refused @ Decision::Refuse(_) => return ControlFlow::Break(refused),
        };
        let reread = self.reread(encoded, seen).await;
        let ControlFlow::Continue(Some(record)) = reread else {
            if let Some(claim) = claim {
                claim.release().await;
            }
            progress.set(false);
            return reread.map_continue(|_| ());
        };
        let previous = Previous {
            key: encoded.key,
            record,
            ttl: options.ttl,
        };
        ControlFlow::Break(Decision::Execute(match claim {
            Some(claim) => claim.on_conflict(previous),
            None => Claim::unprotected(&self.shared, previous),
        }))
    }

    /// Re-reads the record after taking the claim: the run before may have replaced the one that was `seen`. `None` if it is gone.
    async fn reread(
        &self,
        encoded: &Encoded,
        seen: Record,
    ) -> ControlFlow<Decision, Option<Record>> {
        let key = &encoded.key;
        let found = self.shared.runs.find(key, self.shared.options.now());
        let record = match found {
            Found::Running { .. } => return ControlFlow::Continue(None),
            Found::Outcome(record) => record,
            found => match (self.get(key).await, found) {
                (Ok(Some(Entry::Completed(record))), _) => record,
                // An operation that still runs here was given up. The storage is asked all the same, since another may have run, or a
                // run on a conflict replaced the tombstone.
                (Ok(_), Found::GivenUp(tombstone)) => tombstone,
                (Ok(_), _) => return ControlFlow::Continue(None),
                (Err(error), _) => match self.shared.storage_failed(key, Operation::Get, error) {
                    Decision::Unprotected => seen,
                    refused => return ControlFlow::Break(refused),
                },
            },
        };
        match differ(record.fingerprint, encoded.fingerprint) {
            true => ControlFlow::Break(refused(Refusal::KeyReused)),
            false => ControlFlow::Continue(Some(record)),
        }
    }
}

impl Claim {
    /// Puts `response` in the place of the previous record.
    pub(super) async fn replace(self, previous: Previous, response: StoredResponse) -> Completion {
        let completion = match self.try_replace(&previous, response).await {
            Ok(Held::Yes) => Completion::Stored,
            Ok(Held::Lost) => Completion::Lost,
            Err(error) => {
                let shared = &self.shared;
                shared.failed(&previous.key, Operation::Replace, &error);
                Completion::Kept
            }
        };
        self.release().await;
        completion
    }

    async fn try_replace(
        &self,
        previous: &Previous,
        response: StoredResponse,
    ) -> Result<Held, StorageError> {
        let Previous { key, record, ttl } = previous;
        let options = &self.shared.options;
        if !self.was_held_throughout().await? {
            options.emit(&Event::Lost {
                key: *key,
                operation: Operation::Replace,
            });
            return Ok(Held::Lost);
        }
        let status = response.status();
        let record = Record {
            fingerprint: record.fingerprint,
            outcome: Outcome::Response(response),
        };
        self.shared.replace(key, &record, *ttl).await?;
        options.emit(&Event::Replaced { key: *key, status });
        Ok(Held::Yes)
    }
}
