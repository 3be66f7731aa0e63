//! SQLite as a storage: real files, and processes that share one.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use std::time::Duration;

use idempotency_axum::{
    EncodedKey, Entry, NewClaim, Outcome, Record, Storage, StoredResponse, Token,
};

mod closing;
mod conformance;
mod failures;
mod files;
mod locks;
mod phases;
mod processes;
mod runtimes;
mod tables;
mod transactions;

/// The executable that the tests start several of.
const SERVICE: &str = env!("CARGO_BIN_EXE_service");

const KEY: EncodedKey = EncodedKey::from_bytes([7; 32]);

/// A lease or TTL that no test outlasts.
const LONG: Duration = Duration::from_secs(3600);

/// A claim with a token of its own.
fn claim() -> NewClaim {
    NewClaim {
        token: Token::random(),
        fingerprint: None,
        lease: LONG,
    }
}

fn key(number: u8) -> EncodedKey {
    EncodedKey::from_bytes([number; 32])
}

/// An answer with this body.
fn answer(body: impl Into<String>) -> Record {
    let headers = http::HeaderMap::new();
    let response = StoredResponse::new(http::StatusCode::CREATED, &headers, body.into());
    Record {
        fingerprint: None,
        outcome: Outcome::Response(response),
    }
}

/// The record of a key.
async fn record_of(storage: &impl Storage, key: &EncodedKey) -> Option<Record> {
    match storage.get(key).await.unwrap() {
        Some(Entry::Completed(record)) => Some(record),
        _ => None,
    }
}
