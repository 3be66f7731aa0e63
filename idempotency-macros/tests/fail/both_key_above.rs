use idempotency_axum::idempotency_key;

#[idempotency_key]
#[idempotency_axum::idempotency_exempt]
async fn create_order() {}

fn main() {}
