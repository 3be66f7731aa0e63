//! A server that is configured by a file, `settings.toml` beside this one, and by the environment.
//!
//! `cargo run -p idempotency-examples --example settings` prints the `curl` lines to try. `SETTINGS` names another file; with
//! `IDEMPOTENCY__CONFLICT_STATUS=409` and the like the environment overrides what it says. `PORT` chooses another port than
//! 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    env,
    error::Error,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
};

use axum::{Router, routing::post};
use config::{Config, Environment, File};
use idempotency_axum::{IdempotencyLayer, Settings, idempotency_exempt, idempotency_key};

/// Counts executions, so that an answer shows whether its handler ran.
static RUNS: AtomicU32 = AtomicU32::new(1);

fn run_number() -> u32 {
    RUNS.fetch_add(1, Ordering::Relaxed)
}

/// In the default cache, `[storage]`.
#[idempotency_key]
async fn pay() -> String {
    format!("run {}: paid\n", run_number())
}

/// In a cache of its own, `[storages.mails]`.
#[idempotency_key(cache_name = "mails")]
async fn mail() -> String {
    format!("run {}: mailed\n", run_number())
}

/// Nothing to protect.
#[idempotency_exempt]
async fn search() -> String {
    format!("run {}: searched\n", run_number())
}

/// The file, overridden by the environment.
fn read_settings() -> Result<Settings, Box<dyn Error>> {
    let file = match env::var_os("SETTINGS") {
        Some(file) => PathBuf::from(file),
        None => PathBuf::from(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/examples/settings.toml"
        )),
    };
    let document = Config::builder()
        .add_source(File::from(file))
        .add_source(Environment::with_prefix("IDEMPOTENCY").separator("__"))
        .build()?;
    Ok(Settings::read(document)?)
}

async fn run() -> Result<(), Box<dyn Error>> {
    // A mistake in the settings ends the program here, with the name of the field and its allowed values.
    let layer = IdempotencyLayer::from_settings(read_settings()?).await?;
    let router = Router::new()
        .route("/payments", post(pay))
        .route("/mails", post(mail))
        .route("/search", post(search))
        .route_layer(layer.clone());
    // If the file has no `[storages.mails]`, this is an error.
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
Configured by settings.toml, at http://{address}
Try these lines in another terminal.

# The first one runs: 200.
{curl}/payments -H 'Idempotency-Key: payment-1'

# The retry gets the same, since `conflict_status` is \"original\": 200 with `idempotency-replayed: true`.
{curl}/payments -H 'Idempotency-Key: payment-1'

# No key, and `mode` is \"enforce\": 400.
{curl}/payments

# In the cache `mails`: 200, the second time as well.
{curl}/mails -H 'Idempotency-Key: mail-1'

# Exempt, so it runs every time: 200.
{curl}/search

# Start again with IDEMPOTENCY__CONFLICT_STATUS=409 in the environment, and retries get 409.
# Start it with IDEMPOTENCY__LOCK__TIMEOUT=soon, and the error says what a timeout can be.
# IDEMPOTENCY__STORAGE__CLASS=redis and IDEMPOTENCY__STORAGE__LOCATION=redis://localhost keep the payments in Redis.

Ctrl-c stops."
    );
}
