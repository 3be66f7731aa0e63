//! A handler without docs is the one error, where a plain function would be it.
#![deny(missing_docs, unreachable_pub, missing_debug_implementations, warnings)]

use idempotency_axum::{idempotency_exempt, idempotency_key};

#[idempotency_key]
pub async fn create_order() {}

/// With docs.
#[idempotency_key]
pub async fn cancel_order() {}

/// With docs.
#[idempotency_exempt]
pub async fn search(_: String) {}

fn main() {}
