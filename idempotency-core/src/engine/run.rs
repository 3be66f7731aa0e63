//! One execution of an operation: its phases, and every step from one to the next.
//!
//! Nothing here does I/O or reads a clock. A method takes the time and what the storage said, leaves the run in its next phase, and
//! returns what is to be done; [`claim`](super::claim) and [`keeper`](super::keeper) talk to the storage.
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
//!
//! In the place of a record that is refused for good, a tombstone is stored.

use std::time::Duration;

use super::{Progress, releases::Claimed};
use crate::{
    Budget, Config, Encoded, EncodedKey, Fingerprint, Held, Operation, Outcome, Record,
    Reservation, TombstoneReason,
};

/// The longest pause between two attempts to store an outcome.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// After so many refusals of a record in a row, the first of which the operation's own future may have met, by a storage that answers
/// other calls for its key, a tombstone is stored instead. If that is refused too, it was not for the record, and the count begins anew.
const REFUSALS: u32 = 3;

/// One execution.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) key: EncodedKey,
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) since: Duration,
    /// How long its outcome will be kept.
    pub(super) ttl: Duration,
    lease: Duration,
    phase: Phase,
    progress: Progress,
    /// Whether it counts among those that may run.
    pub(super) has_place: bool,
    /// The storage had no claim for a while, in which another may have held and released the key.
    interrupted: bool,
    /// How often in a row its record could not be stored.
    failures: u32,
    /// When the keeper must renew the claim, and when it must store a record.
    renewal: Timer,
    store: Timer,
}

#[derive(Debug)]
pub(super) enum Phase {
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
    /// Nothing is left to do.
    Ended,
}

#[derive(Debug)]
pub(super) struct Pending {
    record: Record,
    /// How often the record was replaced while it was pending.
    replaced: u32,
    /// How many attempts failed in a row though the storage answered another call for the key.
    refusals: u32,
    expires: Duration,
    /// Counts its bytes against `Config::max_buffered`.
    _held: Option<Reservation>,
}

/// When the keeper has something to do for a run, and whether it is at it.
#[derive(Debug)]
struct Timer {
    at: Duration,
    under_way: bool,
}

/// [`Duration::MAX`] is never.
impl Timer {
    fn at(at: Duration) -> Self {
        Self {
            at,
            under_way: false,
        }
    }

    fn due(&self) -> Duration {
        if self.under_way {
            return Duration::MAX;
        }
        self.at
    }

    /// Starts what is due up to `horizon`.
    fn take(&mut self, horizon: Duration) -> bool {
        let is_due = self.due() <= horizon;
        self.under_way |= is_due;
        is_due
    }
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
    /// Store the record of [`Run::late`].
    Store,
}

/// What a request gets whose key has a run in this process.
pub(super) enum Answer {
    Running(Option<Fingerprint>),
    /// What is still to be stored.
    Outcome(Record),
    /// The tombstone of an operation that still runs. Another may stand in its place at the storage.
    GivenUp(Record),
}

/// A record for the keeper's next attempt to store it.
pub(super) struct Late {
    pub(super) key: EncodedKey,
    pub(super) since: Duration,
    pub(super) record: Record,
    pub(super) replaced: u32,
    /// For how long it is to be stored. Zero: its TTL is over.
    pub(super) ttl: Duration,
    /// If the storage refuses the record this time, a tombstone is to be stored in its place.
    pub(super) is_last: bool,
}

impl Run {
    /// A run in its first phase. A lease counts from `since`.
    pub(super) fn new(
        phase: Phase,
        encoded: &Encoded,
        since: Duration,
        config: &Config,
        progress: &Progress,
    ) -> Self {
        let lease = config.lock.lease();
        let renew_at = match phase {
            Phase::Held => since.saturating_add(lease / 3),
            _ => Duration::MAX,
        };
        let give_up_at = match phase {
            Phase::InTransaction => Duration::MAX,
            _ => since.saturating_add(config.lock.longest_hold()),
        };
        Self {
            key: encoded.key,
            fingerprint: encoded.fingerprint,
            since,
            ttl: config.ttl,
            lease,
            phase,
            progress: progress.clone(),
            has_place: true,
            interrupted: false,
            failures: 0,
            renewal: Timer::at(renew_at),
            store: Timer::at(give_up_at),
        }
    }

    // ---- questions

