//! The write lock in another's hands, and who waits for a claim.

use std::{pin::pin, time::Duration};

use futures_util::future::join_all;
use idempotency_axum::{
    Begin, Env, Held, Storage, StorageErrorKind,
    sqlx::{self, SqliteConnection},
};
use idempotency_tests::{PATIENCE, sqlite::SqliteFile};
use tokio::time::timeout;

use super::{KEY, LONG, answer, claim, key};

const A_WHILE: Duration = Duration::from_millis(150);

/// A connection that holds the write lock.
async fn writer(file: &SqliteFile) -> SqliteConnection {
    let mut writer = file.connection().await;
    let begin = sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut writer).await;
    begin.unwrap();
    writer
}

async fn commit(mut writer: SqliteConnection) {
    let commit = sqlx::raw_sql("COMMIT").execute(&mut writer).await;
    commit.unwrap();
}

#[tokio::test]
async fn a_lock_that_is_freed_in_time_is_waited_for() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    let writer = writer(&file).await;
    let claim = claim();
    let mut begin = pin!(storage.begin(&KEY, &claim));
    // Longer than SQLite waits by itself.
    assert!(timeout(A_WHILE, &mut begin).await.is_err());
    commit(writer).await;
    assert_eq!(begin.await.unwrap(), Begin::Acquired);
}

#[tokio::test]
async fn a_lock_that_is_held_too_long_is_a_timeout() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    let held = storage
        .complete(&key(1), claim().token, &answer("done"), LONG)
        .await;
    assert_eq!(held.unwrap(), Held::Yes);
    let writer = writer(&file).await;

    let hasty = storage.clone().time_limit(Duration::from_millis(100));
    let claims: Vec<_> = (0..3).map(|_| claim()).collect();
    let begins = claims.iter().map(|claim| hasty.begin(&KEY, claim));
    for begun in join_all(begins).await {
        assert_eq!(begun.unwrap_err().kind(), StorageErrorKind::Timeout);
    }
    // A replay needs no lock.
    let begun = storage.begin(&key(1), &claim()).await.unwrap();
    assert_eq!(begun, Begin::Completed(answer("done")));

    commit(writer).await;
    // What timed out left nothing behind.
    let claim = claim();
    let begun = storage.begin(&KEY, &claim).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
    let held = storage.renew(&KEY, claim.token, LONG).await.unwrap();
    assert_eq!(held, Held::Yes);
}

#[tokio::test]
async fn a_call_that_is_dropped_in_the_queue_has_no_effect() {
    let file = SqliteFile::new();
    let storage = file.open().await;
    let writer = writer(&file).await;
    let (first, dropped) = (claim(), claim());
    let keys = [key(1), key(2)];
    let mut begin = pin!(storage.begin(&keys[0], &first));
    assert!(timeout(A_WHILE, &mut begin).await.is_err());
    // It stands behind the first one.
    let behind = storage.begin(&keys[1], &dropped);
    assert!(timeout(A_WHILE, behind).await.is_err());
    commit(writer).await;
    assert_eq!(begin.await.unwrap(), Begin::Acquired);
    let begun = storage.begin(&key(3), &claim()).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
    assert_eq!(storage.get(&keys[1]).await.unwrap(), None);
}

/// The clock stands still, so no waiter looks by itself.
#[tokio::test]
async fn waiters_of_this_process_are_woken_at_once() {
    let file = SqliteFile::new();
    let (env, _clock) = Env::simulated(7);
    let storage = file.open().await.env(env);
    for n in 0..20 {
        let (key, claim) = (key(n), claim());
        let begun = storage.begin(&key, &claim).await.unwrap();
        assert_eq!(begun, Begin::Acquired);
        let wait = || {
            let storage = storage.clone();
            tokio::spawn(async move { storage.wait(&key, LONG).await })
        };
        let waits = [wait(), wait(), wait()];
        tokio::task::yield_now().await;
        let held = storage
            .complete(&key, claim.token, &answer("done"), LONG)
            .await;
        assert_eq!(held.unwrap(), Held::Yes);
        for wait in waits {
            timeout(PATIENCE, wait)
                .await
                .expect("woken")
                .unwrap()
                .unwrap();
        }
    }
}

#[tokio::test]
async fn waiters_of_another_process_look() {
    let file = SqliteFile::new();
    let (ours, theirs) = (file.open().await, file.open().await);
    let claim = claim();
    assert_eq!(ours.begin(&KEY, &claim).await.unwrap(), Begin::Acquired);
    let mut wait = pin!(theirs.wait(&KEY, LONG));
    assert!(timeout(A_WHILE, &mut wait).await.is_err());
    let held = ours.release(&KEY, claim.token).await.unwrap();
    assert_eq!(held, Held::Yes);
    timeout(PATIENCE, wait).await.expect("it looks").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_claims_by_four_connections_one_wins() {
    let file = SqliteFile::new();
    let storages = join_all((0..4).map(|_| file.open())).await;
    for n in 0..20 {
        let begins = (0..16).map(|at| {
            let storage = storages[at % 4].clone();
            tokio::spawn(async move { storage.begin(&key(n), &claim()).await.unwrap() })
        });
        let begun = join_all(begins).await.into_iter().map(Result::unwrap);
        let acquired = begun.filter(|begun| *begun == Begin::Acquired);
        assert_eq!(acquired.count(), 1);
    }
}
