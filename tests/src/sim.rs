//! The middleware in a simulated world: several nodes, one storage, clients that retry, and everything that goes wrong.
//!
//! What is under test is real: the layer, the engine, its keeper, and the `MemoryStorage` behind them. What they stand in is
//! not: time, tasks, chance, the network and the clients are made from one number, the *seed*, so a run can be had again, step
//! by step, from that number alone. See the package's README for what is injected and what is checked.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use idempotency_axum::{Config, IdempotencyLayer, KeyPolicy, LockPolicy, MemoryStorage};

use self::{
    judge::Judge,
    network::Link,
    people::{Node, Nodes, PlainEncoder, client},
    world::{SERVER, Step, World},
};
use crate::chance::Chance;

mod judge;
mod network;
mod people;
mod world;

const LEASE: Duration = Duration::from_secs(30);
const WAIT: Duration = Duration::from_secs(40);
const LIMIT: usize = 64;

/// As long as things go wrong.
const TROUBLED: Duration = Duration::from_secs(900);

/// What a world came to.
#[derive(Debug)]
pub struct Report {
    /// How many tasks were polled and timers fired.
    pub steps: u64,
    /// What contradicts a guarantee; empty where nothing does.
    pub findings: Vec<String>,
    /// How often each fault and each state was reached.
    pub counts: BTreeMap<String, u64>,
    /// Line by line what happened, if that was asked for.
    pub trace: String,
}

/// How often things go wrong, out of a thousand messages or moments. Each world has its own, and most have some at zero, or
/// nothing would ever be undisturbed for long enough.
#[derive(Clone, Copy, Debug, Default)]
struct Rates {
    delay: usize,
    loss: usize,
    error: usize,
    twice: usize,
    crash: usize,
    pause: usize,
    partition: usize,
    corrupt: usize,
}

/// How a world's service is configured, and what its handlers are like.
#[derive(Clone, Copy, Debug)]
struct Terms {
    max_hold: Duration,
    /// In every other world longer than the world lasts.
    ttl: Duration,
    max_running: usize,
    /// Its handlers answer conflicts themselves.
    manual: bool,
    /// Out of a thousand handlers so many never return,
    hung: usize,
    /// and so many answer with a body that never ends.
    endless: usize,
}

impl Terms {
    const LONGEST_HOLD: Duration = Duration::from_secs(300);
    const MAX_WAITING: usize = 6;
    const NO_LIMIT: usize = 1_000;
    const FOR_EVER: Duration = Duration::from_secs(1_000_000_000);

    fn draw(chance: &mut Chance) -> Self {
        let mut rate = |most: usize| match chance.below(2) {
            0 => 0,
            _ => 1 + chance.below(most),
        };
        let (hung, endless) = (rate(200), rate(200));
        Self {
            max_hold: match chance.below(2) {
                0 => Self::LONGEST_HOLD,
                _ => chance.millis(45_000, 200_000),
            },
            ttl: match chance.below(2) {
                0 => Self::FOR_EVER,
                _ => chance.millis(20_000, 400_000),
            },
            max_running: match chance.below(3) {
                0 => 1 + chance.below(3),
                _ => Self::NO_LIMIT,
            },
            manual: chance.below(4) == 0,
            hung,
            endless,
        }
    }

    /// How long a client stays at most.
    fn stay(&self) -> Duration {
        2 * self.max_hold + Duration::from_secs(100)
    }
}

#[derive(Clone)]
struct Plan(Arc<Mutex<Rates>>);

impl Plan {
    fn draw(world: &World) -> Self {
        let rates = world.chance(|chance| {
            let mut rate = |most: usize| match chance.below(3) {
                0 => chance.below(most) + 1,
                _ => 0,
            };
            Rates {
                delay: rate(100),
                loss: rate(50),
                error: rate(100),
                twice: rate(200),
                crash: rate(100),
                pause: rate(100),
                partition: rate(100),
                corrupt: rate(200),
            }
        });
        Self(Arc::new(Mutex::new(rates)))
    }

    fn lock(&self) -> MutexGuard<'_, Rates> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rates(&self) -> Rates {
        *self.lock()
    }

    fn end(&self) {
        *self.lock() = Rates::default();
    }
}

/// Runs the world of `seed` to its end, or to its first finding.
#[must_use]
pub fn run(seed: u64, traces: bool) -> Report {
    let (size, terms) =
        World::new(seed, 1).chance(|chance| (1 + chance.below(4), Terms::draw(chance)));
    let world = World::new(seed, size);
    let judge = Judge::new(world.clone(), size, terms, traces);
    let plan = Plan::draw(&world);
    judge.note(|| format!("seed {seed}: {size} nodes, {terms:?}, {:?}", plan.rates()));
    let server = MemoryStorage::builder()
        .env(world.env(world.home(SERVER)))
        .build();
    let mut stage = Stage {
        world,
        judge,
        plan,
        terms,
        server,
        nodes: Nodes::default(),
        steps: 0,
    };
    stage.play(size);
    let (findings, counts, trace) = stage.judge.conclude();
    Report {
        steps: stage.steps,
        findings,
        counts,
        trace,
    }
}

