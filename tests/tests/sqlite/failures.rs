//! A file that is full or read-only: what was recorded is replayed, and the rest is refused.

use std::error::Error as _;

use futures_util::future::join_all;
use idempotency_axum::{
    Begin, Held, Outcome, SqliteStorage, SqliteStorageError, SqliteStorageErrorKind as Kind,
    Storage, StorageError, StorageErrorKind,
    sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};
use idempotency_tests::{PATIENCE, sqlite::SqliteFile};

use super::{KEY, LONG, answer, claim, key, record_of};

fn storage(options: SqliteConnectOptions) -> SqliteStorage {
    let pool = SqlitePoolOptions::new().connect_lazy_with(options);
    SqliteStorage::new(pool).time_limit(PATIENCE)
}

/// A storage whose file has room for so many pages of 4 KiB.
pub(crate) async fn small(file: &SqliteFile, pages: &'static str) -> SqliteStorage {
    let options = file.options().create_if_missing(true);
    let storage = storage(options.pragma("max_page_count", pages));
    storage.migrate().await.unwrap();
    storage
}

#[track_caller]
pub(crate) fn assert_caused_by(error: &StorageError, kind: StorageErrorKind, cause: Kind) {
    assert_eq!(error.kind(), kind, "{error:?}");
    let source = error.source().and_then(|source| source.downcast_ref());
    let source: &SqliteStorageError = source.expect("the storage's own error");
    assert_eq!(source.kind(), cause, "{error:?}");
}

#[tokio::test]
async fn a_read_only_file_replays_and_refuses_claims() {
    let file = SqliteFile::new();
    let writable = file.open().await;
    let held = writable
        .complete(&KEY, claim().token, &answer("done"), LONG)
        .await;
    assert_eq!(held.unwrap(), Held::Yes);

    let storage = storage(file.options().read_only(true));
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(begun, Begin::Completed(answer("done")));
    let error = storage.begin(&key(1), &claim()).await.unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Unavailable, Kind::ReadOnly);
    let error = storage.remove(&KEY).await.unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Unavailable, Kind::ReadOnly);
    let error = storage.migrate().await.unwrap_err();
    assert_eq!(error.kind(), Kind::ReadOnly);
    let step = error.to_string();
    assert!(step.contains("let this process write"), "{step}");
}

#[tokio::test]
async fn a_full_file_replays_and_keeps_tombstones() {
    let file = SqliteFile::new();
    let storage = small(&file, "24").await;
    let running = claim();
    let begun = storage.begin(&KEY, &running).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
    // As many answers as have room. The last ones are tombstones.
    let body = "x".repeat(1_000);
    let mut recorded = 0;
    let error = loop {
        let (key, token) = (key(100 + recorded), claim().token);
        if let Err(error) = storage.complete(&key, token, &answer(&*body), LONG).await {
            break error;
        }
        recorded += 1;
        assert!(recorded < 150, "it is never full");
    };
    assert_caused_by(&error, StorageErrorKind::Full, Kind::Full);
    let replayed = storage.begin(&key(100), &claim()).await.unwrap();
    assert_eq!(replayed, Begin::Completed(answer(body)));

    // The operation ran: there is no room for its answer, and it is never run again.
    let large = answer("y".repeat(100_000));
    let held = storage.complete(&KEY, running.token, &large, LONG).await;
    assert_eq!(held.unwrap(), Held::Yes);
    let record = record_of(&storage, &KEY).await.unwrap();
    assert!(
        matches!(record.outcome, Outcome::Tombstone(_)),
        "{record:?}"
    );
}

#[tokio::test]
async fn a_write_that_fails_takes_no_other_with_it() {
    const TOO_LARGE: u8 = 10;

    let file = SqliteFile::new();
    let storage = small(&file, "64").await;
    // They wait together, so they are committed together; one has no room.
    let calls = (0..20).map(|n| {
        let body = match n {
            TOO_LARGE => "y".repeat(1_000_000),
            _ => n.to_string(),
        };
        let storage = &storage;
        async move {
            let token = claim().token;
            storage.complete(&key(n), token, &answer(body), LONG).await
        }
    });
    for held in join_all(calls).await {
        assert_eq!(held.unwrap(), Held::Yes);
    }
    for n in 0..20 {
        let record = record_of(&storage, &key(n)).await.unwrap();
        match (n, &record.outcome) {
            (TOO_LARGE, Outcome::Tombstone(_)) => {}
            _ => assert_eq!(record, answer(n.to_string())),
        }
    }
}
