//! `#[axum::debug_handler]` goes below ours, with its own arguments too.
#![deny(warnings)]

use axum::{Json, Router, extract::State, response::IntoResponse, routing::post};
use idempotency_axum::{IdempotencyKey, ManualIdempotency, idempotency_exempt, idempotency_key};

#[derive(Clone)]
struct AppState;

#[idempotency_key]
#[axum::debug_handler]
async fn create_order(
    State(AppState): State<AppState>,
    _key: IdempotencyKey,
    _manual: Option<ManualIdempotency>,
    Json(names): Json<Vec<String>>,
) -> impl IntoResponse {
    names.join(",")
}

#[idempotency_exempt]
#[axum::debug_handler(state = AppState)]
async fn search() -> &'static str {
    "found"
}

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/orders", post(create_order))
        .route("/search", post(search))
        .with_state(AppState);
}
