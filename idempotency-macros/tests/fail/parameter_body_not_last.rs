use axum::{Router, extract::Path, routing::post};
use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn create_order(order: String, Path(id): Path<u64>) {
    drop((id, order));
}

fn main() {
    let _: Router = Router::new().route("/{id}", post(create_order));
}
