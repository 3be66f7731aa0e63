use axum::{Router, routing::post};
use idempotency_axum::{IdempotencyHandler, KeyPolicy};

async fn create_order() {}

fn main() {
    let routes = post(create_order).idempotency_key(KeyPolicy::required());
    let _: Router = Router::new().route("/", routes);
}
