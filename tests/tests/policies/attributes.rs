//! The rows of the table, with the attributes.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{Method, StatusCode, request::Parts},
    response::IntoResponse,
    routing::post,
};
use idempotency_axum::{
    IdempotencyKey, ManualIdempotency, MemoryStorage, MisuseKind, Scope, StoreOn,
    idempotency_exempt, idempotency_key,
};
use idempotency_tests::{Logs, Runs, Server};

use crate::{assert_ran, assert_refused, assert_replay, enforce, modes, rows, serve, simulated};

#[idempotency_key]
async fn required(State(runs): State<Runs>) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn key() {
    for layer in modes() {
        serve(layer(), required).await.assert_required().await;
    }
}

#[idempotency_key(optional)]
async fn optional(State(runs): State<Runs>) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn key_optional() {
    for layer in modes() {
        serve(layer(), optional).await.assert_optional().await;
    }
}

#[idempotency_key(optional = false)]
async fn not_optional(State(runs): State<Runs>) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn key_not_optional() {
    for layer in modes() {
        serve(layer(), not_optional).await.assert_required().await;
    }
}

#[idempotency_exempt]
async fn never(State(runs): State<Runs>) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn exempt() {
    for layer in modes() {
        serve(layer(), never).await.assert_exempt().await;
    }
}

#[idempotency_key(cache_name = "orders")]
async fn cached(State(runs): State<Runs>) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn key_cache_name() {
    for layer in modes() {
        let orders = MemoryStorage::new();
        let layer = layer().cache("orders", orders.clone());
        serve(layer, cached).await.assert_required().await;
        assert_eq!(orders.records(), 1);
    }
}

#[tokio::test]
async fn key_unknown_cache_name() {
    for layer in modes() {
        let (logs, _guard) = Logs::install();
        let layer = layer();
        let router: Router = Router::new()
            .route("/orders", post(cached))
            .layer(layer.clone())
            .with_state(Runs::new());
        let misuse = layer.check(router.clone()).unwrap_err();
        let MisuseKind::UnknownCache { handler, cache, .. } = misuse.kind() else {
            panic!("{misuse:?}")
        };
        let handler = handler.as_deref();
        assert_eq!(handler, Some(concat!(module_path!(), "::cached")));
        assert_eq!(cache, "orders");

        let server = Server::start(router).await;
        assert_eq!(server.post("/orders").key("abc").send().await.code(), 500);
        assert!(!logs.with(&["ERROR", "cached", "orders"]).is_empty());
    }
}

#[idempotency_key(ttl = "1m")]
async fn short(State(runs): State<Runs>) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn key_ttl() {
    let (layer, _, clock) = simulated();
    let served = serve(layer, short).await;
    served.assert_required().await;
    clock.advance(Duration::from_secs(59));
    assert_replay(&served.post(Some("abc")).await, 1);
    clock.advance(Duration::from_secs(1));
    assert_ran(&served.post(Some("abc")).await, 2);
}

#[idempotency_key(optional, cache_name = "drafts", ttl = "90s")]
async fn everything(State(runs): State<Runs>) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn key_with_all_arguments() {
    let (layer, storage, clock) = simulated();
    let layer = layer.cache("drafts", storage.clone());
    let served = serve(layer, everything).await;
    served.assert_optional().await;
    assert_eq!(storage.records(), 1);
    clock.advance(Duration::from_secs(89));
    assert_replay(&served.post(Some("abc")).await, 3);
    clock.advance(Duration::from_secs(1));
    assert_ran(&served.post(Some("abc")).await, 5);
}

#[idempotency_key(max_request_body = "8B")]
async fn small(State(runs): State<Runs>, _body: String) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn key_max_request_body() {
    for layer in modes() {
        let served = serve(layer(), small).await;
        let call = |body: &'static str| served.server.post("/orders").key("abc").body(body);
        assert_refused(&call("123456789").send().await, 413, "body-too-large");
        assert_eq!(served.runs.count(), 0);
        assert_ran(&call("12345678").send().await, 1);
    }
}

/// How often the function of the attribute was called.
static STORE_ON_CALLS: AtomicUsize = AtomicUsize::new(0);

/// Equal only to its clones.
fn teapots() -> StoreOn {
    STORE_ON_CALLS.fetch_add(1, Ordering::Relaxed);
    StoreOn::from_fn(|status| status == StatusCode::IM_A_TEAPOT)
}

#[idempotency_key(store_on = teapots)]
async fn teapot(State(runs): State<Runs>) -> (StatusCode, String) {
    let (_, order) = rows::order(State(runs)).await;
    (StatusCode::IM_A_TEAPOT, order)
}

/// The layer and the handler ask the attribute for the policy each on its own, and must get the same.
#[tokio::test]
async fn key_store_on() {
    for layer in modes() {
        let served = serve(layer(), teapot).await;
        let first = served.post(Some("abc")).await;
        assert_eq!((first.code(), first.text()), (418, "order 1"));
        assert_replay(&served.post(Some("abc")).await, 1);
        assert_eq!(STORE_ON_CALLS.load(Ordering::Relaxed), 1);
    }
}

mod scopes {
    use super::{Parts, Scope};

    pub(super) fn partner() -> Scope {
        let partner = |parts: &Parts| Some(parts.headers.get("x-partner")?.as_bytes().to_vec());
        Scope::from_fn(partner).required()
    }
}

#[idempotency_key(scope = scopes::partner)]
async fn scoped(State(runs): State<Runs>) -> (StatusCode, String) {
    rows::order(State(runs)).await
}

