//! Nodes of a Cluster that die, say nothing, or give their slots away.

use std::{error::Error as _, pin::pin, time::Duration};

use idempotency_axum::{
    Begin, EncodedKey, Entry, Env, Held, NewClaim, Outcome, RedisConnectErrorKind, RedisStorage,
    Storage, StorageErrorKind, Token,
};
use idempotency_tests::redis::{Cluster, Redis};

use super::{KEY, claim, until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_master_takes_only_its_keys() {
    let mut cluster = Cluster::start().await;
    let storage = RedisStorage::connect(cluster.url()).await.unwrap();
    let mut keys = Vec::new();
    for master in 0..3 {
        keys.push(cluster.key_on(master, "idempotency", 0).await);
    }
    let claim = NewClaim {
        token: Token::random(),
        fingerprint: None,
        lease: Duration::from_secs(60),
    };
    for key in &keys {
        assert_eq!(storage.begin(key, &claim).await.unwrap(), Begin::Acquired);
    }

    cluster.kill(1);

    // The others may have to be asked anew, through connections that have not noticed yet.
    let other = NewClaim {
        token: Token::random(),
        ..claim
    };
    for master in [0, 2] {
        let begun = storage.begin(&keys[master], &other).await;
        assert!(
            matches!(begun, Ok(Begin::InFlight { .. })),
            "{master}: {begun:?}"
        );
    }
    let error = storage.begin(&keys[1], &other).await.unwrap_err();
    let kinds = [StorageErrorKind::Unavailable, StorageErrorKind::Timeout];
    assert!(kinds.contains(&error.kind()), "{error:?}");
    for master in [0, 2] {
        let begun = storage.begin(&keys[master], &other).await;
        assert!(
            matches!(begun, Ok(Begin::InFlight { .. })),
            "{master}: {begun:?}"
        );
    }
}

/// It lets everybody connect, and says nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_master_delays_no_other_key() {
    let mut cluster = Cluster::start().await;
    let storage = RedisStorage::connect(cluster.url()).await.unwrap();
    let claim = NewClaim {
        token: Token::random(),
        fingerprint: None,
        lease: Duration::from_secs(60),
    };
    let mut keys = Vec::new();
    for master in 0..3 {
        let key = cluster.key_on(master, "idempotency", 0).await;
        assert_eq!(storage.begin(&key, &claim).await.unwrap(), Begin::Acquired);
        keys.push(key);
    }
    let silent = cluster.master(1).port();
    cluster.kill(1);
    let _silent = std::net::TcpListener::bind(("127.0.0.1", silent)).unwrap();

    let failing = async {
        for _ in 0..4 {
            let error = storage.renew(&keys[1], claim.token, claim.lease).await;
            let error = error.unwrap_err();
            let kinds = [StorageErrorKind::Unavailable, StorageErrorKind::Timeout];
            assert!(kinds.contains(&error.kind()), "{error:?}");
        }
    };
    let mut failing = pin!(failing);
    let mut renewed = 0;
    loop {
        for master in [0, 2] {
            let held = storage.renew(&keys[master], claim.token, claim.lease);
            assert_eq!(held.await.unwrap(), Held::Yes, "{master}");
            renewed += 1;
        }
        let pause = tokio::time::timeout(Duration::from_millis(20), failing.as_mut());
        if pause.await.is_ok() {
            break;
        }
    }
    // The other one took a second for each of its renewals.
    assert!(renewed > 20, "{renewed}");
}