/// What many worlds came to.
#[derive(Debug, Default)]
pub struct Explored {
    /// How many were run.
    pub worlds: u64,
    /// Of all together.
    pub steps: u64,
    /// Those of the first world that has any, with its seed.
    pub findings: Vec<String>,
    /// Of all together.
    pub counts: BTreeMap<String, u64>,
}

impl Explored {
    /// What must have happened, or the worlds show less than they say.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let is_missing = |what: &&str| self.counts.get(*what).is_none_or(|count| *count == 0);
        REACHED.into_iter().filter(is_missing).collect()
    }
}

/// Runs the worlds of `seed` and those after it, until so many steps are done or one has a finding.
#[must_use]
pub fn explore(seed: u64, steps: u64) -> Explored {
    let mut explored = Explored::default();
    while explored.steps < steps && explored.findings.is_empty() {
        let seed = seed + explored.worlds;
        let report = run(seed, false);
        explored.worlds += 1;
        explored.steps += report.steps;
        let findings = report.findings.into_iter();
        explored
            .findings
            .extend(findings.map(|it| format!("seed {seed}: {it}")));
        for (what, count) in report.counts {
            *explored.counts.entry(what).or_default() += count;
        }
    }
    explored
}

/// Every fault and every state, as they are counted.
const REACHED: [&str; 53] = [
    "answer: 201",
    "answer: 409",
    "answer: 409 replay",
    "answer: 423",
    "answer: 500",
    "answer: 503",
    "answer: 503 overloaded",
    "engine: adopted",
    "engine: completed",
    "engine: conflict",
    "engine: deferred",
    "engine: executing",
    "engine: lost",
    "engine: reclaimed",
    "engine: refused",
    "engine: released",
    "engine: replaced",
    "engine: replayed",
    "engine: storage_failed",
    "engine: tombstoned",
    "engine: waiting",
    "fault: a client left",
    "fault: a client left in its answer",
    "fault: a waiter was cancelled",
    "fault: answer lost",
    "fault: body never ends",
    "fault: clock skew",
    "fault: crash",
    "fault: delay",
    "fault: delivered out of order",
    "fault: delivered twice",
    "fault: error after the effect",
    "fault: error before the effect",
    "fault: handler hangs",
    "fault: handler panics",
    "fault: handler slower than its lease",
    "fault: partition",
    "fault: pause past the lease",
    "fault: request lost",
    "fault: restart",
    "fault: slow body",
    "fault: unreadable record",
    "state: a client gave up",
    "state: a client was answered",
    "state: a conflict run",
    "state: a conflict run kept the record",
    "state: a late completion was lost",
    "state: a node was overtaken",
    "state: a record was replaced",
    "state: a run outlived the TTL of its tombstone",
    "state: an operation without a client was dropped",
    "state: ran again after the TTL",
    "state: renewed",
];

struct Stage {
    world: World,
    judge: Judge,
    plan: Plan,
    terms: Terms,
    server: MemoryStorage,
    nodes: Nodes,
    steps: u64,
}

impl Stage {
    fn play(&mut self, size: usize) {
        self.judge.count("fault: clock skew");
        for node in 1..=size {
            let node = self.start(node);
            self.nodes().push(node);
        }
        self.invite();
        let troubles = self.world.clone();
        let plan = Plan(self.plan.0.clone());
        let trouble = Trouble {
            judge: self.judge.clone(),
            nodes: self.nodes.clone(),
            restarts: self.starter(),
            plan,
            size,
        };
        self.world.spawn(self.world.home(SERVER), async move {
            trouble.make(troubles, TROUBLED).await
        });
        self.go_on_until_still();
    }

