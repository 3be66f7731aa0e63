//! Two of ours on a route, and ours among others: what the order of layers means.

use std::time::Duration;

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    handler::Handler,
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing,
};
use http::{Method, StatusCode, header};
use idempotency_axum::{
    Config, EncodedKey, Entry, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy,
    MemoryStorage, Outcome, Scope,
};
use idempotency_tests::{Answer, Events, Gate, Logs, Runs};
use tower::{ServiceBuilder, ServiceExt};
use tower_http::{compression::CompressionLayer, timeout::TimeoutLayer};

use self::layers_support::{ask, post, run};

mod layers_support;

fn enforce() -> IdempotencyLayer {
    IdempotencyLayer::enforce(MemoryStorage::new())
}

fn exempt() -> IdempotencyLayer {
    IdempotencyLayer::exempt(MemoryStorage::new())
}

/// The record of the operation that an answer of [`run`] names.
async fn record(layer: &IdempotencyLayer, answer: &Answer) -> Option<Outcome> {
    let encoded = answer.text().split(' ').nth(1).expect("a run and its key");
    let encoded: EncodedKey = encoded.parse().expect("the handler saw its key");
    match layer.engine().get(&encoded).await.unwrap()? {
        Entry::Completed(record) => Some(record.outcome),
        other => panic!("not a record but {other:?}"),
    }
}

fn routes() -> Router {
    let optional = KeyPolicy::optional();
    Router::new()
        .route("/plain", routing::post(run))
        .route("/exempt", routing::post(run.idempotency_exempt()))
        .route("/optional", routing::post(run.idempotency_key(optional)))
        .route(
            "/required",
            routing::post(run.idempotency_key(KeyPolicy::required())),
        )
}

mod two_layers {
    use super::*;

    /// Only `decides` has a say on the routes under `prefix`; `is_enforced` is its mode.
    async fn is_decided_by(
        app: &Router,
        prefix: &str,
        decides: &IdempotencyLayer,
        other: &IdempotencyLayer,
        is_enforced: bool,
    ) {
        let code = async |path, key| post(app, &format!("{prefix}{path}"), key).await.code();
        assert_eq!(
            code("/plain", None).await,
            if is_enforced { 400 } else { 200 }
        );
        assert_eq!(code("/exempt", None).await, 200);
        assert_eq!(code("/exempt", Some("key")).await, 200);
        assert_eq!(code("/optional", None).await, 200);
        assert_eq!(code("/required", None).await, 400);
        for path in ["/optional", "/required"] {
            let path = format!("{prefix}{path}");
            let first = post(app, &path, Some("key")).await;
            let retry = post(app, &path, Some("key")).await;
            assert_eq!((first.code(), first.is_replay()), (200, false), "{path}");
            assert_eq!((retry.code(), retry.is_replay()), (409, true), "{path}");
            assert_eq!(first.body, retry.body, "{path}");
            assert!(record(decides, &first).await.is_some(), "{path}");
            assert!(record(other, &first).await.is_none(), "{path}");
        }
    }

    #[tokio::test]
    async fn the_one_nearest_the_handler_decides() {
        let (logs, _guard) = Logs::install();
        for (inner, outer, is_enforced) in [
            (enforce(), exempt(), true),
            (exempt(), enforce(), false),
            (enforce(), enforce(), true),
        ] {
            let app = routes().layer(inner.clone()).layer(outer.clone());
            is_decided_by(&app, "", &inner, &outer, is_enforced).await;
        }
        assert_eq!(logs.with(&["ERROR"]), [""; 0]);
    }

    #[tokio::test]
    async fn in_one_stack_with_others_in_between() {
        let (inner, outer) = (exempt(), enforce());
        let app = routes().layer(
            ServiceBuilder::new()
                .layer(outer.clone())
                .layer(CompressionLayer::new())
                .layer(inner.clone()),
        );
        is_decided_by(&app, "", &inner, &outer, false).await;
    }

    #[tokio::test]
    async fn the_same_layer_twice_takes_a_key_once() {
        let layer = enforce();
        let app = routes().layer(layer.clone()).layer(layer.clone());
        is_decided_by(&app, "", &layer, &exempt(), true).await;
    }

    /// What axum clones there is the inner layer, not a service that it has made, and a layer may also be held by a state.
    #[tokio::test]
    async fn one_on_a_handler_is_hidden_from_the_outer_one_and_the_stricter_mode_is_kept() {
        for (inner, outer) in [(exempt(), enforce()), (enforce(), exempt())] {
            let app = Router::new()
                .route("/plain", routing::post(run.layer(inner.clone())))
                .layer(outer.clone());
            assert_eq!(post(&app, "/plain", None).await.code(), 400);
            let first = post(&app, "/plain", Some("key")).await;
            let retry = post(&app, "/plain", Some("key")).await;
            assert_eq!((first.code(), retry.is_replay()), (200, true));
            assert_eq!(first.body, retry.body);
        }
    }

