//! What a clone can hide from the layer, and the answer to it: closed, and said in the log with handler, policy and cure.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    task::{Context, Poll},
};

use axum::{
    BoxError, Router,
    error_handling::HandleErrorLayer,
    extract::{Request, State},
    handler::Handler,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{self, MethodRouter},
};
use http::{Method, StatusCode};
use idempotency_axum::{
    EncodedKey, Entry, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy,
    MemoryStorage, idempotency_exempt, idempotency_key,
};
use idempotency_tests::{Answer, Logs};
use tower::{Service, ServiceBuilder, buffer::BufferLayer};

use self::layers_support::{ask, post, run};

mod layers_support;

async fn search(key: Option<IdempotencyKey>) -> String {
    run(key).await
}

async fn comment(key: Option<IdempotencyKey>) -> String {
    run(key).await
}

async fn create_order(key: Option<IdempotencyKey>) -> String {
    run(key).await
}

async fn cached_order(key: Option<IdempotencyKey>) -> String {
    run(key).await
}

fn optional() -> KeyPolicy {
    KeyPolicy::optional()
}

fn cached() -> KeyPolicy {
    KeyPolicy::required().cache_name("orders")
}

mod attributes {
    use super::*;

    #[idempotency_exempt]
    pub async fn search(key: Option<IdempotencyKey>) -> String {
        run(key).await
    }

    #[idempotency_key(optional)]
    pub async fn comment(key: Option<IdempotencyKey>) -> String {
        run(key).await
    }

    #[idempotency_key]
    pub async fn create_order(key: Option<IdempotencyKey>) -> String {
        run(key).await
    }

    #[idempotency_key(cache_name = "orders")]
    pub async fn cached_order(key: Option<IdempotencyKey>) -> String {
        run(key).await
    }
}

/// Handlers of all policies for safe and unsafe methods, by combinators and, under `/attribute`, by attributes.
fn routes() -> Router {
    macro_rules! both {
        ($handler:expr) => {
            routing::get($handler).post($handler)
        };
    }
    let required = KeyPolicy::required;
    let by_attribute = Router::new()
        .route("/exempt", both!(attributes::search))
        .route("/optional", both!(attributes::comment))
        .route("/required", both!(attributes::create_order))
        .route("/cached", both!(attributes::cached_order));
    Router::new()
        .route("/plain", both!(run))
        .route("/exempt", both!(search.idempotency_exempt()))
        .route("/optional", both!(comment.idempotency_key(optional())))
        .route("/required", both!(create_order.idempotency_key(required())))
        .route("/cached", both!(cached_order.idempotency_key(cached())))
        .nest("/attribute", by_attribute)
}

/// Where [`routes`] has a handler of each policy, if it is nested at `/api`.
const PREFIXES: [&str; 2] = ["/api", "/api/attribute"];

fn enforce() -> IdempotencyLayer {
    IdempotencyLayer::enforce(MemoryStorage::new()).cache("orders", MemoryStorage::new())
}

fn exempt() -> IdempotencyLayer {
    IdempotencyLayer::exempt(MemoryStorage::new()).cache("orders", MemoryStorage::new())
}

