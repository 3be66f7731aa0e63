//! `cfg` takes away everything, `cfg_attr` gives each attribute to where it belongs.
#![deny(warnings)]
#![allow(clippy::non_minimal_cfg)]

use axum::{Router, routing::post};
use idempotency_axum::{idempotency_exempt, idempotency_key};

#[cfg(any())]
#[idempotency_key]
async fn create_order(nothing: of::this::Exists) -> Either {}

#[idempotency_key]
#[cfg(any())]
async fn create_order(nothing: of::this::Exists) -> Either {}

/// The one that is there.
#[idempotency_key]
#[cfg(all())]
async fn create_order() {}

#[idempotency_key]
#[cfg_attr(all(), allow(non_snake_case), cfg(all()), doc = "Docs.")]
#[cfg_attr(any(), idempotency_exempt, utoipa::path(post, path = "/"), cfg(any()))]
#[cfg_attr(all(), cfg_attr(all(), tracing::instrument(skip_all)))]
#[cfg_attr(all(), cfg_attr(any(), nothing_of_this_exists, deprecated))]
async fn cancelOrder(#[cfg_attr(all(), allow(unused_variables))] id: String) {}

#[cfg_attr(all(), idempotency_key(optional))]
#[cfg_attr(any(), idempotency_exempt)]
async fn one_of_two() {}

#[cfg_attr(any(), idempotency_key)]
#[cfg_attr(all(), idempotency_exempt)]
async fn the_other_of_two() {}

#[idempotency_exempt]
#[cfg_attr(all(), cfg(any()), idempotency_key)]
async fn of_no_use() {}

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/create", post(create_order))
        .route("/cancel", post(cancelOrder))
        .route("/one", post(one_of_two))
        .route("/other", post(the_other_of_two));
}
