//! Conflicts that the caller answers itself, one at a time.
//!
//! A turn is a claim like any other, under a key of its own that is derived from the record's: so turns are taken one at a time
//! on all nodes, live as long as their run, and are known to `drain`.

use std::{fmt, time::Duration};

use super::{Claim, Decision, Engine, Progress, Refused, differ, runs::Found};
use crate::{
    Encoded, EncodedKey, Entry, Event, Held, Operation, Outcome, Record, Refusal, StorageError,
    StoredResponse,
};

// Not `#[non_exhaustive]`, for the reason that `Decision` is not.
/// What to do with a request whose conflicts the caller answers itself; see [`Engine::begin_manual`].
#[derive(Debug)]
#[must_use = "a refused request must not run"]
pub enum ManualDecision {
    /// Run the operation, then end the claim.
    Execute(Claim),
    /// It ran before: answer the conflict, then end the turn.
    Conflict(Turn),
    /// Don't run it, and tell the client why.
    Refuse(Refused),
    /// The storage failed, and the configuration says to run the operation all the same.
    Unprotected,
}

/// The right to answer a conflict, with the current record. End it with [`replace`](Self::replace) or [`keep`](Self::keep).
///
/// No other turn of the key is given out meanwhile, on any node, unless claims are switched off
/// ([`LockPolicy::disabled`](crate::LockPolicy::disabled)). A turn that is dropped keeps the record, and ends in the background
/// as a dropped [`Claim`] does.
#[must_use = "a turn that is dropped keeps the record as it is"]
pub struct Turn {
    engine: Engine,
    key: EncodedKey,
    record: Record,
    ttl: Duration,
    /// `None` where the storage failed to give one and `OnStorageError::RunUnprotected` says to run all the same.
    claim: Option<Claim>,
}

impl Turn {
    /// The key whose conflict this is.
    #[must_use]
    pub fn key(&self) -> EncodedKey {
        self.key
    }

    /// The record of the last run.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// How long a new record will be kept. Default: [`Config::ttl`](crate::Config::ttl).
    pub fn ttl(self, ttl: Duration) -> Self {
        Self { ttl, ..self }
    }

    /// Replaces the record with `response`, restarts its TTL and ends the turn.
    ///
    /// [`Held::Lost`]: the turn was over before, because the run took longer than
    /// [`LockPolicy::max_hold`](crate::LockPolicy::max_hold) or its process was stopped for longer than the lease. Another may
    /// have run since, so the record stays as it is.
    ///
    /// # Errors
    ///
    /// If the storage fails. The record then most likely stays as it is.
    pub async fn replace(self, response: StoredResponse) -> Result<Held, StorageError> {
        let replaced = self.try_replace(response).await;
        if let Err(error) = &replaced {
            self.engine.shared.options.emit(&Event::StorageFailed {
                key: self.key,
                operation: Operation::Replace,
                error,
            });
        }
        self.keep().await;
        replaced
    }

    async fn try_replace(&self, response: StoredResponse) -> Result<Held, StorageError> {
        let Self {
            engine, key, claim, ..
        } = self;
        if let Some(claim) = claim
            && !claim.was_held_throughout().await?
        {
            engine.shared.options.emit(&Event::Lost {
                key: *key,
                operation: Operation::Replace,
            });
            return Ok(Held::Lost);
        }
        let status = response.status();
        let record = Record {
            fingerprint: self.record.fingerprint,
            outcome: Outcome::Response(response),
        };
        engine.replace(key, &record, self.ttl).await?;
        engine
            .shared
            .options
            .emit(&Event::Replaced { key: *key, status });
        Ok(Held::Yes)
    }

