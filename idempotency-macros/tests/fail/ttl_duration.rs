use idempotency_axum::idempotency_key;

#[idempotency_key(ttl = std::time::Duration::from_secs(3600))]
async fn create_order() {}

fn main() {}
