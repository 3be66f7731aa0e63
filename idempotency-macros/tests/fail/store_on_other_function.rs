use idempotency_axum::{Scope, idempotency_key};

#[idempotency_key(store_on = Scope::none)]
async fn create_order() {}

fn main() {}
