//! The runs of this process, the limits on them, and when the keeper has to look at which.
//!
//! A `std` mutex guards it all: every section is a few map operations, and none spans an await or runs code that is not ours.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap, HashSet, hash_map},
    ops::ControlFlow,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    releases::{Claimed, Release, Releases},
    run::{Answer, Due, Job, Run},
    waiters::{Waiter, Waiters},
};
use crate::{EncodedKey, Record, Token, key::HashKeys};

/// The runs of an engine by token, and what its keeper has to do.
#[derive(Debug)]
pub(super) struct Runs {
    table: Mutex<Table>,
    pub(super) waiters: Waiters,
    /// Notified when nothing runs any more.
    drained: Notify,
    /// Notified when the keeper has something to do before it would look.
    work: Notify,
    max_running: usize,
    max_waiting: usize,
}

#[derive(Debug, Default)]
struct Table {
    runs: HashMap<Token, Run, HashKeys>,
    /// The run that answers for a key here.
    by_key: HashMap<EncodedKey, Token, HashKeys>,
    /// When the keeper has to look at a run: for its claim, and for an outcome that is still to be stored.
    claims: DueQueue,
    outcomes: DueQueue,
    releases: Releases,
    /// Claims between `enter` and `add` or `leave`: they have a place and no run.
    entered: usize,
    /// How many [`Telling`] there are.
    telling: usize,
    /// Runs that count among those that may run.
    places: usize,
    waiting: usize,
    keeper_alive: bool,
    clearing: HashSet<EncodedKey>,
}

/// When the keeper has to look at which run.
///
/// An entry whose run has ended, or is due at another time by now, stays until it is met: so the end of a run costs nothing here. All
/// leases are of one length, so nearly every entry is pushed in order, which is cheap for a heap.
#[derive(Debug, Default)]
struct DueQueue(BinaryHeap<Reverse<(Duration, Token)>>);

impl DueQueue {
    /// [`Duration::MAX`] is never.
    fn push(&mut self, at: Duration, token: Token) {
        if at != Duration::MAX {
            self.0.push(Reverse((at, token)));
        }
    }

    fn first(&mut self, is_current: impl Fn(Duration, Token) -> bool) -> Duration {
        while let Some(Reverse((at, token))) = self.0.peek() {
            if is_current(*at, *token) {
                return *at;
            }
            self.0.pop();
        }
        Duration::MAX
    }

    fn take_until(
        &mut self,
        end: Duration,
        is_current: impl Fn(Duration, Token) -> bool,
    ) -> Vec<Token> {
        let mut due = Vec::new();
        while let Some(Reverse((at, token))) = self.0.peek().copied()
            && at <= end
        {
            self.0.pop();
            if is_current(at, token) {
                due.push(token);
            }
        }
        due
    }

    fn drop_outdated(&mut self, is_current: impl Fn(Duration, Token) -> bool) {
        self.0
            .retain(|Reverse((at, token))| is_current(*at, *token));
    }
}

/// Whether the queue of claims, or that of outcomes, says of a run what the run says itself.
fn is_current(
    runs: &HashMap<Token, Run, HashKeys>,
    due: fn(Due) -> Duration,
) -> impl Fn(Duration, Token) -> bool {
    move |at, token| runs.get(&token).is_some_and(|run| due(run.due()) == at)
}

impl Table {
    /// Changes a run, and what follows from it. `None` if there is no such run (any more).
    fn change<T>(&mut self, token: Token, change: impl FnOnce(&mut Run) -> T) -> Option<T> {
        let run = self.runs.get_mut(&token)?;
        let (had_place, before) = (run.has_place, run.due());
        let result = change(run);
        if had_place && !run.has_place {
            self.places -= 1;
        }
        if !run.answers() {
            if self.by_key.get(&run.key) == Some(&token) {
                self.by_key.remove(&run.key);
            }
        } else if run.is_pending() {
            // An outcome that is still to be stored answers for its key, whether it was claimed or not.
            self.by_key.entry(run.key).or_insert(token);
        }
        if run.has_ended() {
            self.remove(token);
            return Some(result);
        }
        let due = run.due();
        self.queue(token, before, due);
        Some(result)
    }

