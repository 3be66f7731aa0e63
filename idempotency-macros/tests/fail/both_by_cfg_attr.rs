use idempotency_axum::idempotency_key;

#[idempotency_key]
#[cfg_attr(all(), idempotency_axum::idempotency_exempt)]
async fn create_order() {}

fn main() {}
