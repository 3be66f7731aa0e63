//! A payment provider that charges once, though our handler runs twice.
//!
//! Our layer protects what happens here. It can't protect a charge at somebody else's: the provider charges, then our database is
//! down, or our process dies before the answer is recorded. The retry runs the handler again, and rightly so, because nothing of
//! the first attempt is left here. Were it to charge again, the customer would pay twice.
//!
//! So the handler passes on a key of its own: [`IdempotencyKey::derive`] makes one from the client's. It is the same in every
//! attempt, in every process and after every deployment, and another one for each customer and each label. The provider takes it
//! as *its* idempotency key, and answers the second charge with the first.
//!
//! What it is made from is what the encoder takes for the operation, here also the body. A body that differs between attempts
//! (a timestamp) would derive another key and charge twice: see the example `custom_encoder`.
//!
//! The provider is a fake in this process, on a port of its own. It uses this library as well, with `Config::stripe()`.
//!
//! # Run
//!
//! ```console
//! $ cargo run -p idempotency-examples --example downstream
//! $ curl -i http://127.0.0.1:3000/payments -H 'Idempotency-Key: payment-1' -d '450'
//! $ curl -i http://127.0.0.1:3000/payments -H 'Idempotency-Key: payment-1' -d '450'
//! $ curl -i http://127.0.0.1:3000/charges
//! ```
//!
//! `PORT` chooses another port than 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    error::Error,
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{Request, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use http_body_util::BodyExt;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use idempotency_axum::{Config, IdempotencyKey, IdempotencyLayer, MemoryStorage, idempotency_key};
use tokio::net::TcpListener;

// ---- our service

/// Charges, then books: the order in which it can go wrong.
#[idempotency_key]
async fn create_payment(
    key: IdempotencyKey,
    State(shop): State<Shop>,
    amount: String,
) -> Result<String, PaymentError> {
    // A label for each kind of call, so that a refund of this payment would not be taken for its charge.
    let charge = shop
        .provider
        .charge(&key.derive("psp-charge"), amount)
        .await?;
    shop.ledger.book(&charge)?;
    Ok(format!("paid with {charge}\n"))
}

#[derive(Clone)]
struct Shop {
    provider: Provider,
    ledger: Arc<Ledger>,
}

/// Our database. It is down when the first payment is booked.
#[derive(Default)]
struct Ledger {
    was_down: AtomicBool,
}

impl Ledger {
    fn book(&self, _charge: &str) -> Result<(), PaymentError> {
        match self.was_down.swap(true, Ordering::Relaxed) {
            true => Ok(()),
            false => Err(PaymentError::LedgerDown),
        }
    }
}

/// Each is a 5xx, which is not recorded: the retry runs the handler again.
enum PaymentError {
    ProviderFailed,
    LedgerDown,
}

impl IntoResponse for PaymentError {
    fn into_response(self) -> Response {
        match self {
            Self::ProviderFailed => (StatusCode::BAD_GATEWAY, "the provider did not answer\n"),
            Self::LedgerDown => (StatusCode::INTERNAL_SERVER_ERROR, "charged, not booked\n"),
        }
        .into_response()
    }
}

// ---- the call to the provider

#[derive(Clone)]
struct Provider {
    address: SocketAddr,
    client: Client<HttpConnector, Body>,
}

impl Provider {
    fn at(address: SocketAddr) -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { address, client }
    }

    async fn charge(&self, key: &str, amount: String) -> Result<String, PaymentError> {
        let request = Request::post(format!("http://{}/charges", self.address))
            .header("idempotency-key", key)
            .body(Body::from(amount))
            .map_err(|_| PaymentError::ProviderFailed)?;
        let answer = self.client.request(request).await;
        let answer = answer.map_err(|_| PaymentError::ProviderFailed)?;
        if answer.status() != StatusCode::CREATED {
            return Err(PaymentError::ProviderFailed);
        }
        let charge = answer.into_body().collect().await;
        let charge = charge.map_err(|_| PaymentError::ProviderFailed)?.to_bytes();
        Ok(String::from_utf8_lossy(&charge).into_owned())
    }
}

// ---- the fake provider

/// The charges that were made: key and amount.
type Charges = Arc<Mutex<Vec<String>>>;

#[idempotency_key]
async fn create_charge(
    key: IdempotencyKey,
    State(charges): State<Charges>,
    amount: String,
) -> (StatusCode, String) {
    let mut charges = lock(&charges);
    // A real provider would not show the key; here it proves that both attempts had the same.
    charges.push(format!("{amount} under key {}\n", key.as_str()));
    (StatusCode::CREATED, format!("charge {}", charges.len()))
}

async fn list_charges(State(charges): State<Charges>) -> String {
    lock(&charges).concat()
}

fn fake_provider(charges: Charges) -> Router {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::stripe());
    Router::new()
        .route("/charges", post(create_charge))
        .route_layer(layer)
        .with_state(charges)
}

/// Every change is one push, so what a panic leaves is whole.
fn lock(charges: &Charges) -> MutexGuard<'_, Vec<String>> {
    charges.lock().unwrap_or_else(PoisonError::into_inner)
}

// ---- both of them

fn service(provider: Provider, charges: Charges) -> Router {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::ietf());
    let shop = Shop {
        provider,
        ledger: Arc::default(),
    };
    Router::new()
        .route("/payments", post(create_payment))
        .with_state(shop)
        // What a look at the provider's own page would show.
        .route("/charges", get(list_charges).with_state(charges))
        .route_layer(layer)
}

async fn run() -> Result<(), Box<dyn Error>> {
    let charges = Charges::default();
    let downstream = TcpListener::bind("127.0.0.1:0").await?;
    let provider = Provider::at(downstream.local_addr()?);
    let listener = idempotency_examples::listen().await?;
    print_what_to_try(listener.local_addr()?);
    tokio::try_join!(
        async { axum::serve(downstream, fake_provider(charges.clone())).await },
        async { axum::serve(listener, service(provider, charges.clone())).await },
    )?;
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
    let payment = |key: &str| {
        format!("curl -i http://{address}/payments -H 'Idempotency-Key: {key}' -d '450'")
    };
    println!(
        "\
Payments are taken at http://{address}
Try these lines in another terminal.

# The provider charges, then our database is down: 500. Nothing is recorded here.
{first}

# The retry runs our handler again, and gets the charge that was made already: 200.
{first}

# From now on it is recorded: the same 200 with `idempotency-replayed: true`, and nobody is asked.
{first}

# One charge was made: 200.
curl -i http://{address}/charges

# Another payment is another charge: 200.
{second}

# Two charges, each under a key of its own: 200.
curl -i http://{address}/charges

Ctrl-c stops.",
        first = payment("payment-1"),
        second = payment("payment-2"),
    );
}
