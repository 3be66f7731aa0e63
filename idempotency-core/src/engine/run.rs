//! One execution of an operation: its phases, and every step from one to the next.
//!
//! Nothing here does I/O or reads a clock. A method takes the time and what the storage said, and leaves the run in its next phase;
//! [`claim`](super::claim) and [`keeper`](super::keeper) talk to the storage.
//!
//! ```text
//!            finish              stored
//!   Held ──────────► Finishing ──────────► (ended)
//!    │ │                 │ failed             ▲ ▲
//!    │ │ max_hold        ▼                    │ │
//!    │ └──────► GivenUp ─────► Pending ───────┘ │ stored, refused for good, or its TTL is over
//!    │            │ operation ends, tombstone stored
//!    │            └─────────────────────────────┘
//!    └──────► Lost: another holder has the key
//! ```

use std::time::Duration;

use super::Progress;
use crate::{EncodedKey, Fingerprint, Outcome, Record, Reservation, TombstoneReason};

/// The longest pause between two attempts to store an outcome.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// After so many refusals of a record by a storage that answers other calls for its key, a tombstone is stored instead.
const REFUSALS: u32 = 3;

/// One execution.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) key: EncodedKey,
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) since: Duration,
    ttl: Duration,
    lease: Duration,
    phase: Phase,
    progress: Progress,
    /// Whether it counts among those that may run.
    pub(super) has_place: bool,
    /// The storage had no claim for a while, in which another may have held and released the key.
    interrupted: bool,
    /// How often its tombstone could not be stored.
    failures: u32,
    /// When the keeper must renew the claim, and when it must store a record.
    renew_at: Duration,
    store_at: Duration,
    /// Whether the keeper does so now.
    renewing: bool,
    storing: bool,
}

#[derive(Debug)]
enum Phase {
    /// The operation runs under its claim.
    Held,
    /// The operation runs in a transaction that holds the key. It is committed or rolled back by the operation's own future.
    InTransaction,
    /// The operation runs without a claim: `LockPolicy::disabled`.
    Unclaimed,
    /// Another holder has the key. The operation runs.
    Lost,
    /// The operation runs, but was held too long: its key gets a tombstone, last stored at this time.
    GivenUp(Option<Duration>),
    /// The operation is over and its own future is storing the outcome.
    Finishing(Record),
    /// The outcome is still to be stored, by the keeper.
    Pending(Pending),
}

#[derive(Debug)]
struct Pending {
    record: Record,
    /// How often the record was replaced while it was pending.
    replaced: u32,
    attempts: u32,
    /// Whether the last attempt failed, and nothing was asked of the storage since.
    failed: bool,
    /// How many attempts failed in a row though the storage answered another call for the key afterwards.
    refusals: u32,
    expires: Duration,
    /// Counts its bytes against `Config::max_buffered`.
    _held: Option<Reservation>,
}

/// When the keeper must look at a run. Outcomes are apart: in an outage there may be thousands, which are not to be gone through for
/// each renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) claim: Duration,
    pub(super) outcome: Duration,
}

impl Due {
    pub(super) const NEVER: Self = Self {
        claim: Duration::MAX,
        outcome: Duration::MAX,
    };
}

/// What the keeper has to do for a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Renew,
    /// Store the tombstone of an operation that was given up, or let it live on.
    Tombstone,
    /// Try again to store the outcome.
    Outcome,
}

/// Why a late outcome is still not stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The storage did not answer when it was asked what it has.
    Unanswered,
    /// It answered that, and then did not take the record.
    Refused,
}

/// How an operation's own future ends its run.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Finish {
    /// The record is to be stored for this long.
    Store(Duration),
    /// It is to be offered once: the key is another's.
    Offer(Duration),
    /// The operation was given up before: a tombstone stands.
    Expired,
}

/// What is left to do for a run that ends without another outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Left {
    /// It has an outcome that its own future did not store: the keeper does.
    Outcome,
    /// The storage has a claim of it to release.
    Claim,
    /// The storage has nothing of it.
    Nothing,
}

/// Whether a run is over.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(super) enum Next {
    Over,
    Goes,
}

/// What a request gets whose key has a run in this process.
pub(super) enum Answer {
    Running,
    /// What is still to be stored.
    Outcome(Record),
    /// The tombstone of an operation that still runs. Another may stand in its place at the storage.
    GivenUp(Record),
    Nothing,
}

