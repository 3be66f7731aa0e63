//! What must be true, told by nobody but those who see it: the server, the handlers and the clients.
//!
//! The judge knows nothing of how the engine works. It is told what the server granted, which handler runs where, what clients
//! got and which faults were injected, and keeps a list of what contradicts the guarantees.
//!
//! A lease can only be kept by a node that runs and reaches the server. So a node that was paused, cut off, or whose renewals
//! were tampered with in the last two leases is *disturbed*, and may be overtaken; for all others nothing is forgiven.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use idempotency_axum::{
    Begin, EncodedKey, Event, Held, NewClaim, Observer, Operation, Outcome, Record, Token,
    TombstoneReason,
};

use super::{
    LEASE, Terms, WAIT,
    world::{Home, SERVER, World},
};

/// How an execution ends, as its handler decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// With an answer that is to be stored.
    Answer,
    /// With one that is not, so that the key is free again.
    Failure,
    /// With one that can't be replayed.
    Unreplayable,
    /// It was held too long, and its client has left.
    Dropped,
}

/// The client of a request, for as long as it stays.
#[derive(Clone, Default)]
pub(super) struct Client(Arc<Mutex<Option<Duration>>>);

impl Client {
    pub(super) fn leaves(&self, now: Duration) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
    }

    fn left(&self) -> Option<Duration> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Within which an answer has come from where it was decided.
const MOMENT: Duration = Duration::from_secs(5);

/// A request on a node, from its start to its end. Dropped, it has ended.
pub(super) struct UnderWay(Judge, usize);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let now = self.0.1.now();
        let node = &mut self.0.lock().nodes[self.1];
        node.under_way -= 1;
        node.answered.retain(|at| now < *at + 2 * MOMENT);
        node.answered.push(now);
    }
}

#[derive(Clone)]
pub(super) struct Judge(Arc<Mutex<State>>, World, Terms);

struct State {
    keys: BTreeMap<EncodedKey, Case>,
    /// Since when each node was last disturbed, or tampered with in any way.
    nodes: Vec<Troubles>,
    findings: Vec<String>,
    counts: BTreeMap<String, u64>,
    trace: Option<String>,
}

#[derive(Clone, Default)]
struct Troubles {
    /// Its leases may be over.
    disturbed: Option<Duration>,
    /// Something it sent or was sent did not arrive in time.
    tampered: Option<Duration>,
    cut_off: bool,
    /// How many requests it has, and when a client left one of them last.
    under_way: usize,
    was_left: Option<Duration>,
    /// When the latest ended.
    answered: Vec<Duration>,
}

/// All that is known of a key.
#[derive(Default)]
struct Case {
    executions: Vec<Execution>,
    /// Granted by the server, and until when.
    claim: Option<(Token, Duration)>,
    /// When the server granted it first, to each that it was granted to.
    granted: Vec<(Token, Duration)>,
    /// Since when nobody holds it.
    free_since: Duration,
    /// The last record, perhaps expired.
    record: Option<Stored>,
    /// The one before it.
    before: Option<Stored>,
    /// What the server will not read.
    is_corrupt: bool,
    /// At some time it was: what should have been stored then may be lost.
    was_corrupt: bool,
    /// The last claim that each node was told it has, and when it was granted.
    told: BTreeMap<Home, (Token, Duration)>,
    /// Bodies of the replays that clients got.
    replays: BTreeSet<String>,
    /// An outcome was lost with its node, or a node was overtaken, or a record expired: two answers may be about.
    may_differ: bool,
    /// Until when a replacement may arrive that its sender has given up, or that another has overtaken.
    late_replacement: Option<Duration>,
}

struct Stored {
    /// Of the first run.
    token: Token,
    outcome: Outcome,
    since: Duration,
    expires: Duration,
}

impl Stored {
    fn body(&self) -> Option<&[u8]> {
        match &self.outcome {
            Outcome::Response(answer) => Some(answer.body()),
            _ => None,
        }
    }
}

struct Execution {
    home: Home,
    /// Another was granted the key meanwhile, for which there was a reason: it is not the key's any more.
    is_overtaken: bool,
    kind: Kind,
    client: Client,
    /// When its key was claimed.
    claimed: Duration,
    since: Duration,
    ended: Option<(End, Duration)>,
    /// Its handler has returned an answer whose body is still to come.
    is_streaming: bool,
    /// The server has a tombstone for it because it was held too long.
    is_given_up: bool,
    /// When the server will forget, or forgot, its answer.
    expires: Option<Duration>,
    /// A record was there when it ended.
    had_record: bool,
    body: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Under this claim.
    First(Token),
    /// Of a manual handler on a conflict, in its turn.
    Conflict,
}

