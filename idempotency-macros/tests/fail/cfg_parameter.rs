use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order(#[cfg(all())] order: String) {
    drop(order);
}

fn main() {}
