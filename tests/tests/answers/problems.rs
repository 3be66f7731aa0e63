//! What a refusal looks like, and how a client tells one from another.

use std::collections::HashSet;

use axum::{
    Json,
    http::StatusCode,
    middleware::map_response,
    response::{IntoResponse, Response},
    routing::post,
};
use idempotency_axum::{
    Config, IdempotencyLayer, MemoryStorage, Operation, Problem, Refusal, Scope,
};
use idempotency_tests::{Answer, Fault, FaultyStorage, Server};
use serde_json::{Value, json};

use crate::{Column, Shop, assert_ran, impatient};

columns!(every_kind_of_problem, the_three_meanings_of_409);

const KEY: &str = "the-secret-key-of-the-client";

/// An answer of every kind.
async fn every_refusal(config: Config) -> Vec<(Refusal, Answer)> {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let config = config.lock(impatient()).max_running(1).max_request_body(8);
    let shop = Shop::on(storage.clone(), config.clone()).await;
    let call = |path| shop.server.post(path).key(KEY).body("x");
    let mut refusals = Vec::new();

    let missing = shop.server.post("/orders").send().await;
    refusals.push((Refusal::MissingKey, missing));
    let invalid = call("/orders").key(KEY).send().await;
    refusals.push((Refusal::InvalidKey, invalid));
    let too_large = call("/orders").body("123456789").send().await;
    refusals.push((Refusal::BodyTooLarge, too_large));
    let broken = format!(
        "POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key: {KEY}\r\n\
         transfer-encoding: chunked\r\n\r\nno length\r\n"
    );
    let unreadable = shop.server.raw(broken).await;
    refusals.push((Refusal::BodyUnreadable, unreadable));

    let running = call("/gated").start();
    shop.work.gate.arrived(1).await;
    refusals.push((Refusal::InFlight, call("/gated").send().await));
    // `Config::default` knows no reuse of a key.
    if call("/gated").body("y").send().await.code() != 503 {
        let reused = call("/gated").body("y").send().await;
        refusals.push((Refusal::KeyReused, reused));
    }
    let other = shop.server.post("/orders").key("other").send().await;
    refusals.push((Refusal::Overloaded, other));
    shop.work.gate.open(1);
    assert_ran(&running.await.unwrap(), 1);

    storage.set(Operation::Begin, Fault::FailBefore);
    let unavailable = call("/orders").send().await;
    refusals.push((Refusal::StorageUnavailable, unavailable));

    let scoped = Shop::open(config.clone().scope(Scope::authorization().required())).await;
    let unscoped = scoped.server.post("/orders").key(KEY).send().await;
    refusals.push((Refusal::ScopeRequired, unscoped));

    let small = Shop::open(config.max_response_body(0)).await;
    assert_ran(&small.server.post("/orders").key(KEY).send().await, 1);
    let tombstone = small.server.post("/orders").key(KEY).send().await;
    refusals.push((Refusal::NotReplayable, tombstone));
    refusals
}

