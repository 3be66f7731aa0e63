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
    LEASE, MAX_HOLD, WAIT,
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
}

#[derive(Clone)]
pub(super) struct Judge(Arc<Mutex<State>>, World);

struct State {
    keys: BTreeMap<EncodedKey, Case>,
    /// Since when each node was last disturbed, or tampered with in any way.
    nodes: Vec<Troubles>,
    findings: Vec<String>,
    counts: BTreeMap<String, u64>,
    trace: Option<String>,
}

#[derive(Clone, Copy, Default)]
struct Troubles {
    /// Its leases may be over.
    disturbed: Option<Duration>,
    /// Something it sent or was sent did not arrive in time.
    tampered: Option<Duration>,
    cut_off: bool,
}

/// All that is known of a key.
#[derive(Default)]
struct Case {
    executions: Vec<Execution>,
    /// Granted by the server, and until when.
    claim: Option<(Token, Duration)>,
    /// Since when nobody holds it.
    free_since: Duration,
    record: Option<(Token, Outcome)>,
    /// What the server will not read.
    is_corrupt: bool,
    /// The last claim that each node was told it has.
    told: BTreeMap<Home, Token>,
    /// Bodies of the replays that clients got.
    replays: BTreeSet<String>,
    /// An outcome was lost with its node, or a node was overtaken: two answers may be about.
    may_differ: bool,
}

struct Execution {
    home: Home,
    /// Another was granted the key meanwhile, for which there was a reason: it is not the key's any more.
    is_overtaken: bool,
    token: Token,
    since: Duration,
    ended: Option<End>,
    body: String,
}

