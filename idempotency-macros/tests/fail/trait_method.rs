use idempotency_axum::idempotency_key;

trait Orders {
    #[idempotency_key]
    async fn create();
}

fn main() {}
