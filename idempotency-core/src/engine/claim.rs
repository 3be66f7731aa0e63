//! The right to run an operation once, and its end.

use std::{fmt, ops::ControlFlow, sync::Arc, time::Duration};

use super::{
    Shared,
    decide::Request,
    keeper,
    manual::Previous,
    releases::Claimed,
    run::{Answer, Phase, Run},
};
use crate::{
    Encoded, EncodedKey, Event, Held, Operation, Outcome, Record, Storage, StorageError,
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
    pub(super) encoded: Encoded,
    token: Token,
    stage: Stage,
    /// Of a claim on a conflict; rare, so it is boxed.
    previous: Option<Box<Previous>>,
}

/// How far a claim is.
enum Stage {
    /// It has a place under `max_running` and no run: the storage is asked for the claim, or is to be told of its end.
    Entered(Claimed),
    /// Its run is listed.
    Running,
    /// It has neither.
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
    /// A claim that has no place and no run.
    pub(super) fn new(shared: &Arc<Shared>, encoded: &Encoded) -> Self {
        Self {
            shared: shared.clone(),
            encoded: *encoded,
            token: Token::random_from(&shared.config.env),
            stage: Stage::Ended,
            previous: None,
        }
    }

    /// Takes a place under `max_running` before the storage is asked for a claim, unless this process knows something of the key. `None` if
    /// all are taken.
    ///
    /// If it is dropped before the answer is known, the keeper releases the claim that may have been made.
    pub(super) fn enter(request: Request<'_>, now: Duration) -> ControlFlow<Answer, Option<Self>> {
        let mut claim = Self::new(request.shared, request.encoded);
        let Shared { runs, config, .. } = &**request.shared;
        let has_place = runs.find_or_enter(&claim.encoded.key, now)?;
        if has_place {
            claim.stage = Stage::Entered(match config.lock.is_enabled() {
                true => Claimed::Perhaps,
                false => Claimed::No,
            });
        }
        ControlFlow::Continue(has_place.then_some(claim))
    }

    /// [`enter`](Self::enter) for an operation that is to run in a transaction. Its run is listed before the storage is asked.
    pub(super) fn list(
        request: Request<'_>,
        now: Duration,
        ttl: Duration,
    ) -> ControlFlow<Answer, Option<Self>> {
        let mut claim = Self::new(request.shared, request.encoded);
        let mut run = request.new_run(Phase::InTransaction, now);
        run.ttl = ttl;
        let has_place = request.shared.runs.find_or_add(now, claim.token, run)?;
        if has_place {
            claim.stage = Stage::Running;
        }
        ControlFlow::Continue(has_place.then_some(claim))
    }

    /// The storage did not grant the claim.
    pub(super) fn leave(mut self) {
        self.stage = Stage::Ended;
        self.shared.runs.leave();
    }

    /// The operation may run.
    pub(super) fn run(mut self, run: Run) -> Self {
        self.stage = Stage::Running;
        if self.shared.runs.add(self.token, run) {
            keeper::start(&self.shared);
        }
        self
    }

    /// The run has ended, and `record` is its outcome or that of the run before.
    pub(super) fn end_with(&mut self, record: &Record) {
        self.stage = Stage::Ended;
        let runs = &self.shared.runs;
        runs.end_with(self.token, &self.encoded.key, record);
    }

    /// For a conflict: the claim is the right to answer it.
    pub(super) fn on_conflict(mut self, previous: Previous) -> Self {
        self.previous = Some(Box::new(previous));
        self
    }

