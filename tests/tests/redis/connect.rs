//! From a location to a storage: who is let in, who is refused, and what errors show.

use std::{error::Error, time::Duration};

use idempotency_axum::{
    Begin, Cache, EncodedKey, Lock, LockedStorage, RedisCache, RedisConnectErrorKind, RedisLock,
    RedisStorage, Storage,
    redis::{
        self,
        sentinel::{SentinelClient, SentinelServerType},
    },
};
use idempotency_tests::{
    Logs,
    redis::{Redis, Spec, free_port},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
};

use super::{KEY, SERVICE, Shop, assert_replays, until};

/// The error with all its sources.
fn chain(error: &dyn Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(" {error} {error:?}");
        source = error.source();
    }
    text
}

#[tokio::test]
async fn locations_of_one_server() {
    let redis = Redis::builder().on_a_port().start();
    let port = redis.port();
    let first = Shop::open(RedisStorage::connect(redis.url()).await.unwrap()).await;
    assert_eq!(first.order("k").await.code(), 201);
    for location in [
        format!("127.0.0.1:{port}"),
        format!("redis://127.0.0.1:{port}"),
        format!("redis://127.0.0.1:{port}/0"),
        format!("redis://127.0.0.1:{port}/?protocol=resp3"),
        format!("valkey://127.0.0.1:{port}"),
        format!("redis+unix://{}", redis.socket().display()),
    ] {
        let shop = Shop::open(RedisStorage::connect(&location).await.unwrap()).await;
        assert_replays(&shop.order("k").await, "k 1");
    }
    // Another database, and another prefix, is another place.
    let location = format!("redis://127.0.0.1:{port}/3");
    let elsewhere = Shop::open(RedisStorage::connect(location).await.unwrap()).await;
    assert_eq!(elsewhere.order("k").await.code(), 201);
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    let elsewhere = Shop::open(storage.prefix("shop")).await;
    assert_eq!(elsewhere.order("k").await.code(), 201);
    let mut names: Vec<String> = redis.ask(&["KEYS", "*"]).await;
    names.sort();
    assert_eq!(names.len(), 2);
    for (name, prefix) in names.iter().zip(["idempotency:", "shop:"]) {
        let hex = name.strip_prefix(prefix).unwrap();
        assert!(hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
}

#[tokio::test]
async fn a_connection_of_ones_own() {
    let redis = Redis::start();
    let client = redis::Client::open(redis.url()).unwrap();
    let manager = redis::aio::ConnectionManager::new(client.clone())
        .await
        .unwrap();
    let shop = Shop::open(RedisStorage::new(manager).subscriber(client)).await;
    assert_eq!(shop.order("k").await.code(), 201);
    assert_replays(&shop.order("k").await, "k 1");
}

/// Of each connection from this process to `redis` whether the timer that runs is the keepalive's.
#[cfg(target_os = "linux")]
fn kept_alive(redis: &Redis) -> Vec<bool> {
    let sockets = std::fs::read_dir("/proc/self/fd").unwrap();
    let sockets = sockets.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    let sockets: Vec<String> = sockets.map(|link| link.display().to_string()).collect();
    let port = format!(":{:04X}", redis.port());
    let connections = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let timers = connections.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, _, to, "01", _, timer, _, _, _, inode, ..] = fields[..] else {
            return None;
        };
        let is_ours = sockets.contains(&format!("socket:[{inode}]"));
        (is_ours && to.ends_with(&port)).then(|| timer.starts_with("02:"))
    });
    timers.collect()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn connections_are_kept_alive() {
    let redis = Redis::builder().on_a_port().start();
    let url = format!("redis://127.0.0.1:{}", redis.port());
    let storage = RedisStorage::connect(&url).await.unwrap();
    let holder = super::claim();
    let _ = storage.begin(&KEY, &holder).await.unwrap();
    assert_kept_alive(&redis, &storage).await;

    // Where they come of clients without such a setting.
    let redis = Redis::builder().on_a_port().start();
    let sentinel = Redis::builder().sentinel_of(redis.port()).start();
    let client = SentinelClient::build(
        vec![format!("redis://127.0.0.1:{}", sentinel.port())],
        "mymaster",
        None,
        SentinelServerType::Master,
    );
    let storage = RedisStorage::sentinel(client.unwrap());
    let begun = until(async || storage.begin(&KEY, &holder).await.ok());
    assert_eq!(begun.await, Begin::Acquired);
    assert_kept_alive(&redis, &storage).await;
}

