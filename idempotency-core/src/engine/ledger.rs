//! What this process runs, and who here waits for it.
//!
//! A `std` mutex guards it all: every section is a few map operations, and none spans an await or runs code that is not ours.

use std::{
    collections::{HashMap, HashSet, hash_map},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{Notify, futures::OwnedNotified};

use crate::{EncodedKey, Fingerprint, Record, Spawner, Token};

/// The claims of an engine by token, and its waiting duplicates by key.
#[derive(Debug)]
pub(super) struct Ledger {
    state: Arc<Mutex<State>>,
    /// Woken when nothing runs any more.
    drained: Notify,
    /// Woken when an outcome is left to the keeper.
    deferred: Notify,
    max_running: usize,
    max_waiting: usize,
}

#[derive(Debug, Default)]
struct State {
    runs: HashMap<Token, Run>,
    /// The run that answers for a key here; lost and expired ones answer for nothing.
    by_key: HashMap<EncodedKey, Token>,
    waiters: HashMap<EncodedKey, Waiters>,
    /// Requests between `enter` and `add` or `leave`.
    entered: usize,
    waiting: usize,
    keeper_alive: bool,
    restarting: bool,
    clearing: HashSet<EncodedKey>,
}

/// Those who wait for an operation that runs here hear of it here and nowhere else, so they are woken first.
#[derive(Debug, Default)]
struct Waiters {
    here: Arc<Notify>,
    elsewhere: Arc<Notify>,
    count_here: usize,
    count_elsewhere: usize,
}

impl Waiters {
    fn of(&mut self, is_local: bool) -> (&Arc<Notify>, &mut usize) {
        match is_local {
            true => (&self.here, &mut self.count_here),
            false => (&self.elsewhere, &mut self.count_elsewhere),
        }
    }

    fn wake_one(&self) {
        match self.count_here {
            0 => self.elsewhere.notify_one(),
            _ => self.here.notify_one(),
        }
    }

    fn wake_all(&self) {
        self.here.notify_waiters();
        self.elsewhere.notify_waiters();
    }
}

/// One execution.
#[derive(Clone, Debug)]
pub(super) struct Run {
    pub(super) key: EncodedKey,
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) since: Duration,
    pub(super) ttl: Duration,
    pub(super) renew_at: Duration,
    /// When a tombstone ends a claim that is still held.
    pub(super) give_up_at: Duration,
    /// Its claim was gone for a while, in which another may have held and released it.
    pub(super) interrupted: bool,
    /// Of the runtime that it was made on.
    pub(super) spawner: Option<Spawner>,
    pub(super) phase: Phase,
}

