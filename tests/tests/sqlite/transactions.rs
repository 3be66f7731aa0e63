//! The claim, the operation's writes and the record in one transaction.

use std::{future::pending, pin::pin, time::Duration};

use futures_util::future::join_all;
use idempotency_axum::{
    Begin, BeginTransaction, Config, Decision, Encoded, Engine, Fingerprint, Held, KeyTransaction,
    LockPolicy, NewTransaction, Outcome, Progress, Ran, Refusal, SqliteStorage,
    SqliteStorageErrorKind as Kind, Storage, StorageErrorKind, Token, TombstoneReason,
    TransactionClaim, TransactionEnd, Writes,
    sqlx::{self, Connection as _, Executor as _, Sqlite, SqliteConnection},
};
use idempotency_tests::{PATIENCE, sqlite::SqliteFile};
use tokio::time::timeout;

use super::{KEY, LONG, answer, claim, failures::assert_caused_by, key, record_of};

const ENCODED: Encoded = encoded(KEY, None);

const ORDER: &str = "INSERT INTO orders DEFAULT VALUES";
const ORDERS: &str = "SELECT count(*) FROM orders";
const RECORDS: &str = "SELECT count(*) FROM idempotency";

const A_WHILE: Duration = Duration::from_millis(150);

type Result<T = i64> = std::result::Result<T, sqlx::Error>;

const fn encoded(key: idempotency_axum::EncodedKey, fingerprint: Option<Fingerprint>) -> Encoded {
    Encoded { key, fingerprint }
}

async fn shop() -> (SqliteFile, SqliteStorage) {
    let file = SqliteFile::new();
    let storage = file.open().await;
    file.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, note TEXT UNIQUE)")
        .await;
    (file, storage)
}

fn engine(storage: &SqliteStorage) -> Engine {
    let lock = LockPolicy::default().timeout(PATIENCE);
    let config = Config::default().lock(lock).storage_timeout(PATIENCE);
    Engine::new(storage.clone(), config)
}

async fn order(connection: &mut SqliteConnection) -> Result {
    let statement = "INSERT INTO orders DEFAULT VALUES RETURNING id";
    sqlx::query_scalar(statement).fetch_one(connection).await
}

/// Runs an operation that orders, under [`KEY`].
async fn run_order(engine: &Engine) -> Ran<i64, sqlx::Error> {
    engine
        .run_in::<Sqlite, _, _>(&ENCODED, async |transaction| order(transaction).await)
        .await
}

async fn begin(engine: &Engine, encoded: &Encoded) -> TransactionClaim {
    let progress = Progress::new();
    match engine.begin_in_transaction(encoded, &progress, None).await {
        Decision::Execute(claim) => claim,
        other => panic!("{other:?}"),
    }
}

fn take(claim: &TransactionClaim) -> KeyTransaction<Sqlite> {
    claim.slot().take().expect("it is not taken")
}

fn new_transaction() -> NewTransaction {
    NewTransaction {
        token: Token::random(),
        fingerprint: None,
        ttl: LONG,
    }
}

async fn assert_nothing_is_left(file: &SqliteFile, storage: &SqliteStorage) {
    assert_eq!(file.number(ORDERS).await, 0);
    assert_eq!(file.number(RECORDS).await, 0);
    let ran = run_order(&engine(storage)).await;
    assert!(matches!(ran, Ran::Executed(1)), "{ran:?}");
}

/// An operation that ended its transaction itself ran once and never runs again.
async fn assert_ran_for_good(storage: &SqliteStorage) {
    let record = record_of(storage, &KEY).await.expect("a tombstone");
    let is_tombstone = matches!(record.outcome, Outcome::Tombstone(_));
    assert!(is_tombstone, "{record:?}");
    let again = run_order(&engine(storage)).await;
    assert!(
        matches!(again, Ran::NotReplayable(TombstoneReason::HandlerFailed)),
        "{again:?}"
    );
}

#[tokio::test]
async fn writes_and_record_are_committed_together() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let first = run_order(&engine).await;
    assert!(matches!(first, Ran::Executed(1)), "{first:?}");
    let again = run_order(&engine).await;
    assert!(matches!(again, Ran::Replayed(1)), "{again:?}");
    assert_eq!(file.number(ORDERS).await, 1);
    // The other calls see the same record.
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    assert!(matches!(begun, Begin::Completed(_)), "{begun:?}");
}

