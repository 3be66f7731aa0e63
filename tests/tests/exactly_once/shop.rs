//! A database with a table of orders, and services in front of it.

use std::time::Duration;

use axum::{
    Router,
    body::{Body, to_bytes},
    handler::Handler,
    http::{Request, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use idempotency_axum::{
    Config, Engine, IdempotencyHandler, IdempotencyLayer, IdempotentTransaction, KeyPolicy,
    LockPolicy, PostgresStorage, SqliteStorage, Storage, TransactionDatabase,
    sqlx::{
        self, PgConnection, PgPool, Postgres, Sqlite, SqliteConnection,
        postgres::{PgConnectOptions, PgPoolOptions},
    },
};
use idempotency_tests::{Answer, Events, PATIENCE, postgres, sqlite::SqliteFile};
use tokio::task::JoinHandle;
use tower::ServiceExt;
use tower_http::catch_panic::CatchPanicLayer;

pub(crate) type Tx<D> = IdempotentTransaction<D>;

pub(crate) const CREATED: StatusCode = StatusCode::CREATED;

/// A database whose transactions handlers take.
pub(crate) trait Database: TransactionDatabase<Connection: Send> {
    type Server;
    type Storage: Storage + Clone;

    /// A new server with a table of orders, and a storage on it.
    fn start() -> impl Future<Output = Shop<Self>>
    where
        Self: Sized;

    /// A storage whose transactions may be open for `limit`.
    fn max_transaction(storage: &Self::Storage, limit: Duration) -> Self::Storage;

    /// Inserts an order, and returns its number.
    fn order(
        connection: &mut Self::Connection,
        note: &str,
    ) -> impl Future<Output = Result<i64, sqlx::Error>> + Send;

    /// Sends statements as they are.
    fn execute(
        connection: &mut Self::Connection,
        statements: &str,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// The number that a query returns, over another connection.
    fn number(server: &Self::Server, query: &str) -> impl Future<Output = i64>;
}

impl Database for Postgres {
    type Server = postgres::Postgres;
    type Storage = PostgresStorage;

    async fn start() -> Shop<Self> {
        let server = postgres::Postgres::start();
        let storage = server.storage().await;
        server
            .execute("CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY, note text)")
            .await;
        Shop { server, storage }
    }

    fn max_transaction(storage: &PostgresStorage, limit: Duration) -> PostgresStorage {
        storage.clone().max_transaction(limit)
    }

    async fn order(connection: &mut PgConnection, note: &str) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar("INSERT INTO orders (note) VALUES ($1) RETURNING id")
            .bind(note)
            .fetch_one(connection)
            .await
    }

    async fn execute(connection: &mut PgConnection, statements: &str) -> Result<(), sqlx::Error> {
        let done = sqlx::Executor::execute(connection, sqlx::raw_sql(statements)).await;
        done.map(drop)
    }

    async fn number(server: &postgres::Postgres, query: &str) -> i64 {
        server.number(query).await
    }
}

impl Database for Sqlite {
    type Server = SqliteFile;
    type Storage = SqliteStorage;

    async fn start() -> Shop<Self> {
        let server = SqliteFile::new();
        let storage = server.open().await;
        server
            .execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, note TEXT)")
            .await;
        Shop { server, storage }
    }

    fn max_transaction(storage: &SqliteStorage, limit: Duration) -> SqliteStorage {
        storage.clone().max_transaction(limit)
    }

    async fn order(connection: &mut SqliteConnection, note: &str) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar("INSERT INTO orders (note) VALUES (?) RETURNING id")
            .bind(note)
            .fetch_one(connection)
            .await
    }

    async fn execute(
        connection: &mut SqliteConnection,
        statements: &str,
    ) -> Result<(), sqlx::Error> {
        let done = sqlx::Executor::execute(connection, sqlx::raw_sql(statements)).await;
        done.map(drop)
    }

    async fn number(server: &SqliteFile, query: &str) -> i64 {
        server.number(query).await
    }
}

/// A database, and a storage on it.
pub(crate) struct Shop<D: Database> {
    pub(crate) server: D::Server,
    pub(crate) storage: D::Storage,
}

impl<D: Database> Shop<D> {
    pub(crate) fn app<M: 'static>(&self, handler: impl Handler<M, ()>) -> App {
        self.app_with(config(), handler)
    }

    pub(crate) fn app_with<M: 'static>(&self, config: Config, handler: impl Handler<M, ()>) -> App {
        App::new::<D, M>(self.storage.clone(), config, handler)
    }

    /// How many orders are committed.
    pub(crate) async fn orders(&self) -> i64 {
        D::number(&self.server, "SELECT count(*) FROM orders").await
    }

    /// How many keys have a record or a claim.
    pub(crate) async fn records(&self) -> i64 {
        D::number(&self.server, "SELECT count(*) FROM idempotency").await
    }
}

