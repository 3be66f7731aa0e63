use idempotency_axum::{ManualIdempotency, idempotency_exempt};

#[idempotency_exempt]
async fn search(id: axum::extract::Path<u64>, manual: ManualIdempotency) {
    drop((id, manual));
}

fn main() {}
