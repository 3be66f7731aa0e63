//! The first client gets the answer as it is made; retries get all of it at once.

use axum::response::IntoResponse;
use http::{StatusCode, header};
use idempotency_axum::Config;
use idempotency_tests::{Length, Protocol};

use crate::{Play, assert_replay, impatient, patient};

over_both!(
    frame_by_frame,
    frame_by_frame_with_a_known_length,
    frame_by_frame_with_a_content_length,
    the_head_comes_before_the_first_frame,
    an_answer_that_is_there_at_once,
    empty_frames_in_between,
    the_head_is_replayed,
    the_original_status_is_replayed,
    a_duplicate_in_mid_stream_waits_for_the_replay,
    a_duplicate_in_mid_stream_is_refused_when_its_time_is_over,
    duplicates_in_mid_stream_all_get_the_replay,
);

async fn frame_by_frame(protocol: Protocol) {
    comes_frame_by_frame(protocol, Play::default()).await;
}

async fn frame_by_frame_with_a_known_length(protocol: Protocol) {
    comes_frame_by_frame(protocol, Play::of_length(Length::Known(11))).await;
}

/// The handler knows the length though its body does not say so.
async fn frame_by_frame_with_a_content_length(protocol: Protocol) {
    let play =
        Play::default().head(|body| ([(header::CONTENT_LENGTH, "11")], body).into_response());
    comes_frame_by_frame(protocol, play).await;
}

async fn comes_frame_by_frame(protocol: Protocol, play: Play) {
    let is_chunked = play.length == Length::Unknown;
    let stage = play.open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.status, StatusCode::OK);
    if !is_chunked {
        assert_eq!(first.headers[header::CONTENT_LENGTH], "11");
    }
    // What the client sees now is all that was made so far.
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    stage.feed.data("three");
    stage.feed.end();
    assert!(!first.headers.contains_key("idempotency-replayed"));
    assert_eq!(first.finish().await.whole(), "three");
    stage.assert_replays(protocol, b"onetwothree").await;
    stage.assert_replays(protocol, b"onetwothree").await;
    assert_eq!(stage.events.count("completed"), 1);
}

async fn the_head_comes_before_the_first_frame(protocol: Protocol) {
    let stage = Play::default().open().await;
    let first = stage.call(protocol).open().await;
    assert_eq!((first.status, stage.feed.taken()), (StatusCode::OK, 0));
    stage.feed.data("late");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "late");
    stage.assert_replays(protocol, b"late").await;
}

async fn an_answer_that_is_there_at_once(protocol: Protocol) {
    let stage = Play::default().open().await;
    stage.feed.data("one");
    stage.feed.data("two");
    stage.feed.end();
    let first = stage.call(protocol).send().await;
    assert_eq!((first.code(), first.text()), (200, "onetwo"));
    stage.assert_replays(protocol, b"onetwo").await;
}

async fn empty_frames_in_between(protocol: Protocol) {
    let stage = Play::default().open().await;
    stage.feed.data("");
    let mut first = stage.call(protocol).open().await;
    stage.feed.until_taken(1).await;
    stage.feed.data("one");
    stage.feed.data("");
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("");
    stage.feed.data("two");
    stage.feed.data("");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "two");
    stage.assert_replays(protocol, b"onetwo").await;
}

/// What says something of the answer is kept, what says something of one transfer is not.
async fn the_head_is_replayed(protocol: Protocol) {
    let play = Play::default().head(|body| {
        let headers = [
            ("location", "/orders/1"),
            ("etag", "\"1\""),
            ("content-type", "text/csv"),
            ("cache-control", "no-store"),
            ("set-cookie", "session=1"),
            ("date", "Mon, 01 Jan 2001 00:00:00 GMT"),
        ];
        (StatusCode::CREATED, headers, body).into_response()
    });
    let stage = play.open().await;
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.status, StatusCode::CREATED);
    assert_eq!(first.headers["set-cookie"], "session=1");
    stage.feed.data("a;b\n");
    assert_eq!(first.read(4).await, "a;b\n");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");

    let retry = stage.assert_replays(protocol, b"a;b\n").await;
    assert_eq!(retry.header("location"), Some("/orders/1"));
    assert_eq!(retry.header("etag"), Some("\"1\""));
    assert_eq!(retry.header("content-type"), Some("text/csv"));
    assert_eq!(retry.header("cache-control"), Some("no-store"));
    assert_eq!(retry.header("set-cookie"), None);
    let date = retry.header("date");
    assert_ne!(date, Some("Mon, 01 Jan 2001 00:00:00 GMT"));
}

async fn the_original_status_is_replayed(protocol: Protocol) {
    let play = Play::new(Config::ietf())
        .head(|body| (StatusCode::UNPROCESSABLE_ENTITY, body).into_response());
    let stage = play.open().await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("no such item");
    first.read(12).await;
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    let retry = stage.call(protocol).send().await;
    assert_eq!((retry.code(), retry.text()), (422, "no such item"));
    assert!(retry.is_replay());
    assert_eq!(retry.problem(), None);
    assert_eq!(stage.runs.count(), 1);
}

async fn a_duplicate_in_mid_stream_waits_for_the_replay(protocol: Protocol) {
    let stage = Play::new(Config::default().lock(patient())).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    let duplicate = stage.call(protocol).start();
    stage.events.until("waiting", 1).await;
    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    assert!(!duplicate.is_finished(), "half an answer is none");
    stage.feed.end();
    assert_replay(&duplicate.await.unwrap(), b"onetwo");
    assert_eq!(first.finish().await.whole(), "");
    assert_eq!(stage.runs.count(), 1);
}

async fn a_duplicate_in_mid_stream_is_refused_when_its_time_is_over(protocol: Protocol) {
    let stage = Play::new(Config::default().lock(impatient())).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    stage.assert_in_flight(protocol).await;
    stage.feed.data("two");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "two");
    stage.assert_replays(protocol, b"onetwo").await;
}

async fn duplicates_in_mid_stream_all_get_the_replay(protocol: Protocol) {
    let stage = Play::new(Config::default().lock(patient())).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    let duplicates: Vec<_> = (0..20).map(|_| stage.call(protocol).start()).collect();
    stage.events.until("waiting", 20).await;
    stage.feed.data("two");
    stage.feed.end();
    for duplicate in duplicates {
        assert_replay(&duplicate.await.unwrap(), b"onetwo");
    }
    assert_eq!(first.finish().await.whole(), "two");
    assert_eq!(stage.runs.count(), 1);
}

/// Which protocol carries a request says nothing about the operation.
#[tokio::test]
async fn a_retry_over_another_version_of_http() {
    for (protocol, other) in [
        (Protocol::Http1, Protocol::Http2),
        (Protocol::Http2, Protocol::Http1),
    ] {
        let stage = Play::default().open().await;
        let mut first = stage.call(protocol).open().await;
        stage.feed.data("one");
        assert_eq!(first.read(3).await, "one");
        stage.feed.end();
        assert_eq!(first.finish().await.whole(), "");
        stage.assert_replays(other, b"one").await;
    }
}
