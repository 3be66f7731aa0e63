use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order(order: String) -> String {
    order
}

fn main() {
    let _answer = create_order("one".to_owned());
}
