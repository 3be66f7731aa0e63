//! What a conflict leaves: a storable answer replaces the record and restarts its TTL, anything else keeps it.

use std::time::Duration;

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{FromRequestParts, Request},
    response::{IntoResponse, Response},
    routing::post,
};
use http::StatusCode;
use idempotency_axum::{
    Config, Entry, Env, IdempotencyHandler, IdempotencyLayer, KeyPolicy, ManualIdempotency,
    MemoryStorage, Operation, Outcome, SimulatedClock, Storage, StoreOn,
};
use idempotency_tests::{Answer, Fault, FaultyStorage, Runs, Server};
use tower::{Layer, ServiceExt, service_fn};

use crate::{Shop, Work, assert_ran, encoded, order, patient, saw, seen};

#[tokio::test]
async fn a_storable_answer_replaces_the_record() {
    let shop = Shop::open().await;
    shop.assert_runs(1, "nothing").await;
    shop.assert_runs(2, "201 run 1").await;
    shop.assert_runs(3, "201 run 2").await;
    let other_status = shop.ask("202").send().await;
    assert_eq!(saw(&other_status), "201 run 3");
    shop.assert_runs(5, "202 run 4").await;
}

#[tokio::test]
async fn a_storable_answer_replaces_a_tombstone() {
    let shop = Shop::open().await;
    assert_eq!(shop.ask("large").send().await.code(), 200);
    shop.assert_runs(2, "no answer").await;
    shop.assert_runs(3, "201 run 2").await;
}

#[tokio::test]
async fn a_status_that_is_not_stored_keeps_the_record() {
    let shop = Shop::open().await;
    shop.assert_runs(1, "nothing").await;
    for status in ["208", "303", "404", "409", "500"] {
        let answer = shop.ask(status).send().await;
        assert_eq!(answer.code().to_string(), status);
        assert_eq!(saw(&answer), "201 run 1");
    }
    assert_eq!(shop.sees().await, "201 run 1");
}

#[tokio::test]
async fn the_policy_says_what_is_stored() {
    let policy = KeyPolicy::required().store_on(StoreOn::statuses([
        StatusCode::CREATED,
        StatusCode::CONFLICT,
    ]));
    let shop = Shop::of(MemoryStorage::new(), Config::default(), policy).await;
    shop.assert_runs(1, "nothing").await;
    assert_eq!(shop.ask("202").send().await.code(), 202);
    assert_eq!(shop.sees().await, "201 run 1");
    assert_eq!(shop.ask("409").send().await.code(), 409);
    assert_eq!(shop.sees().await, "409 run 4");
}

/// Under `stripe` a 500 is stored, and of a first run a panic leaves a tombstone. On a conflict there is something better.
#[tokio::test]
async fn a_panic_keeps_the_record() {
    for config in [Config::default(), Config::stripe()] {
        let shop = Shop::with(config).await;
        shop.assert_runs(1, "nothing").await;
        for _ in 0..2 {
            assert!(shop.ask("panic").try_send().await.is_err(), "it goes on");
        }
        shop.assert_runs(4, "201 run 1").await;
        assert_eq!(shop.layer.engine().running(), 0);
    }
}

