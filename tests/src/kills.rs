//! Two shops on one database, of which one after the other is killed at a place that a seed chose; and what must be true then.
//!
//! A *round* is one `kill -9`. Its victim is a request that [stops](STOP_AT) at the round's [`Phase`]: the shop prints that it is
//! there, and is killed. Other requests are under way at that moment, wherever they are. A client sends the same key until it has an
//! answer, to one shop and then to the other; each key has two clients. The phases are dealt like cards, so each has its share.

use std::{
    collections::{BTreeMap, HashMap},
    env, fmt, fs,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, task::JoinSet, time::timeout};

use crate::{
    Answer, Call, PATIENCE,
    chance::Chance,
    postgres::Postgres,
    redis::{Process, Spec},
    sqlite::SqliteFile,
};

/// The header that names the phase at which a request stops.
pub const STOP_AT: &str = "x-stop-at";

/// How long leases are where they matter: what a killed shop held without a transaction waits for so long.
pub const LEASE: Duration = Duration::from_secs(3);

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
/// Panics if a shop does not start, a client gets an answer that no shop should give, or none within [`PATIENCE`]; or if a phase has
/// less than a tenth of the rounds.
pub async fn kill_shops(spec: Spec, plan: Plan) -> Story {
    let mut chance = Chance(plan.seed);
    let mut shops = Shops::open(spec).await;
    let mut deck = Vec::new();
    for round in 0..plan.rounds {
        if deck.is_empty() {
            deck.extend(Phase::ALL);
        }
        let phase = deck.swap_remove(chance.below(deck.len()));
        let killed = chance.below(2);
        let before = chance.below(BYSTANDERS + 1);
        for bystander in 0..before {
            shops.two_clients(&format!("{round}-{bystander}"));
        }
        let victim = format!("{round}-victim");
        shops.client(&victim, killed, Some(phase));
        let at = format!("at {} ", phase.name());
        shops.running[killed].until(&at, 1).await;
        shops.client(&victim, 1 - killed, None);
        for bystander in before..BYSTANDERS {
            shops.two_clients(&format!("{round}-{bystander}"));
        }
        shops.kill(killed).await;
        shops.start(killed).await;
    }
    let story = shops.close().await;
    for phase in Phase::ALL {
        let reached = story.phases.get(&phase).copied().unwrap_or_default();
        assert!(
            10 * reached >= plan.rounds && reached > 0,
            "{phase:?} was reached in {reached} of {} rounds",
            plan.rounds
        );
    }
    story
}

/// Stops the database of two shops as a crash does, `crashes` times, each after a number of answers that the seed chose.
///
/// # Panics
///
/// As [`kill_shops`].
pub async fn crash_postgres(
    postgres: &mut Postgres,
    spec: Spec,
    plan: Plan,
    crashes: usize,
) -> Story {
    const KEYS: usize = 20;

    let mut chance = Chance(plan.seed);
    let mut shops = Shops::open(spec).await;
    for crash in 0..crashes {
        // The last answers come after the crash, whenever it comes.
        let answers = *shops.answered.borrow() + chance.below(KEYS);
        for key in 0..KEYS {
            shops.two_clients(&format!("{crash}-{key}"));
        }
        let mut answered = shops.answered.subscribe();
        let enough = timeout(PATIENCE, answered.wait_for(|count| *count >= answers));
        enough.await.expect("answers").expect("it is not closed");
        shops.database_is_up.send_replace(false);
        postgres.crash();
        postgres.start_again();
        shops.database_is_up.send_replace(true);
    }
    shops.close().await
}

