//! Where the key of a request is: in a header of the route's own, or in the body.

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderName, StatusCode, request::Parts},
    routing::post,
};
use idempotency_axum::{
    Config, Encoded, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, Key, KeyEncoder,
    KeyFormat, KeyOnlyEncoder, KeyPolicy, MemoryStorage, RequestView, Scope, idempotency_key,
};
use idempotency_tests::{Answer, Call, Logs, Runs, Server};

use crate::{
    Served, assert_ran, assert_refused, assert_replay, enforce, modes, rows::order, serve,
};

const DELIVERY: HeaderName = HeaderName::from_static("x-github-delivery");

fn by_header() -> KeyPolicy {
    KeyPolicy::required().header(DELIVERY)
}

#[tokio::test]
async fn the_key_is_in_a_header_of_the_route() {
    for layer in modes() {
        let served = serve(layer(), order.idempotency_key(by_header())).await;
        let call = |key| {
            served
                .server
                .post("/orders")
                .header("X-GitHub-Delivery", key)
        };
        assert_ran(&call("a").send().await, 1);
        assert_replay(&call("a").send().await, 1);
        assert_ran(&call("b").send().await, 2);
        assert_refused(&call("a,b").send().await, 400, "invalid-key");
    }
}

#[tokio::test]
async fn a_missing_header_of_the_route_is_named() {
    for layer in modes() {
        let served = serve(layer(), order.idempotency_key(by_header())).await;
        // The header of the configuration is not asked.
        for missing in [served.post(None).await, served.post(Some("a")).await] {
            assert_refused(&missing, 400, "missing-key");
            assert!(
                missing.text().contains("`x-github-delivery`"),
                "{}",
                missing.text()
            );
        }
        assert_eq!(served.runs.count(), 0);
    }
}

#[tokio::test]
async fn a_header_of_the_route_may_be_optional() {
    for layer in modes() {
        let policy = KeyPolicy::optional().header(DELIVERY);
        let served = serve(layer(), order.idempotency_key(policy)).await;
        assert_ran(&served.post(Some("a")).await, 1);
        assert_ran(&served.post(Some("a")).await, 2);
        let call = || {
            served
                .server
                .post("/orders")
                .header("x-github-delivery", "a")
        };
        assert_ran(&call().send().await, 3);
        assert_replay(&call().send().await, 3);
    }
}

#[idempotency_key(header = "X-GitHub-Delivery")]
async fn delivered(State(runs): State<Runs>, key: IdempotencyKey) -> (StatusCode, String) {
    assert_eq!(key.as_str(), "a");
    order(State(runs)).await
}

#[tokio::test]
async fn an_attribute_names_the_header() {
    for layer in modes() {
        let served = serve(layer(), delivered).await;
        let call = || {
            served
                .server
                .post("/orders")
                .header("x-github-delivery", "a")
        };
        assert_ran(&call().send().await, 1);
        assert_replay(&call().send().await, 1);
        let missing = served.post(Some("a")).await;
        assert_refused(&missing, 400, "missing-key");
        assert!(missing.text().contains("`x-github-delivery`"));
    }
}

#[tokio::test]
async fn other_routes_keep_the_header_of_the_configuration() {
    let config = Config::default().header(HeaderName::from_static("x-request-key"));
    let router = Router::new()
        .route("/usual", post(order))
        .route("/github", post(order.idempotency_key(by_header())))
        .layer(enforce().config(config))
        .with_state(Runs::new());
    let server = Server::start(router).await;
    let call = |path: &str, header: &str| server.post(path).header(header, "a").send();
    assert_ran(&call("/usual", "x-request-key").await, 1);
    assert_refused(
        &call("/usual", "x-github-delivery").await,
        400,
        "missing-key",
    );
    assert_ran(&call("/github", "x-github-delivery").await, 2);
    assert_refused(&call("/github", "x-request-key").await, 400, "missing-key");
}

/// The line of the body that starts with `id=`.
fn id(_: &Parts, body: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(body).ok()?;
    let id = text.lines().find_map(|line| line.strip_prefix("id="))?;
    Some(id.to_owned())
}

