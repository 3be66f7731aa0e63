use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order(order: impl Into<String>) {
    drop(order);
}

fn main() {}
