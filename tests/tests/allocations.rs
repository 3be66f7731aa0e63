//! What a request pays, counted in allocations: one that needs no protection against a layer in our place that does nothing, and
//! one that has a key against a table.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    net::SocketAddr,
    task::{Context, Poll},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Request},
    response::Response,
    routing::{self, MethodRouter},
};
use futures_util::{TryFutureExt, future::MapOk};
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use idempotency_axum::{
    Config, IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage, idempotency_exempt,
    idempotency_key,
};
use tower::{Service, ServiceExt, layer::layer_fn};

/// Counts what is allocated, each thread for itself: tests that run beside one another don't disturb it.
struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    COUNT.set(COUNT.get() + 1);
}

// SAFETY: every call goes to the system's allocator as it came. The counter is a constant-initialised thread local without a
// destructor, so counting neither allocates nor fails.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, new_size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Stands where our layer would, and does what a service between axum's must: it takes and gives axum's body.
#[derive(Clone)]
struct PassThrough<S>(S);

impl<S> Service<Request> for PassThrough<S>
where
    S: Service<Request, Response = Response>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = MapOk<S::Future, fn(Response) -> Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let request = request.map(Body::new);
        self.0
            .call(request)
            .map_ok(|response| response.map(Body::new))
    }
}

async fn plain() -> StatusCode {
    StatusCode::NO_CONTENT
}

#[idempotency_exempt]
async fn exempt() -> StatusCode {
    StatusCode::NO_CONTENT
}

#[idempotency_key(optional)]
async fn optional() -> StatusCode {
    StatusCode::NO_CONTENT
}

#[idempotency_key]
async fn required() -> StatusCode {
    StatusCode::NO_CONTENT
}

/// A request of a client, without a key.
#[derive(Clone, Copy)]
enum Ask {
    Get,
    Post,
    /// With the client's address, as `into_make_service_with_connect_info` puts it in.
    PostWithConnectInfo,
}

impl Ask {
    fn request(self) -> Request {
        let method = match self {
            Self::Get => Method::GET,
            Self::Post | Self::PostWithConnectInfo => Method::POST,
        };
        let request = Request::builder().method(method).uri("/order");
        let mut request = request.body(Body::empty()).expect("a valid request");
        if let Self::PostWithConnectInfo = self {
            let client = SocketAddr::from(([127, 0, 0, 1], 3000));
            request.extensions_mut().insert(ConnectInfo(client));
        }
        request
    }
}

/// What one request allocates, once everything that is made once is made.
async fn allocations(app: Router, ask: Ask) -> usize {
    // As `axum::serve` does for each connection.
    let app: Router = app.with_state(());
    let counted = async || {
        let (request, app) = (ask.request(), app.clone());
        let before = COUNT.get();
        let response = app.oneshot(request).await;
        let allocated = COUNT.get() - before;
        let Ok(response) = response;
        assert_eq!(response.status(), StatusCode::NO_CONTENT);
        allocated
    };
    counted().await;
    let warm = counted().await;
    for _ in 0..10 {
        assert_eq!(counted().await, warm, "each request pays the same");
    }
    warm
}

fn on_route(methods: MethodRouter) -> Router {
    Router::new().route("/order", methods)
}

/// What a request pays on this route with a layer that does nothing.
async fn passed_through(methods: MethodRouter, ask: Ask) -> usize {
    allocations(on_route(methods).layer(layer_fn(PassThrough)), ask).await
}

async fn in_exempt_mode(methods: MethodRouter, ask: Ask) -> usize {
    let layer = IdempotencyLayer::exempt(MemoryStorage::new());
    allocations(on_route(methods).layer(layer), ask).await
}

async fn in_enforce_mode(methods: MethodRouter, ask: Ask) -> usize {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    allocations(on_route(methods).layer(layer), ask).await
}

fn by_combinator(policy: KeyPolicy) -> MethodRouter {
    routing::any(plain.idempotency_key(policy))
}

fn optional_policy() -> KeyPolicy {
    KeyPolicy::optional()
}

#[tokio::test]
async fn a_handler_without_a_policy_in_exempt_mode() {
    let methods = || routing::any(plain);
    for ask in [Ask::Post, Ask::PostWithConnectInfo] {
        let passed = passed_through(methods(), ask).await;
        assert!(passed > 0, "the allocator counts");
        assert_eq!(in_exempt_mode(methods(), ask).await, passed);
    }
}

#[tokio::test]
async fn a_safe_method_in_both_modes() {
    let routes: [fn() -> MethodRouter; 7] = [
        || routing::any(plain),
        || routing::any(exempt),
        || routing::any(optional),
        || routing::any(required),
        || by_combinator(KeyPolicy::exempt()),
        || by_combinator(optional_policy()),
        || by_combinator(KeyPolicy::required()),
    ];
    for methods in routes {
        let passed = passed_through(methods(), Ask::Get).await;
        assert_eq!(in_exempt_mode(methods(), Ask::Get).await, passed);
        assert_eq!(in_enforce_mode(methods(), Ask::Get).await, passed);
    }
}

