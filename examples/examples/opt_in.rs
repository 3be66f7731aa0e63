//! Keys only for the handlers that ask for them: exempt mode, and every form of the attribute.
//!
//! `cargo run -p idempotency-examples --example opt_in` prints the `curl` lines to try. `PORT` chooses another port than 3000,
//! `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    error::Error,
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
};

use axum::{Router, routing::post};
use idempotency_axum::{IdempotencyKey, IdempotencyLayer, MemoryStorage, idempotency_key};

/// Counts executions, so that an answer shows whether its handler ran.
static RUNS: AtomicU32 = AtomicU32::new(1);

fn run_number() -> u32 {
    RUNS.fetch_add(1, Ordering::Relaxed)
}

/// Without a key: 400.
#[idempotency_key]
async fn pay(key: IdempotencyKey) -> String {
    // A provider that takes keys as well gets one that stays the same for this payment, whoever retries.
    let provider_key = key.derive("provider");
    format!("run {}: paid, provider key {provider_key}\n", run_number())
}

/// Without a key it runs every time; with one it is protected like `pay`.
#[idempotency_key(optional)]
async fn comment(key: Option<IdempotencyKey>) -> String {
    let how = if key.is_some() {
        "protected"
    } else {
        "unprotected"
    };
    format!("run {}: commented, {how}\n", run_number())
}

/// Its records live in a storage of their own, and not for long.
#[idempotency_key(cache_name = "mails", ttl = "1h")]
async fn mail() -> String {
    format!("run {}: mailed\n", run_number())
}

/// Says nothing about keys, so in exempt mode it runs every time, with a key or without.
async fn search() -> String {
    format!("run {}: searched\n", run_number())
}

async fn run() -> Result<(), Box<dyn Error>> {
    let layer = IdempotencyLayer::exempt(MemoryStorage::new()).cache("mails", MemoryStorage::new());
    let router = Router::new()
        .route("/payments", post(pay))
        .route("/comments", post(comment))
        .route("/mails", post(mail))
        .route("/search", post(search))
        .route_layer(layer.clone());
    // Would `mail` name a cache that the layer does not have, this is where it comes out.
    let router = layer.check(router)?;

    let listener = idempotency_examples::listen().await?;
    print_what_to_try(listener.local_addr()?);
    axum::serve(listener, router).await?;
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    idempotency_examples::log();
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print_what_to_try(address: SocketAddr) {
    let curl = format!("curl -i -X POST http://{address}");
    println!(
        "\
Keys are opted into at http://{address}
Try these lines in another terminal.

# Required. The first one runs: 200.
{curl}/payments -H 'Idempotency-Key: payment-1'

# The retry gets what the first one got, marked as a conflict: 409 with `idempotency-replayed: true`.
# (`Config::ietf()` would keep the 200.)
{curl}/payments -H 'Idempotency-Key: payment-1'

# No key: 400.
{curl}/payments

# Optional. Without a key it runs every time: 200.
{curl}/comments

# With one it runs once: 200, and 409 when you send it again.
{curl}/comments -H 'Idempotency-Key: comment-1'

# In a cache of its own: 200, and 409 when you send it again.
{curl}/mails -H 'Idempotency-Key: mail-1'

# Nothing asked for: it runs every time, key or not: 200.
{curl}/search -H 'Idempotency-Key: search-1'

Ctrl-c stops."
    );
}
