//! Operations that commit their work in phases, and go on where an attempt before them stopped.

use std::{
    env, fs,
    future::pending,
    process::{Child, Command},
    time::Duration,
};

use idempotency_axum::{
    Begin, BeginTransaction, Committed, Config, Decision, Encoded, Engine, Entry, Env, Fingerprint,
    Held, KeyTransaction, LockPolicy, NewTransaction, Operation, PhaseError, Progress, Ran,
    Refusal, SqliteStorage, SqliteTransaction, Storage, StorageErrorKind, Token, Transaction,
    Writes,
    sqlx::{self, Executor as _, Sqlite, SqliteConnection},
};
use idempotency_tests::{FaultyStorage, PATIENCE, sqlite::SqliteFile};
use tokio::time::timeout;

use super::{KEY, LONG, answer, claim, key, record_of};

const ORDERS: &str = "SELECT count(*) FROM orders";
const POINTS: &str = "SELECT count(*) FROM idempotency WHERE recovery_point IS NOT NULL";

const PRINT: Option<Fingerprint> = Some(Fingerprint::from_bytes([1; 32]));
const OTHER_PRINT: Option<Fingerprint> = Some(Fingerprint::from_bytes([2; 32]));

const ENCODED: Encoded = Encoded {
    key: KEY,
    fingerprint: PRINT,
};

const A_WHILE: Duration = Duration::from_millis(150);
const LEASE: Duration = Duration::from_millis(600);

type AnyError = Box<dyn std::error::Error + Send + Sync>;

async fn shop() -> (SqliteFile, SqliteStorage) {
    let file = SqliteFile::new();
    let storage = file.open().await;
    file.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, note TEXT)")
        .await;
    (file, storage)
}

fn engine(storage: &SqliteStorage) -> Engine {
    let lock = LockPolicy::default().timeout(PATIENCE).ttl(LEASE);
    let config = Config::default().lock(lock).storage_timeout(PATIENCE);
    Engine::new(storage.clone(), config)
}

async fn order(connection: &mut SqliteConnection, note: &str) -> Result<(), sqlx::Error> {
    let statement = sqlx::query("INSERT INTO orders (note) VALUES (?)").bind(note.to_owned());
    statement.execute(connection).await.map(drop)
}

fn new_transaction(fingerprint: Option<Fingerprint>) -> NewTransaction {
    NewTransaction {
        token: Token::random(),
        fingerprint,
        ttl: LONG,
    }
}

async fn try_begin(storage: &SqliteStorage, new: &NewTransaction) -> BeginTransaction {
    let lent = storage.transactions().expect("it has some");
    lent.begin(&KEY, new).await.unwrap()
}

async fn begin(storage: &SqliteStorage, new: &NewTransaction) -> Box<SqliteTransaction> {
    match try_begin(storage, new).await {
        BeginTransaction::Acquired(transaction) => {
            let any: Box<dyn std::any::Any> = transaction;
            any.downcast().expect("a transaction of SQLite")
        }
        other => panic!("{other:?}"),
    }
}

/// An operation of two phases, which fails in the second if it `fails`.
async fn ship(transaction: &mut KeyTransaction<Sqlite>, fails: bool) -> Result<String, AnyError> {
    let point = transaction.recovery_point().map(str::to_owned);
    if point.is_none() {
        order(transaction, "first").await?;
        transaction.advance("ordered").await?;
    }
    order(transaction, "second").await?;
    match fails {
        true => Err("no parcel".into()),
        false => Ok(point.unwrap_or_else(|| "the start".to_owned())),
    }
}

async fn run_ship(engine: &Engine, fails: bool) -> Ran<String, AnyError> {
    engine
        .run_in::<Sqlite, _, _>(&ENCODED, async |transaction| ship(transaction, fails).await)
        .await
}

