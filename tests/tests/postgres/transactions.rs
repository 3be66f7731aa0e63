//! The claim, the operation's writes and the record in one transaction.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, join_all, pending, select},
};
use idempotency_axum::{
    Begin, Committed, Encoded, Entered, PostgresStorage, Ran, Storage, StorageErrorKind,
    TombstoneReason, TransactionTerms,
    sqlx::{self, Acquire as _, Executor as _, PgConnection},
};
use idempotency_tests::{
    PATIENCE,
    postgres::{Postgres, Proxy},
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

type Outcome = Ran<i64, sqlx::Error>;

async fn shop() -> (Postgres, PostgresStorage) {
    let postgres = Postgres::start();
    let storage = postgres.storage().await;
    postgres
        .execute("CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY, note text)")
        .await;
    (postgres, storage)
}

fn terms() -> TransactionTerms {
    TransactionTerms::default().wait(PATIENCE).idle(PATIENCE)
}

fn order(connection: &mut PgConnection) -> BoxFuture<'_, Result<i64, sqlx::Error>> {
    async move {
        let statement = format!("{ORDER} RETURNING id");
        sqlx::query_scalar(&statement).fetch_one(connection).await
    }
    .boxed()
}

#[tokio::test]
async fn writes_and_record_are_committed_together() {
    let (postgres, storage) = shop().await;
    let first: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    assert!(matches!(first, Ran::Executed(1)), "{first:?}");
    let again: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    assert!(matches!(again, Ran::Replayed(1)), "{again:?}");
    assert_eq!(postgres.number(ORDERS).await, 1);
    // The other calls see the same record.
    let begin = storage.begin(&KEY, &claim()).await.unwrap();
    assert!(matches!(begin, Begin::Completed(_)), "{begin:?}");
}

#[tokio::test]
async fn an_error_leaves_nothing() {
    let (postgres, storage) = shop().await;
    let failed: Outcome = storage
        .run_in_transaction(&ENCODED, &terms(), |connection| {
            async move {
                connection.execute(ORDER).await?;
                Err(sqlx::Error::RowNotFound)
            }
            .boxed()
        })
        .await;
    assert!(matches!(failed, Ran::Failed(_)), "{failed:?}");
    assert_eq!(postgres.number(ORDERS).await, 0);
    assert_eq!(postgres.number(RECORDS).await, 0);
    let next: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    assert!(matches!(next, Ran::Executed(_)), "{next:?}");
}

