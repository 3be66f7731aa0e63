//! A shop with a table of its own, as a process for [`idempotency_tests::kills`]: `POST /orders` inserts a row and answers it.
//! It prints what happens, and a request that asks for it stops at a [`Phase`], until the process is killed.

#![allow(
    clippy::disallowed_methods,
    reason = "the harness is outside of what `Env` drives"
)]

use std::{
    collections::HashSet,
    convert::Infallible,
    env,
    error::Error,
    future::pending,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::{FromRequestParts, Request, State},
    http::{Method, StatusCode, request::Parts},
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{MethodRouter, post},
};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http_body_util::BodyExt as _;
use idempotency_axum::{
    AnyStorage, Config, EncodedKey, Event, IdempotencyKey, IdempotencyLayer, IdempotentTransaction,
    LockPolicy, PostgresStorage, SqliteStorage, idempotency_key,
    sqlx::{
        self, Postgres, Sqlite,
        postgres::{PgPool, PgPoolOptions},
        sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqliteSynchronous},
    },
};
use idempotency_tests::{
    PATIENCE,
    kills::{self, NewOrder, Order, Phase},
};
use tokio::net::TcpListener;

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let (storage, orders) = open().await?;
    let commits = Commits::default();
    let observed = commits.clone();
    let mut lock = LockPolicy::default().timeout(PATIENCE);
    if let Ok(lease) = env::var("LEASE_MS") {
        lock = lock.ttl(Duration::from_millis(lease.parse()?));
    }
    let config = Config::default()
        .lock(lock)
        .storage_timeout(PATIENCE)
        .observer(move |event: &Event<'_>| observed.on_event(event));
    let layer = IdempotencyLayer::enforce(storage).config(config);

    let orders_route: MethodRouter<Shop> = match (env::var("EXACTLY_ONCE").is_ok(), &orders) {
        (false, _) => post(create_order),
        (true, Orders::Postgres(_)) => post(create_order_once_in_postgres),
        (true, Orders::Sqlite(_)) => post(create_order_once_in_sqlite),
    };
    let app = Router::new()
        .route(
            "/orders",
            orders_route.layer(from_fn_with_state(commits, around_the_handler)),
        )
        .layer(layer.clone())
        .layer(from_fn(around_the_layer))
        .with_state(Shop { orders });
    let app = layer.check(app)?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("listens {}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}

#[derive(Clone)]
struct Shop {
    orders: Orders,
}

/// Commits the order before its record: a shop that dies in between makes two.
#[idempotency_key]
async fn create_order(
    State(shop): State<Shop>,
    Extension(stop): Extension<Stop>,
    Json(new): Json<NewOrder>,
) -> Result<(StatusCode, Json<Order>), Failed> {
    let order = shop.orders.insert(&new).await?;
    stop.at(Phase::InHandler).await;
    Ok((StatusCode::CREATED, Json(order)))
}

/// Commits the order with its record.
#[idempotency_key]
async fn create_order_once_in_postgres(
    mut tx: IdempotentTransaction<Postgres>,
    Extension(stop): Extension<Stop>,
    Json(new): Json<NewOrder>,
) -> Result<(StatusCode, Json<Order>), Failed> {
    let query = sqlx::query_as(INSERT).bind(&new.item).bind(&new.note);
    let (id, item) = query.fetch_one(&mut *tx).await?;
    stop.at(Phase::InHandler).await;
    Ok((StatusCode::CREATED, Json(Order { id, item })))
}

/// The same in the other database.
#[idempotency_key]
async fn create_order_once_in_sqlite(
    mut tx: IdempotentTransaction<Sqlite>,
    Extension(stop): Extension<Stop>,
    Json(new): Json<NewOrder>,
) -> Result<(StatusCode, Json<Order>), Failed> {
    let query = sqlx::query_as(INSERT).bind(&new.item).bind(&new.note);
    let (id, item) = query.fetch_one(&mut *tx).await?;
    stop.at(Phase::InHandler).await;
    Ok((StatusCode::CREATED, Json(Order { id, item })))
}

const INSERT: &str = "INSERT INTO orders (item, note) VALUES ($1, $2) RETURNING id, item";

/// The table of the shop.
#[derive(Clone)]
enum Orders {
    Postgres(PgPool),
    Sqlite(SqlitePool),
}

impl Orders {
    async fn insert(&self, new: &NewOrder) -> sqlx::Result<Order> {
        let (id, item) = match self {
            Self::Postgres(pool) => {
                let query = sqlx::query_as(INSERT).bind(&new.item).bind(&new.note);
                query.fetch_one(pool).await?
            }
            Self::Sqlite(pool) => {
                let query = sqlx::query_as(INSERT).bind(&new.item).bind(&new.note);
                query.fetch_one(pool).await?
            }
        };
        Ok(Order { id, item })
    }
}

/// The storage and the shop's own connections to the same database, at `POSTGRES_URL` or `SQLITE_URL`. A busy machine is no fault
/// of it, so its time limit is long.
async fn open() -> Result<(AnyStorage, Orders), Box<dyn Error>> {
    if let Ok(url) = env::var("POSTGRES_URL") {
        let storage = PostgresStorage::connect(&url).time_limit(PATIENCE).await?;
        storage.migrate().await?;
        let pool = PgPoolOptions::new().acquire_timeout(PATIENCE);
        let orders = Orders::Postgres(pool.connect_lazy(&url)?);
        return Ok((AnyStorage::new(storage), orders));
    }
    let options: SqliteConnectOptions = env::var("SQLITE_URL")?.parse()?;
    let options = options
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(PATIENCE);
    let pool = SqlitePool::connect_lazy_with(options);
    let storage = SqliteStorage::new(pool.clone()).time_limit(PATIENCE);
    storage.migrate().await?;
    Ok((AnyStorage::new(storage), Orders::Sqlite(pool)))
}

struct Failed(sqlx::Error);

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        eprintln!("an order failed: {}", self.0);
        StatusCode::INTERNAL_SERVER_ERROR.into_response()
    }
}

