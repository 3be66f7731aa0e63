//! Redis is full, may evict, or has replicas.

use std::{error::Error as _, time::Duration};

use idempotency_axum::{
    Begin, EncodedKey, Entry, Held, Outcome, Record, RedisConnectErrorKind, RedisStorage, Storage,
    StorageErrorKind, StoredResponse, TombstoneReason,
    redis::{
        self,
        sentinel::{SentinelClient, SentinelServerType},
    },
};
use idempotency_tests::{
    Gate, Logs, PATIENCE,
    redis::{Cluster, Redis},
};

use super::{KEY, Shop, assert_replays, claim, until};

const TTL: Duration = Duration::from_secs(60);

fn large() -> Record {
    let body = "x".repeat(100_000);
    Record {
        fingerprint: None,
        outcome: Outcome::Response(StoredResponse::new(
            http::StatusCode::CREATED,
            &http::HeaderMap::new(),
            body,
        )),
    }
}

#[tokio::test]
async fn an_answer_for_which_there_is_no_room_is_a_tombstone() {
    let (logs, _guard) = Logs::install();
    let redis = Redis::start();
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    let claim = claim();
    assert_eq!(storage.begin(&KEY, &claim).await.unwrap(), Begin::Acquired);
    let _: String = redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;

    let held = storage.complete(&KEY, claim.token, &large(), TTL).await;
    assert_eq!(held.unwrap(), Held::Yes);
    assert_eq!(
        logs.with(&["WARN", "tombstone"]).len(),
        1,
        "{:?}",
        logs.lines()
    );
    let Some(Entry::Completed(record)) = storage.get(&KEY).await.unwrap() else {
        panic!("no record");
    };
    assert_eq!(record.outcome, Outcome::Tombstone(TombstoneReason::NoRoom));
    // Sent again, it is known as done.
    let held = storage.complete(&KEY, claim.token, &large(), TTL).await;
    assert_eq!(held.unwrap(), Held::Yes);

    // Who looks for it finds it, though there is no room for a claim.
    let found = storage.begin(&KEY, &super::claim()).await.unwrap();
    assert_eq!(found, Begin::Completed(record));

    let other = EncodedKey::from_bytes([8; 32]);
    let refused = storage.begin(&other, &claim).await.unwrap_err();
    assert_eq!(refused.kind(), StorageErrorKind::Full, "{refused:?}");
    let cure = refused.source().unwrap().to_string();
    assert!(cure.contains("`maxmemory` of Redis"), "{cure}");
    assert!(!format!("{refused} {cure}").contains("max_bytes"));
}

/// Redis refuses to `SET` before it looks whether something is there.
#[tokio::test]
async fn a_full_memory_keeps_no_retry_from_its_answer() {
    let redis = Redis::start();
    let gate = Gate::new();
    gate.open(1);
    let shop = Shop::gated(RedisStorage::connect(redis.url()).await.unwrap(), &gate).await;
    assert_eq!(shop.order("done").await.code(), 201);
    let running = shop.server.post("/orders").key("running").start();
    gate.arrived(2).await;
    let _: String = redis.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;

    assert_replays(&shop.order("done").await, "done 1");
    let other = Shop::open(RedisStorage::connect(redis.url()).await.unwrap()).await;
    assert_eq!(other.order("running").await.code(), 423);
    assert_eq!(other.order("new").await.code(), 503);
    gate.open(1);
    assert_eq!(running.await.unwrap().code(), 201);
    // There was no room for its answer.
    let conflict = other.order("running").await;
    assert_eq!((conflict.code(), conflict.is_replay()), (409, false));
    assert_eq!(other.runs.count(), 0);
}

