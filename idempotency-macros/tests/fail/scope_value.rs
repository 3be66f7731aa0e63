use idempotency_axum::idempotency_key;

#[idempotency_key(scope = idempotency_axum::Scope::none())]
async fn create_order() {}

fn main() {}
