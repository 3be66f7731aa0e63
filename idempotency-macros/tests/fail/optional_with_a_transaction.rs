use axum::{extract::FromRequestParts, http::request::Parts};
use idempotency_axum::{ExtractorNeeds, Needs, NotProtected, idempotency_key};

/// As `IdempotentTransaction`, without a database.
struct Transaction;

impl ExtractorNeeds for Transaction {
    const NEEDS: Needs = Needs::transaction("PostgreSQL");
}

impl<S: Sync> FromRequestParts<S> for Transaction {
    type Rejection = NotProtected;

    async fn from_request_parts(_: &mut Parts, _: &S) -> Result<Self, NotProtected> {
        Ok(Self)
    }
}

#[idempotency_key(optional)]
async fn create(transaction: Transaction) {
    drop(transaction);
}

fn main() {}
