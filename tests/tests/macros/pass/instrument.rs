//! `#[tracing::instrument]` goes above or below ours.
#![deny(warnings)]

use axum::{Router, extract::Path, http::StatusCode, routing::post};
use idempotency_axum::{idempotency_exempt, idempotency_key};

#[tracing::instrument(skip(body), fields(length = body.len()), err(Debug))]
#[idempotency_key(optional)]
async fn above(
    Path((id, name)): Path<(u64, String)>,
    mut body: String,
) -> Result<String, StatusCode> {
    body.push_str(&format!("{id} {name}"));
    Ok(body)
}

#[idempotency_key]
#[tracing::instrument(skip_all, ret)]
async fn below(Path((id, _)): Path<(u64, String)>, body: String) -> String {
    format!("{id} {body}")
}

#[tracing::instrument]
#[idempotency_exempt]
#[axum::debug_handler]
async fn with_debug_handler(body: String) -> String {
    body
}

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/above/{id}/{name}", post(above))
        .route("/below/{id}/{name}", post(below))
        .route("/both", post(with_debug_handler));
}