async fn every_kind_of_problem(column: Column) {
    let refusals = every_refusal(column.config()).await;
    assert_eq!(refusals.len(), column.pick(9, 10, 10));
    let mut types = HashSet::new();
    let mut titles = HashSet::new();
    for (refusal, answer) in &refusals {
        let (status, retry_after) = match refusal {
            Refusal::MissingKey | Refusal::InvalidKey => (400, None),
            Refusal::InFlight => (column.pick(423, 409, 409), Some("1")),
            Refusal::KeyReused => (column.pick(0, 422, 400), None),
            Refusal::NotReplayable => (409, None),
            Refusal::BodyTooLarge => (413, None),
            Refusal::BodyUnreadable => (400, None),
            Refusal::ScopeRequired => (403, None),
            Refusal::StorageUnavailable | Refusal::Overloaded => (503, Some("1")),
            other => panic!("a kind that the table does not know: {other}"),
        };
        assert_eq!(answer.code(), status, "{refusal}: {answer:?}");
        assert_eq!(answer.header("retry-after"), retry_after, "{refusal}");
        assert_eq!(answer.header(column.replay_header()), None, "{refusal}");
        assert_eq!(answer.header("link"), None, "{refusal}");
        let media_type = Some("application/problem+json");
        assert_eq!(answer.header("content-type"), media_type, "{refusal}");

        let problem: Value = serde_json::from_slice(&answer.body).unwrap();
        let fields: HashSet<&str> = problem
            .as_object()
            .unwrap()
            .keys()
            .map(|key| &**key)
            .collect();
        assert_eq!(fields, HashSet::from(["type", "title", "status", "detail"]));
        assert_eq!(problem["status"], status);
        let type_uri = problem["type"].as_str().unwrap();
        // Clients compare it as a whole, so it must not change.
        let fixed = "https://docs.rs/idempotency-axum/latest/idempotency_axum/problem/";
        assert_eq!(type_uri, format!("{fixed}#{refusal}"));
        assert!(
            types.insert(type_uri.to_owned()),
            "{type_uri} is not the only one"
        );
        let title = problem["title"].as_str().unwrap();
        assert!(
            titles.insert(title.to_owned()),
            "{title:?} is not the only one"
        );
        assert!(!problem["detail"].as_str().unwrap().is_empty());
        assert!(
            !answer.text().contains(KEY),
            "the key is shown: {}",
            answer.text()
        );
    }
}

/// The type is the same for every problem of the kind, whatever its detail.
#[tokio::test]
async fn one_type_per_kind() {
    let shop = Shop::open(Config::default()).await;
    let mut types = HashSet::new();
    let mut details = HashSet::new();
    for key in ["", "a,b", "\"a"] {
        let answer = shop.server.post("/orders").key(key).send().await;
        let problem: Value = serde_json::from_slice(&answer.body).unwrap();
        types.insert(problem["type"].to_string());
        details.insert(problem["detail"].to_string());
    }
    assert_eq!((types.len(), details.len()), (1, 3));
}

/// A conflict of each meaning, told apart as the document says.
async fn the_three_meanings_of_409(column: Column) {
    let meaning = |answer: &Answer| {
        assert_eq!(answer.code(), 409, "{answer:?}");
        let replayed = column.is_replay(answer);
        let retry_after = answer.header("retry-after").is_some();
        match (replayed, answer.problem().as_deref(), retry_after) {
            (true, None, false) => "replay",
            (false, Some("in-flight"), true) => "in-flight",
            (false, Some("not-replayable"), false) => "not-replayable",
            _ => panic!("ambiguous: {answer:?}"),
        }
    };
    let config = column
        .config()
        .lock(impatient())
        .conflict_status(Some(StatusCode::CONFLICT))
        .in_flight_status(StatusCode::CONFLICT);
    let shop = Shop::open(config.clone()).await;
    let call = || shop.server.post("/gated").key("abc");
    let first = call().start();
    shop.work.gate.arrived(1).await;
    assert_eq!(meaning(&call().send().await), "in-flight");
    shop.work.gate.open(1);
    assert_ran(&first.await.unwrap(), 1);
    assert_eq!(meaning(&call().send().await), "replay");

    let small = Shop::open(config.max_response_body(0)).await;
    let call = || small.server.post("/orders").key("abc");
    assert_ran(&call().send().await, 1);
    assert_eq!(meaning(&call().send().await), "not-replayable");
}

#[tokio::test]
async fn documentation_link() {
    let config = Config::ietf().documentation("https://shop.example/docs/idempotency?v=1#keys");
    for (refusal, answer) in every_refusal(config).await {
        let link = "<https://shop.example/docs/idempotency?v=1#keys>; rel=\"describedby\"";
        assert_eq!(answer.header("link"), Some(link), "{refusal}");
    }
}

#[tokio::test]
async fn documentation_link_is_on_refusals_only() {
    let shop = Shop::open(Config::default().documentation("https://shop.example/")).await;
    let call = || shop.server.post("/orders").key("abc");
    for _ in 0..2 {
        assert_eq!(call().send().await.header("link"), None);
    }
}

