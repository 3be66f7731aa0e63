//! Connections that are of no use any more, and what comes in their place.

use std::{sync::mpsc, time::Duration};

use futures_util::future::{BoxFuture, LocalBoxFuture, join_all};
use idempotency_axum::{
    Begin, Config, Entry, Env, Held, LockedStorage, RedisCache, RedisLock, RedisStorage, Storage,
    StorageErrorKind,
    redis::sentinel::{SentinelClient, SentinelServerType},
};
use idempotency_tests::{
    PATIENCE,
    redis::{Cluster, Proxy, Redis},
};
use tokio::runtime::{Builder, Runtime};

use super::{KEY, Shop, assert_replays, claim, until};

/// A name that leads to the new master, as a managed Redis has one; connections to the old one stay open.
#[tokio::test]
async fn a_master_that_has_become_a_replica_is_left() {
    let (old, new) = (Redis::start(), Redis::builder().on_a_port().start());
    let proxy = Proxy::start(&old);
    let shop = Shop::open(RedisStorage::connect(proxy.url()).await.unwrap()).await;
    assert_eq!(shop.order("before").await.code(), 201);

    let port = new.port().to_string();
    let _: String = old.ask(&["REPLICAOF", "127.0.0.1", &port]).await;
    // Nobody leads there yet.
    let refused = shop.order("during").await;
    assert_eq!(refused.code(), 503, "{refused:?}");
    proxy.lead_to(&new);
    let answer = until(async || {
        let answer = shop.order("after").await;
        (answer.code() != 503).then_some(answer)
    });
    assert_eq!(answer.await.code(), 201);
    assert_replays(&shop.order("after").await, "after 2");
    let names: Vec<String> = new.ask(&["KEYS", "*"]).await;
    assert_eq!(names.len(), 1, "{names:?}");
}

/// The limit of the engine is over before that of the storage.
#[tokio::test]
async fn a_silent_connection_is_replaced_whoevers_limit_it_is() {
    let redis = Redis::start();
    let proxy = Proxy::start(&redis);
    let storage = RedisStorage::connect(proxy.url()).await.unwrap();
    let storage = storage.time_limit(Duration::from_secs(60));
    let hurried = |config: Config| config.storage_timeout(Duration::from_secs(1));
    let shop = Shop::with(storage, hurried, None).await;
    assert_eq!(shop.order("before").await.code(), 201);
    let mut silent = proxy.hold("\r\nSET\r\n");
    assert_eq!(shop.order("k").await.code(), 503);
    silent.there().await;
    until(async || (shop.order("k").await.code() == 201).then_some(())).await;
}

#[tokio::test]
async fn commands_that_run_out_of_time_don_t_keep_it_from_connecting() {
    let mut redis = Redis::start();
    let proxy = Proxy::start(&redis);
    let storage = RedisStorage::connect(proxy.url()).await.unwrap();
    let storage = storage.time_limit(Duration::from_millis(20));
    until(async || storage.get(&KEY).await.ok()).await;
    proxy.welcome_after(Duration::from_millis(300));
    redis.start_again();
    until(async || storage.get(&KEY).await.ok()).await;
}

/// To connect takes several round trips.
#[tokio::test]
async fn a_short_limit_is_no_limit_for_connecting() {
    let redis = Redis::start();
    let proxy = Proxy::start(&redis);
    proxy.welcome_after(Duration::from_millis(200));
    let connecting = RedisStorage::connect(proxy.url()).time_limit(Duration::from_millis(50));
    let storage = connecting.await.unwrap();
    until(async || storage.get(&KEY).await.ok()).await;
}

