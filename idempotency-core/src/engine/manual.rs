//! Conflicts that the caller answers itself, one at a time.
//!
//! The right to answer one is a [`Claim`] like any other, under a key that is derived from the record's. So these claims are taken one at
//! a time on all nodes, live as long as their run, and are known to `drain`.

use std::{ops::ControlFlow, time::Duration};

use super::{
    Claim, Completion, Decision, Engine, Progress,
    decide::{Lease, Request, differ, refused},
    run::Answer,
};
use crate::{
    Encoded, EncodedKey, Entry, Event, Operation, Outcome, Record, Refusal, StoredResponse,
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
        let request = self.request(encoded, progress);
        let decision = loop {
            let seen = match request.decide(&Lease, self.wait_limit()).await {
                Decision::Replay(replay) => replay.record,
                decision => break decision,
            };
            if let Some(decision) = request.claim_conflict(seen).await {
                break decision;
            }
        };
        match &decision {
            Decision::Execute(claim) if claim.previous().is_some() => {
                self.shared.emit(&Event::Conflict { key: encoded.key });
            }
            decision => self.shared.announce(&encoded.key, decision),
        }
        decision
    }
}

impl Request<'_> {
    /// Takes the claim on a conflict over a record, which was `seen` before the claim was waited for. `None` if the record is gone: the
    /// operation may run again.
    async fn claim_conflict(self, seen: Record) -> Option<Decision> {
        let (shared, encoded) = (self.shared, self.encoded);
        let turn = Encoded {
            key: encoded.key.turn(),
            fingerprint: None,
        };
        let request = Request {
            encoded: &turn,
            ..self
        };
        let longest = shared.config.lock.longest_hold();
        let claim = match request.decide(&Lease, longest).await {
            // Given up, it leaves a tombstone, which is to block the key's conflicts no longer than a crash would.
            Decision::Execute(claim) => claim.ttl(shared.lease()),
            Decision::Unprotected => Claim::new(shared, &turn),
            // The run before was held too long, and may still be at it.
            Decision::Replay(_) => return Some(refused(Refusal::InFlight)),
            refused @ Decision::Refuse(_) => return Some(refused),
        };
        match self.reread(seen).await {
            ControlFlow::Continue(Some(record)) => {
                Some(Decision::Execute(claim.on_conflict(Previous {
                    key: encoded.key,
                    record,
                    ttl: shared.config.ttl,
                })))
            }
            gone => {
                claim.release().await;
                self.progress.set(false);
                gone.break_value()
            }
        }
    }

    /// Re-reads the record after taking the claim: the run before may have replaced the one that was `seen`. `None` if it is gone.
    async fn reread(self, seen: Record) -> ControlFlow<Decision, Option<Record>> {
        let (shared, encoded) = (self.shared, self.encoded);
        let key = &encoded.key;
        let record = match shared.runs.find(key, shared.now()) {
            Some(Answer::Running(_)) => return ControlFlow::Continue(None),
            Some(Answer::Outcome(record)) => record,
            found => match (shared.get(key).await, found) {
                (Ok(Some(Entry::Completed(record))), _) => record,
                // An operation that still runs here was given up. The storage is asked all the same, since another may have run, or a
                // run on a conflict replaced the tombstone.
                (Ok(_), Some(Answer::GivenUp(tombstone))) => tombstone,
                (Ok(_), _) => return ControlFlow::Continue(None),
                (Err(error), _) => match shared.storage_failed(key, Operation::Get, error) {
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
        let Previous { key, record, ttl } = previous;
        let status = response.status();
        let record = Record {
            fingerprint: record.fingerprint,
            outcome: Outcome::Response(response),
        };
        let shared = self.shared.clone();
        let replaced = match self.was_held_throughout().await {
            Ok(true) => Engine { shared }
                .replace(&key, &record, ttl)
                .await
                .map(|()| true),
            not_held => not_held,
        };
        let shared = &self.shared;
        let completion = match replaced {
            Ok(true) => {
                shared.emit(&Event::Replaced { key, status });
                Completion::Stored
            }
            Ok(false) => {
                shared.emit(&Event::Lost {
                    key,
                    operation: Operation::Replace,
                });
                Completion::Lost
            }
            Err(error) => {
                shared.failed(&key, Operation::Replace, &error);
                Completion::Kept
            }
        };
        self.release().await;
        completion
    }
}
