//! The services that are compared, and the requests that they get.

use std::{
    future::pending,
    hint::black_box,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router, body::Body, extract::Request, http::HeaderMap, response::Response, routing::post,
};
use bytes::Bytes;
use http_body_util::BodyExt as _;
use idempotency_axum::{Config, IdempotencyLayer, LockPolicy, MemoryStorage, idempotency_exempt};
use moka::{policy::EvictionPolicy, sync::Cache};
use sha2::{Digest as _, Sha256};
use tower::{Layer, Service, ServiceExt as _};

use crate::on_one_thread;

/// More than any case holds at a time.
pub const UNLIMITED: usize = 1 << 34;

pub fn bare() -> Router {
    Router::new()
        .route("/orders", post(echo).get(echo))
        .route("/exempt", post(exempt))
        .route("/pending", post(pending::<()>))
}

pub fn passed_through() -> Router {
    bare().layer(PassThrough).with_state(())
}

/// Our layer on a storage. Duplicates of what runs are refused at once.
pub fn protected(storage: MemoryStorage) -> Router {
    let refuse = LockPolicy::default().timeout(Duration::ZERO);
    let layer = IdempotencyLayer::enforce(storage).config(Config::ietf().lock(refuse));
    bare().layer(layer).with_state(())
}

/// A handler that does what the floor does to a first execution.
pub fn floored(floor: Floor) -> Router {
    let handler = async move |headers: HeaderMap, body: Bytes| {
        let key = headers.get("idempotency-key").expect("a key");
        floor.first(key.as_bytes(), &body);
        echo(body).await
    };
    Router::new().route("/orders", post(handler))
}

pub fn memory(max_bytes: usize) -> MemoryStorage {
    MemoryStorage::builder().max_bytes(max_bytes).build()
}

/// What the storage takes a record with a body of this size for, so that a floor holds as many.
pub fn weight(size: usize) -> usize {
    let storage = memory(UNLIMITED);
    let app = protected(storage.clone());
    on_one_thread().block_on(Load::new(app, size).key(Key::Fresh).send(1));
    storage.weight() as usize
}

/// What no implementation on these parts can do without: SHA-256 over key, method, path and body, one `get` and one `insert`.
#[derive(Clone)]
pub struct Floor(Cache<[u8; 32], Arc<Vec<u8>>>);

impl Floor {
    pub fn new(max_bytes: usize, weight: usize) -> Self {
        let weight = weight as u32;
        let cache = Cache::builder()
            .eviction_policy(EvictionPolicy::lru())
            .weigher(move |_, _| weight)
            .max_capacity(max_bytes as u64)
            .time_to_live(Duration::from_secs(86400));
        Self(cache.build())
    }

    pub fn first(&self, key: &[u8], body: &[u8]) {
        let key = hash(key, body);
        assert!(self.0.get(&key).is_none());
        self.0.insert(key, Arc::new(body.to_vec()));
    }

    /// The record must be there.
    pub fn replay(&self, key: &[u8], body: &[u8]) {
        assert!(black_box(self.0.get(&hash(key, body))).is_some());
    }

    pub fn records(&self) -> u64 {
        self.0.run_pending_tasks();
        self.0.entry_count()
    }
}

pub fn hash(key: &[u8], body: &[u8]) -> [u8; 32] {
    let mut sha = Sha256::new();
    sha.update(key);
    sha.update(b"POST/orders");
    sha.update(body);
    sha.finalize().into()
}

/// The requests of a case: one after the other, each with the whole answer read.
pub struct Load {
    app: Router,
    method: &'static str,
    path: &'static str,
    body: Bytes,
    key: Key,
    cookie: Option<String>,
    expect: u16,
    next: u64,
}

#[derive(Clone, Copy)]
pub enum Key {
    None,
    Same,
    /// A new key for each request.
    Fresh,
}

impl Load {
    /// POST requests to `/orders` without a key, with a body of this size.
    pub fn new(app: Router, size: usize) -> Self {
        Self {
            app,
            method: "POST",
            path: "/orders",
            body: vec![b'x'; size].into(),
            key: Key::None,
            cookie: None,
            expect: 200,
            next: 0,
        }
    }

    pub fn get(mut self) -> Self {
        self.method = "GET";
        self.body = Bytes::new();
        self
    }

    pub fn path(mut self, path: &'static str) -> Self {
        self.path = path;
        self
    }

    pub fn key(mut self, key: Key) -> Self {
        self.key = key;
        self
    }

    /// The number of the first fresh key.
    pub fn keys_from(mut self, first: u64) -> Self {
        self.next = first;
        self
    }

    pub fn body(mut self, body: Bytes) -> Self {
        self.body = body;
        self
    }

    #[cfg(feature = "peers")]
    pub fn cookie(mut self, cookie: String) -> Self {
        self.cookie = Some(cookie);
        self
    }

    pub fn expect(mut self, status: u16) -> Self {
        self.expect = status;
        self
    }

    pub async fn send(&mut self, count: u64) {
        for _ in 0..count {
            let status = send(self.app.clone(), self.request()).await;
            assert_eq!(status, self.expect);
        }
    }

    pub fn request(&mut self) -> Request {
        let mut request = Request::builder().method(self.method).uri(self.path);
        match self.key {
            Key::None => {}
            Key::Same => request = request.header("idempotency-key", String::from("same")),
            Key::Fresh => {
                request = request.header("idempotency-key", format!("key-{}", self.next));
                self.next += 1;
            }
        }
        if let Some(cookie) = &self.cookie {
            request = request.header("cookie", cookie);
        }
        let body = Body::from(self.body.clone());
        request.body(body).expect("a valid request")
    }
}

pub async fn send(app: Router, request: Request) -> u16 {
    let response = app.oneshot(request).await;
    let response = response.unwrap_or_else(|never| match never {});
    let status = response.status().as_u16();
    let body = response.into_body().collect().await;
    black_box(body.expect("a whole answer").to_bytes());
    status
}

pub async fn echo(body: Bytes) -> Bytes {
    body
}

#[idempotency_exempt]
async fn exempt(body: Bytes) -> Bytes {
    body
}

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
