use idempotency_axum::idempotency_key;

#[idempotency_key(cache_name = b"orders")]
async fn create_order() {}

fn main() {}
