use idempotency_axum::idempotency_key;

#[idempotency_key]
#[idempotency_axum::idempotency_exempt]
struct CreateOrder;

fn main() {}
