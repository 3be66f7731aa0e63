use idempotency_axum::idempotency_exempt;

#[idempotency_exempt]
async fn search<T>(query: axum::extract::Query<T>) {
    drop(query);
}

fn main() {}
