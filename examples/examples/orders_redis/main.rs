//! An order service of which any number of processes stand behind one Redis: an order is made once, whichever process gets its
//! retries.
//!
//! `examples/examples/orders_redis/show.sh` starts a Redis and two processes and shows it, also how one of them dies. By hand:
//! `cargo run -p idempotency-examples --example orders_redis` prints the `curl` lines to try. `REDIS_URL` says where Redis is
//! (default: `redis://127.0.0.1:6379`), and can name all that `RedisStorage::connect` takes. `PORT` chooses another port than
//! 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    env,
    error::Error,
    net::SocketAddr,
    process::{self, ExitCode},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use axum::{Router, http::StatusCode, routing::post};
use idempotency_axum::{Config, IdempotencyLayer, LockPolicy, RedisStorage, idempotency_key};

/// Counts executions of this process.
static RUNS: AtomicU32 = AtomicU32::new(1);

#[idempotency_key]
async fn create_order() -> (StatusCode, String) {
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    // Who takes the payment takes their time.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let process = process::id();
    let order = format!("order {run} of process {process}\n");
    (StatusCode::CREATED, order)
}

async fn run() -> Result<(), Box<dyn Error>> {
    let location = env::var("REDIS_URL").unwrap_or_else(|_| "redis://127.0.0.1:6379".to_owned());
    // A Redis that may forget records to make room is refused here.
    let storage = RedisStorage::connect(location)
        .prefix("shop")
        .require_noeviction()
        .await?;
    // A duplicate waits for the running original, in whichever process that is. When that process dies, its key is free as soon as
    // its lease is over.
    let lock = LockPolicy::default()
        .timeout(Duration::from_secs(5))
        .ttl(Duration::from_secs(2));
    let layer = IdempotencyLayer::enforce(storage).config(Config::default().lock(lock));
    let router = Router::new()
        .route("/orders", post(create_order))
        .layer(layer.clone());
    let router = layer.check(router)?;

    let listener = idempotency_examples::listen().await?;
    print_what_to_try(listener.local_addr()?);
    axum::serve(listener, router).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    idempotency_examples::log();
    idempotency_examples::exit(run().await)
}

fn print_what_to_try(address: SocketAddr) {
    let curl = format!("curl -i -X POST http://{address}/orders");
    println!(
        "\
An order service with its records in Redis, at http://{address}
Start a second one with another PORT. Try these lines in another terminal.

# The first one takes a second: 201.
{curl} -H 'Idempotency-Key: order-1'

# The retry is answered at once, also by the other process: 409 with `idempotency-replayed: true`.
{curl} -H 'Idempotency-Key: order-1'

Ctrl-c stops."
    );
}
