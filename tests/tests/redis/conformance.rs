//! The public suite on one Redis, on a Cluster of three masters, and on what lock and cache make together.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use idempotency_axum::{
    EncodedKey, LockedStorage, RedisCache, RedisLock, RedisStorage, conformance_tests,
    storage::conformance::{Harness, RULES, check},
};
use idempotency_tests::redis::{Cluster, Redis};

/// No rule may lose five of them, however busy the machine is.
const UNIT: Duration = Duration::from_millis(200);

mod one_redis {
    use super::*;

    conformance_tests!(Single(Redis::start()));
}

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
        UNIT
    }

    async fn corrupt(&self, _: &RedisStorage, key: &EncodedKey) -> bool {
        let name = format!("idempotency:{key}");
        let _: String = self.0.ask(&["SET", &name, "a session"]).await;
        true
    }
}

mod lock_and_cache {
    use super::*;

    // Where the lock takes its time, a call that is dropped may leave the key locked, as the docs of `LockedStorage` say.
    conformance_tests!(Composed(Redis::start()), except: [dropped_calls_are_safe]);
}

/// The original's composition.
struct Composed(Redis);

impl Harness for Composed {
    type Storage = LockedStorage<RedisCache, RedisLock>;

    async fn storage(&self) -> Self::Storage {
        let cache = RedisCache::connect(self.0.url()).await.unwrap();
        let lock = RedisLock::connect(self.0.url()).await.unwrap();
        LockedStorage::new(cache, lock.name("MyLock"))
    }

    async fn advance(&self, by: Duration) {
        tokio::time::sleep(by).await;
    }

    fn unit(&self) -> Duration {
        UNIT
    }

    async fn corrupt(&self, _: &Self::Storage, key: &EncodedKey) -> bool {
        let name = format!("idempotency:cache:{key}");
        let _: String = self.0.ask(&["SET", &name, "a session"]).await;
        true
    }
}

struct Shards(Cluster);

impl Harness for Shards {
    type Storage = RedisStorage;

    async fn storage(&self) -> RedisStorage {
        RedisStorage::connect(self.0.url()).await.unwrap()
    }

    async fn advance(&self, by: Duration) {
        tokio::time::sleep(by).await;
    }

    /// Several rules are checked at once.
    fn unit(&self) -> Duration {
        3 * UNIT / 2
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_keeps_every_rule() {
    let shards = Shards(Cluster::start().await);
    let rules = stream::iter(
        RULES
            .iter()
            .filter(|rule| **rule != "unreadable_is_an_error"),
    );
    let checked = rules.map(|rule| check(rule, &shards)).buffer_unordered(8);
    assert_eq!(checked.count().await, RULES.len() - 1);
}
