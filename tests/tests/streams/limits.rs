//! Answers at the size limit and over it: from there on they are passed through, at the pace of their client.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    routing::post,
};
use futures_util::stream;
use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage, Operation};
use idempotency_tests::{Events, Fault, FaultyStorage, Length, Protocol, Runs, Server};
use tokio::sync::Semaphore;

use crate::{Play, assert_not_replayable, impatient};

over_both!(
    exactly_at_the_limit,
    exactly_at_the_limit_with_a_known_length,
    one_byte_over_the_limit,
    one_byte_over_the_limit_with_a_known_length,
    one_frame_over_the_limit,
    a_limit_of_nothing,
    five_times_the_limit,
    the_tombstone_comes_before_the_rest,
    a_retry_while_the_rest_flows,
    the_rest_breaks,
    a_client_that_does_not_read_holds_the_handler_back,
    an_answer_for_which_there_is_no_room,
    an_answer_for_which_there_is_room,
);

fn limited(limit: usize) -> Config {
    Config::default().max_response_body(limit).lock(impatient())
}

async fn exactly_at_the_limit(protocol: Protocol) {
    is_recorded(protocol, Length::Unknown).await;
}

async fn exactly_at_the_limit_with_a_known_length(protocol: Protocol) {
    is_recorded(protocol, Length::Known(6)).await;
}

async fn is_recorded(protocol: Protocol, length: Length) {
    let stage = Play::new(limited(6)).length(length).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "two");
    stage.assert_replays(protocol, b"onetwo").await;
}

async fn one_byte_over_the_limit(protocol: Protocol) {
    is_not_recorded(protocol, Length::Unknown).await;
}

async fn one_byte_over_the_limit_with_a_known_length(protocol: Protocol) {
    is_not_recorded(protocol, Length::Known(7)).await;
}

async fn is_not_recorded(protocol: Protocol, length: Length) {
    let stage = Play::new(limited(6)).length(length).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    stage.feed.data("!");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "!");
    stage.assert_not_replayable(protocol).await;
    assert_eq!(stage.events.count("tombstoned"), 1);
    assert_eq!(stage.events.count("completed"), 0);
}

async fn one_frame_over_the_limit(protocol: Protocol) {
    let stage = Play::new(limited(6)).open().await;
    let first = stage.call(protocol).open().await;
    stage.feed.data("onetwothree");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "onetwothree");
    stage.assert_not_replayable(protocol).await;
}

async fn a_limit_of_nothing(protocol: Protocol) {
    let stage = Play::new(limited(0)).open().await;
    let first = stage.call(protocol).open().await;
    stage.feed.data("1");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "1");
    stage.assert_not_replayable(protocol).await;
}

async fn five_times_the_limit(protocol: Protocol) {
    const MIB: usize = 1 << 20;
    let stage = Play::new(limited(MIB)).open().await;
    let first = stage.call(protocol).open().await;
    let mut expected = Vec::with_capacity(5 * MIB);
    for frame in 0..80_u8 {
        let frame = vec![frame; MIB / 16];
        expected.extend_from_slice(&frame);
        stage.feed.data(frame);
    }
    stage.feed.end();
    let all = first.finish().await.whole();
    assert_eq!(all.len(), expected.len());
    assert!(all == expected, "every byte in its place");
    stage.assert_not_replayable(protocol).await;
}

async fn the_tombstone_comes_before_the_rest(protocol: Protocol) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Complete, Fault::Gate(gate.clone()));
    let config = limited(6).storage_timeout(Duration::from_secs(60));
    let stage = Play::new(config).on(storage.clone()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("three");
    stage.feed.data("five");
    storage.called(Operation::Complete, 1).await;
    for _ in 0..3 {
        stage.assert_in_flight(protocol).await;
    }
    let seen = first.read_ready();
    assert!(seen.len() <= 3, "more than the limit: {seen:?}");
    assert_eq!(stage.feed.taken(), 2, "nor is more of it made");

    gate.add_permits(1);
    assert_eq!(first.read(9 - seen.len()).await, b"threefive"[seen.len()..]);
    stage.feed.data("six");
    assert_eq!(first.read(3).await, "six");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    stage.assert_not_replayable(protocol).await;
}

