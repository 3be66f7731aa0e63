//! An answer that streams: the first client gets it row by row, a retry gets all of it at once, byte for byte.
//!
//! An export makes a row at a time, as NDJSON. While its first client reads, the layer records what goes by, at the pace of the
//! handler and not of the client. When the last row is stored, the client sees the end. A client that leaves in the middle stops
//! nothing: the export goes on and is recorded, and the retry gets it whole, from a handler that did not run again.
//!
//! What can't be recorded leaves a *tombstone*: an answer over `Config::max_response_body` (1 MiB by default), a stream that
//! breaks off, an event stream. The first client still gets everything there was; a retry gets 409 and is never run again. Here
//! `/exports/100` goes over a limit of 1 KiB.
//!
//! # Run
//!
//! ```console
//! $ cargo run -p idempotency-examples --example streaming
//! $ curl -iN -X POST http://127.0.0.1:3000/exports/5 -H 'Idempotency-Key: export-1'
//! $ curl -iN -X POST http://127.0.0.1:3000/exports/100 -H 'Idempotency-Key: export-2'
//! ```
//!
//! `PORT` chooses another port than 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    convert::Infallible,
    error::Error,
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use axum::{
    Router, body::Body, extract::Path, http::header::CONTENT_TYPE, response::IntoResponse,
    routing::post,
};
use futures_util::stream;
use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage, idempotency_key};

/// How long a row takes: long enough to see them come.
const WORK: Duration = Duration::from_millis(100);

/// Enough for `/exports/5`, too little for `/exports/100`.
const LIMIT: usize = 1024;

#[idempotency_key]
async fn export(Path(rows): Path<u8>) -> impl IntoResponse {
    let rows = u32::from(rows);
    let run = run_number();
    let rows = stream::unfold(1, move |row| async move {
        if row > rows {
            return None;
        }
        tokio::time::sleep(WORK.min(Duration::from_secs(1) / rows)).await;
        let line = format!("{{\"row\":{row},\"run\":{run}}}\n");
        Some((Ok::<_, Infallible>(line), row + 1))
    });
    let content_type = [(CONTENT_TYPE, "application/x-ndjson")];
    (content_type, Body::from_stream(rows))
}

async fn run() -> Result<(), Box<dyn Error>> {
    let config = Config::ietf().max_response_body(LIMIT);
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
    let router = Router::new()
        .route("/exports/{rows}", post(export))
        .route_layer(layer.clone());

    let listener = idempotency_examples::listen().await?;
    print_what_to_try(listener.local_addr()?);
    axum::serve(listener, router)
        .with_graceful_shutdown(async {
            // Without a signal handler there is nothing to wait for; the process then ends the hard way.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
        })
        .await?;
    // Exports whose client has left are still being made and recorded: nobody waits for them but us.
    layer.drain().await;
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
    let curl = format!("curl -iN -X POST http://{address}");
    println!(
        "\
Exports stream at http://{address}
Try these lines in another terminal.

# Five rows, one after another: 200.
{curl}/exports/5 -H 'Idempotency-Key: export-1'

# The retry gets the same bytes at once: 200 with `idempotency-replayed: true`.
{curl}/exports/5 -H 'Idempotency-Key: export-1'

# More than this service records: 200, all the rows.
{curl}/exports/100 -H 'Idempotency-Key: export-2'

# So the retry is told that they can't be given again: 409.
{curl}/exports/100 -H 'Idempotency-Key: export-2'

Ctrl-c stops."
    );
}