fn in_body() -> KeyPolicy {
    KeyPolicy::required().key_from(id)
}

/// What the handler reads of the body, and its key.
async fn event(
    State(runs): State<Runs>,
    parts: Parts,
    key: IdempotencyKey,
    body: Bytes,
) -> (StatusCode, String) {
    assert_eq!(id(&parts, &body).as_deref(), Some(key.as_str()));
    order(State(runs)).await
}

impl Served {
    fn event(&self, body: &'static str) -> Call {
        self.server.post("/orders").body(body)
    }

    async fn send_event(&self, body: &'static str) -> Answer {
        self.event(body).send().await
    }
}

#[tokio::test]
async fn the_key_is_in_the_body() {
    for layer in modes() {
        let served = serve(layer(), event.idempotency_key(in_body())).await;
        assert_ran(&served.send_event("id=a").await, 1);
        assert_replay(&served.send_event("id=a").await, 1);
        assert_ran(&served.send_event("id=b").await, 2);
        // A key in the header is not asked.
        assert_ran(&served.event("id=c").key("a").send().await, 3);
    }
}

#[tokio::test]
async fn a_key_in_the_body_is_that_of_a_header() {
    let layer = enforce().config(Config::default().encoder(KeyOnlyEncoder));
    let by_body = serve(layer.clone(), order.idempotency_key(in_body())).await;
    let by_header = serve(layer, order).await;
    assert_ran(&by_body.send_event("id=\"a\"").await, 1);
    assert_replay(&by_header.event("id=\"a\"").key("a").send().await, 1);
    assert_replay(&by_body.send_event("id=\"a\"").await, 1);
}

#[tokio::test]
async fn no_key_in_the_body_is_a_missing_key() {
    for layer in modes() {
        let served = serve(layer(), event.idempotency_key(in_body())).await;
        for body in ["", "name=a", "\u{0}"] {
            assert_refused(&served.send_event(body).await, 400, "missing-key");
        }
        let with_header = served.event("").key("a").send().await;
        assert_refused(&with_header, 400, "missing-key");
        assert!(
            !with_header.text().contains("idempotency-key`"),
            "no header is named"
        );
        assert_eq!(served.runs.count(), 0);
    }
}

#[tokio::test]
async fn an_invalid_key_in_the_body_is_refused() {
    let config = Config::default().key_format(KeyFormat::from_fn(|key| key.starts_with('a')));
    for policy in [in_body(), KeyPolicy::optional().key_from(id)] {
        let layer = enforce().config(config.clone());
        let served = serve(layer, event.idempotency_key(policy)).await;
        for body in ["id=", "id=a,b", "id=a\tb", "id=é", "id=b"] {
            assert_refused(&served.send_event(body).await, 400, "invalid-key");
        }
        assert_ran(&served.send_event("id=ab").await, 1);
    }
}

#[tokio::test]
async fn a_body_without_a_key_runs_where_that_may_be() {
    let handler = |State(runs): State<Runs>, key: Option<IdempotencyKey>, body: String| async move {
        assert_eq!(key.is_some(), body.starts_with("id="));
        order(State(runs)).await
    };
    let policy = KeyPolicy::optional().key_from(id);
    for layer in modes() {
        let served = serve(layer(), handler.idempotency_key(policy.clone())).await;
        assert_ran(&served.send_event("name=a").await, 1);
        assert_ran(&served.send_event("name=a").await, 2);
        assert_ran(&served.send_event("id=a").await, 3);
        assert_replay(&served.send_event("id=a").await, 3);

        let served = serve(layer().policy(policy.clone()), handler).await;
        assert_ran(&served.send_event("name=a").await, 1);
        assert_ran(&served.send_event("id=a").await, 2);
        assert_replay(&served.send_event("id=a").await, 2);
    }
}