    #[tokio::test]
    async fn one_on_a_handler_with_a_policy_takes_the_key_once() {
        let (logs, _guard) = Logs::install();
        for (inner, outer) in [
            (exempt(), enforce()),
            (enforce(), exempt()),
            (enforce(), enforce()),
        ] {
            let optional = run.idempotency_key(KeyPolicy::optional());
            let exempt = run.idempotency_exempt();
            let app = Router::new()
                .route("/optional", routing::post(optional.layer(inner.clone())))
                .route("/exempt", routing::post(exempt.layer(inner.clone())))
                .layer(outer.clone());
            for key in [None, Some("key"), Some("key")] {
                assert_eq!(post(&app, "/exempt", key).await.code(), 200);
            }
            assert_eq!(post(&app, "/optional", None).await.code(), 200);
            let first = post(&app, "/optional", Some("key")).await;
            let retry = post(&app, "/optional", Some("key")).await;
            assert_eq!((first.code(), retry.is_replay()), (200, true));
            assert_eq!(first.body, retry.body);
            let records = [record(&inner, &first).await, record(&outer, &first).await];
            assert_eq!(records.iter().flatten().count(), 1);
        }
        assert_eq!(logs.with(&["ERROR"]), [""; 0]);
    }

    #[tokio::test]
    async fn the_outer_one_keeps_the_routes_that_have_no_other() {
        let (inner, outer) = (exempt(), enforce());
        let app = Router::new()
            .nest("/inner", routes().layer(inner.clone()))
            .nest("/outer", routes())
            .layer(outer.clone());
        is_decided_by(&app, "/inner", &inner, &outer, false).await;
        is_decided_by(&app, "/outer", &outer, &inner, true).await;
    }

    #[tokio::test]
    async fn a_fixed_policy_inside_is_nearest_too() {
        let (inner, outer) = (enforce().policy(KeyPolicy::exempt()), enforce());
        let app = Router::new().route("/plain", routing::post(run));
        let app = app.layer(inner).layer(outer);
        assert_eq!(post(&app, "/plain", None).await.code(), 200);
    }

    #[tokio::test]
    async fn behind_a_wall_an_exempt_outer_one_leaves_all_to_the_inner_one() {
        let (logs, _guard) = Logs::install();
        let (inner, outer) = (enforce(), exempt());
        let app = Router::new()
            .nest_service("/api", routes().layer(inner.clone()))
            .layer(outer.clone());
        is_decided_by(&app, "/api", &inner, &outer, true).await;
        assert_eq!(logs.with(&["ERROR"]), [""; 0]);
    }

    #[tokio::test]
    async fn behind_a_wall_an_enforcing_outer_one_takes_the_key_and_the_inner_one_does_not() {
        for inner in [enforce(), exempt()] {
            let outer = enforce();
            let app = Router::new()
                .nest_service("/api", routes().layer(inner.clone()))
                .layer(outer.clone());
            // Closed, for what the outer one can't know to be more lenient.
            for path in ["/plain", "/exempt", "/optional", "/required"] {
                let refused = post(&app, &format!("/api{path}"), None).await;
                assert_eq!(refused.code(), 400, "{path}");
            }
            for path in ["/api/plain", "/api/optional", "/api/required"] {
                let first = post(&app, path, Some("key")).await;
                let retry = post(&app, path, Some("key")).await;
                assert_eq!((first.code(), first.is_replay()), (200, false), "{path}");
                assert_eq!((retry.code(), retry.is_replay()), (409, true), "{path}");
                assert_eq!(first.body, retry.body, "{path}");
                assert!(record(&outer, &first).await.is_some(), "{path}");
                assert!(record(&inner, &first).await.is_none(), "{path}");
            }
        }
    }
}

/// A route whose handler counts its runs and ends when the gate is opened.
fn gated(runs: &Runs, gate: &Gate) -> Router {
    let (runs, gate) = (runs.clone(), gate.clone());
    let handler = async move || {
        let run = runs.next();
        gate.enter().await;
        format!("order {run}")
    };
    Router::new().route("/order", routing::post(handler))
}

fn short_timeout() -> TimeoutLayer {
    TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, Duration::from_secs(1))
}

fn heard(events: &Events) -> IdempotencyLayer {
    enforce().config(Config::default().observer(events.clone()))
}