/// A late outcome, for one attempt to store it.
pub(super) struct Late {
    pub(super) record: Record,
    pub(super) replaced: u32,
    pub(super) expires: Duration,
}

impl Run {
    /// A run under a claim whose lease counts from `since`, to be given up after `hold_limit`.
    pub(super) fn held(
        key: EncodedKey,
        fingerprint: Option<Fingerprint>,
        since: Duration,
        ttl: Duration,
        lease: Duration,
        hold_limit: Duration,
        progress: Progress,
    ) -> Self {
        Self {
            key,
            fingerprint,
            since,
            ttl,
            lease,
            phase: Phase::Held,
            progress,
            has_place: true,
            interrupted: false,
            failures: 0,
            renew_at: since.saturating_add(lease / 3),
            store_at: since.saturating_add(hold_limit),
            renewing: false,
            storing: false,
        }
    }

    /// The same run without a claim.
    pub(super) fn without_claim(self) -> Self {
        Self {
            phase: Phase::Unclaimed,
            renew_at: Duration::MAX,
            ..self
        }
    }

    /// The same run in a transaction.
    pub(super) fn in_transaction(self) -> Self {
        Self {
            phase: Phase::InTransaction,
            renew_at: Duration::MAX,
            store_at: Duration::MAX,
            ..self
        }
    }

    // ---- questions

    /// Whether this run decides what other requests for its key get in this process.
    pub(super) fn answers(&self) -> bool {
        !matches!(self.phase, Phase::Unclaimed | Phase::Lost)
    }

    pub(super) fn answer(&self, now: Duration) -> Answer {
        match &self.phase {
            Phase::Held | Phase::InTransaction | Phase::Finishing(_) => Answer::Running,
            Phase::GivenUp(_) => Answer::GivenUp(self.tombstone()),
            // The keeper may be late to drop it.
            Phase::Pending(pending) if pending.expires <= now => Answer::Nothing,
            Phase::Pending(pending) => Answer::Outcome(pending.record.clone()),
            Phase::Unclaimed | Phase::Lost => Answer::Nothing,
        }
    }

    pub(super) fn is_unclaimed(&self) -> bool {
        matches!(self.phase, Phase::Unclaimed)
    }

    pub(super) fn is_pending(&self) -> bool {
        matches!(self.phase, Phase::Pending(_))
    }

    /// The outcome that is still to be stored.
    pub(super) fn late_record(&self) -> Option<Record> {
        match &self.phase {
            Phase::Pending(pending) => Some(pending.record.clone()),
            _ => None,
        }
    }

    /// Whether the claim is held, and was all the time.
    pub(super) fn is_held_throughout(&self) -> bool {
        matches!(self.phase, Phase::Held) && !self.interrupted
    }

    /// The record of an operation that was held too long.
    pub(super) fn tombstone(&self) -> Record {
        Record {
            fingerprint: self.fingerprint,
            outcome: Outcome::Tombstone(TombstoneReason::MaxHold),
        }
    }

    /// How long a tombstone is stored while its operation still runs: should this process die, or should the operation end just now,
    /// the TTL is still to come.
    pub(super) fn tombstone_ttl(&self) -> Duration {
        self.ttl.saturating_add(self.lease)
    }

    // ---- transitions of the keeper

    /// When the keeper must look at it next: for its claim, and for its outcome.
    pub(super) fn due(&self) -> Due {
        let unless = |under_way, at| if under_way { Duration::MAX } else { at };
        let renew_at = unless(self.renewing, self.renew_at);
        let store_at = unless(self.storing, self.store_at);
        match self.phase {
            Phase::Pending(_) => Due {
                claim: renew_at,
                outcome: store_at,
            },
            _ => Due {
                claim: renew_at.min(store_at),
                outcome: Duration::MAX,
            },
        }
    }

    /// Starts a renewal that is due up to `horizon`.
    pub(super) fn take_renewal(&mut self, horizon: Duration) -> Option<Job> {
        if self.renewing || self.renew_at > horizon {
            return None;
        }
        self.renewing = true;
        Some(Job::Renew)
    }

