use idempotency_axum::idempotency_key;

#[axum::debug_handler]
#[idempotency_key]
async fn create_order(order: String) -> String {
    order
}

fn main() {}
