//! What `connect` refuses.

use std::error::Error as _;

use idempotency_axum::{InvalidTableName, PostgresConnectErrorKind, PostgresStorage};
use idempotency_tests::{
    PATIENCE,
    postgres::{Bouncer, Postgres},
};

async fn refusal(url: &str) -> PostgresConnectErrorKind {
    let connect = PostgresStorage::connect(url).time_limit(PATIENCE);
    connect.await.expect_err("a refusal").kind()
}

#[tokio::test]
async fn what_is_no_url_is_refused() {
    let kind = refusal("postgres://[").await;
    assert_eq!(kind, PostgresConnectErrorKind::Url);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_unreachable() {
    let kind = refusal("postgres://postgres@localhost/postgres?host=/nowhere").await;
    assert_eq!(kind, PostgresConnectErrorKind::Unreachable);
}

#[tokio::test]
async fn a_user_or_database_that_is_not_there_is_refused() {
    let postgres = Postgres::start();
    for url in [
        postgres.url().replace("/postgres?", "/another?"),
        postgres.url().replace("postgres@", "another@"),
    ] {
        assert_eq!(refusal(&url).await, PostgresConnectErrorKind::Refused);
    }
}

#[tokio::test]
async fn a_server_that_does_not_write_is_refused() {
    let postgres = Postgres::with(&["default_transaction_read_only=on"]);
    let kind = refusal(&postgres.url()).await;
    assert_eq!(kind, PostgresConnectErrorKind::ReadOnly);
}

#[tokio::test]
async fn a_proxy_that_pools_transactions_is_refused_unless_it_is_said() {
    let postgres = Postgres::start();
    let bouncer = Bouncer::before(&postgres);
    let connect = PostgresStorage::connect(bouncer.url()).time_limit(PATIENCE);
    let error = connect.await.expect_err("a refusal");
    assert_eq!(error.kind(), PostgresConnectErrorKind::PoolsTransactions);
    assert!(
        error.to_string().contains(".transaction_pooling()"),
        "{error}"
    );

    let connect = PostgresStorage::connect(bouncer.url()).time_limit(PATIENCE);
    let storage = connect.transaction_pooling().await.expect("a connection");
    storage.migrate().await.expect("a table");
}

#[tokio::test]
async fn a_name_that_breaks_the_rule_is_refused() {
    let connect = PostgresStorage::connect("postgres://localhost/shop").table("Orders; --");
    let error = connect.await.expect_err("a refusal");
    assert_eq!(error.kind(), PostgresConnectErrorKind::Table);
    let source = error.source().and_then(|source| source.downcast_ref());
    let source: &InvalidTableName = source.expect("the name");
    assert_eq!(source.name(), "Orders; --");
}

#[tokio::test]
async fn errors_and_debug_show_no_password() {
    let url = "postgres://shop:geheim@localhost:1/shop";
    let connect = PostgresStorage::connect(url);
    assert!(!format!("{connect:?}").contains("geheim"));
    let error = connect.await.expect_err("nobody listens there");
    assert!(!format!("{error:?} {error}").contains("geheim"));
}