/// Every way to hide handlers behind something that does not clone them.
fn walls(layer: &IdempotencyLayer) -> [(&'static str, Router); 3] {
    let around_a_router = ServiceBuilder::new()
        .layer(layer.clone())
        .service(Router::new().nest("/api", routes()));
    let around_a_buffer = ServiceBuilder::new()
        .layer(layer.clone())
        .layer(HandleErrorLayer::new(unavailable))
        .layer(BufferLayer::new(8));
    [
        (
            "nest_service",
            Router::new()
                .nest_service("/api", routes())
                .layer(layer.clone()),
        ),
        (
            "a layer around a router",
            Router::new().fallback_service(around_a_router),
        ),
        (
            "a buffer",
            Router::new().nest("/api", routes()).layer(around_a_buffer),
        ),
    ]
}

async fn unavailable(_: BoxError) -> StatusCode {
    StatusCode::SERVICE_UNAVAILABLE
}

async fn code(app: &Router, path: &str, key: Option<&str>) -> u16 {
    post(app, path, key).await.code()
}

/// Runs once per key; tried with a new one.
async fn is_protected(app: &Router, path: &str) {
    static KEYS: AtomicU16 = AtomicU16::new(0);
    let key = format!("fresh-{}", KEYS.fetch_add(1, Ordering::Relaxed));
    let first = post(app, path, Some(&key)).await;
    let retry = post(app, path, Some(&key)).await;
    assert_eq!((first.code(), first.is_replay()), (200, false), "{path}");
    assert_eq!((retry.code(), retry.is_replay()), (409, true), "{path}");
    assert_eq!(first.body, retry.body, "{path}");
}

/// Runs each time, and without protection.
async fn runs_always(app: &Router, path: &str) {
    for key in [None, Some("key"), Some("key")] {
        let answer = post(app, path, key).await;
        assert_eq!(answer.code(), 200, "{path}");
        assert!(answer.text().ends_with("unprotected"), "{path}");
    }
}

/// The log has one more error with all of `parts` for each request that is refused.
struct Refusals(Logs);

impl Refusals {
    async fn expect(&self, app: &Router, path: &str, key: Option<&str>, parts: &[&str]) {
        let before = self.0.lines().len();
        let refused = post(app, path, key).await;
        assert_eq!(refused.code(), 500, "{path}");
        let lines = self.0.lines();
        let errors: Vec<_> = lines[before..]
            .iter()
            .filter(|line| line.starts_with("ERROR"))
            .collect();
        let [error] = errors[..] else {
            panic!("not one error but {errors:?}");
        };
        for part in parts {
            assert!(error.contains(part), "no {part:?} in {error}");
        }
    }
}

const NO_LAYER: &str = "without an idempotency layer";
const OTHER_POLICY: &str = "applied another policy";

#[tokio::test]
async fn behind_a_wall_in_enforce_everything_needs_a_key_on_the_default_terms() {
    let (logs, _guard) = Logs::install();
    let refusals = Refusals(logs);
    for (prefix, (wall, app)) in each_prefix_of(&walls(&enforce())) {
        for path in ["/exempt", "/optional", "/required", "/cached"] {
            let path = format!("{prefix}{path}");
            assert_eq!(code(app, &path, None).await, 400, "{path} behind {wall}");
            let safe = ask(app, Method::GET, &path, None).await;
            assert_eq!(safe.code(), 200, "GET {path} behind {wall}");
        }
        is_protected(app, &format!("{prefix}/optional")).await;
        is_protected(app, &format!("{prefix}/required")).await;

        let exempt = format!("{prefix}/exempt");
        let parts = ["::search", "Exempt", OTHER_POLICY, "cure=", ".policy("];
        refusals.expect(app, &exempt, Some("key"), &parts).await;
        let cached = format!("{prefix}/cached");
        let parts = [
            "::cached_order",
            "\"orders\"",
            OTHER_POLICY,
            "cure=",
            ".policy(",
        ];
        refusals.expect(app, &cached, Some("key"), &parts).await;
        // A refusal leaves nothing behind: the next request is refused for the same reason.
        refusals.expect(app, &cached, Some("key"), &parts).await;
    }
}

fn each_prefix_of<T>(walls: &[T]) -> impl Iterator<Item = (&'static str, &T)> {
    let prefixes = PREFIXES.into_iter();
    prefixes.flat_map(move |prefix| walls.iter().map(move |wall| (prefix, wall)))
}

#[tokio::test]
async fn behind_a_wall_a_handler_without_a_policy_has_the_mode_s() {
    for (wall, app) in walls(&enforce()) {
        assert_eq!(code(&app, "/api/plain", None).await, 400, "{wall}");
        is_protected(&app, "/api/plain").await;
    }
    for (_, app) in walls(&exempt()) {
        runs_always(&app, "/api/plain").await;
    }
}

#[tokio::test]
async fn behind_a_wall_in_exempt_and_without_a_layer_what_wants_keys_is_refused() {
    let (logs, _guard) = Logs::install();
    let refusals = Refusals(logs);
    let mut apps = walls(&exempt()).to_vec();
    apps.push(("no layer", Router::new().nest("/api", routes())));
    for (prefix, (wall, app)) in each_prefix_of(&apps) {
        runs_always(app, &format!("{prefix}/exempt")).await;
        for key in [None, Some("key")] {
            for (path, handler, policy) in [
                ("/optional", "::comment", "Optional"),
                ("/required", "::create_order", "Required"),
                ("/cached", "::cached_order", "\"orders\""),
            ] {
                let path = format!("{prefix}{path}");
                let cure = ["cure=", "Router::layer", ".policy("];
                let parts = [&[handler, policy, NO_LAYER][..], &cure].concat();
                refusals.expect(app, &path, key, &parts).await;
            }
        }
        for path in ["/exempt", "/optional", "/required", "/cached"] {
            let safe = ask(app, Method::GET, &format!("{prefix}{path}"), None).await;
            assert_eq!(safe.code(), 200, "GET {path} behind {wall}");
        }
    }
}

#[tokio::test]
async fn a_log_line_never_shows_the_key() {
    let (logs, _guard) = Logs::install();
    for (_, app) in walls(&enforce()).into_iter().chain(walls(&exempt())) {
        for path in ["/exempt", "/optional", "/cached"] {
            for prefix in PREFIXES {
                let path = format!("{prefix}{path}");
                post(&app, &path, Some("the-client-s-secret")).await;
            }
        }
    }
    assert_eq!(logs.with(&["the-client-s-secret"]), [""; 0]);
    assert_ne!(logs.with(&["ERROR"]), [""; 0]);
}

#[tokio::test]
async fn a_layer_inside_the_wall_finds_every_policy() {
    let app = Router::new().nest_service("/api", routes().layer(enforce()));
    for prefix in PREFIXES {
        runs_always(&app, &format!("{prefix}/exempt")).await;
        let optional = format!("{prefix}/optional");
        assert_eq!(code(&app, &optional, None).await, 200);
        is_protected(&app, &optional).await;
        for path in ["/required", "/cached"] {
            let path = format!("{prefix}{path}");
            assert_eq!(code(&app, &path, None).await, 400);
            is_protected(&app, &path).await;
        }
    }
}

mod fixed_policy {
    use super::*;

    #[tokio::test]
    async fn required_or_optional_protects_what_the_layer_can_t_see() {
        for layer in [enforce(), exempt()] {
            for (_, app) in walls(&layer.clone().policy(KeyPolicy::required())) {
                for path in ["/plain", "/optional", "/required", "/attribute/required"] {
                    let path = format!("/api{path}");
                    assert_eq!(code(&app, &path, None).await, 400);
                    is_protected(&app, &path).await;
                }
            }
            for (_, app) in walls(&layer.policy(optional())) {
                for path in ["/plain", "/optional", "/attribute/optional"] {
                    let path = format!("/api{path}");
                    assert_eq!(code(&app, &path, None).await, 200);
                    is_protected(&app, &path).await;
                }
            }
        }
    }

    #[tokio::test]
    async fn with_a_named_cache() {
        for layer in [enforce(), exempt()] {
            let layer = layer.policy(cached());
            for (wall, app) in walls(&layer) {
                assert_eq!(code(&app, "/api/cached", None).await, 400);
                let first = post(&app, "/api/cached", Some(wall)).await;
                let retry = post(&app, "/api/cached", Some(wall)).await;
                assert_eq!((first.code(), retry.is_replay()), (200, true));
                assert!(is_recorded(layer.engine_of("orders").unwrap(), &first).await);
                assert!(!is_recorded(layer.engine(), &first).await);
            }
        }
    }

    #[tokio::test]
    async fn exempt_lets_exempt_handlers_run_and_refuses_those_that_need_a_key() {
        let (logs, _guard) = Logs::install();
        let refusals = Refusals(logs);
        for layer in [enforce(), exempt()] {
            for (_, app) in walls(&layer.policy(KeyPolicy::exempt())) {
                runs_always(&app, "/api/plain").await;
                for prefix in PREFIXES {
                    runs_always(&app, &format!("{prefix}/exempt")).await;
                    let required = format!("{prefix}/required");
                    for key in [None, Some("key")] {
                        let parts = ["::create_order", "Required", NO_LAYER, "cure="];
                        refusals.expect(&app, &required, key, &parts).await;
                    }
                }
            }
        }
    }

    #[tokio::test]
    async fn no_handler_is_asked() {
        let app = routes().layer(enforce().policy(KeyPolicy::required()));
        for path in ["/plain", "/exempt", "/optional", "/required", "/cached"] {
            assert_eq!(code(&app, path, None).await, 400, "{path}");
        }
    }

    #[tokio::test]
    async fn with_an_unknown_cache_is_a_misuse_of_the_layer() {
        let (logs, _guard) = Logs::install();
        let policy = KeyPolicy::required().cache_name("payments");
        let app = Router::new().nest("/api", routes());
        let app = app.layer(enforce().policy(policy));
        Refusals(logs)
            .expect(
                &app,
                "/api/plain",
                Some("key"),
                &["the layer", "\"payments\"", "orders"],
            )
            .await;
    }
}

/// Whether the operation that the answer names has a record in this engine.
async fn is_recorded(engine: &idempotency_axum::Engine, answer: &Answer) -> bool {
    let (_, encoded) = answer.text().split_once(' ').expect("a run and its key");
    let encoded: EncodedKey = encoded.parse().expect("the handler saw its key");
    let entry = engine.get(&encoded).await.expect("memory does not fail");
    matches!(entry, Some(Entry::Completed(_)))
}

/// Asks twice without a key: what the first request shows, the second one meets.
async fn trips(app: &Router, path: &str, handler: &str) {
    let (logs, _guard) = Logs::install();
    assert_eq!(code(app, path, None).await, 200, "{path}");
    let errors = logs.with(&["ERROR"]);
    let [error] = &errors[..] else {
        panic!("not one error for {path} but {errors:?}");
    };
    for part in [handler, path, "cure=", ".policy(", "default policy"] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    assert_eq!(code(app, path, None).await, 400, "{path}");
    is_protected(app, path).await;
    assert_eq!(logs.with(&["ERROR"]).len(), 1, "said once");
}

mod route_service {
    use super::*;

    #[tokio::test]
    async fn the_one_handler_of_a_method_router_is_found() {
        for layer in [enforce(), exempt()] {
            let app = Router::new()
                .route_service("/exempt", routing::post(search.idempotency_exempt()))
                .route_service(
                    "/optional",
                    routing::post(comment.idempotency_key(optional())),
                )
                .route_service(
                    "/cached",
                    routing::post(cached_order.idempotency_key(cached())),
                )
                .layer(layer);
            runs_always(&app, "/exempt").await;
            assert_eq!(code(&app, "/optional", None).await, 200);
            is_protected(&app, "/optional").await;
            assert_eq!(code(&app, "/cached", None).await, 400);
            is_protected(&app, "/cached").await;
        }
    }

    #[tokio::test]
    async fn handlers_that_agree_are_found() {
        for layer in [enforce(), exempt()] {
            let methods = routing::post(search.idempotency_exempt()).put(run.idempotency_exempt());
            let app = Router::new().route_service("/order", methods).layer(layer);
            runs_always(&app, "/order").await;
            assert_eq!(ask(&app, Method::PUT, "/order", None).await.code(), 200);
        }
    }

    #[tokio::test]
    async fn where_handlers_differ_the_mode_s_default_is_applied() {
        let methods = || {
            routing::post(create_order.idempotency_key(KeyPolicy::required()))
                .delete(search.idempotency_exempt())
        };
        let app = Router::new().route_service("/order", methods());
        let app = app.layer(enforce());
        assert_eq!(code(&app, "/order", None).await, 400);
        is_protected(&app, "/order").await;
        let delete = ask(&app, Method::DELETE, "/order", None).await;
        assert_eq!(delete.code(), 400, "closed");

        let (logs, _guard) = Logs::install();
        let app = Router::new().route_service("/order", methods());
        let app = app.layer(exempt());
        let delete = ask(&app, Method::DELETE, "/order", None).await;
        assert_eq!(delete.code(), 200);
        Refusals(logs)
            .expect(
                &app,
                "/order",
                Some("key"),
                &["::create_order", "Required", NO_LAYER],
            )
            .await;
    }

    #[tokio::test]
    async fn where_handlers_differ_none_of_them_takes_the_layer_s_word_for_its_own_policy() {
        let (logs, _guard) = Logs::install();
        let refusals = Refusals(logs);
        for methods in [
            routing::post(comment.idempotency_key(optional())).delete(search.idempotency_exempt()),
            routing::post(attributes::comment).delete(attributes::search),
        ] {
            let app = Router::new().route_service("/comment", methods);
            let app = app.layer(exempt());
            for key in [None, Some("key")] {
                let parts = ["::comment", "Optional", NO_LAYER, "cure="];
                refusals.expect(&app, "/comment", key, &parts).await;
            }
        }
    }

    #[tokio::test]
    async fn the_policy_of_another_method_is_not_trusted_twice() {
        for (methods, announced) in [
            (
                routing::post(run).delete(search.idempotency_exempt()),
                "::search",
            ),
            (routing::post(run).delete(attributes::search), "::search"),
            (routing::post(run).delete(attributes::comment), "::comment"),
        ] {
            let app = Router::new().route_service("/order", methods);
            let app = app.layer(enforce());
            let delete = async || ask(&app, Method::DELETE, "/order", None).await.code();
            assert_eq!(delete().await, 200);
            trips(&app, "/order", announced).await;
            assert_eq!(delete().await, 200, "it has answered");
        }
    }
}

/// A service that has a handler beside what answers.
#[derive(Clone)]
struct Beside<S, H> {
    service: S,
    _held: H,
}

impl<S: Service<Request>, H> Service<Request> for Beside<S, H> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> S::Future {
        self.service.call(request)
    }
}