/// What a service behind the layer can fail with, though no handler of axum's does.
#[tokio::test]
async fn an_error_keeps_the_record() {
    for config in [Config::default(), Config::stripe()] {
        let runs = Runs::new();
        let service = {
            let runs = runs.clone();
            service_fn(move |request: Request| {
                let runs = runs.clone();
                async move {
                    let (mut parts, _) = request.into_parts();
                    let manual = ManualIdempotency::from_request_parts(&mut parts, &()).await;
                    let saw = seen(&manual.expect("a manual policy"));
                    match runs.next() {
                        2 => Err(std::io::Error::other("the service is broken")),
                        run => Ok::<Response, _>(format!("run {run} saw {saw}").into_response()),
                    }
                }
            })
        };
        let layer = IdempotencyLayer::enforce(MemoryStorage::new())
            .config(config)
            .policy(KeyPolicy::required().manual());
        let app = layer.layer(service);
        let call = async || {
            let request = Request::post("/orders").header("idempotency-key", "abc");
            let response = app.clone().oneshot(request.body(Body::empty()).unwrap());
            let body = response.await?.into_body();
            let body = axum::body::to_bytes(body, usize::MAX).await;
            Ok::<_, std::io::Error>(String::from_utf8(body.unwrap().to_vec()).unwrap())
        };
        assert_eq!(call().await.unwrap(), "run 1 saw nothing");
        assert_eq!(
            call().await.unwrap_err().to_string(),
            "the service is broken"
        );
        assert_eq!(call().await.unwrap(), "run 3 saw 200 run 1 saw nothing");
        layer.drain().await;
    }
}

const HOUR: Duration = Duration::from_secs(3600);
const SECOND: Duration = Duration::from_secs(1);

/// A shop on a clock that the test moves; records live for a day unless `policy` says otherwise.
async fn on_a_clock(policy: KeyPolicy) -> (Shop, SimulatedClock) {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let shop = Shop::of(storage, Config::default().env(env), policy).await;
    (shop, clock)
}

#[tokio::test]
async fn a_storable_answer_restarts_the_ttl() {
    let (shop, clock) = on_a_clock(KeyPolicy::required()).await;
    shop.assert_runs(1, "nothing").await;
    clock.advance(23 * HOUR);
    shop.assert_runs(2, "201 run 1").await;
    // The first record would be gone.
    clock.advance(24 * HOUR - SECOND);
    assert_eq!(shop.sees().await, "201 run 2");
    clock.advance(SECOND);
    shop.assert_runs(4, "nothing").await;
}

#[tokio::test]
async fn the_ttl_of_the_policy_is_restarted() {
    let (shop, clock) = on_a_clock(KeyPolicy::required().ttl(2 * HOUR)).await;
    shop.assert_runs(1, "nothing").await;
    clock.advance(HOUR);
    shop.assert_runs(2, "201 run 1").await;
    clock.advance(2 * HOUR - SECOND);
    assert_eq!(shop.sees().await, "201 run 2");
    clock.advance(SECOND);
    shop.assert_runs(4, "nothing").await;
}

#[tokio::test]
async fn what_is_not_stored_does_not_restart_the_ttl() {
    let (shop, clock) = on_a_clock(KeyPolicy::required()).await;
    shop.assert_runs(1, "nothing").await;
    clock.advance(24 * HOUR - SECOND);
    assert_eq!(shop.sees().await, "201 run 1");
    assert!(shop.ask("panic").try_send().await.is_err());
    assert_eq!(shop.ask("large").send().await.code(), 200);
    assert_eq!(shop.sees().await, "201 run 1");
    clock.advance(SECOND);
    shop.assert_runs(6, "nothing").await;
}

/// The record is gone when the run on it ends: what ran is recorded all the same, or runs as the first again; but never both.
#[tokio::test]
async fn a_record_that_expires_during_its_conflict() {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let config = Config::default().env(env).ttl(60 * SECOND).lock(patient());
    let shop = Shop::on(storage, config).await;
    shop.assert_runs(1, "nothing").await;
    clock.advance(55 * SECOND);
    let conflict = shop.call().header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    // Less than a lease, so that the run is as alive as can be.
    clock.advance(10 * SECOND);
    shop.work.gate.open(1);
    let conflict = conflict.await.unwrap();
    assert_eq!((conflict.code(), conflict.text()), (201, "run 2"));
    shop.layer.drain().await;
    let next = shop.call().send().await;
    let saw = saw(&next);
    assert!(["nothing", "201 run 2"].contains(&saw), "{saw}");
}

