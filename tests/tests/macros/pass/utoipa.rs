//! `#[utoipa::path]` goes above ours.

use axum::{Json, Router, extract::Path, routing::post};
use idempotency_axum::{idempotency_exempt, idempotency_key};
use utoipa::OpenApi;

/// Creates an order.
#[utoipa::path(post, path = "/orders/{id}", responses((status = 201, description = "created")))]
#[idempotency_key(optional)]
#[tracing::instrument(skip_all)]
pub(crate) async fn create_order(Path(_id): Path<u64>, Json(names): Json<Vec<String>>) -> String {
    names.join(",")
}

#[utoipa::path(post, path = "/search", responses((status = 200)))]
#[idempotency_exempt]
pub(crate) async fn search() -> &'static str {
    "found"
}

#[derive(OpenApi)]
#[openapi(paths(create_order, search))]
struct Api;

pub(crate) fn main() {
    let api = Api::openapi();
    assert_eq!(api.paths.paths.len(), 2);
    let _: Router = Router::new()
        .route("/orders/{id}", post(create_order))
        .route("/search", post(search));
}
