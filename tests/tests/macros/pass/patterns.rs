//! Patterns stay with the function.
#![deny(warnings)]

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    http::HeaderMap,
    routing::post,
};
use idempotency_axum::{idempotency_exempt, idempotency_key};

#[derive(Clone)]
struct AppState {
    prefix: String,
    suffix: char,
}

struct Wildcard;

/// A constant in scope of the patterns that the expansion makes.
#[allow(non_upper_case_globals, dead_code)]
const request: u8 = 1;

#[idempotency_key]
async fn patterns(
    State(AppState { mut prefix, suffix }): State<AppState>,
    Path((id, _)): Path<(u64, String)>,
    _: Query<Vec<(String, String)>>,
    ref headers @ HeaderMap { .. }: HeaderMap,
    mut names: Json<Vec<String>>,
) -> String {
    names.0.clear();
    prefix.push(suffix);
    format!("{prefix}{id}{}", headers.len())
}

#[idempotency_key]
async fn parameter_attributes(#[allow(unused_variables)] body: String) {}

/// A parameter named as the handler.
#[idempotency_exempt]
async fn order(Json(order): Json<String>) -> String {
    let Wildcard = Wildcard;
    order
}

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/{id}/{name}", post(patterns))
        .route("/attributes", post(parameter_attributes))
        .route("/order", post(order))
        .with_state(AppState {
            prefix: String::new(),
            suffix: 's',
        });
}
