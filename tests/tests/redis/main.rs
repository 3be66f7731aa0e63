//! Redis as a storage, a lock and a cache: real servers, started by the tests.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::time::Duration;

use axum::{Router, http::StatusCode, routing::post};
use idempotency_axum::{
    Config, EncodedKey, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy, NewClaim,
    RedisStorage, Token,
};
use idempotency_tests::{Answer, Events, Gate, PATIENCE, Runs, Server, assert_replays};

mod chaos;
mod cluster;
mod conformance;
mod connect;
mod connections;
mod faults;
mod memory;
mod processes;
mod restarts;
mod settings;
mod traffic;

/// The executable that the tests start several of.
const SERVICE: &str = env!("CARGO_BIN_EXE_service");

const KEY: EncodedKey = EncodedKey::from_bytes([7; 32]);

/// A claim for half a minute.
fn claim() -> NewClaim {
    NewClaim {
        token: Token::random(),
        fingerprint: None,
        lease: Duration::from_secs(30),
    }
}

/// A service in this process.
struct Shop {
    server: Server,
    layer: IdempotencyLayer,
    runs: Runs,
    events: Events,
}

impl Shop {
    async fn open(storage: RedisStorage) -> Self {
        Self::with(storage, |config| config, None).await
    }

    /// With a handler that waits at a gate.
    async fn gated(storage: RedisStorage, gate: &Gate) -> Self {
        Self::with(storage, |config| config, Some(gate.clone())).await
    }

    async fn with(
        storage: RedisStorage,
        change: impl FnOnce(Config) -> Config,
        gate: Option<Gate>,
    ) -> Self {
        let (runs, events) = (Runs::new(), Events::new());
        let config = change(Config::default().observer(events.clone()));
        let layer = IdempotencyLayer::enforce(storage).config(config);
        let counted = runs.clone();
        let handler = async move |key: IdempotencyKey| {
            let n = counted.next();
            if let Some(gate) = gate {
                gate.enter().await;
            }
            (StatusCode::CREATED, format!("{} {n}", key.as_str()))
        };
        let router = Router::new()
            .route(
                "/orders",
                post(handler.idempotency_key(KeyPolicy::required())),
            )
            .layer(layer.clone());
        Self {
            server: Server::start(router).await,
            layer,
            runs,
            events,
        }
    }

    async fn order(&self, key: &str) -> Answer {
        self.server.post("/orders").key(key).send().await
    }
}

/// Looks until something is there that nobody tells of.
async fn until<T>(mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let found = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    found.await.expect("it comes")
}
