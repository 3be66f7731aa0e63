use idempotency_axum::idempotency_exempt;

#[idempotency_exempt(optional)]
async fn search() {}

fn main() {}