/// The first answer waits for the storage, here alone, and is replaced there.
#[tokio::test]
async fn an_answer_that_is_still_to_be_stored_is_replaced() {
    let memory = MemoryStorage::new();
    let storage = FaultyStorage::new(memory.clone());
    storage.set(Operation::Complete, Fault::FailBefore);
    let shop = Shop::on(storage.clone(), Config::default().lock(patient())).await;
    let first = shop.assert_runs(1, "nothing").await;
    assert_eq!(shop.events.count("deferred"), 1);
    shop.assert_runs(2, "201 run 1").await;
    shop.assert_runs(3, "201 run 2").await;
    assert_eq!(shop.sees().await, "201 run 3");

    storage.heal(Operation::Complete);
    shop.layer.drain().await;
    assert_eq!(stored_body(&memory, &first).await, "run 3");
    assert_eq!(shop.sees().await, "201 run 3");
}

/// What a server that has nothing but the storage would replay.
async fn stored_body(storage: &MemoryStorage, answer: &Answer) -> Bytes {
    match storage.get(&encoded(answer)).await.unwrap() {
        Some(Entry::Completed(record)) => match record.outcome {
            Outcome::Response(stored) => stored.body().clone(),
            Outcome::Tombstone(reason) => panic!("a tombstone: {reason}"),
        },
        other => panic!("not a record but {other:?}"),
    }
}

/// It is stored while the conflict runs: the older answer does not come after the newer one.
#[tokio::test]
async fn an_answer_that_gets_stored_while_its_conflict_runs_is_replaced() {
    let memory = MemoryStorage::new();
    let storage = FaultyStorage::new(memory.clone());
    storage.set(Operation::Complete, Fault::FailBefore);
    let shop = Shop::on(storage.clone(), Config::default().lock(patient())).await;
    let first = shop.assert_runs(1, "nothing").await;
    let conflict = shop.call().header("x-gate", "").start();
    shop.work.gate.arrived(1).await;
    storage.heal(Operation::Complete);
    shop.events.until("completed", 1).await;
    shop.work.gate.open(1);
    assert_eq!(saw(&conflict.await.unwrap()), "201 run 1");
    assert_eq!(shop.sees().await, "201 run 2");
    shop.layer.drain().await;
    assert_eq!(stored_body(&memory, &first).await, "run 2");
}

/// The client gets its answer, and there is still a record.
#[tokio::test]
async fn a_storage_that_can_not_replace() {
    let storage = FaultyStorage::new(MemoryStorage::new());
    let shop = Shop::on(storage.clone(), Config::default().lock(patient())).await;
    shop.assert_runs(1, "nothing").await;
    storage.set(Operation::Replace, Fault::FailBefore);
    shop.assert_runs(2, "201 run 1").await;
    storage.heal(Operation::Replace);
    shop.layer.drain().await;
    let saw = shop.sees().await;
    assert!(["201 run 1", "201 run 2"].contains(&&*saw), "{saw}");
    let run = shop.runs();
    shop.call().send().await;
    assert_eq!(shop.sees().await, format!("201 run {}", run + 1));
}

#[tokio::test]
async fn a_named_cache_has_the_record() {
    let layer =
        IdempotencyLayer::enforce(MemoryStorage::new()).cache("orders", MemoryStorage::new());
    let policy = KeyPolicy::required().cache_name("orders").manual();
    let router = Router::new()
        .route("/orders", post(order.idempotency_key(policy)))
        .layer(layer.clone())
        .with_state(Work::default());
    let server = Server::start(router).await;
    let call = || server.post("/orders").key("abc").send();
    let first = call().await;
    assert_ran(&first, 1, "nothing");
    assert_ran(&call().await, 2, "201 run 1");
    assert_ran(&call().await, 3, "201 run 2");
    let key = encoded(&first);
    assert!(
        layer
            .engine_of("orders")
            .unwrap()
            .get(&key)
            .await
            .unwrap()
            .is_some()
    );
    assert!(layer.engine().get(&key).await.unwrap().is_none());
}
