//! Operations in phases, with calls to another service in between.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::http::StatusCode;
use idempotency_axum::{
    Config, IdempotencyKey, LockPolicy, PostgresStorage, StoreOn,
    sqlx::{self, Postgres},
};
use idempotency_tests::{Gate, PATIENCE, Runs, postgres::Proxy};

use super::shop::*;

const LEASE: Duration = Duration::from_millis(500);

fn leased() -> Config {
    config().lock(LockPolicy::default().ttl(LEASE).timeout(PATIENCE))
}

/// At which point the operation was, and the key that it called with.
type Call = (Option<String>, String);

/// The other service.
#[derive(Clone, Default)]
struct Provider {
    calls: Arc<Mutex<Vec<Call>>>,
    gate: Gate,
}

impl Provider {
    async fn charge(&self, point: Option<String>, key: String) -> String {
        self.calls.lock().unwrap().push((point, key));
        self.gate.enter().await;
        "receipt".to_owned()
    }

    /// At which points an operation was when it called.
    fn points(&self) -> Vec<Option<String>> {
        let calls = self.calls.lock().unwrap();
        calls.iter().map(|(point, _)| point.clone()).collect()
    }

    fn assert_one_key(&self) {
        let calls = self.calls.lock().unwrap();
        assert!(calls.iter().all(|(_, key)| *key == calls[0].1), "{calls:?}");
    }
}

/// Answers with an error of the phase, after it has tried to write all the same.
async fn pay(
    provider: &Provider,
    key: IdempotencyKey,
    mut tx: Tx<Postgres>,
    last: u16,
) -> (StatusCode, String) {
    let point = tx.recovery_point().map(str::to_owned);
    if point.is_none() {
        Postgres::order(&mut tx, "pending").await.unwrap();
    }
    let charge = provider.charge(point, key.derive("charge"));
    let receipt = match tx.between("created", charge).await {
        Ok(receipt) => receipt,
        Err(error) => {
            let written = Postgres::order(&mut tx, "too late").await;
            assert!(written.is_err(), "{written:?}");
            return (StatusCode::BAD_GATEWAY, error.to_string());
        }
    };
    sqlx::query("UPDATE orders SET note = $1")
        .bind(&receipt)
        .execute(&mut *tx)
        .await
        .unwrap();
    (StatusCode::from_u16(last).unwrap(), receipt)
}

/// A service that takes payments, on `storage`.
fn paying(storage: PostgresStorage, config: Config, provider: &Provider) -> App {
    let provider = provider.clone();
    App::new::<Postgres, _>(
        storage,
        config,
        async move |key: IdempotencyKey, tx: Tx<Postgres>| pay(&provider, key, tx, 201).await,
    )
}

const PAID: &str = "SELECT count(*) FROM orders WHERE note = 'receipt'";

