//! Several processes behind one PostgreSQL.

use std::time::Duration;

use idempotency_axum::sqlx::{self, PgPool};
use idempotency_tests::{
    postgres::Postgres,
    redis::{Spec, assert_fifty_of_two_thousand_run},
};

use super::SERVICE;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_requests_at_four_processes_are_fifty_executions() {
    let postgres = Postgres::start();
    drop(postgres.storage().await);
    let spec = Spec::postgres(SERVICE, &postgres.url()).wait(Duration::from_secs(60));
    assert_fifty_of_two_thousand_run(&spec).await;
}

/// Statements that met another one are sent again, so clients notice nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_executions_where_transactions_are_serializable() {
    fifty_executions_under("serializable").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_executions_where_reads_are_repeatable() {
    fifty_executions_under("repeatable read").await;
}

async fn fifty_executions_under(isolation: &str) {
    let postgres = Postgres::start();
    drop(postgres.storage().await);
    let url = postgres.url();
    let separator = if url.contains('?') { '&' } else { '?' };
    // A backslash keeps the space in the value.
    let value = isolation.replace(' ', "%5C%20");
    let url = format!("{url}{separator}options=-c%20default_transaction_isolation%3D{value}");
    let pool = PgPool::connect(&url).await.unwrap();
    let shown: String = sqlx::query_scalar("SHOW transaction_isolation")
        .fetch_one(&pool)
        .await
        .unwrap();
    assert_eq!(shown, isolation);
    let spec = Spec::postgres(SERVICE, &url).wait(Duration::from_secs(60));
    assert_fifty_of_two_thousand_run(&spec).await;
}

#[tokio::test]
async fn what_a_killed_process_held_is_free_when_its_lease_is_over() {
    let postgres = Postgres::start();
    drop(postgres.storage().await);
    let spec = Spec::postgres(SERVICE, &postgres.url()).lease(Duration::from_secs(2));
    let mut dies = spec.clone().held().start().await;
    let other = spec.wait(Duration::from_secs(60)).start().await;
    let lost = tokio::spawn(dies.post("/orders").key("k").try_send());
    dies.until("ran k", 1).await;
    let duplicate = other.post("/orders").key("k").start();
    other.until("event waiting", 1).await;
    dies.kill().await;
    assert!(lost.await.unwrap().is_err(), "an answer of a dead process");
    let first = duplicate.await.unwrap();
    assert_eq!(first.code(), 201, "{first:?}");
    assert_eq!(other.count("ran k"), 1);
}
