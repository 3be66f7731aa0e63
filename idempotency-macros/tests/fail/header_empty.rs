use idempotency_axum::idempotency_key;

#[idempotency_key(header = "")]
async fn create_order() {}

fn main() {}
