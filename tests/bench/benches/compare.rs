//! Compares requests that pass our layer with requests that do not, in alternating rounds. README.md says what each case is.

use std::{
    env,
    future::Future,
    hint::black_box,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::Request,
    response::Response,
    routing::{get, post},
};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage, idempotency_exempt};
use moka::{policy::EvictionPolicy, sync::Cache};
use sha2::{Digest as _, Sha256};
use tower::{Layer, Service, ServiceExt as _};

#[path = "../redis.rs"]
mod redis;

/// Sends so many requests.
type Case = Box<dyn FnMut(u64) -> Pin<Box<dyn Future<Output = ()>>>>;

/// A layer that does nothing.
#[derive(Clone)]
struct PassThrough;

impl<S> Layer<S> for PassThrough {
    type Service = Passing<S>;
    fn layer(&self, inner: S) -> Passing<S> {
        Passing(inner)
    }
}

#[derive(Clone)]
struct Passing<S>(S);

impl<S: Service<Request, Response = Response>> Service<Request> for Passing<S> {
    type Response = Response;
    type Error = S::Error;
    type Future = S::Future;
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }
    fn call(&mut self, request: Request) -> S::Future {
        self.0.call(request)
    }
}

async fn handler(body: Bytes) -> Bytes {
    body
}

#[idempotency_exempt]
async fn exempt(body: Bytes) -> Bytes {
    body
}

async fn send(app: Router, request: Request) -> u16 {
    let response = app
        .oneshot(request)
        .await
        .unwrap_or_else(|never| match never {});
    let status = response.status().as_u16();
    let body = response
        .into_body()
        .collect()
        .await
        .map(|body| body.to_bytes());
    black_box(body.ok());
    status
}

fn request(method: &str, path: &str, key: Option<&str>, body: &Bytes) -> Request {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    let body = if method == "GET" {
        Body::empty()
    } else {
        Body::from(body.clone())
    };
    request.body(body).expect("a valid request")
}

fn case(
    app: Router,
    method: &'static str,
    path: &'static str,
    body: Bytes,
    key: fn(u64) -> Option<String>,
    expect: u16,
) -> Case {
    let mut next = 0;
    Box::new(move |rounds| {
        let (app, body) = (app.clone(), body.clone());
        let first = next;
        next += rounds;
        Box::pin(async move {
            for n in first..first + rounds {
                let key = key(n);
                let status = send(app.clone(), request(method, path, key.as_deref(), &body)).await;
                assert_eq!(status, expect);
            }
        })
    })
}

/// What no implementation on these parts can do without: for a first execution, and for a replay.
fn floor(body: Bytes) -> (Case, Case) {
    let cache: Cache<[u8; 32], Arc<Vec<u8>>> = Cache::builder()
        .eviction_policy(EvictionPolicy::lru())
        .weigher(|_, value: &Arc<Vec<u8>>| value.len() as u32)
        .max_capacity(1 << 30)
        .time_to_live(Duration::from_secs(86400))
        .build();
    let hash = |n: u64, body: &[u8]| -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(n.to_be_bytes());
        sha.update(b"POST/orders");
        sha.update(body);
        sha.finalize().into()
    };
    let first = {
        let (cache, body) = (cache.clone(), body.clone());
        let mut next = 0;
        Box::new(move |rounds| {
            let from = next;
            next += rounds;
            let (cache, body) = (cache.clone(), body.clone());
            Box::pin(async move {
                for n in from..from + rounds {
                    let key = hash(n, &body);
                    assert!(cache.get(&key).is_none());
                    cache.insert(key, Arc::new(body.to_vec()));
                }
            }) as Pin<Box<dyn Future<Output = ()>>>
        })
    };
    let replay = Box::new(move |rounds| {
        let (cache, body) = (cache.clone(), body.clone());
        Box::pin(async move {
            cache.insert(hash(u64::MAX, &body), Arc::new(body.to_vec()));
            for _ in 0..rounds {
                black_box(cache.get(&hash(u64::MAX, &body)));
            }
        }) as Pin<Box<dyn Future<Output = ()>>>
    });
    (first, replay)
}

/// A new key for each request.
fn fresh(n: u64) -> Option<String> {
    Some(format!("key-{n}"))
}

fn same(_: u64) -> Option<String> {
    Some("same".to_owned())
}

fn none(_: u64) -> Option<String> {
    None
}

