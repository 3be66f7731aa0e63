//! A client that leaves in mid-stream stops nothing.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    middleware,
    response::Response,
};
use futures_util::FutureExt;
use http_body::{Frame, SizeHint};
use idempotency_axum::{Config, MemoryStorage, Operation};
use idempotency_tests::{End, Fault, FaultyStorage, Incoming, Length, PATIENCE, Protocol};
use tokio::sync::{Semaphore, watch};

use crate::{Play, Stage, impatient};

over_both!(
    the_recording_goes_on,
    the_recording_goes_on_with_a_known_length,
    before_the_first_frame,
    while_the_record_is_being_stored,
    and_the_stream_breaks,
    and_the_answer_goes_over_the_limit,
);

/// How many bodies the server has let go of, whole or not.
#[derive(Clone, Debug, Default)]
pub(crate) struct LetGo(Arc<watch::Sender<usize>>);

impl LetGo {
    /// Sees to the bodies of all answers of `router`.
    pub(crate) fn of(&self, router: Router) -> Router {
        let let_go = self.clone();
        let observe = move |response: Response| {
            let let_go = let_go.clone();
            async { response.map(|body| Body::new(Observed { body, let_go })) }
        };
        router.layer(middleware::map_response(observe))
    }

    async fn until(&self, bodies: usize) {
        let mut count = self.0.subscribe();
        let enough = count.wait_for(|count| *count >= bodies);
        let enough = tokio::time::timeout(PATIENCE, enough).await;
        assert!(
            enough.is_ok(),
            "the server does not notice that the client left"
        );
    }
}

struct Observed {
    body: Body,
    let_go: LetGo,
}

impl http_body::Body for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.let_go.0.send_modify(|count| *count += 1);
    }
}

/// The client has left, and the server knows.
pub(crate) async fn leave(stage: &Stage, client: Incoming) {
    let connection = client.leave();
    stage.let_go.until(1).await;
    drop(connection);
}

async fn the_recording_goes_on(protocol: Protocol) {
    is_recorded(protocol, Length::Unknown).await;
}

async fn the_recording_goes_on_with_a_known_length(protocol: Protocol) {
    is_recorded(protocol, Length::Known(11)).await;
}

async fn is_recorded(protocol: Protocol, length: Length) {
    let play = Play::new(Config::default().lock(impatient()));
    let stage = play.length(length).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    leave(&stage, first).await;

    stage.assert_in_flight(protocol).await;
    stage.feed.data("two");
    stage.feed.until_taken(2).await;
    stage.assert_in_flight(protocol).await;
    stage.feed.data("three");
    stage.feed.end();
    assert_eq!(stage.feed.ended().await, End::Read);
    stage.layer.engine().drain().await;
    stage.assert_replays(protocol, b"onetwothree").await;
    assert_eq!(stage.events.count("completed"), 1);
    assert_eq!(stage.events.count("tombstoned"), 0);
}

async fn before_the_first_frame(protocol: Protocol) {
    let stage = Play::new(Config::default().lock(impatient())).open().await;
    let first = stage.call(protocol).open().await;
    leave(&stage, first).await;
    stage.assert_in_flight(protocol).await;
    stage.feed.data("one");
    stage.feed.end();
    assert_eq!(stage.feed.ended().await, End::Read);
    stage.layer.engine().drain().await;
    stage.assert_replays(protocol, b"one").await;
}

/// `drain` waits for the record too.
async fn while_the_record_is_being_stored(protocol: Protocol) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Complete, Fault::Gate(gate.clone()));
    let config = Config::default()
        .lock(impatient())
        .storage_timeout(Duration::from_secs(60));
    let stage = Play::new(config).on(storage.clone()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.end();
    storage.called(Operation::Complete, 1).await;
    leave(&stage, first).await;

    stage.assert_in_flight(protocol).await;
    assert_eq!(stage.layer.engine().running(), 1);
    let mut drained = Box::pin(stage.layer.engine().drain());
    assert_eq!((&mut drained).now_or_never(), None);
    gate.add_permits(1);
    drained.await;
    stage.assert_replays(protocol, b"one").await;
}

async fn and_the_stream_breaks(protocol: Protocol) {
    let stage = Play::default().open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    leave(&stage, first).await;
    stage.feed.fail();
    assert_eq!(stage.feed.ended().await, End::Read);
    stage.layer.engine().drain().await;
    stage.assert_not_replayable(protocol).await;
}

/// Nobody reads any more, so nothing is waited for.
async fn and_the_answer_goes_over_the_limit(protocol: Protocol) {
    let stage = Play::new(Config::default().max_response_body(4))
        .open()
        .await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    leave(&stage, first).await;
    stage.feed.data("two");
    stage.events.until("tombstoned", 1).await;
    stage.layer.engine().drain().await;
    stage.assert_not_replayable(protocol).await;
}
