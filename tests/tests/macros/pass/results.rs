//! Whatever axum takes as an answer.
#![deny(warnings)]

use axum::{
    Json, Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::post,
};
use idempotency_axum::{idempotency_exempt, idempotency_key};

#[idempotency_key]
async fn unit() {}

#[idempotency_key]
async fn explicit_unit() -> () {}

#[idempotency_key]
async fn opaque(body: String) -> impl IntoResponse {
    (StatusCode::CREATED, [(header::LOCATION, "/orders/1")], body)
}

#[idempotency_key]
async fn opaque_inside() -> Result<impl IntoResponse, (StatusCode, impl IntoResponse + use<>)> {
    if false {
        return Err((StatusCode::CONFLICT, "no"));
    }
    Ok(Json(["yes"]))
}

#[idempotency_key]
async fn axum_result() -> axum::response::Result<&'static str> {
    Err(StatusCode::IM_A_TEAPOT)?
}

#[idempotency_exempt]
async fn boxed() -> Box<str> {
    "boxed".into()
}

#[idempotency_exempt]
async fn response() -> Response {
    todo_less().await.into_response()
}

async fn todo_less() -> &'static str {
    "done"
}

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/1", post(unit))
        .route("/2", post(explicit_unit))
        .route("/3", post(opaque))
        .route("/4", post(opaque_inside))
        .route("/5", post(axum_result))
        .route("/6", post(boxed))
        .route("/7", post(response));
}
