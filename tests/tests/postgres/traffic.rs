//! How many statements PostgreSQL is sent, and who is notified: what its log shows.

use std::pin::pin;

use futures_util::future::{join_all, select};
use idempotency_axum::{
    Begin, EncodedKey, Held, PostgresStorage, Storage, sqlx::postgres::PgListener,
};
use idempotency_tests::{PATIENCE, postgres::Postgres};
use tokio::time::timeout;

use super::{KEY, LONG, Shop, assert_replays, claim, complete, record};

#[tokio::test]
async fn two_statements_for_a_first_execution_and_one_for_a_replay() {
    let postgres = Postgres::start();
    let shop = Shop::open(postgres.storage().await).await;
    for n in 0..3 {
        let key = format!("k{n}");
        let mark = postgres.mark().await;
        assert_eq!(shop.order(&key).await.code(), 201);
        let statements = postgres.statements_since(mark).await;
        assert_eq!(statements.len(), 2, "{statements:#?}");
        for _ in 0..3 {
            let mark = postgres.mark().await;
            assert_replays(&shop.order(&key).await, &format!("{key} {}", n + 1));
            let statements = postgres.statements_since(mark).await;
            assert_eq!(statements.len(), 1, "{statements:#?}");
        }
    }
}

#[tokio::test]
async fn a_replay_writes_nothing() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    let first = claim();
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    complete(&storage, &KEY, first.token).await;
    let next = "SELECT txid_snapshot_xmax(txid_current_snapshot())";
    let before = postgres.number(next).await;
    for _ in 0..10 {
        let begin = storage.begin(&KEY, &claim()).await.unwrap();
        assert_eq!(begin, Begin::Completed(record("first")));
    }
    assert_eq!(postgres.number(next).await, before);
}

/// Two storages that share no connection, and a claim in the first.
async fn two(postgres: &Postgres) -> (PostgresStorage, PostgresStorage) {
    (postgres.storage().await, postgres.storage().await)
}

const MARKED: &str = "SELECT count(*) FROM idempotency WHERE awaited";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completion_wakes_all_who_wait_elsewhere() {
    let postgres = Postgres::start();
    let (here, there) = two(&postgres).await;
    let first = claim();
    assert_eq!(here.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    let waiters: Vec<_> = (0..50)
        .map(|_| {
            let there = there.clone();
            tokio::spawn(async move { there.wait(&KEY, LONG).await.unwrap() })
        })
        .collect();
    postgres.until(MARKED).await;
    let mark = postgres.mark().await;
    complete(&here, &KEY, first.token).await;
    timeout(PATIENCE, join_all(waiters))
        .await
        .expect("they are woken");
    // They share their looks: one for the first of them, one for those that came meanwhile, and a poll or two.
    let statements = postgres.statements_since(mark).await;
    assert!(statements.len() < 10, "{statements:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_many_gets_its_turn() {
    const MANY: usize = 60;

    let postgres = Postgres::start();
    let (here, there) = two(&postgres).await;
    let turn = async |storage: &PostgresStorage| {
        let claim = claim();
        loop {
            match storage.begin(&KEY, &claim).await.unwrap() {
                Begin::Acquired => break,
                _ => storage.wait(&KEY, LONG).await.unwrap(),
            }
        }
        assert_eq!(storage.release(&KEY, claim.token).await.unwrap(), Held::Yes);
    };
    let storages = [here, there];
    let turns = join_all((0..MANY).map(|n| turn(&storages[n % 2])));
    timeout(PATIENCE, turns).await.expect("a turn for each");
}

#[tokio::test]
async fn only_a_claim_that_somebody_waits_for_is_notified() {
    let postgres = Postgres::start();
    let (here, there) = two(&postgres).await;
    let channel = "idempotency_".to_owned()
        + &postgres
            .number("SELECT 'idempotency'::regclass::oid::bigint")
            .await
            .to_string();
    let mut listener = PgListener::connect(&postgres.url_of("harness"))
        .await
        .unwrap();
    listener.listen(&channel).await.unwrap();

    let (lonely, awaited) = (KEY, EncodedKey::from_bytes([9; 32]));
    let first = claim();
    for key in [lonely, awaited] {
        assert_eq!(here.begin(&key, &first).await.unwrap(), Begin::Acquired);
    }
    {
        let waiter = pin!(there.wait(&awaited, LONG));
        select(waiter, pin!(postgres.until(MARKED))).await;
    }
    for key in [lonely, awaited] {
        complete(&here, &key, first.token).await;
    }
    let told = loop {
        let told = timeout(PATIENCE, listener.recv()).await.unwrap().unwrap();
        if !told.payload().starts_with("hello") {
            break told;
        }
    };
    assert_eq!(told.payload(), format!("all {awaited}"));
}

#[tokio::test]
async fn the_listening_connection_lives_only_while_somebody_waits() {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    let listening = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'";
    assert_eq!(
        storage.begin(&KEY, &claim()).await.unwrap(),
        Begin::Acquired
    );
    {
        let waiter = pin!(storage.wait(&KEY, LONG));
        select(waiter, pin!(postgres.until(MARKED))).await;
        assert_eq!(postgres.number(listening).await, 1);
    }
    postgres
        .until(&format!("SELECT (({listening}) = 0)::int::bigint"))
        .await;
    // It comes again with the next waiter.
    postgres
        .execute("UPDATE idempotency SET awaited = false")
        .await;
    let waiter = pin!(storage.wait(&KEY, LONG));
    select(waiter, pin!(postgres.until(MARKED))).await;
}

#[tokio::test]
async fn a_lost_listening_connection_is_made_anew() {
    let postgres = Postgres::start();
    let (here, there) = two(&postgres).await;
    let first = claim();
    assert_eq!(here.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    let waiter = tokio::spawn(async move { there.wait(&KEY, LONG).await });
    postgres.until(MARKED).await;
    postgres
        .execute("UPDATE idempotency SET awaited = false; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'shop'")
        .await;
    postgres.until(MARKED).await;
    complete(&here, &KEY, first.token).await;
    let woken = timeout(PATIENCE, waiter).await;
    woken.expect("it is woken").unwrap().unwrap();
}
