//! The table: how it is made, and how expired rows leave it.

use std::{error::Error as _, time::Duration};

use futures_util::future::join_all;
use idempotency_axum::{
    Begin, PostgresStorage, Storage, StorageErrorKind,
    sqlx::{Executor as _, Row as _},
};
use idempotency_tests::{PATIENCE, postgres::Postgres};

use super::{KEY, claim, complete};

/// Rows of which the lease or the TTL is over.
const EXPIRED: &str = "INSERT INTO idempotency (key, token, checksum, expires_at) \
    SELECT sha256(n::text::bytea), decode(repeat('00', 16), 'hex'), 0, clock_timestamp() - interval '1 s' \
    FROM generate_series(1, 1700) AS n";

const COUNT: &str = "SELECT count(*) FROM idempotency";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_may_migrate_at_once() {
    let postgres = Postgres::start();
    postgres.execute("CREATE SCHEMA shop").await;
    let migrations = (0..8).map(|n| {
        let url = postgres.url();
        tokio::spawn(async move {
            let storage = PostgresStorage::connect(url).time_limit(PATIENCE).await;
            let table = ["idempotency", "shop.records"][n % 2];
            let storage = storage.unwrap().table(table);
            storage.migrate().await.unwrap();
            storage
        })
    });
    let storages = join_all(migrations).await;
    for storage in storages.iter().take(2) {
        let storage = storage.as_ref().unwrap();
        // Tables share nothing.
        assert_eq!(
            storage.begin(&KEY, &claim()).await.unwrap(),
            Begin::Acquired
        );
    }
    let tables = "SELECT count(*) FROM pg_tables WHERE schemaname IN ('public', 'shop')";
    assert_eq!(postgres.number(tables).await, 2);
    let indexes = "SELECT count(*) FROM pg_indexes WHERE indexname IN ('idempotency_expires_at', 'records_expires_at')";
    assert_eq!(postgres.number(indexes).await, 2);
}

#[tokio::test]
async fn a_table_that_exists_needs_no_right_to_create() {
    let postgres = Postgres::start();
    postgres.execute(PostgresStorage::SCHEMA).await;
    postgres
        .execute(
            "CREATE ROLE app LOGIN; REVOKE CREATE ON SCHEMA public FROM PUBLIC; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON idempotency TO app",
        )
        .await;
    let url = postgres.url().replace("postgres@", "app@");
    let storage = PostgresStorage::connect(url).time_limit(PATIENCE);
    let storage = storage.await.unwrap();
    storage.migrate().await.unwrap();
    let first = claim();
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    complete(&storage, &KEY, first.token).await;
    assert_eq!(storage.purge_expired().await.unwrap(), 0);
    let error = storage.table("other").migrate().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);
}

#[tokio::test]
async fn a_missing_table_says_what_to_do() {
    let postgres = Postgres::start();
    let storage = PostgresStorage::connect(postgres.url()).time_limit(PATIENCE);
    let storage = storage.await.unwrap();
    let error = storage.begin(&KEY, &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);
    let source = error.source().unwrap().to_string();
    assert!(source.contains("PostgresStorage::migrate"), "{source}");

    postgres
        .execute("CREATE TABLE idempotency (id bigint)")
        .await;
    let error = storage.migrate().await.unwrap_err();
    let source = error.source().unwrap().to_string();
    assert!(source.contains("another version"), "{source}");
}

#[tokio::test]
async fn a_purge_removes_what_has_expired_and_nothing_else() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    assert_eq!(
        storage.begin(&KEY, &claim()).await.unwrap(),
        Begin::Acquired
    );
    postgres.execute(EXPIRED).await;

    // A row that somebody holds is left for later.
    let mut other = postgres.connection().await;
    other
        .execute("BEGIN; SELECT FROM idempotency WHERE key = sha256('1') FOR UPDATE")
        .await
        .unwrap();
    let mark = postgres.mark().await;
    assert_eq!(storage.purge_expired().await.unwrap(), 1699);
    let statements = postgres.statements_since(mark).await;
    assert_eq!(statements.len(), 4, "{statements:#?}");
    assert_eq!(postgres.number(COUNT).await, 2);
    other.execute("ROLLBACK").await.unwrap();
    assert_eq!(storage.purge_expired().await.unwrap(), 1);
    assert_eq!(storage.purge_expired().await.unwrap(), 0);
    assert!(storage.get(&KEY).await.unwrap().is_some());
}

#[tokio::test]
async fn a_purge_finds_expired_rows_by_the_index() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    let mark = postgres.mark().await;
    assert_eq!(storage.purge_expired().await.unwrap(), 0);
    let statement = postgres.statements_since(mark).await.remove(0);
    let (_, statement) = statement.split_once(": ").unwrap();
    let explain = format!(
        "SET enable_seqscan = off; EXPLAIN {}",
        statement.replace("$1", "500")
    );
    let mut connection = postgres.connection().await;
    let plan = connection.fetch_all(&*explain).await.unwrap();
    let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
    let plan = plan.join("\n");
    assert!(plan.contains("Index Cond: (expires_at <="), "{plan}");
}

#[tokio::test]
async fn the_background_purger_purges_until_it_is_stopped() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    postgres.execute(EXPIRED).await;
    let purger = storage.purge_every(Duration::from_millis(50));
    postgres
        .until("SELECT (count(*) = 0)::int::bigint FROM idempotency")
        .await;
    purger.stop().await;
    postgres.execute(EXPIRED).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(postgres.number(COUNT).await, 1700);
}