    fn nodes(&self) -> MutexGuard<'_, Vec<Node>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, node: usize) -> Node {
        self.starter()(node)
    }

    /// Makes the newest incarnation of a node.
    fn starter(&self) -> Arc<dyn Fn(usize) -> Node + Send + Sync> {
        let (world, judge) = (self.world.clone(), self.judge.clone());
        let (server, plan) = (self.server.clone(), Plan(self.plan.0.clone()));
        let terms = self.terms;
        Arc::new(move |node| {
            let home = world.home(node);
            let link = Link {
                world: world.clone(),
                home,
                server: server.clone(),
                judge: judge.clone(),
                plan: plan.clone(),
            };
            let lock = LockPolicy::default()
                .ttl(LEASE)
                .timeout(WAIT)
                .max_hold(terms.max_hold);
            let config = Config::default()
                .env(world.env(home))
                .encoder(PlainEncoder)
                .lock(lock)
                .ttl(terms.ttl)
                .max_running(terms.max_running)
                .max_waiting(Terms::MAX_WAITING)
                .max_response_body(LIMIT)
                .observer(judge.clone());
            let policy = match terms.manual {
                true => KeyPolicy::required().manual(),
                false => KeyPolicy::required(),
            };
            Node {
                world: world.clone(),
                home,
                judge: judge.clone(),
                terms,
                layer: IdempotencyLayer::enforce(link)
                    .config(config)
                    .policy(policy),
            }
        })
    }

    /// Clients come in crowds, one for each key.
    fn invite(&self) {
        let (keys, at_home) = (
            self.world.chance(|chance| 1 + chance.below(8)),
            self.world.home(SERVER),
        );
        for key in 0..keys {
            let (crowd, opens) = self
                .world
                .chance(|chance| (1 + chance.below(14), chance.millis(0, 600_000)));
            for _ in 0..crowd {
                let comes = opens
                    + self.world.chance(|chance| match chance.below(3) {
                        0 => Duration::ZERO,
                        1 => chance.millis(0, 1_000),
                        _ => chance.millis(0, 90_000),
                    });
                let (world, judge, nodes) =
                    (self.world.clone(), self.judge.clone(), self.nodes.clone());
                let patience = self.world.chance(|chance| 1 + chance.below(12));
                self.world.spawn(at_home, async move {
                    world.sleep(comes).await;
                    client(world, judge, nodes, format!("key-{key}"), patience).await;
                });
            }
        }
    }

    /// Until nothing will happen any more: every client was answered or is gone, and nobody waits, runs or holds a claim.
    fn go_on_until_still(&mut self) {
        let deadline = TROUBLED + 40 * Terms::LONGEST_HOLD;
        let mut looked = Duration::ZERO;
        loop {
            match self.world.step() {
                Step::Still => break,
                Step::Polled | Step::TimePassed => self.steps += 1,
            }
            for what in self.world.panics() {
                self.judge.find(format!("a task panicked: {what}"));
            }
            if self.world.now() > looked + LEASE / 3 {
                looked = self.world.now();
                self.judge.look();
            }
            if self.judge.has_found() {
                return;
            }
            if self.world.now() > deadline {
                return self
                    .judge
                    .find("somebody is still waiting or running".to_owned());
            }
        }
        if self.world.tasks() > 0 {
            let stuck = self.world.tasks();
            self.judge
                .find(format!("{stuck} tasks wait for what will not come"));
        }
        let left: Vec<_> = self
            .nodes()
            .iter()
            .map(|node| (node.engine().running(), node.engine().waiting()))
            .filter(|left| *left != (0, 0))
            .collect();
        if !left.is_empty() {
            self.judge
                .find(format!("nodes still count what runs and waits: {left:?}"));
        }
    }
}

/// What happens to nodes, rather than to messages.
struct Trouble {
    judge: Judge,
    nodes: Nodes,
    restarts: Arc<dyn Fn(usize) -> Node + Send + Sync>,
    plan: Plan,
    size: usize,
}

impl Trouble {
    async fn make(self, world: World, until: Duration) {
        while world.now() < until {
            let pause = world.chance(|chance| chance.millis(100, 5_000));
            world.sleep(pause).await;
            let (rates, node) = (
                self.plan.rates(),
                world.chance(|chance| 1 + chance.below(self.size)),
            );
            let happens = |rate| world.chance(|chance| chance.permille(rate));
            if happens(rates.crash) && !world.is_paused(node) {
                self.judge.count("fault: crash");
                self.judge.note(|| format!("fault: node {node} crashes"));
                world.crash(node);
                self.judge.crashed(node);
                self.restart(&world, node).await;
            }
            if happens(rates.pause) && !world.is_paused(node) {
                let pause =
                    world.chance(|chance| chance.millis(10, 2 * LEASE.as_millis() as usize));
                if pause > LEASE {
                    self.judge.count("fault: pause past the lease");
                }
                self.judge
                    .note(|| format!("fault: node {node} stands still for {pause:?}"));
                self.judge.disturb(node);
                world.pause(node, true);
                let (judge, later) = (self.judge.clone(), world.clone());
                world.spawn(world.home(SERVER), async move {
                    later.sleep(pause).await;
                    later.pause(node, false);
                    judge.disturb(node);
                });
            }
            if happens(rates.partition) && !self.judge.is_cut_off(node) {
                let long = world.chance(|chance| chance.millis(10, 3 * LEASE.as_millis() as usize));
                self.judge.count("fault: partition");
                self.judge
                    .note(|| format!("fault: node {node} is cut off for {long:?}"));
                self.judge.cut_off(node, true);
                let (judge, later) = (self.judge.clone(), world.clone());
                world.spawn(world.home(SERVER), async move {
                    later.sleep(long).await;
                    judge.cut_off(node, false);
                });
            }
            if happens(rates.corrupt) {
                let _ = self
                    .judge
                    .corrupt(Some(world.chance(|chance| chance.below(4))));
            }
        }
        self.plan.end();
        self.judge.corrupt(None);
        self.judge
            .note(|| "from here on nothing goes wrong any more".to_owned());
    }

    async fn restart(&self, world: &World, node: usize) {
        let down = world.chance(|chance| chance.millis(1, 20_000));
        world.sleep(down).await;
        self.judge.count("fault: restart");
        let started = (self.restarts)(node);
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = std::mem::replace(&mut nodes[node - 1], started);
        drop(nodes);
        drop(gone);
    }
}