impl Execution {
    fn is_first(&self) -> bool {
        matches!(self.kind, Kind::First(_))
    }

    fn end(&self) -> Option<End> {
        self.ended.map(|(end, _)| end)
    }

    /// Until when its answer must be kept, by a clock that may be fast.
    fn kept_until(&self, ttl: Duration) -> Duration {
        let ended = self.ended.map_or(Duration::ZERO, |(_, ended)| ended);
        ended.saturating_add(scaled(ttl, 98))
    }

    /// The time from which on nobody may say any more what it left, as far as its node's clock can be trusted.
    fn over(&self, ttl: Duration) -> Duration {
        let ended = self.ended.map_or(Duration::ZERO, |(_, ended)| ended);
        let pending = ended.saturating_add(scaled(ttl, 102)) + Duration::from_secs(2);
        pending.max(self.expires.unwrap_or_default())
    }
}

fn scaled(duration: Duration, percent: u32) -> Duration {
    duration / 100 * percent
}

impl Case {
    fn live(&self, now: Duration) -> Option<&Stored> {
        self.record.as_ref().filter(|it| now < it.expires)
    }

    fn granted_at(&self, token: Token) -> Option<Duration> {
        let mut granted = self.granted.iter().rev();
        granted
            .find(|(granted, _)| *granted == token)
            .map(|(_, at)| *at)
    }

    fn by_token(&mut self, token: Token) -> Option<&mut Execution> {
        let of_token = |it: &&mut Execution| it.kind == Kind::First(token);
        self.executions.iter_mut().rev().find(of_token)
    }

    fn by_body_mut(&mut self, body: &[u8]) -> Option<&mut Execution> {
        let mut executions = self.executions.iter_mut();
        executions.find(|it| it.body.as_bytes() == body)
    }

    fn by_body(&self, body: &[u8]) -> Option<&Execution> {
        self.executions.iter().find(|it| it.body.as_bytes() == body)
    }
}

impl Judge {
    pub(super) fn new(world: World, nodes: usize, terms: Terms, traces: bool) -> Self {
        let state = State {
            keys: BTreeMap::new(),
            nodes: vec![Troubles::default(); nodes + 1],
            findings: Vec::new(),
            counts: BTreeMap::new(),
            trace: traces.then(String::new),
        };
        Self(Arc::new(Mutex::new(state)), world, terms)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, what: &str) {
        let mut state = self.lock();
        match state.counts.get_mut(what) {
            Some(count) => *count += 1,
            None => drop(state.counts.insert(what.to_owned(), 1)),
        }
    }

    pub(super) fn note(&self, line: impl FnOnce() -> String) {
        let now = self.1.now();
        if let Some(trace) = &mut self.lock().trace {
            let _ = writeln!(trace, "{:>12.6} {}", now.as_secs_f64(), line());
        }
    }

    pub(super) fn find(&self, finding: String) {
        self.note(|| format!("VIOLATION {finding}"));
        self.lock().findings.push(finding);
    }

    pub(super) fn has_found(&self) -> bool {
        !self.lock().findings.is_empty()
    }

    pub(super) fn conclude(&self) -> (Vec<String>, BTreeMap<String, u64>, String) {
        let mut state = self.lock();
        (
            std::mem::take(&mut state.findings),
            std::mem::take(&mut state.counts),
            state.trace.take().unwrap_or_default(),
        )
    }

    // ---- the faults

    pub(super) fn disturb(&self, node: usize) {
        let now = self.1.now();
        self.lock().nodes[node].disturbed = Some(now);
        self.tamper(node);
    }

    pub(super) fn tamper(&self, node: usize) {
        let now = self.1.now();
        self.lock().nodes[node].tampered = Some(now);
    }

    pub(super) fn cut_off(&self, node: usize, is: bool) {
        self.lock().nodes[node].cut_off = is;
        self.disturb(node);
    }

    pub(super) fn is_cut_off(&self, node: usize) -> bool {
        self.lock().nodes[node].cut_off
    }

    /// The node is gone, and with it what only it knew.
    pub(super) fn crashed(&self, node: usize) {
        for case in self.lock().keys.values_mut() {
            case.may_differ |= case.executions.iter().any(|it| it.home.node == node);
        }
        self.disturb(node);
    }

    /// Makes the record of some key unreadable, or all of them readable.
    pub(super) fn corrupt(&self, pick: Option<usize>) -> bool {
        let now = self.1.now();
        let mut state = self.lock();
        let Some(pick) = pick else {
            state
                .keys
                .values_mut()
                .for_each(|case| case.is_corrupt = false);
            return true;
        };
        let mut recorded = state
            .keys
            .values_mut()
            .filter(|case| case.live(now).is_some());
        match recorded.nth(pick) {
            Some(case) => {
                case.is_corrupt = true;
                case.was_corrupt = true;
                true
            }
            None => false,
        }
    }

