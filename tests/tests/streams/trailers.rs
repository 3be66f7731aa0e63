//! Trailers are passed on and not recorded.

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderValue, header};
use idempotency_axum::Config;
use idempotency_tests::{Call, Length, Protocol};

use crate::{Play, Stage, impatient};

over_both!(trailers_reach_the_first_client, trailers_without_data);

/// HTTP/1.1 sends only trailers that were announced, to who wants them.
fn announced(body: Body) -> Response {
    ([("trailer", "x-checksum")], body).into_response()
}

fn checksum() -> HeaderMap {
    HeaderMap::from_iter([(
        http::HeaderName::from_static("x-checksum"),
        HeaderValue::from_static("1234"),
    )])
}

fn wanting(stage: &Stage, protocol: Protocol) -> Call {
    stage.call(protocol).header("te", "trailers")
}

async fn trailers_reach_the_first_client(protocol: Protocol) {
    let stage = Play::default().head(announced).open().await;
    stage.feed.data("one");
    let mut first = wanting(&stage, protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    stage.feed.trailers(checksum());
    stage.feed.end();
    let ending = first.finish().await;
    assert!(!ending.is_broken);
    assert_eq!(
        (&*ending.data, ending.trailers),
        (&b"two"[..], Some(checksum()))
    );
    stage.assert_not_replayable(protocol).await;
    stage.assert_not_replayable(protocol).await;
    assert_eq!(stage.events.count("tombstoned"), 1);
    assert_eq!(stage.events.count("completed"), 0);
}

async fn trailers_without_data(protocol: Protocol) {
    let stage = Play::default().head(announced).open().await;
    let first = wanting(&stage, protocol).open().await;
    stage.feed.trailers(checksum());
    stage.feed.end();
    let ending = first.finish().await;
    assert_eq!(
        (&*ending.data, ending.trailers),
        (&b""[..], Some(checksum()))
    );
    stage.assert_not_replayable(protocol).await;
}

/// HTTP/2 sends them without an announcement: they are seen only when they come.
#[tokio::test]
async fn trailers_that_were_not_announced() {
    let stage = Play::default().open().await;
    stage.feed.data("one");
    let mut first = stage.call(Protocol::Http2).open().await;
    assert_eq!(first.read(3).await, "one");
    stage.feed.trailers(checksum());
    stage.feed.end();
    let ending = first.finish().await;
    assert_eq!(
        (&*ending.data, ending.trailers),
        (&b""[..], Some(checksum()))
    );
    stage.assert_not_replayable(Protocol::Http2).await;
}

/// The client has all the data at once, the end and the trailers once they are there.
#[tokio::test]
async fn trailers_that_come_after_all_of_a_known_length() {
    let known = || Play::of_length(Length::BeforeTrailers(6));
    let announced =
        || Play::default().head(|body| ([(header::CONTENT_LENGTH, "6")], body).into_response());
    for play in [known(), announced()] {
        let config = Config::default().lock(impatient());
        let stage = Play { config, ..play }.open().await;
        stage.feed.data("one");
        let mut first = stage.call(Protocol::Http2).open().await;
        assert_eq!(first.headers["content-length"], "6");
        assert_eq!(first.read(3).await, "one");
        stage.feed.data("two");
        assert_eq!(first.read(3).await, "two");
        stage.assert_in_flight(Protocol::Http2).await;
        stage.feed.trailers(checksum());
        stage.feed.end();
        let ending = first.finish().await;
        assert!(!ending.is_broken);
        assert_eq!(
            (&*ending.data, ending.trailers),
            (&b""[..], Some(checksum()))
        );
        stage.assert_not_replayable(Protocol::Http2).await;
        assert_eq!(stage.events.count("tombstoned"), 1);
        assert_eq!(stage.events.count("completed"), 0);
    }
}

/// All the data is there at once, only the trailers are not.
#[tokio::test]
async fn trailers_that_come_after_a_single_frame() {
    let stage = Play::of_length(Length::BeforeTrailers(3)).open().await;
    stage.feed.data("one");
    let mut first = stage.call(Protocol::Http2).open().await;
    assert_eq!(first.read(3).await, "one");
    stage.feed.trailers(checksum());
    stage.feed.end();
    assert_eq!(first.finish().await.trailers, Some(checksum()));
    stage.assert_not_replayable(Protocol::Http2).await;
}

#[tokio::test]
async fn a_client_that_leaves_early_is_not_the_end_of_trailers() {
    let config = Config::default().lock(impatient());
    let play = Play::new(config).length(Length::BeforeTrailers(6));
    let stage = play.open().await;
    stage.feed.data("one");
    let mut first = stage.call(Protocol::Http2).open().await;
    assert_eq!(first.read(3).await, "one");
    crate::leaving::leave(&stage, first).await;
    stage.feed.data("two");
    stage.feed.until_taken(2).await;
    stage.assert_in_flight(Protocol::Http2).await;
    stage.feed.trailers(checksum());
    stage.feed.end();
    stage.layer.engine().drain().await;
    stage.assert_not_replayable(Protocol::Http2).await;
}
