use idempotency_axum::idempotency_key;

#[idempotency_key(header = "X-GitHub-Delivery: *")]
async fn create_order() {}

fn main() {}
