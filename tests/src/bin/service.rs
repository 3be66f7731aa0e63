//! An order service behind a Redis, a PostgreSQL or a SQLite file, as a process for tests to stop and to kill. It prints a line for each run of its handler and
//! for each event, and takes `go` lines on stdin where its handlers are held.

#![allow(
    clippy::disallowed_methods,
    reason = "the harness is outside of what `Env` drives"
)]

use std::{env, error::Error, sync::Arc, time::Duration};

use axum::{Router, extract::State, http::StatusCode, routing::post};
use idempotency_axum::{
    AnyStorage, Config, Event, IdempotencyKey, IdempotencyLayer, IdempotentTransaction, LockPolicy,
    PostgresStorage, RedisStorage, SqliteStorage, idempotency_key,
    sqlx::{self, Postgres},
};
use idempotency_tests::PATIENCE;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    sync::Semaphore,
};

#[derive(Clone)]
struct Service {
    /// A permit for each handler that may go on, if they are held.
    passes: Option<Arc<Semaphore>>,
}

#[idempotency_key]
async fn create_order(State(service): State<Service>, key: IdempotencyKey) -> (StatusCode, String) {
    println!("ran {}", key.as_str());
    if let Some(passes) = service.passes {
        match passes.acquire().await {
            Ok(pass) => pass.forget(),
            Err(_) => return (StatusCode::INTERNAL_SERVER_ERROR, "closed".to_owned()),
        }
    }
    let answer = format!("{} by {}", key.as_str(), std::process::id());
    (StatusCode::CREATED, answer)
}

/// The same, with a row in the table `orders` of PostgreSQL.
#[idempotency_key]
async fn write_order(
    State(service): State<Service>,
    key: IdempotencyKey,
    mut tx: IdempotentTransaction<Postgres>,
) -> (StatusCode, String) {
    let written = sqlx::query("INSERT INTO orders (note) VALUES ($1)")
        .bind(key.as_str())
        .execute(&mut *tx)
        .await;
    match written {
        Ok(_) => create_order.invoke(State(service), key).await,
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let storage = storage().await?;
    let milliseconds = |name| -> Result<Option<Duration>, Box<dyn Error>> {
        match env::var(name) {
            Ok(number) => Ok(Some(Duration::from_millis(number.parse()?))),
            Err(_) => Ok(None),
        }
    };
    let mut lock = LockPolicy::default();
    if let Some(lease) = milliseconds("LEASE_MS")? {
        lock = lock.ttl(lease);
    }
    if let Some(wait) = milliseconds("WAIT_MS")? {
        lock = lock.timeout(wait);
    }
    let config = Config::default()
        .lock(lock)
        .storage_timeout(PATIENCE)
        .observer(|event: &Event<'_>| println!("event {}", event.name()));
    let layer = IdempotencyLayer::enforce(storage).config(config);

    let passes = env::var("HOLD")
        .is_ok()
        .then(|| Arc::new(Semaphore::new(0)));
    if let Some(passes) = passes.clone() {
        tokio::spawn(async move {
            let mut lines = BufReader::new(tokio::io::stdin()).lines();
            while let Ok(Some(_)) = lines.next_line().await {
                passes.add_permits(1);
            }
        });
    }
    let orders = match env::var("TRANSACTIONS") {
        Ok(_) => post(write_order),
        Err(_) => post(create_order),
    };
    let app = Router::new()
        .route("/orders", orders)
        .layer(layer.clone())
        .with_state(Service { passes });
    let app = layer.check(app)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listens {}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}

/// The storage at `SQLITE_URL` or `REDIS_URL`. A busy machine is no fault of it, so its time limit is long.
async fn storage() -> Result<AnyStorage, Box<dyn Error>> {
    if let Ok(url) = env::var("SQLITE_URL") {
        let storage = SqliteStorage::open(url).await?.time_limit(PATIENCE);
        storage.migrate().await?;
        return Ok(AnyStorage::new(storage));
    }
    if let Ok(url) = env::var("POSTGRES_URL") {
        let storage = PostgresStorage::connect(url).time_limit(PATIENCE).await?;
        return Ok(AnyStorage::new(storage));
    }
    let url = env::var("REDIS_URL")?;
    let storage = RedisStorage::connect(url).time_limit(PATIENCE).await?;
    Ok(AnyStorage::new(storage))
}
