use idempotency_axum::idempotency_key;

#[idempotency_key(optional, cache = "orders")]
async fn create_order() {}

fn main() {}
