//! What a handler says of its answer, and what an operator asks of a request.

use axum::{
    Extension, Json, Router,
    extract::State,
    http::{Request, StatusCode},
    response::{IntoResponse, Redirect, Response},
    routing::post,
};
use idempotency_axum::{
    Config, DoNotRecord, EncodedKeyError, Entry, IdempotencyHandler, IdempotencyLayer, KeyPolicy,
    ManualIdempotency, MemoryStorage, Scope, StoreOn, idempotency_key,
};
use idempotency_tests::{Logs, Runs, Server};

use crate::{assert_ran, enforce};

async fn in_a_tuple(State(runs): State<Runs>) -> impl IntoResponse {
    (
        StatusCode::CREATED,
        DoNotRecord,
        format!("order {}", runs.next()),
    )
}

async fn as_an_extension(State(runs): State<Runs>) -> impl IntoResponse {
    let order = format!("order {}", runs.next());
    (StatusCode::CREATED, Extension(DoNotRecord), order)
}

struct Failed(usize);

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let order = format!("order {}", self.0);
        (StatusCode::CREATED, DoNotRecord, order).into_response()
    }
}

#[idempotency_key]
async fn from_an_error(State(runs): State<Runs>) -> Result<Json<()>, Failed> {
    Err(Failed(runs.next()))
}

#[tokio::test]
async fn do_not_record_releases_the_key() {
    for config in [Config::default(), Config::ietf(), Config::stripe()] {
        let runs = Runs::new();
        let router = Router::new()
            .route("/tuple", post(in_a_tuple))
            .route("/extension", post(as_an_extension))
            .route("/error", post(from_an_error))
            .with_state(runs.clone())
            .layer(enforce().config(config.store_on(StoreOn::all())));
        let server = Server::start(router).await;
        for path in ["/tuple", "/extension", "/error"] {
            for _ in 0..2 {
                let run = runs.count() + 1;
                assert_ran(&server.post(path).key(path).send().await, run);
            }
        }
    }
}

#[tokio::test]
async fn do_not_record_alone_is_an_empty_answer() {
    let response = DoNotRecord.into_response();
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.extensions().get::<DoNotRecord>().is_some());
}

#[tokio::test]
async fn do_not_record_keeps_the_record_of_a_conflict() {
    async fn manual(manual: ManualIdempotency) -> Response {
        match manual.exists() {
            true => (StatusCode::OK, DoNotRecord, "not kept").into_response(),
            false => (StatusCode::CREATED, "order 1").into_response(),
        }
    }
    let layer = enforce();
    let handler = manual.idempotency_key(KeyPolicy::required().manual());
    let router = Router::new().route("/orders", post(handler));
    let server = Server::start(router.layer(layer.clone())).await;
    for expected in ["order 1", "not kept", "not kept"] {
        let answer = server.post("/orders").key("abc").send().await;
        assert_eq!(answer.text(), expected);
    }
    let (parts, ()) = Request::post("/orders")
        .header("idempotency-key", "abc")
        .body(())
        .unwrap()
        .into_parts();
    let key = layer.encoded_key(&parts, b"").unwrap();
    let Some(Entry::Completed(record)) = layer.engine().get(&key).await.unwrap() else {
        panic!("the record is gone");
    };
    assert!(format!("{record:?}").contains("201"), "{record:?}");
}

#[tokio::test]
async fn a_redirect_that_is_not_recorded_is_warned_of_once() {
    let (logs, _guard) = Logs::install();
    let runs = Runs::new();
    async fn form(State(runs): State<Runs>) -> Redirect {
        runs.next();
        Redirect::to("/done")
    }
    let router = Router::new()
        .route("/form", post(form))
        .with_state(runs.clone());
    let server = Server::start(router.clone().layer(enforce())).await;
    for run in 1..=3 {
        assert_eq!(server.post("/form").key("abc").send().await.code(), 303);
        assert_eq!(runs.count(), run);
    }
    let warned = logs.with(&["WARN", "/form", "StoreOn::below(400)"]);
    assert_eq!(warned.len(), 1, "{:?}", logs.lines());

    let config = Config::default().store_on(StoreOn::below(400));
    let server = Server::start(router.layer(enforce().config(config))).await;
    for _ in 0..2 {
        server.post("/form").key("abc").send().await;
        assert_eq!(runs.count(), 4);
    }
    assert_eq!(logs.with(&["WARN", "StoreOn::below(400)"]).len(), 1);
}

