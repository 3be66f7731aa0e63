//! What counts as the same request: a client that stamps every attempt, and links that carry where the click came from.
//!
//! Under `Config::ietf()` a key that comes back with another body is refused, because the client has mixed up two orders. Our
//! client sends `sent_at`, the time of the attempt, inside the body, so every honest retry would look like such a mix-up. Two
//! encoders cure it, one around the other:
//!
//! * `FingerprintKeyEncoder.fields(..)` compares what a function makes of the body: here JSON with sorted members and without
//!   `sent_at`. It leaves out **by name**, so a member that is added next year counts, and what is not JSON counts as it is.
//! * `WithoutCampaign` is an encoder of our own. It takes `?utm_…` off the query and leaves the hashing to the encoder inside,
//!   which knows how fields are kept apart.
//!
//! An encoder has to give the same result after the next deployment too: a change here makes new operations of all retries that
//! are under way.
//!
//! # Run
//!
//! ```console
//! $ cargo run -p idempotency-examples --example custom_encoder
//! $ curl -i http://127.0.0.1:3000/orders -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' -d '{"item":"lamp","amount":450,"sent_at":1}'
//! $ curl -i http://127.0.0.1:3000/orders -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' -d '{"sent_at":2,"amount":450,"item":"lamp"}'
//! $ curl -i http://127.0.0.1:3000/orders -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' -d '{"item":"lamp","amount":900,"sent_at":3}'
//! ```
//!
//! `PORT` chooses another port than 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    borrow::Cow,
    error::Error,
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
};

use axum::{Json, Router, http::StatusCode, routing::post};
use idempotency_axum::{
    Config, Encoded, FingerprintKeyEncoder, IdempotencyLayer, Key, KeyEncoder, MemoryStorage,
    RequestView, idempotency_key,
};
use serde::Deserialize;
use serde_json::Value;

/// What the handler reads of the body; it does not care for `sent_at` either.
#[derive(Deserialize)]
struct Order {
    item: String,
    /// In cents. An integer, because two numbers with fractions may be written differently and mean the same, or be so long that
    /// JSON parsers take them for the same.
    amount: u32,
}

#[idempotency_key]
async fn create_order(Json(order): Json<Order>) -> (StatusCode, String) {
    let Order { item, amount } = order;
    let number = order_number();
    (
        StatusCode::CREATED,
        format!("order {number}: {item} for {amount}\n"),
    )
}

/// The body as it is compared: the time of the attempt left out, members in order, no white space.
fn canonical(body: &[u8]) -> Cow<'_, [u8]> {
    let Ok(Value::Object(mut order)) = serde_json::from_slice(body) else {
        return Cow::Borrowed(body);
    };
    order.remove("sent_at");
    let mut order = Value::Object(order);
    // `serde_json` sorts by itself, unless some crate in the build has asked it not to.
    order.sort_all_objects();
    Cow::Owned(order.to_string().into_bytes())
}

/// An encoder to which the campaign that a click came from is not part of the operation.
struct WithoutCampaign<E>(E);

impl<E: KeyEncoder> KeyEncoder for WithoutCampaign<E> {
    fn encode(&self, key: &Key, request: &RequestView<'_>) -> Encoded {
        let (path, query) = match request.path_and_query.split_once('?') {
            Some((path, query)) => (path, query),
            None => (request.path_and_query, ""),
        };
        let counts = |pair: &&str| !pair.is_empty() && !pair.starts_with("utm_");
        let query: Vec<_> = query.split('&').filter(counts).collect();
        let view = RequestView {
            path_and_query: &format!("{path}?{}", query.join("&")),
            ..*request
        };
        self.0.encode(key, &view)
    }

    fn reads_body(&self) -> bool {
        self.0.reads_body()
    }
}

fn service() -> Router {
    let encoder = WithoutCampaign(FingerprintKeyEncoder.fields(canonical));
    let config = Config::ietf().encoder(encoder);
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
    Router::new()
        .route("/orders", post(create_order))
        .route_layer(layer)
}

async fn run() -> Result<(), Box<dyn Error>> {
    let listener = idempotency_examples::listen().await?;
    print_what_to_try(listener.local_addr()?);
    axum::serve(listener, service()).await?;
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
    let order = |query: &str, body: &str| {
        format!(
            "curl -i 'http://{address}/orders{query}' -H 'Idempotency-Key: order-1' -H 'Content-Type: application/json' -d '{body}'"
        )
    };
    println!(
        "\
Orders that are stamped at every attempt are taken at http://{address}
Try these lines in another terminal.

# The first attempt: 201, the order is made.
{first}

# The retry has another `sent_at`, and its members in another order: the same 201 with `idempotency-replayed: true`.
{retry}

# A retry from a link in a newsletter: the same 201 again.
{campaign}

# Another amount under the same key is another order, and a mistake: 422.
{other}

# A member that nobody has left out counts as well: 422.
{more}

# Another path or query that counts is another operation: 201, a second order.
{query}

Ctrl-c stops.",
        first = order("", r#"{"item":"lamp","amount":450,"sent_at":1}"#),
        retry = order("", r#"{"sent_at":2, "amount":450, "item":"lamp"}"#),
        campaign = order(
            "?utm_source=news",
            r#"{"item":"lamp","amount":450,"sent_at":3}"#
        ),
        other = order("", r#"{"item":"lamp","amount":900,"sent_at":4}"#),
        more = order("", r#"{"item":"lamp","amount":450,"gift":true}"#),
        query = order("?shop=2", r#"{"item":"lamp","amount":450,"sent_at":5}"#),
    );
}
