use axum::{Router, extract::Path, routing::post};
use idempotency_axum::idempotency_key;

pub struct Order;

#[idempotency_key]
async fn create_order(Path(id): Path<u64>, order: Order) {
    drop((id, order));
}

fn main() {
    let _: Router = Router::new().route("/{id}", post(create_order));
}
