//! A handler named by a keyword.
#![deny(warnings)]

use axum::{Router, routing::post};
use idempotency_axum::{idempotency_exempt, idempotency_key};

#[idempotency_key]
async fn r#try(r#type: String) -> String {
    r#type
}

#[idempotency_exempt]
async fn r#match() {}

pub(crate) fn main() {
    assert!(format!("{:?}", r#try).ends_with("::try"));
    let _: Router = Router::new()
        .route("/try", post(r#try))
        .route("/match", post(r#match));
}