/// The layer relies on the announced policy only as long as its handler answers.
#[tokio::test]
async fn a_handler_that_lets_bodies_without_a_key_through_is_acknowledged() {
    let (logs, _guard) = Logs::install();
    let policy = KeyPolicy::optional().key_from(id);
    let served = serve(enforce(), order.idempotency_key(policy)).await;
    assert_ran(&served.send_event("").await, 1);
    assert_ran(&served.send_event("").await, 2);
    assert!(logs.with(&["ERROR"]).is_empty(), "{:?}", logs.lines());
}

#[tokio::test]
async fn a_body_that_may_have_a_key_is_limited() {
    for policy in [in_body(), KeyPolicy::optional().key_from(id)] {
        let policy = policy.max_request_body(8);
        let served = serve(enforce(), order.idempotency_key(policy)).await;
        assert_refused(&served.send_event("id=123456").await, 413, "body-too-large");
        assert_refused(&served.send_event("123456789").await, 413, "body-too-large");
        assert_eq!(served.runs.count(), 0);
        assert_ran(&served.send_event("id=12345").await, 1);
    }
}

/// An encoder that does not read the body, and must not be given it.
#[derive(Debug)]
struct Bodiless;

impl KeyEncoder for Bodiless {
    fn encode(&self, key: &Key, request: &RequestView<'_>) -> Encoded {
        assert!(request.body.is_empty());
        KeyOnlyEncoder.encode(key, request)
    }

    fn reads_body(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn an_encoder_that_reads_no_body_gets_none() {
    let layer = enforce().config(Config::default().encoder(Bodiless));
    let served = serve(layer, event.idempotency_key(in_body())).await;
    assert_ran(&served.send_event("id=a\n1").await, 1);
    assert_replay(&served.send_event("id=a\n2").await, 1);
}

#[tokio::test]
async fn whose_key_it_is_matters_once_there_is_one() {
    let policy = KeyPolicy::optional().key_from(id);
    let policy = policy.scope(Scope::header("x-partner").required());
    let served = serve(enforce(), order.idempotency_key(policy)).await;
    assert_ran(&served.send_event("").await, 1);
    assert_refused(&served.send_event("id=a").await, 403, "scope-required");
    let call = |partner| served.event("id=a").header("x-partner", partner);
    assert_ran(&call("one").send().await, 2);
    assert_ran(&call("two").send().await, 3);
    assert_replay(&call("one").send().await, 2);
}

#[tokio::test]
async fn the_key_can_be_made_of_head_and_body() {
    let policy = KeyPolicy::required().key_from(|parts, body| {
        let source = parts.headers.get("x-source")?.to_str().ok()?;
        Some(format!("{source} {}", id(parts, body)?))
    });
    let served = serve(enforce(), order.idempotency_key(policy)).await;
    let call = |source| served.event("id=a").header("x-source", source);
    assert_ran(&call("one").send().await, 1);
    assert_ran(&call("two").send().await, 2);
    assert_replay(&call("one").send().await, 1);
    assert_refused(&served.send_event("id=a").await, 400, "missing-key");
}

/// Nothing was claimed, so the retry runs.
#[tokio::test]
async fn a_function_that_panics_leaves_nothing() {
    let policy = KeyPolicy::required().key_from(|parts, body| {
        assert!(!parts.headers.contains_key("x-panic"));
        id(parts, body)
    });
    let storage = MemoryStorage::new();
    let layer = IdempotencyLayer::enforce(storage.clone());
    let served = serve(layer.clone(), order.idempotency_key(policy)).await;
    let failed = served.event("id=a").header("x-panic", "").try_send().await;
    assert!(failed.is_err());
    assert_eq!((layer.engine().running(), storage.records()), (0, 0));
    assert_ran(&served.send_event("id=a").await, 1);
}

#[tokio::test]
async fn a_safe_method_is_not_asked_for_a_key_in_its_body() {
    let policy = KeyPolicy::required().key_from(|_, _| panic!("a safe method was asked"));
    let handler = |State(runs): State<Runs>, _: Body| order(State(runs));
    let served = serve(enforce(), handler.idempotency_key(policy)).await;
    assert_ran(&served.server.get("/orders").send().await, 1);
}