/// A router behind the wall has many routes, and one that answers does not speak for the others.
#[tokio::test]
async fn a_handler_behind_a_wall_vouches_for_no_other() {
    let (logs, _guard) = Logs::install();
    let service = |routes: Router| Beside {
        service: routes,
        _held: search.idempotency_exempt(),
    };
    let whole = Router::new().nest("/api", routes());
    for app in [
        Router::new().nest_service("/api", service(routes())),
        Router::new().route_service("/{*path}", service(whole.clone())),
        Router::new().fallback_service(service(whole)),
    ] {
        let app = app.layer(enforce());
        assert_eq!(code(&app, "/api/exempt", None).await, 200);
        assert_eq!(code(&app, "/api/plain", None).await, 400);
        is_protected(&app, "/api/plain").await;
        post(&app, "/api/exempt", Some("key")).await;
        assert_eq!(code(&app, "/api/plain", None).await, 400);
    }
    assert_eq!(logs.with(&["ERROR", "default policy"]).len(), 3);
}

/// Something that a handler's clone clones too.
#[derive(Clone)]
struct Held<H>(#[allow(dead_code, reason = "it is there to be cloned")] H);

mod what_a_handler_holds {
    use super::*;

    /// A closure that holds a handler and never calls it.
    fn holding<H: Clone + Send + Sync + 'static>(handler: H) -> MethodRouter {
        let held = Held(handler);
        routing::post(move |key: Option<IdempotencyKey>| {
            let _held = &held;
            run(key)
        })
    }

    #[tokio::test]
    async fn a_closure() {
        for (methods, held) in [
            (holding(search.idempotency_exempt()), "::search"),
            (holding(comment.idempotency_key(optional())), "::comment"),
            (holding(attributes::search), "::search"),
            (holding(attributes::comment), "::comment"),
        ] {
            let app = Router::new().route("/order", methods);
            trips(&app.layer(enforce()), "/order", held).await;
        }
    }

    #[tokio::test]
    async fn a_state_and_only_the_routes_that_did_not_acknowledge() {
        let routes = || {
            Router::new()
                .route("/a", routing::post(run))
                .route("/b", routing::post(run))
                .route("/search", routing::post(search.idempotency_exempt()))
        };
        let held = || Held(search.idempotency_exempt());
        for app in [
            routes().with_state(held()).layer(enforce()),
            routes().layer(enforce()).with_state(held()),
        ] {
            runs_always(&app, "/search").await;
            trips(&app, "/a", "::search").await;
            runs_always(&app, "/search").await;
            trips(&app, "/b", "::search").await;
            runs_always(&app, "/search").await;
        }
    }

    #[tokio::test]
    async fn a_connection_later_it_is_still_known() {
        let methods = holding(search.idempotency_exempt());
        let app: Router = Router::new().route("/order", methods).layer(enforce());
        // As `axum::serve` does for each connection.
        let connection = || app.clone().with_state::<()>(());
        trips(&connection(), "/order", "::search").await;
        assert_eq!(code(&connection(), "/order", None).await, 400);
    }

    #[tokio::test]
    async fn a_stricter_policy_is_applied_as_it_is() {
        let methods = holding(attributes::create_order);
        let app = Router::new().route("/order", methods).layer(exempt());
        assert_eq!(code(&app, "/order", None).await, 400, "closed");
        is_protected(&app, "/order").await;
    }

    #[tokio::test]
    async fn a_handler_that_differs_from_what_its_state_holds_is_not_exempt() {
        let app = Router::new()
            .route(
                "/order",
                routing::post(run.idempotency_key(KeyPolicy::required())),
            )
            .with_state(Held(search.idempotency_exempt()))
            .layer(enforce());
        assert_eq!(code(&app, "/order", None).await, 400);
        is_protected(&app, "/order").await;
    }

    #[tokio::test]
    async fn a_closure_that_calls_what_it_holds_acknowledges() {
        let (logs, _guard) = Logs::install();
        let held = search.idempotency_exempt();
        let closure = move |request: Request| held.clone().call(request, ());
        let app = Router::new().route("/search", routing::post(closure));
        runs_always(&app.layer(enforce()), "/search").await;
        assert_eq!(logs.with(&["ERROR"]), [""; 0]);
    }
}

