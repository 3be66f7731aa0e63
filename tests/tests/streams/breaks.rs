//! An answer that does not come to its end: the first client sees that it broke, retries that there is nothing to replay.

use std::sync::Arc;
use std::time::Duration;

use idempotency_axum::{Config, MemoryStorage, Operation};
use idempotency_tests::{Fault, FaultyStorage, Length, Protocol};
use tokio::sync::Semaphore;

use crate::{Play, Stage, assert_not_replayable, impatient, patient};

over_both!(
    an_error_after_two_frames,
    an_error_after_two_frames_of_a_known_length,
    an_error_before_the_first_frame,
    an_end_before_the_known_length,
    a_panic_after_two_frames,
    a_panic_before_the_first_frame,
    duplicates_that_wait_are_told,
    the_break_waits_for_the_tombstone,
);

async fn an_error_after_two_frames(protocol: Protocol) {
    breaks_after_two_frames(protocol, Length::Unknown, |stage| stage.feed.fail()).await;
}

async fn an_error_after_two_frames_of_a_known_length(protocol: Protocol) {
    breaks_after_two_frames(protocol, Length::Known(9), |stage| stage.feed.fail()).await;
}

/// The body is not as long as it said: that is no whole answer either.
async fn an_end_before_the_known_length(protocol: Protocol) {
    breaks_after_two_frames(protocol, Length::Known(9), |stage| stage.feed.end()).await;
}

async fn a_panic_after_two_frames(protocol: Protocol) {
    breaks_after_two_frames(protocol, Length::Unknown, |stage| stage.feed.panic()).await;
}

async fn breaks_after_two_frames(protocol: Protocol, length: Length, end: fn(&Stage)) {
    let config = Config::default().lock(impatient());
    let stage = Play::new(config).length(length).open().await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    end(&stage);
    let ending = first.finish().await;
    assert!(ending.is_broken, "a client must see that this is not all");
    assert_eq!(ending.data, "");
    // Told at once, since the client saw the break only once that was stored.
    stage.assert_not_replayable(protocol).await;
    stage.assert_not_replayable(protocol).await;
    stage.layer.engine().drain().await;
    assert_eq!(stage.events.count("tombstoned"), 1);
    assert_eq!(stage.events.count("completed"), 0);
}

async fn an_error_before_the_first_frame(protocol: Protocol) {
    breaks_before_the_first_frame(protocol, |stage| stage.feed.fail()).await;
}

async fn a_panic_before_the_first_frame(protocol: Protocol) {
    breaks_before_the_first_frame(protocol, |stage| stage.feed.panic()).await;
}

async fn breaks_before_the_first_frame(protocol: Protocol, end: fn(&Stage)) {
    let config = Config::default().lock(impatient());
    let stage = Play::new(config).open().await;
    let first = stage.call(protocol).open().await;
    end(&stage);
    assert!(first.finish().await.is_broken);
    stage.assert_not_replayable(protocol).await;
    stage.layer.engine().drain().await;
}

async fn duplicates_that_wait_are_told(protocol: Protocol) {
    let stage = Play::new(Config::default().lock(patient())).open().await;
    stage.feed.data("one");
    let mut first = stage.call(protocol).open().await;
    assert_eq!(first.read(3).await, "one");
    let duplicates = [stage.call(protocol).start(), stage.call(protocol).start()];
    stage.events.until("waiting", 2).await;
    stage.feed.fail();
    for duplicate in duplicates {
        assert_not_replayable(&duplicate.await.unwrap());
    }
    assert!(first.finish().await.is_broken);
    assert_eq!(stage.runs.count(), 1);
}

/// A break is an end: who retries after it must not find the claim.
async fn the_break_waits_for_the_tombstone(protocol: Protocol) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let gate = Arc::new(Semaphore::new(0));
    storage.set(Operation::Complete, Fault::Gate(gate.clone()));
    let config = Config::default()
        .lock(impatient())
        .storage_timeout(Duration::from_secs(60));
    let stage = Play::new(config).on(storage.clone()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    stage.feed.fail();
    storage.called(Operation::Complete, 1).await;
    for _ in 0..3 {
        stage.assert_in_flight(protocol).await;
    }
    // Panics if the body has ended, in whatever way.
    let mut seen = first.read_ready().to_vec();
    gate.add_permits(1);
    let ending = first.finish().await;
    assert!(ending.is_broken);
    seen.extend_from_slice(&ending.data);
    assert_eq!(seen, b"one", "and all that was there");
    stage.assert_not_replayable(protocol).await;
}
