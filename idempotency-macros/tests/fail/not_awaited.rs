use idempotency_axum::{IdempotencyLayer, MemoryStorage};

async fn connect() -> Result<MemoryStorage, std::io::Error> {
    Ok(MemoryStorage::new())
}

fn main() {
    let _ = IdempotencyLayer::enforce(connect());
}