    pub(super) fn is_corrupt(&self, key: &EncodedKey) -> bool {
        self.lock()
            .keys
            .get(key)
            .is_some_and(|case| case.is_corrupt)
    }

    /// Something happened to a replacement on its way.
    pub(super) fn replacement_is_late(&self, key: &EncodedKey) {
        let until = self.1.now() + 3 * LEASE;
        self.with(key, |case| case.late_replacement = Some(until));
    }

    fn is_disturbed(&self, home: Home) -> bool {
        if !self.1.is_alive(home) || self.1.is_paused(home.node) {
            return true;
        }
        let now = self.1.now();
        let troubles = &self.lock().nodes[home.node];
        troubles.cut_off || troubles.disturbed.is_some_and(|at| now < at + 2 * LEASE)
    }

    fn is_tampered(&self, node: usize, within: Duration) -> bool {
        let now = self.1.now();
        let troubles = &self.lock().nodes[node];
        troubles.cut_off || troubles.tampered.is_some_and(|at| now < at + within)
    }

    // ---- what the server does

    pub(super) fn sent(&self, home: Home, operation: Operation, key: &EncodedKey) {
        self.note(|| format!("node {}: {} {}", home.node, operation.as_str(), short(key)));
    }

    pub(super) fn began(&self, home: Home, key: &EncodedKey, claim: &NewClaim, answer: &Begin) {
        let now = self.1.now();
        if *answer != Begin::Acquired {
            return;
        }
        self.note(|| {
            format!(
                "server: claim {} of {} for node {}",
                claim.token,
                short(key),
                home.node
            )
        });
        let overtaken: Vec<(Home, bool)> = {
            let mut state = self.lock();
            let case = state.keys.entry(*key).or_default();
            if let Some((token, until)) = case.claim
                && token != claim.token
                && now < until
            {
                drop(state);
                return self.find(format!("{} was granted to two tokens at once", short(key)));
            }
            if let Some(stored) = case.live(now)
                && stored.token != claim.token
            {
                drop(state);
                return self.find(format!("{} was granted though it has a record", short(key)));
            }
            case.claim = Some((claim.token, now + claim.lease));
            if case.granted_at(claim.token).is_none() {
                case.granted.push((claim.token, now));
            }
            let may_run_again = |it: &Execution| self.may_run_again(case, it, now);
            let mut others = Vec::new();
            for it in case.executions.iter().filter(|it| it.is_first()) {
                if it.kind != Kind::First(claim.token) && !it.is_overtaken && !may_run_again(it) {
                    others.push((it.home, it.is_given_up));
                }
            }
            others
        };
        for (other, is_given_up) in overtaken {
            // A tombstone is kept alive by messages that arrive.
            let is_excused = is_given_up && self.is_tampered(other.node, 2 * LEASE);
            if self.is_disturbed(other) || is_excused {
                self.count("state: a node was overtaken");
            } else {
                let who = format!("{} was taken from node {}", short(key), other.node);
                self.find(format!(
                    "{who}, undisturbed, which runs it or has its outcome"
                ));
            }
            self.with(key, |case| {
                case.may_differ = true;
                let its = case.executions.iter_mut().filter(|it| it.home == other);
                its.for_each(|it| it.is_overtaken = true);
            });
        }
    }

    pub(super) fn renewed(&self, key: &EncodedKey, token: Token, lease: Duration, held: Held) {
        if held == Held::Yes {
            let until = self.1.now() + lease;
            self.count("state: renewed");
            self.with(key, |case| case.claim = Some((token, until)));
        }
    }

    pub(super) fn released(&self, key: &EncodedKey, held: Held) {
        if held == Held::Yes {
            let now = self.1.now();
            self.note(|| format!("server: {} released", short(key)));
            self.with(key, |case| {
                case.claim = None;
                case.free_since = now;
            });
        }
    }

