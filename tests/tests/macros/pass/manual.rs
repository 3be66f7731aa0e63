//! `ManualIdempotency` is found by its type; an exempt handler may take the key, if there is one.
#![deny(warnings)]

use axum::{Router, routing::post};
use idempotency_axum::{
    IdempotencyKey, ManualIdempotency, NotProtected, idempotency_exempt, idempotency_key,
};

mod aliases {
    pub(super) type Previous = super::ManualIdempotency;
    pub(super) type MaybePrevious = Option<Previous>;
}

#[idempotency_key]
async fn direct(manual: ManualIdempotency, body: String) -> String {
    format!("{body}{}", manual.exists())
}

#[idempotency_key(optional)]
async fn alias(aliases::Previous { .. }: aliases::Previous) {}

#[idempotency_key(optional)]
async fn optional_alias(manual: aliases::MaybePrevious) -> String {
    manual.is_some().to_string()
}

#[idempotency_key]
async fn fallible(manual: Result<ManualIdempotency, NotProtected>) -> String {
    manual.is_ok().to_string()
}

#[idempotency_exempt]
async fn exempt_with_a_key(key: Option<IdempotencyKey>) -> String {
    key.is_some().to_string()
}

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/1", post(direct))
        .route("/2", post(alias))
        .route("/3", post(optional_alias))
        .route("/4", post(fallible))
        .route("/5", post(exempt_with_a_key));
}
