use idempotency_axum::idempotency_exempt;
use utoipa as openapi;

#[idempotency_exempt]
#[openapi::path(post, path = "/orders", responses((status = 200)))]
async fn create_order() {}

fn main() {}
