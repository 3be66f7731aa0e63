use idempotency_axum::idempotency_key;

#[idempotency_key]
#[idempotency_key(optional)]
async fn create_order() {}

fn main() {}