    /// Whether this run decides what other requests for its key get in this process.
    pub(super) fn answers(&self) -> bool {
        !matches!(self.phase, Phase::Unclaimed | Phase::Lost | Phase::Ended)
    }

    pub(super) fn answer(&self, now: Duration) -> Option<Answer> {
        match &self.phase {
            Phase::Held | Phase::InTransaction | Phase::Finishing(_) => {
                Some(Answer::Running(self.fingerprint))
            }
            Phase::GivenUp(_) => Some(Answer::GivenUp(self.tombstone())),
            // The keeper may be late to drop it.
            Phase::Pending(pending) if pending.expires <= now => None,
            Phase::Pending(pending) => Some(Answer::Outcome(pending.record.clone())),
            Phase::Unclaimed | Phase::Lost | Phase::Ended => None,
        }
    }

    pub(super) fn is_unclaimed(&self) -> bool {
        matches!(self.phase, Phase::Unclaimed)
    }

    pub(super) fn is_pending(&self) -> bool {
        matches!(self.phase, Phase::Pending(_))
    }

    pub(super) fn has_ended(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// Whether the claim is held, and was all the time.
    pub(super) fn is_held_throughout(&self) -> bool {
        matches!(self.phase, Phase::Held) && !self.interrupted
    }

    /// The record of an operation that was held too long.
    fn tombstone(&self) -> Record {
        Record::tombstone(self.fingerprint, TombstoneReason::MaxHold)
    }

    // ---- transitions of the keeper

    /// When the keeper must look at it next: for its claim, and for its outcome.
    pub(super) fn due(&self) -> Due {
        let (renew_at, store_at) = (self.renewal.due(), self.store.due());
        let (claim, outcome) = match self.phase {
            Phase::Pending(_) => (renew_at, store_at),
            _ => (renew_at.min(store_at), Duration::MAX),
        };
        Due { claim, outcome }
    }

    /// Starts a renewal that is due up to `horizon`.
    pub(super) fn take_renewal(&mut self, horizon: Duration) -> Option<Job> {
        self.renewal.take(horizon).then_some(Job::Renew)
    }

    pub(super) fn take_store(&mut self, now: Duration) -> Option<Job> {
        if !self.store.take(now) {
            return None;
        }
        match &self.phase {
            Phase::Held => {
                self.phase = Phase::GivenUp(None);
                self.give_up();
            }
            Phase::Finishing(record) => {
                // The future that stands still holds it too, and is counted.
                self.pend(record.clone(), 0, now, None);
            }
            Phase::GivenUp(_) | Phase::Pending(_) => {}
            Phase::InTransaction | Phase::Unclaimed | Phase::Lost | Phase::Ended => {
                self.store = Timer::at(Duration::MAX);
                self.give_up();
                return None;
            }
        }
        Some(Job::Store)
    }

    /// Gives the claim up after `max_hold`: its place is free, and an operation without a client need not go on.
    fn give_up(&mut self) {
        self.has_place = false;
        self.progress.give_up();
    }

    fn pend(&mut self, record: Record, refusals: u32, now: Duration, held: Option<Reservation>) {
        self.failures = 0;
        self.phase = Phase::Pending(Pending {
            record,
            replaced: 0,
            refusals,
            expires: now.saturating_add(self.ttl),
            _held: held,
        });
    }

    /// The keeper was dropped in the middle of its work.
    pub(super) fn start_over(&mut self) {
        self.renewal.under_way = false;
        self.store.under_way = false;
    }

    /// A job ended in a panic: it is left alone for a while.
    pub(super) fn put_off(&mut self, job: Job, now: Duration) {
        let timer = match job {
            Job::Renew => &mut self.renewal,
            Job::Store => &mut self.store,
        };
        *timer = Timer::at(timer.at.max(now.saturating_add(self.lease / 6)));
    }

    /// A renewal succeeded at `now`.
    pub(super) fn renewed(&mut self, now: Duration) {
        self.renew_at(now.saturating_add(self.lease / 3));
    }

    /// A renewal failed at `now`, or it is not known whether it succeeded.
    pub(super) fn renewal_failed(&mut self, now: Duration) {
        self.renew_at(now.saturating_add(self.lease / 6));
    }

    fn renew_at(&mut self, at: Duration) {
        self.renewal = Timer::at(match self.phase {
            // The tombstone that stands in the claim's place is let live on by itself.
            Phase::GivenUp(Some(_)) | Phase::Lost | Phase::InTransaction | Phase::Unclaimed => {
                Duration::MAX
            }
            _ => at,
        });
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
        self.renewal = Timer::at(Duration::MAX);
        false
    }

    /// Another holder has the key. Says whether that is new.
    #[must_use]
    pub(super) fn lose(&mut self) -> bool {
        self.renewal = Timer::at(Duration::MAX);
        let is_new = matches!(self.phase, Phase::Held);
        if is_new {
            self.phase = Phase::Lost;
        }
        is_new
    }

    /// What is to be stored late; `None` if nothing is any more.
    pub(super) fn late(&mut self, now: Duration) -> Option<Late> {
        let (record, replaced, expires, is_last) = match &self.phase {
            // Should this process die, or should the operation end just now, the TTL is still to come.
            Phase::GivenUp(_) => {
                let expires = now.saturating_add(self.ttl).saturating_add(self.lease);
                (self.tombstone(), 0, expires, false)
            }
            Phase::Pending(pending) => (
                pending.record.clone(),
                pending.replaced,
                pending.expires,
                pending.refusals + 1 >= REFUSALS,
            ),
            _ => {
                self.store = Timer::at(Duration::MAX);
                return None;
            }
        };
        Some(Late {
            key: self.key,
            since: self.since,
            record,
            replaced,
            ttl: expires.saturating_sub(now),
            is_last,
        })
    }

    /// A record that was `replaced` so often was stored at `now`, or the storage said that another holder has the key, or its TTL is
    /// over. Says whether that is news.
    #[must_use]
    pub(super) fn late_stored(&mut self, held: Held, replaced: u32, now: Duration) -> bool {
        match (&mut self.phase, held) {
            (Phase::Pending(pending), _) if pending.replaced > replaced => {
                self.store = Timer::at(Duration::ZERO);
                false
            }
            // It may be the tombstone of an operation that ended meanwhile.
            (Phase::Pending(_), _) => {
                self.phase = Phase::Ended;
                true
            }
            (Phase::GivenUp(stored), Held::Yes) => {
                let is_first = stored.replace(now).is_none();
                self.failures = 0;
                self.renewal = Timer::at(Duration::MAX);
                self.store = Timer::at(now.saturating_add(self.lease / 3));
                is_first
            }
            (Phase::GivenUp(_), Held::Lost) => {
                self.phase = Phase::Lost;
                self.renewal = Timer::at(Duration::MAX);
                self.store = Timer::at(Duration::MAX);
                true
            }
            // It was removed by hand meanwhile.
            _ => {
                self.store = Timer::at(Duration::MAX);
                false
            }
        }
    }

    /// A record could not be stored because this `operation` failed. If that is no [`Operation::Complete`], the storage did not answer when
    /// it was asked what it has.
    pub(super) fn late_failed(&mut self, operation: Operation, now: Duration) {
        self.failures = self.failures.saturating_add(1);
        let mut again = now.saturating_add(pause(self.failures, self.lease));
        if let Phase::Pending(pending) = &mut self.phase {
            pending.refusals = match operation {
                // Where a tombstone was refused as well it was not for the record.
                Operation::Complete if pending.refusals + 1 >= REFUSALS => 1,
                Operation::Complete => pending.refusals + 1,
                _ => 0,
            };
            again = again.min(pending.expires);
        }
        self.store = Timer::at(again);
    }

    // ---- transitions of the claim

    /// The operation is over, with an outcome. Returns how long it is to be stored; `None` if the operation was given up before: a
    /// tombstone stands.
    pub(super) fn finish(&mut self, record: &Record) -> Option<Duration> {
        match self.phase {
            Phase::GivenUp(_) => return None,
            // Its outcome is offered once, and nobody here answers from it.
            Phase::Lost => {}
            _ => {
                self.phase = Phase::Finishing(record.clone());
                // Its runtime may stand still: then the keeper stores it, a lease after the renewal that comes next, or at `max_hold` if
                // there are none.
                if self.renewal.at != Duration::MAX {
                    self.store.at = self.renewal.at.saturating_add(self.lease);
                }
            }
        }
        Some(self.ttl)
    }

    /// Leaves the outcome to the keeper; `failed`: after the storage refused it. Returns it. `None` if there is nothing left to store: then
    /// the run has ended.
    pub(super) fn defer(&mut self, now: Duration, failed: bool, budget: &Budget) -> Option<Record> {
        let (record, first) = match &self.phase {
            Phase::Finishing(record) => (record.clone(), now.saturating_add(pause(0, self.lease))),
            // What was stored in the last lease outlives the TTL that is to come.
            Phase::GivenUp(stored)
                if stored.is_none_or(|at| now.saturating_sub(at) > self.lease) =>
            {
                (self.tombstone(), now)
            }
            // The keeper has taken it over.
            Phase::Pending(pending) => return Some(pending.record.clone()),
            _ => {
                self.phase = Phase::Ended;
                return None;
            }
        };
        let held = budget.count(match &record.outcome {
            Outcome::Response(response) => response.body().len(),
            Outcome::Tombstone(_) => 0,
        });
        self.store.at = first.min(now.saturating_add(self.ttl));
        self.pend(record.clone(), u32::from(failed), now, Some(held));
        Some(record)
    }

    /// What the storage has of a run that ends and gives no outcome (any more). `None` if it has one that its own future did not store:
    /// the keeper does.
    pub(super) fn left(&self) -> Option<Claimed> {
        match self.phase {
            Phase::Finishing(_) | Phase::GivenUp(_) | Phase::Pending(_) => None,
            Phase::Held => Some(Claimed::Yes),
            Phase::InTransaction | Phase::Unclaimed | Phase::Lost | Phase::Ended => {
                Some(Claimed::No)
            }
        }
    }

    /// The storage took the outcome, or said that the key is another's.
    pub(super) fn end(&mut self) {
        self.phase = Phase::Ended;
    }

    /// The transaction was committed up to a recovery point, and the claim that it left is renewed from `now`, until `give_up_at`.
    pub(super) fn hold(&mut self, now: Duration, give_up_at: Duration) {
        if matches!(self.phase, Phase::InTransaction) {
            self.phase = Phase::Held;
            self.renewal.at = now.saturating_add(self.lease / 3);
            self.store.at = give_up_at;
        }
    }

    /// A transaction is to take the place of the claim. Says whether that was held throughout.
    #[must_use]
    pub(super) fn lend(&mut self) -> bool {
        let is_held = self.is_held_throughout();
        if is_held {
            self.phase = Phase::InTransaction;
            self.renewal.at = Duration::MAX;
            self.store.at = Duration::MAX;
        }
        is_held
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

    /// The key was removed. The run has ended if nobody but the keeper waits for that.
    pub(super) fn forget(&mut self) {
        self.phase = match self.phase {
            Phase::Pending(_) => Phase::Ended,
            _ => Phase::Lost,
        };
    }
}

/// 100 ms, doubling, at most a third of the lease and ten seconds.
fn pause(failures: u32, lease: Duration) -> Duration {
    let pause = Duration::from_millis(100) * 2_u32.pow(failures.min(10));
    pause.min(lease / 3).min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, StatusCode};

    use super::*;
    use crate::{LockPolicy, StoredResponse};

    const LEASE: Duration = Duration::from_secs(30);
    const MAX_HOLD: Duration = Duration::from_secs(600);
    const TTL: Duration = Duration::from_secs(3600);
    const SECOND: Duration = Duration::from_secs(1);

    fn run() -> (Run, Progress) {
        let progress = Progress::new();
        let encoded = Encoded {
            key: EncodedKey::from_bytes([1; 32]),
            fingerprint: None,
        };
        let lock = LockPolicy::default().ttl(LEASE).max_hold(MAX_HOLD);
        let config = Config::default().ttl(TTL).lock(lock);
        let run = Run::new(Phase::Held, &encoded, Duration::ZERO, &config, &progress);
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
        assert_eq!(run.finish(&record()), Some(TTL));
        assert_eq!(run.defer(now, true, &Budget::new(0)), Some(record()));
        run
    }

    fn late_record(run: &mut Run) -> Option<Record> {
        run.late(Duration::ZERO).map(|late| late.record)
    }

    fn is_last(run: &mut Run) -> bool {
        run.late(Duration::ZERO).is_some_and(|late| late.is_last)
    }

    fn late_stored(run: &mut Run, replaced: u32) -> bool {
        run.late_stored(Held::Yes, replaced, Duration::ZERO)
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
        assert_eq!(run.take_store(MAX_HOLD), Some(Job::Store));
        assert!(progress.is_given_up() && !run.has_place);
        assert!(
            matches!(run.answer(MAX_HOLD), Some(Answer::GivenUp(record)) if record == run.tombstone())
        );
        assert_eq!(late_record(&mut run), Some(run.tombstone()));
        assert!(run.late_stored(Held::Yes, 0, MAX_HOLD));
        assert_eq!(run.due().claim, MAX_HOLD + LEASE / 3);
        assert_eq!(
            run.take_store(MAX_HOLD + LEASE / 3),
            Some(Job::Store),
            "the TTL may be over before the operation is"
        );
        assert!(
            !run.late_stored(Held::Yes, 0, MAX_HOLD + LEASE / 3),
            "told once"
        );
        assert_eq!(run.finish(&record()), None);
        let budget = Budget::new(0);
        assert_eq!(run.defer(MAX_HOLD + LEASE, false, &budget), None);
        assert!(run.has_ended());
    }

    #[test]
    fn a_tombstone_that_was_not_stored_is_left_to_the_keeper() {
        let (mut run, _) = run();
        assert_eq!(run.take_store(MAX_HOLD), Some(Job::Store));
        run.late_failed(Operation::Complete, MAX_HOLD);
        assert_eq!(run.finish(&record()), None);
        let tombstone = run.tombstone();
        assert_eq!(
            run.defer(MAX_HOLD, false, &Budget::new(0)),
            Some(tombstone.clone())
        );
        assert_eq!(late_record(&mut run), Some(tombstone));
        assert_eq!(run.take_store(MAX_HOLD), Some(Job::Store));
        assert!(late_stored(&mut run, 0) && run.has_ended());
    }

    #[test]
    fn an_outcome_whose_future_stands_still_is_stored_by_the_keeper() {
        let (mut run, _) = run();
        assert_eq!(run.finish(&record()), Some(TTL));
        assert_eq!(run.take_store(SECOND + LEASE), None);
        let late = LEASE / 3 + LEASE;
        assert_eq!(run.take_store(late), Some(Job::Store));
        assert_eq!(late_record(&mut run), Some(record()));
        // The future goes on, and is dropped or fails.
        assert_eq!(run.left(), None);
        assert_eq!(run.defer(late, true, &Budget::new(0)), Some(record()));
        assert!(late_stored(&mut run, 0) && run.has_ended());
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
        assert_eq!(run.finish(&record()), Some(TTL));
        assert_eq!(
            run.defer(MAX_HOLD, true, &Budget::new(0)),
            None,
            "it is offered once"
        );
    }

    #[test]
    fn the_third_refusal_of_a_record_is_the_last() {
        let mut run = pending(Duration::ZERO);
        // The first one was that of the operation's own future.
        assert!(!is_last(&mut run));
        run.late_failed(Operation::Complete, SECOND);
        assert!(is_last(&mut run));
        run.late_failed(Operation::Complete, SECOND);
        assert!(!is_last(&mut run), "not even a tombstone was stored");
    }

    #[test]
    fn an_outcome_answers_until_its_ttl_is_over() {
        let run = pending(Duration::ZERO);
        let at = |now| run.answer(now);
        assert!(matches!(at(TTL - SECOND), Some(Answer::Outcome(found)) if found == record()));
        assert!(at(TTL).is_none());
    }

    #[test]
    fn an_outage_is_no_refusal() {
        let mut run = pending(Duration::ZERO);
        for _ in 0..100 {
            assert!(!is_last(&mut run));
            run.late_failed(Operation::Renew, SECOND);
        }
        assert!(run.late(SECOND).is_some());
    }

    #[test]
    fn a_replacement_is_stored_after_what_it_replaced() {
        let mut run = pending(Duration::ZERO);
        assert_eq!(run.take_store(SECOND), Some(Job::Store));
        assert_eq!(run.late(SECOND).map(|late| late.replaced), Some(0));
        assert!(run.replace(&record(), TTL));
        assert!(!late_stored(&mut run, 0) && !run.has_ended());
        assert_eq!(run.due().outcome, Duration::ZERO);
        assert_eq!(run.late(SECOND).map(|late| late.replaced), Some(1));
        assert!(late_stored(&mut run, 1) && run.has_ended());
    }

    #[test]
    fn a_keeper_that_was_dropped_leaves_its_work_to_the_next() {
        let mut run = pending(Duration::ZERO);
        assert_eq!(run.take_renewal(LEASE), Some(Job::Renew));
        assert_eq!(run.take_store(SECOND), Some(Job::Store));
        run.start_over();
        assert_eq!(run.take_renewal(LEASE), Some(Job::Renew));
        assert_eq!(run.take_store(SECOND), Some(Job::Store));
    }
}