fn cases(size: usize) -> Vec<(&'static str, Case)> {
    let body = Bytes::from(vec![b'x'; size]);
    let bare = || {
        Router::new()
            .route("/orders", post(handler))
            .route("/exempt", post(exempt))
            .route("/orders", get(handler))
    };
    let enforce = || {
        bare().layer(
            IdempotencyLayer::enforce(MemoryStorage::builder().max_bytes(1 << 30).build())
                .config(Config::ietf()),
        )
    };
    let (floor_first, floor_replay) = floor(body.clone());
    let post_of = |app, path, key, status| case(app, "POST", path, body.clone(), key, status);
    let mut cases = vec![
        (
            "bare",
            post_of(
                bare().with_state(()),
                "/orders",
                none as fn(u64) -> Option<String>,
                200,
            ),
        ),
        (
            "bare, key",
            post_of(bare().with_state(()), "/orders", fresh, 200),
        ),
        (
            "bare, same key",
            post_of(bare().with_state(()), "/orders", same, 200),
        ),
        (
            "pass-through",
            post_of(
                bare().layer(PassThrough).with_state(()),
                "/exempt",
                none,
                200,
            ),
        ),
        (
            "exempt",
            post_of(enforce().with_state(()), "/exempt", none, 200),
        ),
        (
            "safe",
            case(
                enforce().with_state(()),
                "GET",
                "/orders",
                body.clone(),
                none,
                200,
            ),
        ),
        (
            "safe, pass-through",
            case(
                bare().layer(PassThrough).with_state(()),
                "GET",
                "/orders",
                body.clone(),
                none,
                200,
            ),
        ),
        (
            "first",
            post_of(enforce().with_state(()), "/orders", fresh, 200),
        ),
        (
            "replay",
            post_of(enforce().with_state(()), "/orders", same, 200),
        ),
    ];
    cases.push(("floor, first", floor_first));
    cases.push(("floor, replay", floor_replay));
    cases
}

fn main() {
    let arguments: Vec<String> = env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    if arguments
        .first()
        .is_some_and(|argument| argument == "redis")
    {
        return redis::run(arguments.get(1).map(String::as_str));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    if let [flag, name] = &arguments[..]
        && flag == "--profile"
    {
        let mut cases = cases(256);
        let (_, case) = cases
            .iter_mut()
            .find(|(case, _)| case == name)
            .expect("a case of this name");
        runtime.block_on(case(500_000));
        return;
    }
    if !arguments.is_empty() {
        eprintln!("compare: nothing or `--profile CASE` is understood here");
        std::process::exit(2);
    }
    for size in [256, 4096] {
        let mut cases = cases(size);
        let mut times = vec![Vec::new(); cases.len()];
        for round in 0..22 {
            for ((_, case), times) in cases.iter_mut().zip(&mut times) {
                let count = 5000;
                let since = Instant::now();
                runtime.block_on(case(count));
                if round >= 2 {
                    times.push(since.elapsed().as_nanos() as f64 / count as f64);
                }
            }
        }
        let index = |name: &str| {
            let mut names = cases.iter().map(|(case, _)| *case);
            names.position(|case| case == name).expect("a case")
        };
        let median = |name: &str| {
            let mut times = times[index(name)].clone();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        println!("{size} B");
        for (name, _) in &cases {
            println!("  {name:20} {:8.0} ns", median(name));
        }
        // Of each round, since what else the machine does changes between rounds.
        let ratio = |case: &str, bare: &str, floor: &str| {
            let [case, bare, floor] = [case, bare, floor].map(|name| &times[index(name)]);
            let rounds = case.iter().zip(bare).zip(floor);
            let mut ratios: Vec<f64> = rounds
                .map(|((case, bare), floor)| (case - bare) / floor)
                .collect();
            ratios.sort_by(f64::total_cmp);
            let last = ratios.len() - 1;
            format!(
                "{:.2} ({:.2} to {:.2} in half of the rounds)",
                ratios[last / 2],
                ratios[last / 4],
                ratios[last - last / 4]
            )
        };
        for (case, bare, floor) in [
            ("first", "bare, key", "floor, first"),
            ("replay", "bare, same key", "floor, first"),
            ("replay", "bare, same key", "floor, replay"),
        ] {
            println!(
                "  ({case} - {bare}) / ({floor}) = {}",
                ratio(case, bare, floor)
            );
        }
        println!(
            "  exempt - pass-through = {:.0} ns",
            median("exempt") - median("pass-through")
        );
        println!(
            "  safe - pass-through = {:.0} ns",
            median("safe") - median("safe, pass-through")
        );
    }
}
