//! PostgreSQL as a storage: real servers, started by the tests.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::time::Duration;

use axum::{Router, http::StatusCode, routing::post};
use idempotency_axum::{
    Config, EncodedKey, Held, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy,
    NewClaim, Outcome, PostgresStorage, Record, Storage, StoredResponse, Token,
};
use idempotency_tests::{Answer, PATIENCE, Runs, Server, assert_replays};

mod conformance;
mod connect;
mod connections;
mod crashes;
mod processes;
mod races;
mod table;
mod traffic;
mod transactions;

/// The executable that the tests start several of.
const SERVICE: &str = env!("CARGO_BIN_EXE_service");

const KEY: EncodedKey = EncodedKey::from_bytes([7; 32]);

const LONG: Duration = Duration::from_secs(3600);

/// A claim for an hour.
fn claim() -> NewClaim {
    NewClaim {
        token: Token::random(),
        fingerprint: None,
        lease: LONG,
    }
}

fn record(body: &'static str) -> Record {
    let answer = StoredResponse::new(StatusCode::CREATED, &http::HeaderMap::new(), body);
    Record {
        fingerprint: None,
        outcome: Outcome::Response(answer),
    }
}

/// Completes `key` with `record("first")`.
async fn complete(storage: &PostgresStorage, key: &EncodedKey, token: Token) {
    let held = storage.complete(key, token, &record("first"), LONG).await;
    assert_eq!(held.unwrap(), Held::Yes);
}

/// A service in this process.
struct Shop {
    server: Server,
    runs: Runs,
}

impl Shop {
    async fn open(storage: PostgresStorage) -> Self {
        let runs = Runs::new();
        let config = Config::default().storage_timeout(PATIENCE);
        let layer = IdempotencyLayer::enforce(storage).config(config);
        let counted = runs.clone();
        let handler = async move |key: IdempotencyKey| {
            let n = counted.next();
            (StatusCode::CREATED, format!("{} {n}", key.as_str()))
        };
        let router = Router::new()
            .route(
                "/orders",
                post(handler.idempotency_key(KeyPolicy::required())),
            )
            .layer(layer);
        Self {
            server: Server::start(router).await,
            runs,
        }
    }

    async fn order(&self, key: &str) -> Answer {
        self.server.post("/orders").key(key).send().await
    }
}
