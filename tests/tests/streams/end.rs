//! The first client sees the end of its answer only once the record is stored: who retries after it gets a replay.

use std::{sync::Arc, time::Duration};

use axum::response::IntoResponse;
use http::header;
use idempotency_axum::{Config, MemoryStorage, Operation};
use idempotency_tests::{Fault, FaultyStorage, Length, Protocol};
use tokio::sync::Semaphore;

use crate::{Play, impatient, patient};

over_both!(
    waits_for_the_record,
    waits_for_the_record_with_a_known_length,
    waits_for_the_record_with_a_content_length,
    waits_for_the_record_of_one_frame_with_a_known_length,
    a_retry_right_after_it_gets_the_replay,
    a_retry_right_after_it_gets_the_replay_with_a_known_length,
    a_retry_right_after_it_gets_the_replay_with_a_content_length,
    that_comes_late_holds_no_byte_back,
    that_never_comes_is_where_the_client_leaves,
);

async fn waits_for_the_record(protocol: Protocol) {
    let frames = ["one", "two"];
    let seen = is_held_back(protocol, Play::default(), &frames).await;
    assert_eq!(seen, "onetwo", "all but the end");
}

async fn waits_for_the_record_with_a_known_length(protocol: Protocol) {
    let play = Play::of_length(Length::Known(6));
    let seen = is_held_back(protocol, play, &["one", "two"]).await;
    assert!(seen.starts_with("one"), "what is not the end is there");
    assert_ne!(seen, "onetwo", "the last byte is the end");
}

/// The frame that is the end came without a pause after the head.
async fn waits_for_the_record_of_one_frame_with_a_known_length(protocol: Protocol) {
    let play = Play::of_length(Length::Known(3));
    let seen = is_held_back(protocol, play, &["one"]).await;
    assert_ne!(seen, "one", "the last byte is the end");
}

async fn waits_for_the_record_with_a_content_length(protocol: Protocol) {
    let play = Play::default().head(with_content_length);
    let seen = is_held_back(protocol, play, &["one", "two"]).await;
    assert!(seen.starts_with("one"), "what is not the end is there");
    assert_ne!(seen, "onetwo", "the last byte is the end");
}

fn with_content_length(body: axum::body::Body) -> axum::response::Response {
    ([(header::CONTENT_LENGTH, "6")], body).into_response()
}

/// What the client has seen of the answer while its record is being stored.
async fn is_held_back(protocol: Protocol, play: Play, frames: &[&'static str]) -> String {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Complete, Fault::Gate(gate.clone()));
    let config = Config::default()
        .lock(impatient())
        .storage_timeout(Duration::from_secs(60));
    let stage = Play { config, ..play }.on(storage.clone()).await;

    let mut first = stage.call(protocol).open().await;
    for &frame in frames {
        stage.feed.data(frame);
    }
    stage.feed.end();
    storage.called(Operation::Complete, 1).await;
    // The time of some round trips for what should not come. What has come must be read, or the end is not asked for.
    let mut seen = Vec::new();
    for _ in 0..5 {
        stage.assert_in_flight(protocol).await;
        seen.extend_from_slice(&first.read_ready());
    }
    let all = frames.concat();
    let seen_so_far = String::from_utf8(seen.clone()).unwrap();

    gate.add_permits(1);
    seen.extend_from_slice(&first.finish().await.whole());
    assert_eq!(seen, all.as_bytes());
    stage.assert_replays(protocol, all.as_bytes()).await;
    seen_so_far
}

async fn a_retry_right_after_it_gets_the_replay(protocol: Protocol) {
    for _ in 0..200 {
        retry_at_the_end(protocol, Play::default()).await;
    }
}

async fn a_retry_right_after_it_gets_the_replay_with_a_known_length(protocol: Protocol) {
    for _ in 0..200 {
        retry_at_the_end(protocol, Play::of_length(Length::Known(6))).await;
    }
}

async fn a_retry_right_after_it_gets_the_replay_with_a_content_length(protocol: Protocol) {
    for _ in 0..200 {
        retry_at_the_end(protocol, Play::default().head(with_content_length)).await;
    }
}

async fn retry_at_the_end(protocol: Protocol, play: Play) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    storage.set(Operation::Complete, Fault::Slow(20));
    let config = Config::default().lock(impatient());
    let stage = Play { config, ..play }.on(storage).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "two");
    stage.assert_replays(protocol, b"onetwo").await;
}

/// A body that has given all that was announced, and does not say that it is over.
fn without_end(config: Config) -> Play {
    Play::new(config).length(Length::BeforeTrailers(6))
}

async fn that_comes_late_holds_no_byte_back(protocol: Protocol) {
    let stage = without_end(Config::default().lock(patient())).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    stage.assert_replays(protocol, b"onetwo").await;
    assert_eq!(stage.events.count("tombstoned"), 0);
}

/// Over HTTP/1 the server itself lets go of the body after the last byte.
async fn that_never_comes_is_where_the_client_leaves(protocol: Protocol) {
    let stage = without_end(Config::default().lock(patient())).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    match protocol {
        Protocol::Http1 => assert_eq!(first.finish().await.whole(), "two"),
        Protocol::Http2 => {
            assert_eq!(first.read(3).await, "two");
            crate::leaving::leave(&stage, first).await;
        }
    }
    stage.layer.engine().drain().await;
    stage.assert_replays(protocol, b"onetwo").await;
    assert_eq!(stage.events.count("completed"), 1);
}