/// As resharding does it: first the keys go, one by one, and then the slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_moves_is_followed() {
    let cluster = Cluster::start().await;
    let storage = RedisStorage::connect(cluster.url()).await.unwrap();
    let key = cluster.key_on(0, "idempotency", 0).await;
    let claim = claim();
    assert_eq!(storage.begin(&key, &claim).await.unwrap(), Begin::Acquired);

    let [from, to] = [0, 1].map(|master| cluster.master(master));
    moving(from, to, &key).await;
    migrate(from, to, &key).await;
    let follows = async || {
        let found = storage.get(&key).await.unwrap();
        assert!(matches!(found, Some(Entry::Claimed { .. })), "{found:?}");
        let held = storage.renew(&key, claim.token, claim.lease).await;
        assert_eq!(held.unwrap(), Held::Yes);
    };
    follows().await;

    give(&[to, from, cluster.master(2)], to, &key).await;
    follows().await;
    follows().await;
    let released = storage.release(&key, claim.token).await;
    assert_eq!(released.unwrap(), Held::Yes);
}

/// What it would be told is not of the connection that claimed. A Cluster has no second database either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_cluster_does_not_have() {
    let cluster = Cluster::start().await;
    let storage = RedisStorage::connect(cluster.url()).await.unwrap();
    let waiting = storage.clone().wait_replicas(1, Duration::from_millis(100));
    let error = waiting.begin(&KEY, &claim()).await.unwrap_err();
    let cause = error.source().unwrap().to_string();
    assert!(cause.contains("`wait_replicas`"), "{cause}");
    assert_eq!(storage.get(&KEY).await.unwrap(), None);

    let waiting = RedisStorage::connect(cluster.url()).wait_replicas(1, Duration::from_millis(100));
    let error = waiting.await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Unsupported);
    assert!(error.to_string().contains("`wait_replicas`"), "{error}");
    let database = format!("redis://127.0.0.1:{}/2", cluster.master(0).port());
    let error = RedisStorage::connect(database).await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Unsupported);
    assert!(error.to_string().contains("only 0"), "{error}");
}

/// As after a failover.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_new_owner_of_a_slot_is_found_when_the_old_one_is_gone() {
    for is_silent in [false, true] {
        let mut cluster = Cluster::start().await;
        let storage = RedisStorage::connect(cluster.url()).await.unwrap();
        let key = cluster.key_on(1, "idempotency", 0).await;
        let new = claim();
        assert_eq!(storage.begin(&key, &new).await.unwrap(), Begin::Acquired);
        let port = cluster.master(1).port();
        cluster.kill(1);
        let _silent = is_silent.then(|| std::net::TcpListener::bind(("127.0.0.1", port)).unwrap());

        let owner = id(cluster.master(0)).await;
        let slot = slot(cluster.master(0), &key).await;
        for master in [0, 2] {
            let set = ["CLUSTER", "SETSLOT", &slot, "NODE", &owner];
            let _: String = cluster.master(master).ask(&set).await;
        }
        // Of its claim it knows nothing.
        let mut failures = 0;
        let begun = until(async || {
            let begun = storage.begin(&key, &claim()).await;
            failures += usize::from(begun.is_err());
            begun.ok()
        });
        assert_eq!(begun.await, Begin::Acquired);
        assert!(failures <= 3, "silent: {is_silent}, {failures} failures");
    }
}

/// What the other node refuses is known by its kind, as everywhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_moves_to_a_node_without_memory() {
    let cluster = Cluster::start().await;
    let storage = RedisStorage::connect(cluster.url()).await.unwrap();
    let key = cluster.key_on(0, "idempotency", 0).await;
    let [from, to] = [0, 1].map(|master| cluster.master(master));
    moving(from, to, &key).await;
    let memory = async |limit: &str| {
        let set = ["CONFIG", "SET", "maxmemory", limit];
        let _: String = to.ask(&set).await;
    };
    memory("1").await;
    let error = storage.begin(&key, &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Full, "{error:?}");

    memory("0").await;
    let claim = claim();
    assert_eq!(storage.begin(&key, &claim).await.unwrap(), Begin::Acquired);
    memory("1").await;
    let record = idempotency_tests::node::record("an answer");
    let ttl = Duration::from_secs(60);
    let completed = storage.complete(&key, claim.token, &record, ttl).await;
    assert_eq!(completed.unwrap(), Held::Yes);
    let found = storage.get(&key).await.unwrap();
    assert!(
        matches!(&found, Some(Entry::Completed(record)) if matches!(record.outcome, Outcome::Tombstone(_))),
        "{found:?}"
    );
}

