//! Handlers that answer a conflict themselves: what `@idempotency_key_manual` is in django-idempotency-key.
//!
//! A handler with a [`ManualIdempotency`] parameter runs on a retry too. [`ManualIdempotency::exists`] tells it that the operation
//! ran before and [`ManualIdempotency::response`] what it answered, so **it** has to see to it that nothing is done twice. Three
//! kinds of such handlers are here:
//!
//! * `create_order` answers a retry with the stored body, but with 200 and a header of its own.
//! * `submit_form` sends a browser that submits its form again to the page of what it has made. 303 is not stored by default, so
//!   the record stays what it was.
//! * `report_progress` answers with something new each time. An answer whose status is stored **replaces** the record and
//!   restarts its TTL, so `response` is that of the last call. The conflict runs of one key come one after another: none of them
//!   misses what the one before has stored.
//!
//! A tombstone (the operation ran, but left no answer) is `exists()` without a `response()`: no handler may take that for a first
//! call.
//!
//! # Run
//!
//! ```console
//! $ cargo run -p idempotency-examples --example manual
//! $ curl -i -X POST http://127.0.0.1:3000/orders -H 'Idempotency-Key: order-1'
//! $ curl -i -X POST http://127.0.0.1:3000/forms -H 'Idempotency-Key: form-1'
//! $ curl -i -X POST http://127.0.0.1:3000/progress -H 'Idempotency-Key: upload-1'
//! ```
//!
//! `PORT` chooses another port than 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    error::Error,
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use axum::{
    Router,
    http::{StatusCode, header::LOCATION},
    response::{IntoResponse, Response},
    routing::post,
};
use idempotency_axum::{
    Config, IdempotencyLayer, LockPolicy, ManualIdempotency, MemoryStorage, ReplayedResponse,
    idempotency_key,
};

/// 201 for the order, and 200 for every retry.
#[idempotency_key]
async fn create_order(manual: ManualIdempotency) -> Response {
    match before(&manual) {
        Before::Nothing => {
            let number = order_number();
            let location = format!("/orders/{number}");
            let body = format!("order {number}\n");
            (StatusCode::CREATED, [(LOCATION, location)], body).into_response()
        }
        Before::Answered(last) => {
            let again = [("x-ordered-before", "true")];
            (again, last.with_status(StatusCode::OK)).into_response()
        }
        Before::Unknown => unknown(),
    }
}

/// 201 for the form, and a redirect for every retry.
#[idempotency_key]
async fn submit_form(manual: ManualIdempotency) -> Response {
    match before(&manual) {
        Before::Nothing => {
            let number = order_number();
            let location = format!("/orders/{number}");
            let body = format!("thank you for order {number}\n");
            (StatusCode::CREATED, [(LOCATION, location)], body).into_response()
        }
        Before::Answered(last) => match last.headers().remove(LOCATION) {
            Some(location) => (StatusCode::SEE_OTHER, [(LOCATION, location)]).into_response(),
            None => unknown(),
        },
        Before::Unknown => unknown(),
    }
}

/// Counts its calls, with no other memory than the stored answer.
#[idempotency_key]
async fn report_progress(manual: ManualIdempotency) -> Response {
    let calls = match before(&manual) {
        Before::Nothing => 0,
        Before::Answered(last) => match calls_in(&last) {
            Some(calls) => calls,
            None => return unknown(),
        },
        Before::Unknown => return unknown(),
    };
    format!("call {}\n", calls + 1).into_response()
}

fn calls_in(last: &ReplayedResponse) -> Option<u32> {
    let text = std::str::from_utf8(last.body()).ok()?;
    text.trim_end().strip_prefix("call ")?.parse().ok()
}

/// What a manual handler has to tell apart.
enum Before {
    /// This is the first call.
    Nothing,
    /// It ran, and this was its last answer.
    Answered(ReplayedResponse),
    /// It ran, and left a tombstone.
    Unknown,
}

fn before(manual: &ManualIdempotency) -> Before {
    match (manual.exists(), manual.response()) {
        (false, _) => Before::Nothing,
        (true, Some(last)) => Before::Answered(last),
        (true, None) => Before::Unknown,
    }
}

fn unknown() -> Response {
    let text = "this ran before, but how it ended is not known\n";
    (StatusCode::CONFLICT, text).into_response()
}

async fn run() -> Result<(), Box<dyn Error>> {
    // How long a conflict run waits for the one before it, before it is told to try again.
    let lock = LockPolicy::default().timeout(Duration::from_secs(10));
    let layer =
        IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::default().lock(lock));
    let router = Router::new()
        .route("/orders", post(create_order))
        .route("/forms", post(submit_form))
        .route("/progress", post(report_progress))
        .route_layer(layer);

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

fn order_number() -> u32 {
    static ORDERS: AtomicU32 = AtomicU32::new(1);
    ORDERS.fetch_add(1, Ordering::Relaxed)
}

fn print_what_to_try(address: SocketAddr) {
    let curl = format!("curl -i -X POST http://{address}");
    println!(
        "\
Handlers that answer conflicts themselves are at http://{address}
Try these lines in another terminal.

# An order: 201.
{curl}/orders -H 'Idempotency-Key: order-1'

# The retry runs the handler, which answers with the stored body and `x-ordered-before: true`: 200.
{curl}/orders -H 'Idempotency-Key: order-1'

# A form: 201.
{curl}/forms -H 'Idempotency-Key: form-1'

# Submitted again, the browser is sent to what it has made: 303.
{curl}/forms -H 'Idempotency-Key: form-1'

# An answer that depends on the one before. The first call: 200.
{curl}/progress -H 'Idempotency-Key: upload-1'

# Each retry replaces the record, so this is call 2, and call 3 when you send it again: 200.
{curl}/progress -H 'Idempotency-Key: upload-1'

Ctrl-c stops."
    );
}