    pub(super) fn take_store(&mut self, now: Duration) -> Option<Job> {
        if self.storing || self.store_at > now {
            return None;
        }
        let job = match self.phase {
            Phase::Held => {
                self.give_up(Phase::GivenUp(None));
                Job::Tombstone
            }
            Phase::Lost => {
                self.give_up(Phase::Lost);
                return None;
            }
            // Never due.
            Phase::InTransaction => return None,
            Phase::Unclaimed => {
                self.give_up(Phase::Unclaimed);
                return None;
            }
            Phase::GivenUp(_) => Job::Tombstone,
            Phase::Pending(_) => Job::Outcome,
            Phase::Finishing(ref record) => {
                self.phase = Phase::Pending(Pending {
                    record: record.clone(),
                    replaced: 0,
                    attempts: 0,
                    failed: false,
                    refusals: 0,
                    expires: now.saturating_add(self.ttl),
                    // The future that stands still holds it too, and is counted.
                    _held: None,
                });
                Job::Outcome
            }
        };
        self.storing = true;
        Some(job)
    }

    /// Gives the claim up after `max_hold`: its place is free, and an operation without a client need not go on.
    fn give_up(&mut self, phase: Phase) {
        self.phase = phase;
        self.has_place = false;
        self.store_at = Duration::MAX;
        self.progress.give_up();
    }

    /// The keeper was dropped in the middle of its work.
    pub(super) fn start_over(&mut self) {
        self.renewing = false;
        if std::mem::take(&mut self.storing) {
            self.store_at = Duration::ZERO;
        }
    }

    /// A job ended in a panic of the storage: it is left alone for a while.
    pub(super) fn put_off(&mut self, job: Job, now: Duration) {
        let later = now.saturating_add(self.lease / 6);
        match job {
            Job::Renew => {
                self.renewing = false;
                self.renew_at = self.renew_at.max(later);
            }
            Job::Tombstone | Job::Outcome => {
                self.storing = false;
                self.store_at = self.store_at.max(later);
            }
        }
    }

    /// A renewal succeeded at `now`.
    pub(super) fn renewed(&mut self, now: Duration) {
        self.renewing = false;
        self.renew_at = match self.phase {
            // The tombstone that stands in the claim's place is let live on by itself.
            Phase::GivenUp(Some(_)) | Phase::Lost | Phase::InTransaction | Phase::Unclaimed => {
                Duration::MAX
            }
            _ => now.saturating_add(self.lease / 3),
        };
    }

    /// A renewal failed at `now`, or it is not known whether it succeeded.
    pub(super) fn renewal_failed(&mut self, now: Duration) {
        self.renewed(now);
        if self.renew_at != Duration::MAX {
            self.renew_at = now.saturating_add(self.lease / 6);
        }
    }

    /// The claim is not ours any more. Says whether it is to be taken again, because the operation still runs.
    #[must_use]
    pub(super) fn claim_is_gone(&mut self) -> bool {
        if matches!(self.phase, Phase::Held) {
            // Set before the claim is taken again, so that whoever finds it renewable finds this too.
            self.interrupted = true;
            return true;
        }
        // What is to be stored will show whose the key is.
        self.renewing = false;
        self.renew_at = Duration::MAX;
        false
    }

    /// The claim was taken again. Says whether it is still wanted: otherwise the run was released or removed meanwhile.
    #[must_use]
    pub(super) fn reclaimed(&mut self, now: Duration) -> bool {
        self.renewed(now);
        self.answers()
    }

    /// Another holder has the key. Says whether that is new.
    #[must_use]
    pub(super) fn lose(&mut self) -> bool {
        self.renewing = false;
        self.renew_at = Duration::MAX;
        let is_new = matches!(self.phase, Phase::Held);
        if is_new {
            self.phase = Phase::Lost;
        }
        is_new
    }

    /// The tombstone was stored at `now`. `None` if the operation ended meanwhile and left it to the keeper, so that all is done;
    /// else whether it was the first time.
    pub(super) fn tombstone_stored(&mut self, now: Duration) -> Option<bool> {
        self.storing = false;
        match &mut self.phase {
            Phase::GivenUp(stored) => {
                let is_first = stored.replace(now).is_none();
                self.renew_at = Duration::MAX;
                self.store_at = now.saturating_add(self.lease / 3);
                Some(is_first)
            }
            Phase::Pending(pending) if pending.replaced == 0 => None,
            _ => Some(false),
        }
    }

    /// Another holder has the key, so no tombstone is stored. Over, if the operation ended meanwhile and left it to the keeper.
    pub(super) fn tombstone_lost(&mut self) -> Next {
        self.storing = false;
        self.renew_at = Duration::MAX;
        match &self.phase {
            Phase::Pending(pending) if pending.replaced == 0 => return Next::Over,
            Phase::GivenUp(_) => self.phase = Phase::Lost,
            _ => {}
        }
        self.store_at = Duration::MAX;
        Next::Goes
    }