#[tokio::test]
async fn nothing_is_held_between_two_phases() {
    let (file, storage) = shop().await;
    let ran: Ran<i64, AnyError> = engine(&storage)
        .run_in::<Sqlite, _, _>(&ENCODED, async |transaction| {
            order(transaction, "first").await?;
            let work = async {
                assert_eq!(file.number(ORDERS).await, 1);
                assert_eq!(file.execute("INSERT INTO orders DEFAULT VALUES").await, 1);
                let begun = storage.begin(&key(1), &claim()).await?;
                assert_eq!(begun, Begin::Acquired);
                // Longer than the lease: it is renewed.
                tokio::time::sleep(2 * LEASE).await;
                let begun = storage.begin(&KEY, &claim()).await?;
                assert!(matches!(begun, Begin::InFlight { .. }), "{begun:?}");
                Ok::<_, AnyError>(7)
            };
            let value = transaction.between("ordered", work).await??;
            assert_eq!(transaction.recovery_point(), Some("ordered"));
            order(transaction, "second").await?;
            Ok(value)
        })
        .await;
    assert!(matches!(ran, Ran::Executed(7)), "{ran:?}");
    assert_eq!(file.number(ORDERS).await, 3);
    assert_eq!(file.number(POINTS).await, 0);
    let again = run_ship(&engine(&storage), false).await;
    assert!(
        matches!(again, Ran::StorageFailed(_)),
        "it is no string: {again:?}"
    );
}

#[tokio::test]
async fn after_an_error_a_retry_goes_on_at_once() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let failed = run_ship(&engine, true).await;
    assert!(matches!(failed, Ran::Failed(_)), "{failed:?}");
    assert_eq!(file.number(ORDERS).await, 1);
    let failed = timeout(LEASE / 2, run_ship(&engine, true)).await;
    assert!(matches!(failed, Ok(Ran::Failed(_))), "{failed:?}");
    let ran = timeout(LEASE / 2, run_ship(&engine, false)).await;
    assert!(
        matches!(&ran, Ok(Ran::Executed(point)) if point == "ordered"),
        "{ran:?}"
    );
    assert_eq!(file.number(ORDERS).await, 2);
    assert_eq!(file.number(POINTS).await, 0);
}

#[tokio::test]
async fn after_a_dropped_attempt_a_retry_goes_on_when_the_lease_is_over() {
    let (file, storage) = shop().await;
    let engine = engine(&storage);
    let run = engine.run_in::<Sqlite, i64, AnyError>(&ENCODED, async |transaction| {
        order(transaction, "first").await?;
        transaction.between("ordered", pending::<()>()).await?;
        Ok(1)
    });
    assert!(timeout(A_WHILE, run).await.is_err());
    // As another process.
    let theirs = self::engine(&file.open().await);
    let ran = run_ship(&theirs, false).await;
    assert!(
        matches!(&ran, Ran::Executed(point) if point == "ordered"),
        "{ran:?}"
    );
    assert_eq!(file.number(ORDERS).await, 2);
}

#[tokio::test]
async fn an_operation_that_lost_its_claim_writes_no_more() {
    for reports in [true, false] {
        let (file, storage) = shop().await;
        let ran: Ran<i64, AnyError> = engine(&storage)
            .run_in::<Sqlite, _, _>(&ENCODED, async |transaction| {
                let work = async { storage.remove(&KEY).await };
                let lost = transaction.between("ordered", work).await;
                assert!(matches!(lost, Err(PhaseError::Lost)), "{lost:?}");
                assert!(order(transaction, "late").await.is_err());
                let orders = sqlx::query_scalar::<_, i64>(ORDERS);
                assert_eq!(orders.fetch_one(&mut **transaction).await?, 0);
                // It holds no lock.
                assert_eq!(file.execute("INSERT INTO orders DEFAULT VALUES").await, 1);
                match reports {
                    true => Err("lost".into()),
                    false => Ok(1),
                }
            })
            .await;
        match reports {
            true => assert!(matches!(ran, Ran::Failed(_)), "{ran:?}"),
            false => assert!(matches!(ran, Ran::StorageFailed(_)), "{ran:?}"),
        }
        assert_eq!(storage.get(&KEY).await.unwrap(), None);
        // The next transaction has a connection that writes.
        let ran = run_ship(&engine(&storage), false).await;
        assert!(matches!(ran, Ran::Executed(_)), "{ran:?}");
    }
}

#[tokio::test]
async fn a_phase_that_was_ended_by_hand_is_lost() {
    let (file, storage) = shop().await;
    let mut transaction = begin(&storage, &new_transaction(PRINT)).await;
    order(&mut transaction, "first").await.unwrap();
    transaction.execute("COMMIT").await.unwrap();
    let ended = transaction.end_phase("ordered", LONG).await;
    assert!(matches!(ended, Err(PhaseError::Lost)), "{ended:?}");
    assert!(order(&mut transaction, "late").await.is_err());
    let _ = transaction.roll_back().await;
    // Its tombstone stays.
    assert!(record_of(&storage, &KEY).await.is_some());
    assert_eq!(file.number(ORDERS).await, 1);
}