/// As one that is made for each tenant, or for each test.
#[tokio::test]
async fn a_storage_that_is_dropped_closes_its_connections() {
    let redis = Redis::start();
    let holder = RedisStorage::connect(redis.url()).await.unwrap();
    assert_eq!(holder.begin(&KEY, &claim()).await.unwrap(), Begin::Acquired);
    for _ in 0..10 {
        let storage = RedisStorage::connect(redis.url()).await.unwrap();
        storage.wait(&KEY, Duration::from_millis(20)).await.unwrap();
    }
    let closed = until(async || {
        let clients: String = redis.ask(&["CLIENT", "LIST"]).await;
        // That of the holder, and the one that asks.
        (clients.lines().count() == 2).then_some(())
    });
    // Much sooner than a connection that nobody needs for now.
    let closed = tokio::time::timeout(Duration::from_secs(20), closed).await;
    closed.expect("they are closed at once");
}

/// As between the tests of a suite that keeps its storage in a static.
#[test]
fn a_storage_outlives_the_runtime_that_connected() {
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
    let redis = Redis::start();
    // One has a connection when its runtime ends, the other is about to have one.
    let mut gone = Redis::start();
    let first = runtime();
    let (storage, connecting) = first.block_on(async {
        let storage = RedisStorage::connect(redis.url()).await.unwrap();
        let connecting = RedisStorage::connect(gone.url()).await.unwrap();
        assert_eq!(storage.get(&KEY).await.unwrap(), None);
        gone.kill();
        let limited = connecting.clone().time_limit(Duration::from_millis(10));
        limited.get(&KEY).await.unwrap_err();
        (storage, connecting)
    });
    drop(first);
    gone.start_again();
    runtime().block_on(async {
        assert_eq!(storage.get(&KEY).await.unwrap(), None);
        assert_eq!(connecting.get(&KEY).await.unwrap(), None);
    });
}

#[test]
fn a_cluster_s_storage_outlives_the_runtime_that_connected() {
    let runtime = || {
        Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    };
    let first = runtime();
    let (cluster, storage) = first.block_on(async {
        let cluster = Cluster::start().await;
        let storage = RedisStorage::connect(cluster.url()).await.unwrap();
        let begun = storage.begin(&KEY, &claim()).await.unwrap();
        assert_eq!(begun, Begin::Acquired);
        (cluster, storage)
    });
    drop(first);
    let begun = runtime().block_on(async { storage.begin(&KEY, &claim()).await.unwrap() });
    assert!(matches!(begun, Begin::InFlight { .. }), "{begun:?}");
    drop(cluster);
}

/// A storage, and what keeps its servers running.
type Opened<S> = LocalBoxFuture<'static, (S, Box<dyn std::any::Any>)>;

/// Makes a storage on a runtime that stands still from then on, and calls it in the background.
fn behind_a_runtime_that_stands_still<S: Send + 'static, T: Send + 'static>(
    open: impl FnOnce() -> Opened<S> + Send + 'static,
    call: impl FnOnce(S) -> BoxFuture<'static, T>,
) -> T {
    let (give, given) = mpsc::channel();
    let (go_on, blocked) = mpsc::channel::<()>();
    let blocking = std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (storage, servers) = open().await;
            give.send(storage).unwrap();
            // A handler that blocks. The servers are processes of their own.
            let _ = blocked.recv();
            drop(servers);
        });
    });
    let storage = given.recv().unwrap();
    let (tell, told) = mpsc::channel();
    let call = call(storage);
    Env::system().background().unwrap().spawn(async move {
        assert!(Env::in_background());
        let _ = tell.send(call.await);
    });
    let done = told.recv_timeout(PATIENCE).unwrap();
    drop(go_on);
    blocking.join().unwrap();
    done
}