/// Those for commands and for what is subscribed.
#[cfg(target_os = "linux")]
async fn assert_kept_alive(redis: &Redis, storage: &RedisStorage) {
    let waits = storage.wait(&KEY, Duration::from_secs(60));
    // Another timer runs while something is under way.
    let kept = until(async || (kept_alive(redis) == [true; 2]).then_some(()));
    tokio::select! {
        () = kept => {}
        waited = waits => panic!("the key is held: {waited:?}"),
    }
}

/// Two services that share a Redis and keep it would answer for each other.
#[tokio::test]
async fn the_default_prefix_is_warned_of_once() {
    let (logs, _guard) = Logs::install();
    let redis = Redis::start();
    let said = |setter: &str| {
        let lines = logs.with(&["WARN", "default prefix"]);
        let of_setter = lines.iter().filter(|line| line.contains(setter));
        of_setter.count()
    };
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    let chosen = storage.clone().prefix("idempotency");
    let _ = chosen.begin(&KEY, &super::claim()).await.unwrap();
    assert_eq!(said("RedisStorage::prefix"), 0);
    for storage in [storage.clone(), storage] {
        for _ in 0..2 {
            let _ = storage.begin(&KEY, &super::claim()).await.unwrap();
            assert_eq!(said("RedisStorage::prefix"), 1, "{:?}", logs.lines());
        }
    }

    let parts = async || {
        let cache = RedisCache::connect(redis.url()).await.unwrap();
        (cache, RedisLock::connect(redis.url()).await.unwrap())
    };
    let (cache, lock) = parts().await;
    let storage = LockedStorage::new(cache.prefix("shop"), lock.name("shop"));
    let _ = storage.begin(&KEY, &super::claim()).await.unwrap();
    let setters = ["RedisCache::prefix", "RedisLock::name"];
    assert_eq!(setters.map(said), [0, 0]);
    let (cache, lock) = parts().await;
    let storage = LockedStorage::new(cache, lock);
    for _ in 0..2 {
        let _ = storage.begin(&KEY, &super::claim()).await.unwrap();
        assert_eq!(setters.map(said), [1, 1], "{:?}", logs.lines());
    }
}

#[tokio::test]
async fn users_and_passwords() {
    let redis = Redis::builder().on_a_port().start();
    let port = redis.port();
    let rights = [
        "ACL",
        "SETUSER",
        "shop",
        "on",
        ">pass",
        "~idempotency:*",
        "&idempotency:*",
        "-@all",
        "+set",
        "+get",
        "+getrange",
        "+exists",
        "+del",
        "+pexpire",
        "+pttl",
        "+eval",
        "+evalsha",
        "+script|load",
        "+publish",
        "+subscribe",
        "+unsubscribe",
        "+info",
        "+select",
    ];
    let _: String = redis.ask(&rights).await;
    let elsewhere = format!("redis://shop:pass@127.0.0.1:{port}/2");
    let elsewhere = Shop::open(RedisStorage::connect(elsewhere).await.unwrap()).await;
    assert_eq!(elsewhere.order("k").await.code(), 201);
    let _: String = redis.ask(&["ACL", "SETUSER", "shop", "-select"]).await;
    let location = format!("redis://shop:pass@127.0.0.1:{port}");
    let storage = RedisStorage::connect(&location)
        .require_noeviction()
        .await
        .unwrap();
    let shop = Shop::open(storage).await;
    assert_eq!(shop.order("k").await.code(), 201);
    assert_replays(&shop.order("k").await, "k 1");

    let wrong = format!("redis://shop:hunter2@127.0.0.1:{port}");
    let error = RedisStorage::connect(&wrong).await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Refused);
    assert!(!chain(&error).contains("hunter2"), "{}", chain(&error));
    assert!(!format!("{:?}", RedisStorage::connect(&wrong)).contains("hunter2"));

    let _: String = redis.ask(&["ACL", "SETUSER", "shop", "-info"]).await;
    let error = RedisStorage::connect(&location)
        .require_noeviction()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Evicts);
    assert!(error.to_string().contains("INFO or CONFIG GET"), "{error}");
}