    /// Queues a run for the keeper, if it is due at another time than before.
    fn queue(&mut self, token: Token, before: Due, due: Due) {
        if due.claim != before.claim {
            self.claims.push(due.claim, token);
        }
        if due.outcome != before.outcome {
            self.outcomes.push(due.outcome, token);
        }
        // Outdated entries are at most as many as runs, and a few.
        let most = 2 * self.runs.len() + 64;
        if self.claims.0.len() > most || self.outcomes.0.len() > most {
            self.drop_outdated();
        }
    }

    fn drop_outdated(&mut self) {
        self.claims
            .drop_outdated(is_current(&self.runs, |due| due.claim));
        self.outcomes
            .drop_outdated(is_current(&self.runs, |due| due.outcome));
    }

    fn remove(&mut self, token: Token) -> Option<Run> {
        let run = self.runs.remove(&token)?;
        self.places -= usize::from(run.has_place);
        if let hash_map::Entry::Occupied(holder) = self.by_key.entry(run.key)
            && *holder.get() == token
        {
            holder.remove();
        }
        Some(run)
    }

    fn of_key(&self, key: &EncodedKey) -> Option<&Run> {
        let token = self.by_key.get(key)?;
        self.runs.get(token)
    }

    fn find(&self, key: &EncodedKey, now: Duration) -> Option<Answer> {
        self.of_key(key)?.answer(now)
    }

    /// Takes a place among those that run, if there is one.
    fn enter(&mut self, max_running: usize) -> bool {
        let free = self.places + self.entered < max_running;
        self.entered += usize::from(free);
        free
    }

    /// Adds a run in the place of one that entered.
    fn add(&mut self, token: Token, run: Run) {
        self.entered -= 1;
        self.places += 1;
        if run.answers() {
            self.by_key.insert(run.key, token);
        }
        let due = run.due();
        self.runs.insert(token, run);
        self.queue(token, Due::NEVER, due);
    }

    fn is_drained(&self) -> bool {
        self.runs.is_empty() && self.entered == 0 && self.telling == 0 && self.releases.is_empty()
    }
}

impl Runs {
    pub(super) fn new(max_running: usize, max_waiting: usize) -> Self {
        Self {
            table: Mutex::default(),
            waiters: Waiters::default(),
            drained: Notify::new(),
            work: Notify::new(),
            max_running,
            max_waiting,
        }
    }