#[tokio::test]
async fn an_error_leaves_nothing() {
    let (file, storage) = shop().await;
    let ran: Ran<i64, _> = engine(&storage)
        .run_in::<Sqlite, _, _>(&ENCODED, async |transaction| {
            order(transaction).await?;
            Err(sqlx::Error::RowNotFound)
        })
        .await;
    assert!(matches!(ran, Ran::Failed(_)), "{ran:?}");
    assert_nothing_is_left(&file, &storage).await;
}

#[tokio::test]
async fn a_dropped_operation_leaves_nothing() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let run = engine.run_in::<Sqlite, i64, sqlx::Error>(&ENCODED, async |transaction| {
        order(transaction).await?;
        pending().await
    });
    assert!(timeout(A_WHILE, run).await.is_err());
    assert_nothing_is_left(&file, &storage).await;
}

#[tokio::test]
async fn undone_writes_leave_the_record() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let claim = begin(&engine, &ENCODED).await;
    let mut transaction = take(&claim);
    order(&mut transaction).await.unwrap();
    // One that the operation has forgotten.
    let mut savepoint = transaction.begin().await.unwrap();
    order(&mut savepoint).await.unwrap();
    std::mem::forget(savepoint);
    drop(transaction);
    let refused = answer("no such product").outcome;
    let end = claim.commit(refused, Writes::Undo).await;
    assert!(matches!(end, TransactionEnd::Committed), "{end:?}");
    assert_eq!(file.number(ORDERS).await, 0);
    let record = record_of(&storage, &KEY).await;
    assert_eq!(record, Some(answer("no such product")));
}

#[tokio::test]
async fn savepoints_of_the_operation_are_its_own() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let claim = begin(&engine, &ENCODED).await;
    let mut transaction = take(&claim);
    let mut kept = transaction.begin().await.unwrap();
    order(&mut kept).await.unwrap();
    kept.commit().await.unwrap();
    let mut undone = transaction.begin().await.unwrap();
    order(&mut undone).await.unwrap();
    drop(undone);
    let mut forgotten = transaction.begin().await.unwrap();
    order(&mut forgotten).await.unwrap();
    std::mem::forget(forgotten);
    drop(transaction);
    let end = claim.commit(answer("done").outcome, Writes::Keep).await;
    assert!(matches!(end, TransactionEnd::Committed), "{end:?}");
    assert_eq!(file.number(ORDERS).await, 2);
    let next = begin(&engine, &encoded(key(1), None)).await;
    let _ = next.roll_back().await;
}

#[tokio::test]
async fn an_operation_that_commits_by_itself_never_runs_again() {
    for goes_on in ["", "; BEGIN IMMEDIATE", "; SAVEPOINT mine"] {
        let (file, storage) = shop().await;
        let engine = engine(&storage);
        let claim = begin(&engine, &ENCODED).await;
        let mut transaction = take(&claim);
        order(&mut transaction).await.unwrap();
        let by_hand = format!("COMMIT{goes_on}");
        transaction.execute(&*by_hand).await.unwrap();
        drop(transaction);
        let end = claim.commit(answer("done").outcome, Writes::Keep).await;
        assert!(matches!(end, TransactionEnd::EndedByHand), "{end:?}");
        assert_eq!(file.number(ORDERS).await, 1);
        assert_ran_for_good(&storage).await;
        // The lock is free.
        assert_eq!(file.execute(ORDER).await, 1);
    }
}

#[tokio::test]
async fn an_operation_that_commits_by_itself_and_dies_never_runs_again() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let claim = begin(&engine, &ENCODED).await;
    let mut transaction = take(&claim);
    order(&mut transaction).await.unwrap();
    transaction.execute("COMMIT").await.unwrap();
    drop((transaction, claim));
    assert_ran_for_good(&storage).await;
    assert_eq!(file.number(ORDERS).await, 1);
}

