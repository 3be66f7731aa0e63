//! Redis dies at every moment of a request, and comes back with its data or without: the table in the docs of `RedisStorage`.

use std::time::Duration;

use idempotency_axum::{Config, LockPolicy, RedisStorage};
use idempotency_tests::{
    Gate,
    redis::{Proxy, Redis},
};

use super::{Shop, assert_replays, until};

/// How Redis comes back.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Back {
    WithData,
    Empty,
}

impl Back {
    fn start(self, redis: &mut Redis) {
        match self {
            Self::WithData => redis.start_again(),
            Self::Empty => redis.start_empty(),
        }
    }
}

struct Scene {
    redis: Redis,
    proxy: Proxy,
    gate: Gate,
    shop: Shop,
}

impl Scene {
    async fn new() -> Self {
        let redis = Redis::start();
        let proxy = Proxy::start(&redis);
        let gate = Gate::new();
        let storage = RedisStorage::connect(proxy.url()).await.unwrap();
        let shop = Shop::gated(storage, &gate).await;
        Self {
            redis,
            proxy,
            gate,
            shop,
        }
    }

    /// The retry gets the first answer, here and in another process; nothing ran again.
    async fn assert_recorded(&self, text: &str) {
        assert_replays(&self.shop.order("k").await, text);
        self.shop.events.until("completed", 1).await;
        let other = Shop::open(RedisStorage::connect(self.redis.url()).await.unwrap()).await;
        assert_replays(&other.order("k").await, text);
        assert_eq!((self.shop.runs.count(), other.runs.count()), (1, 0));
        self.shop.layer.engine().drain().await;
    }
}

async fn before_begin(back: Back) {
    let mut scene = Scene::new().await;
    scene.gate.open(1);
    scene.redis.kill();
    let refused = scene.shop.order("k").await;
    assert_eq!(refused.code(), 503, "{refused:?}");
    assert_eq!(refused.problem().as_deref(), Some("storage-unavailable"));
    assert!(refused.header("retry-after").is_some());
    back.start(&mut scene.redis);
    let retry = scene.shop.order("k").await;
    assert_eq!(retry.code(), 201, "{retry:?}");
    scene.assert_recorded("k 1").await;
}

async fn inside_begin(back: Back) {
    let mut scene = Scene::new().await;
    scene.gate.open(1);
    let mut withheld = scene.proxy.withhold_answer("\r\nNX\r\n");
    let request = scene.shop.server.post("/orders").key("k").start();
    withheld.there().await;
    scene.redis.kill();
    assert_eq!(request.await.unwrap().code(), 503);
    assert_eq!(scene.shop.runs.count(), 0);
    back.start(&mut scene.redis);
    let retry = until(async || {
        let retry = scene.shop.order("k").await;
        // The claim is given back as soon as Redis can be told.
        let is_in_flight = back == Back::WithData && retry.code() == 423;
        (!is_in_flight).then_some(retry)
    });
    assert_eq!(retry.await.code(), 201);
    scene.assert_recorded("k 1").await;
}

async fn between_begin_and_complete(back: Back) {
    let mut scene = Scene::new().await;
    let request = scene.shop.server.post("/orders").key("k").start();
    scene.gate.arrived(1).await;
    scene.redis.kill();
    scene.gate.open(1);
    let answer = request.await.unwrap();
    assert_eq!((answer.code(), answer.text()), (201, "k 1"));
    // Redis can't be asked, and need not be.
    assert_replays(&scene.shop.order("k").await, "k 1");
    back.start(&mut scene.redis);
    scene.assert_recorded("k 1").await;
}

async fn inside_complete(back: Back) {
    let mut scene = Scene::new().await;
    scene.gate.open(1);
    let mut withheld = scene.proxy.withhold_answer("\r\nEVALSHA\r\n");
    let request = scene.shop.server.post("/orders").key("k").start();
    withheld.there().await;
    scene.redis.kill();
    let answer = request.await.unwrap();
    assert_eq!((answer.code(), answer.text()), (201, "k 1"));
    back.start(&mut scene.redis);
    scene.assert_recorded("k 1").await;
}

async fn during_a_wait(back: Back) {
    let mut scene = Scene::new().await;
    let waits =
        |config: Config| config.lock(LockPolicy::default().timeout(Duration::from_secs(30)));
    let storage = RedisStorage::connect(scene.proxy.url()).await.unwrap();
    let other = Shop::with(storage, waits, None).await;
    let request = scene.shop.server.post("/orders").key("k").start();
    scene.gate.arrived(1).await;
    let duplicate = other.server.post("/orders").key("k").start();
    other.events.until("waiting", 1).await;
    scene.redis.kill();
    assert_eq!(duplicate.await.unwrap().code(), 503);
    scene.gate.open(1);
    assert_eq!(request.await.unwrap().text(), "k 1");
    back.start(&mut scene.redis);
    scene.assert_recorded("k 1").await;
    assert_replays(&other.order("k").await, "k 1");
    assert_eq!(other.runs.count(), 0);
}

macro_rules! cases {
    ($($case:ident),+) => {$(
        mod $case {
            use super::Back;

            #[tokio::test]
            async fn with_data() {
                super::$case(Back::WithData).await;
            }

            #[tokio::test]
            async fn empty() {
                super::$case(Back::Empty).await;
            }
        }
    )+};
}

cases!(
    before_begin,
    inside_begin,
    between_begin_and_complete,
    inside_complete,
    during_a_wait
);
