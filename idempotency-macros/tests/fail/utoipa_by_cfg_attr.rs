use idempotency_axum::idempotency_key;

#[idempotency_key]
#[cfg_attr(all(), inline, cfg_attr(all(), utoipa::path(post, path = "/orders", responses((status = 200)))))]
async fn create_order() {}

fn main() {}
