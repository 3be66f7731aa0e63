//! Two shops on one database, of which one after the other is killed at a place that a seed chose; and what must be true then.
//!
//! A *round* is one `kill -9`. Its victim is a request that [stops](STOP_AT) at the round's [`Phase`]: the shop prints that it is
//! there, and is killed. Other requests are under way at that moment, wherever they are. A client sends the same key until it has an
//! answer, to one shop and then to the other; each key has two clients. The phases are dealt like cards, so each has its share.

use std::{
    collections::{BTreeMap, HashMap},
    env, fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::{
    Call, PATIENCE,
    chance::Chance,
    redis::{Process, Spec},
};

/// The header that names the phase at which a request stops.
pub const STOP_AT: &str = "x-stop-at";

/// How long leases are. What a killed shop held without a transaction waits for so long.
const LEASE: Duration = Duration::from_secs(3);

/// How many keys are sent in a round, besides the victim's.
const BYSTANDERS: usize = 3;

/// Where a request is when its process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// It has arrived.
    BeforeClaim,
    /// The handler has inserted its order.
    InHandler,
    /// The handler has returned, and the record is not stored.
    BeforeCommit,
    /// The record is stored, and nothing is answered.
    AfterCommit,
    /// The client has a part of the answer.
    Answering,
}

impl Phase {
    /// All of them, in their order.
    pub const ALL: [Self; 5] = [
        Self::BeforeClaim,
        Self::InHandler,
        Self::BeforeCommit,
        Self::AfterCommit,
        Self::Answering,
    ];

    /// Its name in [`STOP_AT`] and in what the shop prints.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::BeforeClaim => "before-claim",
            Self::InHandler => "in-handler",
            Self::BeforeCommit => "before-commit",
            Self::AfterCommit => "after-commit",
            Self::Answering => "answering",
        }
    }

    /// The phase of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|phase| phase.name() == name)
    }
}

/// The body of a request.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct NewOrder {
    /// What is ordered: the same as the key, so that rows tell whose they are.
    pub item: String,
    /// Something more to write.
    #[serde(default)]
    pub note: String,
}

/// A row of the shop's table, and its answer.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Order {
    /// Its number.
    pub id: i64,
    /// What was ordered.
    pub item: String,
}

/// The time of day in nanoseconds, the same for all processes of the machine.
#[must_use]
pub fn now() -> u128 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_nanos()
}

/// How often, and by which seed: `KILL_ROUNDS`, or 100, and `KILL_SEED`, or one that is new each time.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What all choices are made from.
    pub seed: u64,
    /// How many kills there are.
    pub rounds: usize,
}

impl Plan {
    /// As the environment has it.
    ///
    /// # Panics
    ///
    /// Panics if a variable is no number.
    #[must_use]
    pub fn of_the_environment() -> Self {
        let number = |name| {
            let value = env::var(name).ok()?;
            let number = value.parse::<u64>();
            Some(number.unwrap_or_else(|_| panic!("{name}={value} is no number")))
        };
        let seed = number("KILL_SEED").unwrap_or_else(|| now() as u64 % 1_000_000_000);
        let rounds = number("KILL_ROUNDS").map_or(100, |rounds| rounds as usize);
        eprintln!("KILL_SEED={seed} KILL_ROUNDS={rounds}");
        Self { seed, rounds }
    }
}