impl Run {
    /// When the keeper must look at it next.
    pub(super) fn due(&self) -> Duration {
        match &self.phase {
            Phase::Held => self.renew_at.min(self.give_up_at),
            Phase::Pending {
                retry_at, expires, ..
            } => self.renew_at.min(*retry_at).min(*expires),
            Phase::GivingUp | Phase::Finishing(_) => self.renew_at,
            Phase::Unclaimed | Phase::Lost | Phase::Expired => Duration::MAX,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// The operation runs under its claim.
    Held,
    /// It was held too long: a tombstone is being stored. The operation still runs.
    GivingUp,
    /// The operation runs without a claim: `LockPolicy::disabled`.
    Unclaimed,
    /// The operation is over and its own future is storing the outcome.
    Finishing(Record),
    /// The outcome is still to be stored, by the keeper.
    Pending {
        record: Record,
        /// How often another record took its place since it is pending.
        replaced: u32,
        retry_at: Duration,
        attempts: u32,
        expires: Duration,
    },
    /// Another holder has the key.
    Lost,
    /// Held too long: a tombstone is stored, the operation still runs.
    Expired,
}

/// What the ledger knows of a key.
pub(super) enum Found {
    Nothing,
    Running {
        fingerprint: Option<Fingerprint>,
        waiter: Waiter,
    },
    Outcome(Record),
}

impl Ledger {
    pub(super) fn new(max_running: usize, max_waiting: usize) -> Self {
        Self {
            state: Arc::default(),
            drained: Notify::new(),
            deferred: Notify::new(),
            max_running,
            max_waiting,
        }
    }

    /// The state stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn find(&self, key: &EncodedKey) -> Found {
        let mut state = self.lock();
        let Some(run) = state
            .by_key
            .get(key)
            .and_then(|token| state.runs.get(token))
        else {
            return Found::Nothing;
        };
        match &run.phase {
            Phase::Held | Phase::GivingUp | Phase::Finishing(_) => Found::Running {
                fingerprint: run.fingerprint,
                waiter: self.waiter(&mut state, key, true),
            },
            Phase::Pending { record, .. } => Found::Outcome(record.clone()),
            Phase::Unclaimed | Phase::Lost | Phase::Expired => Found::Nothing,
        }
    }

    /// A waiter that is woken by whatever happens to `key` here from now on, or the outcome that is here already.
    pub(super) fn subscribe(&self, key: &EncodedKey) -> Result<Waiter, Record> {
        let mut state = self.lock();
        let run = state
            .by_key
            .get(key)
            .and_then(|token| state.runs.get(token));
        if let Some(Phase::Pending { record, .. }) = run.map(|run| &run.phase) {
            return Err(record.clone());
        }
        let is_local = run.is_some();
        Ok(self.waiter(&mut state, key, is_local))
    }

    fn waiter(&self, state: &mut State, key: &EncodedKey, is_local: bool) -> Waiter {
        let waiters = state.waiters.entry(*key).or_default();
        let (ended, count) = waiters.of(is_local);
        *count += 1;
        Waiter {
            // Made under the lock: it is told of everything that happens from here on, polled or not.
            ended: ended.clone().notified_owned(),
            is_local,
            place: Place {
                state: self.state.clone(),
                key: *key,
                is_local,
            },
        }
    }

    pub(super) fn wake_one(&self, key: &EncodedKey) {
        if let Some(waiters) = self.lock().waiters.get(key) {
            waiters.wake_one();
        }
    }

    /// One who waits for an operation that ran here is to look where it runs now.
    pub(super) fn wake_one_here(&self, key: &EncodedKey) {
        if let Some(waiters) = self.lock().waiters.get(key)
            && waiters.count_here > 0
        {
            waiters.here.notify_one();
        }
    }

    pub(super) fn wake_all(&self, key: &EncodedKey) {
        if let Some(waiters) = self.lock().waiters.get(key) {
            waiters.wake_all();
        }
    }

    /// Takes a place among those that run, if there is one. Give it back with [`leave`](Self::leave), or turn it into a run
    /// with [`add`](Self::add).
    #[must_use]
    pub(super) fn enter(&self) -> bool {
        let mut state = self.lock();
        let free = state.runs.len() + state.entered < self.max_running;
        if free {
            state.entered += 1;
        }
        free
    }

    pub(super) fn leave(&self) {
        let mut state = self.lock();
        state.entered -= 1;
        self.check_drained(&state);
    }

    /// Adds a run in the place of one that entered. Says whether a keeper must be started.
    #[must_use]
    pub(super) fn add(&self, token: Token, run: Run) -> bool {
        let mut state = self.lock();
        state.entered -= 1;
        let needs_keeper = match run.phase {
            Phase::Unclaimed => false,
            _ => {
                state.by_key.insert(run.key, token);
                !std::mem::replace(&mut state.keeper_alive, true)
            }
        };
        state.runs.insert(token, run);
        needs_keeper
    }

    /// Changes the phase of a run. `None` if there is no such run (any more).
    pub(super) fn change<T>(&self, token: Token, change: impl FnOnce(&mut Run) -> T) -> Option<T> {
        let mut state = self.lock();
        let state = &mut *state;
        let run = state.runs.get_mut(&token)?;
        let result = change(run);
        match run.phase {
            Phase::Lost | Phase::Expired => {
                if state.by_key.get(&run.key) == Some(&token) {
                    state.by_key.remove(&run.key);
                }
            }
            // An outcome that is still to be stored answers for its key, whether it was claimed or not.
            Phase::Pending { .. } => {
                state.by_key.entry(run.key).or_insert(token);
            }
            Phase::Held | Phase::GivingUp | Phase::Unclaimed | Phase::Finishing(_) => {}
        }
        Some(result)
    }

    /// Ends a run.
    pub(super) fn end(&self, token: Token) -> Option<Run> {
        self.remove(&mut self.lock(), token)
    }

    fn remove(&self, state: &mut State, token: Token) -> Option<Run> {
        let run = state.runs.remove(&token)?;
        if let hash_map::Entry::Occupied(holder) = state.by_key.entry(run.key)
            && *holder.get() == token
        {
            holder.remove();
        }
        self.check_drained(state);
        Some(run)
    }

    /// Puts `record` in the place of an outcome that is still to be stored. Says whether there is one under `key`.
    #[must_use]
    pub(super) fn replace(&self, key: &EncodedKey, record: &Record, expires: Duration) -> bool {
        let mut state = self.lock();
        let state = &mut *state;
        let run = state
            .by_key
            .get(key)
            .and_then(|token| state.runs.get_mut(token));
        let Some(Run {
            phase:
                Phase::Pending {
                    record: pending,
                    replaced,
                    expires: pending_expires,
                    ..
                },
            ..
        }) = run
        else {
            return false;
        };
        *pending = record.clone();
        *pending_expires = expires;
        *replaced += 1;
        true
    }

    /// Ends a run whose pending outcome was stored, unless the outcome was replaced since, more than `replaced` times: then
    /// that is still to be stored.
    pub(super) fn end_stored(&self, token: Token, replaced: u32) -> Option<Run> {
        let mut state = self.lock();
        if let Some(run) = state.runs.get_mut(&token)
            && let Phase::Pending {
                replaced: now,
                retry_at,
                ..
            } = &mut run.phase
            && *now > replaced
        {
            *retry_at = Duration::ZERO;
            return None;
        }
        self.remove(&mut state, token)
    }

    /// Ends a run whose end is still to be told to the storage: its place is kept until [`leave`](Self::leave).
    pub(super) fn end_but_stay(&self, token: Token) -> Option<Run> {
        self.lock().entered += 1;
        let run = self.end(token);
        if run.is_none() {
            self.leave();
        }
        run
    }

    /// The run that answers for `key` here.
    pub(super) fn holder(&self, key: &EncodedKey) -> Option<Token> {
        self.lock().by_key.get(key).copied()
    }

    /// The key was removed by hand while `holder` was its run, which answers for nothing any more. Says whether it did.
    pub(super) fn forget(&self, key: &EncodedKey, holder: Option<Token>) -> bool {
        let mut state = self.lock();
        let forgotten = holder.filter(|token| state.by_key.get(key) == Some(token));
        if let Some(token) = forgotten {
            state.by_key.remove(key);
            match state.runs.get_mut(&token) {
                // Nobody but the keeper is waiting for this one to end.
                Some(Run {
                    phase: Phase::Pending { .. },
                    ..
                }) => drop(state.runs.remove(&token)),
                Some(run) => run.phase = Phase::Lost,
                None => {}
            }
            self.check_drained(&state);
        }
        if let Some(waiters) = state.waiters.get(key) {
            waiters.wake_all();
        }
        forgotten.is_some()
    }

    /// All runs that the keeper looks after, or `None`, with the keeper's leave, if there are none.
    pub(super) fn kept(&self) -> Option<Vec<(Token, Run)>> {
        let mut state = self.lock();
        let mut kept: Vec<_> = state
            .runs
            .iter()
            .filter(|(_, run)| {
                matches!(
                    run.phase,
                    Phase::Held | Phase::GivingUp | Phase::Finishing(_) | Phase::Pending { .. }
                )
            })
            .map(|(token, run)| (*token, run.clone()))
            .collect();
        if kept.is_empty() {
            state.keeper_alive = false;
            return None;
        }
        // What is due first goes first; the token, so that the order never depends on a hash map.
        kept.sort_unstable_by_key(|(token, run)| (run.due(), *token.as_bytes()));
        Some(kept)
    }

    /// No keeper could be started: the next claim tries again.
    pub(super) fn stop_keeper(&self) {
        self.lock().keeper_alive = false;
    }

    /// The keeper was dropped. Says whether the caller is the one to start another, see [`untried`](Self::untried).
    #[must_use]
    pub(super) fn keeper_is_gone(&self) -> bool {
        let mut state = self.lock();
        state.keeper_alive = false;
        !std::mem::replace(&mut state.restarting, true)
    }

    /// Where claims that are left were made, to start a keeper there. `None`, and in the same step no restart any more, once
    /// a keeper lives or all was tried.
    pub(super) fn untried(&self, tried: &mut HashSet<Token>) -> Option<Vec<Spawner>> {
        let mut state = self.lock();
        let mut next = Vec::new();
        if !state.keeper_alive {
            let untried = state.runs.iter().filter(|(token, _)| tried.insert(**token));
            next.extend(untried.filter_map(|(_, run)| run.spawner.clone()));
        }
        if next.is_empty() {
            state.restarting = false;
            return None;
        }
        Some(next)
    }

    /// Claims that a dropped keeper was giving up are to be given up by this one.
    pub(super) fn give_up_again(&self) {
        for run in self.lock().runs.values_mut() {
            if matches!(run.phase, Phase::GivingUp) {
                run.phase = Phase::Held;
            }
        }
    }

    /// The right to clear what lies unreadable under `key` away; one at a time, so that nobody clears another's claim.
    pub(super) fn clear(&self, key: &EncodedKey) -> Option<Clearing<'_>> {
        let may = self.lock().clearing.insert(*key);
        may.then_some(Clearing {
            ledger: self,
            key: *key,
        })
    }