    pub(super) fn completed(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
        held: Held,
    ) {
        self.note(|| format!("server: {} completed by {token}: {held:?}", short(key)));
        if held == Held::Lost {
            self.count("state: a late completion was lost");
            return;
        }
        let now = self.1.now();
        let expires = now.saturating_add(ttl);
        let earliest = self.earliest();
        let finding = self.with(key, |case| {
            let mut finding = None;
            if let Some((holder, until)) = case.claim
                && holder != token
                && now < until
            {
                finding = Some("was completed while another holds it");
            }
            match case.live(now) {
                None => {
                    case.before = case.record.replace(Stored {
                        token,
                        outcome: record.outcome.clone(),
                        since: now,
                        expires,
                    });
                }
                Some(first) if first.token == token => {
                    // It stays, and its TTL starts anew.
                    let body = first.body().map(<[u8]>::to_vec);
                    if let Some(it) = body.and_then(|body| case.by_body_mut(&body)) {
                        it.expires = Some(expires);
                    }
                    if let Some(first) = &mut case.record {
                        first.expires = expires;
                    }
                    return finding;
                }
                Some(_) => finding = Some("was completed twice"),
            }
            let mut others = case.executions.iter_mut();
            let was_lost = |it: &&mut Execution| {
                it.is_first() && it.kind != Kind::First(token) && it.ended.is_none()
            };
            // Their leases were over, or there would be a finding.
            others
                .by_ref()
                .filter(was_lost)
                .for_each(|it| it.is_overtaken = true);
            let granted = case.granted_at(token);
            let execution = case.by_token(token);
            match (&record.outcome, execution) {
                (Outcome::Tombstone(reason), it) => {
                    if *reason == TombstoneReason::MaxHold
                        && granted.is_some_and(|at| now < at + earliest)
                    {
                        finding = Some("was given up too early");
                    }
                    match it {
                        // Where it was refused, another one stands for it.
                        Some(it) => it.is_given_up |= it.ended.is_none(),
                        None if is_turn(key) => {}
                        None => finding = Some("was completed before its handler began"),
                    }
                }
                (_, None) => finding = Some("was completed before its handler began"),
                (Outcome::Response(answer), Some(first)) => {
                    let run = if first.body.as_bytes() == answer.body() {
                        Some(first)
                    } else {
                        // Its tombstone was replaced before it could be stored, or its answer was.
                        first.is_given_up |= first.ended.is_none();
                        case.by_body_mut(answer.body()).filter(|it| !it.is_first())
                    };
                    match run {
                        None => finding = Some("has another answer than was given"),
                        Some(it) => match it.end() {
                            Some(End::Answer) if expires < it.kept_until(self.2.ttl) => {
                                finding = Some("is kept too short");
                            }
                            Some(End::Answer) => it.expires = Some(expires),
                            Some(_) => finding = Some("has an answer that is none"),
                            None => finding = Some("was completed before its handler ended"),
                        },
                    }
                }
            }
            case.claim = None;
            case.free_since = now;
            finding
        });
        if let Some(finding) = finding {
            self.find(format!("{} {finding}", short(key)));
        }
    }

    /// The server put a record in the place of the one that it had, if it had one.
    pub(super) fn replaced(&self, key: &EncodedKey, record: &Record, ttl: Duration) {
        let now = self.1.now();
        let expires = now.saturating_add(ttl);
        let replaced = self.with(key, |case| {
            let Some(stored) = case.live(now) else {
                return Ok(None);
            };
            // Of the first run, or nothing that can be shown.
            let is_first = stored
                .body()
                .is_none_or(|body| case.by_body(body).is_some_and(Execution::is_first));
            let was_answer = stored.body().is_some();
            let Outcome::Response(answer) = &record.outcome else {
                if was_answer {
                    return Err("a tombstone in an answer's place");
                }
                if let Some(stored) = &mut case.record {
                    stored.expires = expires;
                }
                return Ok(None);
            };
            match case.by_body_mut(answer.body()) {
                None => return Err("an answer that nobody gave"),
                Some(it) if it.is_first() && !is_first => {
                    return Err("the first answer in a later one's place");
                }
                Some(it) if it.end() != Some(End::Answer) => return Err("an answer that is none"),
                Some(it) if expires < it.kept_until(self.2.ttl) => {
                    return Err("an answer that is kept too short");
                }
                Some(it) => it.expires = Some(expires),
            }
            if let Some(stored) = &mut case.record {
                stored.outcome = record.outcome.clone();
                stored.expires = expires;
            }
            Ok(Some(answer.body()))
        });
        match replaced {
            Err(finding) => self.find(format!("{} has {finding}", short(key))),
            Ok(None) => {}
            Ok(Some(body)) => {
                self.count("state: a record was replaced");
                let body = String::from_utf8_lossy(body);
                self.note(|| format!("server: {} replaced by {body:?}", short(key)));
            }
        }
    }

    // ---- what nodes do

    /// The node has been told that the claim is its own.
    pub(super) fn told(&self, home: Home, key: &EncodedKey, token: Token) {
        let now = self.1.now();
        self.with(key, |case| {
            let granted = case.granted_at(token).unwrap_or(now);
            case.told.insert(home, (token, granted));
        });
    }

    /// After how long an operation may be given up, by a clock that may be fast.
    fn earliest(&self) -> Duration {
        scaled(self.2.max_hold, 98).saturating_sub(Duration::from_secs(5))
    }