/// Kills a shop inside of its COMMIT, as near as can be: the order has more than a megabyte, and the kill comes when the write-ahead
/// log has grown to a length within it that the seed chose. Half as many rounds as planned. Returns too how many orders were committed.
///
/// # Panics
///
/// As [`kill_shops`].
pub async fn kill_in_commits(file: &SqliteFile, spec: Spec, plan: Plan) -> (Story, usize) {
    const ORDER: usize = 1_200_000;
    /// Longer than a claim makes the log.
    const SHORTEST: usize = 100_000;

    let mut chance = Chance(plan.seed);
    let mut shops = Shops::open(spec).await;
    let note = "x".repeat(ORDER);
    let log = file.directory().join("orders.db-wal");
    let length = || fs::metadata(&log).map_or(0, |log| log.len() as usize);
    let mut committed = 0;
    for round in 0..plan.rounds / 2 {
        let (killed, key) = (chance.below(2), format!("{round}-large"));
        let depth = SHORTEST + chance.below(ORDER - SHORTEST);
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)").await;
        assert!(length() < SHORTEST, "the log was not emptied");
        let call = order(shops.running[killed].address(), &key, &note, None);
        let lost = tokio::spawn(call.try_send());
        let since = Instant::now();
        // Nothing wakes a task when a file grows.
        tokio::task::block_in_place(|| {
            while length() < depth {
                assert!(since.elapsed() < PATIENCE, "{key} was not written");
            }
        });
        shops.kill(killed).await;
        drop(lost.await);
        let orders = format!("SELECT count(*) FROM orders WHERE item = '{key}'");
        committed += file.number(&orders).await as usize;
        shops.start(killed).await;
        for shop in 0..2 {
            shops.client_with(&key, &note, shop, None);
        }
        // So that the next log begins empty.
        let answers = 2 * (round + 1);
        let mut answered = shops.answered.subscribe();
        let all = timeout(PATIENCE, answered.wait_for(|count| *count == answers));
        all.await.expect("answers").expect("it is not closed");
    }
    (shops.close().await, committed)
}

/// Two shops, where they are now, and their clients.
struct Shops {
    spec: Spec,
    running: [Process; 2],
    addresses: Arc<[watch::Sender<Option<SocketAddr>>; 2]>,
    /// Without it a shop answers 5xx.
    database_is_up: Arc<watch::Sender<bool>>,
    /// Each with its key and its answer.
    clients: JoinSet<(String, String)>,
    /// How many have theirs.
    answered: Arc<watch::Sender<usize>>,
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
    async fn open(spec: Spec) -> Self {
        let shops = Self {
            running: [spec.start().await, spec.start().await],
            addresses: Arc::default(),
            database_is_up: Arc::new(watch::Sender::new(true)),
            clients: JoinSet::new(),
            answered: Arc::default(),
            spec,
            lives: Vec::new(),
        };
        for shop in 0..2 {
            shops.opens(shop);
        }
        shops
    }

    fn opens(&self, shop: usize) {
        let address = self.running[shop].address();
        self.addresses[shop].send_replace(Some(address));
    }

    async fn start(&mut self, shop: usize) {
        self.running[shop] = self.spec.start().await;
        self.opens(shop);
    }

    /// `kill -9`.
    async fn kill(&mut self, shop: usize) {
        self.addresses[shop].send_replace(None);
        let alive_until = now();
        let said = self.running[shop].end().await;
        self.lives.push(Life { said, alive_until });
    }

    fn two_clients(&mut self, key: &str) {
        for shop in 0..2 {
            self.client(key, shop, None);
        }
    }

    /// Sends `key` until it is answered, first to this shop, where its first request stops at `phase`.
    fn client(&mut self, key: &str, shop: usize, phase: Option<Phase>) {
        self.client_with(key, "", shop, phase);
    }

    fn client_with(&mut self, key: &str, note: &str, mut shop: usize, mut phase: Option<Phase>) {
        let (addresses, key, note) = (self.addresses.clone(), key.to_owned(), note.to_owned());
        let (database_is_up, answered) = (self.database_is_up.clone(), self.answered.clone());
        self.clients.spawn(async move {
            loop {
                let mut address = addresses[shop].subscribe();
                let address = address.wait_for(Option::is_some).await;
                let address = address.expect("it is not closed").expect("it is some");
                let call = order(address, &key, &note, phase.take());
                match call.try_send().await {
                    Ok(answer) if is_final(&answer) => {
                        answered.send_modify(|answered| *answered += 1);
                        return (key, answer.text().to_owned());
                    }
                    // Its transaction was rolled back, or the database is not there.
                    Ok(answer) if answer.status.is_server_error() => {
                        let mut is_up = database_is_up.subscribe();
                        let is_up = is_up.wait_for(|is_up| *is_up).await;
                        is_up.expect("it is not closed");
                    }
                    Ok(answer) => panic!("{key}: {answer:?}"),
                    // The shop was killed. The other one is there.
                    Err(_) => shop = 1 - shop,
                }
            }
        });
    }