    /// The tombstone could not be stored.
    pub(super) fn tombstone_failed(&mut self, now: Duration) {
        self.storing = false;
        if let Phase::GivenUp(stored) = &self.phase {
            self.store_at = now.saturating_add(match stored {
                None => pause(self.failures, self.lease),
                Some(_) => self.lease / 6,
            });
            self.failures += 1;
        }
    }

    /// What is to be stored late; `None` if somebody else has stored it.
    pub(super) fn late(&mut self) -> Option<Late> {
        let Phase::Pending(pending) = &self.phase else {
            self.storing = false;
            return None;
        };
        Some(Late {
            record: pending.record.clone(),
            replaced: pending.replaced,
            expires: pending.expires,
        })
    }

    /// The storage refused a late outcome, or did not answer at all when it was asked whether it has it.
    pub(super) fn late_failed(&mut self, now: Duration, failure: Failure) {
        self.storing = false;
        if let Phase::Pending(pending) = &mut self.phase {
            pending.attempts += 1;
            pending.failed = failure == Failure::Refused;
            // Where a tombstone was refused as well it was not for the record.
            if failure == Failure::Unanswered || pending.refusals + 1 >= REFUSALS {
                pending.refusals = 0;
            }
            self.store_at = now
                .saturating_add(pause(pending.attempts, self.lease))
                .min(pending.expires);
        }
    }

    /// The storage answered another call for the key, so a failure before was about the record. Says whether the next one is the last:
    /// then a tombstone is to be stored in its place.
    #[must_use]
    pub(super) fn answered(&mut self) -> bool {
        let Phase::Pending(pending) = &mut self.phase else {
            return false;
        };
        if std::mem::take(&mut pending.failed) {
            pending.refusals += 1;
        }
        pending.refusals + 1 >= REFUSALS
    }

    /// A late outcome was stored. Over, unless it was replaced since, more than `replaced` times: then that is still to be stored.
    pub(super) fn late_stored(&mut self, replaced: u32) -> Next {
        self.storing = false;
        match &self.phase {
            Phase::Pending(pending) if pending.replaced > replaced => {
                self.store_at = Duration::ZERO;
                Next::Goes
            }
            _ => Next::Over,
        }
    }

    // ---- transitions of the claim

    /// The operation is over, with an outcome.
    pub(super) fn finish(&mut self, record: &Record, now: Duration) -> Finish {
        match self.phase {
            Phase::GivenUp(_) => Finish::Expired,
            // Its outcome is offered once, and nobody here answers from it.
            Phase::Lost => Finish::Offer(self.ttl),
            _ => {
                self.phase = Phase::Finishing(record.clone());
                // Its runtime may stand still: then the keeper stores it.
                self.store_at = now.saturating_add(self.lease);
                Finish::Store(self.ttl)
            }
        }
    }

    /// Leaves the outcome to the keeper; `failed`: after the storage refused it. Over if there is nothing left to store.
    pub(super) fn defer(
        &mut self,
        now: Duration,
        failed: bool,
        hold: impl FnOnce(&Record) -> Reservation,
    ) -> Next {
        let (record, first) = match &self.phase {
            Phase::Finishing(record) => (record.clone(), now.saturating_add(pause(0, self.lease))),
            Phase::GivenUp(stored) => {
                // What was stored in the last lease outlives the TTL that is to come.
                if stored.is_some_and(|at| now.saturating_sub(at) <= self.lease) {
                    return Next::Over;
                }
                (self.tombstone(), now)
            }
            // The keeper has taken it over.
            Phase::Pending(_) => return Next::Goes,
            _ => return Next::Over,
        };
        let expires = now.saturating_add(self.ttl);
        self.store_at = first.min(expires);
        self.phase = Phase::Pending(Pending {
            _held: Some(hold(&record)),
            record,
            replaced: 0,
            attempts: 0,
            failed,
            refusals: 0,
            expires,
        });
        Next::Goes
    }

    /// The operation is over, and gives no outcome (any more).
    pub(super) fn left(&self) -> Left {
        match self.phase {
            Phase::Finishing(_) | Phase::GivenUp(_) | Phase::Pending(_) => Left::Outcome,
            Phase::Held => Left::Claim,
            Phase::InTransaction | Phase::Unclaimed | Phase::Lost => Left::Nothing,
        }
    }

