use idempotency_axum::idempotency_key;

#[idempotency_key(ttl = "1h30m")]
async fn create_order() {}

fn main() {}