/// Handlers that may run without a key, on the paths [`LENIENT`], behind a middleware that answers with `status` unless it is 200.
fn behind_a_middleware(status: &Arc<AtomicU16>) -> Router {
    Router::new()
        .route("/exempt", routing::post(search.idempotency_exempt()))
        .route(
            "/optional",
            routing::post(comment.idempotency_key(optional())),
        )
        .route("/attribute/exempt", routing::post(attributes::search))
        .route("/attribute/optional", routing::post(attributes::comment))
        .fallback(search.idempotency_exempt())
        .layer(middleware::from_fn_with_state(status.clone(), answer_with))
}

const LENIENT: [&str; 5] = [
    "/exempt",
    "/optional",
    "/attribute/exempt",
    "/attribute/optional",
    "/fallback",
];

#[tokio::test]
async fn an_error_of_a_middleware_is_no_other_handler_s_answer() {
    let (logs, _guard) = Logs::install();
    for refusal in [303, 400, 401, 403, 429, 499, 500, 503, 599] {
        let status = Arc::new(AtomicU16::new(refusal));
        let app = behind_a_middleware(&status).layer(enforce());
        for path in LENIENT {
            status.store(refusal, Ordering::Relaxed);
            assert_eq!(code(&app, path, None).await, refusal);
            status.store(200, Ordering::Relaxed);
            assert_eq!(code(&app, path, None).await, 200, "after {refusal}");
        }
    }
    assert_eq!(logs.with(&["ERROR"]), [""; 0]);
}