    /// The transaction was committed up to a recovery point, and the claim that it left is renewed from `now`, until `give_up_at`.
    pub(super) fn hold(&mut self, now: Duration, give_up_at: Duration) {
        if matches!(self.phase, Phase::InTransaction) {
            self.phase = Phase::Held;
            self.renew_at = now.saturating_add(self.lease / 3);
            self.store_at = give_up_at;
        }
    }

    /// A transaction is to take the place of the claim. Says whether that was held throughout.
    #[must_use]
    pub(super) fn lend(&mut self) -> bool {
        let is_held = self.is_held_throughout();
        if is_held {
            self.phase = Phase::InTransaction;
            self.renew_at = Duration::MAX;
            self.store_at = Duration::MAX;
        }
        is_held
    }

    /// The outcome will be kept for this long.
    pub(super) fn keep_for(&mut self, ttl: Duration) {
        self.ttl = ttl;
    }

    // ---- transitions by `Engine::replace` and `Engine::remove`

    /// Puts `record` in the place of an outcome that is still to be stored. Says whether there is one.
    #[must_use]
    pub(super) fn replace(&mut self, record: &Record, expires: Duration) -> bool {
        let Phase::Pending(pending) = &mut self.phase else {
            return false;
        };
        pending.record = record.clone();
        pending.expires = expires;
        pending.replaced += 1;
        pending.refusals = 0;
        true
    }

    /// The key was removed. Over if nobody but the keeper waits for the end of this run.
    pub(super) fn forget(&mut self) -> Next {
        if self.is_pending() {
            return Next::Over;
        }
        self.phase = Phase::Lost;
        Next::Goes
    }
}

