use idempotency_axum::idempotency_key;

#[idempotency_key(optional ttl = "1h")]
async fn create_order() {}

fn main() {}
