//! Answers without a body, and answers that are not the end of their connection.

use axum::{
    Router,
    body::Body,
    extract::Request,
    response::{IntoResponse, Response},
    routing::post,
};
use http::StatusCode;
use hyper_util::rt::TokioIo;
use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage, StoreOn};
use idempotency_tests::{Events, Incoming, Length, Protocol, Runs, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{Play, impatient};

over_both!(
    an_empty_stream,
    an_empty_stream_that_takes_its_time,
    an_empty_stream_of_known_length,
    no_content,
    not_modified,
    reset_content,
);

async fn an_empty_stream(protocol: Protocol) {
    let stage = Play::default().open().await;
    stage.feed.end();
    let first = stage.call(protocol).send().await;
    assert_eq!((first.code(), first.text()), (200, ""));
    stage.assert_replays(protocol, b"").await;
}

async fn an_empty_stream_that_takes_its_time(protocol: Protocol) {
    let stage = Play::new(Config::default().lock(impatient())).open().await;
    let first = stage.call(protocol).open().await;
    stage.assert_in_flight(protocol).await;
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    stage.assert_replays(protocol, b"").await;
}

async fn an_empty_stream_of_known_length(protocol: Protocol) {
    let stage = Play::of_length(Length::Known(0)).open().await;
    let first = stage.call(protocol).send().await;
    assert_eq!((first.code(), first.text()), (200, ""));
    stage.assert_replays(protocol, b"").await;
}

async fn no_content(protocol: Protocol) {
    without_body(protocol, |body| {
        (StatusCode::NO_CONTENT, body).into_response()
    })
    .await;
}

async fn not_modified(protocol: Protocol) {
    without_body(protocol, |body| {
        (StatusCode::NOT_MODIFIED, body).into_response()
    })
    .await;
}

async fn reset_content(protocol: Protocol) {
    without_body(protocol, |body| {
        (StatusCode::RESET_CONTENT, body).into_response()
    })
    .await;
}

/// A status that has no body, of a handler that gives it a body which is empty, but does not say so.
async fn without_body(protocol: Protocol, head: fn(Body) -> Response) {
    let stage = Play::new(Config::ietf()).head(head).open().await;
    stage.feed.end();
    let first = stage.call(protocol).send().await;
    let retry = stage.call(protocol).send().await;
    assert_eq!(first.status, retry.status);
    assert_eq!((first.text(), retry.text()), ("", ""));
    assert_eq!((first.is_replay(), retry.is_replay()), (false, true));
    assert_eq!(stage.runs.count(), 1);
    assert_eq!(stage.events.count("completed"), 1);
}

/// Switches to a protocol that says everything twice.
async fn switching(runs: Runs, mut request: Request) -> Response {
    runs.next();
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        let Ok(upgraded) = upgrade.await else { return };
        let mut stream = TokioIo::new(upgraded);
        let mut word = [0; 4];
        if stream.read_exact(&mut word).await.is_ok() {
            let _ = stream.write_all(&word).await;
            let _ = stream.write_all(&word).await;
        }
    });
    let headers = [("connection", "upgrade"), ("upgrade", "twice")];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

async fn says_twice(answer: Incoming) {
    assert_eq!(answer.status, StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(answer.headers["upgrade"], "twice");
    assert!(!answer.headers.contains_key("idempotency-replayed"));
    let mut stream = TokioIo::new(answer.upgraded().await);
    stream.write_all(b"echo").await.unwrap();
    let mut twice = String::new();
    stream.read_to_string(&mut twice).await.unwrap();
    assert_eq!(twice, "echoecho");
}

/// There is nothing to record of a connection that is not HTTP any more, so a retry gets its own, whatever is stored.
#[tokio::test]
async fn switching_protocols_releases_the_key() {
    for store_on in [StoreOn::success(), StoreOn::all()] {
        let (runs, events) = (Runs::new(), Events::new());
        let config = Config::default().store_on(store_on).lock(impatient());
        let layer =
            IdempotencyLayer::enforce(MemoryStorage::new()).config(config.observer(events.clone()));
        let handler = {
            let runs = runs.clone();
            move |request: Request| switching(runs, request)
        };
        let router = Router::new().route("/switch", post(handler));
        let server = Server::start(router.layer(layer.clone())).await;
        let call = || {
            let call = server.post("/switch").key("abc").over(Protocol::Http1);
            call.header("connection", "upgrade")
                .header("upgrade", "twice")
        };
        // The first connection stays open while the second is made.
        let first = call().open().await;
        assert_eq!((events.count("released"), layer.engine().running()), (1, 0));
        says_twice(call().open().await).await;
        says_twice(first).await;
        assert_eq!(runs.count(), 2);
        assert_eq!(
            (events.count("completed"), events.count("tombstoned")),
            (0, 0)
        );
    }
}
