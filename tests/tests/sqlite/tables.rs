//! Rows that are damaged or have expired.

use std::time::Duration;

use idempotency_axum::{Begin, Env, Held, SqliteStorage, Storage, StorageErrorKind};
use idempotency_tests::{PATIENCE, sqlite::SqliteFile};
use tokio::time::timeout;

use super::{KEY, LONG, answer, claim, key, record_of};

const ROWS: &str = "SELECT count(*) FROM idempotency";

async fn complete(storage: &SqliteStorage, number: u8, ttl: Duration) {
    let (key, token) = (key(number), claim().token);
    let held = storage.complete(&key, token, &answer("done"), ttl).await;
    assert_eq!(held.unwrap(), Held::Yes);
}

#[tokio::test]
async fn a_damaged_row_is_unreadable_until_it_is_removed() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    for is_completed in [false, true] {
        for damage in [
            "state = 'sealed'",
            "state = CASE state WHEN 'claimed' THEN 'completed' ELSE 'claimed' END",
            "token = x'00'",
            "token = randomblob(16)",
            "value = randomblob(32)",
            "checksum = checksum + 1",
            // Of another key.
            "key = zeroblob(32)",
        ] {
            match is_completed {
                true => complete(&storage, 7, LONG).await,
                false => {
                    let begun = storage.begin(&KEY, &claim()).await.unwrap();
                    assert_eq!(begun, Begin::Acquired);
                }
            }
            let damaged = format!("UPDATE idempotency SET {damage}");
            file.execute(&damaged).await;
            let key = match damage.starts_with("key") {
                true => key(0),
                false => KEY,
            };
            let what = format!("{damage}, completed: {is_completed}");
            let begun = storage.begin(&key, &claim()).await.expect_err(&what);
            assert_eq!(begun.kind(), StorageErrorKind::Unreadable, "{what}");
            let got = storage.get(&key).await.expect_err(&what);
            assert_eq!(got.kind(), StorageErrorKind::Unreadable, "{what}");
            assert!(storage.remove(&key).await.unwrap(), "{what}");
            assert_eq!(storage.get(&key).await.unwrap(), None, "{what}");
        }
    }
}

#[tokio::test]
async fn an_unreadable_row_is_cleared_by_its_ttl() {
    let file = SqliteFile::new();
    let (env, clock) = Env::simulated(7);
    let storage = file.open().await.env(env);
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
    file.execute("UPDATE idempotency SET state = 'sealed'")
        .await;
    assert!(storage.begin(&KEY, &claim()).await.is_err());
    clock.advance(LONG);
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
}

#[tokio::test]
async fn expired_rows_are_purged_in_batches() {
    let file = SqliteFile::new();
    let (env, clock) = Env::simulated(7);
    let storage = file.open().await.env(env);
    for number in 0..3 {
        complete(&storage, number, LONG / 2).await;
    }
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
    // More than one batch.
    file.execute(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1200) \
         INSERT INTO idempotency SELECT randomblob(32), 'completed', randomblob(16), x'', 0, 1, NULL, NULL FROM n",
    )
    .await;
    clock.advance(LONG / 4);
    assert_eq!(storage.purge_expired().await.unwrap(), 1_200);
    assert_eq!(storage.purge_expired().await.unwrap(), 0);
    clock.advance(LONG / 4);
    assert_eq!(record_of(&storage, &key(0)).await, None, "it has expired");
    assert_eq!(file.number(ROWS).await, 4);
    assert_eq!(storage.purge_expired().await.unwrap(), 3);
    assert_eq!(file.number(ROWS).await, 1, "the claim lives");
}

#[tokio::test]
async fn a_purger_purges_until_it_is_stopped() {
    const PERIOD: Duration = Duration::from_secs(60);

    let file = SqliteFile::new();
    let (env, clock) = Env::simulated(7);
    let storage = file.open().await.env(env);
    let purger = storage.purge_every(PERIOD);
    for number in 0..3 {
        complete(&storage, number, PERIOD).await;
        let purged = async {
            while file.number(ROWS).await > 0 {
                clock.advance(PERIOD / 2);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, purged).await.expect("it is purged");
    }
    purger.stop().await;
    complete(&storage, 3, PERIOD).await;
    clock.advance(10 * PERIOD);
    assert_eq!(clock.sleeping(), 0);
    assert_eq!(file.number(ROWS).await, 1);
}