#[tokio::test]
async fn key_scope() {
    for layer in modes() {
        let served = serve(layer(), scoped).await;
        assert_refused(&served.post(Some("abc")).await, 403, "scope-required");
        let call = |partner| {
            let call = served.server.post("/orders").key("abc");
            call.header("x-partner", partner)
        };
        assert_ran(&call("one").send().await, 1);
        assert_ran(&call("two").send().await, 2);
        assert_replay(&call("one").send().await, 1);
    }
}

/// The two clones of the handler announce the same policy.
#[tokio::test]
async fn one_policy_for_two_methods() {
    let served = Router::new()
        .route("/orders", post(teapot).put(teapot))
        .layer(enforce())
        .layer(enforce())
        .with_state(Runs::new());
    let server = Server::start(served).await;
    for call in [server.post("/orders"), server.call(Method::PUT, "/orders")] {
        assert_eq!(call.key("abc").send().await.code(), 418);
    }
}

#[idempotency_key]
async fn manual(state: State<Runs>, manual: ManualIdempotency) -> impl IntoResponse {
    rows::manual(state, manual).await
}

#[tokio::test]
async fn manual_idempotency() {
    for layer in modes() {
        let served = serve(layer(), manual).await;
        assert_refused(&served.post(None).await, 400, "missing-key");
        let first = served.post(Some("abc")).await;
        assert_eq!(
            (first.code(), first.text()),
            (201, "order 1, exists: false")
        );
        let retry = served.post(Some("abc")).await;
        assert_eq!(retry.code(), 409);
        let last = "201 Created text/plain; charset=utf-8 \"order 1, exists: false\"";
        assert_eq!(retry.text(), format!("run 2 after {last}"));
    }
}

#[idempotency_key]
async fn with_key(State(_): State<Runs>, key: IdempotencyKey) -> String {
    key.as_str().to_owned()
}

#[idempotency_key(optional)]
async fn with_key_if_any(State(_): State<Runs>, key: Option<IdempotencyKey>) -> String {
    key.map_or_else(|| "none".to_owned(), |key| key.as_str().to_owned())
}

#[idempotency_exempt]
async fn exempt_with_key_if_any(State(_): State<Runs>, key: Option<IdempotencyKey>) -> String {
    key.map_or_else(|| "none".to_owned(), |key| key.as_str().to_owned())
}

#[tokio::test]
async fn extractors() {
    for layer in modes() {
        let served = serve(layer(), with_key).await;
        assert_eq!(served.post(Some("\"abc\"")).await.text(), "abc");
        let served = serve(layer(), with_key_if_any).await;
        assert_eq!(served.post(None).await.text(), "none");
        assert_eq!(served.post(Some("abc")).await.text(), "abc");
        let served = serve(layer(), exempt_with_key_if_any).await;
        assert_eq!(served.post(Some("abc")).await.text(), "none");
    }
}

#[idempotency_key]
async fn with_everything(
    State(runs): State<Runs>,
    Path((shop, number)): Path<(String, u32)>,
    key: IdempotencyKey,
    Json(items): Json<Vec<String>>,
) -> Result<(StatusCode, String), StatusCode> {
    let run = runs.next();
    if items.is_empty() {
        return Err(StatusCode::UNPROCESSABLE_ENTITY);
    }
    let key = key.as_str();
    Ok((
        StatusCode::CREATED,
        format!("{run} {shop} {number} {key} {items:?}"),
    ))
}

#[tokio::test]
async fn with_state_path_key_and_json() {
    for layer in modes() {
        let runs = Runs::new();
        let router = Router::new()
            .route("/{shop}/{number}", post(with_everything))
            .layer(layer())
            .with_state(runs.clone());
        let server = Server::start(router).await;
        let call = |body: &'static str| server.post("/north/7").key("abc").json(body);
        // Not stored: neither runs count as the operation.
        assert_eq!(call("[]").send().await.code(), 422);
        assert_eq!(call("[]").send().await.code(), 422);
        assert_eq!(call("{}").send().await.code(), 422);
        assert_eq!(runs.count(), 2);
        let first = call(r#"["a"]"#).send().await;
        assert_eq!(
            (first.code(), first.text()),
            (201, r#"3 north 7 abc ["a"]"#)
        );
        let retry = call(r#"["a"]"#).send().await;
        assert!(retry.is_replay());
        assert_eq!(retry.text(), first.text());
    }
}

#[tokio::test]
async fn without_a_layer() {
    let (logs, _guard) = Logs::install();
    let runs = Runs::new();
    let router = Router::new()
        .route("/exempt", post(never).get(required))
        .route("/required", post(required))
        .route("/optional", post(optional))
        .route("/manual", post(manual))
        .route("/cached", post(cached))
        .with_state(runs.clone());
    let server = Server::start(router).await;
    for path in ["/required", "/optional", "/manual", "/cached"] {
        assert_eq!(server.post(path).send().await.code(), 500, "{path}");
        assert_eq!(
            server.post(path).key("abc").send().await.code(),
            500,
            "{path}"
        );
        let name = path.trim_start_matches('/');
        let name = format!("attributes::{name}");
        let errors = logs.with(&["ERROR", &name, "IdempotencyLayer"]);
        assert_eq!(errors.len(), 2, "{:?}", logs.lines());
    }
    assert_eq!(runs.count(), 0);
    assert_ran(&server.post("/exempt").key("abc").send().await, 1);
    assert_ran(&server.post("/exempt").key("abc").send().await, 2);
    // A safe method is never checked.
    assert_ran(&server.get("/exempt").send().await, 3);
}

#[tokio::test]
async fn invoke_needs_neither_request_nor_layer() {
    let runs = Runs::new();
    let (status, body) = required.invoke(State(runs.clone())).await;
    assert_eq!((status, &*body), (StatusCode::CREATED, "order 1"));
    assert_eq!(runs.count(), 1);
}
