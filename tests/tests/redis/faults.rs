//! What is no record, servers that don't answer, scripts that are forgotten, channels that are forbidden.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http::{HeaderMap, StatusCode};
use idempotency_axum::{
    Begin, Config, Held, LockPolicy, Outcome, Record, RedisStorage, Storage, StorageErrorKind,
    StoredResponse, Token,
};
use idempotency_tests::{
    Gate, PATIENCE,
    redis::{Proxy, Redis},
};

use super::{KEY, Shop, assert_replays, claim, until};

#[tokio::test]
async fn a_stalled_redis_keeps_nobody_longer_than_the_limit() {
    let redis = Redis::start();
    let shop = Shop::open(RedisStorage::connect(redis.url()).await.unwrap()).await;
    assert_eq!(shop.order("before").await.code(), 201);
    redis.stall();
    let since = Instant::now();
    let keys: Vec<_> = (0..20).map(|n| format!("k{n}")).collect();
    for answer in join_all(keys.iter().map(|key| shop.order(key))).await {
        assert_eq!(answer.code(), 503, "{answer:?}");
    }
    // The limit is 1 s; the rest is for a busy machine. Without a limit this would never end.
    assert!(
        since.elapsed() < Duration::from_secs(30),
        "{:?}",
        since.elapsed()
    );
    assert_eq!(shop.runs.count(), 1);

    redis.go_on();
    // Redis may have taken claims by now; they are given back.
    let answer = until(async || {
        let answer = shop.order("k0").await;
        (answer.code() != 503 && answer.code() != 423).then_some(answer)
    });
    assert_eq!(answer.await.code(), 201);
    assert_replays(&shop.order("before").await, "before 1");
}

#[tokio::test]
async fn a_connection_that_went_silent_is_replaced() {
    let redis = Redis::start();
    let proxy = Proxy::start(&redis);
    let storage = RedisStorage::connect(proxy.url()).await.unwrap();
    let storage = storage.time_limit(Duration::from_millis(200));
    let mut silent = proxy.hold("\r\nGET\r\n");
    for _ in 0..3 {
        let error = storage.get(&KEY).await.unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Timeout, "{error:?}");
    }
    silent.there().await;
    let got = until(async || storage.get(&KEY).await.ok()).await;
    assert_eq!(got, None);
}

/// Over a network on which the record takes longer than a command may; what is sent behind it waits.
#[tokio::test]
async fn a_record_that_takes_longer_than_the_limit_arrives() {
    let redis = Redis::start();
    let proxy = Proxy::start(&redis);
    let storage = RedisStorage::connect(proxy.url()).await.unwrap();
    let storage = storage.time_limit(Duration::from_millis(400));
    let claim = claim();
    let begun = until(async || storage.begin(&KEY, &claim).await.ok());
    assert_eq!(begun.await, Begin::Acquired);
    let body = "x".repeat(4 << 20);
    let response = StoredResponse::new(StatusCode::CREATED, &HeaderMap::new(), body);
    let record = Record {
        fingerprint: None,
        outcome: Outcome::Response(response),
    };
    let ttl = Duration::from_secs(60);
    // Four seconds for the record.
    proxy.slow_down(1 << 20);
    let error = storage
        .complete(&KEY, claim.token, &record, ttl)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Timeout, "{error:?}");
    let mut timeouts = 0;
    let renewed = until(async || {
        let renewed = storage.renew(&KEY, claim.token, claim.lease).await;
        timeouts += usize::from(renewed.is_err());
        renewed.ok()
    });
    // Soon over another connection, while the record is on its way.
    assert_eq!(renewed.await, Held::Yes);
    assert!(timeouts <= 5, "{timeouts}");
    let stored = until(async || {
        let name = format!("idempotency:{KEY}");
        let length: usize = redis.ask(&["STRLEN", &name]).await;
        (length > 4 << 20).then_some(())
    });
    stored.await;
    let held = until(async || storage.renew(&KEY, claim.token, claim.lease).await.ok());
    assert_eq!(held.await, Held::Lost);
}