#[test]
fn a_runtime_that_stands_still_keeps_no_claim_from_renewal() {
    let single = || -> Opened<RedisStorage> {
        Box::pin(async {
            let redis = Redis::start();
            let storage = RedisStorage::connect(redis.url()).await.unwrap();
            (storage, Box::new(redis) as _)
        })
    };
    let cluster = || -> Opened<RedisStorage> {
        Box::pin(async {
            let cluster = Cluster::start().await;
            let storage = RedisStorage::connect(cluster.url()).await.unwrap();
            (storage, Box::new(cluster) as _)
        })
    };
    let sentinel = || -> Opened<RedisStorage> {
        Box::pin(async {
            let master = Redis::builder().on_a_port().start();
            let sentinel = Redis::builder().sentinel_of(master.port()).start();
            let url = format!("redis://127.0.0.1:{}", sentinel.port());
            let client =
                SentinelClient::build(vec![url], "mymaster", None, SentinelServerType::Master);
            let storage = RedisStorage::sentinel(client.unwrap());
            until(async || storage.get(&KEY).await.ok()).await;
            (storage, Box::new((master, sentinel)) as _)
        })
    };
    let claim = claim();
    let token = claim.token;
    for (name, open) in [
        (
            "one server",
            Box::new(single) as Box<dyn FnOnce() -> _ + Send>,
        ),
        ("a Cluster", Box::new(cluster)),
        ("sentinels", Box::new(sentinel)),
    ] {
        let claim = claim.clone();
        let open = move || -> Opened<RedisStorage> {
            Box::pin(async move {
                let (storage, servers) = open().await;
                let begun = storage.begin(&KEY, &claim).await.unwrap();
                assert_eq!(begun, Begin::Acquired);
                (storage, servers)
            })
        };
        behind_a_runtime_that_stands_still(open, move |storage| {
            Box::pin(async move {
                // The first one may take as long as it takes to ask the sentinels.
                for _ in 0..5 {
                    let renewed = storage.renew(&KEY, token, Duration::from_secs(30)).await;
                    assert_eq!(renewed.unwrap(), Held::Yes, "{name}");
                }
                let record = idempotency_tests::node::record("late");
                let ttl = Duration::from_secs(60);
                let completed = storage.complete(&KEY, token, &record, ttl).await;
                assert_eq!(completed.unwrap(), Held::Yes, "{name}");
            })
        });
    }
}

#[test]
fn a_runtime_that_stands_still_keeps_no_lock_from_renewal() {
    let claim = claim();
    let new = claim.clone();
    let open = move || -> Opened<LockedStorage<RedisCache, RedisLock>> {
        Box::pin(async move {
            let redis = Redis::start();
            let cache = RedisCache::connect(redis.url()).await.unwrap();
            let lock = RedisLock::connect(redis.url()).await.unwrap();
            let storage = LockedStorage::new(cache, lock);
            assert_eq!(storage.begin(&KEY, &new).await.unwrap(), Begin::Acquired);
            (storage, Box::new(redis) as _)
        })
    };
    behind_a_runtime_that_stands_still(open, move |storage| {
        Box::pin(async move {
            for _ in 0..5 {
                let renewed = storage.renew(&KEY, claim.token, claim.lease).await;
                assert_eq!(renewed.unwrap(), Held::Yes);
            }
            let record = idempotency_tests::node::record("late");
            let ttl = Duration::from_secs(60);
            let completed = storage.complete(&KEY, claim.token, &record, ttl).await;
            assert_eq!(completed.unwrap(), Held::Yes);
        })
    });
}

/// Somebody waits on a runtime that is there but does not run, and somebody on another.
#[test]
fn who_waits_does_not_depend_on_another_runtime() {
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
    let (idle, busy): (Runtime, Runtime) = (runtime(), runtime());
    let redis = Redis::start();
    let (holder, storage) = busy.block_on(async {
        let holder = RedisStorage::connect(redis.url()).await.unwrap();
        (holder, RedisStorage::connect(redis.url()).await.unwrap())
    });
    let claim = claim();
    let begun = busy.block_on(holder.begin(&KEY, &claim)).unwrap();
    assert_eq!(begun, Begin::Acquired);
    // This one drives the wait and the subscribed connection, and stands still from then on.
    let idling = storage.clone();
    idle.spawn(async move { idling.wait(&KEY, 2 * PATIENCE).await });
    let waited = idle.block_on(storage.wait(&KEY, Duration::from_millis(50)));
    waited.unwrap();

    busy.block_on(async {
        let waits = tokio::time::timeout(PATIENCE, storage.wait(&KEY, 2 * PATIENCE));
        let released = async {
            tokio::task::yield_now().await;
            assert_eq!(holder.release(&KEY, claim.token).await.unwrap(), Held::Yes);
        };
        let (waited, ()) = tokio::join!(waits, released);
        waited.expect("it hears of the release").unwrap();
    });
    drop(idle);
}

