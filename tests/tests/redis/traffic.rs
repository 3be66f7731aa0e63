//! How many commands Redis is sent: what it shows of them itself.

use std::time::Duration;

use futures_util::future::join_all;
use http::{HeaderMap, StatusCode};
use idempotency_axum::{
    Begin, Completion, Config, Decision, Encoded, Engine, Held, LockPolicy, Outcome, RedisStorage,
    Storage, StoredResponse,
};
use idempotency_tests::{
    Answer, Gate,
    redis::{Monitor, Redis},
};
use tokio::task::{JoinHandle, JoinSet};

use super::{KEY, Shop, assert_replays, claim};

fn patient(config: Config) -> Config {
    config.lock(LockPolicy::default().timeout(Duration::from_secs(30)))
}

#[tokio::test]
async fn two_commands_for_a_first_execution_and_one_for_a_replay() {
    let redis = Redis::start();
    let shop = Shop::open(RedisStorage::connect(redis.url()).await.unwrap()).await;
    let mut monitor = redis.monitor().await;
    for n in 0..3 {
        let key = format!("k{n}");
        assert_eq!(shop.order(&key).await.code(), 201);
        let commands = monitor.commands().await;
        assert_eq!(commands.len(), 2, "{commands:#?}");
        assert!(commands[0].starts_with("\"SET\""), "{commands:#?}");
        assert!(commands[1].starts_with("\"EVALSHA\""), "{commands:#?}");
        for _ in 0..3 {
            assert_replays(&shop.order(&key).await, &format!("{key} {}", n + 1));
            let commands = monitor.commands().await;
            assert_eq!(commands.len(), 1, "{commands:#?}");
        }
    }
}

/// Who waits in the process of the original is handed the answer that this process stores, and does not fetch it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_duplicates_here_fetch_no_large_answer() {
    const DUPLICATES: usize = 1000;

    let redis = Redis::start();
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    let engine = Engine::new(storage, patient(Config::default()));
    let encoded = Encoded {
        key: KEY,
        fingerprint: None,
    };
    let Decision::Execute(claim) = engine.begin(&encoded).await else {
        panic!("the key is free");
    };
    let mut duplicates = JoinSet::new();
    for _ in 0..DUPLICATES {
        let engine = engine.clone();
        duplicates.spawn(async move { engine.begin(&encoded).await });
    }
    while engine.waiting() < DUPLICATES {
        tokio::task::yield_now().await;
    }
    let mut monitor = redis.monitor().await;
    let body = vec![b'x'; 1 << 20];
    let answer = StoredResponse::new(StatusCode::CREATED, &HeaderMap::new(), body);
    assert_eq!(claim.complete(answer.clone()).await, Completion::Stored);
    while let Some(decision) = duplicates.join_next().await {
        let Decision::Replay(replay) = decision.unwrap() else {
            panic!("a duplicate was not answered");
        };
        assert_eq!(replay.record.outcome, Outcome::Response(answer.clone()));
    }
    let commands = monitor.commands().await;
    let names: Vec<_> = commands.iter().map(|line| &line[..10]).collect();
    assert_eq!(names, ["\"EVALSHA\" "], "only the answer is stored");
}

/// Each of many waits its turn, runs, and leaves nothing to the next: whoever is woken runs, and the others are left alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_wakes_one() {
    const MANY: usize = 300;

    let redis = Redis::start();
    let mut storages = Vec::new();
    for _ in 0..2 {
        storages.push(RedisStorage::connect(redis.url()).await.unwrap());
    }
    let turn = async |storage: &RedisStorage| {
        let claim = claim();
        loop {
            match storage.begin(&KEY, &claim).await.unwrap() {
                Begin::Acquired => break,
                _ => storage.wait(&KEY, Duration::from_secs(60)).await.unwrap(),
            }
        }
        assert_eq!(storage.release(&KEY, claim.token).await.unwrap(), Held::Yes);
    };
    join_all((0..MANY).map(|n| turn(&storages[n % 2]))).await;

    let stats: String = redis.ask(&["INFO", "commandstats"]).await;
    let sets = stats
        .lines()
        .find_map(|line| line.strip_prefix("cmdstat_set:calls="))
        .and_then(|line| line.split(',').next()?.parse::<usize>().ok());
    let sets = sets.expect("SET was called");
    // One to see that somebody else runs, one to run, and some that come between a release and the one that it woke.
    assert!(sets < 30 * MANY, "{sets} claims of {MANY}");
}

/// A duplicate that has waited for a second, in another process than the running original.
struct Waiting {
    _redis: Redis,
    monitor: Monitor,
    gate: Gate,
    _first: Shop,
    running: JoinHandle<Answer>,
    second: Shop,
    duplicate: JoinHandle<Answer>,
}

impl Waiting {
    /// For an original whose claim `change` has changed.
    async fn a_second(change: impl AsyncFnOnce(&Redis)) -> Self {
        let redis = Redis::start();
        let gate = Gate::new();
        let first = Shop::gated(RedisStorage::connect(redis.url()).await.unwrap(), &gate).await;
        let storage = RedisStorage::connect(redis.url()).await.unwrap();
        let second = Shop::with(storage, patient, None).await;
        let running = first.server.post("/orders").key("k").start();
        gate.arrived(1).await;
        change(&redis).await;

        let mut monitor = redis.monitor().await;
        let duplicate = second.server.post("/orders").key("k").start();
        second.events.until("waiting", 1).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let commands = monitor.commands().await;
        assert!((1..=4).contains(&commands.len()), "{commands:#?}");
        Self {
            _redis: redis,
            monitor,
            gate,
            _first: first,
            running,
            second,
            duplicate,
        }
    }
}

/// Somebody has `PERSIST`ed it, or restored it without its time.
#[tokio::test]
async fn a_claim_without_an_end_is_not_looked_at_more_often() {
    let waiting = Waiting::a_second(async |redis| {
        let names: Vec<String> = redis.ask(&["KEYS", "*"]).await;
        let _: i64 = redis.ask(&["PERSIST", &names[0]]).await;
    });
    let waiting = waiting.await;
    waiting.gate.open(1);
    assert_eq!(waiting.running.await.unwrap().text(), "k 1");
    assert_replays(&waiting.duplicate.await.unwrap(), "k 1");
}

#[tokio::test]
async fn a_duplicate_that_waits_sends_at_most_four_commands_in_its_first_second() {
    let mut waiting = Waiting::a_second(async |_| {}).await;
    // More of them share what the first one hears.
    let order = || waiting.second.server.post("/orders").key("k").start();
    let more: Vec<_> = (0..50).map(|_| order()).collect();
    waiting.second.events.until("waiting", 51).await;
    waiting.gate.open(1);
    assert_eq!(waiting.running.await.unwrap().text(), "k 1");
    for duplicate in more.into_iter().chain([waiting.duplicate]) {
        assert_replays(&duplicate.await.unwrap(), "k 1");
    }
    let commands = waiting.monitor.commands().await;
    let subscribed = commands
        .iter()
        .filter(|command| command.starts_with("\"SUBSCRIBE\""));
    assert_eq!(subscribed.count(), 0, "{commands:#?}");
}
