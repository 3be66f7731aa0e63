use idempotency_axum::idempotency_key;

#[idempotency_key(ttl = "999999999999999999d")]
async fn create_order() {}

fn main() {}
