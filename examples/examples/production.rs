//! All that a service needs in production: a preset, a scope from authentication, records in Redis, an observer, and a shutdown that
//! loses nothing.
//!
//! ```console
//! $ cargo run -p idempotency-examples --example production
//! ```
//!
//! It prints the `curl` lines to try. `REDIS_URL` says where Redis is (default: `redis://127.0.0.1:6379`); `PORT` chooses another port
//! than 3000, `PORT=0` any free one; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    env,
    error::Error,
    net::SocketAddr,
    process::ExitCode,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use axum::{
    Router,
    extract::Request,
    http::{StatusCode, header},
    middleware::{self, Next},
    response::Response,
    routing::post,
};
use idempotency_axum::{Config, Event, IdempotencyLayer, RedisStorage, Scope, idempotency_key};
use tokio::signal::unix::{SignalKind, signal};

/// Who calls, as authentication found out.
#[derive(Clone)]
struct UserId(u64);

/// Stands outside the layer, since a replay does not authenticate.
async fn authenticate(mut request: Request, next: Next) -> Result<Response, StatusCode> {
    let authorization = request.headers().get(header::AUTHORIZATION);
    // In place of a look into the table of tokens: `Bearer 42-anything` is a token of user 42.
    let token = authorization
        .and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "))
        .and_then(|token| token.split('-').next()?.parse().ok());
    let user = UserId(token.ok_or(StatusCode::UNAUTHORIZED)?);
    request.extensions_mut().insert(user);
    Ok(next.run(request).await)
}

static ORDERS: AtomicU32 = AtomicU32::new(1);

#[idempotency_key]
async fn create_order() -> (StatusCode, String) {
    println!("an order begins");
    // The payment takes its time, also while the service shuts down.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let order = ORDERS.fetch_add(1, Ordering::Relaxed);
    (StatusCode::CREATED, format!("order {order}\n"))
}

/// In place of your metrics. The log is written anyway.
static REPLAYS: AtomicU64 = AtomicU64::new(0);

fn count(event: &Event<'_>) {
    if matches!(event, Event::Replayed { .. }) {
        REPLAYS.fetch_add(1, Ordering::Relaxed);
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let location = env::var("REDIS_URL").unwrap_or_else(|_| "redis://127.0.0.1:6379".to_owned());
    let storage = RedisStorage::connect(location)
        // Another one for each service that shares the Redis.
        .prefix("shop")
        .require_noeviction()
        .await?;
    // The user and not the token: a retry may come with a fresh one.
    let scope = Scope::from_fn(|parts| {
        let UserId(user) = parts.extensions.get()?;
        Some(user.to_be_bytes().to_vec())
    });
    let config = Config::ietf().scope(scope).observer(count);
    let layer = IdempotencyLayer::enforce(storage).config(config);
    let router = Router::new()
        .route("/orders", post(create_order))
        .layer(layer.clone())
        .layer(middleware::from_fn(authenticate));
    let router = layer.check(router)?;

    let listener = idempotency_examples::listen().await?;
    print_what_to_try(listener.local_addr()?);
    let mut terminate = signal(SignalKind::terminate())?;
    axum::serve(listener, router)
        .with_graceful_shutdown(async move {
            let _ = terminate.recv().await;
        })
        .await?;
    // Orders of clients that have left may still run, and answers may still have to be stored.
    if tokio::time::timeout(Duration::from_secs(30), layer.drain())
        .await
        .is_err()
    {
        eprintln!("some operations did not end; their keys are free once their leases are over");
    }
    println!("{} replays", REPLAYS.load(Ordering::Relaxed));
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
    let curl = format!("curl -i -X POST http://{address}/orders");
    println!(
        "\
An order service as it runs in production, at http://{address}
Try these lines in another terminal.

# The first order: 201.
{curl} -H 'Authorization: Bearer 42-monday' -H 'Idempotency-Key: order-1'

# The retry comes with another token of the same user: 201 and the same order, with `idempotency-replayed: true`.
{curl} -H 'Authorization: Bearer 42-tuesday' -H 'Idempotency-Key: order-1'

# Without a key: 400.
{curl} -H 'Authorization: Bearer 42-tuesday'

# A replay does not authenticate, so authentication stands before it: 401.
{curl} -H 'Idempotency-Key: order-1'

Ctrl-c stops."
    );
}