/// The error says what to look at, and shows no password.
#[tokio::test]
async fn who_is_not_let_in() {
    let redis = Redis::builder().on_a_port().start();
    let rights = [
        "ACL", "SETUSER", "shop", "on", ">pass", "~*", "&*", "+@all", "-select",
    ];
    let _: String = redis.ask(&rights).await;
    let _: String = redis
        .ask(&["CONFIG", "SET", "requirepass", "open sesame"])
        .await;
    let server = format!("127.0.0.1:{}", redis.port());
    for location in [
        // NOAUTH
        server.clone(),
        format!("{server}/2"),
        format!("{server}?protocol=resp3"),
        // WRONGPASS
        format!("redis://:hunter2@{server}"),
        format!("redis://:hunter2@{server}/2"),
        format!("redis://:hunter2@{server}?protocol=resp3"),
        format!("redis://nobody:hunter2@{server}"),
        format!(
            "redis://:hunter2@{server},redis://127.0.0.1:{}",
            free_port()
        ),
        // NOPERM
        format!("redis://shop:pass@{server}/2"),
        format!("redis://shop:pass@{server}/2?protocol=resp3"),
    ] {
        let error = RedisStorage::connect(&location).await.unwrap_err();
        let text = chain(&error);
        assert_eq!(
            error.kind(),
            RedisConnectErrorKind::Refused,
            "{location}: {text}"
        );
        assert!(error.to_string().contains("the password"), "{error}");
        assert!(!text.contains("hunter2"), "{text}");
    }
    let right = format!("redis://:open%20sesame@{server}");
    let _ = RedisStorage::connect(&right).await.unwrap();

    let error = RedisStorage::connect(format!("{right}/99")).await;
    let error = error.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Unsupported);
    assert!(error.to_string().contains("`databases`"), "{error}");
}

#[tokio::test]
async fn all_options_stand_before_the_await() {
    let redis = Redis::start();
    let storage = RedisStorage::connect(redis.url())
        .prefix("shop")
        .time_limit(Duration::from_secs(2))
        .require_noeviction()
        .await
        .unwrap();
    let _ = storage.begin(&KEY, &super::claim()).await.unwrap();
    let _ = RedisLock::connect(redis.url())
        .name("shop")
        .await
        .unwrap()
        .acquire(&KEY, Duration::from_secs(30))
        .await
        .unwrap();
    let cache = RedisCache::connect(redis.url()).prefix("shop").await;
    let ttl = Duration::from_secs(30);
    cache.unwrap().set(&KEY, "value".into(), ttl).await.unwrap();
    let mut names: Vec<String> = redis.ask(&["KEYS", "*"]).await;
    names.sort();
    let expected = ["shop:", "shop:cache:", "shop:lock:"].map(|prefix| format!("{prefix}{KEY}"));
    assert_eq!(names, expected);

    // It has no replica.
    let storage = RedisStorage::connect(redis.url())
        .prefix("others")
        .wait_replicas(1, Duration::from_millis(1))
        .await
        .unwrap();
    let error = storage.begin(&KEY, &super::claim()).await.unwrap_err();
    assert!(chain(&error).contains("too few replicas"), "{error:?}");
}

#[tokio::test]
async fn a_password_that_was_wrong_for_a_while() {
    let redis = Redis::start();
    let password = async |password: &str| {
        let set = [
            "ACL",
            "SETUSER",
            "shop",
            "on",
            "resetpass",
            password,
            "~*",
            "&*",
            "+@all",
        ];
        let _: String = redis.ask(&set).await;
    };
    password(">first").await;
    let url = format!("{}?user=shop&pass=first", redis.url());
    let storage = RedisStorage::connect(url).await.unwrap();
    let key = EncodedKey::from_bytes([7; 32]);
    assert_eq!(storage.get(&key).await.unwrap(), None);

    password(">second").await;
    let _: i64 = redis.ask(&["CLIENT", "KILL", "USER", "shop"]).await;
    for _ in 0..3 {
        storage.get(&key).await.unwrap_err();
    }
    password(">first").await;
    assert_eq!(storage.get(&key).await.unwrap(), None);
}

#[tokio::test]
async fn what_can_not_be_connected_to() {
    for location in [
        "",
        "http://cache:6379",
        "redis://",
        "redis://:hunter2@cache:99999",
        "redis://u:hunter2@cache/x",
    ] {
        let error = RedisStorage::connect(location).await.unwrap_err();
        assert_eq!(
            error.kind(),
            RedisConnectErrorKind::Url,
            "{location}: {error:?}"
        );
        assert!(!chain(&error).contains("hunter2"), "{}", chain(&error));
    }
    let nobody = format!("redis://127.0.0.1:{}", free_port());
    let error = RedisStorage::connect(nobody).await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Unreachable);
    assert!(error.source().is_some());

    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let location = silent.local_addr().unwrap().to_string();
    let connecting = RedisStorage::connect(location).time_limit(Duration::from_millis(100));
    let error = connecting.await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Unreachable);
}

