//! A storage that can't take the record, and operations that take too long.

use std::time::Duration;

use idempotency_axum::{Config, Env, LockPolicy, MemoryStorage, Operation, SimulatedClock};
use idempotency_tests::{End, Fault, FaultyStorage, Length, Logs, Protocol};

use crate::{Play, Stage, impatient, patient};

over_both!(
    the_record_can_not_be_stored_yet,
    the_record_can_not_be_stored_yet_with_a_known_length,
    the_storage_took_the_record_and_failed_to_say_so,
    the_tombstone_can_not_be_stored_yet,
    the_operation_is_given_up_in_mid_stream,
    the_operation_is_given_up_while_a_duplicate_waits,
    a_client_that_left_is_given_up_too,
    a_client_that_leaves_after_it_was_given_up,
);

async fn the_record_can_not_be_stored_yet(protocol: Protocol) {
    is_deferred(protocol, Length::Unknown).await;
}

async fn the_record_can_not_be_stored_yet_with_a_known_length(protocol: Protocol) {
    is_deferred(protocol, Length::Known(6)).await;
}

async fn is_deferred(protocol: Protocol, length: Length) {
    let memory = MemoryStorage::new();
    let storage = FaultyStorage::new(memory.clone());
    storage.set(Operation::Complete, Fault::FailBefore);
    let play = Play::new(Config::default().lock(impatient()));
    let stage = play.length(length).on(storage.clone()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "two");
    assert_eq!(stage.events.count("deferred"), 1);
    assert_eq!(stage.events.count("completed"), 0);
    // From what this process remembers.
    stage.assert_replays(protocol, b"onetwo").await;
    assert_eq!(stage.layer.engine().running(), 1);

    storage.heal(Operation::Complete);
    stage.layer.engine().drain().await;
    assert_eq!(stage.events.count("completed"), 1);
    stage.assert_replays(protocol, b"onetwo").await;
    // A server that knows nothing but what is stored.
    let other = Play::default().on(memory).await;
    let elsewhere = other.call(protocol).send().await;
    crate::assert_replay(&elsewhere, b"onetwo");
    assert_eq!(other.runs.count(), 0);
}

async fn the_storage_took_the_record_and_failed_to_say_so(protocol: Protocol) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    storage.set(Operation::Complete, Fault::FailAfter);
    let play = Play::new(Config::default().lock(impatient()));
    let stage = play.on(storage.clone()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    stage.assert_replays(protocol, b"one").await;
    storage.heal(Operation::Complete);
    stage.layer.engine().drain().await;
    stage.assert_replays(protocol, b"one").await;
    assert_eq!(stage.events.count("lost"), 0);
}

async fn the_tombstone_can_not_be_stored_yet(protocol: Protocol) {
    let storage = FaultyStorage::new(MemoryStorage::new());
    storage.set(Operation::Complete, Fault::FailBefore);
    let config = Config::default().lock(impatient()).max_response_body(4);
    let stage = Play::new(config).on(storage.clone()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    stage.assert_not_replayable(protocol).await;
    stage.feed.data("three");
    assert_eq!(first.read(5).await, "three");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    storage.heal(Operation::Complete);
    stage.layer.engine().drain().await;
    assert_eq!(stage.events.count("tombstoned"), 1);
    stage.assert_not_replayable(protocol).await;
}

const MAX_HOLD: Duration = Duration::from_secs(600);

async fn on_a_simulated_clock(lock: LockPolicy) -> (Stage, SimulatedClock) {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let config = Config::default().env(env).lock(lock.max_hold(MAX_HOLD));
    (Play::new(config).on(storage).await, clock)
}

/// Moves the clock until the operation is given up, a third of a lease at a time.
async fn give_up(stage: &Stage, clock: &SimulatedClock) {
    for _ in 0..61 {
        while stage.events.count("tombstoned") == 0 && clock.sleeping() == 0 {
            tokio::task::yield_now().await;
        }
        clock.advance(Duration::from_secs(10));
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }
    stage.events.until("tombstoned", 1).await;
}

async fn the_operation_is_given_up_in_mid_stream(protocol: Protocol) {
    let (stage, clock) = on_a_simulated_clock(impatient()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.assert_in_flight(protocol).await;
    give_up(&stage, &clock).await;
    stage.assert_not_replayable(protocol).await;

    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    stage.assert_not_replayable(protocol).await;
    assert_eq!(stage.events.count("completed"), 0);
    stage.layer.engine().drain().await;
}

async fn the_operation_is_given_up_while_a_duplicate_waits(protocol: Protocol) {
    let lock = patient().timeout(2 * MAX_HOLD);
    let (stage, clock) = on_a_simulated_clock(lock).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    let duplicate = stage.call(protocol).start();
    stage.events.until("waiting", 1).await;
    give_up(&stage, &clock).await;
    crate::assert_not_replayable(&duplicate.await.unwrap());
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
}

/// Its body is dropped: it may never end, and nobody would read it.
async fn a_client_that_left_is_given_up_too(protocol: Protocol) {
    let (logs, _guard) = Logs::install();
    let (stage, clock) = on_a_simulated_clock(impatient()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    crate::leaving::leave(&stage, first).await;
    stage.feed.data("two");
    stage.feed.until_taken(2).await;
    give_up(&stage, &clock).await;
    assert_eq!(stage.feed.ended().await, End::Dropped);
    stage.layer.engine().drain().await;
    stage.assert_not_replayable(protocol).await;
    assert_eq!(
        logs.with(&["ERROR", "POST", "/stream", "max_hold"]).len(),
        1
    );
}

/// Past the tombstone the answer ends with its client.
async fn a_client_that_leaves_after_it_was_given_up(protocol: Protocol) {
    let (stage, clock) = on_a_simulated_clock(impatient()).await;
    let mut first = stage.call(protocol).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    give_up(&stage, &clock).await;
    stage.layer.engine().drain().await;
    stage.feed.data("two");
    assert_eq!(first.read(3).await, "two");
    crate::leaving::leave(&stage, first).await;
    assert_eq!(stage.feed.ended().await, End::Dropped);
    stage.assert_not_replayable(protocol).await;
}

/// All the data is there, and the end, or trailers, never come. HTTP/1 has no end after the announced length.
#[tokio::test]
async fn an_end_that_never_comes_is_given_up() {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let config = Config::default()
        .env(env)
        .lock(impatient().max_hold(MAX_HOLD));
    let play = Play::new(config).length(Length::BeforeTrailers(3));
    let stage = play.on(storage).await;
    let mut first = stage.call(Protocol::Http2).open().await;
    stage.feed.data("one");
    assert_eq!(first.read(3).await, "one");
    stage.assert_in_flight(Protocol::Http2).await;
    give_up(&stage, &clock).await;
    stage.layer.engine().drain().await;
    stage.assert_not_replayable(Protocol::Http2).await;
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
}
