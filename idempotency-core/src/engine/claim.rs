//! The right to run an operation once, and its end.

use std::{fmt, ops::ControlFlow, sync::Arc, time::Duration};

use super::{
    Progress, Shared, keeper,
    manual::Previous,
    releases::Claimed,
    run::{Finish, Left, Run},
    runs::Found,
};
use crate::{
    Encoded, EncodedKey, Fingerprint, Held, Operation, Outcome, Record, Storage, StorageError,
    StoredResponse, Token, TombstoneReason,
};

/// The right to run the operation of a key. End it with [`complete`](Self::complete), [`tombstone`](Self::tombstone) or
/// [`release`](Self::release).
///
/// It is renewed until it ends, however long that takes, up to [`LockPolicy::max_hold`](crate::LockPolicy::max_hold).
///
/// A claim that is dropped is released in the background. Once an outcome was handed to it, dropping the future of that call changes
/// nothing: the outcome will be stored.
///
/// # On a conflict
///
/// [`Engine::begin_manual`](crate::Engine::begin_manual) also gives a claim for a key that has a record, which the claim then
/// [knows](Self::previous). It is the right to answer the conflict: no other such claim of the key is given out meanwhile, on any node,
/// unless claims are switched off ([`LockPolicy::disabled`](crate::LockPolicy::disabled)). [`complete`](Self::complete) replaces the
/// record; every other end keeps it.
#[must_use = "a claim that is dropped is released, and the operation may run again"]
pub struct Claim {
    pub(super) shared: Arc<Shared>,
    /// What is claimed at the storage.
    key: EncodedKey,
    token: Token,
    fingerprint: Option<Fingerprint>,
    stage: Stage,
    /// Of a claim on a conflict; rare, so it is boxed.
    previous: Option<Box<Previous>>,
}

/// How far a claim is.
enum Stage {
    /// It has a place under `max_running` and no run: the storage is asked for the claim, or is to be told of its end. `None` if the
    /// storage has nothing to release.
    Entered(Option<Claimed>),
    /// Its run is listed.
    Running,
    Ended,
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
    /// Another holder has the key: nothing was stored. On a conflict also: the claim was held longer than
    /// [`LockPolicy::max_hold`](crate::LockPolicy::max_hold), so another may have run since.
    Lost,
    /// The claim was held longer than [`LockPolicy::max_hold`](crate::LockPolicy::max_hold): a tombstone stands instead.
    Expired,
    /// On a conflict: the record of the run before stays, because there is no answer to replace it with, or because the storage failed to
    /// replace it. If it failed, the record most likely stays.
    Kept,
}

impl Claim {
    /// Takes a place under `max_running` before the storage is asked for a claim; `None` if all are taken.
    ///
    /// If it is dropped before the answer is known, the keeper releases the claim that may have been made.
    pub(super) fn enter(shared: &Arc<Shared>, encoded: &Encoded) -> Option<Self> {
        // Made before the place is taken: an environment of a user's may panic.
        let token = Token::random_from(&shared.options.env);
        let has_place = shared.runs.enter();
        has_place.then(|| Self::entered(shared, encoded, token))
    }

    /// [`enter`](Self::enter), unless this process knows something of the key.
    pub(super) fn find_or_enter(
        shared: &Arc<Shared>,
        encoded: &Encoded,
        now: Duration,
    ) -> ControlFlow<Found, Option<Self>> {
        let token = Token::random_from(&shared.options.env);
        let has_place = shared.runs.find_or_enter(&encoded.key, now)?;
        ControlFlow::Continue(has_place.then(|| Self::entered(shared, encoded, token)))
    }

    /// The claim of an operation that is to run in a transaction, unless this process knows something of the key. Its run is listed
    /// before the storage is asked.
    pub(super) fn find_or_list(
        shared: &Arc<Shared>,
        encoded: &Encoded,
        progress: &Progress,
    ) -> ControlFlow<Found, Option<Self>> {
        let now = shared.options.now();
        let token = Token::random_from(&shared.options.env);
        let mut claim = Self::entered(shared, encoded, token);
        claim.stage = Stage::Ended;
        let run = claim.new_run(now, progress).in_transaction();
        let has_place = shared.runs.find_or_add(now, token, run)?;
        if !has_place {
            return ControlFlow::Continue(None);
        }
        claim.stage = Stage::Running;
        ControlFlow::Continue(Some(claim))
    }

    /// The run has ended, and `record` is its outcome or that of the run before.
    pub(super) fn end_with(mut self, record: &Record) {
        self.stage = Stage::Ended;
        self.shared.runs.end_with(self.token, &self.key, record);
    }

    fn entered(shared: &Arc<Shared>, encoded: &Encoded, token: Token) -> Self {
        Self {
            shared: shared.clone(),
            key: encoded.key,
            token,
            fingerprint: encoded.fingerprint,
            stage: Stage::Entered(Some(Claimed::Perhaps)),
            previous: None,
        }
    }

    /// The storage did not grant the claim.
    pub(super) fn leave(mut self) {
        self.stage = Stage::Ended;
        self.shared.runs.leave();
    }

    /// The storage granted the claim. The lease counts from `since`, when it was asked.
    pub(super) fn run(self, since: Duration, progress: &Progress) -> Self {
        let run = self.new_run(since, progress);
        self.list(run)
    }

    /// The operation runs though the storage was not asked: claims are switched off.
    pub(super) fn run_unclaimed(self, progress: &Progress) -> Self {
        let run = self.new_run(self.shared.options.now(), progress);
        self.list(run.without_claim())
    }