    /// The key whose operation may run.
    #[must_use]
    pub fn key(&self) -> EncodedKey {
        self.previous
            .as_ref()
            .map_or(self.encoded.key, |previous| previous.key)
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
                let _ = self.shared.runs.change(self.token, |run| run.ttl = ttl);
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
    pub async fn tombstone(mut self, reason: TombstoneReason) -> Completion {
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
        let Stage::Entered(claimed @ (Claimed::Yes | Claimed::Perhaps)) = self.stage else {
            return;
        };
        let Self { shared, token, .. } = &self;
        let key = &self.encoded.key;
        let released = shared.limited(shared.storage.release(key, *token)).await;
        if keeper::released(shared, key, claimed, released) {
            self.stage = Stage::Entered(Claimed::No);
        }
    }

    /// Whether this claim was held without interruption. Always true if there is none.
    pub(super) async fn was_held_throughout(&self) -> Result<bool, StorageError> {
        let Self { shared, token, .. } = self;
        if matches!(self.stage, Stage::Ended)
            || shared.runs.change(*token, |run| run.is_unclaimed()) == Some(true)
        {
            return Ok(true);
        }
        let renewed = shared
            .storage
            .renew(&self.encoded.key, *token, shared.lease());
        let is_held = shared.limited(renewed).await? == Held::Yes;
        // Looked at last: the keeper may have taken the claim again just before it was renewed.
        let is_whole = shared.runs.change(*token, |run| run.is_held_throughout());
        Ok(is_held && is_whole == Some(true))
    }

    /// The record of `outcome`.
    pub(super) fn record(&self, outcome: Outcome) -> Record {
        Record {
            fingerprint: self.encoded.fingerprint,
            outcome,
        }
    }

    pub(super) async fn finish(&mut self, outcome: Outcome) -> Completion {
        let key = self.encoded.key;
        let record = self.record(outcome);
        let (shared, token) = (self.shared.clone(), self.token);
        let finished = shared
            .runs
            .change(token, |run| (run.finish(&record), run.since));
        let (ttl, since) = match finished {
            Some((Some(ttl), since)) => (ttl, since),
            Some((None, _)) => {
                self.leave_to_keeper(false);
                return Completion::Expired;
            }
            // Removed by hand.
            None => return Completion::Lost,
        };
        let stored = shared.storage.complete(&key, token, &record, ttl);
        match shared.limited(stored).await {
            Ok(Held::Yes) => {
                shared.announce_stored(&key, since, &record);
                self.end_with(&record);
                Completion::Stored
            }
            Ok(Held::Lost) => {
                let _telling = shared.runs.telling();
                shared.runs.change(token, Run::end);
                shared.lost(&key, Operation::Complete);
                Completion::Lost
            }
            Err(error) => {
                shared.failed(&key, Operation::Complete, &error);
                match self.leave_to_keeper(true) {
                    true => Completion::Deferred,
                    false => Completion::Lost,
                }
            }
        }
    }

    /// Leaves the outcome to the keeper; meanwhile this process answers the key with it. `failed`: the storage refused it. Says whether there
    /// was one to leave: a key that was removed by hand, or is another's, has none.
    fn leave_to_keeper(&mut self, failed: bool) -> bool {
        self.stage = Stage::Ended;
        let Self { shared, token, .. } = self;
        let now = shared.now();
        let budget = &shared.config.budget;
        let late = shared
            .runs
            .change(*token, |run| run.defer(now, failed, budget))
            .flatten();
        if let Some(record) = &late {
            let key = self.encoded.key;
            shared.emit(&Event::Deferred { key });
            shared.runs.waiters.hand_over(&key, record);
            keeper::wake(shared);
        }
        late.is_some()
    }

    /// Ends the run, if there is one. What is left is to tell the storage, or the keeper.
    fn end_without_record(&mut self) {
        if !matches!(self.stage, Stage::Running) {
            return;
        }
        match self.shared.runs.withdraw(self.token) {
            Some(claimed) => self.stage = Stage::Entered(claimed),
            // The future that was storing its outcome is dropped, or the claim was given up.
            None => {
                self.leave_to_keeper(false);
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.end_without_record();
        let Stage::Entered(claimed) = self.stage else {
            return;
        };
        let Self { shared, token, .. } = self;
        let key = &self.encoded.key;
        match claimed {
            Claimed::No => shared.runs.waiters.wake_one(key),
            claimed => {
                keeper::release(shared, key, *token, claimed);
                keeper::wake(shared);
            }
        }
        shared.runs.leave();
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
