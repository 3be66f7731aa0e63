use idempotency_axum::idempotency_key;

#[idempotency_key]
fn create_order() {}

fn main() {}