#[tokio::test]
async fn after_its_first_answer_a_middleware_turns_nothing_off() {
    let (logs, _guard) = Logs::install();
    let status = Arc::new(AtomicU16::new(200));
    let app = behind_a_middleware(&status).layer(enforce());
    for path in LENIENT {
        assert_eq!(code(&app, path, None).await, 200, "{path}");
        status.store(204, Ordering::Relaxed);
        assert_eq!(code(&app, path, None).await, 204, "{path}");
        status.store(200, Ordering::Relaxed);
        assert_eq!(code(&app, path, None).await, 200, "{path}");
    }
    assert_eq!(logs.with(&["ERROR"]), [""; 0]);
}

/// An answer to a request with a key says as much about who answers.
#[tokio::test]
async fn an_answer_to_a_request_with_a_key_counts_too() {
    let (logs, _guard) = Logs::install();
    let status = Arc::new(AtomicU16::new(200));
    let app = behind_a_middleware(&status).layer(enforce());
    for path in ["/optional", "/attribute/optional"] {
        is_protected(&app, path).await;
        status.store(204, Ordering::Relaxed);
        assert_eq!(code(&app, path, None).await, 204, "{path}");
        status.store(200, Ordering::Relaxed);
        assert_eq!(code(&app, path, None).await, 200, "{path}");
    }
    assert_eq!(logs.with(&["ERROR"]), [""; 0]);
}

