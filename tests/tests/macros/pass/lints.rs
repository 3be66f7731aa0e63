//! Lints say of a handler what they say of a plain function, no more and no less.
#![deny(
    warnings,
    missing_copy_implementations,
    missing_debug_implementations,
    missing_docs,
    non_local_definitions,
    single_use_lifetimes,
    unnameable_types,
    unreachable_pub,
    unused_lifetimes,
    unused_qualifications,
    unused_results,
    clippy::all,
    clippy::pedantic
)]
#![allow(clippy::unused_async, reason = "handlers are async")]

use axum::{Json, Router, extract::Extension, routing::post};
use idempotency_axum::{ManualIdempotency, idempotency_exempt, idempotency_key};

/// An old type.
#[derive(Clone, Copy, Debug)]
#[deprecated]
pub(crate) struct Old;

/// With docs.
#[idempotency_key(optional, ttl = "1h")]
pub(crate) async fn documented(_: Json<u8>) {}

#[idempotency_exempt]
async fn undocumented_but_private(_: Json<u8>) {}

#[idempotency_key]
#[expect(dead_code, reason = "no route leads here")]
async fn dead(_: Json<u8>) {}

#[idempotency_key]
#[expect(unreachable_pub, reason = "nothing outside sees this module")]
pub async fn unreachable() {}

#[idempotency_key]
#[expect(unused_variables, non_snake_case, reason = "as in a plain function")]
async fn unusedVariable(body: String) {}

#[idempotency_exempt]
#[expect(deprecated, reason = "for old clients")]
async fn takes_what_is_old(_: Option<Extension<Old>>) {}

#[idempotency_key]
#[allow(deprecated)]
async fn takes_what_is_old_too(_: ManualIdempotency, _: Option<Extension<Old>>) {}

#[idempotency_key]
#[deprecated = "what is old may take what is old"]
async fn is_old(_: Option<Extension<Old>>) {}

/// A private type in the signature of something public is no more a matter here than in axum's own `Handler` bound.
#[idempotency_key]
#[expect(private_interfaces, reason = "only axum makes one")]
#[expect(unreachable_pub, reason = "nothing outside sees this module")]
pub async fn takes_what_is_private(_: Option<Extension<Private>>) {}

#[derive(Clone, Copy, Debug)]
struct Private;

#[idempotency_key]
#[must_use]
#[inline]
async fn other_attributes() -> &'static str {
    "fine"
}

pub(crate) fn main() {
    #[idempotency_key]
    async fn in_a_body(_: String) {}

    #[expect(deprecated, reason = "the use of a deprecated handler is seen")]
    let old = post(is_old);
    let _: Router = Router::new()
        .route("/1", post(documented))
        .route("/2", post(undocumented_but_private))
        .route("/3", post(unreachable))
        .route("/4", post(unusedVariable))
        .route("/5", post(takes_what_is_old))
        .route("/6", post(takes_what_is_old_too))
        .route("/7", old)
        .route("/8", post(takes_what_is_private))
        .route("/9", post(other_attributes))
        .route("/10", post(in_a_body));
}