    /// Ends the turn and leaves the record as it is.
    pub async fn keep(self) {
        if let Some(claim) = self.claim {
            claim.release().await;
        }
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn")
            .field("key", &self.key)
            .field("record", &self.record)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// [`begin_with`](Self::begin_with) for a caller that answers conflicts itself: where that is a replay, this is a
    /// [`Turn`] to answer it, after all turns of the key that began before.
    ///
    /// A turn is waited for as long as the run before it may take: [`LockPolicy::max_hold`](crate::LockPolicy::max_hold). A
    /// running *original* is waited for as in [`begin`](Self::begin).
    pub async fn begin_manual(&self, encoded: &Encoded, progress: &Progress) -> ManualDecision {
        let limit = self.shared.options.lock.wait_timeout();
        let key = &encoded.key;
        loop {
            let decision = self.decide(encoded, progress, limit).await;
            if !matches!(decision, Decision::Replay(_)) {
                self.shared.announce(key, &decision);
            }
            return match decision {
                Decision::Execute(claim) => ManualDecision::Execute(claim),
                Decision::Refuse(refused) => ManualDecision::Refuse(refused),
                Decision::Unprotected => ManualDecision::Unprotected,
                Decision::Replay(replay) => {
                    match self.take_turn(encoded, replay.record, progress).await {
                        Ok(turn) => {
                            self.shared.options.emit(&Event::Conflict { key: *key });
                            ManualDecision::Conflict(turn)
                        }
                        Err(NoTurn::Refused(refused)) => {
                            self.shared.options.emit(&Event::Refused {
                                key: Some(*key),
                                refusal: refused.refusal,
                            });
                            ManualDecision::Refuse(refused)
                        }
                        Err(NoTurn::RecordIsGone) => continue,
                    }
                }
            };
        }
    }

    /// Takes a turn at the conflict over a record, which was `seen` before it was waited for.
    async fn take_turn(
        &self,
        encoded: &Encoded,
        seen: Record,
        progress: &Progress,
    ) -> Result<Turn, NoTurn> {
        let key = encoded.key;
        let turn = Encoded {
            key: key.turn(),
            fingerprint: None,
        };
        let longest = self.shared.options.lock.hold_limit();
        let claim = match self.decide(&turn, progress, longest).await {
            // Given up, it leaves a tombstone, which is to block the key's conflicts no longer than a crash would.
            Decision::Execute(claim) => Some(claim.ttl(self.shared.options.lease())),
            Decision::Unprotected => None,
            // The run before was held too long, and may still be at it.
            Decision::Replay(_) => return Err(NoTurn::Refused(Refused::new(Refusal::InFlight))),
            Decision::Refuse(refused) => return Err(NoTurn::Refused(refused)),
        };
        let stands = self.stands(encoded, seen).await;
        match stands {
            Ok(record) => Ok(Turn {
                engine: self.clone(),
                key,
                record,
                ttl: self.shared.options.ttl,
                claim,
            }),
            Err(no_turn) => {
                if let Some(claim) = claim {
                    claim.release().await;
                }
                progress.set(false);
                Err(no_turn)
            }
        }
    }

    /// Re-reads the record after taking the turn: the turn before may have replaced the one that was `seen`.
    async fn stands(&self, encoded: &Encoded, seen: Record) -> Result<Record, NoTurn> {
        let key = &encoded.key;
        let found = self.shared.runs.find(key, self.shared.options.now());
        if let Found::Running { .. } = found {
            return Err(NoTurn::RecordIsGone);
        }
        let record = match found {
            Found::Outcome(record) => record,
            found => match (self.get(key).await, found) {
                (Ok(Some(Entry::Completed(record))), _) => record,
                // An operation that still runs here was given up. The storage is asked all the same, since another may have run, or a
                // conflict run replaced the tombstone.
                (Ok(_), Found::GivenUp(tombstone)) => tombstone,
                (Ok(_), _) => return Err(NoTurn::RecordIsGone),
                (Err(error), _) => match self.shared.storage_failed(key, Operation::Get, error) {
                    Decision::Refuse(refused) => return Err(NoTurn::Refused(refused)),
                    _ => seen,
                },
            },
        };
        if differ(record.fingerprint, encoded.fingerprint) {
            return Err(NoTurn::Refused(Refused::new(Refusal::KeyReused)));
        }
        Ok(record)
    }
}

/// Why there is no turn to take.
enum NoTurn {
    Refused(Refused),
    /// It expired or was removed: the operation may run again.
    RecordIsGone,
}