/// 100 ms, doubling, at most a third of the lease and ten seconds.
fn pause(attempts: u32, lease: Duration) -> Duration {
    let pause = Duration::from_millis(100) * 2_u32.pow(attempts.min(10));
    pause.min(lease / 3).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};

    use super::*;
    use crate::{Budget, StoredResponse};

    const LEASE: Duration = Duration::from_secs(30);
    const MAX_HOLD: Duration = Duration::from_secs(600);
    const TTL: Duration = Duration::from_secs(3600);
    const SECOND: Duration = Duration::from_secs(1);

    fn run() -> (Run, Progress) {
        let progress = Progress::new();
        let key = EncodedKey::from_bytes([1; 32]);
        let zero = Duration::ZERO;
        let run = Run::held(key, None, zero, TTL, LEASE, MAX_HOLD, progress.clone());
        (run, progress)
    }

    fn record() -> Record {
        let response = StoredResponse::new(StatusCode::OK, &HeaderMap::new(), "answer");
        Record {
            fingerprint: None,
            outcome: Outcome::Response(response),
        }
    }

    fn pending(now: Duration) -> Run {
        let (mut run, _) = run();
        assert_eq!(run.finish(&record(), Duration::ZERO), Finish::Store(TTL));
        assert_eq!(run.defer(now, true, hold), Next::Goes);
        run
    }

    fn hold(_: &Record) -> Reservation {
        Budget::new(0).count(6)
    }

    #[test]
    fn a_claim_is_renewed_once_at_a_time() {
        let (mut run, _) = run();
        assert_eq!(run.due().claim, LEASE / 3);
        assert_eq!(run.take_renewal(LEASE / 3 - SECOND), None);
        assert_eq!(run.take_renewal(LEASE / 3), Some(Job::Renew));
        assert_eq!(run.take_renewal(LEASE), None, "it is under way");
        assert_eq!(run.due().claim, MAX_HOLD);
        run.renewed(LEASE / 2);
        assert_eq!(run.due().claim, LEASE / 2 + LEASE / 3);
        assert_eq!(run.take_renewal(LEASE), Some(Job::Renew));
        run.renewal_failed(LEASE);
        assert_eq!(run.due().claim, LEASE + LEASE / 6);
    }

    #[test]
    fn a_run_that_is_given_up_keeps_its_tombstone_alive() {
        let (mut run, progress) = run();
        assert_eq!(run.take_store(MAX_HOLD - SECOND), None);
        assert_eq!(run.take_store(MAX_HOLD), Some(Job::Tombstone));
        assert!(progress.is_given_up() && !run.has_place);
        assert!(
            matches!(run.answer(MAX_HOLD), Answer::GivenUp(record) if record == run.tombstone())
        );
        assert_eq!(run.tombstone_stored(MAX_HOLD), Some(true));
        assert_eq!(run.due().claim, MAX_HOLD + LEASE / 3);
        assert_eq!(
            run.take_store(MAX_HOLD + LEASE / 3),
            Some(Job::Tombstone),
            "the TTL may be over before the operation is"
        );
        assert_eq!(run.tombstone_stored(MAX_HOLD + LEASE / 3), Some(false));
        assert_eq!(run.finish(&record(), Duration::ZERO), Finish::Expired);
        assert_eq!(run.defer(MAX_HOLD + LEASE, false, hold), Next::Over);
    }

    #[test]
    fn a_tombstone_that_was_not_stored_is_left_to_the_keeper() {
        let (mut run, _) = run();
        assert_eq!(run.take_store(MAX_HOLD), Some(Job::Tombstone));
        run.tombstone_failed(MAX_HOLD);
        assert_eq!(run.finish(&record(), Duration::ZERO), Finish::Expired);
        assert_eq!(run.defer(MAX_HOLD, false, hold), Next::Goes);
        assert_eq!(run.late_record(), Some(run.tombstone()));
        assert_eq!(run.take_store(MAX_HOLD), Some(Job::Outcome));
        assert_eq!(run.late_stored(0), Next::Over);
    }

    #[test]
    fn an_outcome_whose_future_stands_still_is_stored_by_the_keeper() {
        let (mut run, _) = run();
        assert_eq!(run.finish(&record(), SECOND), Finish::Store(TTL));
        assert_eq!(run.take_store(LEASE), None);
        assert_eq!(run.take_store(SECOND + LEASE), Some(Job::Outcome));
        assert_eq!(run.late_record(), Some(record()));
        // The future goes on, and is dropped or fails.
        assert_eq!(run.left(), Left::Outcome);
        assert_eq!(run.defer(SECOND + LEASE, true, hold), Next::Goes);
        assert_eq!(run.late_stored(0), Next::Over);
    }

    #[test]
    fn a_lost_run_stores_no_tombstone_and_gives_its_place_back() {
        let (mut run, progress) = run();
        assert!(run.claim_is_gone());
        assert!(run.lose());
        assert!(!run.lose(), "once");
        assert!(!run.answers());
        assert_eq!(run.take_store(MAX_HOLD), None);
        assert!(progress.is_given_up() && !run.has_place);
        assert_eq!(run.due().claim, Duration::MAX);
        assert_eq!(run.finish(&record(), Duration::ZERO), Finish::Offer(TTL));
    }

    #[test]
    fn the_third_refusal_of_a_record_is_the_last() {
        let mut run = pending(Duration::ZERO);
        // The first one was that of the operation's own future.
        assert!(!run.answered());
        run.late_failed(SECOND, Failure::Refused);
        assert!(run.answered());
        run.late_failed(SECOND, Failure::Refused);
        assert!(!run.answered(), "not even a tombstone was stored");
    }

    #[test]
    fn an_outcome_answers_until_its_ttl_is_over() {
        let run = pending(Duration::ZERO);
        let at = |now| run.answer(now);
        assert!(matches!(at(TTL - SECOND), Answer::Outcome(found) if found == record()));
        assert!(matches!(at(TTL), Answer::Nothing));
    }

    #[test]
    fn an_outage_is_no_refusal() {
        let mut run = pending(Duration::ZERO);
        for _ in 0..100 {
            assert!(!run.answered());
            run.late_failed(SECOND, Failure::Unanswered);
        }
        assert!(run.late().is_some());
    }

    #[test]
    fn a_replacement_is_stored_after_what_it_replaced() {
        let mut run = pending(Duration::ZERO);
        assert_eq!(run.take_store(SECOND), Some(Job::Outcome));
        assert_eq!(run.late().map(|late| late.replaced), Some(0));
        assert!(run.replace(&record(), TTL));
        assert_eq!(run.late_stored(0), Next::Goes);
        assert_eq!(run.due().outcome, Duration::ZERO);
        assert_eq!(run.late().map(|late| late.replaced), Some(1));
        assert_eq!(run.late_stored(1), Next::Over);
    }

    #[test]
    fn a_keeper_that_was_dropped_leaves_its_work_to_the_next() {
        let mut run = pending(Duration::ZERO);
        assert_eq!(run.take_renewal(LEASE), Some(Job::Renew));
        assert_eq!(run.take_store(SECOND), Some(Job::Outcome));
        run.start_over();
        assert_eq!(run.take_renewal(LEASE), Some(Job::Renew));
        assert_eq!(run.take_store(SECOND), Some(Job::Outcome));
    }
}
