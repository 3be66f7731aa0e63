//! Answers that stream, over real TCP: what the first client sees of one while it is recorded, and what retries get.
//!
//! The test feeds the answer's body frame by frame, so it knows what the handler has made when the client sees something.

use std::time::Duration;

use axum::{
    Router,
    body::Body,
    extract::Request,
    response::{IntoResponse, Response},
    routing::post,
};
use http::{StatusCode, header};
use idempotency_axum::{Config, IdempotencyLayer, LockPolicy, MemoryStorage, Storage};
use idempotency_tests::{Answer, Call, Events, Feed, Length, Protocol, Runs, Server};

use self::leaving::LetGo;

/// One test per version of HTTP for each of these async functions.
macro_rules! over_both {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            use idempotency_tests::Protocol::{Http1, Http2};

            #[tokio::test]
            async fn http1() {
                super::$name(Http1).await;
            }

            #[tokio::test]
            async fn http2() {
                super::$name(Http2).await;
            }
        }
    )+};
}

mod breaks;
mod compression;
mod end;
mod events;
mod kinds;
mod leaving;
mod limits;
mod pace;
mod slow;
mod storage;
mod trailers;
mod unstored;

/// A server whose `POST /stream` answers with a body that the test feeds; a second run answers with `run 2`.
struct Stage {
    server: Server,
    layer: IdempotencyLayer,
    events: Events,
    runs: Runs,
    feed: Feed,
    let_go: LetGo,
}

/// What [`Stage::open`] serves: a streamed 200 without headers of its own, unless a test says otherwise.
struct Play {
    config: Config,
    length: Length,
    head: fn(Body) -> Response,
    around: fn(Router) -> Router,
    inside: fn(Router) -> Router,
    has_slack: bool,
}

impl Default for Play {
    fn default() -> Self {
        Self {
            config: Config::default(),
            length: Length::Unknown,
            head: Body::into_response,
            around: |router| router,
            inside: |router| router,
            has_slack: true,
        }
    }
}

impl Play {
    fn new(config: Config) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    fn of_length(length: Length) -> Self {
        Self::default().length(length)
    }

    fn length(self, length: Length) -> Self {
        Self { length, ..self }
    }

    fn head(self, head: fn(Body) -> Response) -> Self {
        Self { head, ..self }
    }

    async fn open(self) -> Stage {
        self.on(MemoryStorage::new()).await
    }

    async fn on(self, storage: impl Storage) -> Stage {
        let (events, runs, feed) = (Events::new(), Runs::new(), Feed::new());
        let layer = IdempotencyLayer::enforce(storage).config(self.config.observer(events.clone()));
        let (length, head) = (self.length, self.head);
        let handler = {
            let (runs, feed) = (runs.clone(), feed.clone());
            async move |_request: Request| match runs.next() {
                1 => head(feed.body(length)),
                run => format!("run {run}").into_response(),
            }
        };
        let router = (self.inside)(Router::new().route("/stream", post(handler)));
        let let_go = LetGo::default();
        let router = let_go.of((self.around)(router.layer(layer.clone())));
        let server = match self.has_slack {
            true => Server::start(router).await,
            false => Server::start_without_slack(router),
        };
        Stage {
            server,
            layer,
            events,
            runs,
            feed,
            let_go,
        }
    }
}

impl Stage {
    /// The request, the same each time.
    fn call(&self, protocol: Protocol) -> Call {
        self.server.post("/stream").key("abc").over(protocol)
    }

    /// A retry that gets a replay of `body`, and no second run.
    async fn assert_replays(&self, protocol: Protocol, body: &[u8]) -> Answer {
        let retry = self.call(protocol).send().await;
        assert_replay(&retry, body);
        assert_eq!(self.runs.count(), 1);
        retry
    }

    /// A retry that gets a conflict which says that there is nothing to replay, and no second run.
    async fn assert_not_replayable(&self, protocol: Protocol) {
        assert_not_replayable(&self.call(protocol).send().await);
        assert_eq!(self.runs.count(), 1);
    }

    /// A retry that is told to wait.
    async fn assert_in_flight(&self, protocol: Protocol) {
        let retry = self.call(protocol).send().await;
        let is = (retry.code(), retry.problem(), retry.header("retry-after"));
        let expected = (423, Some("in-flight".to_owned()), Some("1"));
        assert_eq!(is, expected, "{retry:?}");
        assert!(!retry.is_replay());
        assert_eq!(self.runs.count(), 1);
    }
}

/// That `answer` is what `Config::default` replays of a streamed answer.
#[track_caller]
fn assert_replay(answer: &Answer, body: &[u8]) {
    assert!(answer.is_replay(), "{answer:?}");
    assert_eq!(answer.code(), 409);
    assert_eq!(answer.body, body);
    let length = body.len().to_string();
    assert_eq!(answer.header("content-length"), Some(&*length));
    assert!(!answer.headers.contains_key(header::TRANSFER_ENCODING));
    assert!(!answer.headers.contains_key(header::RETRY_AFTER));
}

#[track_caller]
fn assert_not_replayable(answer: &Answer) {
    let is = (answer.status, answer.problem());
    let expected = (StatusCode::CONFLICT, Some("not-replayable".to_owned()));
    assert_eq!(is, expected, "{answer:?}");
    assert!(!answer.headers.contains_key(header::RETRY_AFTER));
    assert!(!answer.is_replay());
}

/// Duplicates wait for as long as it takes.
fn patient() -> LockPolicy {
    LockPolicy::default().timeout(Duration::from_secs(30))
}

/// Duplicates are refused at once.
fn impatient() -> LockPolicy {
    LockPolicy::default().timeout(Duration::ZERO)
}
