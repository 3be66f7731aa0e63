//! The public suite on one Redis, on a Cluster of three masters, and on what lock and cache make together.

use std::time::Duration;

use idempotency_axum::{
    EncodedKey, LockedStorage, MokaCache, RedisCache, RedisLock, RedisStorage, Storage,
    conformance_tests,
    redis::ToRedisArgs,
    storage::conformance::{self, Harness},
};
use idempotency_tests::redis::{Cluster, Redis};

struct Single(Redis);

impl Harness for Single {
    type Storage = RedisStorage;

    async fn storage(&self) -> RedisStorage {
        RedisStorage::connect(self.0.url()).await.unwrap()
    }

    async fn advance(&self, by: Duration) {
        tokio::time::sleep(by).await;
    }

    fn unit(&self) -> Duration {
        Duration::from_millis(100)
    }

    async fn corrupt(&self, _: &RedisStorage, key: &EncodedKey) -> bool {
        let name = format!("idempotency:{key}");
        let _: String = self.0.ask(&["SET", &name, "a session"]).await;
        true
    }
}

conformance_tests!(Single(Redis::start()));