/// The disk of Redis is full, or it has fewer replicas than it wants: it reads, and refuses to write.
#[tokio::test]
async fn a_redis_that_refuses_writes_keeps_no_retry_from_its_answer() {
    for code in ["MISCONF", "NOREPLICAS", "NOPERM"] {
        let redis = Redis::start();
        let rights = [
            "ACL", "SETUSER", "shop", "on", ">secret", "~*", "&*", "+@all",
        ];
        let _: String = redis.ask(&rights).await;
        let url = format!("{}?user=shop&pass=secret", redis.url());
        let gate = Gate::new();
        gate.open(1);
        let shop = Shop::gated(RedisStorage::connect(&url).await.unwrap(), &gate).await;
        assert_eq!(shop.order("done").await.code(), 201);
        let running = shop.server.post("/orders").key("running").start();
        gate.arrived(2).await;
        let allow = match code {
            "MISCONF" => {
                // A file that can't be written.
                std::fs::create_dir(redis.directory().join("dump.rdb")).unwrap();
                let _: String = redis.ask(&["CONFIG", "SET", "save", "3600 1"]).await;
                let _: String = redis.ask(&["BGSAVE"]).await;
                until(async || {
                    let info: String = redis.ask(&["INFO", "persistence"]).await;
                    info.contains("rdb_last_bgsave_status:err").then_some(())
                })
                .await;
                vec!["CONFIG", "SET", "stop-writes-on-bgsave-error", "no"]
            }
            "NOREPLICAS" => {
                let _: String = redis
                    .ask(&["CONFIG", "SET", "min-replicas-to-write", "1"])
                    .await;
                vec!["CONFIG", "SET", "min-replicas-to-write", "0"]
            }
            _ => {
                let _: String = redis.ask(&["ACL", "SETUSER", "shop", "-set"]).await;
                vec!["ACL", "SETUSER", "shop", "+set"]
            }
        };

        let other = RedisStorage::connect(&url).await.unwrap();
        let error = other.begin(&KEY, &claim()).await.unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Unavailable);
        let cause = error.source().unwrap().to_string();
        assert!(cause.to_uppercase().contains(code), "{cause}");
        let other = Shop::open(other).await;
        assert_replays(&shop.order("done").await, "done 1");
        assert_replays(&other.order("done").await, "done 1");
        assert_eq!(other.order("running").await.code(), 423, "{code}");
        assert_eq!(other.order("new").await.code(), 503, "{code}");
        assert_eq!(other.runs.count(), 0, "{code}");

        // What could not be written is written later.
        gate.open(1);
        assert_eq!(running.await.unwrap().code(), 201, "{code}");
        let _: String = redis.ask(&allow).await;
        let replay = until(async || {
            let answer = other.order("running").await;
            (answer.code() == 409).then_some(answer)
        });
        assert_replays(&replay.await, "running 2");
    }
}

#[tokio::test]
async fn a_server_that_may_evict_is_warned_of_or_refused() {
    let redis = Redis::start();
    let set = async |name: &str, value: &str| {
        let _: String = redis.ask(&["CONFIG", "SET", name, value]).await;
    };
    let (logs, _guard) = Logs::install();
    let connect = || RedisStorage::connect(redis.url());

    // No limit, or a limit at which it refuses: nothing is evicted.
    for (limit, policy) in [("0", "allkeys-lru"), ("100mb", "noeviction")] {
        set("maxmemory", limit).await;
        set("maxmemory-policy", policy).await;
        let _ = connect().require_noeviction().await.unwrap();
        assert!(logs.lines().is_empty(), "{:?}", logs.lines());
    }
    for policy in ["allkeys-lru", "volatile-ttl", "allkeys-random"] {
        set("maxmemory-policy", policy).await;
        let error = connect().require_noeviction().await.unwrap_err();
        assert_eq!(error.kind(), RedisConnectErrorKind::Evicts);
        assert!(error.to_string().contains(policy), "{error}");
        assert!(
            error.to_string().contains("maxmemory-policy noeviction"),
            "{error}"
        );
        assert!(logs.with(&["WARN", policy]).is_empty());
        let _ = connect().await.unwrap();
        assert_eq!(logs.with(&["WARN", policy]).len(), 1, "{:?}", logs.lines());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_master_of_a_cluster_is_looked_at() {
    let cluster = Cluster::start().await;
    let connect = || RedisStorage::connect(cluster.url());
    let _ = connect().require_noeviction().await.unwrap();
    for (name, value) in [("maxmemory", "100mb"), ("maxmemory-policy", "allkeys-lfu")] {
        let _: String = cluster.master(2).ask(&["CONFIG", "SET", name, value]).await;
    }
    let error = connect().require_noeviction().await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Evicts, "{error:?}");
    assert!(error.to_string().contains("allkeys-lfu"), "{error}");
    let _ = connect().await.unwrap();
}

#[tokio::test]
async fn a_claim_waits_for_its_replicas() {
    let redis = master();
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    let storage = storage.wait_replicas(1, Duration::from_millis(100));
    let error = storage.begin(&KEY, &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);
    // It was given back.
    assert_eq!(storage.get(&KEY).await.unwrap(), None);

    let replica = replica_of(&redis).await;
    let storage = storage.time_limit(PATIENCE).wait_replicas(1, PATIENCE);
    assert_eq!(
        storage.begin(&KEY, &claim()).await.unwrap(),
        Begin::Acquired
    );
    let there: bool = replica
        .ask(&["EXISTS", &format!("idempotency:{KEY}")])
        .await;
    assert!(there, "the replica has it");
}

fn master() -> Redis {
    Redis::builder()
        .on_a_port()
        .with(&["--repl-diskless-sync-delay", "0"])
        .start()
}

/// A master that was cut off would go on alone; it can be told not to.
#[tokio::test]
async fn a_master_without_its_replicas_may_refuse_claims() {
    let redis = Redis::start();
    let _: String = redis
        .ask(&["CONFIG", "SET", "min-replicas-to-write", "1"])
        .await;
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    let error = storage.begin(&KEY, &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error:?}");
    let text = format!("{error:?}");
    assert!(text.contains("NOREPLICAS"), "{text}");
}

/// A replica that has all that the master has.
async fn replica_of(master: &Redis) -> Redis {
    let port = master.port().to_string();
    let replica = Redis::builder()
        .on_a_port()
        .with(&["--replicaof", "127.0.0.1", &port])
        .start();
    until(async || {
        let about: String = master.ask(&["INFO", "replication"]).await;
        about.contains("state=online").then_some(())
    })
    .await;
    replica
}

#[tokio::test]
async fn sentinels_tell_who_is_master() {
    let mut old = master();
    let new = replica_of(&old).await;
    let sentinel = Redis::builder().sentinel_of(old.port()).start();
    let location = format!("redis://127.0.0.1:{}", sentinel.port());
    let client = SentinelClient::build(
        vec![location.clone()],
        "mymaster",
        None,
        SentinelServerType::Master,
    );
    let storage = RedisStorage::sentinel(client.unwrap());
    let storage = storage.time_limit(PATIENCE).wait_replicas(1, PATIENCE);
    let first = claim();
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);

    // The sentinel has to know of a replica, before it can make a master of it.
    let sentinel = redis::Client::open(location).unwrap();
    let mut sentinel = sentinel.get_multiplexed_async_connection().await.unwrap();
    until(async || {
        let mut replicas = redis::cmd("SENTINEL");
        replicas.arg("REPLICAS").arg("mymaster");
        let known: Vec<redis::Value> = replicas.query_async(&mut sentinel).await.unwrap();
        (!known.is_empty()).then_some(())
    })
    .await;
    old.kill();
    let storage = storage.wait_replicas(0, Duration::from_millis(1));
    let begun = until(async || storage.begin(&KEY, &claim()).await.ok()).await;
    assert!(matches!(begun, Begin::InFlight { .. }), "{begun:?}");
    let record = large();
    let held = storage.complete(&KEY, first.token, &record, TTL).await;
    assert_eq!(held.unwrap(), Held::Yes);
    let role: redis::Value = new.ask(&["ROLE"]).await;
    assert!(format!("{role:?}").contains("master"), "{role:?}");
}