/// Kills shops of `spec` as planned, with clients that go on until they have an answer.
///
/// # Panics
///
/// Panics if a shop does not start, a client gets an answer that no shop should give, or none within [`PATIENCE`].
pub async fn kill_shops(spec: Spec, plan: Plan) -> Story {
    let mut chance = Chance(plan.seed);
    let spec = spec.lease(LEASE);
    let mut shops = Shops {
        running: [spec.start().await, spec.start().await],
        addresses: Arc::default(),
        spec,
        lives: Vec::new(),
    };
    for shop in 0..2 {
        shops.opens(shop);
    }
    let mut clients = JoinSet::new();
    let mut deck = Vec::new();
    for round in 0..plan.rounds {
        if deck.is_empty() {
            deck.extend(Phase::ALL);
        }
        let phase = deck.swap_remove(chance.below(deck.len()));
        let killed = chance.below(2);
        let before = chance.below(BYSTANDERS + 1);
        for bystander in 0..before {
            shops.two_clients(&mut clients, &format!("{round}-{bystander}"));
        }
        let victim = format!("{round}-victim");
        shops.client(&mut clients, &victim, killed, Some(phase));
        shops.reaches(killed, phase).await;
        shops.client(&mut clients, &victim, 1 - killed, None);
        for bystander in before..BYSTANDERS {
            shops.two_clients(&mut clients, &format!("{round}-{bystander}"));
        }
        shops.kill(killed).await;
        shops.start(killed).await;
    }
    let mut answers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let all = async {
        while let Some(client) = clients.join_next().await {
            let (key, answer) = client.expect("a client without a panic");
            answers.entry(key).or_default().push(answer);
        }
    };
    if timeout(PATIENCE, all).await.is_err() {
        panic!("clients without an answer: {}", clients.len());
    }
    for shop in 0..2 {
        shops.kill(shop).await;
    }
    Story::of(answers, &shops.lives)
}

/// Two shops, and where they are now.
struct Shops {
    spec: Spec,
    running: [Process; 2],
    addresses: Arc<[watch::Sender<Option<SocketAddr>>; 2]>,
    /// Those that are dead.
    lives: Vec<Life>,
}

/// A shop that was killed.
struct Life {
    said: Vec<String>,
    /// It was alive until then at least.
    alive_until: u128,
}

impl Shops {
    fn opens(&self, shop: usize) {
        let address = self.running[shop].address();
        self.addresses[shop].send_replace(Some(address));
    }

    async fn start(&mut self, shop: usize) {
        self.running[shop] = self.spec.start().await;
        self.opens(shop);
    }

    async fn reaches(&self, shop: usize, phase: Phase) {
        let at = format!("at {} ", phase.name());
        self.running[shop].until(&at, 1).await;
    }

    /// `kill -9`.
    async fn kill(&mut self, shop: usize) {
        self.addresses[shop].send_replace(None);
        let alive_until = now();
        let said = self.running[shop].end().await;
        self.lives.push(Life { said, alive_until });
    }

    fn two_clients(&self, clients: &mut JoinSet<(String, String)>, key: &str) {
        for shop in 0..2 {
            self.client(clients, key, shop, None);
        }
    }

    /// Sends `key` until it is answered, first to this shop, where its first request stops at `phase`.
    fn client(
        &self,
        clients: &mut JoinSet<(String, String)>,
        key: &str,
        mut shop: usize,
        mut phase: Option<Phase>,
    ) {
        let (addresses, key) = (self.addresses.clone(), key.to_owned());
        clients.spawn(async move {
            loop {
                let mut address = addresses[shop].subscribe();
                let address = address.wait_for(Option::is_some).await;
                let address = address.expect("it is not closed").expect("it is some");
                let order = format!(r#"{{"item":"{key}"}}"#);
                let mut call = Call::new(address, http::Method::POST, "/orders")
                    .key(&key)
                    .json(order);
                if let Some(phase) = phase.take() {
                    call = call.header(STOP_AT, phase.name());
                }
                match call.try_send().await {
                    Ok(answer) if answer.code() == 201 || answer.is_replay() => {
                        return (key, answer.text().to_owned());
                    }
                    Ok(answer) => panic!("{key}: {answer:?}"),
                    // The shop was killed. The other one is there.
                    Err(_) => shop = 1 - shop,
                }
            }
        });
    }
}

/// All that happened.
#[derive(Debug)]
pub struct Story {
    /// How many rounds killed a shop at each phase.
    phases: BTreeMap<Phase, usize>,
    /// The answers that the clients of each key got.
    answers: BTreeMap<String, Vec<String>>,
    runs: HashMap<String, Vec<Run>>,
    /// When the record of a key was first there, by its encoded form.
    completed: HashMap<String, u128>,
}

/// A run of the handler.
#[derive(Debug)]
struct Run {
    encoded: String,
    start: u128,
    /// It did not end before this.
    end: u128,
}

/// What came of a story that is as it should be.
#[derive(Debug)]
pub struct Verdict {
    /// How many keys were sent.
    pub keys: usize,
    /// How many orders are more than one for their key.
    pub doubles: usize,
    /// How often the handler ran.
    pub runs: usize,
    phases: BTreeMap<Phase, usize>,
}

impl Story {
    fn of(answers: BTreeMap<String, Vec<String>>, lives: &[Life]) -> Self {
        let mut story = Self {
            phases: BTreeMap::new(),
            answers,
            runs: HashMap::new(),
            completed: HashMap::new(),
        };
        for life in lives {
            let mut runs: HashMap<&str, Vec<Run>> = HashMap::new();
            for line in &life.said {
                let words: Vec<_> = line.split(' ').collect();
                let time = |word: &str| word.parse().expect("a time");
                match words[..] {
                    ["at", phase, _] => {
                        let phase = Phase::named(phase).expect("a phase");
                        *story.phases.entry(phase).or_default() += 1;
                    }
                    ["ran", key, encoded, at] => runs.entry(key).or_default().push(Run {
                        encoded: encoded.to_owned(),
                        start: time(at),
                        end: life.alive_until,
                    }),
                    ["ended", key, _, at] => {
                        let mut runs = runs.entry(key).or_default().iter_mut();
                        let running = runs.rfind(|run| run.end == life.alive_until);
                        running.expect("it ran").end = time(at);
                    }
                    ["completed", encoded, at] => {
                        let first = story.completed.entry(encoded.to_owned());
                        let first = first.or_insert(u128::MAX);
                        *first = time(at).min(*first);
                    }
                    _ => {}
                }
            }
            for (key, runs) in runs {
                story.runs.entry(key.to_owned()).or_default().extend(runs);
            }
        }
        story
    }

