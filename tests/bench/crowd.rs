//! Requests that are under way together, 64 at a time.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::Request};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use idempotency_axum::{Begin, EncodedKey, Held, NewClaim, Record, Storage, Token};
use tokio::{runtime::Runtime, task::JoinSet};
use tower::ServiceExt as _;

/// How many requests are under way at once.
pub const CONCURRENT: u64 = 64;

/// The key of replays. The first request of it is an execution.
pub const REPLAYED: u64 = u64::MAX;

/// Sends the request of this number.
pub type Case = Arc<dyn Fn(u64) -> Sending + Send + Sync>;

pub type Sending = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A runtime of one thread, or of so many workers.
pub fn runtime(threads: usize) -> Runtime {
    let mut runtime = match threads {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.worker_threads(threads).enable_all().build();
    runtime.expect("a runtime")
}

/// The time of a request in nanoseconds, by the wall clock, when `requests` are sent with numbers from `first` on.
pub async fn round(case: &Case, first: u64, requests: u64) -> f64 {
    let since = Instant::now();
    let mut tasks = JoinSet::new();
    let each = requests / CONCURRENT;
    for task in 0..CONCURRENT {
        let first = first + task * each;
        let case = case.clone();
        tasks.spawn(async move {
            for n in first..first + each {
                case(n).await;
            }
        });
    }
    tasks.join_all().await;
    since.elapsed().as_nanos() as f64 / requests as f64
}

/// Which key request `n` has.
pub fn number(fresh: bool, n: u64) -> u64 {
    if fresh { n } else { REPLAYED }
}

/// The key of this number in a storage.
pub fn encoded(number: u64) -> EncodedKey {
    let mut key = [0; 32];
    // Spread, as hashes are.
    key[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    key[8..16].copy_from_slice(&number.to_be_bytes());
    EncodedKey::from_bytes(key)
}

/// `begin`, and `complete` where the key was free.
pub fn of_storage<S: Storage + Clone>(storage: &S, record: &Arc<Record>, fresh: bool) -> Case {
    let (storage, record) = (storage.clone(), record.clone());
    Arc::new(move |n| {
        let (storage, record) = (storage.clone(), record.clone());
        Box::pin(async move {
            let key = encoded(number(fresh, n));
            let claim = NewClaim {
                token: Token::random(),
                fingerprint: None,
                lease: Duration::from_secs(30),
            };
            match storage.begin(&key, &claim).await.expect("it answers") {
                Begin::Acquired => {
                    let ttl = Duration::from_secs(86400);
                    let held = storage.complete(&key, claim.token, &record, ttl).await;
                    assert_eq!(held.expect("it answers"), Held::Yes);
                }
                begun => assert!(!fresh && matches!(begun, Begin::Completed(_))),
            }
        })
    })
}

/// A request that goes through router and layer.
pub fn of_layer(shop: &Router, body: &Bytes, fresh: bool) -> Case {
    let (shop, body) = (shop.clone(), body.clone());
    Arc::new(move |n| {
        let (shop, body) = (shop.clone(), body.clone());
        Box::pin(async move {
            let key = format!("key-{}", number(fresh, n));
            let is_replay = send(shop, &key, &body).await;
            assert_eq!(is_replay, !fresh && n != REPLAYED);
        })
    })
}

/// Sends a request with this key. Says whether the answer was a replay.
pub async fn send(shop: Router, key: &str, body: &Bytes) -> bool {
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
