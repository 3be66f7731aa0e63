//! An order service that keeps orders and records in a SQLite file, and commits an order together with its recorded answer: no server,
//! one order per key, and a retry after a restart still gets the first answer.
//!
//! `cargo run -p idempotency-examples --example orders_sqlite` prints the `curl` lines to try:
//!
//! ```console
//! $ curl -i -X POST http://127.0.0.1:3000/orders -H 'Idempotency-Key: order-1'
//! HTTP/1.1 201 Created
//! $ curl -i -X POST http://127.0.0.1:3000/orders -H 'Idempotency-Key: order-1'
//! HTTP/1.1 409 Conflict
//! idempotency-replayed: true
//! ```
//!
//! Stop it, even with `kill -9`, start it again, and repeat the line: it is still a replay. Start a second one with another `PORT`: it
//! shares the file. `DATABASE_URL` says where the file is (default: `sqlite:orders.db`, which is created); `PORT` chooses another port
//! than 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{env, error::Error, net::SocketAddr, process::ExitCode, time::Duration};

use axum::{Router, http::StatusCode, routing::post};
use idempotency_axum::{
    IdempotencyLayer, IdempotentTransaction, SqliteStorage, idempotency_key,
    sqlx::{self, Sqlite},
};

/// The order and its recorded answer are committed together, so a key never has two orders, whenever this process is killed.
#[idempotency_key]
async fn create_order(
    mut tx: IdempotentTransaction<Sqlite>,
) -> Result<(StatusCode, String), StatusCode> {
    let id: i64 = sqlx::query_scalar("INSERT INTO orders DEFAULT VALUES RETURNING id")
        .fetch_one(&mut *tx)
        .await
        .map_err(|error| {
            tracing::error!(%error, "the order was not made");
            StatusCode::INTERNAL_SERVER_ERROR
        })?;
    Ok((StatusCode::CREATED, format!("order {id}\n")))
}

async fn run() -> Result<(), Box<dyn Error>> {
    let location = env::var("DATABASE_URL").unwrap_or_else(|_| "sqlite:orders.db".to_owned());
    let storage = SqliteStorage::open(location).await?;
    // Makes the table when it is missing. All processes may do so at once.
    storage.migrate().await?;
    // A table of our own, in the same database.
    let pool = storage.pool();
    sqlx::query("CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY)")
        .execute(pool)
        .await?;
    // Gives the room of expired records back, until it is dropped.
    let _purger = storage.purge_every(Duration::from_secs(600));

    let layer = IdempotencyLayer::enforce(storage);
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
An order service with its records in a SQLite file, at http://{address}
Try these lines in another terminal.

# The first one runs: 201.
{curl} -H 'Idempotency-Key: order-1'

# The retry gets its answer, also after a restart: 409 with `idempotency-replayed: true`.
{curl} -H 'Idempotency-Key: order-1'

Ctrl-c stops."
    );
}
