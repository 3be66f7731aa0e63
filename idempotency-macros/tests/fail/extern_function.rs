use idempotency_axum::idempotency_key;

#[idempotency_key]
async extern "Rust" fn create_order() {}

fn main() {}
