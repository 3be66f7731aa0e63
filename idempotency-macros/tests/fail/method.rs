use idempotency_axum::idempotency_key;

pub struct Orders;

impl Orders {
    #[idempotency_key]
    pub async fn create(&self) {}
}

fn main() {}
