//! Settings that name a Redis: what stands in it afterwards.

use axum::{Router, routing::post};
use idempotency_axum::{IdempotencyHandler, IdempotencyLayer, KeyPolicy};
use idempotency_tests::{Gate, Logs, Runs, Server, redis::Redis};
use serde_json::{Value, json};

use super::assert_replays;

/// A service made of settings, in a process of its own as far as Redis can tell.
struct Shop {
    server: Server,
    runs: Runs,
    gate: Gate,
}

impl Shop {
    async fn open(settings: Value) -> Self {
        let settings = serde_json::from_value(settings).unwrap();
        let layer = IdempotencyLayer::from_settings(settings).await.unwrap();
        let (runs, gate) = (Runs::new(), Gate::new());
        let (counted, entered) = (runs.clone(), gate.clone());
        let slow = async move || {
            entered.enter().await;
            format!("slow {}", counted.next())
        };
        let named = |name| {
            runs.handler()
                .idempotency_key(KeyPolicy::required().cache_name(name))
        };
        let router = Router::new()
            .route("/orders", post(runs.handler()))
            .route("/mails", post(named("mails")))
            .route("/slow", post(slow))
            .layer(layer);
        Self {
            server: Server::start(router).await,
            runs,
            gate,
        }
    }

    async fn post(&self, path: &str) -> idempotency_tests::Answer {
        self.server.post(path).key("k").send().await
    }
}

async fn prefixes(redis: &Redis) -> Vec<String> {
    let mut names: Vec<String> = redis.ask(&["KEYS", "*"]).await;
    for name in &mut names {
        let hex = name.rfind(':').unwrap();
        assert_eq!(name.len() - hex, 65, "{name}");
        name.truncate(hex);
    }
    names.sort();
    names
}

#[tokio::test]
async fn a_storage_and_a_named_cache_share_a_redis_and_no_key() {
    let (logs, _guard) = Logs::install();
    let redis = Redis::start();
    let location = redis.url();
    let settings = json!({
        "storage": { "class": "redis", "location": location },
        "storages": { "mails": { "class": "RedisStorage", "location": location, "name": "post" } },
    });
    let shops = [
        Shop::open(settings.clone()).await,
        Shop::open(settings).await,
    ];
    // It stands in `storages.mails`.
    let warned = logs.with(&["WARN", "share their keys"]);
    assert_eq!(warned.len(), 2, "{:?}", logs.lines());
    assert!(
        warned
            .iter()
            .all(|line| line.contains("setting=storage.name")),
        "{warned:?}"
    );
    for path in ["/orders", "/mails"] {
        let first = shops[0].post(path).await;
        assert_eq!(first.code(), 201);
        assert_replays(&shops[1].post(path).await, first.text());
    }
    assert_eq!(prefixes(&redis).await, ["idempotency", "post:mails"]);
}

#[tokio::test]
async fn a_redis_that_may_evict_is_refused_on_demand() {
    let redis = Redis::start();
    for (name, value) in [("maxmemory", "100mb"), ("maxmemory-policy", "allkeys-lru")] {
        let _: String = redis.ask(&["CONFIG", "SET", name, value]).await;
    }
    let open = async |require_noeviction: Value| {
        let storage = json!({
            "class": "redis", "location": redis.url(), "require_noeviction": require_noeviction,
        });
        let settings = serde_json::from_value(json!({ "storage": storage })).unwrap();
        IdempotencyLayer::from_settings(settings).await
    };
    let _ = open(json!(false)).await.unwrap();
    for yes in [json!(true), json!("true")] {
        let error = open(yes).await.unwrap_err().to_string();
        assert!(error.starts_with("`storage.location`: "), "{error}");
        assert!(error.contains("maxmemory-policy noeviction"), "{error}");
    }
    // A lock that is forgotten lets a second one in.
    let records = Redis::start();
    let storage =
        json!({ "class": "redis", "location": records.url(), "require_noeviction": true });
    let settings =
        json!({ "storage": storage, "lock": { "class": "redis", "location": redis.url() } });
    let settings = serde_json::from_value(settings).unwrap();
    let error = IdempotencyLayer::from_settings(settings).await.unwrap_err();
    assert!(
        error.to_string().starts_with("`lock.location`: "),
        "{error}"
    );
}

/// `LOCK.CLASS`, `LOCK.LOCATION` and `LOCK.NAME`, with the records where they are told to be.
#[tokio::test]
async fn a_lock_that_processes_share() {
    for records in ["redis", "memory"] {
        let (logs, _guard) = Logs::install();
        let redis = Redis::start();
        let location = redis.url();
        let storage = match records {
            "redis" => json!({ "class": "redis", "location": location }),
            _ => json!("memory"),
        };
        let class = "idempotency_key.locks.basic.MultiProcessRedisLock";
        let lock = json!({ "class": class, "location": location, "name": "MyLock" });
        let settings =
            json!({ "storage": storage, "storages": { "mails": "memory" }, "lock": lock });
        let shops = [
            Shop::open(settings.clone()).await,
            Shop::open(settings).await,
        ];

        // `mails` is in memory in any case.
        for (storage, times) in [
            ("storage", if records == "memory" { 2 } else { 0 }),
            ("storages.mails", 2),
        ] {
            let place = format!("storage={storage} ");
            let told = logs.with(&["WARN", "share their locks but not their records", &place]);
            assert_eq!(told.len(), times, "{records}: {:?}", logs.lines());
        }

        let running = shops[0].server.post("/slow").key("k").start();
        shops[0].gate.arrived(1).await;
        assert_eq!(prefixes(&redis).await, ["MyLock:lock"]);
        assert_eq!(shops[1].post("/slow").await.code(), 423, "{records}");
        shops[0].gate.open(1);
        let first = running.await.unwrap();
        assert_eq!(first.code(), 200);

        if records == "redis" {
            assert_replays(&shops[1].post("/slow").await, first.text());
            assert_eq!(shops[1].runs.count(), 0);
            assert_eq!(prefixes(&redis).await, ["idempotency:cache"]);
        } else {
            assert_replays(&shops[0].post("/slow").await, first.text());
            assert!(prefixes(&redis).await.is_empty());
        }
    }
}

#[tokio::test]
async fn the_prefix_of_a_lock_has_a_default() {
    let redis = Redis::start();
    let lock = json!({ "class": "redis", "location": redis.url() });
    let shop = Shop::open(json!({ "storages": { "mails": "memory" }, "lock": lock })).await;
    let running = shop.server.post("/slow").key("k").start();
    shop.gate.arrived(1).await;
    assert_eq!(prefixes(&redis).await, ["idempotency:lock"]);
    shop.gate.open(1);
    assert_eq!(running.await.unwrap().code(), 200);
}

/// Duplicates beside the first are refused in one process only; retries are answered in all.
#[tokio::test]
async fn records_in_redis_under_a_lock_of_the_process() {
    let redis = Redis::start();
    let settings = json!({
        "storage": { "class": "redis", "location": redis.url() },
        "storages": { "mails": "memory" },
        "lock": { "class": "process" },
    });
    let shops = [
        Shop::open(settings.clone()).await,
        Shop::open(settings).await,
    ];
    let first = shops[0].post("/orders").await;
    assert_eq!(first.code(), 201);
    assert_replays(&shops[1].post("/orders").await, first.text());
    assert_eq!(prefixes(&redis).await, ["idempotency:cache"]);
}