#[tokio::test]
async fn an_operation_that_rolls_back_by_itself_has_a_tombstone() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    // The second is a `ROLLBACK` too.
    for by_hand in [
        "ROLLBACK",
        "INSERT OR ROLLBACK INTO orders (id) VALUES (1), (1)",
    ] {
        let claim = begin(&engine, &ENCODED).await;
        let mut transaction = take(&claim);
        order(&mut transaction).await.unwrap();
        let _ = transaction.execute(by_hand).await;
        drop(transaction);
        let end = claim.commit(answer("done").outcome, Writes::Undo).await;
        assert!(matches!(end, TransactionEnd::EndedByHand), "{end:?}");
        assert_eq!(file.number(ORDERS).await, 0);
        assert_ran_for_good(&storage).await;
        assert!(storage.remove(&KEY).await.unwrap());
    }
}

/// Unlike in PostgreSQL: SQLite undoes the statement, and the transaction goes on.
#[tokio::test]
async fn a_statement_error_that_is_swallowed_aborts_nothing() {
    let (file, storage) = shop().await;
    let ran: Ran<i64, sqlx::Error> = engine(&storage)
        .run_in::<Sqlite, _, _>(&ENCODED, async |transaction| {
            let note = "INSERT INTO orders (note) VALUES ('same')";
            transaction.execute(note).await?;
            assert!(transaction.execute(note).await.is_err());
            Ok(1)
        })
        .await;
    assert!(matches!(ran, Ran::Executed(1)), "{ran:?}");
    assert_eq!(file.number(ORDERS).await, 1);
}

#[tokio::test]
async fn a_constraint_that_fails_at_the_commit_leaves_nothing() {
    let (file, storage) = shop().await;
    file.execute(
        "CREATE TABLE lines (product INTEGER REFERENCES orders (id) DEFERRABLE INITIALLY DEFERRED)",
    )
    .await;
    let engine = engine(&storage);
    let claim = begin(&engine, &ENCODED).await;
    let mut transaction = take(&claim);
    order(&mut transaction).await.unwrap();
    let dangling = "INSERT INTO lines VALUES (7)";
    transaction.execute(dangling).await.unwrap();
    drop(transaction);
    let end = claim.commit(answer("done").outcome, Writes::Keep).await;
    assert!(matches!(end, TransactionEnd::Failed(_)), "{end:?}");
    assert_nothing_is_left(&file, &storage).await;

    // Undone, they do not count.
    let key = encoded(key(1), None);
    let claim = begin(&engine, &key).await;
    let mut transaction = take(&claim);
    transaction.execute(dangling).await.unwrap();
    drop(transaction);
    let end = claim.commit(answer("no").outcome, Writes::Undo).await;
    assert!(matches!(end, TransactionEnd::Committed), "{end:?}");
}

#[tokio::test]
async fn a_record_that_has_no_room_leaves_nothing() {
    let file = SqliteFile::new();
    let storage = super::failures::small(&file, "32").await;
    file.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        .await;
    let claim = begin(&engine(&storage), &ENCODED).await;
    let mut transaction = take(&claim);
    order(&mut transaction).await.unwrap();
    drop(transaction);
    let large = answer("y".repeat(1_000_000));
    match claim.commit(large.outcome, Writes::Keep).await {
        TransactionEnd::RolledBack(error) => {
            assert_caused_by(&error, StorageErrorKind::Full, Kind::Full);
        }
        other => panic!("{other:?}"),
    }
    assert_nothing_is_left(&file, &storage).await;
}

#[tokio::test]
async fn a_replay_does_not_wait_for_an_open_transaction() {
    let (_file, storage) = shop().await;
    let engine = engine(&storage);
    let first = run_order(&engine).await;
    assert!(matches!(first, Ran::Executed(1)), "{first:?}");
    let running = claim();
    let begun = storage.begin(&key(2), &running).await.unwrap();
    assert_eq!(begun, Begin::Acquired);

    let open = begin(&engine, &encoded(key(1), None)).await;
    let hasty = storage.clone().time_limit(A_WHILE);
    let again = run_order(&self::engine(&hasty)).await;
    assert!(matches!(again, Ran::Replayed(1)), "{again:?}");
    let begun = hasty.transactions().unwrap();
    let begun = begun.begin(&key(2), &new_transaction()).await.unwrap();
    assert!(matches!(begun, BeginTransaction::InFlight { .. }));
    // Another key waits for its turn.
    let begun = hasty.transactions().unwrap();
    let error = begun.begin(&key(3), &new_transaction()).await.unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Timeout, Kind::Busy);
    let _ = open.roll_back().await;
}

