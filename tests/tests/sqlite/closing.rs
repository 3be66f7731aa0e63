//! What is left of a storage that was closed: one file.

use std::{pin::pin, time::Duration};

use futures_util::future::join_all;
use idempotency_axum::{
    BeginTransaction, Committed, Held, NewTransaction, SqliteStorage,
    SqliteStorageErrorKind as Kind, Storage, StorageErrorKind, Token, Transaction, Writes, sqlx,
};
use idempotency_tests::{PATIENCE, sqlite::SqliteFile};
use tokio::time::timeout;

use super::{KEY, LONG, answer, claim, failures::assert_caused_by, key};

const RECORDS: &str = "SELECT count(*) FROM idempotency";

const A_WHILE: Duration = Duration::from_millis(150);

fn names(file: &SqliteFile) -> Vec<String> {
    let entries = std::fs::read_dir(file.directory()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

async fn open_transaction(storage: &SqliteStorage) -> Box<dyn Transaction> {
    let new = NewTransaction {
        token: Token::random(),
        fingerprint: None,
        ttl: LONG,
    };
    let lent = storage.transactions().expect("it has some");
    match lent.begin(&KEY, &new).await.unwrap() {
        BeginTransaction::Acquired(transaction) => transaction,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_closed_storage_leaves_one_file() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    let _ = open_transaction(&storage).await.roll_back().await;
    let created = sqlx::query("CREATE TABLE orders (id INTEGER)").execute(storage.pool());
    created.await.unwrap();
    let writes = (0..50).map(|n| {
        let storage = storage.clone();
        tokio::spawn(async move {
            let token = claim().token;
            storage
                .complete(&key(n), token, &answer("done"), LONG)
                .await
        })
    });
    let writes: Vec<_> = writes.collect();
    // All of them are queued.
    tokio::task::yield_now().await;
    storage.close().await.unwrap();
    for held in join_all(writes).await {
        assert_eq!(held.unwrap().unwrap(), Held::Yes);
    }
    assert_eq!(names(&file), ["orders.db"]);
    storage.close().await.unwrap();

    let error = storage.begin(&KEY, &claim()).await.unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Unavailable, Kind::Other);
    let error = storage.get(&KEY).await.unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Unavailable, Kind::Other);
    assert_eq!(file.number(RECORDS).await, 50);
}

#[tokio::test]
async fn a_pool_that_was_given_stays_open() {
    let file = SqliteFile::new();
    drop(file.open().await);
    let pool = sqlx::SqlitePool::connect_with(file.options())
        .await
        .unwrap();
    let storage = SqliteStorage::new(pool.clone());
    storage.migrate().await.unwrap();
    storage.close().await.unwrap();
    let records = sqlx::query_scalar::<_, i64>(RECORDS).fetch_one(&pool).await;
    assert_eq!(records.unwrap(), 0);
}

#[tokio::test]
async fn closing_waits_for_the_open_transaction() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    let open = open_transaction(&storage).await;
    let mut close = pin!(storage.close());
    assert!(timeout(A_WHILE, &mut close).await.is_err());
    let committed = open.commit(answer("done"), LONG, Writes::Keep).await;
    assert!(matches!(committed, Committed::Yes), "{committed:?}");
    timeout(PATIENCE, close).await.expect("it ends").unwrap();
    assert_eq!(names(&file), ["orders.db"]);
    assert_eq!(file.number(RECORDS).await, 1);
}

#[tokio::test]
async fn closing_does_not_wait_for_ever() {
    let file = SqliteFile::new();
    let storage = file
        .open()
        .await
        .time_limit(A_WHILE)
        .max_transaction(A_WHILE);
    let leaked = open_transaction(&storage).await;
    let error = storage.close().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    drop(leaked);
    storage.close().await.unwrap();
    assert_eq!(names(&file), ["orders.db"]);
}