#[tokio::test]
async fn before_its_first_answer_a_middleware_makes_it_fall_back() {
    let (logs, _guard) = Logs::install();
    for (errors, path) in (1..).zip(LENIENT) {
        let status = Arc::new(AtomicU16::new(204));
        let app = behind_a_middleware(&status).layer(enforce());
        for expected in [204, 400, 400] {
            assert_eq!(code(&app, path, None).await, expected, "{path}");
        }
        let lines = logs.with(&["ERROR"]);
        assert_eq!(lines.len(), errors, "said once");
        for part in ["handler=", "method=POST", "cure=", "default policy"] {
            assert!(lines[errors - 1].contains(part), "no {part:?} in {lines:?}");
        }
        if path != "/fallback" {
            assert!(lines[errors - 1].contains(path), "{lines:?}");
        }
        // What comes with a key is let through, and the handler can show itself. An exempt one runs as always.
        status.store(200, Ordering::Relaxed);
        let first = post(&app, path, Some("key")).await;
        assert_eq!(first.code(), 200, "{path}");
        let retry = post(&app, path, Some("key")).await;
        assert_eq!(retry.is_replay(), path.ends_with("optional"), "{path}");
        assert_eq!(
            first.text().ends_with("unprotected"),
            !path.ends_with("optional")
        );
        assert_eq!(code(&app, path, None).await, 200, "{path}");
    }
}

