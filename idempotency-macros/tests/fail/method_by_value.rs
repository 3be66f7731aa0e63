use idempotency_axum::idempotency_exempt;

pub struct Orders;

impl Orders {
    #[idempotency_exempt]
    pub async fn create(mut self: Box<Self>, name: String) -> String {
        self = Box::new(Self);
        drop(self);
        name
    }
}

fn main() {}
