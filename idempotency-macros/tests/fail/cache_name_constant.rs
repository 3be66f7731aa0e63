use idempotency_axum::idempotency_key;

#[idempotency_key(cache_name = ORDERS)]
async fn create_order() {}

pub const ORDERS: &str = "orders";

fn main() {}
