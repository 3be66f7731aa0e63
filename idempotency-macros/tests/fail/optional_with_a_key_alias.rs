use idempotency_axum::{ExtractorNeeds, IdempotencyKey, Needs, idempotency_key};

struct Operation(IdempotencyKey);

impl ExtractorNeeds for Operation {
    const NEEDS: Needs = Needs::KEY;
}

impl<S: Sync> axum::extract::FromRequestParts<S> for Operation {
    type Rejection = idempotency_axum::NotProtected;

    async fn from_request_parts(
        parts: &mut axum::http::request::Parts,
        state: &S,
    ) -> Result<Self, Self::Rejection> {
        IdempotencyKey::from_request_parts(parts, state).await.map(Self)
    }
}

type Alias = Operation;

#[idempotency_key(optional)]
async fn create_order(operation: Alias) {
    drop(operation.0);
}

fn main() {}