#[tokio::test]
async fn documentation_url_cannot_break_out_of_its_header() {
    let config = Config::default().documentation("https://shop.example/a b>\r\nx: \"é\"");
    let shop = Shop::open(config).await;
    let answer = shop.server.post("/orders").send().await;
    let link = "<https://shop.example/a%20b%3E%0D%0Ax:%20%22%C3%A9%22>; rel=\"describedby\"";
    assert_eq!(answer.header("link"), Some(link));
    assert_eq!(answer.header("x"), None);
}

async fn server(layer: IdempotencyLayer) -> Server {
    let orders = post(|| async { StatusCode::CREATED });
    Server::start(axum::Router::new().route("/orders", orders).layer(layer)).await
}

#[tokio::test]
async fn problem_response_replaces_the_format() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let layer = IdempotencyLayer::enforce(storage.clone())
        .config(Config::default().documentation("https://shop.example/docs"))
        .problem_response(|problem| {
            let error = json!({
                "error": problem.refusal().as_str(),
                "message": problem.detail(),
                "retry": problem.retry_after(),
            });
            (problem.status(), [("x-error", "1")], Json(error)).into_response()
        });
    let server = server(layer).await;
    let answer = server.post("/orders").send().await;
    assert_eq!(answer.code(), 400);
    assert_eq!(answer.header("content-type"), Some("application/json"));
    assert_eq!(answer.header("x-error"), Some("1"));
    let error: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(
        (&error["error"], &error["retry"]),
        (&json!("missing-key"), &Value::Null)
    );
    assert_eq!(answer.header("retry-after"), None);
    let link = Some("<https://shop.example/docs>; rel=\"describedby\"");
    assert_eq!(answer.header("link"), link);

    storage.set(Operation::Begin, Fault::FailBefore);
    let answer = server.post("/orders").key("abc").send().await;
    assert_eq!(answer.code(), 503);
    let error: Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(
        (&error["error"], &error["retry"]),
        (&json!("storage-unavailable"), &json!(1))
    );
    // Added, since the answer had none.
    assert_eq!(answer.header("retry-after"), Some("1"));
}

#[tokio::test]
async fn problem_response_keeps_its_own_headers_and_status() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    storage.set(Operation::Begin, Fault::FailBefore);
    let layer = IdempotencyLayer::enforce(storage)
        .config(Config::default().documentation("https://shop.example/docs"))
        .problem_response(|_| {
            let headers = [("retry-after", "30"), ("link", "</help>; rel=\"help\"")];
            (StatusCode::BAD_GATEWAY, headers, "sorry").into_response()
        });
    let server = server(layer).await;
    let answer = server.post("/orders").key("abc").send().await;
    assert_eq!((answer.code(), answer.text()), (502, "sorry"));
    assert_eq!(answer.header("retry-after"), Some("30"));
    assert_eq!(answer.header("link"), Some("</help>; rel=\"help\""));
}

/// An outer layer can rely on the typed problem, not on the body.
#[tokio::test]
async fn the_typed_problem_is_in_the_extensions() {
    let note = |mut response: Response| async {
        let problem = response.extensions().get::<Problem>();
        let refusal = problem.map_or("none", |problem| problem.refusal().as_str());
        let refusal = axum::http::HeaderValue::from_static(refusal);
        response.headers_mut().insert("x-refusal", refusal);
        response
    };
    let plain = IdempotencyLayer::enforce(MemoryStorage::new());
    let own_format = plain
        .clone()
        .problem_response(|problem| problem.status().into_response());
    for layer in [plain, own_format] {
        let orders = post(|| async { StatusCode::CREATED });
        let router = axum::Router::new()
            .route("/orders", orders)
            .layer(layer)
            .layer(map_response(note));
        let server = Server::start(router).await;
        let refused = server.post("/orders").send().await;
        assert_eq!(refused.header("x-refusal"), Some("missing-key"));
        let fine = server.post("/orders").key("abc").send().await;
        assert_eq!(fine.header("x-refusal"), Some("none"));
    }
}