#[tokio::test]
async fn a_phase_that_can_not_begin_is_left_to_a_retry() {
    let (_file, storage) = shop().await;
    let hasty = storage.clone().time_limit(A_WHILE);
    let mut transaction = begin(&hasty, &new_transaction(PRINT)).await;
    transaction.end_phase("ordered", LONG).await.unwrap();
    let lent = storage.transactions().unwrap();
    let other = lent.begin(&key(1), &new_transaction(None)).await.unwrap();
    match transaction.begin_phase().await {
        Err(PhaseError::Failed(error)) => assert_eq!(error.kind(), StorageErrorKind::Timeout),
        other => panic!("{other:?}"),
    }
    drop(other);
    let committed = transaction.commit(answer("done"), LONG, Writes::Keep).await;
    assert!(matches!(committed, Committed::Failed(_)), "{committed:?}");
    let retry = begin(&storage, &new_transaction(PRINT)).await;
    assert_eq!(retry.recovery_point(), Some("ordered"));
}

#[tokio::test]
async fn a_recovery_point_outlives_its_lease() {
    let (file, storage) = shop().await;
    let (env, clock) = Env::simulated(7);
    let storage = storage.env(env);
    let new = new_transaction(PRINT);
    let mut transaction = begin(&storage, &new).await;
    order(&mut transaction, "first").await.unwrap();
    transaction.end_phase("ordered", LEASE).await.unwrap();
    // While the lease lives, nobody goes on there.
    let begun = try_begin(&storage, &new_transaction(PRINT)).await;
    assert!(
        matches!(begun, BeginTransaction::InFlight { fingerprint: PRINT }),
        "{begun:?}"
    );
    drop(transaction);

    clock.advance(LEASE);
    assert_eq!(storage.purge_expired().await.unwrap(), 0);
    storage.wait(&KEY, LONG).await.unwrap();
    let begun = storage.begin(&KEY, &claim()).await.unwrap();
    let expected = Begin::InFlight {
        fingerprint: PRINT,
        lease_left: Some(Duration::ZERO),
    };
    assert_eq!(begun, expected);
    let entry = storage.get(&KEY).await.unwrap();
    assert!(matches!(entry, Some(Entry::Claimed { .. })), "{entry:?}");
    let stranger = claim().token;
    let held = storage
        .complete(&KEY, stranger, &answer("stranger"), LONG)
        .await;
    assert_eq!(held.unwrap(), Held::Lost);
    for print in [OTHER_PRINT, None] {
        let begun = try_begin(&storage, &new_transaction(print)).await;
        assert!(
            matches!(begun, BeginTransaction::InFlight { fingerprint: PRINT }),
            "{begun:?}"
        );
    }

    // The attempt that takes it over is rolled back, and the point stays.
    let retry = begin(&storage, &new_transaction(PRINT)).await;
    assert_eq!(retry.recovery_point(), Some("ordered"));
    let _ = retry.roll_back().await;
    let retry = begin(&storage, &new_transaction(PRINT)).await;
    assert_eq!(retry.recovery_point(), Some("ordered"));
    let committed = retry.commit(answer("done"), LONG, Writes::Keep).await;
    assert!(matches!(committed, Committed::Yes), "{committed:?}");
    assert_eq!(record_of(&storage, &KEY).await, Some(answer("done")));
    assert_eq!(file.number(POINTS).await, 0);
}

#[tokio::test]
async fn a_plain_begin_at_an_abandoned_point_asks_at_a_bounded_pace() {
    const LIMIT: Duration = Duration::from_millis(300);
    let (_file, storage) = shop().await;
    let (env, clock) = Env::simulated(7);
    let storage = storage.env(env);
    let mut transaction = begin(&storage, &new_transaction(PRINT)).await;
    transaction.end_phase("ordered", LEASE).await.unwrap();
    drop(transaction);
    clock.advance(LEASE);

    let storage = FaultyStorage::new(storage);
    let config = Config::default().lock(LockPolicy::default().timeout(LIMIT));
    let engine = Engine::new(storage.clone(), config);
    let Decision::Refuse(refused) = timeout(PATIENCE, engine.begin(&ENCODED)).await.unwrap() else {
        panic!("the key is left to an operation in a transaction");
    };
    assert_eq!(refused.refusal, Refusal::InFlight);
    let begins = storage.calls(Operation::Begin);
    assert!((2..10).contains(&begins), "{begins}");
}

