use idempotency_axum::{IdempotencyKey, idempotency_key};

#[idempotency_key(optional)]
async fn create_order(id: axum::extract::Path<u64>, key: IdempotencyKey) {
    drop((id, key));
}

fn main() {}
