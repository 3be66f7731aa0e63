//! Connections that are lost, that lead to a server which does not write, or whose runtime is gone.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use idempotency_axum::{Begin, EncodedKey, Env, Held, PostgresStorage, Storage, StorageErrorKind};
use idempotency_tests::{
    PATIENCE,
    postgres::{Postgres, Proxy},
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::oneshot,
};

use super::{KEY, LONG, Shop, assert_replays, claim, complete};

#[tokio::test]
async fn lost_connections_are_replaced() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    let first = claim();
    // Several of them.
    let begins = join_all((0..10).map(|_| storage.begin(&KEY, &first))).await;
    assert!(
        begins
            .iter()
            .all(|begin| matches!(begin, Ok(Begin::Acquired)))
    );
    postgres
        .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'shop'")
        .await;
    complete(&storage, &KEY, first.token).await;
}

#[tokio::test]
async fn a_connection_that_may_not_write_is_closed() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    let terminate =
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'shop'";
    postgres
        .execute(&format!(
            "ALTER DATABASE postgres SET default_transaction_read_only = on; {terminate}"
        ))
        .await;
    let error = storage.begin(&KEY, &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable);
    postgres
        .execute(
            "BEGIN READ WRITE; ALTER DATABASE postgres RESET default_transaction_read_only; COMMIT",
        )
        .await;
    // A connection that was kept would still be read-only.
    assert_eq!(
        storage.begin(&KEY, &claim()).await.unwrap(),
        Begin::Acquired
    );
}

#[tokio::test]
async fn a_statement_that_takes_too_long_is_a_timeout() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    let mut other = postgres.connection().await;
    idempotency_axum::sqlx::Executor::execute(&mut other, "BEGIN; LOCK TABLE idempotency")
        .await
        .unwrap();
    let impatient = storage.clone().time_limit(Duration::from_millis(200));
    let error = impatient.begin(&KEY, &claim()).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Timeout);
    drop(other);
    let (key, claim) = (EncodedKey::from_bytes([1; 32]), claim());
    let begin = storage.begin(&key, &claim).await;
    assert_eq!(begin.unwrap(), Begin::Acquired);
}

/// The statement is sent again over another connection, and finds what it did.
#[tokio::test]
async fn a_statement_whose_answer_is_lost_is_sent_again() {
    let postgres = Postgres::start();
    drop(postgres.storage().await);
    let proxy = Proxy::before(&postgres).await;
    let storage = PostgresStorage::connect(proxy.url()).time_limit(PATIENCE);
    let storage = storage.await.unwrap();
    let first = claim();
    let lose = || proxy.lose_the_answer_to(KEY.as_bytes());
    // Prepared already, so that the message that has the key is the one that is carried out.
    assert!(storage.get(&KEY).await.unwrap().is_none());
    lose();
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    assert!(proxy.has_lost());
    lose();
    assert_eq!(
        storage.renew(&KEY, first.token, LONG).await.unwrap(),
        Held::Yes
    );
    assert!(proxy.has_lost());
    lose();
    complete(&storage, &KEY, first.token).await;
    assert!(proxy.has_lost());
    let begin = storage.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(begin, Begin::Completed(super::record("first")));
}

fn runtime() -> Runtime {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build();
    runtime.unwrap()
}

#[test]
fn another_runtime_goes_on_when_the_first_is_gone() {
    let postgres = Postgres::start();
    let first = runtime();
    let claim = claim();
    let storage = first.block_on(async {
        let storage = postgres.storage().await;
        assert_eq!(storage.begin(&KEY, &claim).await.unwrap(), Begin::Acquired);
        storage
    });
    first.shutdown_background();
    runtime().block_on(async {
        complete(&storage, &KEY, claim.token).await;
    });
}

#[test]
fn the_background_goes_on_while_the_runtime_stands_still() {
    let postgres = Postgres::start();
    let only = Builder::new_current_thread().enable_all().build().unwrap();
    let claim = claim();
    let storage = only.block_on(async {
        let storage = postgres.storage().await;
        assert_eq!(storage.begin(&KEY, &claim).await.unwrap(), Begin::Acquired);
        storage
    });
    // Nobody drives `only` from here on.
    let (tell, told) = oneshot::channel();
    let token = claim.token;
    Env::system().background().unwrap().spawn(async move {
        let _ = tell.send(storage.renew(&KEY, token, LONG).await);
    });
    let told = told.blocking_recv().unwrap();
    assert_eq!(told.unwrap(), Held::Yes);
    drop(only);
}

/// What is confirmed before a crash is there after it: no key runs twice once it was answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_under_load_runs_nothing_twice() {
    const CLIENTS: usize = 4;

    let mut postgres = Postgres::start();
    let storage = PostgresStorage::connect(postgres.url()).time_limit(Duration::from_secs(10));
    let storage = storage.await.unwrap();
    storage.migrate().await.unwrap();
    let shop = Arc::new(Shop::open(storage).await);
    let answered = Arc::new(Mutex::new(HashMap::new()));
    let is_over = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (shop, answered, is_over) = (shop.clone(), answered.clone(), is_over.clone());
            tokio::spawn(async move {
                for n in 0.. {
                    let key = format!("{client}-{n}");
                    // As a client does: until it has an answer.
                    let answer = loop {
                        let answer = shop.order(&key).await;
                        match answer.code() {
                            201 => break answer,
                            409 if answer.is_replay() => break answer,
                            409 | 423 | 503 => tokio::time::sleep(Duration::from_millis(20)).await,
                            other => panic!("{other}"),
                        }
                    };
                    answered
                        .lock()
                        .unwrap()
                        .insert(key, answer.text().to_owned());
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                }
            })
        })
        .collect();
    let enough = async |count: usize| {
        let reached = tokio::time::timeout(PATIENCE, async {
            while answered.lock().unwrap().len() < count {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        reached.await.expect("answers");
    };
    for round in 1..=3 {
        enough(round * 40).await;
        postgres.crash();
        postgres.start_again();
        enough(round * 40 + 20).await;
    }
    is_over.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    let answered = answered.lock().unwrap().clone();
    assert_eq!(shop.runs.count(), answered.len(), "a key ran twice");
    for (key, text) in answered {
        assert_replays(&shop.order(&key).await, &text);
    }
}