    /// Whether another execution may begin, as far as it goes by this one.
    fn may_run_again(&self, case: &Case, it: &Execution, now: Duration) -> bool {
        let given_up = it.claimed + self.earliest();
        if it.is_streaming && it.ended.is_none_or(|(_, ended)| given_up <= ended) {
            // Its answer is passed on past the tombstone, as one over the limit is. The tombstone itself is looked at elsewhere, if it
            // could be stored.
            return it.is_given_up || given_up.saturating_add(scaled(self.2.ttl, 98)) <= now;
        }
        let Some(end) = it.end() else {
            // It runs, or it has died with its node, which is disturbed then. A tombstone that nobody can read can't be kept alive.
            return it.is_given_up && case.was_corrupt;
        };
        match end {
            End::Failure if !it.is_given_up => true,
            _ => it.kept_until(self.2.ttl) <= now,
        }
    }

    /// A handler begins. Returns the number of its execution, and what it will answer.
    pub(super) fn started(&self, home: Home, key: &EncodedKey, client: &Client) -> (usize, String) {
        let now = self.1.now();
        let mut expired = false;
        let others: Vec<(Home, Option<End>, bool)> = self.with(key, |case| {
            let firsts = case.executions.iter().filter(|it| it.is_first());
            let others = firsts.filter(|it| !it.is_overtaken);
            let mut holding = Vec::new();
            for it in others {
                match self.may_run_again(case, it, now) {
                    true => expired |= it.end() != Some(End::Failure),
                    false => holding.push((it.home, it.end(), it.is_given_up)),
                }
            }
            holding
        });
        if expired {
            self.count("state: ran again after the TTL");
            self.with(key, |case| case.may_differ = true);
        }
        let (recorded, token) = self.with(key, |case| {
            (case.live(now).is_some(), case.told.get(&home).copied())
        });
        let (number, body) = self.enter(home, key, client, token);
        if !self.is_disturbed(home) {
            if recorded {
                self.find(format!("{} ran though it has a record", short(key)));
            }
            for (other, ended, is_given_up) in others {
                let is_excused = is_given_up && self.is_tampered(other.node, 2 * LEASE);
                if !is_excused && !self.is_disturbed(other) {
                    let how = if ended.is_some() { "after" } else { "while" };
                    let it_ran = format!("it ran on node {}", other.node);
                    self.find(format!("{} runs {how} {it_ran}, undisturbed", short(key)));
                }
            }
        } else if !others.is_empty() {
            self.with(key, |case| case.may_differ = true);
        }
        if token.is_none() {
            self.find(format!("{} runs without a claim", short(key)));
        }
        (number, body)
    }

    /// The same on a conflict, with the answer that the handler was shown, if there was one.
    pub(super) fn started_on_conflict(
        &self,
        home: Home,
        key: &EncodedKey,
        client: &Client,
        shown: Option<&[u8]>,
    ) -> (usize, String) {
        let now = self.1.now();
        let earliest = self.earliest();
        let (others, is_there, is_last, was_corrupt) = self.with(key, |case| {
            let (mut others, mut is_running) = (Vec::new(), false);
            for it in case.executions.iter().filter(|it| !it.is_overtaken) {
                // A first run that was held too long is a conflict for all others, also while it runs; its node knows first.
                let is_given_up = it.is_given_up || it.home == home && it.claimed + earliest <= now;
                let is_passed_on = it.is_streaming && it.claimed + earliest <= now;
                if it.ended.is_none() && !is_passed_on && !(it.is_first() && is_given_up) {
                    others.push((it.home, it.is_first(), it.since));
                }
                is_running |= it.ended.is_none() && it.is_first() && is_given_up;
            }
            // What the last run left, if that is still to be stored.
            let stored_for = case.record.as_ref().map(|it| Kind::First(it.token));
            let left = |it: &&Execution| match it.end() {
                None | Some(End::Failure) => false,
                Some(End::Answer) => it.expires.is_none(),
                // A tombstone is stored again when its operation ends.
                Some(_) => it.is_first() && (it.is_given_up || stored_for != Some(it.kind)),
            };
            let lasting = case.executions.iter().filter(left);
            let pending = lasting.filter(|it| it.home == home && !it.is_overtaken);
            let pending = pending.filter(|it| now <= it.over(self.2.ttl));
            let pending = pending.max_by_key(|it| it.ended.map(|(_, ended)| ended));
            // It may have expired since it was read.
            let recent = Duration::from_secs(10);
            let stored = case
                .record
                .as_ref()
                .filter(|it| now < it.expires.saturating_add(recent));
            let is_last = match (stored, pending) {
                (Some(stored), _) if stored.body() == shown => true,
                (_, Some(it)) if it.end() == Some(End::Answer) => shown == Some(it.body.as_bytes()),
                (_, Some(_)) => shown.is_none(),
                (Some(_), None) => false,
                (None, None) => is_running && shown.is_none(),
            };
            let is_there = stored.is_some() || pending.is_some() || is_running;
            (others, is_there, is_last, case.was_corrupt)
        });
        let (number, body) = self.enter(home, key, client, None);
        self.count("state: a conflict run");
        let excused = self.is_disturbed(home);
        for (other, is_first, since) in others {
            // Whether it lost its turn meanwhile is not seen here.
            let disturbed = self.lock().nodes[other.node].disturbed;
            let may_be_lost = !is_first && disturbed.is_some_and(|at| since <= at);
            if !excused && !may_be_lost && !self.is_disturbed(other) {
                let what = if is_first { "the first run" } else { "another" };
                let there = format!("{what} runs on node {}, undisturbed", other.node);
                self.find(format!("{} runs on a conflict while {there}", short(key)));
            }
            self.with(key, |case| {
                let before = case.executions.iter_mut().take(number);
                let its = before.filter(|it| it.home == other);
                its.for_each(|it| it.is_overtaken = true);
            });
        }
        if !excused && !is_there {
            self.find(format!("{} runs on a conflict with nothing", short(key)));
        }
        // A node that was not told that its outcome had arrived goes by its own.
        let is_sure = !excused && !was_corrupt && !self.is_tampered(home.node, 2 * LEASE);
        if is_sure && is_there && !is_last {
            let text = shown.map(String::from_utf8_lossy);
            let finding = format!(
                "{} was shown {text:?}, which is not the last answer",
                short(key)
            );
            self.find(finding);
        }
        (number, body)
    }

