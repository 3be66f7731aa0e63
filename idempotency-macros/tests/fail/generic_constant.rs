use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order<const N: usize>() {
    let _ = N;
}

fn main() {}
