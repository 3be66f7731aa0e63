use axum::{Router, routing::post};
use idempotency_axum::idempotency_key;

pub struct Order;

#[idempotency_key]
async fn create_order() -> Order {
    Order
}

fn main() {
    let _: Router = Router::new().route("/", post(create_order));
}