#[tokio::test]
async fn an_exempt_handler_in_exempt_mode() {
    let routes: [fn() -> MethodRouter; 2] = [
        || routing::any(exempt),
        || by_combinator(KeyPolicy::exempt()),
    ];
    for methods in routes {
        let passed = passed_through(methods(), Ask::Post).await;
        assert_eq!(in_exempt_mode(methods(), Ask::Post).await, passed);
    }
}

/// Without a layer an optional handler does not run, so the exempt one, which is as large, is what passes through.
#[tokio::test]
async fn an_optional_handler_without_a_key_in_exempt_mode() {
    let passed = passed_through(routing::any(exempt), Ask::Post).await;
    assert_eq!(
        in_exempt_mode(routing::any(optional), Ask::Post).await,
        passed
    );
    let passed = passed_through(by_combinator(KeyPolicy::exempt()), Ask::Post).await;
    let methods = by_combinator(optional_policy());
    assert_eq!(in_exempt_mode(methods, Ask::Post).await, passed);
}

/// The first one carries an acknowledgement in its extensions. Once its handler has given that, there is nothing to wait for.
#[tokio::test]
async fn a_lenient_handler_in_enforce_mode_once_it_has_answered() {
    for ask in [Ask::Post, Ask::PostWithConnectInfo] {
        let passed = passed_through(routing::any(exempt), ask).await;
        for methods in [routing::any(exempt), routing::any(optional)] {
            assert_eq!(in_enforce_mode(methods, ask).await, passed);
        }
        let passed = passed_through(by_combinator(KeyPolicy::exempt()), ask).await;
        for policy in [KeyPolicy::exempt(), optional_policy()] {
            let methods = by_combinator(policy);
            assert_eq!(in_enforce_mode(methods, ask).await, passed);
        }
    }
}

/// The table that the repository shows. A change that is meant changes it too.
const TABLE: &str = include_str!("../bench/results/allocations.md");

fn in_table(row: &str) -> usize {
    let cells = TABLE.lines().filter_map(|line| {
        let (name, count) = line.strip_prefix("| `")?.split_once("` | ")?;
        Some((name, count.trim_end_matches(" |")))
    });
    let mut cells = cells.filter(|(name, _)| *name == row);
    let (_, count) = cells.next().expect("a row of this name");
    count.parse().expect("a number")
}

async fn echo(body: Bytes) -> Bytes {
    body
}

#[idempotency_exempt]
async fn exempt_echo(body: Bytes) -> Bytes {
    body
}

/// What most requests allocate that have this key, or a new one each: a table that grows now and then is not theirs.
async fn usual_allocations(app: Router, path: &str, key: Option<&str>) -> usize {
    let app: Router = app.with_state(());
    let mut counts = Vec::new();
    for n in 0..301 {
        let key = key.map_or_else(|| format!("key-{n:03}"), str::to_owned);
        let request = Request::post(path).header("idempotency-key", key);
        let request = request.body(Body::from(vec![b'x'; 256]));
        let (request, app) = (request.expect("a valid request"), app.clone());
        let before = COUNT.get();
        let response = app.oneshot(request).await;
        let Ok(response) = response;
        assert_eq!(response.status(), StatusCode::OK);
        let answer = response.into_body().collect().await;
        let answer = answer.expect("a whole answer").to_bytes();
        counts.push(COUNT.get() - before);
        assert_eq!(answer.len(), 256);
    }
    counts.sort_unstable();
    let [low, usual] = [75, 150].map(|n| counts[n]);
    assert_eq!(low, usual, "most requests pay the same");
    usual
}

#[tokio::test]
async fn first_replay_and_exempt_allocate_what_the_table_says() {
    let routes = || {
        Router::new()
            .route("/orders", routing::post(echo))
            .route("/exempt", routing::post(exempt_echo))
    };
    let protected = || {
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::ietf());
        routes().layer(layer)
    };
    let passed = || routes().layer(layer_fn(PassThrough));
    let counts = [
        ("pass-through", passed(), "/exempt", None),
        ("exempt", protected(), "/exempt", None),
        ("first", protected(), "/orders", None),
        ("replay", protected(), "/orders", Some("same")),
    ];
    let mut counted = Vec::new();
    let mut table = Vec::new();
    for (row, app, path, key) in counts {
        counted.push((row, usual_allocations(app, path, key).await));
        table.push((row, in_table(row)));
    }
    assert_eq!(counted, table, "tests/bench/results/allocations.md");
}
