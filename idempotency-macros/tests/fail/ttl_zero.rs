use idempotency_axum::idempotency_key;

#[idempotency_key(ttl = "0ms")]
async fn create_order() {}

fn main() {}
