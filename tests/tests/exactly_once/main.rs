//! Handlers whose writes are committed together with their record, over HTTP.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

/// One test per database for each of these async functions.
macro_rules! on_each_database {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[tokio::test]
            async fn postgres() {
                super::$name::<idempotency_axum::sqlx::Postgres>().await;
            }

            #[tokio::test]
            async fn sqlite() {
                super::$name::<idempotency_axum::sqlx::Sqlite>().await;
            }
        }
    )+};
}

mod by_hand;
mod crowds;
mod duplicates;
mod failures;
mod leaving;
mod limits;
mod misuse;
mod network;
mod phases;
mod shop;
mod statuses;
mod streams;
mod traffic;