/// Where a request stops, and what it is called.
#[derive(Clone)]
struct Stop {
    key: Arc<str>,
    phase: Option<Phase>,
}

impl Stop {
    fn of(parts: &Parts) -> Self {
        let header = |name| parts.headers.get(name)?.to_str().ok();
        Self {
            key: header("idempotency-key").unwrap_or_default().into(),
            phase: header(kills::STOP_AT).and_then(Phase::named),
        }
    }

    fn is_at(&self, phase: Phase) -> bool {
        self.phase == Some(phase)
    }

    fn mark(&self, phase: Phase) {
        println!("at {} {}", phase.name(), self.key);
    }

    /// If this is where it stops, this never returns.
    async fn at(&self, phase: Phase) {
        if self.is_at(phase) {
            self.mark(phase);
            pending::<()>().await;
        }
    }
}

/// Outside of our layer.
async fn around_the_layer(request: Request, next: Next) -> Response {
    let (mut parts, body) = request.into_parts();
    if parts.method != Method::POST {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    let stop = Stop::of(&parts);
    stop.at(Phase::BeforeClaim).await;
    parts.extensions.insert(stop.clone());
    let response = next.run(Request::from_parts(parts, body)).await;
    if !stop.is_at(Phase::Answering) {
        return response;
    }
    // One half of the answer leaves.
    let (head, body) = response.into_parts();
    let Ok(body) = body.collect().await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let body = body.to_bytes();
    let half = body.slice(..body.len() / 2);
    let rest = async move {
        stop.at(Phase::Answering).await;
        Ok::<Bytes, Infallible>(Bytes::new())
    };
    let halves = stream::iter([Ok(half)]).chain(stream::once(rest));
    Response::from_parts(head, Body::from_stream(halves))
}

/// Between our layer and the handler.
async fn around_the_handler(
    State(commits): State<Commits>,
    request: Request,
    next: Next,
) -> Response {
    let (mut parts, body) = request.into_parts();
    let key = IdempotencyKey::from_request_parts(&mut parts, &()).await;
    let (Ok(key), Some(stop)) = (key, parts.extensions.get::<Stop>().cloned()) else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    let (item, encoded) = (key.as_str().to_owned(), key.encoded());
    if stop.is_at(Phase::AfterCommit) {
        commits.stop_after(encoded);
    }
    println!("ran {item} {encoded} {}", kills::now());
    let response = next.run(Request::from_parts(parts, body)).await;
    stop.at(Phase::BeforeCommit).await;
    println!("ended {item} {encoded} {}", kills::now());
    response
}

/// The keys after whose commit the process stops.
#[derive(Clone, Default)]
struct Commits(Arc<Mutex<HashSet<EncodedKey>>>);

impl Commits {
    fn stop_after(&self, key: EncodedKey) {
        let mut keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        keys.insert(key);
    }

    fn on_event(&self, event: &Event<'_>) {
        let (Event::Completed { key, .. }, now) = (event, kills::now()) else {
            println!("event {}", event.name());
            return;
        };
        println!("completed {key} {now}");
        let keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.contains(key) {
            println!("at {} {key}", Phase::AfterCommit.name());
            drop(keys);
            // An observer can't wait, so its thread does.
            loop {
                thread::park();
            }
        }
    }
}