    pub(super) fn wake_keeper(&self) {
        self.deferred.notify_one();
    }

    /// Returns when an outcome was left to the keeper.
    pub(super) async fn deferred(&self) {
        self.deferred.notified().await;
    }

    #[must_use]
    pub(super) fn start_keeper(&self) -> bool {
        !std::mem::replace(&mut self.lock().keeper_alive, true)
    }

    #[must_use]
    pub(super) fn start_waiting(&self) -> bool {
        let mut state = self.lock();
        let free = state.waiting < self.max_waiting;
        if free {
            state.waiting += 1;
        }
        free
    }

    pub(super) fn stop_waiting(&self) {
        self.lock().waiting -= 1;
    }

    pub(super) fn running(&self) -> usize {
        self.lock().runs.len()
    }

    pub(super) fn waiting(&self) -> usize {
        self.lock().waiting
    }

    pub(super) async fn drained(&self) {
        loop {
            // Made before the look, so that a run which ends in between is not missed.
            let drained = self.drained.notified();
            {
                let state = self.lock();
                if state.runs.is_empty() && state.entered == 0 {
                    return;
                }
            }
            drained.await;
        }
    }

    fn check_drained(&self, state: &State) {
        if state.runs.is_empty() && state.entered == 0 {
            self.drained.notify_waiters();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See [`Ledger::clear`].
pub(super) struct Clearing<'a> {
    ledger: &'a Ledger,
    key: EncodedKey,
}

impl Drop for Clearing<'_> {
    fn drop(&mut self) {
        self.ledger.lock().clearing.remove(&self.key);
        self.ledger.wake_all(&self.key);
    }
}

/// A duplicate's ear at a key.
pub(super) struct Waiter {
    ended: OwnedNotified,
    is_local: bool,
    place: Place,
}

impl Waiter {
    /// Whether the operation runs in this process.
    pub(super) fn is_local(&self) -> bool {
        self.is_local
    }

    /// Returns when something ended under the key. Dropped after it was woken by a release, it passes the wake on.
    pub(super) async fn ended(self) {
        let Self { ended, place, .. } = self;
        ended.await;
        drop(place);
    }
}

/// A waiter's place; the last one to leave takes the key's entry with it.
struct Place {
    state: Arc<Mutex<State>>,
    key: EncodedKey,
    is_local: bool,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if let hash_map::Entry::Occupied(mut waiters) = state.waiters.entry(self.key) {
            *waiters.get_mut().of(self.is_local).1 -= 1;
            if waiters.get().count_here + waiters.get().count_elsewhere == 0 {
                waiters.remove();
            }
        }
    }
}