#[tokio::test(start_paused = true)]
async fn a_timeout_outside_leaves_the_operation_running() {
    let (runs, gate, events) = (Runs::new(), Gate::new(), Events::new());
    let layer = heard(&events);
    let app = gated(&runs, &gate)
        .layer(layer.clone())
        .layer(short_timeout());

    assert_eq!(post(&app, "/order", Some("key")).await.code(), 408);
    assert_eq!(events.count("adopted"), 1);
    assert_eq!((layer.engine().running(), events.count("released")), (1, 0));
    assert_eq!(
        post(&app, "/order", Some("key")).await.code(),
        423,
        "a retry does not start it again"
    );

    gate.open(1);
    layer.drain().await;
    let retry = post(&app, "/order", Some("key")).await;
    assert!(retry.is_replay());
    assert_eq!((retry.text(), runs.count()), ("order 1", 1));
}

#[tokio::test(start_paused = true)]
async fn a_timeout_inside_cancels_the_handler_and_releases_the_key() {
    let (runs, gate, events) = (Runs::new(), Gate::new(), Events::new());
    let layer = heard(&events);
    let app = gated(&runs, &gate)
        .layer(short_timeout())
        .layer(layer.clone());

    assert_eq!(post(&app, "/order", Some("key")).await.code(), 408);
    assert_eq!(events.count("adopted"), 0);
    assert_eq!((layer.engine().running(), events.count("released")), (0, 1));

    gate.open(1);
    let retry = post(&app, "/order", Some("key")).await;
    assert_eq!((retry.code(), retry.text()), (200, "order 2"));
    assert_eq!(runs.count(), 2, "the retry ran again");
}

async fn authenticated(request: Request, next: Next) -> Response {
    let is_known = request
        .headers()
        .get("x-session")
        .is_some_and(|session| session == "alice");
    match is_known {
        true => next.run(request).await,
        false => StatusCode::UNAUTHORIZED.into_response(),
    }
}

async fn order_of(app: &Router, session: &str) -> Answer {
    let request = Request::post("/plain")
        .header("idempotency-key", "key")
        .header("x-session", session)
        .body(Body::empty())
        .unwrap();
    let response = app.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: axum::body::to_bytes(body, usize::MAX).await.unwrap(),
    }
}

#[tokio::test]
async fn authentication_outside_guards_the_replays_too() {
    let events = Events::new();
    let layer = heard(&events);
    let app = routes()
        .layer(layer)
        .layer(middleware::from_fn(authenticated));
    assert_eq!(order_of(&app, "mallory").await.code(), 401);
    assert_eq!(events.count("executing"), 0, "nothing was claimed");
    let first = order_of(&app, "alice").await;
    assert_eq!(first.code(), 200);
    let stranger = order_of(&app, "mallory").await;
    assert_eq!((stranger.code(), stranger.text()), (401, ""));
    let retry = order_of(&app, "alice").await;
    assert!(retry.is_replay());
    assert_eq!(first.body, retry.body);
}

#[tokio::test]
async fn authentication_inside_does_not_see_a_replay() {
    let config = Config::default().scope(Scope::none());
    let app = routes()
        .layer(middleware::from_fn(authenticated))
        .layer(enforce().config(config));
    assert_eq!(order_of(&app, "mallory").await.code(), 401);
    let first = order_of(&app, "alice").await;
    assert_eq!(first.code(), 200, "the 401 was not recorded");
    let stranger = order_of(&app, "mallory").await;
    assert!(stranger.is_replay(), "why it belongs outside");
    assert_eq!(stranger.body, first.body);
}

/// An answer that is worth compressing.
async fn long(key: IdempotencyKey) -> String {
    format!("{} {}", run(Some(key)).await, "order ".repeat(100))
}

async fn long_order(app: &Router, accept: &str) -> Answer {
    let request = Request::post("/long")
        .header("idempotency-key", "key")
        .header(header::ACCEPT_ENCODING, accept)
        .body(Body::empty())
        .unwrap();
    let response = app.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: axum::body::to_bytes(body, usize::MAX).await.unwrap(),
    }
}

