use idempotency_axum::idempotency_key;

#[idempotency_key(optional)]
pub struct CreateOrder;

fn main() {}
