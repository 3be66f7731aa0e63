use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order<T>(order: axum::Json<T>) {
    drop(order);
}

fn main() {}
