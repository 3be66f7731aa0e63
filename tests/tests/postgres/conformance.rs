//! The public suite: on a server, in other time zones, at a stricter isolation level, through a proxy.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use idempotency_axum::{
    EncodedKey, PostgresStorage, conformance_tests,
    storage::conformance::{Harness, RULES, check},
};
use idempotency_tests::{
    PATIENCE,
    postgres::{Bouncer, Postgres},
};
use tokio::{runtime::Handle, task::spawn_blocking};

mod one_server {
    use super::*;

    conformance_tests!(Subject::direct());
}

/// A server, and how its storages reach it.
struct Subject {
    postgres: Postgres,
    by: By,
    unit: Duration,
}

enum By {
    Connect,
    /// A pool of which each connection runs this first.
    Setup(&'static str),
    Proxy(Bouncer),
}

impl Subject {
    fn direct() -> Self {
        Self {
            postgres: Postgres::start(),
            by: By::Connect,
            unit: Duration::from_millis(200),
        }
    }

    /// For several rules at once.
    fn new(by: impl FnOnce(&Postgres) -> By) -> Self {
        let postgres = Postgres::start();
        Self {
            by: by(&postgres),
            postgres,
            unit: Duration::from_millis(500),
        }
    }
}

impl Harness for Subject {
    type Storage = PostgresStorage;

    async fn storage(&self) -> PostgresStorage {
        let storage = match &self.by {
            By::Connect => return self.postgres.storage().await,
            By::Setup(setup) => {
                PostgresStorage::new(self.postgres.pool(setup)).time_limit(PATIENCE)
            }
            By::Proxy(bouncer) => PostgresStorage::connect(bouncer.url())
                .time_limit(PATIENCE)
                .transaction_pooling()
                .await
                .unwrap(),
        };
        storage.migrate().await.unwrap();
        storage
    }

    async fn advance(&self, by: Duration) {
        tokio::time::sleep(by).await;
    }

    fn unit(&self) -> Duration {
        self.unit
    }

    async fn corrupt(&self, _: &PostgresStorage, key: &EncodedKey) -> bool {
        let statement = format!(
            "UPDATE idempotency SET record = 'a session' WHERE key = decode('{key}', 'hex')"
        );
        self.postgres.execute(&statement).await;
        true
    }
}

/// Each rule has a thread: one that computes for long must not delay the waits of another.
async fn keeps_every_rule(subject: Subject) {
    let subject = Arc::new(subject);
    let rules = stream::iter(RULES.iter().map(|&rule| {
        let (subject, runtime) = (subject.clone(), Handle::current());
        spawn_blocking(move || runtime.block_on(check(rule, &*subject)))
    }));
    let mut checked = rules.buffer_unordered(6);
    while let Some(rule) = checked.next().await {
        rule.expect("a rule that is kept");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_rule_in_new_york() {
    let zone = "SET TIME ZONE 'America/New_York'";
    keeps_every_rule(Subject::new(|_| By::Setup(zone))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_rule_in_tokyo() {
    let zone = "SET TIME ZONE 'Asia/Tokyo'";
    keeps_every_rule(Subject::new(|_| By::Setup(zone))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_rule_where_transactions_are_serializable() {
    let level = "SET default_transaction_isolation = 'serializable'";
    keeps_every_rule(Subject::new(|_| By::Setup(level))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_rule_through_a_proxy_that_pools_transactions() {
    keeps_every_rule(Subject::new(|postgres| {
        By::Proxy(Bouncer::before(postgres))
    }))
    .await;
}