async fn a_retry_while_the_rest_flows(protocol: Protocol) {
    let stage = Play::new(limited(6)).open().await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("onetwothree");
    assert_eq!(first.read(11).await, "onetwothree");
    stage.assert_not_replayable(protocol).await;
    assert_eq!(stage.layer.engine().running(), 0);
    stage.feed.data("four");
    assert_eq!(first.read(4).await, "four");
    stage.assert_not_replayable(protocol).await;
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
}

async fn the_rest_breaks(protocol: Protocol) {
    let stage = Play::new(limited(6)).open().await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("onetwothree");
    assert_eq!(first.read(11).await, "onetwothree");
    stage.feed.fail();
    assert!(first.finish().await.is_broken);
    stage.assert_not_replayable(protocol).await;
    assert_eq!(stage.events.count("tombstoned"), 1);
}

/// Far more than all buffers between handler and client can hold.
const FRAMES: usize = 1024;
const FRAME: usize = 16 << 10;

/// Counts the frames that the handler has made.
#[derive(Clone, Default)]
struct Made(Arc<AtomicUsize>);

impl Made {
    fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    fn body(&self) -> Body {
        let made = self.0.clone();
        let frames = (0..FRAMES).map(move |_| {
            made.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Infallible>(Bytes::from(vec![b'x'; FRAME]))
        });
        Body::from_stream(stream::iter(frames))
    }
}

async fn a_client_that_does_not_read_holds_the_handler_back(protocol: Protocol) {
    let (runs, made, events) = (Runs::new(), Made::default(), Events::new());
    let handler = {
        let (runs, made) = (runs.clone(), made.clone());
        async move || {
            runs.next();
            made.body()
        }
    };
    let config = limited(256 << 10).observer(events.clone());
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
    let router = Router::new().route("/big", post(handler)).layer(layer);
    let server = Server::start_without_slack(router);
    let call = || server.post("/big").key("abc").over(protocol);

    let first = call().open().await;
    events.until("tombstoned", 1).await;
    // All tasks run on this thread, and each that can go on does so before a turn of ours.
    for _ in 0..20 {
        assert_not_replayable(&call().send().await);
        for _ in 0..FRAMES {
            tokio::task::yield_now().await;
        }
    }
    let ahead = made.count();
    assert!(
        ahead < FRAMES / 4,
        "{ahead} frames of {FRAMES} were made for nobody"
    );

    let all = first.finish().await.whole();
    assert_eq!(all.len(), FRAMES * FRAME);
    assert_eq!((made.count(), runs.count()), (FRAMES, 1));
}

/// It goes on as one over the limit does.
async fn an_answer_for_which_there_is_no_room(protocol: Protocol) {
    let config = Config::default().max_buffered(5).lock(impatient());
    let budget = config.budget.clone();
    let stage = Play::new(config).open().await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    assert_eq!(budget.used(), 3);
    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    assert_eq!(budget.used(), 0);
    let retry = stage.call(protocol).send().await;
    assert_not_replayable(&retry);
    assert!(retry.text().contains("no memory left"), "{}", retry.text());
    assert_eq!(stage.layer.engine().running(), 0);
    stage.feed.data("three");
    assert_eq!(first.read(5).await, "three");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    stage.assert_not_replayable(protocol).await;
    assert_eq!(stage.events.count("tombstoned"), 1);
}

async fn an_answer_for_which_there_is_room(protocol: Protocol) {
    let config = Config::default().max_buffered(7);
    let budget = config.budget.clone();
    let stage = Play::new(config).open().await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "two");
    stage.layer.engine().drain().await;
    stage.assert_replays(protocol, b"onetwo").await;
    assert_eq!(budget.used(), 0);
}
