use idempotency_axum::idempotency_key;

const DELIVERY: &str = "X-GitHub-Delivery";

#[idempotency_key(header = DELIVERY)]
async fn create_order() {}

fn main() {}