impl Judge {
    pub(super) fn new(world: World, nodes: usize, traces: bool) -> Self {
        let state = State {
            keys: BTreeMap::new(),
            nodes: vec![Troubles::default(); nodes + 1],
            findings: Vec::new(),
            counts: BTreeMap::new(),
            trace: traces.then(String::new),
        };
        Self(Arc::new(Mutex::new(state)), world)
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
        let mut state = self.lock();
        let Some(pick) = pick else {
            state
                .keys
                .values_mut()
                .for_each(|case| case.is_corrupt = false);
            return true;
        };
        let mut recorded = state.keys.values_mut().filter(|case| case.record.is_some());
        match recorded.nth(pick) {
            Some(case) => {
                case.is_corrupt = true;
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

    fn is_disturbed(&self, home: Home) -> bool {
        if !self.1.is_alive(home) || self.1.is_paused(home.node) {
            return true;
        }
        let now = self.1.now();
        let troubles = self.lock().nodes[home.node];
        troubles.cut_off || troubles.disturbed.is_some_and(|at| now < at + 2 * LEASE)
    }

    fn is_tampered(&self, node: usize, within: Duration) -> bool {
        let now = self.1.now();
        let troubles = self.lock().nodes[node];
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
        let overtaken: Vec<Home> = {
            let mut state = self.lock();
            let case = state.keys.entry(*key).or_default();
            if let Some((token, until)) = case.claim
                && token != claim.token
                && now < until
            {
                drop(state);
                return self.find(format!("{} was granted to two tokens at once", short(key)));
            }
            if let Some((token, _)) = case.record
                && token != claim.token
            {
                drop(state);
                return self.find(format!("{} was granted though it has a record", short(key)));
            }
            case.claim = Some((claim.token, now + claim.lease));
            // What failed frees its key. What has an outcome, stored or not, keeps it as one that runs does.
            let holds = |it: &&Execution| {
                it.ended != Some(End::Failure) && it.token != claim.token && !it.is_overtaken
            };
            let others = case.executions.iter().filter(holds);
            others.map(|it| it.home).collect()
        };
        for other in overtaken {
            if self.is_disturbed(other) {
                self.count("state: a node was overtaken");
                self.with(key, |case| {
                    case.may_differ = true;
                    let its = case.executions.iter_mut().filter(|it| it.home == other);
                    its.for_each(|it| it.is_overtaken = true);
                });
            } else {
                let who = format!("{} was taken from node {}", short(key), other.node);
                self.find(format!(
                    "{who}, undisturbed, which runs it or has its outcome"
                ));
            }
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

    pub(super) fn completed(&self, key: &EncodedKey, token: Token, record: &Record, held: Held) {
        self.note(|| format!("server: {} completed by {token}: {held:?}", short(key)));
        if held == Held::Lost {
            self.count("state: a late completion was lost");
            return;
        }
        let now = self.1.now();
        let finding = self.with(key, |case| {
            let mut finding = None;
            if let Some((holder, until)) = case.claim
                && holder != token
                && now < until
            {
                finding = Some("was completed while another holds it");
            }
            match &case.record {
                None => case.record = Some((token, record.outcome.clone())),
                Some((first, _)) if *first == token => {}
                Some(_) => finding = Some("was completed twice"),
            }
            let execution = case.executions.iter().rfind(|it| it.token == token);
            match (&record.outcome, execution) {
                (Outcome::Tombstone(TombstoneReason::MaxHold), _) => {}
                (_, None) => finding = Some("was completed before its handler began"),
                (Outcome::Response(answer), Some(it)) => match it.ended {
                    Some(End::Answer) if answer.body() == it.body.as_bytes() => {}
                    Some(End::Answer) => finding = Some("has another answer than was given"),
                    Some(_) => finding = Some("has an answer that is none"),
                    None => finding = Some("was completed before its handler ended"),
                },
                (Outcome::Tombstone(_), Some(_)) => {}
            }
            case.claim = None;
            case.free_since = now;
            finding
        });
        if let Some(finding) = finding {
            self.find(format!("{} {finding}", short(key)));
        }
    }

    // ---- what nodes do

    /// The node has been told that the claim is its own.
    pub(super) fn told(&self, home: Home, key: &EncodedKey, token: Token) {
        self.with(key, |case| {
            case.told.insert(home, token);
        });
    }

    /// A handler begins. Returns the number of its execution, and what it will answer.
    pub(super) fn started(&self, home: Home, key: &EncodedKey) -> (usize, String) {
        let others: Vec<(Home, Option<End>)> = self.with(key, |case| {
            let others = case.executions.iter().filter(|it| !it.is_overtaken);
            others.map(|it| (it.home, it.ended)).collect()
        });
        let (number, recorded, token) = self.with(key, |case| {
            (
                case.executions.len(),
                case.record.is_some(),
                case.told.get(&home).copied(),
            )
        });
        self.note(|| {
            format!(
                "node {}: execution {number} of {} starts",
                home.node,
                short(key)
            )
        });
        if !self.is_disturbed(home) {
            if recorded {
                self.find(format!("{} ran though it has a record", short(key)));
            }
            for (other, ended) in others {
                let is_over = ended == Some(End::Failure);
                if !is_over && !self.is_disturbed(other) {
                    let how = if ended.is_some() { "after" } else { "while" };
                    let it_ran = format!("it ran on node {}", other.node);
                    self.find(format!("{} runs {how} {it_ran}, undisturbed", short(key)));
                }
            }
        } else if !others.is_empty() {
            self.with(key, |case| case.may_differ = true);
        }
        let Some(token) = token else {
            self.find(format!("{} runs without a claim", short(key)));
            return (number, String::new());
        };
        let (body, now) = (format!("{} {number}", short(key)), self.1.now());
        self.with(key, |case| {
            case.executions.push(Execution {
                home,
                is_overtaken: false,
                token,
                since: now,
                ended: None,
                body: body.clone(),
            });
        });
        (number, body)
    }

    pub(super) fn ended(&self, key: &EncodedKey, number: usize, end: End) {
        self.note(|| format!("execution {number} of {} ends: {end:?}", short(key)));
        self.with(key, |case| {
            case.executions[number].ended = Some(end);
            // What may run again may answer again.
            case.may_differ |= end == End::Failure;
        });
    }

    /// A handler, or the body of its answer, was dropped before its end.
    pub(super) fn cancelled(&self, home: Home, key: &EncodedKey) {
        if self.1.is_alive(home) {
            let finding = format!("{} was cancelled on node {}", short(key), home.node);
            self.find(finding);
        }
    }

    // ---- what clients see

    /// A replay of this body.
    pub(super) fn replayed(&self, key: &EncodedKey, body: &str) {
        let finding = self.with(key, |case| {
            let is_answer = |it: &Execution| it.body == body && it.ended == Some(End::Answer);
            if !case.executions.iter().any(is_answer) {
                return Some(format!("replayed {body:?}, which nobody answered"));
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

    /// The answer of the execution that the request was itself.
    pub(super) fn answered(&self, key: &EncodedKey, body: &str) {
        let is_known = self.with(key, |case| case.executions.iter().any(|it| it.body == body));
        if !is_known {
            self.find(format!("{} was answered with {body:?}", short(key)));
        }
    }

    /// A 409 without an answer: there is a tombstone, or one that a node has still to store.
    pub(super) fn not_replayable(&self, key: &EncodedKey) {
        let now = self.1.now();
        let is_so = self.with(key, |case| {
            let is_tombstone = matches!(case.record, Some((_, Outcome::Tombstone(_))));
            // By a clock that may be fast.
            let is_held_too_long = |it: &Execution| it.since + MAX_HOLD / 100 * 98 < now;
            let mut executions = case.executions.iter();
            is_tombstone
                || executions.any(|it| it.ended == Some(End::Unreplayable) || is_held_too_long(it))
        });
        if !is_so {
            self.find(format!(
                "{} has an answer that was not replayed",
                short(key)
            ));
        }
    }

    /// A 423 after the whole wait: somebody must have held the key until a moment ago.
    pub(super) fn refused_in_flight(&self, home: Home, key: &EncodedKey) {
        let now = self.1.now();
        let slack = Duration::from_secs(3);
        let is_free = self.with(key, |case| {
            let free_since = match case.claim {
                Some((_, until)) => until,
                None => case.free_since,
            };
            free_since + slack < now && case.executions.iter().all(|it| it.ended.is_some())
        });
        let window = WAIT + LEASE;
        if is_free && !self.is_tampered(home.node, window) && !self.is_tampered(SERVER, window) {
            self.find(format!(
                "a duplicate of {} was forgotten on node {}",
                short(key),
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

/// The key as clients call it; see `PlainEncoder`.
fn short(key: &EncodedKey) -> String {
    String::from_utf8_lossy(key.as_bytes())
        .trim_end()
        .to_owned()
}
