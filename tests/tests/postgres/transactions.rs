//! The claim, the operation's writes and the record in one transaction.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::future::{join_all, pending, select};
use idempotency_axum::{
    Begin, Config, Decision, Encoded, EncodedKey, Engine, Fingerprint, IsolationLevel,
    KeyTransaction, LockPolicy, Outcome, PostgresStorage, Progress, Ran, Storage, StorageErrorKind,
    TombstoneReason, TransactionClaim, TransactionEnd, Writes,
    sqlx::{self, Acquire as _, Executor as _, Postgres},
};
use idempotency_tests::{
    PATIENCE,
    postgres::{Postgres as Server, Proxy},
};
use tokio::time::timeout;

use super::{KEY, claim, complete, record};

const ENCODED: Encoded = Encoded {
    key: KEY,
    fingerprint: None,
};

const ORDER: &str = "INSERT INTO orders DEFAULT VALUES";
const ORDERS: &str = "SELECT count(*) FROM orders";
const RECORDS: &str = "SELECT count(*) FROM idempotency";

type Ended = Ran<i64, sqlx::Error>;

async fn shop() -> (Server, PostgresStorage) {
    let postgres = Server::start();
    let storage = postgres.storage().await;
    postgres
        .execute("CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY, note text)")
        .await;
    (postgres, storage)
}

/// An engine whose duplicates wait for as long as a test may take.
fn engine(storage: &PostgresStorage) -> Engine {
    waiting(storage, PATIENCE)
}

fn waiting(storage: &PostgresStorage, timeout: Duration) -> Engine {
    let lock = LockPolicy::default().timeout(timeout);
    Engine::new(
        storage.clone(),
        Config::default().lock(lock).storage_timeout(PATIENCE),
    )
}

async fn order(transaction: &mut KeyTransaction<Postgres>) -> Result<i64, sqlx::Error> {
    let statement = format!("{ORDER} RETURNING id");
    sqlx::query_scalar(&statement)
        .fetch_one(&mut **transaction)
        .await
}

async fn run(engine: &Engine) -> Ended {
    engine.run_in(&ENCODED, order).await
}

async fn begin(engine: &Engine) -> TransactionClaim {
    match engine
        .begin_in_transaction(&ENCODED, &Progress::new(), None)
        .await
    {
        Decision::Execute(claim) => claim,
        other => panic!("{other:?}"),
    }
}

fn answer() -> Outcome {
    record("first").outcome
}

#[tokio::test]
async fn writes_and_record_are_committed_together() {
    let (postgres, storage) = shop().await;
    let engine = engine(&storage);
    let first = run(&engine).await;
    assert!(matches!(first, Ran::Executed(1)), "{first:?}");
    let again = run(&engine).await;
    assert!(matches!(again, Ran::Replayed(1)), "{again:?}");
    assert_eq!(postgres.number(ORDERS).await, 1);
    // The other calls see the same record.
    let begin = storage.begin(&KEY, &claim()).await.unwrap();
    assert!(matches!(begin, Begin::Completed(_)), "{begin:?}");
}

#[tokio::test]
async fn an_error_leaves_nothing() {
    let (postgres, storage) = shop().await;
    let failed: Ended = engine(&storage)
        .run_in::<Postgres, _, _>(&ENCODED, async |connection| {
            connection.execute(ORDER).await?;
            Err(sqlx::Error::RowNotFound)
        })
        .await;
    assert!(matches!(failed, Ran::Failed(_)), "{failed:?}");
    assert_eq!(postgres.number(ORDERS).await, 0);
    assert_eq!(postgres.number(RECORDS).await, 0);
    let next = run(&engine(&storage)).await;
    assert!(matches!(next, Ran::Executed(_)), "{next:?}");
}

/// PostgreSQL answers its COMMIT with ROLLBACK, and with no error.
#[tokio::test]
async fn an_error_that_the_operation_swallows_leaves_nothing() {
    let (postgres, storage) = shop().await;
    let ran: Ended = engine(&storage)
        .run_in::<Postgres, _, _>(&ENCODED, async |connection| {
            connection.execute(ORDER).await?;
            let _ = connection.execute("SELECT 1 / 0").await;
            Ok(1)
        })
        .await;
    assert!(matches!(ran, Ran::StorageFailed(_)), "{ran:?}");
    assert_eq!(postgres.number(ORDERS).await, 0);
    assert_eq!(postgres.number(RECORDS).await, 0);
}

