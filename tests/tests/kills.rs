//! What is true of orders after their shops were killed a hundred times: see `idempotency_tests::kills`.
//!
//! `KILL_SEED=… KILL_ROUNDS=… cargo nextest run -p idempotency-tests --all-features --test kills` repeats the choices of a run; when
//! which message arrives is still up to the machine.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

use idempotency_axum::sqlx;
use idempotency_tests::{
    kills::{LEASE, Order, Plan, crash_postgres, kill_in_commits, kill_shops},
    postgres::Postgres,
    redis::Spec,
    sqlite::SqliteFile,
};

const SHOP: &str = env!("CARGO_BIN_EXE_shop");

/// A lease keeps two runs apart. An order that is committed without its record is made again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_on_postgres_keeps_runs_apart() {
    let postgres = postgres().await;
    let spec = Spec::postgres(SHOP, &postgres.url()).lease(LEASE);
    let story = kill_shops(spec, Plan::of_the_environment()).await;
    story.assert_one_at_a_time();
    let verdict = story.judge(&in_postgres(&postgres).await);
    println!("PostgreSQL, leases: {verdict}");
    assert!(verdict.doubles > 0, "no kill hit what a lease can't cover");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_on_sqlite_keeps_runs_apart() {
    let file = sqlite().await;
    let spec = Spec::sqlite(SHOP, &file.url()).lease(LEASE);
    let story = kill_shops(spec, Plan::of_the_environment()).await;
    story.assert_one_at_a_time();
    let verdict = story.judge(&in_sqlite(&file).await);
    println!("SQLite, leases: {verdict}");
    assert!(verdict.doubles > 0, "no kill hit what a lease can't cover");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_on_postgres_makes_each_order_once() {
    let postgres = postgres().await;
    let spec = Spec::postgres(SHOP, &postgres.url()).exactly_once();
    let story = kill_shops(spec, Plan::of_the_environment()).await;
    story.assert_one_at_a_time();
    let verdict = story.judge(&in_postgres(&postgres).await);
    println!("PostgreSQL, transactions: {verdict}");
    assert_eq!(verdict.doubles, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_on_sqlite_makes_each_order_once() {
    let file = sqlite().await;
    let spec = Spec::sqlite(SHOP, &file.url()).exactly_once();
    let story = kill_shops(spec, Plan::of_the_environment()).await;
    story.assert_one_at_a_time();
    let verdict = story.judge(&in_sqlite(&file).await);
    println!("SQLite, transactions: {verdict}");
    assert_eq!(verdict.doubles, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_crashes_has_each_order_once() {
    let mut postgres = postgres().await;
    let plan = Plan::of_the_environment();
    let spec = Spec::postgres(SHOP, &postgres.url()).exactly_once();
    let story = crash_postgres(&mut postgres, spec, plan, plan.rounds / 10).await;
    let verdict = story.judge(&in_postgres(&postgres).await);
    println!("PostgreSQL, crashes: {verdict}");
    assert_eq!(verdict.doubles, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_inside_of_a_commit_leaves_all_of_it_or_nothing() {
    let file = sqlite().await;
    let plan = Plan::of_the_environment();
    let spec = Spec::sqlite(SHOP, &file.url()).exactly_once();
    let (story, committed) = kill_in_commits(&file, spec, plan).await;
    story.assert_one_at_a_time();
    let verdict = story.judge(&in_sqlite(&file).await);
    println!("SQLite, killed in COMMIT: {verdict}, {committed} were committed");
    assert_eq!(verdict.doubles, 0);
    let mut connection = file.connection().await;
    let check = sqlx::query_scalar("PRAGMA integrity_check").fetch_one(&mut connection);
    let check: String = check.await.unwrap();
    assert_eq!(check, "ok");
}

async fn postgres() -> Postgres {
    let postgres = Postgres::start();
    let table = "CREATE TABLE orders (id bigserial PRIMARY KEY, item text NOT NULL, note text)";
    postgres.execute(table).await;
    postgres
}

async fn sqlite() -> SqliteFile {
    let file = SqliteFile::new();
    drop(file.open().await);
    let table = "CREATE TABLE orders (id integer PRIMARY KEY, item text NOT NULL, note text)";
    file.execute(table).await;
    file
}

async fn in_postgres(postgres: &Postgres) -> Vec<Order> {
    let mut connection = postgres.connection().await;
    let rows = sqlx::query_as(ROWS).fetch_all(&mut connection).await;
    rows.unwrap().into_iter().map(order).collect()
}

async fn in_sqlite(file: &SqliteFile) -> Vec<Order> {
    let mut connection = file.connection().await;
    let rows = sqlx::query_as(ROWS).fetch_all(&mut connection).await;
    rows.unwrap().into_iter().map(order).collect()
}

const ROWS: &str = "SELECT id, item FROM orders";

fn order((id, item): (i64, String)) -> Order {
    Order { id, item }
}