    /// The table stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(&self, key: &EncodedKey, now: Duration) -> Option<Answer> {
        self.lock().find(key, now)
    }

    /// [`find`](Self::find); if nothing is known of the key, takes a place among those that run, if there is one, in the same step. Give it
    /// back with [`leave`](Self::leave), or turn it into a run with [`add`](Self::add).
    pub(super) fn find_or_enter(
        &self,
        key: &EncodedKey,
        now: Duration,
    ) -> ControlFlow<Answer, bool> {
        let mut table = self.lock();
        match table.find(key, now) {
            None => ControlFlow::Continue(table.enter(self.max_running)),
            Some(answer) => ControlFlow::Break(answer),
        }
    }

    /// A waiter that is woken by whatever happens to `key` here from now on, or the outcome that is here already.
    pub(super) fn subscribe(&self, key: &EncodedKey, now: Duration) -> Result<Waiter, Record> {
        let table = self.lock();
        match table.find(key, now) {
            Some(Answer::Outcome(record) | Answer::GivenUp(record)) => Err(record),
            _ => Ok(self.waiters.subscribe(key, table.by_key.contains_key(key))),
        }
    }

    // ---- runs

    pub(super) fn leave(&self) {
        let mut table = self.lock();
        table.entered -= 1;
        self.check_drained(&table);
    }

    /// Adds a run in the place of one that entered. Says whether a keeper must be started, which the caller then has to do: one that
    /// lives need not be woken, since it looks before a new claim is due.
    #[must_use]
    pub(super) fn add(&self, token: Token, run: Run) -> bool {
        let mut table = self.lock();
        table.add(token, run);
        !std::mem::replace(&mut table.keeper_alive, true)
    }

    /// [`find_or_enter`](Self::find_or_enter) and [`add`](Self::add) in one step, for a run that has nothing for the keeper: duplicates
    /// find it before the storage was asked.
    pub(super) fn find_or_add(
        &self,
        now: Duration,
        token: Token,
        run: Run,
    ) -> ControlFlow<Answer, bool> {
        let mut table = self.lock();
        if let Some(answer) = table.find(&run.key, now) {
            return ControlFlow::Break(answer);
        }
        let has_place = table.enter(self.max_running);
        if has_place {
            table.add(token, run);
        }
        ControlFlow::Continue(has_place)
    }

    /// Changes a run, and drops it if it has ended. `None` if there is no such run (any more).
    pub(super) fn change<T>(&self, token: Token, change: impl FnOnce(&mut Run) -> T) -> Option<T> {
        let mut table = self.lock();
        let result = table.change(token, change);
        self.check_drained(&table);
        result
    }

    /// Ends a run of whose outcome the observers were told, and hands the record to those who wait. It is one step, so nobody begins to
    /// wait for a run that has ended.
    pub(super) fn end_with(&self, token: Token, key: &EncodedKey, record: &Record) {
        let mut table = self.lock();
        let run = table.remove(token);
        let handed = self.waiters.hand(key, record);
        self.check_drained(&table);
        drop(table);
        // Not under the lock: what is dropped or woken may be somebody else's code.
        drop(run);
        handed.wake();
    }

    /// Holds `drain` up until observers and waiters are told of a run that may have ended.
    pub(super) fn telling(&self) -> Telling<'_> {
        self.lock().telling += 1;
        Telling { runs: self }
    }

    /// Ends a run that has no outcome, and says what the storage has of it. The run counts as entered until [`leave`](Self::leave).
    /// `None` if it has an outcome, or if there is no such run.
    pub(super) fn withdraw(&self, token: Token) -> Option<Claimed> {
        let mut table = self.lock();
        let left = table.runs.get(&token)?.left()?;
        let _run = table.remove(token)?;
        table.entered += 1;
        drop(table);
        Some(left)
    }

    /// Puts `record` in the place of an outcome that is still to be stored. Says whether there is one under `key`.
    #[must_use]
    pub(super) fn replace(&self, key: &EncodedKey, record: &Record, expires: Duration) -> bool {
        let mut table = self.lock();
        let Some(token) = table.by_key.get(key).copied() else {
            return false;
        };
        table.change(token, |run| run.replace(record, expires)) == Some(true)
    }

    /// The run that answers for `key` here.
    pub(super) fn holder(&self, key: &EncodedKey) -> Option<Token> {
        self.lock().by_key.get(key).copied()
    }

    /// The key was removed by hand while `holder` was its run, which answers for nothing any more. Says whether it did.
    pub(super) fn forget(&self, key: &EncodedKey, holder: Option<Token>) -> bool {
        let mut table = self.lock();
        let forgotten = holder.filter(|token| table.by_key.get(key) == Some(token));
        if let Some(token) = forgotten {
            table.change(token, Run::forget);
            self.check_drained(&table);
        }
        drop(table);
        self.waiters.wake_all(key);
        forgotten.is_some()
    }

    pub(super) fn running(&self) -> usize {
        self.lock().runs.len()
    }

    // ---- the keeper's work

    /// Takes what is due at `now`, and the renewals that are up to `horizon`.
    pub(super) fn take_due(&self, now: Duration, horizon: Duration) -> Vec<(Token, Job)> {
        let mut table = self.lock();
        let Table {
            runs,
            claims,
            outcomes,
            ..
        } = &mut *table;
        let claims = claims.take_until(horizon, is_current(runs, |due| due.claim));
        let outcomes = outcomes.take_until(now, is_current(runs, |due| due.outcome));
        let mut jobs = Vec::with_capacity(claims.len() + outcomes.len());
        for token in claims.into_iter().chain(outcomes) {
            let taken = table.change(token, |run| {
                let jobs = (run.take_renewal(horizon), run.take_store(now));
                (jobs, run.due())
            });
            let Some(((renewal, store), due)) = taken else {
                continue;
            };
            // What is due after `now`, but is no renewal, was taken out of the queue too early.
            if due.claim <= horizon {
                table.claims.push(due.claim, token);
            }
            jobs.extend(renewal.into_iter().chain(store).map(|job| (token, job)));
        }
        jobs
    }

    /// When the keeper must look again at the latest.
    pub(super) fn next_due(&self) -> Duration {
        let mut table = self.lock();
        let Table {
            runs,
            claims,
            outcomes,
            ..
        } = &mut *table;
        let claim = claims.first(is_current(runs, |due| due.claim));
        let outcome = outcomes.first(is_current(runs, |due| due.outcome));
        claim.min(outcome).min(table.releases.due())
    }

    /// Leaves a claim to the keeper to be released.
    pub(super) fn release(&self, release: Release) {
        self.lock().releases.push(release);
    }

    pub(super) fn take_release(&self, now: Duration) -> Option<Release> {
        self.lock().releases.take(now)
    }

    pub(super) fn released(&self) {
        let mut table = self.lock();
        table.releases.answered();
        self.check_drained(&table);
    }

    /// The storage did not answer a release.
    pub(super) fn pause_releases(&self, now: Duration, lease: Duration) {
        self.lock().releases.pause(now, lease);
    }

    pub(super) fn release_failed(&self, release: Release) {
        self.lock().releases.failed(release);
    }

    /// Drops the claims that need no release any more, because their lease is over, and gives them.
    pub(super) fn drop_releases(&self, now: Duration) -> Vec<Release> {
        let mut table = self.lock();
        let over = table.releases.drop_ended(now);
        if !over.is_empty() {
            self.check_drained(&table);
        }
        over
    }

    /// Says whether a keeper must be started, which the caller then has to do; wakes the one that lives.
    #[must_use]
    pub(super) fn call_keeper(&self) -> bool {
        let lives = std::mem::replace(&mut self.lock().keeper_alive, true);
        if lives {
            self.work.notify_one();
        }
        !lives
    }

    /// A keeper begins. One before it may have been dropped in the middle of its work.
    pub(super) fn start_over(&self) {
        let mut table = self.lock();
        table.releases.start_over();
        let tokens: Vec<Token> = table.runs.keys().copied().collect();
        for token in tokens {
            table.change(token, Run::start_over);
        }
        // What that one was releasing is left to its lease.
        self.check_drained(&table);
    }

    /// The keeper has nothing under way: says whether it may end, since nothing is left to look after.
    #[must_use]
    pub(super) fn dismiss_keeper(&self) -> bool {
        let mut table = self.lock();
        table.drop_outdated();
        let has_run = !table.claims.0.is_empty() || !table.outcomes.0.is_empty();
        let is_idle = !has_run && table.releases.is_empty();
        if is_idle {
            table.keeper_alive = false;
        }
        is_idle
    }

    /// No keeper could be started, or it was dropped with its runtime: the next claim starts one.
    pub(super) fn lose_keeper(&self) {
        self.lock().keeper_alive = false;
    }

    /// Returns when the keeper has something to do before it would look.
    pub(super) async fn work(&self) {
        self.work.notified().await;
    }

    // ---- those who wait

    #[must_use]
    pub(super) fn start_waiting(&self) -> bool {
        let mut table = self.lock();
        let free = table.waiting < self.max_waiting;
        if free {
            table.waiting += 1;
        }
        free
    }

    pub(super) fn stop_waiting(&self) {
        self.lock().waiting -= 1;
    }

    pub(super) fn waiting(&self) -> usize {
        self.lock().waiting
    }

    /// The right to remove an unreadable record of `key`; one at a time, so that nobody removes another's claim.
    pub(super) fn clear(&self, key: &EncodedKey) -> Option<Clearing<'_>> {
        let may = self.lock().clearing.insert(*key);
        may.then_some(Clearing {
            runs: self,
            key: *key,
        })
    }

    pub(super) async fn drained(&self) {
        loop {
            // Made before the look, so that a run which ends in between is not missed.
            let drained = self.drained.notified();
            if self.lock().is_drained() {
                return;
            }
            drained.await;
        }
    }

    fn check_drained(&self, table: &Table) {
        if table.is_drained() {
            self.drained.notify_waiters();
        }
    }
}

/// While it is held, observers or waiters are still to be told of an end, and `drain` does not return.
#[must_use]
pub(super) struct Telling<'a> {
    runs: &'a Runs,
}

impl Drop for Telling<'_> {
    fn drop(&mut self) {
        let mut table = self.runs.lock();
        table.telling -= 1;
        self.runs.check_drained(&table);
    }
}

/// See [`Runs::clear`].
pub(super) struct Clearing<'a> {
    runs: &'a Runs,
    key: EncodedKey,
}

impl Drop for Clearing<'_> {
    fn drop(&mut self) {
        self.runs.lock().clearing.remove(&self.key);
        self.runs.waiters.wake_all(&self.key);
    }
}