#[tokio::test]
async fn a_constraint_that_fails_at_the_commit_leaves_nothing() {
    let (postgres, storage) = shop().await;
    postgres
        .execute("ALTER TABLE orders ADD UNIQUE (note) DEFERRABLE INITIALLY DEFERRED")
        .await;
    let ran: Ended = engine(&storage)
        .run_in::<Postgres, _, _>(&ENCODED, async |connection| {
            connection
                .execute("INSERT INTO orders (note) VALUES ('same'), ('same')")
                .await?;
            Ok(1)
        })
        .await;
    assert!(matches!(ran, Ran::StorageFailed(_)), "{ran:?}");
    assert_eq!(postgres.number(ORDERS).await, 0);
    assert_eq!(postgres.number(RECORDS).await, 0);
}

#[tokio::test]
async fn a_connection_lost_in_the_commit_is_asked_after() {
    let (postgres, storage) = shop().await;
    postgres
        .execute(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS \
               'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(60); RETURN NULL; END'; \
             CREATE CONSTRAINT TRIGGER dies AFTER INSERT ON orders \
               DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()",
        )
        .await;
    let claim = begin(&engine(&storage)).await;
    let mut transaction = claim.slot().take::<Postgres>().unwrap();
    transaction.execute(ORDER).await.unwrap();
    drop(transaction);
    let end = claim.commit(answer(), Writes::Keep).await;
    assert!(matches!(end, TransactionEnd::RolledBack(_)), "{end:?}");
    assert_eq!(postgres.number(ORDERS).await, 0);
    assert_eq!(postgres.number(RECORDS).await, 0);
}