/// PostgreSQL answers its COMMIT with ROLLBACK, and with no error.
#[tokio::test]
async fn an_error_that_the_operation_swallows_leaves_nothing() {
    let (postgres, storage) = shop().await;
    let ran: Outcome = storage
        .run_in_transaction(&ENCODED, &terms(), |connection| {
            async move {
                connection.execute(ORDER).await?;
                let _ = connection.execute("SELECT 1 / 0").await;
                Ok(1)
            }
            .boxed()
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
    let ran: Outcome = storage
        .run_in_transaction(&ENCODED, &terms(), |connection| {
            async move {
                connection
                    .execute("INSERT INTO orders (note) VALUES ('same'), ('same')")
                    .await?;
                Ok(1)
            }
            .boxed()
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
    let Entered::Acquired(mut transaction) = storage.enter(&ENCODED, &terms()).await.unwrap()
    else {
        panic!("the key is free");
    };
    transaction.execute(ORDER).await.unwrap();
    let committed = transaction.commit(&record("first")).await;
    assert!(
        matches!(committed, Committed::RolledBack(_)),
        "{committed:?}"
    );
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
    let ran: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    assert!(matches!(ran, Ran::Executed(1)), "{ran:?}");
    assert!(proxy.has_lost());
    assert_eq!(postgres.number(ORDERS).await, 1);
    let again: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    assert!(matches!(again, Ran::Replayed(1)), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_many_duplicates_runs() {
    let (postgres, storage) = shop().await;
    let runs = (0..8).map(|_| {
        let storage = storage.clone();
        tokio::spawn(async move {
            let ran: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
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
async fn a_duplicate_waits_for_so_long_and_no_longer() {
    let (_postgres, storage) = shop().await;
    let Entered::Acquired(first) = storage.enter(&ENCODED, &terms()).await.unwrap() else {
        panic!("the key is free");
    };
    let impatient = terms().wait(Duration::from_millis(50));
    let second: Outcome = storage
        .run_in_transaction(&ENCODED, &impatient, order)
        .await;
    assert!(matches!(second, Ran::InFlight), "{second:?}");
    let third = tokio::spawn({
        let storage = storage.clone();
        async move { storage.enter(&ENCODED, &terms()).await }
    });
    assert!(matches!(
        first.commit(&record("first")).await,
        Committed::Yes
    ));
    let third = timeout(PATIENCE, third).await.unwrap().unwrap().unwrap();
    assert!(matches!(third, Entered::Completed(found) if found == record("first")));
}

#[tokio::test]
async fn a_claim_without_a_transaction_is_waited_for_too() {
    let (_postgres, storage) = shop().await;
    let first = claim();
    assert_eq!(storage.begin(&KEY, &first).await.unwrap(), Begin::Acquired);
    let impatient = terms().wait(Duration::from_millis(50));
    let entered = storage.enter(&ENCODED, &impatient).await.unwrap();
    assert!(matches!(entered, Entered::InFlight), "{entered:?}");
    let waits = tokio::spawn({
        let storage = storage.clone();
        async move { storage.enter(&ENCODED, &terms()).await }
    });
    complete(&storage, &KEY, first.token).await;
    let entered = timeout(PATIENCE, waits).await.unwrap().unwrap().unwrap();
    assert!(matches!(entered, Entered::Completed(_)), "{entered:?}");
}

#[tokio::test]
async fn an_operation_that_is_dropped_leaves_nothing() {
    let (postgres, storage) = shop().await;
    {
        let terms = terms();
        let running = storage.run_in_transaction(&ENCODED, &terms, |connection| {
            async move {
                connection.execute(ORDER).await?;
                connection
                    .execute("SET application_name = 'ordered'")
                    .await?;
                pending::<Result<i64, sqlx::Error>>().await
            }
            .boxed()
        });
        let ordered = postgres.until(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'ordered' AND state LIKE 'idle%'",
        );
        select(pin!(running), pin!(ordered)).await;
    }
    let next: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    assert!(matches!(next, Ran::Executed(_)), "{next:?}");
    assert_eq!(postgres.number(ORDERS).await, 1);
}

#[tokio::test]
async fn an_operation_that_does_nothing_for_long_is_ended() {
    let (postgres, storage) = shop().await;
    let hasty = terms().idle(Duration::from_millis(50));
    let Entered::Acquired(mut transaction) = storage.enter(&ENCODED, &hasty).await.unwrap() else {
        panic!("the key is free");
    };
    postgres
        .until("SELECT (count(*) = 0)::int::bigint FROM pg_stat_activity WHERE state = 'idle in transaction'")
        .await;
    transaction.execute(ORDER).await.unwrap_err();
    let committed = transaction.commit(&record("first")).await;
    assert!(
        matches!(committed, Committed::RolledBack(_)),
        "{committed:?}"
    );
    assert_eq!(postgres.number(RECORDS).await, 0);
}

#[tokio::test]
async fn a_transaction_in_the_operation_is_a_savepoint() {
    let (postgres, storage) = shop().await;
    let ran: Outcome = storage
        .run_in_transaction(&ENCODED, &terms(), |connection| {
            async move {
                let mut inner = connection.begin().await?;
                inner.execute(ORDER).await?;
                inner.commit().await?;
                let mut inner = connection.begin().await?;
                inner.execute(ORDER).await?;
                inner.rollback().await?;
                Err(sqlx::Error::RowNotFound)
            }
            .boxed()
        })
        .await;
    assert!(matches!(ran, Ran::Failed(_)), "{ran:?}");
    assert_eq!(postgres.number(ORDERS).await, 0);
}

#[tokio::test]
async fn an_operation_that_commits_by_itself_never_runs_again() {
    let (postgres, storage) = shop().await;
    let ran: Outcome = storage
        .run_in_transaction(&ENCODED, &terms(), |connection| {
            async move {
                connection
                    .execute("INSERT INTO orders DEFAULT VALUES; COMMIT")
                    .await?;
                Ok(1)
            }
            .boxed()
        })
        .await;
    assert!(matches!(ran, Ran::StorageFailed(_)), "{ran:?}");
    assert_eq!(postgres.number(ORDERS).await, 1);
    let again: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    assert!(
        matches!(again, Ran::NotReplayable(TombstoneReason::HandlerFailed)),
        "{again:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_that_meet_are_run_again() {
    let postgres = Postgres::start();
    let pool = postgres.pool("SET default_transaction_isolation = 'serializable'");
    let storage = PostgresStorage::new(pool).time_limit(PATIENCE);
    storage.migrate().await.unwrap();
    postgres
        .execute("CREATE TABLE stock (left_over bigint); INSERT INTO stock VALUES (100)")
        .await;
    let runs = Arc::new(AtomicUsize::new(0));
    let sales = (0..4_u8).map(|n| {
        let (storage, runs) = (storage.clone(), runs.clone());
        let key = idempotency_axum::EncodedKey::from_bytes([n; 32]);
        tokio::spawn(async move {
            let encoded = Encoded {
                key,
                fingerprint: None,
            };
            let ran: Outcome = storage
                .run_in_transaction(&encoded, &terms(), |connection| {
                    runs.fetch_add(1, Ordering::Relaxed);
                    async move {
                        let left: i64 = sqlx::query_scalar("SELECT left_over FROM stock")
                            .fetch_one(&mut *connection)
                            .await?;
                        sqlx::query("UPDATE stock SET left_over = $1")
                            .bind(left - 1)
                            .execute(connection)
                            .await?;
                        Ok(left)
                    }
                    .boxed()
                })
                .await;
            assert!(matches!(ran, Ran::Executed(_)), "{ran:?}");
        })
    });
    for sale in join_all(sales).await {
        sale.unwrap();
    }
    assert_eq!(postgres.number("SELECT left_over FROM stock").await, 96);
    assert!(runs.load(Ordering::Relaxed) >= 4);
}

#[tokio::test]
async fn a_server_that_is_gone_is_an_error_and_nothing_runs() {
    let (mut postgres, storage) = shop().await;
    let storage = storage.time_limit(Duration::from_secs(2));
    postgres.crash();
    let ran: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    let Ran::StorageFailed(error) = ran else {
        panic!("{ran:?}");
    };
    assert_ne!(error.kind(), StorageErrorKind::Unreadable);
    postgres.start_again();
    let storage = storage.time_limit(PATIENCE);
    let ran: Outcome = storage.run_in_transaction(&ENCODED, &terms(), order).await;
    assert!(matches!(ran, Ran::Executed(1)), "{ran:?}");
}
