//! A server that crashes while a transaction is committed.

use std::time::Duration;

use idempotency_axum::{
    Config, Encoded, Engine, KeyTransaction, PostgresStorage, Ran,
    sqlx::{self, Executor as _, Postgres, Row as _},
};
use idempotency_tests::{
    PATIENCE,
    postgres::{Postgres as Server, Proxy},
};
use tokio::time::timeout;

use super::KEY;

const ENCODED: Encoded = Encoded {
    key: KEY,
    fingerprint: None,
};

/// PostgreSQL forgets the number of a transaction of which no record had reached its log, and gives it to the next one. That one is
/// committed.
#[tokio::test]
async fn a_commit_lost_in_a_crash_is_not_that_of_the_next_transaction() {
    // What is not committed does not reach the log either.
    let mut postgres = Server::with(&["wal_writer_delay=10s"]);
    drop(postgres.storage().await);
    postgres
        .execute("CREATE TABLE orders (number bigint)")
        .await;
    let proxy = Proxy::before(&postgres).await;
    let storage = PostgresStorage::connect(proxy.url()).time_limit(PATIENCE);
    let storage = storage.await.unwrap();
    let engine = Engine::new(storage, Config::default().storage_timeout(PATIENCE));
    proxy.lose(b"COMMIT");
    proxy.fall_silent_after_loss();
    let ran = tokio::spawn(async move { engine.run_in(&ENCODED, order).await });
    let lost = timeout(PATIENCE, async {
        while !proxy.has_lost() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    lost.await.expect("a COMMIT to lose");
    let number = "SELECT txid_snapshot_xmax(txid_current_snapshot()) - 1";
    let number = postgres.number(number).await;
    postgres.crash();
    postgres.start_again();
    let mut next = 0;
    while next < number {
        next = postgres.number("SELECT txid_current()").await;
    }
    // Where the log had the number already, it is not given again, and the transaction is known to be aborted.
    proxy.speak();
    let ran: Ran<i64, sqlx::Error> = ran.await.unwrap();
    assert!(matches!(ran, Ran::StorageFailed(_)), "{ran:?}");
    assert_eq!(postgres.number("SELECT count(*) FROM orders").await, 0);
}

async fn order(transaction: &mut KeyTransaction<Postgres>) -> Result<i64, sqlx::Error> {
    let order = "INSERT INTO orders VALUES (txid_current()) RETURNING number";
    Ok(transaction.fetch_one(order).await?.get(0))
}
