use idempotency_axum::idempotency_key;

#[idempotency_key(ttl = "2w")]
async fn create_order() {}

fn main() {}