#[tokio::test]
async fn with_compression_outside_the_plain_answer_is_recorded_and_each_client_gets_its_encoding() {
    const GZIP: &[u8] = &[0x1f, 0x8b];
    let layer = enforce();
    let app = Router::new()
        .route("/long", routing::post(long))
        .layer(layer.clone())
        .layer(CompressionLayer::new());
    let first = long_order(&app, "gzip").await;
    assert_eq!((first.code(), first.is_replay()), (200, false));
    assert_eq!(first.header("content-encoding"), Some("gzip"));
    assert!(first.body.starts_with(GZIP));

    let plain = long_order(&app, "identity").await;
    assert!(plain.is_replay());
    assert_eq!(plain.header("content-encoding"), None);
    assert!(plain.text().ends_with("order order "));
    let Some(Outcome::Response(stored)) = record(&layer, &plain).await else {
        panic!("no answer is recorded");
    };
    assert_eq!(stored.body(), plain.text());
    assert!(!stored.headers().contains_key(header::CONTENT_ENCODING));

    let retry = long_order(&app, "gzip").await;
    assert!(retry.is_replay());
    assert_eq!(retry.header("content-encoding"), Some("gzip"));
    assert_eq!(retry.body, first.body);
}

/// Begins before the handler and commits after it.
async fn in_transaction(
    State((begun, committed)): State<(Runs, Runs)>,
    request: Request,
    next: Next,
) -> Response {
    begun.next();
    let response = next.run(request).await;
    committed.next();
    response
}

#[tokio::test]
async fn what_must_finish_with_the_operation_goes_inside() {
    let (runs, gate) = (Runs::new(), Gate::new());
    let (begun, committed) = (Runs::new(), Runs::new());
    let counts = (begun.clone(), committed.clone());
    let transaction = middleware::from_fn_with_state(counts, in_transaction);
    let layer = enforce();
    let app = gated(&runs, &gate).layer(transaction).layer(layer.clone());

    tokio::select! {
        answer = ask(&app, Method::POST, "/order", Some("key")) => panic!("{answer:?} before the gate opened"),
        () = gate.arrived(1) => {} // and the client leaves
    }
    assert_eq!(committed.count(), 0);

    gate.open(1);
    layer.drain().await;
    assert_eq!(begun.count(), 1);
    assert_eq!(committed.count(), 1, "though the client left");
    assert!(post(&app, "/order", Some("key")).await.is_replay());
}

/// The inner service is asked to be ready once it is known that the request goes there, and only then.
mod readiness {
    use std::{
        convert::Infallible,
        future::{Ready, ready},
        task::{Context, Poll, Waker},
    };

    use futures_util::FutureExt;
    use idempotency_axum::{Idempotency, LockPolicy, OnStorageError, Operation};
    use idempotency_tests::{Fault, FaultyStorage};
    use tower::{
        Layer, Service, limit::GlobalConcurrencyLimitLayer, service_fn, util::BoxCloneService,
    };

    use super::*;

    fn request(method: Method, key: Option<&str>) -> Request {
        let mut request = Request::builder().method(method).uri("/order");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        request.body(Body::empty()).unwrap()
    }

    fn post_with(key: &str) -> Request {
        request(Method::POST, Some(key))
    }

    /// Counts how often it is asked. An instance panics that is called without having said that it is ready, once for each call.
    #[derive(Default)]
    struct Strict {
        asked: Runs,
        is_ready: bool,
    }

    impl Clone for Strict {
        fn clone(&self) -> Self {
            Self {
                asked: self.asked.clone(),
                is_ready: false,
            }
        }
    }

