//! `text/event-stream` has no end to wait for: it gets its tombstone at the head and goes to the first client event by event.

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use idempotency_axum::Config;
use idempotency_tests::{Length, Protocol};

use crate::{Play, impatient};

over_both!(
    event_by_event,
    with_parameters_in_its_type,
    that_never_says_anything,
    that_goes_over_the_limit,
);

fn events(body: Body) -> Response {
    ([("content-type", "text/event-stream")], body).into_response()
}

async fn event_by_event(protocol: Protocol) {
    is_passed_on(protocol, Play::new(at_once()).head(events)).await;
}

async fn with_parameters_in_its_type(protocol: Protocol) {
    let play = Play::new(at_once()).head(|body| {
        let content_type = [("content-type", "Text/Event-Stream ; charset=utf-8")];
        (content_type, body).into_response()
    });
    is_passed_on(protocol, play).await;
}

async fn that_goes_over_the_limit(protocol: Protocol) {
    let config = at_once().max_response_body(4);
    is_passed_on(protocol, Play::new(config).head(events)).await;
}

/// Duplicates are not made to wait, so a 423 would be seen.
fn at_once() -> Config {
    Config::default().lock(impatient())
}

async fn is_passed_on(protocol: Protocol, play: Play) {
    let stage = play.open().await;
    let mut first = stage.call(protocol).open().await;
    stage.assert_not_replayable(protocol).await;
    for event in ["data: one\n\n", "data: two\n\n", "data: three\n\n"] {
        stage.feed.data(event);
        assert_eq!(first.read(event.len()).await, event);
        stage.assert_not_replayable(protocol).await;
    }
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    stage.assert_not_replayable(protocol).await;
    assert_eq!(stage.events.count("tombstoned"), 1);
}

/// Its client may stay for a year: nothing waits for that.
async fn that_never_says_anything(protocol: Protocol) {
    let play = Play::new(at_once()).head(events).length(Length::Unknown);
    let stage = play.open().await;
    let first = stage.call(protocol).open().await;
    assert_eq!(
        stage.events.count("tombstoned"),
        1,
        "before its head is sent"
    );
    stage.layer.engine().drain().await;
    stage.assert_not_replayable(protocol).await;
    drop(first);
}