#[tokio::test]
async fn phases_are_committed_one_by_one() {
    let shop = Postgres::start().await;
    let provider = Provider::default();
    let app = paying(shop.storage.clone(), leased(), &provider);
    let answer = app.start("k");
    provider.gate.arrived(1).await;
    // No transaction is open meanwhile.
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
    assert_eq!(shop.server.number(open).await, 0);
    provider.gate.open(1);
    let first = soon(answer).await.unwrap();
    assert_status(&first, 201);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!(shop.server.number(PAID).await, 1);
    assert_eq!(provider.points(), [None]);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

#[tokio::test]
async fn a_claim_is_renewed_while_the_work_goes_on() {
    let shop = Postgres::start().await;
    let provider = Provider::default();
    let app = paying(shop.storage.clone(), leased(), &provider);
    let answer = app.start("k");
    provider.gate.arrived(1).await;
    let ends = "SELECT (extract(epoch FROM expires_at) * 1000)::bigint FROM idempotency";
    let first = shop.server.number(ends).await;
    let renewed = format!("SELECT (({ends}) > {first} + 1500)::int::bigint");
    shop.server.until(&renewed).await;
    provider.gate.open(1);
    assert_status(&soon(answer).await.unwrap(), 201);
    assert_eq!(provider.points(), [None]);
}

/// Its node falls silent in the middle of the call, and comes back when another one has gone on.
#[tokio::test]
async fn a_retry_goes_on_where_a_dead_process_stopped() {
    let shop = Postgres::start().await;
    let proxy = Proxy::before(&shop.server).await;
    let storage = PostgresStorage::connect(proxy.url()).await.unwrap();
    let (dead, provider) = (Provider::default(), Provider::default());
    let dies = paying(storage.time_limit(LEASE), leased(), &dead);
    let lost = dies.start("k");
    dead.gate.arrived(1).await;
    proxy.fall_silent();
    provider.gate.open(1);
    let other = paying(shop.storage.clone(), leased(), &provider);
    let first = soon(other.post("k")).await;
    assert_status(&first, 201);
    assert_eq!(provider.points(), [Some("created".to_owned())]);
    assert_eq!(
        dead.calls.lock().unwrap()[0].1,
        provider.calls.lock().unwrap()[0].1
    );

    proxy.speak();
    dead.gate.open(1);
    let late = soon(lost).await.unwrap();
    assert!(late.code() >= 500, "{late:?}");
    assert_repeats(&soon(dies.post("k")).await, &first);
    assert_eq!(shop.server.number(PAID).await, 1);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

#[tokio::test]
async fn a_claim_that_was_removed_is_lost() {
    let shop = Postgres::start().await;
    let provider = Provider::default();
    let app = paying(shop.storage.clone(), leased(), &provider);
    let answer = app.start("k");
    provider.gate.arrived(1).await;
    assert!(app.engine().remove(&app.encoded("k")).await.unwrap());
    provider.gate.open(1);
    assert_status(&soon(answer).await.unwrap(), 502);
    assert_eq!((shop.orders().await, shop.records().await), (1, 0));
}

/// The handler takes no notice of the error, and answers with a success.
#[tokio::test]
async fn a_lost_claim_that_is_ignored_is_no_success() {
    let shop = Postgres::start().await;
    let provider = Provider::default();
    let called = provider.clone();
    let handler = async move |key: IdempotencyKey, mut tx: Tx<Postgres>| {
        let charge = called.charge(None, key.derive("charge"));
        let lost = tx.between("created", charge).await;
        assert!(lost.is_err(), "{lost:?}");
        let _ = Postgres::order(&mut tx, "too late").await;
        CREATED
    };
    let app = App::new::<Postgres, _>(shop.storage.clone(), leased(), handler);
    let answer = app.start("k");
    provider.gate.arrived(1).await;
    assert!(app.engine().remove(&app.encoded("k")).await.unwrap());
    provider.gate.open(1);
    let answer = soon(answer).await.unwrap();
    assert!(answer.code() >= 500, "{answer:?}");
    assert_eq!(shop.orders().await, 0);
}

/// A service whose last phase answers with `status` at first, and with 201 then.
fn failing_at_last(shop: &Shop<Postgres>, config: Config, provider: &Provider, status: u16) -> App {
    let (provider, runs) = (provider.clone(), Runs::new());
    let handler = async move |key: IdempotencyKey, tx: Tx<Postgres>| {
        let last = if runs.next() == 1 { status } else { 201 };
        pay(&provider, key, tx, last).await
    };
    App::new::<Postgres, _>(shop.storage.clone(), config, handler)
}

/// The lease is an hour.
#[tokio::test]
async fn a_retry_after_an_error_goes_on_at_once() {
    let shop = Postgres::start().await;
    let provider = Provider::default();
    provider.gate.open(2);
    let hour = LockPolicy::default()
        .ttl(Duration::from_secs(3600))
        .timeout(PATIENCE);
    let app = failing_at_last(&shop, config().lock(hour), &provider, 500);
    assert_status(&app.post("k").await, 500);
    assert_eq!(shop.server.number(PAID).await, 0);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    assert_eq!(shop.storage.purge_expired().await.unwrap(), 0);
    let again = soon(app.post("k")).await;
    assert_status(&again, 201);
    assert_eq!(provider.points(), [None, Some("created".to_owned())]);
    provider.assert_one_key();
    assert_repeats(&app.post("k").await, &again);
    assert_eq!(shop.server.number(PAID).await, 1);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

#[tokio::test]
async fn a_stored_error_of_the_last_phase_keeps_those_before() {
    let shop = Postgres::start().await;
    let provider = Provider::default();
    provider.gate.open(1);
    let config = leased().store_on(StoreOn::below(500));
    let app = failing_at_last(&shop, config, &provider, 422);
    let first = app.post("k").await;
    assert_status(&first, 422);
    assert_eq!(shop.server.number(PAID).await, 0);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

#[tokio::test]
async fn each_point_is_remembered_until_the_next_one() {
    let shop = Postgres::start().await;
    let seen: Arc<Mutex<Vec<Option<String>>>> = Arc::default();
    let sees = seen.clone();
    let app = shop.app(async move |mut tx: Tx<Postgres>| {
        let run = {
            let mut seen = sees.lock().unwrap();
            seen.push(tx.recovery_point().map(str::to_owned));
            seen.len()
        };
        Postgres::order(&mut tx, &format!("run {run}"))
            .await
            .unwrap();
        if run < 4 {
            tx.advance(&format!("run {run}")).await.unwrap();
            Postgres::order(&mut tx, "undone").await.unwrap();
            assert_eq!(tx.recovery_point(), Some(&*format!("run {run}")));
            return StatusCode::INTERNAL_SERVER_ERROR;
        }
        CREATED
    });
    for _ in 1..4 {
        assert_status(&soon(app.post("k")).await, 500);
    }
    let first = soon(app.post("k")).await;
    assert_status(&first, 201);
    assert_repeats(&app.post("k").await, &first);
    let expected = [None, Some("run 1"), Some("run 2"), Some("run 3")];
    assert_eq!(
        *seen.lock().unwrap(),
        expected.map(|point| point.map(str::to_owned))
    );
    assert_eq!((shop.orders().await, shop.records().await), (4, 1));
}

/// With a connection that is lost in between, the work is done, and a retry learns that from its point.
#[tokio::test]
async fn a_connection_lost_between_phases_leaves_the_point() {
    let shop = Postgres::start().await;
    let provider = Provider::default();
    let app = paying(shop.storage.clone(), leased(), &provider);
    let answer = app.start("k");
    provider.gate.arrived(1).await;
    shop.server
        .execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'shop'")
        .await;
    provider.gate.open(2);
    let first = soon(answer).await.unwrap();
    if first.code() == 201 {
        return;
    }
    assert!(first.code() >= 500, "{first:?}");
    assert_status(&soon(app.post("k")).await, 201);
    assert_eq!(provider.points(), [None, Some("created".to_owned())]);
    assert_eq!(shop.server.number(PAID).await, 1);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

/// The claim of a phase refuses duplicates, here and elsewhere.
#[tokio::test]
async fn nobody_else_runs_between_phases() {
    let shop = Postgres::start().await;
    let (provider, idle) = (Provider::default(), Provider::default());
    let app = paying(shop.storage.clone(), leased(), &provider);
    let (_, peer) = shop.peer(4);
    let lock = LockPolicy::default()
        .ttl(LEASE)
        .timeout(Duration::from_millis(100));
    let other = paying(peer, config().lock(lock), &idle);
    let answer = app.start("k");
    provider.gate.arrived(1).await;
    for _ in 0..10 {
        let refused = soon(other.post("k")).await;
        assert_eq!(
            refused.problem().as_deref(),
            Some("in-flight"),
            "{refused:?}"
        );
    }
    let duplicate = app.start("k");
    provider.gate.open(1);
    let first = soon(answer).await.unwrap();
    assert_status(&first, 201);
    assert_repeats(&soon(duplicate).await.unwrap(), &first);
    assert_repeats(&other.post("k").await, &first);
    assert_eq!(idle.points(), []);
}