#[tokio::test]
async fn what_is_no_record_is_refused_until_it_is_removed() {
    let redis = Redis::start();
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    let name = format!("idempotency:{KEY}");
    let record = storage_record();
    for foreign in [
        &["LPUSH", &name, "a job"][..],
        &["SET", &name, "a session"],
        &["SET", &name, ""],
        &[
            "SET",
            &name,
            "r2 of a newer version, which nobody can read yet",
        ],
        &["SET", &name, "c1 of a claim that was cut"],
        &["HSET", &name, "field", "value"],
    ] {
        let _: idempotency_axum::redis::Value = redis.ask(foreign).await;
        let before: Vec<u8> = redis.ask(&["DUMP", &name]).await;
        let begun = storage.begin(&KEY, &claim()).await.unwrap_err();
        assert_eq!(begun.kind(), StorageErrorKind::Unreadable, "{foreign:?}");
        let got = storage.get(&KEY).await.unwrap_err();
        assert_eq!(got.kind(), StorageErrorKind::Unreadable, "{foreign:?}");
        let ttl = Duration::from_secs(60);
        // A claim that was cut belongs to somebody all the same.
        match storage.complete(&KEY, Token::random(), &record, ttl).await {
            Err(error) => assert_eq!(error.kind(), StorageErrorKind::Unreadable, "{foreign:?}"),
            Ok(held) => assert_eq!(held, Held::Lost, "{foreign:?}"),
        }
        let after: Vec<u8> = redis.ask(&["DUMP", &name]).await;
        assert_eq!(before, after, "it was changed: {foreign:?}");
        assert!(storage.remove(&KEY).await.unwrap());
        assert_eq!(
            storage.begin(&KEY, &claim()).await.unwrap(),
            Begin::Acquired
        );
        assert!(storage.remove(&KEY).await.unwrap());
    }
}

fn storage_record() -> idempotency_axum::Record {
    idempotency_tests::node::record("answer")
}

#[tokio::test]
async fn scripts_that_redis_forgot_are_sent_again() {
    let redis = Redis::start();
    let shop = Shop::open(RedisStorage::connect(redis.url()).await.unwrap()).await;
    for key in ["a", "b"] {
        let _: String = redis.ask(&["SCRIPT", "FLUSH"]).await;
        assert_eq!(shop.order(key).await.code(), 201);
    }
    assert_eq!(shop.events.count("storage_failed"), 0);
}

/// A wait that is begun while its runtime shuts down ends, like everything there.
#[test]
fn a_runtime_that_shuts_down_takes_its_waits_along() {
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
    };
    let (outer, inner) = (runtime(), runtime());
    let redis = Redis::start();
    let storage = outer
        .block_on(async { RedisStorage::connect(redis.url()).await })
        .unwrap();
    // On a thread that outlives the runtime in whose context it waits.
    let handle = inner.handle().clone();
    inner.shutdown_background();
    let (done, waited) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _context = handle.enter();
        let wait = std::pin::pin!(storage.wait(&KEY, Duration::from_secs(60)));
        let waited = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            futures_util::FutureExt::now_or_never(wait).is_some()
        }));
        // Sleeping on a runtime that is gone is a panic of tokio's, which is its business.
        done.send(waited.is_ok()).unwrap();
    });
    let ended = waited.recv_timeout(PATIENCE);
    assert!(ended.is_ok(), "the wait never came back");
}

/// Redis 7 gives new users no channels.
#[tokio::test]
async fn without_a_right_to_the_channels_duplicates_look() {
    let redis = Redis::start();
    let rights = [
        "ACL",
        "SETUSER",
        "shop",
        "on",
        ">secret",
        "~idempotency:*",
        "+@all",
        "resetchannels",
    ];
    let _: String = redis.ask(&rights).await;
    let url = format!("{}?user=shop&pass=secret", redis.url());
    let gate = Gate::new();
    let first = Shop::gated(RedisStorage::connect(&url).await.unwrap(), &gate).await;
    let waits =
        |config: Config| config.lock(LockPolicy::default().timeout(Duration::from_secs(30)));
    let second = Shop::with(RedisStorage::connect(&url).await.unwrap(), waits, None).await;
    let running = first.server.post("/orders").key("k").start();
    gate.arrived(1).await;
    let duplicate = second.server.post("/orders").key("k").start();
    second.events.until("waiting", 1).await;
    gate.open(1);
    assert_eq!(running.await.unwrap().code(), 201);
    assert_replays(&duplicate.await.unwrap(), "k 1");
}
