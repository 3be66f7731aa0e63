use idempotency_axum::idempotency_key;

#[idempotency_key(ttl = "1h", optional, ttl = "2h")]
async fn create_order() {}

fn main() {}