impl Shop<Postgres> {
    /// Another storage on the database, as another process has it, with its pool of this size.
    pub(crate) fn peer(&self, connections: u32) -> (PgPool, PostgresStorage) {
        let options: PgConnectOptions = self.server.url().parse().expect("a URL");
        let pool = PgPoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(PATIENCE)
            .connect_lazy_with(options);
        let storage = PostgresStorage::new(pool.clone()).time_limit(PATIENCE);
        (pool, storage)
    }
}

/// Retries get the original status, and duplicates wait.
pub(crate) fn config() -> Config {
    waiting(PATIENCE)
}

/// The same, with duplicates that wait for so long.
pub(crate) fn waiting(timeout: Duration) -> Config {
    Config::default()
        .conflict_status(None)
        .storage_timeout(PATIENCE)
        .lock(LockPolicy::default().timeout(timeout))
}

/// A service with a handler of orders.
#[derive(Clone)]
pub(crate) struct App {
    router: Router,
    pub(crate) layer: IdempotencyLayer,
    pub(crate) events: Events,
}

impl App {
    pub(crate) fn new<D: Database, M: 'static>(
        storage: impl Storage,
        config: Config,
        handler: impl Handler<M, ()>,
    ) -> Self {
        Self::of(storage, config, |layer| {
            let policy = KeyPolicy::required().transaction::<D>();
            let router = Router::new().route("/orders", post(handler.idempotency_key(policy)));
            layer.check(router.layer(layer.clone())).expect("a check")
        })
    }

    /// A service of these routes.
    pub(crate) fn of(
        storage: impl Storage,
        config: Config,
        routes: impl FnOnce(&IdempotencyLayer) -> Router,
    ) -> Self {
        let events = Events::new();
        let layer = IdempotencyLayer::enforce(storage).config(config.observer(events.clone()));
        Self {
            router: routes(&layer).layer(CatchPanicLayer::new()),
            layer,
            events,
        }
    }

    pub(crate) fn engine(&self) -> &Engine {
        self.layer.engine()
    }

    /// An answer, of which the body is still to be read.
    pub(crate) fn open(
        &self,
        path: &str,
        key: &str,
    ) -> impl Future<Output = Response> + Send + use<> {
        let request = Request::post(path).header("idempotency-key", key);
        self.send(request.body(Body::empty()).expect("a request"))
    }

    pub(crate) fn send(
        &self,
        request: Request<Body>,
    ) -> impl Future<Output = Response> + Send + use<> {
        let answered = self.router.clone().oneshot(request);
        async { answered.await.unwrap_or_else(|never| match never {}) }
    }

    pub(crate) async fn post_to(&self, path: &str, key: &str) -> Answer {
        read(self.open(path, key).await).await
    }

    pub(crate) async fn post(&self, key: &str) -> Answer {
        self.post_to("/orders", key).await
    }

    /// Posts from a task of its own.
    pub(crate) fn start(&self, key: &str) -> JoinHandle<Answer> {
        let (app, key) = (self.clone(), key.to_owned());
        tokio::spawn(async move { app.post(&key).await })
    }

    /// The operation of `key` at `/orders`, as the engine knows it.
    pub(crate) fn encoded(&self, key: &str) -> idempotency_axum::EncodedKey {
        let request = Request::post("/orders").header("idempotency-key", key);
        let (parts, ()) = request.body(()).expect("a request").into_parts();
        let encoded = self.layer.encoded_key(&parts, b"");
        encoded.expect("a key")
    }
}

pub(crate) async fn read(response: Response) -> Answer {
    let (parts, body) = response.into_parts();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body: to_bytes(body, usize::MAX).await.expect("a body"),
    }
}

/// An answer that a test awaits for as long as a busy machine needs.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(PATIENCE, future).await;
    done.expect("it comes to an end")
}

#[track_caller]
pub(crate) fn assert_status(answer: &Answer, status: u16) {
    assert_eq!(answer.code(), status, "{answer:?}");
    assert!(!answer.is_replay(), "{answer:?}");
}

/// The first answer, byte for byte.
#[track_caller]
pub(crate) fn assert_repeats(again: &Answer, first: &Answer) {
    assert!(again.is_replay(), "{again:?}");
    let mut again = again.clone();
    again.headers.remove("idempotency-replayed");
    assert_eq!(&again, first);
}

/// A problem that invites to try again.
#[track_caller]
pub(crate) fn assert_try_again(answer: &Answer, problem: &str) {
    assert_eq!(answer.code(), 503, "{answer:?}");
    assert_eq!(answer.problem().as_deref(), Some(problem), "{answer:?}");
    assert!(answer.header("retry-after").is_some(), "{answer:?}");
}

/// The operation ran, and its answer is not there.
#[track_caller]
pub(crate) fn assert_tombstone(answer: &Answer) {
    assert_eq!(answer.code(), 409, "{answer:?}");
    assert_eq!(
        answer.problem().as_deref(),
        Some("not-replayable"),
        "{answer:?}"
    );
}

/// Fails as handlers do.
pub(crate) struct Failed(sqlx::Error);

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        (StatusCode::INTERNAL_SERVER_ERROR, self.0.to_string()).into_response()
    }
}
