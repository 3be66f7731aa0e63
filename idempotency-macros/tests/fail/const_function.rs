use idempotency_axum::idempotency_key;

#[idempotency_key]
const fn create_order() {}

fn main() {}
