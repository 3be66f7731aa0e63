use idempotency_axum::idempotency_key;

pub struct Orders;

impl Orders {
    #[idempotency_key]
    pub async fn create(order: String) -> String {
        order
    }
}

fn main() {}
