//! Compares requests on PostgreSQL and on SQLite with the same statements sent by the driver alone, 64 at a time; and the longest
//! `begin` while a million expired records are purged with the longest without.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use axum::{Router, routing::post};
use bytes::Bytes;
use idempotency_axum::{
    Begin, Config, Held, IdempotencyLayer, NewClaim, Outcome, PostgresStorage, Record,
    SqliteStorage, Storage, StoredResponse, Token,
    sqlx::{
        self, Executor as _, PgPool, Row as _, SqlitePool,
        postgres::{PgConnectOptions, PgPoolOptions},
        sqlite::{SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
    },
};
use idempotency_tests::{postgres::Postgres, sqlite::SqliteFile};
use tokio::{runtime::Runtime, task::JoinSet};

use crate::{
    crowd::{self, CONCURRENT, Case, REPLAYED},
    measure::{Rounds, Spread, WARM_UP, busy},
    report::{Limit, Machine, Report},
    statements,
};

const ROUNDS: usize = 15;
const PATIENCE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(86400);

/// How many expired records are purged.
const EXPIRED: u64 = 1_000_000;
const PURGES: usize = 3;

/// How much slower than the driver a storage may be, and how much longer a `begin` may take while records are purged.
const ON_POSTGRES: Limit = Limit::AtLeast(0.8);
const ON_SQLITE: Limit = Limit::AtLeast(0.7);
const WHILE_PURGED: Limit = Limit::AtMost(5.0);

/// Measures all, or repeats the case of this name for a profiler.
pub fn postgres(profiled: Option<&str>) {
    let server = Postgres::with(&["log_statement=none"]);
    let bench = |threads| {
        let runtime = crowd::runtime(threads);
        let (cases, pool) = runtime.block_on(async {
            let options: PgConnectOptions = server.url().parse().expect("a URL");
            let pool = PgPoolOptions::new().acquire_timeout(PATIENCE);
            let pool = pool.connect_lazy_with(options);
            (cases_of_postgres(&pool).await, pool)
        });
        Bench {
            runtime,
            cases,
            clear: Box::new(move || {
                let pool = pool.clone();
                Box::pin(async move {
                    let cleared = pool.execute("TRUNCATE idempotency").await;
                    cleared.expect("PostgreSQL answers");
                })
            }),
            first: 50 * CONCURRENT,
            replay: 100 * CONCURRENT,
        }
    };
    if let Some(name) = profiled {
        return bench(2).repeat(name);
    }
    let mut report = Report::default();
    for (threads, group) in [(1, "PostgreSQL, 1 thread"), (2, "PostgreSQL, 2 threads")] {
        report.group(group);
        bench(threads).measure(&mut report, ON_POSTGRES);
    }
    report.group("PostgreSQL, purge");
    crowd::runtime(2).block_on(async {
        let storage = server.storage().await.time_limit(PATIENCE);
        let fill = async || {
            // As many as there may be, each as long as an answer of 256 B.
            let fill = format!(
                "INSERT INTO idempotency (key, token, record, checksum, expires_at) \
                 SELECT sha256(n::text::bytea), '\\x00112233445566778899aabbccddeeff', \
                   decode(repeat('5a', 400), 'hex'), 0, now() - make_interval(secs => n % 1000) \
                 FROM generate_series(1, {EXPIRED}) AS n"
            );
            for statement in [
                "TRUNCATE idempotency",
                &fill,
                "VACUUM ANALYZE idempotency",
                "CHECKPOINT",
            ] {
                server.execute(statement).await;
            }
        };
        purge(&mut report, &storage, fill, async || {
            storage.purge_expired().await.expect("PostgreSQL answers")
        })
        .await;
    });
    report.print_limits();
    report.write_figures("postgres.json", &Machine::of_this_run(busy()));
}

/// Measures all, or repeats the case of this name for a profiler.
pub fn sqlite(profiled: Option<&str>) {
    let file = SqliteFile::new();
    let open = async || {
        let options = file.options().create_if_missing(true);
        let options = options
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(PATIENCE);
        let pool = SqlitePoolOptions::new().acquire_timeout(PATIENCE);
        let pool = pool.connect_lazy_with(options);
        let storage = SqliteStorage::new(pool.clone()).time_limit(PATIENCE);
        storage.migrate().await.expect("a table");
        (storage, pool)
    };
    let bench = |threads| {
        let runtime = crowd::runtime(threads);
        let (cases, pool) = runtime.block_on(async {
            let (storage, pool) = open().await;
            (cases_of_sqlite(storage, &pool).await, pool)
        });
        Bench {
            runtime,
            cases,
            clear: Box::new(move || {
                let pool = pool.clone();
                Box::pin(async move {
                    let cleared = pool.execute("DELETE FROM idempotency").await;
                    cleared.expect("SQLite answers");
                })
            }),
            // Each first execution of the driver alone waits twice for the disk.
            first: 10 * CONCURRENT,
            replay: 100 * CONCURRENT,
        }
    };
    if let Some(name) = profiled {
        return bench(2).repeat(name);
    }
    let mut report = Report::default();
    for (threads, group) in [(1, "SQLite, 1 thread"), (2, "SQLite, 2 threads")] {
        report.group(group);
        bench(threads).measure(&mut report, ON_SQLITE);
    }
    report.group("SQLite, purge");
    crowd::runtime(2).block_on(async {
        let (storage, pool) = open().await;
        let fill = async || {
            let fill = format!(
                "DELETE FROM idempotency; \
                 WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {EXPIRED}) \
                 INSERT INTO idempotency (key, state, token, value, checksum, expires_at) \
                 SELECT randomblob(32), 'completed', randomblob(16), randomblob(400), 0, \
                   unixepoch() * 1000 - 1 - n % 1000000 FROM numbers; \
                 PRAGMA wal_checkpoint(TRUNCATE)"
            );
            pool.execute(&*fill).await.expect("SQLite answers");
        };
        purge(&mut report, &storage, fill, async || {
            storage.purge_expired().await.expect("SQLite answers")
        })
        .await;
    });
    report.print_limits();
    report.write_figures("sqlite.json", &Machine::of_this_run(busy()));
}

type Clear = Box<dyn Fn() -> crowd::Sending>;

struct Bench {
    runtime: Runtime,
    cases: Vec<(&'static str, Case)>,
    clear: Clear,
    /// How many requests of a kind a round sends.
    first: u64,
    replay: u64,
}

impl Bench {
    fn measure(&self, report: &mut Report, limit: Limit) {
        let mut times = Rounds::default();
        for round in 0..WARM_UP + ROUNDS {
            for (name, case) in &self.cases {
                let time = self.round(round, name, case);
                if round >= WARM_UP {
                    times.add(name, time);
                }
            }
        }
        for (name, _) in &self.cases {
            report.row(name, "µs", times.spread(name).scaled(1e-3));
        }
        for kind in ["first", "replay"] {
            let raw = format!("raw {kind}");
            for (place, limit) in [("storage", Some(limit)), ("layer", None)] {
                let ours = format!("{place} {kind}");
                let ratio = times.each(|of| of(&raw) / of(&ours));
                let name = format!("throughput of {ours} / raw");
                report.limited(&name, "×", ratio, limit);
            }
        }
    }

    fn round(&self, round: usize, name: &str, case: &Case) -> f64 {
        let requests = match name.ends_with("first") {
            true => self.first,
            false => self.replay,
        };
        self.runtime.block_on(async {
            (self.clear)().await;
            // Replays have a record from here on.
            case(REPLAYED).await;
            crowd::round(case, round as u64 * requests, requests).await
        })
    }

    fn repeat(&self, name: &str) {
        let case = self.cases.iter().find(|(case, _)| *case == name);
        let (_, case) = case.expect("a case of this name");
        for round in 0..60 {
            self.round(round, name, case);
        }
    }
}

async fn cases_of_postgres(pool: &PgPool) -> Vec<(&'static str, Case)> {
    let storage = PostgresStorage::new(pool.clone()).time_limit(PATIENCE);
    storage.migrate().await.expect("a table");
    let record = Arc::new(record());
    let sent = statements::of(async || execute_once(&storage, &record).await).await;
    let [begin, complete] = sent
        .try_into()
        .expect("a first execution is two statements");
    let driver = |fresh: bool| -> Case {
        let (pool, record) = (pool.clone(), record.encode());
        let (begin, complete) = (begin.clone(), complete.clone());
        Arc::new(move |n| {
            let (pool, record, begin, complete) = (
                pool.clone(),
                record.clone(),
                begin.clone(),
                complete.clone(),
            );
            Box::pin(async move {
                let (key, token) = (crowd::encoded(crowd::number(fresh, n)), Token::random());
                let begun = sqlx::query(&begin)
                    .bind(&key.as_bytes()[..])
                    .bind(&token.as_bytes()[..])
                    .bind(None::<&[u8]>)
                    .bind(0_i64)
                    .bind(30.0_f64)
                    .fetch_all(&pool)
                    .await
                    .expect("PostgreSQL answers");
                if !begun[0].get::<bool, _>("taken") {
                    assert!(!fresh);
                    assert!(!begun[0].get::<Vec<u8>, _>("record").is_empty());
                    return;
                }
                let completed = sqlx::query(&complete)
                    .bind(&key.as_bytes()[..])
                    .bind(&token.as_bytes()[..])
                    .bind(&record[..])
                    .bind(0_i64)
                    .bind(DAY.as_secs_f64())
                    .fetch_all(&pool)
                    .await
                    .expect("PostgreSQL answers");
                assert_eq!(completed.len(), 1);
            })
        })
    };
    all_cases([driver(true), driver(false)], &storage, &record)
}

async fn cases_of_sqlite(storage: SqliteStorage, pool: &SqlitePool) -> Vec<(&'static str, Case)> {
    let record = Arc::new(record());
    let mut sent = statements::of(async || execute_once(&storage, &record).await).await;
    // What sets up a connection.
    sent.retain(|statement| !statement.starts_with("PRAGMA"));
    let [look, claim, complete] = (sent.try_into()).expect("a first execution is three statements");
    let driver = |fresh: bool| -> Case {
        let (pool, record) = (pool.clone(), record.encode());
        let (look, claim, complete) = (look.clone(), claim.clone(), complete.clone());
        Arc::new(move |n| {
            let (pool, record, look, claim, complete) = (
                pool.clone(),
                record.clone(),
                look.clone(),
                claim.clone(),
                complete.clone(),
            );
            Box::pin(async move {
                let (key, token) = (crowd::encoded(crowd::number(fresh, n)), Token::random());
                let found = sqlx::query(&look)
                    .bind(None::<i64>)
                    .bind(&key.as_bytes()[..])
                    .fetch_all(&pool)
                    .await
                    .expect("SQLite answers");
                if let Some(found) = found.first() {
                    assert!(!fresh);
                    assert!(!found.get::<Vec<u8>, _>("value").is_empty());
                    return;
                }
                for (statement, state, value, lives) in [
                    (&claim, "claimed", &[][..], 30_000),
                    (&complete, "completed", &record[..], 86_400_000_i64),
                ] {
                    let written = sqlx::query(statement)
                        .bind(None::<i64>)
                        .bind(&key.as_bytes()[..])
                        .bind(state)
                        .bind(&token.as_bytes()[..])
                        .bind(value)
                        .bind(0_i64)
                        .bind(lives)
                        .fetch_all(&pool)
                        .await
                        .expect("SQLite answers");
                    assert_eq!(written.len(), 1);
                }
            })
        })
    };
    all_cases([driver(true), driver(false)], &storage, &record)
}

fn all_cases<S: Storage + Clone>(
    [raw_first, raw_replay]: [Case; 2],
    storage: &S,
    record: &Arc<Record>,
) -> Vec<(&'static str, Case)> {
    let layer = IdempotencyLayer::enforce(storage.clone()).config(Config::ietf());
    let handler = post(|body: Bytes| async { body });
    let shop = Router::new().route("/orders", handler).layer(layer);
    let shop = shop.with_state(());
    let body = body();
    vec![
        ("raw first", raw_first),
        ("storage first", crowd::of_storage(storage, record, true)),
        ("layer first", crowd::of_layer(&shop, &body, true)),
        ("raw replay", raw_replay),
        ("storage replay", crowd::of_storage(storage, record, false)),
        ("layer replay", crowd::of_layer(&shop, &body, false)),
    ]
}

fn body() -> Bytes {
    Bytes::from(vec![b'x'; 256])
}

/// The record of an answer with this body.
fn record() -> Record {
    let headers = [("content-type", "application/octet-stream")]
        .into_iter()
        .map(|(name, value)| {
            let value = axum::http::HeaderValue::from_static(value);
            (axum::http::HeaderName::from_static(name), value)
        })
        .collect();
    let answer = StoredResponse::new(axum::http::StatusCode::OK, &headers, body());
    Record {
        fingerprint: None,
        outcome: Outcome::Response(answer),
    }
}

async fn execute_once(storage: &impl Storage, record: &Record) {
    let (key, claim) = (crowd::encoded(0), claim());
    let begun = storage.begin(&key, &claim).await;
    assert_eq!(begun.expect("it answers"), Begin::Acquired);
    let held = storage.complete(&key, claim.token, record, DAY).await;
    assert_eq!(held.expect("it answers"), Held::Yes);
}

fn claim() -> NewClaim {
    NewClaim {
        token: Token::random(),
        fingerprint: None,
        lease: DAY,
    }
}

/// The longest `begin` while the expired records are purged, over the longest of a run that takes as long, before.
async fn purge<S: Storage + Clone>(
    report: &mut Report,
    storage: &S,
    fill: impl AsyncFn(),
    purge: impl AsyncFn() -> u64,
) {
    let mut rounds = Rounds::default();
    let mut took = Duration::ZERO;
    // The first round only tells how long a purge takes.
    for round in 0..=PURGES {
        fill().await;
        let quiet = begins(storage, tokio::time::sleep(took)).await;
        let since = Instant::now();
        let busy = begins(storage, async { assert_eq!(purge().await, EXPIRED) }).await;
        took = since.elapsed();
        println!(
            "  round {round}: {:.0} s, longest begin {:.0} ms, without the purge {:.0} ms",
            took.as_secs_f64(),
            busy.longest,
            quiet.longest
        );
        if round > 0 {
            rounds.add("time of a purge", took.as_secs_f64() * 1e3);
            rounds.add("median begin, no purge", quiet.median);
            rounds.add("median begin, purge", busy.median);
            rounds.add("longest begin, no purge", quiet.longest);
            rounds.add("longest begin, purge", busy.longest);
        }
    }
    for name in rounds.names() {
        report.row(name, "ms", rounds.spread(name));
    }
    let ratio = rounds.each(|of| of("longest begin, purge") / of("longest begin, no purge"));
    report.limited(
        "longest begin, purge / no purge",
        "×",
        ratio,
        Some(WHILE_PURGED),
    );
}

/// How long `begin` takes, in milliseconds.
struct Begins {
    median: f64,
    longest: f64,
}

/// Claims new keys, 64 at a time, until `end`.
async fn begins<S: Storage + Clone>(storage: &S, end: impl Future<Output = ()>) -> Begins {
    let ended = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for _ in 0..CONCURRENT {
        let (storage, ended) = (storage.clone(), ended.clone());
        tasks.spawn(async move {
            let mut took = Vec::new();
            loop {
                let (key, since) = (random_key(), Instant::now());
                let begun = storage.begin(&key, &claim()).await;
                assert_eq!(begun.expect("it answers"), Begin::Acquired);
                took.push(since.elapsed().as_secs_f64() * 1e3);
                if ended.load(Ordering::Relaxed) {
                    return took;
                }
            }
        });
    }
    end.await;
    ended.store(true, Ordering::Relaxed);
    let took: Vec<f64> = tasks.join_all().await.concat();
    Begins {
        longest: took.iter().copied().fold(0.0, f64::max),
        median: Spread::of(took).median,
    }
}

fn random_key() -> idempotency_axum::EncodedKey {
    let (low, high) = (Token::random(), Token::random());
    let mut key = [0; 32];
    key[..16].copy_from_slice(low.as_bytes());
    key[16..].copy_from_slice(high.as_bytes());
    idempotency_axum::EncodedKey::from_bytes(key)
}
