//! An answer whose status is not stored frees its key at the head and is passed through.

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::StatusCode;
use idempotency_axum::{Config, MemoryStorage, Operation};
use idempotency_tests::{Fault, FaultyStorage, Protocol};

use crate::{Play, impatient};

over_both!(
    a_retry_runs_while_the_first_streams,
    it_may_be_as_large_as_it_likes,
    it_may_break,
    it_reads_no_further_than_its_client,
);

fn unavailable(body: Body) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

fn play() -> Play {
    Play::new(Config::default().lock(impatient()).max_response_body(8)).head(unavailable)
}

async fn a_retry_runs_while_the_first_streams(protocol: Protocol) {
    let stage = play().open().await;
    let mut first = stage.call(protocol).open().await;
    assert_eq!(stage.events.count("released"), 1, "before its head is sent");
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");

    let retry = stage.call(protocol).send().await;
    assert_eq!((retry.code(), retry.text()), (200, "run 2"));
    let retry = stage.call(protocol).send().await;
    assert!(retry.is_replay());
    assert_eq!(retry.text(), "run 2");

    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    // What the first client still gets leaves the record alone.
    assert_eq!(stage.call(protocol).send().await.text(), "run 2");
    assert_eq!(stage.runs.count(), 2);
}

async fn it_may_be_as_large_as_it_likes(protocol: Protocol) {
    let stage = play().open().await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("twelve bytes");
    assert_eq!(first.read(12).await, "twelve bytes");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    assert_eq!(stage.call(protocol).send().await.text(), "run 2");
    assert_eq!(stage.events.count("tombstoned"), 0);
}

async fn it_may_break(protocol: Protocol) {
    let stage = play().open().await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.fail();
    assert!(first.finish().await.is_broken);
    assert_eq!(stage.call(protocol).send().await.text(), "run 2");
    assert_eq!(stage.events.count("tombstoned"), 0);
}

/// Its body goes to the client as it is: nobody else reads it, and it stops with its client.
async fn it_reads_no_further_than_its_client(protocol: Protocol) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    storage.set(Operation::Complete, Fault::FailBefore);
    let stage = play().on(storage.clone()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    assert_eq!(stage.layer.engine().running(), 0);
    drop(first.leave());
    assert_eq!(stage.feed.ended().await, idempotency_tests::End::Dropped);
    assert_eq!(storage.calls(Operation::Complete), 0);
}
