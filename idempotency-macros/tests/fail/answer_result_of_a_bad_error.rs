use axum::{Router, routing::post};
use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order() -> Result<String, std::num::ParseIntError> {
    "1".parse::<u8>().map(|number| number.to_string())
}

fn main() {
    let _: Router = Router::new().route("/", post(create_order));
}