#[tokio::test]
async fn a_failure_replayed_as_a_success_is_warned_of_once() {
    let (logs, _guard) = Logs::install();
    async fn declined() -> StatusCode {
        StatusCode::PAYMENT_REQUIRED
    }
    let router = Router::new().route("/charges", post(declined));
    let config = Config::stripe().conflict_status(Some(StatusCode::OK));
    let server = Server::start(router.clone().layer(enforce().config(config))).await;
    for code in [402, 200, 200] {
        assert_eq!(server.post("/charges").key("abc").send().await.code(), code);
    }
    let warned = logs.with(&["WARN", "/charges", "402", "conflict_status(None)"]);
    assert_eq!(warned.len(), 1, "{:?}", logs.lines());

    let config = Config::stripe().conflict_status(Some(StatusCode::CONFLICT));
    let server = Server::start(router.layer(enforce().config(config))).await;
    for code in [402, 409] {
        assert_eq!(server.post("/charges").key("abc").send().await.code(), code);
    }
    assert_eq!(logs.with(&["WARN", "conflict_status(None)"]).len(), 1);
}

#[tokio::test]
async fn an_operator_finds_and_removes_a_record() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new())
        .config(Config::ietf().scope(Scope::header("x-tenant")));
    let runs = Runs::new();
    let scope = KeyPolicy::required().scope(Scope::header("x-shop"));
    let named = KeyPolicy::required().key_from(|_, body| {
        let body = std::str::from_utf8(body).ok()?;
        Some(body.trim_start_matches("id=").to_owned())
    });
    let inner = Router::new()
        .route("/plain", post(runs.handler()))
        .route("/shop", post(runs.handler().idempotency_key(scope.clone())))
        .route(
            "/named",
            post(runs.handler().idempotency_key(named.clone())),
        );
    let router = Router::new().nest("/api", inner).layer(layer.clone());
    let server = Server::start(router).await;
    for (path, policy) in [
        ("/api/plain?page=1", KeyPolicy::required()),
        ("/api/shop", scope),
        ("/api/named", named),
    ] {
        let call = || {
            server
                .post(path)
                .key("abc")
                .header("x-tenant", "one")
                .header("x-shop", "two")
                .body("id=7")
                .send()
        };
        assert_eq!(call().await.code(), 201);
        let run = runs.count();
        assert!(call().await.is_replay());
        let (parts, ()) = Request::post(path)
            .header("idempotency-key", "abc")
            .header("x-tenant", "one")
            .header("x-shop", "two")
            .body(())
            .unwrap()
            .into_parts();
        let key = layer.encoded_key_for(&policy, &parts, b"id=7").unwrap();
        assert!(layer.engine().remove(&key).await.unwrap(), "{path}");
        assert!(!call().await.is_replay());
        assert_eq!(runs.count(), run + 1);
    }
}

#[idempotency_key(header = "X-Delivery-Id", scope = Scope::none)]
async fn delivered() -> &'static str {
    "delivered"
}

#[tokio::test]
async fn the_policy_of_an_attribute_finds_its_key() {
    let layer = IdempotencyLayer::exempt(MemoryStorage::new()).config(Config::ietf());
    let router = Router::new().route("/hooks", post(delivered));
    let server = Server::start(router.layer(layer.clone())).await;
    let call = || server.post("/hooks").header("x-delivery-id", "72d3").send();
    assert_eq!(call().await.text(), "delivered");
    assert!(call().await.is_replay());
    let (parts, ()) = Request::post("/hooks")
        .header("x-delivery-id", "72d3")
        .body(())
        .unwrap()
        .into_parts();
    let policy = delivered.policy();
    let key = layer.encoded_key_for(&policy, &parts, b"").unwrap();
    assert!(layer.engine().remove(&key).await.unwrap());
    assert!(!call().await.is_replay());
}

#[tokio::test]
async fn a_request_without_key_or_caller_has_no_encoded_key() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let parts = |headers: &[(&str, &str)]| {
        let request = headers
            .iter()
            .fold(Request::post("/"), |request, (name, value)| {
                request.header(*name, *value)
            });
        request.body(()).unwrap().into_parts().0
    };
    let missing = layer.encoded_key(&parts(&[]), b"").unwrap_err();
    assert!(matches!(missing, EncodedKeyError::MissingKey));
    let invalid = parts(&[("idempotency-key", "a,b")]);
    let invalid = layer.encoded_key(&invalid, b"").unwrap_err();
    assert!(matches!(invalid, EncodedKeyError::InvalidKey(_)));
    let unknown = parts(&[("idempotency-key", "abc"), ("cookie", "a=b")]);
    let unknown = layer.encoded_key(&unknown, b"").unwrap_err();
    assert!(matches!(unknown, EncodedKeyError::UnknownCaller(_)));
}
