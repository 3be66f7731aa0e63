//! Two storages in one service, so that what is cheap to forget never pushes out what is not.
//!
//! A payment must not run twice within the week that its record lives: the storage of payments, which is the default one here,
//! refuses new keys with 503 when it is full rather than forget an old one. Mails come in floods, and one sent twice is a
//! nuisance: they have a small storage of their own, which forgets the mails that were asked for least recently. A handler says
//! by `cache_name` which storage it means.
//!
//! A name is only text, so it can be misspelt. `layer.check` finds that before the server listens.
//!
//! # Run
//!
//! ```console
//! $ cargo run -p idempotency-examples --example named_caches
//! $ curl -i -X POST http://127.0.0.1:3000/payments -H 'Idempotency-Key: payment-1'
//! $ curl -i -X POST http://127.0.0.1:3000/mails -H 'Idempotency-Key: mail-1'
//! $ curl -i http://127.0.0.1:3000/caches
//! $ cargo run -p idempotency-examples --example named_caches -- misspelt
//! ```
//!
//! `PORT` chooses another port than 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    error::Error,
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
};

use axum::{
    Router,
    extract::State,
    routing::{get, post},
};
use idempotency_axum::{IdempotencyLayer, MemoryStorage, Misuse, WhenFull, idempotency_key};

/// A handful of records: enough to try the lines, and soon full.
const MAILS_BYTES: usize = 4 * 1024;

/// In the default storage.
#[idempotency_key(ttl = "7d")]
async fn pay() -> String {
    format!("run {}: paid\n", run_number())
}

#[idempotency_key(cache_name = "mails", ttl = "1h")]
async fn mail() -> String {
    format!("run {}: mailed\n", run_number())
}

/// A mistake, on purpose: the cache is called `mails`.
#[idempotency_key(cache_name = "mail")]
async fn misspelt() {}

fn service(is_misspelt: bool) -> Result<Router, Misuse> {
    let payments = MemoryStorage::builder().when_full(WhenFull::Refuse).build();
    let mails = MemoryStorage::builder().max_bytes(MAILS_BYTES).build();
    let layer = IdempotencyLayer::enforce(payments.clone()).cache("mails", mails.clone());

    let mut router = Router::new()
        .route("/payments", post(pay))
        .route("/mails", post(mail));
    if is_misspelt {
        router = router.route("/newsletters", post(misspelt));
    }
    let router = router
        .route("/caches", get(caches))
        .with_state((payments, mails))
        .route_layer(layer.clone());
    // Without this line the route of `misspelt` would answer 500 when its first request comes.
    layer.check(router)
}

/// How full the storages are. They are handles: what the layer keeps in them is seen through any clone.
async fn caches(State((payments, mails)): State<(MemoryStorage, MemoryStorage)>) -> String {
    let line = |name, cache: MemoryStorage| {
        let (records, evicted) = (cache.records(), cache.evicted());
        format!("{name}: {records} records, {evicted} forgotten\n")
    };
    line("payments", payments) + &line("mails", mails)
}

async fn run() -> Result<(), Box<dyn Error>> {
    let router = service(std::env::args().any(|argument| argument == "misspelt"))?;
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

/// Counts executions, so that an answer shows whether its handler ran.
fn run_number() -> u32 {
    static RUNS: AtomicU32 = AtomicU32::new(1);
    RUNS.fetch_add(1, Ordering::Relaxed)
}

fn print_what_to_try(address: SocketAddr) {
    let curl = format!("curl -i -X POST http://{address}");
    println!(
        "\
Two caches at http://{address}
Try these lines in another terminal.

# A payment: 200. Its record lies in the default cache.
{curl}/payments -H 'Idempotency-Key: payment-1'

# The retry gets what the first one got: 409 with `idempotency-replayed: true`.
{curl}/payments -H 'Idempotency-Key: payment-1'

# A mail: 200. Its record lies in the cache `mails`.
{curl}/mails -H 'Idempotency-Key: mail-1'

# And its retry: 409.
{curl}/mails -H 'Idempotency-Key: mail-1'

# One record in each: 200.
curl -i http://{address}/caches

Ctrl-c stops. With the argument `misspelt` it does not even start."
    );
}