    /// Judges it by the rows of the shop's table.
    ///
    /// # Panics
    ///
    /// Panics if a key has no order, or another answer than its order; if its handler ran twice at once, or after its record was
    /// stored; or if a phase has less than a tenth of the rounds.
    #[must_use]
    pub fn judge(mut self, orders: Vec<Order>) -> Verdict {
        let rounds: usize = self.phases.values().sum();
        for phase in Phase::ALL {
            let reached = self.phases.get(&phase).copied().unwrap_or_default();
            assert!(
                10 * reached >= rounds && reached > 0,
                "{phase:?} was reached in {reached} of {rounds} rounds"
            );
        }
        let mut of_key: HashMap<&str, Vec<&Order>> = HashMap::new();
        for order in &orders {
            assert!(
                self.answers.contains_key(&order.item),
                "nobody sent {order:?}"
            );
            of_key.entry(&order.item).or_default().push(order);
        }
        let mut verdict = Verdict {
            keys: self.answers.len(),
            doubles: 0,
            runs: 0,
            phases: self.phases,
        };
        for (key, answers) in &self.answers {
            let orders = of_key.remove(&**key).unwrap_or_default();
            let runs = self.runs.remove(&**key).unwrap_or_default();
            let answer: Order = serde_json::from_str(&answers[0]).expect("an order");
            let tale = || format!("{key}: {orders:?}, answered {answers:?}, {runs:?}");
            assert_eq!(answers.len(), 2, "{}", tale());
            assert_eq!(answers[0], answers[1], "{}", tale());
            assert!(orders.contains(&&answer), "{}", tale());
            assert!(orders.len() <= runs.len(), "{}", tale());
            verdict.doubles += orders.len() - 1;
            verdict.runs += runs.len();
            for run in &runs {
                let completed = self.completed.get(&run.encoded);
                let is_late = completed.is_some_and(|completed| run.start > *completed);
                assert!(!is_late, "it ran after its record was stored: {}", tale());
            }
            let mut by_start: Vec<_> = runs.iter().collect();
            by_start.sort_by_key(|run| run.start);
            for pair in by_start.windows(2) {
                assert!(
                    pair[0].end <= pair[1].start,
                    "it ran twice at once: {}",
                    tale()
                );
            }
        }
        verdict
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            keys,
            doubles,
            runs,
            phases,
        } = self;
        write!(
            f,
            "{keys} keys, {runs} runs, {doubles} orders twice; killed"
        )?;
        for (phase, times) in phases {
            write!(f, " {} {times},", phase.name())?;
        }
        Ok(())
    }
}