    fn enter(
        &self,
        home: Home,
        key: &EncodedKey,
        client: &Client,
        claim: Option<(Token, Duration)>,
    ) -> (usize, String) {
        let now = self.1.now();
        let (number, body) = self.with(key, |case| {
            let number = case.executions.len();
            let body = format!("{} {number}", short(key));
            case.executions.push(Execution {
                home,
                is_overtaken: false,
                kind: claim.map_or(Kind::Conflict, |(token, _)| Kind::First(token)),
                client: client.clone(),
                claimed: claim.map_or(now, |(_, at)| at),
                since: now,
                ended: None,
                is_streaming: false,
                is_given_up: false,
                expires: None,
                had_record: false,
                body: body.clone(),
            });
            (number, body)
        });
        self.note(|| {
            let what = if claim.is_some() {
                ""
            } else {
                ", on a conflict,"
            };
            format!(
                "node {}: execution {number} of {}{what} starts",
                home.node,
                short(key)
            )
        });
        (number, body)
    }

    /// A handler returned the head of an answer, whose body will come.
    pub(super) fn streams(&self, key: &EncodedKey, number: usize) {
        self.with(key, |case| case.executions[number].is_streaming = true);
    }

    pub(super) fn ended(&self, key: &EncodedKey, number: usize, end: End) {
        self.note(|| format!("execution {number} of {} ends: {end:?}", short(key)));
        let now = self.1.now();
        let (outlived, kept) = self.with(key, |case| {
            let had_record = case.live(now + MOMENT).is_some();
            let it = &mut case.executions[number];
            it.ended = Some((end, now));
            it.had_record = had_record;
            let outlived =
                it.is_given_up && it.claimed.saturating_add(self.2.max_hold + self.2.ttl) < now;
            let kept = !it.is_first() && end == End::Failure;
            // What may run again may answer again.
            case.may_differ |= end == End::Failure;
            (outlived, kept)
        });
        if outlived {
            self.count("state: a run outlived the TTL of its tombstone");
        }
        if kept {
            self.count("state: a conflict run kept the record");
        }
    }

    /// A handler, or the body of its answer, was dropped before its end. That is right if it was held too long and its client has
    /// left.
    pub(super) fn cancelled(&self, home: Home, key: &EncodedKey, number: usize) {
        if !self.1.is_alive(home) {
            return;
        }
        let now = self.1.now();
        let earliest = self.earliest();
        let is_right = self.with(key, |case| {
            let it = &case.executions[number];
            it.client.left().is_some() && it.claimed + earliest <= now
        });
        if is_right {
            self.count("state: an operation without a client was dropped");
            self.ended(key, number, End::Dropped);
        } else {
            let finding = format!("{} was cancelled on node {}", short(key), home.node);
            self.find(finding);
        }
    }

