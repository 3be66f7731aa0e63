//! Compares requests that pass our layer on Redis with the same commands sent by the driver alone, 64 at a time.

use std::{
    collections::HashMap,
    env, fs,
    future::Future,
    path::PathBuf,
    pin::Pin,
    process::{self, Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::Request, http::HeaderMap, routing::post};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use idempotency_axum::{
    Begin, Config, EncodedKey, Held, IdempotencyLayer, NewClaim, Record, RedisStorage,
    Storage as _, Token,
    redis::{
        self, Arg, Client, Cmd, FromRedisValue as _, Pipeline, RedisFuture, Value,
        aio::{ConnectionLike, MultiplexedConnection},
    },
};
use tokio::{runtime::Runtime, task::JoinSet};
use tower::ServiceExt as _;

use crate::apps::hash;

/// How many requests are under way at once.
const CONCURRENT: u64 = 64;
/// How many requests a case sends in one round.
const REQUESTS: u64 = 50 * CONCURRENT;
/// Many short ones: cases that are compared then run within a moment of each other, whatever else the machine does.
const ROUNDS: usize = 82;
/// The first rounds are not counted.
const WARM_UP: usize = 2;

/// Sends the request of this number.
type Case = Arc<dyn Fn(u64) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// What is compared with what.
const RATIOS: [[&str; 2]; 6] = [
    ["storage first", "raw first"],
    ["storage replay", "raw replay"],
    ["layer first", "raw first"],
    ["layer replay", "raw replay"],
    ["layer first", "handler first"],
    ["layer replay", "handler replay"],
];

/// Repeats a case in so many rounds, for a profiler.
pub fn repeat(name: &str, rounds: usize) {
    let server = Server::start();
    let bench = Bench::new(1, &server);
    let (_, case) = (bench.cases.iter())
        .find(|(case, _)| *case == name)
        .expect("a case of this name");
    for round in 0..rounds {
        bench.round(round, case);
    }
}

/// Measures all cases.
pub fn run() {
    let server = Server::start();
    for threads in [1, 2] {
        let bench = Bench::new(threads, &server);
        let mut times: HashMap<&str, Vec<f64>> = HashMap::new();
        for round in 0..ROUNDS {
            for (name, case) in &bench.cases {
                let time = bench.round(round, case);
                if round >= WARM_UP {
                    times.entry(name).or_default().push(time);
                }
            }
        }
        println!("Redis, {CONCURRENT} at a time, runtime of {threads} threads");
        for (name, _) in &bench.cases {
            println!("  {name:20} {:8.0} ns", quartiles(times[name].clone())[1]);
        }
        for [case, other] in RATIOS {
            let ratios = times[case].iter().zip(&times[other]);
            let [low, median, high] = quartiles(ratios.map(|(ours, other)| other / ours).collect());
            println!(
                "  throughput of {case} / {other} = {median:.2} ({low:.2} to {high:.2} in half of the rounds)"
            );
        }
    }
}

struct Bench {
    runtime: Runtime,
    cases: Vec<(&'static str, Case)>,
    control: MultiplexedConnection,
}

impl Bench {
    fn new(threads: usize, server: &Server) -> Self {
        let mut runtime = match threads {
            1 => tokio::runtime::Builder::new_current_thread(),
            _ => tokio::runtime::Builder::new_multi_thread(),
        };
        let runtime = runtime.worker_threads(threads).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let (cases, control) = runtime.block_on(async {
            let client = Client::open(server.url()).expect("a URL");
            let connect = async || client.get_multiplexed_async_connection().await;
            let control = connect().await.expect("a connection");
            let raw = connect().await.expect("a connection");
            (cases(server, &control, raw).await, control)
        });
        Self {
            runtime,
            cases,
            control,
        }
    }

    /// The time of a request in this case.
    fn round(&self, round: usize, case: &Case) -> f64 {
        self.runtime.block_on(async {
            let mut control = self.control.clone();
            let flushed = redis::cmd("FLUSHALL").exec_async(&mut control).await;
            flushed.expect("Redis answers");
            // Replays have a record from here on.
            case(u64::MAX).await;
            let since = Instant::now();
            let mut tasks = JoinSet::new();
            let requests = REQUESTS / CONCURRENT;
            for task in 0..CONCURRENT {
                let first = (round as u64 * CONCURRENT + task) * requests;
                let case = case.clone();
                tasks.spawn(async move {
                    for n in first..first + requests {
                        case(n).await;
                    }
                });
            }
            tasks.join_all().await;
            since.elapsed().as_nanos() as f64 / REQUESTS as f64
        })
    }
}

async fn cases(
    server: &Server,
    control: &MultiplexedConnection,
    raw: MultiplexedConnection,
) -> Vec<(&'static str, Case)> {
    let body = Bytes::from(vec![b'x'; 256]);
    let shop = |storage: RedisStorage| {
        let layer = IdempotencyLayer::enforce(storage.prefix("bench")).config(Config::ietf());
        let handler = post(|body: Bytes| async { body });
        Router::new()
            .route("/orders", handler)
            .layer(layer)
            .with_state(())
    };
    let recorder = Recorder::new(control.clone());
    let recorded = shop(RedisStorage::new(recorder.clone()));
    let _ = send(recorded, "recorded", &body).await;
    let commands = Arc::new(recorder.commands());
    assert_eq!(commands.len(), 2, "a first execution is two commands");

    let storage = RedisStorage::connect(server.url()).await;
    let storage = storage.expect("Redis answers").prefix("bench");
    let requests = |shop: Router, fresh: bool| -> Case {
        let body = body.clone();
        Arc::new(move |n| {
            let (shop, body) = (shop.clone(), body.clone());
            Box::pin(async move {
                let key = if fresh { n } else { u64::MAX };
                let is_replay = send(shop, &format!("key-{key}"), &body).await;
                assert_eq!(is_replay, !fresh && n != u64::MAX);
            })
        })
    };
    let layer = shop(storage.clone());
    let handler = by_hand(raw.clone(), commands.clone());
    let driver = |fresh: bool| -> Case {
        let (raw, commands) = (raw.clone(), commands.clone());
        Arc::new(move |n| {
            let (raw, commands) = (raw.clone(), commands.clone());
            Box::pin(async move {
                let key = if fresh { n } else { u64::MAX };
                // As long as ours.
                let is_replay = sent(&raw, &commands, &format!("bench:{key:064x}")).await;
                assert_eq!(is_replay, !fresh && n != u64::MAX);
            })
        })
    };
    // Behind kind, token and checksum.
    let record = Record::decode(Bytes::from(commands[1].words[5][22..].to_vec()));
    let record = Arc::new(record.expect("a record"));
    let storage = |fresh: bool| -> Case {
        let (storage, record) = (storage.clone(), record.clone());
        Arc::new(move |n| {
            let (storage, record) = (storage.clone(), record.clone());
            Box::pin(async move {
                let mut key = [0; 32];
                key[..8].copy_from_slice(&(if fresh { n } else { u64::MAX }).to_be_bytes());
                let key = EncodedKey::from_bytes(key);
                let claim = NewClaim {
                    token: Token::random(),
                    fingerprint: None,
                    lease: Duration::from_secs(30),
                };
                match storage.begin(&key, &claim).await.expect("Redis answers") {
                    Begin::Acquired => {
                        let ttl = Duration::from_secs(86400);
                        let held = storage.complete(&key, claim.token, &record, ttl).await;
                        assert_eq!(held.expect("Redis answers"), Held::Yes);
                    }
                    begun => assert!(!fresh && matches!(begun, Begin::Completed(_))),
                }
            })
        })
    };
    vec![
        ("raw first", driver(true)),
        ("storage first", storage(true)),
        ("handler first", requests(handler.clone(), true)),
        ("layer first", requests(layer.clone(), true)),
        ("raw replay", driver(false)),
        ("storage replay", storage(false)),
        ("handler replay", requests(handler, false)),
        ("layer replay", requests(layer, false)),
    ]
}

/// A service that does by hand what it can't do without: it hashes the request as the floor does, and sends our commands.
fn by_hand(raw: MultiplexedConnection, commands: Arc<Vec<Recorded>>) -> Router {
    let handler = post(async move |headers: HeaderMap, body: Bytes| {
        let hash = hash(headers["idempotency-key"].as_bytes(), &body);
        let [high, low] = [&hash[..16], &hash[16..]]
            .map(|half| u128::from_be_bytes(half.try_into().expect("16 bytes")));
        let name = format!("bench:{high:032x}{low:032x}");
        match sent(&raw, &commands, &name).await {
            true => Ok(([("idempotency-replayed", "true")], body)),
            false => Err(body),
        }
    });
    Router::new().route("/orders", handler).with_state(())
}

/// Sends our commands for the key of this name. Says whether it had a record.
async fn sent(raw: &MultiplexedConnection, commands: &[Recorded], name: &str) -> bool {
    let is_replay = commands[0].send(raw, name).await != Value::Nil;
    if !is_replay {
        assert_eq!(commands[1].send(raw, name).await, Value::Int(1));
    }
    is_replay
}

/// Sends a request with this key. Says whether the answer was a replay.
async fn send(shop: Router, key: &str, body: &Bytes) -> bool {
    let request = Request::post("/orders").header("idempotency-key", key);
    let request = request.body(Body::from(body.clone()));
    let response = shop
        .oneshot(request.expect("a valid request"))
        .await
        .unwrap_or_else(|never| match never {});
    assert_eq!(response.status().as_u16(), 200);
    let is_replay = response.headers().contains_key("idempotency-replayed");
    let answer = response.into_body().collect().await.expect("a body");
    assert_eq!(answer.to_bytes(), body);
    is_replay
}

/// A connection that keeps a copy of the commands that are sent through it.
#[derive(Clone)]
struct Recorder {
    connection: MultiplexedConnection,
    commands: Arc<Mutex<Vec<Vec<Vec<u8>>>>>,
}

impl Recorder {
    fn new(connection: MultiplexedConnection) -> Self {
        Self {
            connection,
            commands: Arc::default(),
        }
    }

    /// The commands that had an effect: scripts that were not loaded yet are sent twice.
    fn commands(&self) -> Vec<Recorded> {
        let mut commands = self
            .commands
            .lock()
            .expect("no panic under this lock")
            .clone();
        let name = commands[0][1].clone();
        commands.retain(|words| words[0] != b"EVAL");
        commands
            .into_iter()
            .map(|words| Recorded {
                name: words.iter().position(|word| *word == name).expect("a key"),
                words,
            })
            .collect()
    }
}

impl ConnectionLike for Recorder {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        let words = command.args_iter().map(|word| match word {
            Arg::Simple(word) => word.to_vec(),
            _ => Vec::new(),
        });
        let mut commands = self.commands.lock().expect("no panic under this lock");
        commands.push(words.collect());
        self.connection.req_packed_command(command)
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        commands: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.connection.req_packed_commands(commands, offset, count)
    }

    fn get_db(&self) -> i64 {
        self.connection.get_db()
    }
}

/// A command of ours, to be sent again for other keys.
struct Recorded {
    words: Vec<Vec<u8>>,
    /// Which word is the name of the key.
    name: usize,
}

impl Recorded {
    async fn send(&self, connection: &MultiplexedConnection, name: &str) -> Value {
        let mut command = Cmd::new();
        for (place, word) in self.words.iter().enumerate() {
            match place == self.name {
                true => command.arg(name),
                false => command.arg(&word[..]),
            };
        }
        let answer = command.query_async(&mut connection.clone()).await;
        let answer: Value = answer.expect("Redis answers");
        match answer {
            // As ours does, which has to be able to read it.
            Value::BulkString(_) => {
                Value::BulkString(Vec::<u8>::from_redis_value(answer).expect("bytes"))
            }
            answer => answer,
        }
    }
}

/// A `redis-server` on a unix socket, without a disk.
struct Server {
    process: Child,
    directory: PathBuf,
}

impl Server {
    fn start() -> Self {
        let directory = env::temp_dir().join(format!("idempotency-bench-{}", process::id()));
        fs::create_dir_all(&directory).expect("a directory for the socket");
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--appendonly", "no"]);
        command.args(["--unixsocket", "redis.sock", "--dir", "."]);
        command.current_dir(&directory).stdout(Stdio::null());
        let process = command.spawn().expect("redis-server is installed");
        let server = Self { process, directory };
        while !server.socket().exists() {
            thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn socket(&self) -> PathBuf {
        self.directory.join("redis.sock")
    }

    fn url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The first quarter, the median and the third quarter.
fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    [last / 4, last / 2, last - last / 4].map(|place| values[place])
}
