//! What the handler is given, and that its answer is what the client gets.

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use idempotency_axum::{
    Config, IdempotencyHandler, IdempotencyLayer, KeyPolicy, ManualIdempotency, MemoryStorage,
};
use idempotency_tests::{Runs, Server};

use crate::{Shop, assert_ran, saw};

#[tokio::test]
async fn the_first_run_has_no_conflict() {
    let shop = Shop::open().await;
    shop.assert_runs(1, "nothing").await;
    let other = shop.server.post("/orders").key("def").send().await;
    assert_ran(&other, 2, "nothing");
}

#[tokio::test]
async fn a_conflict_has_the_stored_answer() {
    let shop = Shop::open().await;
    shop.assert_runs(1, "nothing").await;
    shop.assert_runs(2, "201 run 1").await;
    assert_eq!(shop.events.count("replayed"), 0, "it was answered by a run");
}

/// Neither a conflict status nor a replay header is put on it.
#[tokio::test]
async fn the_answer_to_a_conflict_is_the_handlers() {
    for config in [Config::default(), Config::ietf(), Config::stripe()] {
        let shop = Shop::with(config).await;
        shop.assert_runs(1, "nothing").await;
        for status in ["200", "202", "303", "404", "409", "423", "500"] {
            let answer = shop.ask(status).send().await;
            assert_eq!(answer.code().to_string(), status);
            assert_eq!(answer.text(), format!("run {}", shop.runs()));
            for name in ["idempotency-replayed", "idempotent-replayed", "retry-after"] {
                assert_eq!(answer.header(name), None, "{status}");
            }
            assert_eq!(answer.problem(), None, "{status}");
        }
    }
}

/// A first answer with headers of all kinds; on a conflict what is stored, as it is.
async fn replays(State(runs): State<Runs>, manual: ManualIdempotency) -> Response {
    let run = runs.next();
    let Some(last) = manual.response() else {
        let headers = [
            ("location", "/orders/1"),
            ("etag", "\"1\""),
            ("content-type", "text/csv"),
            ("set-cookie", "session=1"),
            ("connection", "x-hop"),
            ("x-hop", "1"),
        ];
        return (StatusCode::CREATED, headers, format!("run {run}")).into_response();
    };
    let headers = last.headers();
    let mut names: Vec<_> = headers.keys().map(|name| name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["content-type", "etag", "location"], "run {run}");
    assert_eq!(
        (last.status(), &**last.body()),
        (StatusCode::CREATED, &b"run 1"[..])
    );
    last.into_response()
}

/// Under `ietf` a 201 is stored again each time, so what is replayed is also what was replayed before.
#[tokio::test]
async fn a_stored_answer_is_an_answer() {
    for config in [Config::default(), Config::ietf()] {
        let runs = Runs::new();
        let handler = replays.idempotency_key(KeyPolicy::required().manual());
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
        let router = Router::new()
            .route("/orders", post(handler))
            .layer(layer)
            .with_state(runs.clone());
        let server = Server::start(router).await;
        let call = || server.post("/orders").key("abc").send();
        let first = call().await;
        assert_eq!(first.header("set-cookie"), Some("session=1"));
        for _ in 0..3 {
            let retry = call().await;
            assert_eq!((retry.code(), retry.text()), (201, "run 1"));
            assert_eq!(retry.header("location"), Some("/orders/1"));
            assert_eq!(retry.header("etag"), Some("\"1\""));
            assert_eq!(retry.header("content-type"), Some("text/csv"));
            assert_eq!(retry.header("content-length"), Some("5"));
            assert_eq!(retry.header("set-cookie"), None);
        }
        assert_eq!(runs.count(), 4);
    }
}

#[tokio::test]
async fn a_stored_answer_can_have_another_status() {
    let shop = Shop::open().await;
    shop.assert_runs(1, "nothing").await;
    let retry = shop.ask("accepted").send().await;
    assert_eq!((retry.code(), retry.text()), (202, "run 1"));
    // And that is the last answer now.
    assert_eq!(shop.sees().await, "202 run 1");
}

/// It ran, and what it answered is not there.
#[tokio::test]
async fn a_tombstone_is_a_conflict_without_an_answer() {
    let shop = Shop::open().await;
    let first = shop.ask("large").send().await;
    assert_eq!((first.code(), saw(&first)), (200, "nothing"));
    assert_eq!(shop.sees().await, "no answer");
    assert_eq!(shop.sees().await, "no answer");
}

#[tokio::test]
async fn a_first_run_that_is_not_stored_is_no_conflict() {
    let shop = Shop::open().await;
    assert_eq!(shop.sees().await, "nothing");
    assert_eq!(shop.sees().await, "nothing");
    shop.assert_runs(3, "nothing").await;
    assert_eq!(shop.sees().await, "201 run 3");
}
