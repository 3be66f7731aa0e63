use axum::{Router, extract::Path, routing::post};
use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn by_number(Path(id): Path<u64>) -> String {
    id.to_string()
}

async fn by_name(Path(name): Path<String>) -> String {
    name
}

fn main() {
    let _: Router = Router::new().route("/{id}", post(by_number.or(by_name)));
}
