use idempotency_axum::idempotency_key;

#[idempotency_key(ttl = 3600)]
async fn create_order() {}

fn main() {}
