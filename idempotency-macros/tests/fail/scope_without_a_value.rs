use idempotency_axum::idempotency_key;

#[idempotency_key(scope)]
async fn create_order() {}

fn main() {}
