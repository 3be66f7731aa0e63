use idempotency_axum::idempotency_key;

#[idempotency_key(store_on = || idempotency_axum::StoreOn::all())]
async fn create_order() {}

fn main() {}
