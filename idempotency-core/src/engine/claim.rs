//! The right to run an operation once, and its end.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    Progress, Shared, keeper,
    releases::Claimed,
    run::{Finish, Run},
};
use crate::{
    EncodedKey, Fingerprint, Held, Operation, Outcome, Record, Storage, StorageError,
    StoredResponse, Token, TombstoneReason,
};

/// The right to run the operation of a key. End it with [`complete`](Self::complete), [`tombstone`](Self::tombstone) or
/// [`release`](Self::release).
///
/// It is renewed until it ends, however long that takes, up to [`LockPolicy::max_hold`](crate::LockPolicy::max_hold).
///
/// A claim that is dropped is released in the background. Once an outcome was handed to it, dropping the future of that call changes
/// nothing: the outcome will be stored.
#[must_use = "a claim that is dropped is released, and the operation may run again"]
pub struct Claim {
    shared: Arc<Shared>,
    key: EncodedKey,
    token: Token,
    fingerprint: Option<Fingerprint>,
    ended: bool,
}

// Not `#[non_exhaustive]`: these are all the ends there are.
/// What became of an outcome; see [`Claim::complete`]. In every case the operation's own client gets its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an outcome that is not stored means that a retry does not get this answer"]
pub enum Completion {
    /// It is stored.
    Stored,
    /// The storage could not take it yet. This process answers the key from memory, and keeps trying until the TTL is over.
    Deferred,
    /// Another holder has the key: nothing was stored.
    Lost,
    /// The claim was held longer than [`LockPolicy::max_hold`](crate::LockPolicy::max_hold): a tombstone stands instead.
    Expired,
}

impl Claim {
    /// The key that is claimed.
    #[must_use]
    pub fn key(&self) -> EncodedKey {
        self.key
    }

    /// Names this claim at the storage.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// How long the outcome will be kept. Zero keeps none. Default: [`Config::ttl`](crate::Config::ttl).
    pub fn ttl(self, ttl: Duration) -> Self {
        // A run that is gone was removed by hand; it has no outcome to keep.
        let _ = self.shared.runs.change(self.token, |run| run.ttl = ttl);
        self
    }

    /// Stores the operation's answer and ends the claim.
    pub async fn complete(self, response: StoredResponse) -> Completion {
        self.finish(Outcome::Response(response)).await
    }

    /// Ends the claim with a tombstone: the operation ran, has no answer to replay, and must not run again.
    pub async fn tombstone(self, reason: TombstoneReason) -> Completion {
        self.finish(Outcome::Tombstone(reason)).await
    }

    /// Ends the claim without a record: a retry runs.
    ///
    /// Where the storage fails it is tried again in the background, until the lease is over anyway.
    pub async fn release(mut self) {
        self.ended = true;
        if let Some(release) = self.end_without_record() {
            release.run().await;
        }
    }

    /// Whether this claim was held without interruption. Always true if claims are switched off.
    pub(super) async fn was_held_throughout(&self) -> Result<bool, StorageError> {
        let Self {
            shared, key, token, ..
        } = self;
        if shared.runs.change(*token, |run| run.is_unclaimed()) == Some(true) {
            return Ok(true);
        }
        let lease = shared.options.lease();
        let renewed = shared.limited(shared.storage.renew(key, *token, lease));
        let is_held = renewed.await? == Held::Yes;
        // Looked at last: the keeper may have taken the claim again just before it was renewed.
        let is_whole = shared.runs.change(*token, |run| run.is_held_throughout());
        Ok(is_held && is_whole == Some(true))
    }

    async fn finish(mut self, outcome: Outcome) -> Completion {
        let shared = self.shared.clone();
        let record = Record {
            fingerprint: self.fingerprint,
            outcome,
        };
        let now = shared.options.now();
        let finish = shared
            .runs
            .change(self.token, |run| (run.finish(&record, now), run.since));
        let (ttl, since, is_offer) = match finish {
            Some((Finish::Store(ttl), since)) => (ttl, since, false),
            Some((Finish::Offer(ttl), since)) => (ttl, since, true),
            Some((Finish::Expired, _)) => {
                self.leave_to_keeper(false);
                return Completion::Expired;
            }
            // Removed by hand, or this is a second end, which consuming `self` rules out.
            None => {
                self.ended = true;
                return Completion::Lost;
            }
        };
        let stored = shared.storage.complete(&self.key, self.token, &record, ttl);
        match shared.limited(stored).await {
            Ok(held) => {
                self.ended = true;
                let _telling = shared.runs.end(self.token);
                keeper::completed(&shared, &self.key, since, &record, held);
                match held {
                    Held::Yes => Completion::Stored,
                    Held::Lost => Completion::Lost,
                }
            }
            Err(error) => {
                shared.failed(&self.key, Operation::Complete, &error);
                if is_offer {
                    self.ended = true;
                    drop(shared.runs.end(self.token));
                    return Completion::Lost;
                }
                match self.leave_to_keeper(true) {
                    true => Completion::Deferred,
                    false => Completion::Lost,
                }
            }
        }
    }

