use idempotency_axum::idempotency_key;

#[idempotency_key("orders")]
async fn create_order() {}

fn main() {}
