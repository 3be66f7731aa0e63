//! How many statements PostgreSQL is sent.

use axum::http::StatusCode;
use idempotency_axum::{StoreOn, sqlx::Postgres};

use super::shop::*;

#[tokio::test]
async fn five_statements_for_an_order_and_three_for_a_replay() {
    let shop = Postgres::start().await;
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        Postgres::order(&mut tx, "counted").await.unwrap();
        CREATED
    });
    for key in ["a", "b", "c"] {
        let mark = shop.server.mark().await;
        assert_status(&app.post(key).await, 201);
        let mut statements = shop.server.statements_since(mark).await;
        statements.retain(|statement| !statement.contains("INTO orders"));
        assert!(statements.len() <= 5, "{statements:#?}");
        assert!(
            statements.last().unwrap().contains("COMMIT"),
            "{statements:#?}"
        );
        for _ in 0..2 {
            let mark = shop.server.mark().await;
            assert!(app.post(key).await.is_replay());
            let statements = shop.server.statements_since(mark).await;
            assert!(statements.len() <= 3, "{statements:#?}");
        }
    }
}

#[tokio::test]
async fn an_undone_order_costs_no_more_than_a_committed_one() {
    let shop = Postgres::start().await;
    for store_on in [StoreOn::success(), StoreOn::below(500)] {
        let app = shop.app_with(
            config().store_on(store_on),
            async move |mut tx: Tx<Postgres>| {
                Postgres::order(&mut tx, "counted").await.unwrap();
                StatusCode::UNPROCESSABLE_ENTITY
            },
        );
        let mark = shop.server.mark().await;
        assert_status(&app.post("k").await, 422);
        let mut statements = shop.server.statements_since(mark).await;
        statements.retain(|statement| !statement.contains("INTO orders"));
        assert!(statements.len() <= 5, "{statements:#?}");
    }
}