#[tokio::test]
async fn a_commit_whose_answer_is_lost_is_known_all_the_same() {
    let (postgres, _) = shop().await;
    let proxy = Proxy::before(&postgres).await;
    let storage = PostgresStorage::connect(proxy.url()).time_limit(PATIENCE);
    let storage = storage.await.unwrap();
    proxy.lose_the_answer_to(b"COMMIT");
    let ran = run(&engine(&storage)).await;
    assert!(matches!(ran, Ran::Executed(1)), "{ran:?}");
    assert!(proxy.has_lost());
    assert_eq!(postgres.number(ORDERS).await, 1);
    let again = run(&engine(&storage)).await;
    assert!(matches!(again, Ran::Replayed(1)), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_duplicates_runs() {
    let (postgres, storage) = shop().await;
    let runs = (0..8).map(|_| {
        let storage = storage.clone();
        tokio::spawn(async move {
            let ran = run(&engine(&storage)).await;
            match ran {
                Ran::Executed(1) => 1,
                Ran::Replayed(1) => 0,
                other => panic!("{other:?}"),
            }
        })
    });
    let runs = join_all(runs).await;
    assert_eq!(runs.into_iter().map(Result::unwrap).sum::<usize>(), 1);
    assert_eq!(postgres.number(ORDERS).await, 1);
}

#[tokio::test]
async fn a_duplicate_elsewhere_waits_for_so_long_and_no_longer() {
    let (_postgres, storage) = shop().await;
    let first = begin(&engine(&storage)).await;
    // Engines share nothing but the storage.
    let second = run(&waiting(&storage, Duration::from_millis(50))).await;
    assert!(matches!(second, Ran::InFlight), "{second:?}");
    let third = tokio::spawn({
        let engine = engine(&storage);
        async move { run(&engine).await }
    });
    let end = first.commit(answer(), Writes::Keep).await;
    assert!(matches!(end, TransactionEnd::Committed), "{end:?}");
    let third = timeout(PATIENCE, third).await.unwrap().unwrap();
    // The record is no number.
    assert!(matches!(third, Ran::StorageFailed(_)), "{third:?}");
}

#[tokio::test]
async fn a_duplicate_elsewhere_runs_after_a_rollback() {
    let (postgres, storage) = shop().await;
    let first = begin(&engine(&storage)).await;
    let second = tokio::spawn({
        let engine = engine(&storage);
        async move { run(&engine).await }
    });
    let _ = first.roll_back().await;
    let second = timeout(PATIENCE, second).await.unwrap().unwrap();
    assert!(matches!(second, Ran::Executed(_)), "{second:?}");
    assert_eq!(postgres.number(ORDERS).await, 1);
}

#[tokio::test]
async fn a_plain_claim_finds_an_open_transaction() {
    let (_postgres, storage) = shop().await;
    let first = begin(&engine(&storage)).await;
    let found = storage.begin(&KEY, &claim()).await.unwrap();
    assert!(matches!(found, Begin::InFlight { .. }), "{found:?}");
    let waits = tokio::spawn({
        let storage = storage.clone();
        async move { storage.wait(&KEY, PATIENCE).await }
    });
    let _ = first.roll_back().await;
    timeout(PATIENCE, waits).await.unwrap().unwrap().unwrap();
    let found = storage.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(found, Begin::Acquired);
}

#[tokio::test]
async fn a_claim_without_a_transaction_is_waited_for_too() {
    let (_postgres, storage) = shop().await;
    let first = claim();
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    let second = run(&waiting(&storage, Duration::from_millis(50))).await;
    assert!(matches!(second, Ran::InFlight), "{second:?}");
    let waits = tokio::spawn({
        let engine = engine(&storage);
        async move {
            engine
                .begin_in_transaction(&ENCODED, &Progress::new(), None)
                .await
        }
    });
    complete(&storage, &KEY, first.token).await;
    let found = timeout(PATIENCE, waits).await.unwrap().unwrap();
    assert!(matches!(found, Decision::Replay(_)), "{found:?}");
}

#[tokio::test]
async fn an_operation_that_is_dropped_leaves_nothing() {
    let (postgres, storage) = shop().await;
    let engine = engine(&storage);
    {
        let running = engine.run_in::<Postgres, i64, sqlx::Error>(&ENCODED, async |transaction| {
            transaction.execute(ORDER).await?;
            transaction
                .execute("SET application_name = 'ordered'")
                .await?;
            pending().await
        });
        let ordered = postgres.until(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ordered' AND state LIKE 'idle%'",
        );
        select(pin!(running), pin!(ordered)).await;
    }
    let next = run(&engine).await;
    assert!(matches!(next, Ran::Executed(_)), "{next:?}");
    assert_eq!(postgres.number(ORDERS).await, 1);
}

#[tokio::test]
async fn an_operation_that_takes_too_long_is_rolled_back() {
    let (postgres, storage) = shop().await;
    let hasty = engine(&storage.clone().max_transaction(Duration::from_millis(50)));
    let ran: Ended = hasty
        .run_in::<Postgres, _, _>(&ENCODED, async |transaction| {
            transaction.execute(ORDER).await?;
            pending().await
        })
        .await;
    assert!(matches!(ran, Ran::StorageFailed(_)), "{ran:?}");
    let next = run(&engine(&storage)).await;
    assert!(matches!(next, Ran::Executed(_)), "{next:?}");
    assert_eq!(postgres.number(ORDERS).await, 1);
}

#[tokio::test]
async fn a_process_that_falls_silent_holds_no_key_for_long() {
    let (postgres, storage) = shop().await;
    let hasty = engine(&storage.clone().max_transaction(Duration::from_millis(50)));
    let claim = begin(&hasty).await;
    let mut transaction = claim.slot().take::<Postgres>().unwrap();
    postgres
        .until("SELECT (count(*) = 0)::int::bigint FROM pg_stat_activity WHERE state = 'idle in transaction'")
        .await;
    transaction.execute(ORDER).await.unwrap_err();
    drop(transaction);
    let end = claim.commit(answer(), Writes::Keep).await;
    assert!(matches!(end, TransactionEnd::RolledBack(_)), "{end:?}");
    assert_eq!(postgres.number(RECORDS).await, 0);
}

#[tokio::test]
async fn a_transaction_in_the_operation_is_a_savepoint() {
    let (postgres, storage) = shop().await;
    let ran: Ended = engine(&storage)
        .run_in::<Postgres, _, _>(&ENCODED, async |connection| {
            let mut inner = connection.begin().await?;
            inner.execute(ORDER).await?;
            inner.commit().await?;
            let mut inner = connection.begin().await?;
            inner.execute(ORDER).await?;
            inner.rollback().await?;
            Err(sqlx::Error::RowNotFound)
        })
        .await;
    assert!(matches!(ran, Ran::Failed(_)), "{ran:?}");
    assert_eq!(postgres.number(ORDERS).await, 0);
}

#[tokio::test]
async fn an_operation_that_commits_by_itself_never_runs_again() {
    let (postgres, storage) = shop().await;
    let ran: Ended = engine(&storage)
        .run_in::<Postgres, _, _>(&ENCODED, async |connection| {
            connection
                .execute("INSERT INTO orders DEFAULT VALUES; COMMIT")
                .await?;
            Ok(1)
        })
        .await;
    assert!(matches!(ran, Ran::NotReplayable(_)), "{ran:?}");
    assert_eq!(postgres.number(ORDERS).await, 1);
    let again = run(&engine(&storage)).await;
    assert!(
        matches!(again, Ran::NotReplayable(TombstoneReason::HandlerFailed)),
        "{again:?}"
    );
}

/// Each reads the stock and writes it back, so two that run at once must not both be committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_operations_that_meet_one_is_rolled_back() {
    let (postgres, storage) = shop().await;
    let storage = storage.isolation(IsolationLevel::Serializable);
    postgres
        .execute("CREATE TABLE stock (left_over bigint); INSERT INTO stock VALUES (100)")
        .await;
    let both = Arc::new(tokio::sync::Barrier::new(2));
    let sales = (0..2_u8).map(|n| {
        let (engine, both) = (engine(&storage), both.clone());
        tokio::spawn(async move {
            let encoded = Encoded {
                key: EncodedKey::from_bytes([n; 32]),
                fingerprint: None,
            };
            let sell = async |transaction: &mut KeyTransaction<Postgres>| {
                let left: i64 = sqlx::query_scalar("SELECT left_over FROM stock")
                    .fetch_one(&mut **transaction)
                    .await?;
                both.wait().await;
                sqlx::query("UPDATE stock SET left_over = $1")
                    .bind(left - 1)
                    .execute(&mut **transaction)
                    .await?;
                Ok::<_, sqlx::Error>(left)
            };
            matches!(engine.run_in(&encoded, sell).await, Ran::Executed(100))
        })
    });
    let sold = join_all(sales).await;
    let sold = sold.into_iter().filter(|sold| *sold.as_ref().unwrap());
    assert_eq!(sold.count(), 1);
    assert_eq!(postgres.number("SELECT left_over FROM stock").await, 99);
    assert_eq!(postgres.number(RECORDS).await, 1);
}

/// From a phase's end to the retry that goes on there.
#[tokio::test]
async fn a_retry_goes_on_at_the_recovery_point() {
    let (postgres, storage) = shop().await;
    let engine = engine(&storage);
    let request = |print| Encoded {
        fingerprint: Some(Fingerprint::from_bytes([print; 32])),
        ..ENCODED
    };
    let (request, other) = (request(1), request(2));
    let failed: Ended = engine
        .run_in::<Postgres, _, _>(&request, async |transaction| {
            assert_eq!(transaction.recovery_point(), None);
            transaction.execute(ORDER).await?;
            let work = async { storage.begin(&KEY, &claim()).await };
            let found = transaction.between("ordered", work).await.unwrap();
            assert!(matches!(found, Ok(Begin::InFlight { .. })), "{found:?}");
            transaction.execute(ORDER).await?;
            Err(sqlx::Error::RowNotFound)
        })
        .await;
    assert!(matches!(failed, Ran::Failed(_)), "{failed:?}");
    assert_eq!(
        postgres.number(ORDERS).await,
        1,
        "the second phase is undone"
    );
    assert_eq!(storage.purge_expired().await.unwrap(), 0);
    let ran: Ended = engine.run_in(&other, order).await;
    assert!(matches!(ran, Ran::Mismatch), "{ran:?}");
    let ran: Ended = engine
        .run_in::<Postgres, _, _>(&request, async |transaction| {
            assert_eq!(transaction.recovery_point(), Some("ordered"));
            order(transaction).await
        })
        .await;
    assert!(matches!(ran, Ran::Executed(3)), "{ran:?}");
    let ran: Ended = engine.run_in(&request, order).await;
    assert!(matches!(ran, Ran::Replayed(3)), "{ran:?}");
    assert_eq!(postgres.number(ORDERS).await, 2);
    assert_eq!(engine.running(), 0);
}

#[tokio::test]
async fn nothing_is_written_after_a_lost_claim() {
    let (postgres, storage) = shop().await;
    let engine = engine(&storage);
    let ran: Ended = engine
        .run_in::<Postgres, _, _>(&ENCODED, async |transaction| {
            let work = engine.remove(&KEY);
            let lost = transaction.between("removed", work).await;
            assert!(lost.is_err(), "{lost:?}");
            transaction.execute(ORDER).await.unwrap_err();
            Ok(1)
        })
        .await;
    assert!(matches!(ran, Ran::StorageFailed(_)), "{ran:?}");
    assert_eq!(postgres.number(ORDERS).await, 0);
    assert_eq!(postgres.number(RECORDS).await, 0);
}

#[tokio::test]
async fn a_server_that_is_gone_is_an_error_and_nothing_runs() {
    let (mut postgres, storage) = shop().await;
    let storage = storage.time_limit(Duration::from_secs(2));
    postgres.crash();
    let ran = run(&engine(&storage)).await;
    let Ran::StorageFailed(error) = ran else {
        panic!("{ran:?}");
    };
    assert_ne!(error.kind(), StorageErrorKind::Unreadable);
    postgres.start_again();
    let storage = storage.time_limit(PATIENCE);
    let ran = run(&engine(&storage)).await;
    assert!(matches!(ran, Ran::Executed(1)), "{ran:?}");
}