#[tokio::test]
async fn a_fall_back_is_of_one_method() {
    let status = Arc::new(AtomicU16::new(204));
    let methods = routing::post(attributes::search).put(attributes::search);
    let app = Router::new()
        .route("/search", methods)
        .layer(middleware::from_fn_with_state(status.clone(), answer_with))
        .layer(enforce());
    assert_eq!(code(&app, "/search", None).await, 204);
    status.store(200, Ordering::Relaxed);
    assert_eq!(code(&app, "/search", None).await, 400);
    for _ in 0..2 {
        let put = ask(&app, Method::PUT, "/search", None).await;
        assert_eq!(put.code(), 200);
    }
    assert_eq!(
        code(&app, "/search", None).await,
        400,
        "of the other method"
    );
}

/// Answers with the status in the state, or lets the request pass if it is 200.
async fn answer_with(
    State(status): State<Arc<AtomicU16>>,
    request: Request,
    next: Next,
) -> Response {
    match StatusCode::from_u16(status.load(Ordering::Relaxed)) {
        Ok(StatusCode::OK) | Err(_) => next.run(request).await,
        Ok(refusal) => refusal.into_response(),
    }
}

#[tokio::test]
async fn an_error_of_the_handler_itself_is_its_own_answer() {
    let failing = (async || StatusCode::INTERNAL_SERVER_ERROR).idempotency_exempt();
    let created = (async || StatusCode::NO_CONTENT).idempotency_exempt();
    let app = Router::new()
        .route("/failing", routing::post(failing))
        .route("/created", routing::post(created))
        .layer(enforce());
    for _ in 0..3 {
        assert_eq!(code(&app, "/failing", None).await, 500);
        assert_eq!(code(&app, "/created", None).await, 204);
    }
}
