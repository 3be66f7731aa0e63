use idempotency_axum::idempotency_key;

#[idempotency_key(optional, optional = false)]
async fn create_order() {}

fn main() {}
