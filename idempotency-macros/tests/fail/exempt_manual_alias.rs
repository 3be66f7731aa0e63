use idempotency_axum::{ManualIdempotency, idempotency_exempt};

type Previous = Option<ManualIdempotency>;

#[idempotency_exempt]
async fn search(previous: Previous) {
    drop(previous);
}

fn main() {}
