use idempotency_axum::idempotency_key;

#[idempotency_key(max_request_body = "10 megabytes")]
async fn create_order() {}

fn main() {}
