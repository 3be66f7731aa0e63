//! What a file keeps, and what is no file for a storage.

use std::{error::Error as _, fs};

use futures_util::future::join_all;
use idempotency_axum::{
    Begin, Held, InvalidTableName, SqliteStorage, SqliteStorageErrorKind as Kind, Storage,
    StorageErrorKind, sqlx,
};
use idempotency_tests::{PATIENCE, sqlite::SqliteFile};

use super::{KEY, LONG, answer, claim, key, record_of};

#[tokio::test]
async fn a_reopened_file_keeps_claims_and_records() {
    let file = SqliteFile::new();
    let (claimed, completed) = (claim(), claim());
    let storage = file.open().await;
    let begun = storage.begin(&key(1), &claimed).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
    let held = storage
        .complete(&key(2), completed.token, &answer("done"), LONG)
        .await;
    assert_eq!(held.unwrap(), Held::Yes);
    storage.pool().close().await;
    drop(storage);

    let storage = file.open().await;
    let begun = storage.begin(&key(1), &claim()).await.unwrap();
    assert!(matches!(begun, Begin::InFlight { .. }), "{begun:?}");
    let begun = storage.begin(&key(2), &claim()).await.unwrap();
    assert_eq!(begun, Begin::Completed(answer("done")));
    let held = storage
        .complete(&key(1), claimed.token, &answer("late"), LONG)
        .await;
    assert_eq!(held.unwrap(), Held::Yes);
}

#[tokio::test]
async fn a_new_file_has_a_write_ahead_log() {
    let file = SqliteFile::new();
    let _storage = file.open().await;
    let mut connection = file.connection().await;
    let mode = sqlx::query_scalar::<_, String>("PRAGMA journal_mode");
    assert_eq!(mode.fetch_one(&mut connection).await.unwrap(), "wal");
}

#[tokio::test]
async fn a_url_and_a_path_are_the_same_file() {
    let file = SqliteFile::new();
    let by_path = file.open().await;
    let by_url = SqliteStorage::open(file.url()).await.unwrap();
    let begun = by_path.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
    let begun = by_url.time_limit(PATIENCE).begin(&KEY, &claim()).await;
    assert!(matches!(begun, Ok(Begin::InFlight { .. })), "{begun:?}");
}

#[tokio::test]
async fn what_is_no_file_is_refused_with_the_next_step() {
    let file = SqliteFile::new();
    let text = file.directory().join("text");
    fs::write(&text, "longer than the header of a database. ".repeat(100)).unwrap();
    let missing = file.directory().join("missing").join("orders.db");
    let directory = file.directory().to_owned();
    for (location, kind, step) in [
        (missing, Kind::CantOpen, "create its directory"),
        (directory, Kind::CantOpen, "create its directory"),
        (text, Kind::NotADatabase, "name another file"),
        (":memory:".into(), Kind::InMemory, "`MemoryStorage`"),
        ("sqlite::memory:".into(), Kind::InMemory, "`MemoryStorage`"),
        (
            "sqlite:a.db?mode=xy".into(),
            Kind::Path,
            "`sqlite:orders.db`",
        ),
    ] {
        let refused = SqliteStorage::open(&location).await;
        let error = refused.expect_err(&location.display().to_string());
        assert_eq!(error.kind(), kind, "{}: {error:?}", location.display());
        assert!(error.to_string().contains(step), "{error}");
    }
}

#[tokio::test]
async fn a_pool_in_memory_is_refused() {
    let pool = sqlx::SqlitePool::connect("sqlite::memory:").await.unwrap();
    let error = SqliteStorage::new(pool).migrate().await.unwrap_err();
    assert_eq!(error.kind(), Kind::InMemory);
}

#[tokio::test]
async fn without_a_table_an_error_names_the_call() {
    let file = SqliteFile::new();
    let storage = SqliteStorage::open(file.path()).await.unwrap();
    let storage = storage.time_limit(PATIENCE);
    let error = storage.begin(&KEY, &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);
    let source = error.source().unwrap().to_string();
    assert!(source.contains("`SqliteStorage::migrate`"), "{source}");
    storage.migrate().await.unwrap();
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
}

#[tokio::test]
async fn a_foreign_table_and_an_invalid_name_are_refused() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    for columns in ["id INTEGER, key TEXT", "id INTEGER, expires_at TEXT"] {
        let made = format!("DROP TABLE IF EXISTS orders; CREATE TABLE orders ({columns})");
        file.execute(&made).await;
        let error = storage.clone().table("orders").migrate().await;
        assert_eq!(error.unwrap_err().kind(), Kind::ForeignTable, "{columns}");
    }
    let indexes = "SELECT count(*) FROM sqlite_schema WHERE tbl_name = 'orders'";
    assert_eq!(file.number(indexes).await, 1, "it got no index");

    let storage = storage.table("orders; DROP TABLE orders");
    let error = storage.migrate().await.unwrap_err();
    assert_eq!(error.kind(), Kind::TableName);
    assert!(error.source().unwrap().is::<InvalidTableName>());
    let error = storage.begin(&KEY, &claim()).await.unwrap_err();
    assert!(error.source().unwrap().is::<InvalidTableName>());
}

#[tokio::test]
async fn tables_share_nothing() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    let other = storage.clone().table("main.shop_2");
    other.migrate().await.unwrap();
    for storage in [&storage, &other] {
        let begun = storage.begin(&KEY, &claim()).await.unwrap();
        assert_eq!(begun, Begin::Acquired);
    }
    let indexes = "SELECT count(*) FROM sqlite_schema WHERE name IN ('idempotency_expires_at', 'shop_2_expires_at')";
    assert_eq!(file.number(indexes).await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_open_and_migrate_at_once() {
    let file = SqliteFile::new();
    // Each has connections of its own, as a process has.
    join_all((0..16).map(|_| file.open())).await;
    let tables = "SELECT count(*) FROM sqlite_schema WHERE type = 'table'";
    assert_eq!(file.number(tables).await, 1);
}

#[tokio::test]
async fn migrations_of_the_user_stay_as_they_are() {
    let file = SqliteFile::new();
    let storage = SqliteStorage::open(file.path()).await.unwrap();
    file.execute(
        "CREATE TABLE _sqlx_migrations (version BIGINT); INSERT INTO _sqlx_migrations VALUES (7)",
    )
    .await;
    storage.time_limit(PATIENCE).migrate().await.unwrap();
    let versions = "SELECT sum(version) FROM _sqlx_migrations";
    assert_eq!(file.number(versions).await, 7);
    let columns = "SELECT count(*) FROM pragma_table_info('_sqlx_migrations')";
    assert_eq!(file.number(columns).await, 1);
    let records = "SELECT count(*) FROM idempotency";
    assert_eq!(file.number(records).await, 0);
    assert_eq!(record_of(&file.open().await, &KEY).await, None);
}