#[tokio::test]
async fn who_waits_behind_sentinels_is_told() {
    let redis = master();
    let sentinel = Redis::builder().sentinel_of(redis.port()).start();
    let locations = vec![format!("redis://127.0.0.1:{}", sentinel.port())];
    let client = SentinelClient::build(locations, "mymaster", None, SentinelServerType::Master);
    let storage = RedisStorage::sentinel(client.unwrap());
    let claim = claim();
    assert_eq!(storage.begin(&KEY, &claim).await.unwrap(), Begin::Acquired);

    let mut monitor = redis.monitor().await;
    let completed = async {
        let subscribe = format!("\"SUBSCRIBE\" \"idempotency:{KEY}\"");
        let mut commands = Vec::new();
        until(async || {
            commands.extend(monitor.commands().await);
            // It looks once more after that, and then much later.
            let mut since = commands.iter().skip_while(|command| **command != subscribe);
            let has_looked = since.any(|command| command.starts_with("\"EVALSHA\""));
            has_looked.then_some(())
        })
        .await;
        storage.complete(&KEY, claim.token, &large(), TTL).await
    };
    let (waited, held) = tokio::join!(storage.wait(&KEY, PATIENCE), completed);
    waited.unwrap();
    assert_eq!(held.unwrap(), Held::Yes);
    let commands = monitor.commands().await;
    let scripts = commands
        .iter()
        .filter(|command| command.starts_with("\"EVALSHA\""));
    assert_eq!(scripts.count(), 1, "it looked: {commands:#?}");
}

#[tokio::test]
async fn a_silent_sentinel_delays_the_others_and_no_more() {
    let redis = master();
    let sentinel = Redis::builder().sentinel_of(redis.port()).start();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let locations = vec![
        format!("redis://{}", silent.local_addr().unwrap()),
        format!("redis://127.0.0.1:{}", sentinel.port()),
    ];
    let client = SentinelClient::build(locations, "mymaster", None, SentinelServerType::Master);
    let storage = RedisStorage::sentinel(client.unwrap());
    let begun = until(async || storage.begin(&KEY, &claim()).await.ok()).await;
    assert_eq!(begun, Begin::Acquired);
}
