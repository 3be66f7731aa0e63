#[idempotency_axum::idempotency_exempt]
#[idempotency_axum::idempotency_key(optional)]
async fn create_order() {}

fn main() {}
