use idempotency_axum::idempotency_key;

#[idempotency_key(max_request_body = "99999999999GiB")]
async fn create_order() {}

fn main() {}
