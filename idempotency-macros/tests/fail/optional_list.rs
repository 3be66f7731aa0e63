use idempotency_axum::idempotency_key;

#[idempotency_key(optional(true))]
async fn create_order() {}

fn main() {}