#[tokio::test]
async fn the_key_of_an_open_transaction_is_in_flight_at_once() {
    let (_file, storage) = shop().await;
    let engine = engine(&storage);
    let print = Some(Fingerprint::from_bytes([1; 32]));
    let open = begin(&engine, &encoded(KEY, print)).await;
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    let expected = Begin::InFlight {
        fingerprint: print,
        lease_left: None,
    };
    assert_eq!(begun, expected);
    // Another engine, as one for another layer.
    let other = self::engine(&storage);
    let begun = other
        .begin_in_transaction(&ENCODED_OTHERWISE, &Progress::new(), None)
        .await;
    match begun {
        Decision::Refuse(refused) => assert_eq!(refused.refusal, Refusal::KeyReused),
        other => panic!("{other:?}"),
    }
    let mut wait = pin!(storage.wait(&KEY, LONG));
    assert!(timeout(A_WHILE, &mut wait).await.is_err());
    let _ = open.roll_back().await;
    timeout(PATIENCE, wait).await.expect("woken").unwrap();
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
}

const ENCODED_OTHERWISE: Encoded = encoded(KEY, Some(Fingerprint::from_bytes([2; 32])));

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_hundred_duplicates_one_runs() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let other = self::engine(&storage);
    let runs = (0..100).map(|n| {
        let engine = if n % 4 == 0 { &other } else { &engine };
        let engine = engine.clone();
        tokio::spawn(async move {
            match run_order(&engine).await {
                Ran::Executed(1) => 1,
                Ran::Replayed(1) => 0,
                other => panic!("{other:?}"),
            }
        })
    });
    let executed: usize = join_all(runs)
        .await
        .into_iter()
        .map(|ran| ran.unwrap())
        .sum();
    assert_eq!(executed, 1);
    assert_eq!(file.number(ORDERS).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_of_many_keys_take_turns() {
    let (file, storage) = shop().await;
    // As another process.
    let engines = [engine(&storage), engine(&file.open().await)];
    let runs = (0..60).map(|n| {
        let engine = engines[usize::from(n) % 2].clone();
        tokio::spawn(async move {
            let key = encoded(key(n), None);
            let ran =
                engine.run_in::<Sqlite, _, _>(&key, async |transaction| order(transaction).await);
            assert!(matches!(ran.await, Ran::Executed(_)));
        })
    });
    let storage = storage.clone();
    let others = (60..120).map(|n| {
        let storage = storage.clone();
        tokio::spawn(async move {
            let begun = storage.begin(&key(n), &claim()).await.unwrap();
            assert_eq!(begun, Begin::Acquired);
        })
    });
    for ran in join_all(runs.chain(others).collect::<Vec<_>>()).await {
        ran.unwrap();
    }
    assert_eq!(file.number(ORDERS).await, 60);
    assert_eq!(file.number(RECORDS).await, 120);
}

#[tokio::test]
async fn a_storage_call_waits_for_the_transaction() {
    let (_file, storage) = shop().await;
    let open = begin(&engine(&storage), &ENCODED).await;
    let hasty = storage.clone().time_limit(A_WHILE);
    let (first, second) = (claim(), claim());
    let (waits, times_out) = (key(1), key(2));
    let mut waiting = pin!(storage.begin(&waits, &first));
    assert!(timeout(A_WHILE, &mut waiting).await.is_err());
    // It comes later, and its time is over first.
    let error = timeout(PATIENCE / 2, hasty.begin(&times_out, &second))
        .await
        .expect("its own limit counts")
        .unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Timeout, Kind::Busy);
    let _ = open.roll_back().await;
    assert_eq!(waiting.await.unwrap(), Begin::Acquired);
    assert_eq!(storage.get(&times_out).await.unwrap(), None);
}

