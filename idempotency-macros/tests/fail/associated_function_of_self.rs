use idempotency_axum::idempotency_key;

pub struct Orders;

impl Orders {
    #[idempotency_key]
    pub async fn create(orders: axum::extract::State<Self>) {
        drop(orders);
    }
}

fn main() {}
