use idempotency_axum::{IdempotencyKey, idempotency_exempt};

#[idempotency_exempt]
async fn search(key: IdempotencyKey) {
    drop(key);
}

fn main() {}
