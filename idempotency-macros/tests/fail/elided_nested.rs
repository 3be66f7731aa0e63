use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order(order: Option<[(u8, &'static Vec<&str>); 2]>) {
    let _ = order;
}

fn main() {}
