use idempotency_axum::idempotency_key;

#[idempotency_key]
async unsafe fn create_order() {}

fn main() {}