/// Each process would have the records of the one that answers it first.
#[tokio::test]
async fn several_servers_that_are_no_cluster_are_refused() {
    let servers = [(); 2].map(|()| Redis::builder().on_a_port().start());
    let locations = servers
        .each_ref()
        .map(|redis| format!("redis://127.0.0.1:{}", redis.port()));
    let error = RedisStorage::connect(locations.join(","))
        .await
        .unwrap_err();
    assert_eq!(
        error.kind(),
        RedisConnectErrorKind::NotACluster,
        "{error:?}"
    );
    assert!(
        error.to_string().contains("`RedisStorage::sentinel`"),
        "{error}"
    );
}

#[tokio::test]
async fn what_keeps_no_records_is_refused() {
    let master = Redis::builder().on_a_port().start();
    let port = master.port().to_string();
    let replica = Redis::builder()
        .with(&["--replicaof", "127.0.0.1", &port])
        .start();
    let sentinel = Redis::builder().sentinel_of(master.port()).start();
    let sentinel_location = format!("redis://127.0.0.1:{}", sentinel.port());
    for (location, cure) in [
        (replica.url(), "name its master"),
        (sentinel_location, "`RedisStorage::sentinel`"),
    ] {
        let error = RedisStorage::connect(location).await.unwrap_err();
        assert_eq!(error.kind(), RedisConnectErrorKind::NotAMaster, "{error:?}");
        assert!(error.to_string().contains(cure), "{error}");
    }
}

#[tokio::test]
async fn a_limit_may_be_any() {
    let redis = Redis::start();
    let storage = RedisStorage::connect(redis.url()).time_limit(Duration::MAX);
    let storage = storage.await.unwrap();
    assert_eq!(
        storage.get(&EncodedKey::from_bytes([7; 32])).await.unwrap(),
        None
    );
}

#[tokio::test]
async fn tls_with_the_systems_roots() {
    tls(false).await;
}

#[tokio::test]
async fn tls_of_a_cluster() {
    tls(true).await;
}

/// The service is a process of its own here, because the environment says whose signatures it trusts.
async fn tls(is_cluster: bool) {
    let mut ca = rcgen::CertificateParams::new([]).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
    let certificate = rcgen::CertificateParams::new(names).unwrap();
    let certificate = certificate.signed_by(&key, &issuer).unwrap();

    let port = free_port();
    let redis = Redis::builder()
        .file("ca.pem", ca_pem)
        .file("server.pem", certificate.pem())
        .file("server.key", key.serialize_pem())
        .with(&["--tls-port", &port.to_string()])
        .with(&[
            "--tls-cert-file",
            "server.pem",
            "--tls-key-file",
            "server.key",
        ])
        .with(&["--tls-ca-cert-file", "ca.pem", "--tls-auth-clients", "no"]);
    let redis = match is_cluster {
        true => redis.cluster_node().with(&["--tls-cluster", "yes"]).start(),
        false => redis.start(),
    };
    if is_cluster {
        let add = ["CLUSTER", "ADDSLOTSRANGE", "0", "16383"];
        let _: String = redis.ask(&add).await;
        until(async || {
            let info: String = redis.ask(&["CLUSTER", "INFO"]).await;
            info.contains("cluster_state:ok").then_some(())
        })
        .await;
    }

    let trusted = redis.directory().join("ca.pem").display().to_string();
    let location = format!("rediss://127.0.0.1:{port}");
    let spec = Spec::new(SERVICE, &location).variable("SSL_CERT_FILE", trusted);
    let service = spec.start().await;
    let first = service.post("/orders").key("k").send().await;
    assert_eq!(first.code(), 201);
    assert_replays(&service.post("/orders").key("k").send().await, first.text());
    let names: Vec<String> = redis.ask(&["KEYS", "*"]).await;
    assert_eq!(names.len(), 1);

    // Who signed it is not known to this process.
    let error = RedisStorage::connect(location).await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::Unreachable);
    assert!(chain(&error).contains("UnknownIssuer"), "{}", chain(&error));
}

/// A server that calls itself Redis 6.
async fn old(listener: TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let (from, mut to) = stream.into_split();
        let mut lines = BufReader::new(from).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            let answer: &[u8] = match line.as_str() {
                "HELLO" => {
                    b"*4\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n6.2.14\r\n"
                }
                "INFO" => b"$20\r\nredis_version:6.2.14\r\n",
                "SETINFO" | "CONFIG" => b"-ERR unknown\r\n",
                _ => continue,
            };
            if to.write_all(answer).await.is_err() {
                break;
            }
        }
    }
}

#[tokio::test]
async fn an_old_server_is_refused_with_its_version() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let location = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(old(listener));
    let error = RedisStorage::connect(location).await.unwrap_err();
    assert_eq!(error.kind(), RedisConnectErrorKind::TooOld, "{error:?}");
    assert!(error.to_string().contains("6.2.14"), "{error}");
    server.abort();
}