#[tokio::test]
async fn an_operation_that_takes_too_long_is_rolled_back() {
    // An endless statement is stopped too.
    const ENDLESS: &str =
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n";

    for statement in [None, Some(ENDLESS)] {
        let (file, storage) = shop().await;
        let hurried = storage.clone().max_transaction(A_WHILE);
        let ran: Ran<i64, sqlx::Error> = engine(&hurried)
            .run_in::<Sqlite, _, _>(&ENCODED, async |transaction| {
                order(transaction).await?;
                match statement {
                    None => pending().await,
                    Some(endless) => transaction.execute(endless).await.map(|_| 1),
                }
            })
            .await;
        match ran {
            Ran::StorageFailed(error) => assert_eq!(error.kind(), StorageErrorKind::Timeout),
            other => panic!("{other:?}"),
        }
        assert_nothing_is_left(&file, &storage).await;
    }
}

#[tokio::test]
async fn another_process_waits_for_the_lock() {
    let (file, storage) = shop().await;
    let theirs = file.open().await;
    let open = begin(&engine(&storage), &ENCODED).await;
    let hasty = theirs.clone().time_limit(A_WHILE);
    let lent = hasty.transactions().unwrap();
    let error = lent.begin(&KEY, &new_transaction()).await.unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Timeout, Kind::Busy);

    let engine = engine(&theirs);
    let mut waits = pin!(run_order(&engine));
    assert!(timeout(A_WHILE, &mut waits).await.is_err());
    let value = serde_json::to_vec(&7).unwrap();
    let end = claim_value(open, value).await;
    assert!(matches!(end, TransactionEnd::Committed), "{end:?}");
    let ran = waits.await;
    assert!(matches!(ran, Ran::Replayed(7)), "{ran:?}");
}

async fn claim_value(open: TransactionClaim, json: Vec<u8>) -> TransactionEnd {
    let json = String::from_utf8(json).unwrap();
    open.commit(answer(json).outcome, Writes::Keep).await
}

/// SQLite can't end it from outside.
#[tokio::test]
async fn a_leaked_transaction_blocks_until_it_is_given_back() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let claim = begin(&engine, &ENCODED).await;
    let mut leaked = take(&claim);
    order(&mut leaked).await.unwrap();
    let end = claim.commit(answer("done").outcome, Writes::Keep).await;
    assert!(matches!(end, TransactionEnd::NotGivenBack), "{end:?}");

    let hasty = storage.clone().time_limit(A_WHILE);
    let error = hasty.begin(&key(1), &super::claim()).await.unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Timeout, Kind::Busy);
    let lent = hasty.transactions().unwrap();
    let error = lent.begin(&key(1), &new_transaction()).await.unwrap_err();
    assert_caused_by(&error, StorageErrorKind::Timeout, Kind::Busy);

    drop(leaked);
    assert_nothing_is_left(&file, &storage).await;
}

#[tokio::test]
async fn an_expired_record_is_taken_over() {
    let (file, storage) = shop().await;
    let token = claim().token;
    let brief = Duration::from_millis(1);
    let held = storage.complete(&KEY, token, &answer("old"), brief).await;
    assert_eq!(held.unwrap(), Held::Yes);
    tokio::time::sleep(2 * brief).await;
    let ran = run_order(&engine(&storage)).await;
    assert!(matches!(ran, Ran::Executed(1)), "{ran:?}");
    assert_eq!(file.number(RECORDS).await, 1);
}

#[tokio::test]
async fn a_table_of_another_name_has_transactions_too() {
    let (file, storage) = shop().await;
    let storage = storage.table("main.shop_2");
    let engine = engine(&storage);
    match run_order(&engine).await {
        Ran::StorageFailed(error) => {
            assert_caused_by(&error, StorageErrorKind::Unavailable, Kind::NotMigrated);
        }
        other => panic!("{other:?}"),
    }
    storage.migrate().await.unwrap();
    let ran = run_order(&engine).await;
    assert!(matches!(ran, Ran::Executed(1)), "{ran:?}");
    assert_eq!(file.number("SELECT count(*) FROM shop_2").await, 1);
    assert_eq!(file.number(RECORDS).await, 0);
}