/// No call is told that the claim is its own, whichever connection it goes through.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_is_followed() {
    let mut cluster = Cluster::start().await;
    let replica = Redis::builder()
        .on_a_port()
        .cluster_node()
        .with(&["--cluster-node-timeout", "1000"])
        .start();
    let (port, master) = (
        cluster.master(0).port().to_string(),
        id(cluster.master(1)).await,
    );
    let bus: Vec<String> = cluster
        .master(0)
        .ask(&["CONFIG", "GET", "cluster-port"])
        .await;
    let meet = ["CLUSTER", "MEET", "127.0.0.1", &port, &bus[1]];
    let _: String = replica.ask(&meet).await;
    let tells = async |of: &[&str], text: &str| {
        until(async || {
            let told: String = replica.ask(of).await;
            told.contains(text).then_some(())
        })
        .await;
    };
    tells(&["CLUSTER", "NODES"], &master).await;
    let _: String = replica.ask(&["CLUSTER", "REPLICATE", &master]).await;
    tells(&["INFO", "replication"], "master_link_status:up").await;

    let storage = RedisStorage::connect(cluster.url()).await.unwrap();
    let key = cluster.key_on(1, "idempotency", 0).await;
    let first = claim();
    assert_eq!(storage.begin(&key, &first).await.unwrap(), Begin::Acquired);
    tells(&["INFO", "keyspace"], "keys=1").await;

    cluster.kill(1);
    let (tell, told) = tokio::sync::oneshot::channel();
    let (renewing, token, lease) = (storage.clone(), first.token, first.lease);
    Env::system().background().unwrap().spawn(async move {
        let mut pace = tokio::time::interval(Duration::from_millis(20));
        let renewed = loop {
            pace.tick().await;
            if let Ok(renewed) = renewing.renew(&key, token, lease).await {
                break renewed;
            }
        };
        let _ = tell.send(renewed);
    });
    let begun = until(async || storage.begin(&key, &claim()).await.ok());
    let begun = begun.await;
    assert!(matches!(begun, Begin::InFlight { .. }), "{begun:?}");
    assert_eq!(told.await.unwrap(), Held::Yes);

    let waits = storage.wait(&key, Duration::from_secs(30));
    let completes = async {
        let record = idempotency_tests::node::record("an answer");
        let ttl = Duration::from_secs(60);
        storage.complete(&key, first.token, &record, ttl).await
    };
    let (waited, completed) = tokio::join!(waits, completes);
    waited.unwrap();
    assert_eq!(completed.unwrap(), Held::Yes);
    drop(replica);
}

/// They say `?` where the name of their host should be that they don't have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_go_by_names() {
    for name in ["", "localhost"] {
        let cluster = Cluster::start().await;
        for master in 0..3 {
            for (setting, value) in [
                ("cluster-announce-hostname", name),
                ("cluster-preferred-endpoint-type", "hostname"),
            ] {
                let set = ["CONFIG", "SET", setting, value];
                let _: String = cluster.master(master).ask(&set).await;
            }
        }
        let storage = RedisStorage::connect(cluster.url()).await.unwrap();
        let key = cluster.key_on(0, "idempotency", 0).await;
        let claim = claim();
        assert_eq!(storage.begin(&key, &claim).await.unwrap(), Begin::Acquired);
        let [from, to] = [0, 1].map(|master| cluster.master(master));
        moving(from, to, &key).await;
        migrate(from, to, &key).await;
        give(&[to, from, cluster.master(2)], to, &key).await;
        // It is not sent twice where it could have been done.
        let released = storage.release(&key, claim.token).await;
        assert_eq!(released.unwrap(), Held::Yes, "{name}");
    }
}

