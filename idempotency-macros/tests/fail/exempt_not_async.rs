use idempotency_axum::idempotency_exempt;

#[idempotency_exempt]
fn search() -> impl Future<Output = ()> + Send {
    std::future::ready(())
}

fn main() {}
