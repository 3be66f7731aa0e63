//! The expansion allows itself nothing of what a crate may forbid, but for its names.
#![forbid(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    unused,
    clippy::unwrap_used
)]

use axum::{Router, routing::post};
use idempotency_axum::{ManualIdempotency, idempotency_exempt, idempotency_key};

/// All parameters have needs.
#[idempotency_key(optional)]
pub(crate) async fn create_order(_: ManualIdempotency) {}

/// No parameter has needs.
#[idempotency_exempt]
async fn search(text: String) -> String {
    text
}

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/orders", post(create_order))
        .route("/search", post(search));
}
