use axum::{Router, routing::post};
use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order() -> String {
    let number = std::rc::Rc::new(1);
    std::future::ready(()).await;
    number.to_string()
}

fn main() {
    let _: Router = Router::new().route("/", post(create_order));
}
