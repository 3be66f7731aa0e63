use idempotency_axum::idempotency_key;

#[idempotency_key(ttl =)]
async fn create_order() {}

fn main() {}