    fn new_run(&self, since: Duration, progress: &Progress) -> Run {
        let options = &self.shared.options;
        Run::held(
            self.key,
            self.fingerprint,
            since,
            options.ttl,
            options.lease(),
            options.lock.longest_hold(),
            progress.clone(),
        )
    }

    fn list(mut self, run: Run) -> Self {
        self.stage = Stage::Running;
        if self.shared.runs.add(self.token, run) {
            keeper::start(&self.shared);
        }
        self
    }

    /// For a conflict: the claim is the right to answer it.
    pub(super) fn on_conflict(mut self, previous: Previous) -> Self {
        self.previous = Some(Box::new(previous));
        self
    }

    /// For a conflict that is answered though the storage failed to give a claim.
    pub(super) fn unprotected(shared: &Arc<Shared>, previous: Previous) -> Self {
        Self {
            shared: shared.clone(),
            key: previous.key,
            token: Token::random_from(&shared.options.env),
            fingerprint: None,
            stage: Stage::Ended,
            previous: Some(Box::new(previous)),
        }
    }

    /// The key whose operation may run.
    #[must_use]
    pub fn key(&self) -> EncodedKey {
        self.previous
            .as_ref()
            .map_or(self.key, |previous| previous.key)
    }

    /// Names this claim at the storage.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// The record of the run before, if this claim is on a conflict.
    #[must_use]
    pub fn previous(&self) -> Option<&Record> {
        self.previous.as_ref().map(|previous| &previous.record)
    }

    /// How long the outcome will be kept. Zero keeps none. Default: [`Config::ttl`](crate::Config::ttl).
    pub fn ttl(mut self, ttl: Duration) -> Self {
        match &mut self.previous {
            Some(previous) => previous.ttl = ttl,
            // A run that is gone was removed by hand; it has no outcome to keep.
            None => {
                let _ = self.shared.runs.change(self.token, |run| run.keep_for(ttl));
            }
        }
        self
    }

    /// Stores the operation's answer and ends the claim. On a conflict the answer takes the place of the record, and the TTL starts anew.
    pub async fn complete(mut self, response: StoredResponse) -> Completion {
        match self.previous.take() {
            None => self.finish(Outcome::Response(response)).await,
            Some(previous) => Box::pin(self.replace(*previous, response)).await,
        }
    }

    /// Ends the claim with a tombstone: the operation ran, has no answer to replay, and must not run again. On a conflict the record stays.
    pub async fn tombstone(self, reason: TombstoneReason) -> Completion {
        match self.previous {
            None => self.finish(Outcome::Tombstone(reason)).await,
            Some(_) => {
                self.release().await;
                Completion::Kept
            }
        }
    }

    /// Ends the claim without a record: a retry runs. On a conflict the record stays.
    ///
    /// Where the storage fails it is tried again in the background, until the lease is over anyway.
    pub async fn release(mut self) {
        self.end_without_record();
        if let Stage::Entered(Some(claimed)) = self.stage
            && keeper::try_release(&self.shared, &self.key, self.token, claimed).await
        {
            self.stage = Stage::Entered(None);
        }
    }

    /// Whether this claim was held without interruption. Always true if there is none.
    pub(super) async fn was_held_throughout(&self) -> Result<bool, StorageError> {
        let Self {
            shared, key, token, ..
        } = self;
        if matches!(self.stage, Stage::Ended)
            || shared.runs.change(*token, |run| run.is_unclaimed()) == Some(true)
        {
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
                self.stage = Stage::Ended;
                return Completion::Lost;
            }
        };
        let stored = shared.storage.complete(&self.key, self.token, &record, ttl);
        match shared.limited(stored).await {
            Ok(Held::Yes) => {
                keeper::tell_observers(&shared, &self.key, since, &record, Held::Yes);
                self.stage = Stage::Ended;
                shared.runs.end_with(self.token, &self.key, &record);
                Completion::Stored
            }
            Ok(Held::Lost) => {
                self.stage = Stage::Ended;
                let _telling = shared.runs.end(self.token);
                keeper::completed(&shared, &self.key, since, &record, Held::Lost);
                Completion::Lost
            }
            Err(error) => {
                shared.failed(&self.key, Operation::Complete, &error);
                if is_offer {
                    self.stage = Stage::Ended;
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
        self.stage = Stage::Ended;
        keeper::defer(&self.shared, self.token, failed)
    }

    /// Ends the run, if there is one. What is left is to tell the storage, or the keeper.
    fn end_without_record(&mut self) {
        if !matches!(self.stage, Stage::Running) {
            return;
        }
        self.stage = Stage::Ended;
        match self.shared.runs.withdraw(self.token) {
            // The future that was storing it is dropped, or the claim was given up.
            Some(Left::Outcome) => {
                self.leave_to_keeper(false);
            }
            Some(Left::Claim) => self.stage = Stage::Entered(Some(Claimed::Yes)),
            Some(Left::Nothing) => self.stage = Stage::Entered(None),
            None => {}
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.end_without_record();
        let Stage::Entered(claimed) = self.stage else {
            return;
        };
        match claimed {
            Some(claimed) => keeper::release(&self.shared, self.key, self.token, claimed),
            None => self.shared.runs.waiters.wake_one(&self.key),
        }
        self.shared.runs.leave();
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim")
            .field("key", &self.key())
            .field("token", &self.token)
            .field("previous", &self.previous())
            .finish_non_exhaustive()
    }
}
