//! Calls that meet at one key.

use std::time::Duration;

use futures_util::future::join_all;
use idempotency_axum::{
    Begin, EncodedKey, Held, PostgresStorage, Storage, StorageErrorKind,
    sqlx::{Connection as _, Executor as _},
};
use idempotency_tests::{PATIENCE, postgres::Postgres};

use super::{KEY, LONG, claim, complete, record};

/// `begin` saw nothing, waits for a transaction that inserts the row, and is told what `end` made of it.
async fn begin_meets(row: &str, end: &str) -> Begin {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    let first = claim();
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    if row == "record" {
        complete(&storage, &KEY, first.token).await;
    }
    postgres
        .execute("CREATE TABLE kept AS SELECT * FROM idempotency; DELETE FROM idempotency")
        .await;

    let mut other = postgres.connection().await;
    other
        .execute("BEGIN; INSERT INTO idempotency SELECT * FROM kept")
        .await
        .unwrap();
    let begin = tokio::spawn(async move { storage.begin(&KEY, &claim()).await });
    postgres
        .until("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shop' AND wait_event_type = 'Lock'")
        .await;
    other.execute(end).await.unwrap();
    other.close().await.unwrap();
    begin.await.unwrap().unwrap()
}

#[tokio::test]
async fn a_record_committed_while_begin_waits_is_found() {
    assert_eq!(
        begin_meets("record", "COMMIT").await,
        Begin::Completed(record("first"))
    );
}

#[tokio::test]
async fn a_claim_committed_while_begin_waits_is_found() {
    let begin = begin_meets("claim", "COMMIT").await;
    assert!(matches!(begin, Begin::InFlight { .. }), "{begin:?}");
}

#[tokio::test]
async fn a_row_rolled_back_while_begin_waits_is_none() {
    assert_eq!(begin_meets("record", "ROLLBACK").await, Begin::Acquired);
}

/// Each of many keys is wanted by many at once: free, and with an expired claim.
async fn one_of_many(storage: &PostgresStorage) {
    for round in 0..20_u8 {
        let key = EncodedKey::from_bytes([round; 32]);
        if round % 2 == 1 {
            let mut expired = claim();
            expired.lease = Duration::ZERO;
            assert_eq!(
                storage.begin(&key, &expired).await.unwrap(),
                Begin::Acquired
            );
        }
        let begins = (0..16).map(|_| {
            let storage = storage.clone();
            tokio::spawn(async move { storage.begin(&key, &claim()).await.unwrap() })
        });
        let begins = join_all(begins).await;
        let acquired = begins
            .iter()
            .filter(|begin| matches!(begin, Ok(Begin::Acquired)));
        assert_eq!(acquired.count(), 1, "{begins:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_gets_the_key() {
    let postgres = Postgres::start();
    one_of_many(&postgres.storage().await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_gets_the_key_where_transactions_are_serializable() {
    let postgres = Postgres::start();
    let pool = postgres.pool("SET default_transaction_isolation = 'serializable'");
    let storage = PostgresStorage::new(pool).time_limit(PATIENCE);
    storage.migrate().await.unwrap();
    one_of_many(&storage).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completion_and_takeover_agree_on_who_has_the_key() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    for round in 0..30_u8 {
        let key = EncodedKey::from_bytes([round; 32]);
        let mut first = claim();
        first.lease = Duration::ZERO;
        assert_eq!(storage.begin(&key, &first).await.unwrap(), Begin::Acquired);
        let (late, next) = (record("late"), claim());
        let completed = storage.complete(&key, first.token, &late, LONG);
        let (held, begin) = tokio::join!(completed, storage.begin(&key, &next));
        match (held.unwrap(), begin.unwrap()) {
            (Held::Yes, Begin::Completed(found)) => assert_eq!(found, late),
            (Held::Lost, Begin::Acquired) => {}
            (held, begin) => panic!("{held:?} and {begin:?}"),
        }
    }
}

#[tokio::test]
async fn a_row_with_another_token_is_unreadable() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    assert_eq!(
        storage.begin(&KEY, &claim()).await.unwrap(),
        Begin::Acquired
    );
    postgres
        .execute("UPDATE idempotency SET token = decode(repeat('00', 16), 'hex')")
        .await;
    let error = storage.begin(&KEY, &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unreadable);

    // A claim that lost its record, or the other way round, is none either.
    assert!(storage.remove(&KEY).await.unwrap());
    let first = claim();
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    complete(&storage, &KEY, first.token).await;
    postgres
        .execute("UPDATE idempotency SET record = NULL")
        .await;
    let error = storage.get(&KEY).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unreadable);
}
