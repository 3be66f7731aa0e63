//! All forms of the arguments.
#![deny(warnings)]

use axum::{Router, routing::post};
use idempotency_axum::{Scope, StoreOn, idempotency_exempt, idempotency_key};

#[idempotency_key]
async fn bare() {}

#[idempotency_key()]
async fn empty() {}

#[idempotency_key(optional)]
async fn optional() {}

#[idempotency_key(optional = true)]
async fn optional_true() {}

#[idempotency_key(optional = false)]
async fn optional_false() {}

#[idempotency_key(cache_name = "orders", ttl = "24h", optional)]
async fn any_order() {}

#[idempotency_key(ttl = r"250ms", optional = true, cache_name = r#"my "orders""#)]
async fn trailing_comma() {}

#[idempotency_key[ttl = "60"]]
async fn brackets() {}

#[idempotency_exempt]
async fn exempt() {}

#[idempotency_exempt()]
async fn exempt_empty() {}

#[idempotency_key(max_request_body = "10MiB", header = "X-GitHub-Delivery", store_on = StoreOn::all, scope = Scope::none)]
async fn of_a_webhook() {}

mod functions {
    pub(super) fn store_on() -> super::StoreOn {
        super::StoreOn::below(500)
    }

    pub(super) fn scope<T: ToString + Default>() -> super::Scope {
        super::Scope::header(format!("x-tenant-{}", T::default().to_string()))
    }
}

// The names of the arguments are those of functions, of generic ones too.
#[idempotency_key(store_on = self::functions::store_on, scope = functions::scope::<u8>, max_request_body = "512")]
async fn functions_by_path() {}

macro_rules! handler {
    ($name:ident, $optional:literal, $cache_name:literal, $ttl:expr, $store_on:expr, $scope:path, $answer:ty) => {
        #[idempotency_key(optional = $optional, cache_name = $cache_name, ttl = $ttl, store_on = $store_on, scope = $scope)]
        async fn $name(body: $answer) -> $answer {
            body
        }
    };
}

handler!(
    made_by_a_macro,
    true,
    "orders",
    "5m",
    StoreOn::all,
    Scope::none,
    String
);

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/1", post(bare))
        .route("/2", post(empty))
        .route("/3", post(optional))
        .route("/4", post(optional_true))
        .route("/5", post(optional_false))
        .route("/6", post(any_order))
        .route("/7", post(trailing_comma))
        .route("/8", post(brackets))
        .route("/9", post(exempt))
        .route("/10", post(exempt_empty))
        .route("/11", post(made_by_a_macro))
        .route("/12", post(of_a_webhook))
        .route("/13", post(functions_by_path));
}