    /// Leaves the outcome to the keeper; `failed`: after the storage refused it. Says whether there was one to leave.
    fn leave_to_keeper(&mut self, failed: bool) -> bool {
        self.ended = true;
        keeper::defer(&self.shared, self.token, failed)
    }

    /// Ends the run. What is left is to tell the storage, or the keeper; `None` if that is done.
    fn end_without_record(&mut self) -> Option<Release> {
        let has_outcome = self
            .shared
            .runs
            .change(self.token, |run| run.has_outcome())?;
        if has_outcome {
            // The future that was storing it is dropped, or the claim was given up.
            self.leave_to_keeper(false);
            return None;
        }
        let run = self.shared.runs.end_but_stay(self.token)?;
        Some(Release {
            shared: self.shared.clone(),
            key: self.key,
            token: self.token,
            claimed: run.is_held().then_some(Claimed::Yes),
        })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.ended {
            drop(self.end_without_record());
        }
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim")
            .field("key", &self.key)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

/// A run that has ended and is still to be released at the storage. If it is dropped before, the keeper does it.
struct Release {
    shared: Arc<Shared>,
    key: EncodedKey,
    token: Token,
    /// `None` if the storage has no claim of it, or that is over.
    claimed: Option<Claimed>,
}

impl Release {
    async fn run(mut self) {
        if let Some(claimed) = self.claimed
            && keeper::try_release(&self.shared, &self.key, self.token, claimed).await
        {
            self.claimed = None;
        }
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        let Self {
            shared, key, token, ..
        } = self;
        match self.claimed {
            Some(claimed) => keeper::release(shared, *key, *token, claimed),
            None => shared.runs.waiters.wake_one(key),
        }
        shared.runs.leave();
    }
}

/// A place under `max_running`, held while the storage is asked for a claim.
///
/// If it is dropped before the answer, the keeper releases the claim that may have been taken.
pub(super) struct Begun {
    shared: Arc<Shared>,
    key: EncodedKey,
    token: Token,
    ended: bool,
}

impl Begun {
    pub(super) fn enter(shared: &Arc<Shared>, key: EncodedKey) -> Option<Self> {
        // Made before the place is taken: an environment of a user's may panic.
        let token = Token::random_from(&shared.options.env);
        shared.runs.enter().then(|| Self {
            shared: shared.clone(),
            key,
            token,
            ended: false,
        })
    }

    pub(super) fn token(&self) -> Token {
        self.token
    }

    /// The storage granted the claim. The lease counts from `since`, when it was asked.
    pub(super) fn acquired(
        self,
        fingerprint: Option<Fingerprint>,
        since: Duration,
        progress: &Progress,
    ) -> Claim {
        let run = self.run(fingerprint, since, progress);
        self.into_claim(run)
    }

    pub(super) fn without_claim(
        self,
        fingerprint: Option<Fingerprint>,
        progress: &Progress,
    ) -> Claim {
        let now = self.shared.options.now();
        let run = self.run(fingerprint, now, progress).without_claim();
        self.into_claim(run)
    }

    fn run(&self, fingerprint: Option<Fingerprint>, since: Duration, progress: &Progress) -> Run {
        let options = &self.shared.options;
        Run::held(
            self.key,
            fingerprint,
            since,
            options.ttl,
            options.lease(),
            options.lock.hold_limit(),
            progress.clone(),
        )
    }

    fn into_claim(mut self, run: Run) -> Claim {
        self.ended = true;
        let claim = Claim {
            shared: self.shared.clone(),
            key: self.key,
            token: self.token,
            fingerprint: run.fingerprint,
            ended: false,
        };
        self.shared.runs.add(self.token, run);
        keeper::keep(&self.shared);
        claim
    }

    /// The storage did not grant the claim.
    pub(super) fn not_acquired(mut self) {
        self.ended = true;
        self.shared.runs.leave();
    }

    /// The storage did not answer: the claim may exist, and the keeper releases it.
    pub(super) fn unknown(self) {
        drop(self);
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        keeper::release(&self.shared, self.key, self.token, Claimed::Perhaps);
        self.shared.runs.leave();
    }
}