    /// Waits for all answers, and ends the shops.
    async fn close(mut self) -> Story {
        let mut answers: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let all = async {
            while let Some(client) = self.clients.join_next().await {
                let (key, answer) = client.expect("a client without a panic");
                answers.entry(key).or_default().push(answer);
            }
        };
        if timeout(PATIENCE, all).await.is_err() {
            panic!("clients without an answer: {}", self.clients.len());
        }
        for shop in 0..2 {
            self.kill(shop).await;
        }
        Story::of(answers, &self.lives)
    }
}

/// A request for `key` that stops at `phase`.
pub fn order(address: SocketAddr, key: &str, note: &str, phase: Option<Phase>) -> Call {
    let order = format!(r#"{{"item":"{key}","note":"{note}"}}"#);
    let call = Call::new(address, http::Method::POST, "/orders");
    let call = call.key(key).json(order);
    match phase {
        Some(phase) => call.header(STOP_AT, phase.name()),
        None => call,
    }
}

/// Whether a client is content with it.
#[must_use]
pub fn is_final(answer: &Answer) -> bool {
    answer.code() == 201 || answer.is_replay()
}

/// All that happened.
#[derive(Debug)]
pub struct Story {
    /// How many rounds killed a shop at each phase.
    phases: BTreeMap<Phase, usize>,
    /// The answers that the clients of each key got.
    answers: BTreeMap<String, Vec<String>>,
    runs: BTreeMap<String, Vec<Run>>,
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
            runs: BTreeMap::new(),
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

    /// No handler ran for a key while another one did.
    ///
    /// # Panics
    ///
    /// Panics if one did.
    pub fn assert_one_at_a_time(&self) {
        for (key, runs) in &self.runs {
            let mut by_start: Vec<_> = runs.iter().collect();
            by_start.sort_by_key(|run| run.start);
            for pair in by_start.windows(2) {
                let is_over = pair[0].end <= pair[1].start;
                assert!(is_over, "{key} ran twice at once: {runs:?}");
            }
        }
    }

    /// Judges it by the rows of the shop's table.
    ///
    /// # Panics
    ///
    /// Panics if a key has no order, another answer than its order, or two different answers, or if its handler ran after its record
    /// was stored.
    #[must_use]
    pub fn judge(&self, orders: &[Order]) -> Verdict {
        let mut of_key: HashMap<&str, Vec<&Order>> = HashMap::new();
        for order in orders {
            let is_sent = self.answers.contains_key(&order.item);
            assert!(is_sent, "nobody sent {order:?}");
            of_key.entry(&order.item).or_default().push(order);
        }
        let mut verdict = Verdict {
            keys: self.answers.len(),
            doubles: 0,
            runs: 0,
            phases: self.phases.clone(),
        };
        for (key, answers) in &self.answers {
            let orders = of_key.remove(&**key).unwrap_or_default();
            let runs = self.runs.get(key).map_or(&[][..], |runs| runs);
            let answer: Order = serde_json::from_str(&answers[0]).expect("an order");
            let tale = || format!("{key}: {orders:?}, answered {answers:?}, {runs:?}");
            assert_eq!(answers.len(), 2, "{}", tale());
            assert_eq!(answers[0], answers[1], "{}", tale());
            assert!(orders.contains(&&answer), "{}", tale());
            assert!(orders.len() <= runs.len(), "{}", tale());
            for run in runs {
                let completed = self.completed.get(&run.encoded);
                let is_late = completed.is_some_and(|completed| run.start > *completed);
                assert!(!is_late, "it ran after its record was stored: {}", tale());
            }
            verdict.doubles += orders.len() - 1;
            verdict.runs += runs.len();
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
        write!(f, "{keys} keys, {runs} runs, {doubles} orders too many")?;
        for (phase, times) in phases {
            write!(f, ", {times} kills {}", phase.name())?;
        }
        Ok(())
    }
}