#[tokio::test]
async fn a_recovery_point_is_kept_for_its_ttl() {
    let (_file, storage) = shop().await;
    let (env, clock) = Env::simulated(7);
    let storage = storage.env(env);
    for purges in [true, false] {
        let mut transaction = begin(&storage, &new_transaction(PRINT)).await;
        transaction.end_phase("ordered", LEASE).await.unwrap();
        drop(transaction);
        clock.advance(LONG);
        assert_eq!(storage.get(&KEY).await.unwrap(), None);
        if purges {
            assert_eq!(storage.purge_expired().await.unwrap(), 1);
        }
        let next = begin(&storage, &new_transaction(OTHER_PRINT)).await;
        assert_eq!(next.recovery_point(), None);
        let _ = next.roll_back().await;
        let claim = claim();
        let begun = storage.begin(&KEY, &claim).await.unwrap();
        assert_eq!(begun, Begin::Acquired);
        let held = storage.release(&KEY, claim.token).await.unwrap();
        assert_eq!(held, Held::Yes);
    }
}

#[tokio::test]
async fn another_request_does_not_go_on_at_a_recovery_point() {
    let (_file, storage) = shop().await;
    let engine = engine(&storage);
    let failed = run_ship(&engine, true).await;
    assert!(matches!(failed, Ran::Failed(_)), "{failed:?}");
    let other = Encoded {
        key: KEY,
        fingerprint: OTHER_PRINT,
    };
    let progress = Progress::new();
    match engine.begin_in_transaction(&other, &progress, None).await {
        Decision::Refuse(refused) => assert_eq!(refused.refusal, Refusal::KeyReused),
        other => panic!("{other:?}"),
    }
}

/// Which file a process of [`dies_in`] opens, and where it is to die.
const FILE_OF_CHILD: &str = "SQLITE_PHASES_FILE";
const PHASE_OF_CHILD: &str = "SQLITE_PHASES_PHASE";

/// Killed when it is dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it is gone");
    }
}

/// A process of this executable that runs the next test.
fn dies_in(phase: &str, file: &SqliteFile) -> Process {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "phases::a_process_that_is_killed", "--ignored"])
        .env(FILE_OF_CHILD, file.path())
        .env(PHASE_OF_CHILD, phase);
    Process(command.spawn().unwrap())
}

#[tokio::test]
#[ignore = "it waits to be killed by the tests that start it"]
async fn a_process_that_is_killed() {
    let Some(file) = env::var_os(FILE_OF_CHILD) else {
        return;
    };
    let storage = SqliteStorage::open(&file).await.unwrap();
    let engine = engine(&storage.time_limit(PATIENCE));
    let ran: Ran<i64, AnyError> = engine
        .run_in::<Sqlite, _, _>(&ENCODED, async |transaction| {
            order(transaction, "first").await?;
            let reached = async {
                fs::write(std::path::Path::new(&file).with_extension("reached"), "")?;
                pending::<std::io::Result<()>>().await
            };
            match env::var(PHASE_OF_CHILD)?.as_str() {
                "the first" => reached.await?,
                _ => transaction.between("ordered", reached).await??,
            }
            Ok(1)
        })
        .await;
    panic!("it was not killed: {ran:?}");
}

#[tokio::test]
async fn what_a_killed_process_began_is_done_by_another() {
    for (phase, goes_on_at) in [("the first", "the start"), ("between", "ordered")] {
        let (file, storage) = shop().await;
        let process = dies_in(phase, &file);
        let reached = file.path().with_extension("reached");
        let comes = async {
            while !reached.exists() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, comes).await.expect("it runs");
        drop(process);
        let ran = run_ship(&engine(&storage), false).await;
        assert!(
            matches!(&ran, Ran::Executed(point) if point == goes_on_at),
            "{ran:?}"
        );
        assert_eq!(file.number(ORDERS).await, 2);
    }
}
