use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order<'a>(order: &'a str) {
    let _ = order;
}

fn main() {}
