use idempotency_axum::idempotency_key;

#[idempotency_key(required)]
async fn create_order() {}

fn main() {}