/// Nobody tells them, and none of them takes the key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_is_soon_seen_by_all_who_wait() {
    const MANY: usize = 3_000;

    let redis = Redis::start();
    let client = idempotency_axum::redis::Client::open(redis.url()).unwrap();
    let connection = client.get_multiplexed_async_connection().await.unwrap();
    let storage = RedisStorage::new(connection);
    assert_eq!(
        storage.begin(&KEY, &claim()).await.unwrap(),
        Begin::Acquired
    );
    let waits = (0..MANY).map(|_| storage.wait(&KEY, Duration::from_secs(60)));
    let waits = join_all(waits);
    let removed = async { storage.remove(&KEY).await.unwrap() };
    // One after the other would take a minute.
    let all = async { tokio::join!(waits, removed) };
    let (waited, was_there) = tokio::time::timeout(Duration::from_secs(30), all)
        .await
        .expect("they see it");
    assert!(was_there);
    assert!(waited.into_iter().all(|waited| waited.is_ok()));
}

/// Who would tell of the end accepts connections, and never answers.
#[tokio::test]
async fn while_a_subscription_is_asked_for_the_key_is_looked_at() {
    let redis = Redis::start();
    let holder = RedisStorage::connect(redis.url()).await.unwrap();
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let location = format!("redis://{}", silent.local_addr().unwrap());
    let client = idempotency_axum::redis::Client::open(redis.url()).unwrap();
    let connection = client.get_multiplexed_async_connection().await.unwrap();
    let teller = idempotency_axum::redis::Client::open(location).unwrap();
    let storage = RedisStorage::new(connection)
        .subscriber(teller)
        .time_limit(Duration::from_secs(60));
    let claim = claim();
    assert_eq!(holder.begin(&KEY, &claim).await.unwrap(), Begin::Acquired);
    let waits = tokio::time::timeout(PATIENCE, storage.wait(&KEY, 2 * PATIENCE));
    let released = async {
        let (_asked, _) = silent.accept().await.unwrap();
        assert_eq!(holder.release(&KEY, claim.token).await.unwrap(), Held::Yes);
        // Not closed before the end.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        waited = waits => waited.expect("it sees the release").unwrap(),
        () = released => {}
    }
}

/// A removal that was given up and reaches Redis later than the next claim.
#[tokio::test]
async fn a_removal_that_comes_late_removes_nothing_new() {
    let redis = Redis::start();
    let proxy = Proxy::start(&redis);
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    let slow = RedisStorage::connect(proxy.url()).await.unwrap();
    let slow = slow.time_limit(Duration::from_secs(2));
    let (first, second) = (claim(), claim());
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    // What it looks at first is passed on.
    let mut late = proxy.late("\r\nEVALSHA\r\n");
    let given_up = slow.remove(&KEY).await.unwrap_err();
    assert_eq!(given_up.kind(), StorageErrorKind::Timeout, "{given_up:?}");
    late.there().await;
    assert_eq!(storage.release(&KEY, first.token).await.unwrap(), Held::Yes);
    assert_eq!(storage.begin(&KEY, &second).await.unwrap(), Begin::Acquired);

    late.go();
    // It has come once something that was sent after it is answered.
    assert!(matches!(
        slow.get(&KEY).await.unwrap(),
        Some(Entry::Claimed { .. })
    ));
    assert_eq!(
        storage
            .renew(&KEY, second.token, second.lease)
            .await
            .unwrap(),
        Held::Yes
    );
    assert!(storage.remove(&KEY).await.unwrap());
    assert!(!storage.remove(&KEY).await.unwrap());
}
