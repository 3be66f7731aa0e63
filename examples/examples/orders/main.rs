//! An order service on which a retry never orders twice.
//!
//! `cargo run -p idempotency-examples --example orders`, then open the page that it prints and press *Pay*, or try its `curl`
//! lines. `PORT` chooses another port than 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.
//!
//! This file is all that a service needs; `window.rs` and `page.html` only let a person look inside.

mod window;

use std::{
    error::Error,
    net::SocketAddr,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Extension, Json, Router,
    extract::{Path, Request, State},
    http::{
        StatusCode,
        header::{AUTHORIZATION, LOCATION, WWW_AUTHENTICATE},
        request::Parts,
    },
    middleware::{Next, from_fn},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use idempotency_axum::{
    Config, IdempotencyLayer, LockPolicy, MemoryStorage, Misuse, Scope, idempotency_exempt,
    idempotency_key,
};
use serde::{Deserialize, Serialize};

/// How long an order takes: long enough for its duplicates to come while it is being made.
const WORK: Duration = Duration::from_millis(400);

// ---- handlers

/// Runs once per key, so a client may send it as often as it takes to get an answer.
#[idempotency_key]
async fn create_order(
    State(orders): State<Orders>,
    Extension(customer): Extension<Customer>,
    Json(item): Json<Item>,
) -> impl IntoResponse {
    tokio::time::sleep(WORK).await;
    let order = orders.add(customer, item);
    let location = format!("/orders/{}", order.id);
    (StatusCode::CREATED, [(LOCATION, location)], Json(order))
}

/// Changes nothing, so it needs no key; without the attribute a POST would.
#[idempotency_exempt]
async fn quote(Json(item): Json<Item>) -> Json<Quote> {
    Json(Quote {
        total: item.amount.saturating_add(SHIPPING),
    })
}

// A GET never needs a key, nor an attribute.
async fn list_orders(
    State(orders): State<Orders>,
    Extension(customer): Extension<Customer>,
) -> Json<Vec<Order>> {
    Json(orders.of(customer))
}

async fn show_order(
    State(orders): State<Orders>,
    Extension(customer): Extension<Customer>,
    Path(id): Path<usize>,
) -> Result<Json<Order>, StatusCode> {
    let mut orders = orders.of(customer).into_iter();
    let order = orders.find(|order| order.id == id);
    order.map(Json).ok_or(StatusCode::NOT_FOUND)
}

// ---- the service

fn service(orders: Orders) -> Result<(Router, IdempotencyLayer), Misuse> {
    let config = Config::ietf()
        // The same key of two customers is two orders. Who calls is what `authenticate` found out, not the token itself: a
        // customer who retries with a refreshed token is still the same.
        .scope(Scope::from_fn(customer_id).required())
        // Longer than an order takes, so a duplicate gets the answer and not "in flight, try again".
        .lock(LockPolicy::default().timeout(Duration::from_secs(10)))
        .observer(window::observe);
    // Records in memory are gone with the process: fine for one process and a demonstration.
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);

    let router = Router::new()
        .route("/orders", get(list_orders).post(create_order))
        .route("/orders/{id}", get(show_order))
        .route("/quotes", post(quote))
        .with_state(orders)
        .route_layer(layer.clone())
        .merge(window::records(layer.engine()))
        // Below the line above, so outside of the idempotency layer: a replay does not authenticate, so a stranger must be
        // stopped before he is shown a customer's answer.
        .route_layer(from_fn(authenticate))
        .route_layer(from_fn(window::tell))
        .merge(window::page());

    // A policy that can't be kept is an error now, not for the first customer.
    let router = layer.check(router)?;
    Ok((router, layer))
}

async fn run() -> Result<(), Box<dyn Error>> {
    let orders = Orders::default();
    let (service, layer) = service(orders.clone())?;
    let listener = idempotency_examples::listen().await?;
    print_what_to_try(listener.local_addr()?);

    axum::serve(listener, service)
        .with_graceful_shutdown(async {
            // Without a signal handler there is nothing to wait for; the process then ends the hard way.
            if tokio::signal::ctrl_c().await.is_err() {
                std::future::pending::<()>().await;
            }
        })
        .await?;
    // Orders whose client has left are still being made: nobody waits for them but us.
    layer.drain().await;
    println!("Stopped. Orders made: {}", orders.all().len());
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

// ---- who calls

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Customer {
    Alice,
    Bob,
}

/// Two fixed tokens stand in for what your service does to know its callers.
async fn authenticate(mut request: Request, next: Next) -> Response {
    let token = request.headers().get(AUTHORIZATION);
    let customer = match token.map(|token| token.as_bytes()) {
        Some(b"Bearer alice-token") => Customer::Alice,
        Some(b"Bearer bob-token") => Customer::Bob,
        _ => return (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")]).into_response(),
    };
    request.extensions_mut().insert(customer);
    next.run(request).await
}

/// The scope of a request's key.
fn customer_id(request: &Parts) -> Option<Vec<u8>> {
    let id = match request.extensions.get()? {
        Customer::Alice => "alice",
        Customer::Bob => "bob",
    };
    Some(id.into())
}

// ---- what is ordered

/// In cents.
const SHIPPING: u32 = 250;

#[derive(Clone, Deserialize, Serialize)]
struct Item {
    item: String,
    /// In cents.
    amount: u32,
}

#[derive(Clone, Serialize)]
struct Order {
    id: usize,
    customer: Customer,
    #[serde(flatten)]
    item: Item,
}

#[derive(Serialize)]
struct Quote {
    total: u32,
}

/// In place of a database.
#[derive(Clone, Default)]
struct Orders(Arc<Mutex<Vec<Order>>>);

impl Orders {
    fn add(&self, customer: Customer, item: Item) -> Order {
        let mut orders = self.all();
        let order = Order {
            id: orders.len() + 1,
            customer,
            item,
        };
        orders.push(order.clone());
        order
    }

    fn of(&self, customer: Customer) -> Vec<Order> {
        let orders = self.all();
        let own = orders.iter().filter(|order| order.customer == customer);
        own.cloned().collect()
    }

    // Every change is one push, so what a panic leaves is whole.
    fn all(&self) -> MutexGuard<'_, Vec<Order>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// ---- the lines to try

fn print_what_to_try(address: SocketAddr) {
    let curl = format!("curl -i http://{address}");
    let alice = "-H 'Authorization: Bearer alice-token'";
    let json = "-H 'Content-Type: application/json'";
    println!(
        "\
Orders are taken at http://{address}
Open it in a browser and press Pay, or try these lines in another terminal.

# The first request: 201, the order is made.
{curl}/orders {alice} -H 'Idempotency-Key: order-1' {json} -d '{{\"item\":\"coffee\",\"amount\":450}}'

# The retry, which is the same line again: the same 201 with `idempotency-replayed: true`, and no second order.
{curl}/orders {alice} -H 'Idempotency-Key: order-1' {json} -d '{{\"item\":\"coffee\",\"amount\":450}}'

# The same key for another order: 422.
{curl}/orders {alice} -H 'Idempotency-Key: order-1' {json} -d '{{\"item\":\"coffee\",\"amount\":900}}'

# No key: 400.
{curl}/orders {alice} {json} -d '{{\"item\":\"coffee\",\"amount\":450}}'

# A quote is exempt, so it needs no key: 200.
{curl}/quotes {alice} {json} -d '{{\"item\":\"coffee\",\"amount\":450}}'

# The orders: one.
{curl}/orders {alice}

Ctrl-c stops."
    );
}
