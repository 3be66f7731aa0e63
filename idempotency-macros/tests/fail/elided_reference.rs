use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order(order: &str) {
    let _ = order;
}

fn main() {}
