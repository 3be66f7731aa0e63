use idempotency_axum::idempotency_exempt;

pub struct Orders;

#[idempotency_exempt]
impl Orders {}

fn main() {}