/// Its password is part of a URL, its rights are those that the documentation lists, and all its keys are in one slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_of_a_cluster() {
    let cluster = Cluster::start().await;
    for master in 0..3 {
        let rights = "SETUSER shop:1 on >p@ss,w:rd/%{}# ~{shop}b{c:* &{shop}b{c:* -@all +set +get +getrange +exists +del \
            +pexpire +pttl +eval +evalsha +script|load +publish +subscribe +unsubscribe +info +cluster|slots +asking";
        let rights = rights.split_whitespace();
        let words: Vec<&str> = std::iter::once("ACL").chain(rights).collect();
        let _: String = cluster.master(master).ask(&words).await;
    }
    let login = "redis://shop%3A1:p%40ss%2Cw%3Ard%2F%25%7B%7D%23@";
    let url = cluster.url().replace("redis://", login);
    let storage = RedisStorage::connect(&url).prefix("{shop}b{c");
    let storage = storage.await.unwrap();
    for n in 0..10 {
        let key = EncodedKey::from_bytes([n; 32]);
        let claim = claim();
        assert_eq!(storage.begin(&key, &claim).await.unwrap(), Begin::Acquired);
        let released = storage.release(&key, claim.token).await;
        assert_eq!(released.unwrap(), Held::Yes);
    }
    // A slot that moves.
    let from = cluster.master_of("{shop}").await;
    let to = cluster.master((from + 1) % 3);
    let slot: u16 = to.ask(&["CLUSTER", "KEYSLOT", "{shop}"]).await;
    moving_slot(cluster.master(from), to, &slot.to_string()).await;
    let begun = storage.begin(&KEY, &claim()).await;
    assert_eq!(begun.unwrap(), Begin::Acquired);

    for master in 0..3 {
        let forbid = ["ACL", "SETUSER", "shop:1", "-cluster|slots"];
        let _: String = cluster.master(master).ask(&forbid).await;
    }
    let error = RedisStorage::connect(url).await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Refused, "{error:?}");
    let cause = error.source().unwrap().to_string();
    assert!(cause.contains("cluster|slots"), "{cause}");
}

/// Moves the slot of the key, until it is [given](give).
async fn moving(from: &Redis, to: &Redis, key: &EncodedKey) {
    moving_slot(from, to, &slot(from, key).await).await;
}

async fn moving_slot(from: &Redis, to: &Redis, slot: &str) {
    let [source, target] = [id(from).await, id(to).await];
    let importing = ["CLUSTER", "SETSLOT", slot, "IMPORTING", &source];
    let _: String = to.ask(&importing).await;
    let migrating = ["CLUSTER", "SETSLOT", slot, "MIGRATING", &target];
    let _: String = from.ask(&migrating).await;
}

async fn migrate(from: &Redis, to: &Redis, key: &EncodedKey) {
    let (port, name) = (to.port().to_string(), format!("idempotency:{key}"));
    let migrate = ["MIGRATE", "127.0.0.1", &port, &name, "0", "5000"];
    let _: String = from.ask(&migrate).await;
}

/// Tells all these nodes who has the slot of the key.
async fn give(nodes: &[&Redis], to: &Redis, key: &EncodedKey) {
    let (slot, owner) = (slot(to, key).await, id(to).await);
    for node in nodes {
        let set = ["CLUSTER", "SETSLOT", &slot, "NODE", &owner];
        let _: String = node.ask(&set).await;
    }
}

async fn id(node: &Redis) -> String {
    node.ask(&["CLUSTER", "MYID"]).await
}

async fn slot(node: &Redis, key: &EncodedKey) -> String {
    let slot: u16 = node
        .ask(&["CLUSTER", "KEYSLOT", &format!("idempotency:{key}")])
        .await;
    slot.to_string()
}