    pub(super) fn asked(&self, home: Home) -> UnderWay {
        self.lock().nodes[home.node].under_way += 1;
        UnderWay(self.clone(), home.node)
    }

    /// What ought to have happened by now.
    pub(super) fn look(&self) {
        let now = self.1.now();
        let earliest = self.earliest();
        let state = self.lock();
        let mut late = Vec::new();
        for (key, case) in &state.keys {
            for it in case.executions.iter().filter(|it| it.ended.is_none()) {
                let latest = it.since + scaled(self.2.max_hold, 102) + 2 * LEASE;
                if now < latest || it.is_overtaken {
                    continue;
                }
                // A tombstone that can't be stored is tried until its TTL is over, if nothing runs but the answer.
                let tampered = state.nodes[it.home.node].tampered;
                let is_abandoned =
                    it.is_streaming && tampered.is_some_and(|at| it.claimed + earliest <= at);
                let is_forgiven = case.was_corrupt || !it.is_first() || is_abandoned;
                if !it.is_given_up && !is_forgiven {
                    late.push((
                        it.home,
                        format!("{} runs on without a tombstone", short(key)),
                    ));
                }
                if it.client.left().is_some_and(|left| left + 2 * LEASE < now) {
                    late.push((it.home, format!("{} runs on for nobody", short(key))));
                }
            }
        }
        drop(state);
        for (home, finding) in late {
            if !self.is_disturbed(home) && !self.is_tampered(home.node, 2 * LEASE) {
                self.find(format!("{finding} on node {}", home.node));
            }
        }
    }

    // ---- what clients see

    pub(super) fn left(&self, home: Home, client: &Client) {
        let now = self.1.now();
        client.leaves(now);
        self.lock().nodes[home.node].was_left = Some(now);
    }

    /// A replay of this body, for a request of `asked`.
    pub(super) fn replayed(&self, home: Home, key: &EncodedKey, body: &str, asked: Duration) {
        let is_disturbed = self.is_disturbed(home);
        let finding = self.with(key, |case| {
            let answer = case
                .by_body(body.as_bytes())
                .filter(|it| it.end() == Some(End::Answer));
            let Some(answer) = answer else {
                return Some(format!("replayed {body:?}, which nobody answered"));
            };
            if answer.over(self.2.ttl) < asked && !is_disturbed {
                return Some(format!("replayed {body:?}, which had expired"));
            }
            case.replays.insert(body.to_owned());
            if case.replays.len() > 1 && !case.may_differ {
                return Some(format!("replayed different answers: {:?}", case.replays));
            }
            None
        });
        if let Some(finding) = finding {
            self.find(format!("{} {finding}", short(key)));
        }
    }

    /// The answer of the execution that the request was itself, to its end.
    pub(super) fn answered(&self, home: Home, key: &EncodedKey, body: &str) {
        let now = self.1.now();
        let is_sure = !self.is_disturbed(home);
        let tampered = self.lock().nodes[home.node].tampered;
        let longest = self.earliest();
        let finding = self.with(key, |case| {
            let found = case.executions.iter().position(|it| it.body == body);
            let Some(number) = found else {
                return Some(format!("was answered with {body:?}"));
            };
            let it = &case.executions[number];
            let Some((End::Answer, ended)) = it.ended.filter(|_| !it.is_first()) else {
                return None;
            };
            let is_late = case.late_replacement.is_some_and(|until| now < until);
            let was_tampered = tampered.is_some_and(|at| it.since < at + 2 * LEASE);
            let may_be_lost = it.is_overtaken
                || is_late
                || was_tampered
                || case.was_corrupt
                || it.since + longest < ended;
            if !is_sure || may_be_lost {
                return None;
            }
            // Otherwise it was gone before it could be replaced.
            let stored = case.live(now).filter(|_| it.had_record)?;
            if ended < stored.since + MOMENT {
                // It was replaced on this node, while it was being stored.
                return None;
            }
            let of = stored.body().and_then(|body| {
                case.executions
                    .iter()
                    .position(|it| it.body.as_bytes() == body)
            });
            match of {
                Some(of) if of >= number => None,
                _ => Some(format!(
                    "kept {of:?} although {number} answered the conflict"
                )),
            }
        });
        if let Some(finding) = finding {
            self.find(format!("{} {finding}", short(key)));
        }
    }