    impl Service<Request> for Strict {
        type Response = Response;
        type Error = Infallible;
        type Future = Ready<Result<Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            self.asked.next();
            self.is_ready = true;
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request) -> Self::Future {
            assert!(std::mem::take(&mut self.is_ready), "it was not asked");
            ready(Ok(Response::default()))
        }
    }

    #[tokio::test]
    async fn replays_and_refusals_do_not_ask() {
        let strict = Strict::default();
        let layer = enforce()
            .config(Config::ietf())
            .policy(KeyPolicy::required());
        let mut service = layer.layer(strict.clone());
        for _ in 0..2 {
            for (request, status) in [
                (post_with("abc"), StatusCode::OK),
                (request(Method::POST, None), StatusCode::BAD_REQUEST),
                (post_with("a,b"), StatusCode::BAD_REQUEST),
                (
                    post_with("abc").map(|_| Body::from("other")),
                    StatusCode::UNPROCESSABLE_ENTITY,
                ),
            ] {
                // As one connection's service, which is never cloned.
                let service = ServiceExt::<Request>::ready(&mut service).await.unwrap();
                assert_eq!(service.call(request).await.unwrap().status(), status);
                assert_eq!(strict.asked.count(), 1);
            }
        }
    }

    #[tokio::test]
    async fn what_is_called_was_asked() {
        let faulty = FaultyStorage::new(MemoryStorage::new());
        let config = Config::default().on_storage_error(OnStorageError::RunUnprotected);
        let layer = IdempotencyLayer::enforce(faulty.clone()).config(config);
        let keyless =
            [Method::GET, Method::CONNECT, Method::POST].map(|method| request(method, None));
        let strict = Strict::default();
        let optional = layer.clone().policy(KeyPolicy::optional());
        let mut service = optional.layer(strict.clone());
        for (asked, request) in
            (1..).zip(keyless.into_iter().chain([post_with("a"), post_with("b")]))
        {
            if asked == 5 {
                faulty.set(Operation::Begin, Fault::FailBefore);
            }
            let response = service.call(request).await.unwrap();
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(strict.asked.count(), asked);
        }
    }

    /// One place, and a handler that counts its runs and holds the place until the gate is opened.
    fn one_at_a_time(
        layer: IdempotencyLayer,
        runs: &Runs,
        gate: &Gate,
    ) -> Idempotency<BoxCloneService<Request, Response, Infallible>> {
        let (runs, gate) = (runs.clone(), gate.clone());
        let handler = service_fn(move |_| {
            let (run, gate) = (runs.next(), gate.clone());
            async move {
                gate.enter().await;
                Ok(Response::new(Body::from(format!("order {run}"))))
            }
        });
        let limited = GlobalConcurrencyLimitLayer::new(1).layer(handler);
        layer.layer(BoxCloneService::new(limited))
    }

    fn poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        match future.poll_unpin(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    #[tokio::test]
    async fn what_is_passed_on_waits_for_its_place_in_turn() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let layer = enforce().policy(KeyPolicy::exempt());
        let mut service = one_at_a_time(layer, &runs, &gate);
        let mut first = Box::pin(service.call(request(Method::POST, None)));
        let mut second = Box::pin(service.call(request(Method::GET, None)));
        let third = Box::pin(service.call(request(Method::POST, None)));
        assert!(poll(&mut first).is_none() && poll(&mut second).is_none());
        assert_eq!(runs.count(), 1, "the second one waits");
        gate.open(3);
        // Each gives its place back to the next one.
        first.await.unwrap();
        second.await.unwrap();
        third.await.unwrap();
        assert_eq!(runs.count(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_operation_that_waits_for_its_place_holds_its_key() {
        let (runs, gate, events) = (Runs::new(), Gate::new(), Events::new());
        let lock = LockPolicy::default().timeout(Duration::ZERO);
        let config = Config::default().lock(lock).observer(events.clone());
        let layer = enforce().config(config).policy(KeyPolicy::required());
        let service = one_at_a_time(layer.clone(), &runs, &gate);
        let send = |key| service.clone().oneshot(post_with(key));
        let first = tokio::spawn(send("first"));
        gate.arrived(1).await;
        let waiting = tokio::spawn(send("waiting"));
        events.until("executing", 2).await;
        assert_eq!(send("waiting").await.unwrap().status(), StatusCode::LOCKED);

        // Its client leaves, and its lease would have ended ten times.
        waiting.abort();
        events.until("adopted", 1).await;
        tokio::time::advance(Duration::from_secs(300)).await;
        assert_eq!(send("waiting").await.unwrap().status(), StatusCode::LOCKED);
        assert_eq!((runs.count(), layer.engine().running()), (1, 2));

        gate.open(2);
        first.await.unwrap().unwrap();
        layer.drain().await;
        let retry = send("waiting").await.unwrap();
        assert_eq!(retry.headers()["idempotency-replayed"], "true");
        assert_eq!(runs.count(), 2);
    }

    /// Says that it can't go on.
    #[derive(Clone)]
    struct Broken;

    impl Service<Request> for Broken {
        type Response = Response;
        type Error = &'static str;
        type Future = Ready<Result<Response, &'static str>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), &'static str>> {
            Poll::Ready(Err("broken"))
        }

        fn call(&mut self, _: Request) -> Self::Future {
            panic!("it was not ready");
        }
    }

    #[tokio::test]
    async fn its_failure_is_passed_on_and_leaves_no_claim() {
        let layer = enforce().policy(KeyPolicy::required());
        let mut service = layer.layer(Broken);
        assert!(poll_ready(&mut service).is_some_and(|ready| ready.is_ok()));
        for request in [
            request(Method::GET, None),
            post_with("abc"),
            post_with("abc"),
        ] {
            assert_eq!(service.call(request).await.unwrap_err(), "broken");
            assert_eq!(layer.engine().running(), 0);
        }
    }

    fn poll_ready<S: Service<Request>>(service: &mut S) -> Option<Result<(), S::Error>> {
        match service.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(ready) => Some(ready),
            Poll::Pending => None,
        }
    }
}
