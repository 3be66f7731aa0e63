//! The table *Answers* of the behaviour document over real TCP: a module a row, a test a column.

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    http::{Method, StatusCode},
    response::IntoResponse,
    routing::any,
};
use idempotency_axum::{Config, IdempotencyLayer, LockPolicy, MemoryStorage, Storage};
use idempotency_tests::{Answer, Events, Gate, Runs, Server};
use std::time::Duration;

/// One test a column for each of the rows, which are async functions of a column.
macro_rules! columns {
    ($($row:ident),+ $(,)?) => {$(
        mod $row {
            use crate::Column;

            #[tokio::test]
            async fn default() {
                super::$row(Column::Default).await;
            }

            #[tokio::test]
            async fn ietf() {
                super::$row(Column::Ietf).await;
            }

            #[tokio::test]
            async fn stripe() {
                super::$row(Column::Stripe).await;
            }
        }
    )+};
}

mod conflicts;
mod headers;
mod keys;
mod multipart;
mod problems;
mod recording;
mod refusals;
mod rejections;
mod routing;
mod scopes;

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Default,
    Ietf,
    Stripe,
}

impl Column {
    fn config(self) -> Config {
        match self {
            Self::Default => Config::default(),
            Self::Ietf => Config::ietf(),
            Self::Stripe => Config::stripe(),
        }
    }

    /// What this column says in a row of the table.
    fn pick<T>(self, default: T, ietf: T, stripe: T) -> T {
        match self {
            Self::Default => default,
            Self::Ietf => ietf,
            Self::Stripe => stripe,
        }
    }

    fn replay_header(self) -> &'static str {
        self.pick(
            "idempotency-replayed",
            "idempotency-replayed",
            "idempotent-replayed",
        )
    }

    fn is_replay(self, answer: &Answer) -> bool {
        answer.header(self.replay_header()) == Some("true")
    }

    /// That `answer` is what a retry gets of an answer with `status` and `body`.
    #[track_caller]
    fn assert_replay(self, answer: &Answer, status: u16, body: &str) {
        assert!(self.is_replay(answer), "{self:?}: {answer:?}");
        assert_eq!(answer.code(), self.pick(409, status, status), "{answer:?}");
        assert_eq!(answer.text(), body);
    }
}

/// That `answer` is the handler's own, of its run number `run`.
#[track_caller]
fn assert_ran(answer: &Answer, run: usize) {
    assert_eq!(
        (answer.code(), answer.text()),
        (201, &*format!("order {run}"))
    );
    assert_eq!(answer.header("idempotency-replayed"), None);
    assert_eq!(answer.header("idempotent-replayed"), None);
}

/// That `answer` is a refusal of this status and kind.
#[track_caller]
fn assert_refused(answer: &Answer, status: u16, problem: &str) {
    assert_eq!(
        (answer.code(), answer.problem().as_deref()),
        (status, Some(problem)),
        "{answer:?}"
    );
    assert_eq!(answer.header("idempotency-replayed"), None);
    assert_eq!(answer.header("idempotent-replayed"), None);
}

/// A server in mode `enforce` whose handlers count their runs.
struct Shop {
    server: Server,
    work: Work,
    events: Events,
}

/// What the handlers of a [`Shop`] share with the test.
#[derive(Clone, Default)]
struct Work {
    runs: Runs,
    gate: Gate,
}

impl Shop {
    async fn open(config: Config) -> Self {
        Self::on(MemoryStorage::new(), config).await
    }

    async fn on(storage: impl Storage, config: Config) -> Self {
        Self::with(storage, config, Router::new()).await
    }

    /// With more routes, which are layered too.
    async fn with(storage: impl Storage, config: Config, routes: Router<Work>) -> Self {
        let work = Work::default();
        let events = Events::new();
        let layer = IdempotencyLayer::enforce(storage).config(config.observer(events.clone()));
        let router = Router::new()
            .route("/orders", any(order))
            .route("/payments", any(order))
            .route("/gated", any(gated))
            .route("/status/{status}", any(status))
            .merge(routes)
            .layer(layer)
            .with_state(work.clone());
        Self {
            server: Server::start(router).await,
            work,
            events,
        }
    }

    fn runs(&self) -> usize {
        self.work.runs.count()
    }
}

async fn order(State(work): State<Work>) -> impl IntoResponse {
    let number = work.runs.next();
    let location = [("location", format!("/orders/{number}"))];
    (StatusCode::CREATED, location, format!("order {number}"))
}

/// Waits at the gate, then is an order.
async fn gated(State(work): State<Work>, _body: Bytes) -> impl IntoResponse {
    work.gate.enter().await;
    order(State(work)).await
}

/// Answers with the status in the path.
async fn status(State(work): State<Work>, Path(status): Path<u16>) -> StatusCode {
    work.runs.next();
    StatusCode::from_u16(status).expect("a status")
}

/// Duplicates wait for as long as it takes.
fn patient() -> LockPolicy {
    LockPolicy::default().timeout(Duration::from_secs(30))
}

/// Duplicates are refused at once.
fn impatient() -> LockPolicy {
    LockPolicy::default().timeout(Duration::ZERO)
}

/// Every method that is not safe and can be sent.
fn unsafe_methods() -> [Method; 5] {
    let other = Method::from_bytes(b"PURGE").expect("a method");
    [
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        other,
    ]
}