    /// A 409 without an answer: there is a tombstone, or one that a node has still to store.
    pub(super) fn not_replayable(&self, home: Home, key: &EncodedKey) {
        let now = self.1.now();
        let earliest = self.earliest();
        let decided = now.saturating_sub(MOMENT);
        let is_so = self.with(key, |case| {
            let mut stored = case.record.iter().chain(&case.before);
            let is_tombstone = stored.any(|it| it.body().is_none() && decided <= it.expires);
            let is_one = |it: &Execution| match it.ended {
                None => it.claimed + earliest < now,
                Some((End::Unreplayable, _)) => decided <= it.over(self.2.ttl),
                Some((_, ended)) => it.claimed + earliest < ended && decided <= it.over(self.2.ttl),
            };
            is_tombstone || case.executions.iter().any(is_one)
        });
        // One that stood still may answer with what is over.
        if !is_so && !self.is_disturbed(home) {
            self.find(format!(
                "{} has an answer that was not replayed",
                short(key)
            ));
        }
    }

    /// A 503 because too many run, or wait, as `waiting` do now: all the places must be taken.
    pub(super) fn overloaded(&self, home: Home, waiting: usize) {
        let now = self.1.now();
        // Until then an outcome may have to be stored again.
        let settled = 2 * LEASE;
        let finding = {
            let state = self.lock();
            let node = &state.nodes[home.node];
            let recent = |at: &&Duration| now < **at + MOMENT;
            let answered = node.answered.iter().filter(recent).count();
            if node.was_left.is_some_and(|at| now < at + 2 * MOMENT)
                || Terms::MAX_WAITING <= waiting + answered
            {
                return;
            }
            // Whoever waits may have been at the storage just then. The one that is refused has no place.
            let mut places = (node.under_way + answered).saturating_sub(1);
            for case in state.keys.values() {
                for it in case.executions.iter().filter(|it| it.home == home) {
                    let has_client = it.client.left().is_none();
                    let is_given_up = it.since + scaled(self.2.max_hold, 102) + settled < now;
                    match it.ended {
                        // Its request has been counted.
                        None if has_client => places = places.saturating_sub(is_given_up.into()),
                        None => places += usize::from(!is_given_up),
                        Some((_, ended)) => {
                            places += usize::from(now < ended + settled || case.was_corrupt);
                        }
                    }
                }
            }
            let finding = format!("node {} refused, with {places} places taken", home.node);
            (places < self.2.max_running).then_some(finding)
        };
        if let Some(finding) = finding
            && !self.is_tampered(home.node, settled)
            && !self.is_disturbed(home)
        {
            self.find(finding);
        }
    }

    /// A 423 after the whole wait: somebody must have held the key until a moment ago, and left no outcome before that.
    pub(super) fn refused_in_flight(&self, home: Home, key: &EncodedKey) {
        let now = self.1.now();
        let slack = Duration::from_secs(3);
        let (is_free, has_outcome) = self.with(key, |case| {
            let free_since = match case.claim {
                Some((_, until)) => until,
                None => case.free_since,
            };
            let blocks = |it: &Execution| match it.ended {
                None => !it.is_first() || self.1.is_alive(it.home),
                // After a conflict run that was held too long, as long as after a crash, and perhaps for the second time.
                Some((_, ended)) => !it.is_first() && now < ended + 6 * LEASE,
            };
            let is_free = free_since + slack < now && !case.executions.iter().any(blocks);
            // Conflicts wait for their turns.
            let outcome = case
                .live(now)
                .filter(|_| !self.2.manual && !case.was_corrupt);
            (is_free, outcome.is_some_and(|it| it.since + slack < now))
        });
        // Whoever was waiting for a turn had to wait longer.
        let window = if self.2.manual { self.2.max_hold } else { WAIT } + LEASE;
        if self.is_tampered(home.node, window) || self.is_tampered(SERVER, window) {
            return;
        }
        let key = short(key);
        if is_free {
            self.find(format!(
                "a duplicate of {key} was forgotten on node {}",
                home.node
            ));
        }
        if has_outcome {
            self.find(format!(
                "{key} was in flight on node {}, with an outcome",
                home.node
            ));
        }
    }

    fn with<T>(&self, key: &EncodedKey, look: impl FnOnce(&mut Case) -> T) -> T {
        look(self.lock().keys.entry(*key).or_default())
    }
}

/// Counts what the engines say.
impl Observer for Judge {
    fn on_event(&self, event: &Event<'_>) {
        let name = event.name();
        self.count(&format!("engine: {name}"));
        self.note(|| match event.key() {
            Some(key) => format!("engine: {name} {}", short(&key)),
            None => format!("engine: {name}"),
        });
    }
}

fn is_turn(key: &EncodedKey) -> bool {
    short(key).starts_with("turn")
}

/// The key as clients call it; see `PlainEncoder`. Others are derived from one, for turns.
fn short(key: &EncodedKey) -> String {
    match std::str::from_utf8(key.as_bytes()) {
        Ok(key) if key.starts_with("key-") => key.trim_end().to_owned(),
        _ => format!("turn {:.8}", key.to_string()),
    }
}
