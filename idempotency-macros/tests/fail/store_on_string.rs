use idempotency_axum::idempotency_key;

#[idempotency_key(store_on = "below 500")]
async fn create_order() {}

fn main() {}
