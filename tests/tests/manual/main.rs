//! Manual handlers over real TCP: on a conflict they run and dictate the answer, one at a time.
//!
//! The handler does what the headers of each call say, which are no part of the operation.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
    routing::post,
};
use http::{HeaderMap, StatusCode};
use idempotency_axum::{
    Config, EncodedKey, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy,
    LockPolicy, ManualIdempotency, MemoryStorage, Storage,
};
use idempotency_tests::{Answer, Call, Events, Feed, Gate, Length, Runs, Server};

mod answers;
mod found;
mod records;
mod refusals;
mod streams;
mod turns;

/// What a handler shares with the test.
#[derive(Clone, Debug, Default)]
struct Work {
    runs: Runs,
    gate: Gate,
    feed: Feed,
    inside: Arc<AtomicUsize>,
}

/// That the handler is at work; two at a time are an error.
struct Inside(Arc<AtomicUsize>);

impl Inside {
    fn enter(work: &Work) -> Self {
        let others = work.inside.fetch_add(1, Ordering::SeqCst);
        let inside = Self(work.inside.clone());
        assert_eq!(others, 0, "two runs of a key overlap");
        inside
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What a manual handler was given, as it says it in its answer's `x-saw`.
fn seen(manual: &ManualIdempotency) -> String {
    match (manual.exists(), manual.response()) {
        (false, None) => "nothing".to_owned(),
        (true, None) => "no answer".to_owned(),
        (true, Some(last)) => {
            let body = String::from_utf8_lossy(last.body());
            format!("{} {body}", last.status().as_u16())
        }
        (false, Some(last)) => panic!("{last:?} of nothing"),
    }
}

/// Answers 201 with `run 1`, `run 2`, … and what it saw, unless the call says otherwise.
async fn order(
    State(work): State<Work>,
    key: IdempotencyKey,
    manual: ManualIdempotency,
    headers: HeaderMap,
) -> Response {
    let _inside = Inside::enter(&work);
    let run = work.runs.next();
    if headers.contains_key("x-gate") {
        work.gate.enter().await;
    }
    let saw = seen(&manual);
    let response = match headers.get("x-answer").map(|answer| answer.as_bytes()) {
        None => (StatusCode::CREATED, format!("run {run}")).into_response(),
        Some(b"replay") => manual.response().expect("an answer").into_response(),
        Some(b"accepted") => {
            let last = manual.response().expect("an answer");
            last.with_status(StatusCode::ACCEPTED).into_response()
        }
        Some(b"panic") => panic!("run {run} panics, as it should"),
        Some(b"stream") => work.feed.body(Length::Unknown).into_response(),
        Some(b"events") => {
            let events = [("content-type", "text/event-stream")];
            (events, work.feed.body(Length::Unknown)).into_response()
        }
        Some(b"large") => Body::from(vec![b'x'; LIMIT + 1]).into_response(),
        Some(status) => {
            let status = StatusCode::from_bytes(status).expect("a status");
            (status, format!("run {run}")).into_response()
        }
    };
    let encoded = key.encoded().to_string();
    let more = [("x-saw", saw), ("x-encoded", encoded)];
    (more, response).into_response()
}

const LIMIT: usize = 1024;

/// A server with [`order`] at `/orders`.
struct Shop {
    server: Server,
    layer: IdempotencyLayer,
    events: Events,
    work: Work,
}

impl Shop {
    async fn open() -> Self {
        Self::with(Config::default()).await
    }

    async fn with(config: Config) -> Self {
        Self::on(MemoryStorage::new(), config).await
    }

    async fn on(storage: impl Storage, config: Config) -> Self {
        Self::of(storage, config, KeyPolicy::required()).await
    }

    async fn of(storage: impl Storage, config: Config, policy: KeyPolicy) -> Self {
        Self::sharing(Work::default(), storage, config, policy).await
    }

    /// One whose handler is also another's.
    async fn sharing(work: Work, storage: impl Storage, config: Config, policy: KeyPolicy) -> Self {
        let events = Events::new();
        let config = config.max_response_body(LIMIT).observer(events.clone());
        let layer = IdempotencyLayer::enforce(storage).config(config);
        let router = Router::new()
            .route("/orders", post(order.idempotency_key(policy.manual())))
            .layer(layer.clone())
            .with_state(work.clone());
        Self {
            server: Server::start(router).await,
            layer,
            events,
            work,
        }
    }

    /// The request, the same each time.
    fn call(&self) -> Call {
        self.server.post("/orders").key("abc")
    }

    /// The request, and what its handler is to do.
    fn ask(&self, answer: &str) -> Call {
        self.call().header("x-answer", answer)
    }

    /// Runs number `run`, which sees `saw`.
    async fn assert_runs(&self, run: usize, saw: &str) -> Answer {
        let answer = self.call().send().await;
        assert_ran(&answer, run, saw);
        answer
    }

    /// What the next conflict is given; its own answer is none that is stored.
    async fn sees(&self) -> String {
        let answer = self.ask("503").send().await;
        assert_eq!(answer.code(), 503, "{answer:?}");
        saw(&answer).to_owned()
    }

    fn runs(&self) -> usize {
        self.work.runs.count()
    }
}

fn saw(answer: &Answer) -> &str {
    answer.header("x-saw").expect("an answer of the handler")
}

fn encoded(answer: &Answer) -> EncodedKey {
    let encoded = answer
        .header("x-encoded")
        .expect("an answer of the handler");
    encoded.parse().expect("an encoded key")
}

/// That `answer` is the handler's own, of run number `run`, as it gave it.
#[track_caller]
fn assert_ran(answer: &Answer, run: usize, seen: &str) {
    let body = format!("run {run}");
    assert_eq!((answer.code(), answer.text()), (201, &*body), "{answer:?}");
    assert_eq!(saw(answer), seen);
    assert!(!answer.is_replay());
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, problem: &str) {
    let is = (answer.code(), answer.problem());
    assert_eq!(is, (status, Some(problem.to_owned())), "{answer:?}");
    assert!(!answer.is_replay());
}

/// Duplicates wait for as long as it takes.
fn patient() -> LockPolicy {
    LockPolicy::default().timeout(Duration::from_secs(30))
}

/// Duplicates of a running original are refused at once.
fn impatient() -> LockPolicy {
    LockPolicy::default().timeout(Duration::ZERO)
}
