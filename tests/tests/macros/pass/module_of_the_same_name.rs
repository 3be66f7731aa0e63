//! A constant lives among the values only.
#![deny(warnings)]

use axum::{Router, routing::post};
use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order(order: create_order::Order) -> create_order::Order {
    create_order::check(order)
}

mod create_order {
    pub(super) type Order = String;

    pub(super) fn check(order: Order) -> Order {
        order
    }
}

#[idempotency_key]
async fn item() -> &'static str {
    item::NAME
}

#[allow(non_camel_case_types)]
struct item {}

impl item {
    const NAME: &'static str = "item";
}

pub(crate) fn main() {
    let item {} = item {};
    let _: Router = Router::new()
        .route("/orders", post(create_order))
        .route("/items", post(item));
}
