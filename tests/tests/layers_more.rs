//! The layers that an axum service has, outside of ours and inside, over real TCP: what runs, what is recorded, what a retry
//! gets. The table in the crate's documentation says the same; `layers_order.rs` has its other rows.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::post,
};
use http::StatusCode;
use idempotency_axum::{Config, Event, IdempotencyLayer, LockPolicy, MemoryStorage, Observer};
use idempotency_tests::{Answer, Call, Events, Feed, Gate, Length, PATIENCE, Runs, Server};

/// A server with our layer around `routes`, and around that what stands outside.
struct Shop {
    server: Server,
    layer: IdempotencyLayer,
    events: Events,
}

impl Shop {
    async fn open(routes: Router, outside: impl FnOnce(Router) -> Router) -> Self {
        Self::with(Config::default(), routes, outside).await
    }

    /// Duplicates are refused at once, whatever the configuration says.
    async fn with(config: Config, routes: Router, outside: impl FnOnce(Router) -> Router) -> Self {
        let events = Events::new();
        let lock = LockPolicy::default().timeout(Duration::ZERO);
        let config = config.lock(lock).observer(events.clone());
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
        Self {
            server: Server::start(outside(routes.layer(layer.clone()))).await,
            layer,
            events,
        }
    }

    /// `POST /order`, the same each time.
    fn call(&self) -> Call {
        self.server.post("/order").key("abc")
    }

    /// Sends `call`, the gate's visitor number `visitor`, and leaves once it is there; returns when the server has seen that.
    async fn leave_at(&self, gate: &Gate, visitor: usize, call: Call) {
        let before = self.events.count("adopted");
        let call = call.start();
        gate.arrived(visitor).await;
        call.abort();
        self.events.until("adopted", before + 1).await;
    }
}

fn nothing(router: Router) -> Router {
    router
}

#[track_caller]
fn assert_replay(answer: &Answer, body: impl AsRef<[u8]>) {
    assert!(answer.is_replay(), "{answer:?}");
    assert_eq!(answer.code(), 409);
    assert_eq!(answer.body, body.as_ref());
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, problem: &str) {
    let is = (answer.code(), answer.problem());
    assert_eq!(is, (status, Some(problem.to_owned())), "{answer:?}");
    assert!(!answer.is_replay());
}

/// That `answer` is the handler's own, of its run number `run`.
#[track_caller]
fn assert_ran(answer: &Answer, run: usize) {
    let body = format!("order {run}");
    assert_eq!((answer.code(), answer.text()), (200, &*body));
    assert!(!answer.is_replay());
}

/// A handler that counts its runs and ends when the gate is opened.
fn gated(runs: &Runs, gate: &Gate) -> Router {
    let (runs, gate) = (runs.clone(), gate.clone());
    let handler = async move || {
        let run = runs.next();
        gate.enter().await;
        format!("order {run}")
    };
    Router::new().route("/order", post(handler))
}

/// A handler that counts its runs and answers at once.
fn counted(runs: &Runs) -> Router {
    let runs = runs.clone();
    let handler = async move || format!("order {}", runs.next());
    Router::new().route("/order", post(handler))
}

/// A handler that counts its runs; the first has an answer that the test feeds.
fn fed(runs: &Runs, feed: &Feed) -> Router {
    let (runs, feed) = (runs.clone(), feed.clone());
    let handler = async move || match runs.next() {
        1 => feed.body(Length::Unknown).into_response(),
        run => format!("order {run}").into_response(),
    };
    Router::new().route("/order", post(handler))
}

mod compression {
    use futures_util::{StreamExt, stream};
    use tower_http::compression::CompressionLayer;

    use super::*;

    const GZIP: &[u8] = &[0x1f, 0x8b];
    const LINE: &str = "one order, and one more order\n";

    fn accepting(shop: &Shop, path: &str, encoding: Option<&str>) -> Call {
        let call = shop.server.post(path).key("abc");
        match encoding {
            Some(encoding) => call.header("accept-encoding", encoding),
            None => call,
        }
    }

    /// Bytes that no compression makes smaller, so that they leave it soon.
    fn noise(length: usize) -> Vec<u8> {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        std::iter::repeat_with(next).take(length).collect()
    }

    /// Whole, and in pieces with a pause before each.
    fn routes(runs: &Runs) -> Router {
        let (one, other) = (runs.clone(), runs.clone());
        let whole = async move || {
            one.next();
            LINE.repeat(200)
        };
        let streamed = async move || {
            other.next();
            let lines = stream::iter(0..200).then(|_| async {
                tokio::task::yield_now().await;
                Ok::<_, std::convert::Infallible>(LINE)
            });
            Body::from_stream(lines)
        };
        Router::new()
            .route("/whole", post(whole))
            .route("/streamed", post(streamed))
    }

    #[tokio::test]
    async fn inside_a_retry_gets_the_recorded_bytes_whatever_it_accepts() {
        for first_accepts in [Some("gzip"), Some("identity"), None] {
            let runs = Runs::new();
            let routes = routes(&runs).layer(CompressionLayer::new());
            let shop = Shop::open(routes, nothing).await;
            for (path, run) in [("/whole", 1), ("/streamed", 2)] {
                let first = accepting(&shop, path, first_accepts).send().await;
                assert_eq!((first.code(), first.is_replay()), (200, false));
                let is_gzip = first_accepts == Some("gzip");
                assert_eq!(first.body.starts_with(GZIP), is_gzip, "{path}");
                assert_eq!(first.header("content-encoding"), is_gzip.then_some("gzip"));
                for accepts in [Some("gzip"), Some("identity"), Some("br"), None] {
                    let retry = accepting(&shop, path, accepts).send().await;
                    assert_replay(&retry, &first.body);
                    for name in ["content-encoding", "content-type", "vary"] {
                        assert_eq!(retry.header(name), first.header(name), "{path}");
                    }
                    let length = first.body.len().to_string();
                    assert_eq!(retry.header("content-length"), Some(&*length));
                }
                assert_eq!(runs.count(), run);
            }
        }
    }

    #[tokio::test]
    async fn outside_a_retry_gets_what_it_accepts() {
        for first_accepts in [Some("gzip"), Some("identity"), None] {
            let runs = Runs::new();
            let around = |router: Router| router.layer(CompressionLayer::new());
            let shop = Shop::open(routes(&runs), around).await;
            for (path, run) in [("/whole", 1), ("/streamed", 2)] {
                let first = accepting(&shop, path, first_accepts).send().await;
                assert_eq!((first.code(), first.is_replay()), (200, false));
                for accepts in [Some("gzip"), Some("identity"), Some("br"), None] {
                    let retry = accepting(&shop, path, accepts).send().await;
                    assert_eq!((retry.code(), retry.is_replay()), (409, true));
                    let is_gzip = accepts == Some("gzip");
                    assert_eq!(retry.header("content-encoding"), is_gzip.then_some("gzip"));
                    match is_gzip {
                        true => assert!(retry.body.starts_with(GZIP), "{path}"),
                        false => assert_eq!(retry.text(), LINE.repeat(200), "{path}"),
                    }
                }
                assert_eq!(runs.count(), run);
            }
        }
    }

    /// On either side compression passes on what it has, and the recording waits for neither of the two ends.
    #[tokio::test]
    async fn the_first_client_gets_a_stream_as_it_is_made() {
        for is_inside in [true, false] {
            let (runs, feed) = (Runs::new(), Feed::new());
            let routes = fed(&runs, &feed);
            let shop = match is_inside {
                true => Shop::open(routes.layer(CompressionLayer::new()), nothing).await,
                false => Shop::open(routes, |it| it.layer(CompressionLayer::new())).await,
            };
            let call = |encoding| shop.call().header("accept-encoding", encoding);
            feed.data(noise(64 << 10));
            let mut first = call("gzip").open().await;
            assert_eq!(first.headers["content-encoding"], "gzip");
            let mut whole = first.read(32 << 10).await.to_vec();
            assert!(whole.starts_with(GZIP));
            assert_refused(&call("identity").send().await, 423, "in-flight");

            feed.data(LINE);
            feed.end();
            whole.extend_from_slice(&first.finish().await.whole());
            let retry = call("identity").send().await;
            match is_inside {
                true => {
                    assert_replay(&retry, &whole);
                    assert_eq!(retry.header("content-encoding"), Some("gzip"));
                }
                false => {
                    assert_replay(&retry, [&noise(64 << 10), LINE.as_bytes()].concat());
                    assert_eq!(retry.header("content-encoding"), None);
                }
            }
            assert_eq!(runs.count(), 1);
        }
    }
}

/// What a middleware sets for the time of a call is there as long as that middleware polls. An operation whose client has left
/// is polled by a task of its own, and what stands outside is gone with the client.
mod surroundings {
    use std::{
        pin::Pin,
        task::{Context, Poll},
    };

    use axum::{Extension, body::Bytes};
    use http_body::Frame;
    use idempotency_tests::Logs;
    use tracing::{Instrument, Span};

    use super::*;

    tokio::task_local! {
        static TENANT: &'static str;
    }

    async fn in_tenant(request: Request, next: Next) -> Response {
        TENANT.scope("shop", next.run(request)).await
    }

    fn tenant() -> &'static str {
        TENANT.try_with(|tenant| *tenant).unwrap_or("nobody")
    }

    /// Answers with the tenant before the gate and after it.
    fn tenants(runs: &Runs, gate: &Gate) -> Router {
        let (runs, gate) = (runs.clone(), gate.clone());
        let handler = async move || {
            runs.next();
            let before = tenant();
            gate.enter().await;
            format!("{before}, {}", tenant())
        };
        Router::new().route("/order", post(handler))
    }

    #[tokio::test]
    async fn a_task_local_from_outside_is_there_while_the_client_is() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let around = |router: Router| router.layer(middleware::from_fn(in_tenant));
        let shop = Shop::open(tenants(&runs, &gate), around).await;
        gate.open(1);
        assert_eq!(shop.call().send().await.text(), "shop, shop");
        assert_replay(&shop.call().send().await, "shop, shop");
        assert_eq!(runs.count(), 1);
    }

    #[tokio::test]
    async fn a_task_local_from_outside_is_gone_once_the_client_has_left() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let around = |router: Router| router.layer(middleware::from_fn(in_tenant));
        let shop = Shop::open(tenants(&runs, &gate), around).await;
        shop.leave_at(&gate, 1, shop.call()).await;
        gate.open(1);
        shop.layer.drain().await;
        assert_replay(&shop.call().send().await, "shop, nobody");
        assert_eq!(runs.count(), 1);
    }

    #[tokio::test]
    async fn a_task_local_from_inside_is_there_whatever_the_client_does() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let routes = tenants(&runs, &gate).layer(middleware::from_fn(in_tenant));
        let shop = Shop::open(routes, nothing).await;
        shop.leave_at(&gate, 1, shop.call()).await;
        gate.open(1);
        shop.layer.drain().await;
        assert_replay(&shop.call().send().await, "shop, shop");
        assert_eq!(runs.count(), 1);
    }

    /// What goes with the request stays with it.
    #[tokio::test]
    async fn an_extension_from_outside_is_there_whatever_the_client_does() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let handler = {
            let (runs, gate) = (runs.clone(), gate.clone());
            async move |request: Request| {
                runs.next();
                gate.enter().await;
                request
                    .extensions()
                    .get::<&str>()
                    .copied()
                    .unwrap_or("nobody")
            }
        };
        let routes = Router::new().route("/order", post(handler));
        let shop = Shop::open(routes, |it| it.layer(Extension("shop"))).await;
        shop.leave_at(&gate, 1, shop.call()).await;
        gate.open(1);
        shop.layer.drain().await;
        assert_replay(&shop.call().send().await, "shop");
        assert_eq!(runs.count(), 1);
    }

    #[derive(Clone, Debug, Default)]
    struct Spans(Arc<Mutex<Vec<&'static str>>>);

    impl Spans {
        fn note(&self) {
            let name = Span::current().metadata().map_or("none", |it| it.name());
            let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            spans.push(name);
        }

        fn of_handler_and_body(&self) -> (Vec<&'static str>, Vec<&'static str>) {
            let mut spans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let body = spans.split_off(2);
            (spans.clone(), body)
        }
    }

    async fn in_span(request: Request, next: Next) -> Response {
        let span = tracing::info_span!("the_request");
        next.run(request).instrument(span).await
    }

    /// In the handler on either side; where its body is made, only from outside.
    #[tokio::test]
    async fn the_span_is_there_whatever_the_client_does() {
        struct Observed(Body, Spans);

        impl http_body::Body for Observed {
            type Data = Bytes;
            type Error = axum::Error;

            fn poll_frame(
                mut self: Pin<&mut Self>,
                cx: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
                self.1.note();
                Pin::new(&mut self.0).poll_frame(cx)
            }
        }

        let (_logs, _guard) = Logs::install();
        for (is_inside, leaves) in [(false, false), (false, true), (true, false), (true, true)] {
            let (runs, gate, feed, spans) =
                (Runs::new(), Gate::new(), Feed::new(), Spans::default());
            let handler = {
                let (runs, gate) = (runs.clone(), gate.clone());
                let (feed, spans) = (feed.clone(), spans.clone());
                async move || {
                    runs.next();
                    spans.note();
                    gate.enter().await;
                    spans.note();
                    Body::new(Observed(feed.body(Length::Unknown), spans))
                }
            };
            let routes = Router::new().route("/order", post(handler));
            let span = middleware::from_fn(in_span);
            let shop = match is_inside {
                true => Shop::open(routes.layer(span), nothing).await,
                false => Shop::open(routes, |it| it.layer(span)).await,
            };
            let first = match leaves {
                true => {
                    shop.leave_at(&gate, 1, shop.call()).await;
                    None
                }
                false => Some(shop.call().start()),
            };
            gate.open(1);
            for (frame, data) in (1..).zip(["a", "b", "c"]) {
                feed.data(data);
                feed.until_taken(frame).await;
            }
            feed.end();
            if let Some(first) = first {
                assert_eq!(first.await.unwrap().text(), "abc");
            }
            shop.layer.drain().await;
            assert_replay(&shop.call().send().await, "abc");
            assert_eq!(runs.count(), 1);
            // At least once for each frame.
            let (handler, body) = spans.of_handler_and_body();
            assert_eq!(handler, ["the_request"; 2]);
            assert!(body.len() >= 3, "{body:?}");
            let expected = if is_inside { "none" } else { "the_request" };
            assert!(body.iter().all(|span| *span == expected), "{body:?}");
        }
    }
}

/// A transaction around the handler, inside of ours.
mod transactions {
    use tower_http::timeout::TimeoutLayer;

    use super::*;

    /// What was begun, committed, rolled back, and what became of the key, in that order.
    #[derive(Clone, Debug, Default)]
    struct Journal(Arc<Mutex<Vec<&'static str>>>);

    impl Journal {
        fn note(&self, what: &'static str) {
            let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            lines.push(what);
        }

        fn lines(&self) -> Vec<&'static str> {
            let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            lines.clone()
        }
    }

    impl Observer for Journal {
        fn on_event(&self, event: &Event<'_>) {
            if ["completed", "released", "tombstoned"].contains(&event.name()) {
                self.note(event.name());
            }
        }
    }

    /// Is rolled back when it is dropped.
    struct Transaction(Option<Journal>);

    impl Transaction {
        fn begin(journal: &Journal) -> Self {
            journal.note("begin");
            Self(Some(journal.clone()))
        }

        /// As any that talks to a database, this has to wait.
        async fn commit(mut self) {
            tokio::task::yield_now().await;
            if let Some(journal) = self.0.take() {
                journal.note("commit");
            }
        }
    }

    impl Drop for Transaction {
        fn drop(&mut self) {
            if let Some(journal) = &self.0 {
                journal.note("rollback");
            }
        }
    }

    async fn in_transaction(
        State(journal): State<Journal>,
        request: Request,
        next: Next,
    ) -> Response {
        let transaction = Transaction::begin(&journal);
        let response = next.run(request).await;
        if response.status().is_success() {
            transaction.commit().await;
        }
        response
    }

    fn with_transactions(journal: &Journal, routes: Router) -> Router {
        let transaction = middleware::from_fn_with_state(journal.clone(), in_transaction);
        routes.layer(transaction)
    }

    async fn shop(journal: &Journal, routes: Router) -> Shop {
        heard(journal, with_transactions(journal, routes)).await
    }

    async fn heard(journal: &Journal, routes: Router) -> Shop {
        let config = Config::default().observer(journal.clone());
        Shop::with(config, routes, nothing).await
    }

    #[tokio::test]
    async fn it_commits_with_the_answer_and_before_the_record() {
        let (runs, journal) = (Runs::new(), Journal::default());
        let shop = shop(&journal, counted(&runs)).await;
        assert_ran(&shop.call().send().await, 1);
        assert_eq!(journal.lines(), ["begin", "commit", "completed"]);
        for _ in 0..2 {
            assert_replay(&shop.call().send().await, "order 1");
        }
        assert_eq!(journal.lines().len(), 3, "a replay begins none");
        assert_eq!(runs.count(), 1);
    }

    #[tokio::test]
    async fn duplicates_commit_once() {
        let (runs, gate, journal) = (Runs::new(), Gate::new(), Journal::default());
        let shop = shop(&journal, gated(&runs, &gate)).await;
        let first = shop.call().start();
        gate.arrived(1).await;
        let duplicates: Vec<_> = (0..16).map(|_| shop.call().start()).collect();
        for duplicate in duplicates {
            assert_refused(&duplicate.await.unwrap(), 423, "in-flight");
        }
        gate.open(1);
        assert_ran(&first.await.unwrap(), 1);
        let retries: Vec<_> = (0..16).map(|_| shop.call().start()).collect();
        for retry in retries {
            assert_replay(&retry.await.unwrap(), "order 1");
        }
        assert_eq!(journal.lines(), ["begin", "commit", "completed"]);
        assert_eq!(runs.count(), 1);
    }

    #[tokio::test]
    async fn a_client_that_leaves_rolls_nothing_back() {
        let (runs, gate, journal) = (Runs::new(), Gate::new(), Journal::default());
        let shop = shop(&journal, gated(&runs, &gate)).await;
        shop.leave_at(&gate, 1, shop.call()).await;
        assert_eq!(journal.lines(), ["begin"]);
        gate.open(1);
        shop.layer.drain().await;
        assert_eq!(journal.lines(), ["begin", "commit", "completed"]);
        assert_replay(&shop.call().send().await, "order 1");
        assert_eq!(runs.count(), 1);
    }

    #[tokio::test]
    async fn an_answer_that_is_no_success_rolls_back_and_frees_the_key() {
        let (runs, journal) = (Runs::new(), Journal::default());
        let handler = {
            let runs = runs.clone();
            async move || match runs.next() {
                1 => Err(StatusCode::BAD_GATEWAY),
                run => Ok(format!("order {run}")),
            }
        };
        let shop = shop(&journal, Router::new().route("/order", post(handler))).await;
        assert_eq!(shop.call().send().await.code(), 502);
        assert_eq!(journal.lines(), ["begin", "rollback", "released"]);
        assert_ran(&shop.call().send().await, 2);
        assert_eq!(journal.lines()[3..], ["begin", "commit", "completed"]);
    }

    #[tokio::test]
    async fn a_panic_rolls_back_and_frees_the_key() {
        let (runs, journal) = (Runs::new(), Journal::default());
        let handler = {
            let runs = runs.clone();
            async move || {
                let run = runs.next();
                assert!(run > 1, "the first run panics, as it should");
                format!("order {run}")
            }
        };
        let shop = shop(&journal, Router::new().route("/order", post(handler))).await;
        assert!(shop.call().try_send().await.is_err(), "the panic goes on");
        assert_eq!(journal.lines(), ["begin", "rollback", "released"]);
        assert_ran(&shop.call().send().await, 2);
        assert_eq!(journal.lines()[3..], ["begin", "commit", "completed"]);
    }

    #[tokio::test]
    async fn a_timeout_inside_rolls_back_and_frees_the_key() {
        let (runs, gate, journal) = (Runs::new(), Gate::new(), Journal::default());
        let routes = with_transactions(&journal, gated(&runs, &gate));
        let shop = heard(&journal, routes.layer(timeout())).await;
        let first = shop.call().send().await;
        assert_eq!((first.code(), first.is_replay()), (408, false));
        assert_eq!(journal.lines(), ["begin", "rollback", "released"]);
        gate.open(1);
        assert_ran(&shop.call().send().await, 2);
        assert_eq!(journal.lines()[3..], ["begin", "commit", "completed"]);
        assert_replay(&shop.call().send().await, "order 2");
    }

    fn timeout() -> TimeoutLayer {
        TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, super::timeouts::SHORT)
    }

    /// Why it belongs inside: it is undone, and the answer that says otherwise is recorded.
    #[tokio::test]
    async fn outside_it_is_rolled_back_when_its_client_leaves() {
        let (runs, gate, journal) = (Runs::new(), Gate::new(), Journal::default());
        let config = Config::default().observer(journal.clone());
        let around = |it| with_transactions(&journal, it);
        let shop = Shop::with(config, gated(&runs, &gate), around).await;
        shop.leave_at(&gate, 1, shop.call()).await;
        gate.open(1);
        shop.layer.drain().await;
        assert_eq!(journal.lines(), ["begin", "rollback", "completed"]);
        assert_replay(&shop.call().send().await, "order 1");
        assert_eq!(runs.count(), 1);
    }

    /// It ends with the head of the answer: a body that breaks afterwards does not undo it, and does not let a retry run.
    #[tokio::test]
    async fn it_commits_with_the_head_of_a_streamed_answer() {
        let (runs, feed, journal) = (Runs::new(), Feed::new(), Journal::default());
        let shop = shop(&journal, fed(&runs, &feed)).await;
        feed.data("one");
        let mut first = shop.call().open().await;
        assert_eq!(first.read(3).await, "one");
        assert_eq!(journal.lines(), ["begin", "commit"]);
        feed.fail();
        assert!(first.finish().await.is_broken);
        assert_eq!(journal.lines(), ["begin", "commit", "tombstoned"]);
        assert_refused(&shop.call().send().await, 409, "not-replayable");
        assert_eq!(runs.count(), 1);
    }
}

/// The timeouts are real. What they are to end stands at a gate or feeds on the test, so it can't end before; what they must
/// not end is seen to outlive a request that came later and did time out.
mod timeouts {
    use idempotency_axum::{Env, SimulatedClock};
    use idempotency_tests::Logs;
    use tokio::sync::oneshot;
    use tower_http::timeout::{ResponseBodyTimeoutLayer, TimeoutLayer};

    use super::*;

    /// What answers at once does so in time on a busy machine too.
    pub(super) const SHORT: Duration = Duration::from_secs(1);

    fn timeout() -> TimeoutLayer {
        TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, SHORT)
    }

    /// With a route that never answers, to tell when the timeout of all that came before is over.
    fn with_witness(routes: Router) -> Router {
        routes.route("/never", post(std::future::pending::<()>))
    }

    async fn timeout_is_over(shop: &Shop) {
        let never = shop.server.post("/never").key("never").send().await;
        assert_eq!(never.code(), 408);
    }

    #[tokio::test]
    async fn outside_the_client_is_told_and_the_operation_goes_on() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let shop = Shop::open(gated(&runs, &gate), |it| it.layer(timeout())).await;
        let first = shop.call().send().await;
        assert_eq!((first.code(), first.problem()), (408, None));
        assert_refused(&shop.call().send().await, 423, "in-flight");
        gate.open(1);
        shop.layer.drain().await;
        assert_replay(&shop.call().send().await, "order 1");
        assert_eq!(runs.count(), 1);
    }

    const MAX_HOLD: Duration = Duration::from_secs(600);

    /// One place, and a handler that enters it, says so at the gate, and never returns.
    async fn shop_with_one_place(
        gate: &Gate,
        outside: impl FnOnce(Router) -> Router,
    ) -> (Shop, SimulatedClock, oneshot::Receiver<()>) {
        let (env, clock) = Env::simulated(1);
        let storage = MemoryStorage::builder().env(env.clone()).build();
        let lock = LockPolicy::default()
            .timeout(Duration::ZERO)
            .max_hold(MAX_HOLD);
        let events = Events::new();
        let config = Config::default().env(env).lock(lock).max_running(1);
        let layer = IdempotencyLayer::enforce(storage).config(config.observer(events.clone()));
        let (held, dropped) = oneshot::channel::<()>();
        let (gate, held) = (gate.clone(), Arc::new(Mutex::new(Some(held))));
        let never = async move || {
            let _held = held.lock().unwrap_or_else(PoisonError::into_inner).take();
            gate.enter().await;
            std::future::pending::<()>().await;
        };
        let routes = Router::new()
            .route("/order", post(never))
            .route("/other", post(async || "other"));
        let server = Server::start(outside(routes.layer(layer.clone()))).await;
        let shop = Shop {
            server,
            layer,
            events,
        };
        (shop, clock, dropped)
    }

    /// Moves the clock past `MAX_HOLD`, a third of a lease at a time.
    async fn give_up(shop: &Shop, clock: &SimulatedClock) {
        for _ in 0..61 {
            while shop.events.count("tombstoned") == 0 && clock.sleeping() == 0 {
                tokio::task::yield_now().await;
            }
            clock.advance(Duration::from_secs(10));
            for _ in 0..20 {
                tokio::task::yield_now().await;
            }
        }
        shop.events.until("tombstoned", 1).await;
    }

    /// Its key has a tombstone, its place is free, nothing of it is left, and the log says where to look.
    async fn assert_given_up(shop: &Shop, dropped: oneshot::Receiver<()>, logs: &Logs) {
        let dropped = tokio::time::timeout(PATIENCE, dropped).await;
        assert!(dropped.expect("it is dropped").is_err());
        assert_refused(&shop.call().send().await, 409, "not-replayable");
        let other = shop.server.post("/other").key("def").send().await;
        assert_eq!((other.code(), other.text()), (200, "other"));
        shop.layer.drain().await;
        assert_eq!(logs.with(&["ERROR", "POST", "/order", "max_hold"]).len(), 1);
    }

    #[tokio::test]
    async fn a_handler_that_never_returns_is_dropped_after_max_hold() {
        let (logs, _guard) = Logs::install();
        let gate = Gate::new();
        gate.open(1);
        let (shop, clock, dropped) = shop_with_one_place(&gate, |it| it.layer(timeout())).await;
        assert_eq!(shop.call().send().await.code(), 408);
        let other = shop.server.post("/other").key("def").send().await;
        assert_refused(&other, 503, "overloaded");
        give_up(&shop, &clock).await;
        assert_given_up(&shop, dropped, &logs).await;
    }

    #[tokio::test]
    async fn a_client_that_leaves_after_max_hold_takes_its_handler_along() {
        let (logs, _guard) = Logs::install();
        let gate = Gate::new();
        gate.open(1);
        let (shop, clock, mut dropped) = shop_with_one_place(&gate, nothing).await;
        let first = shop.call().start();
        gate.arrived(1).await;
        give_up(&shop, &clock).await;
        assert!(dropped.try_recv() == Err(oneshot::error::TryRecvError::Empty));
        first.abort();
        assert_given_up(&shop, dropped, &logs).await;
        assert_eq!(shop.events.count("adopted"), 0);
    }

    /// On either side, since it ends with the head.
    #[tokio::test]
    async fn a_stream_may_take_longer() {
        for is_inside in [true, false] {
            let (runs, feed) = (Runs::new(), Feed::new());
            let routes = with_witness(fed(&runs, &feed));
            let shop = match is_inside {
                true => Shop::open(routes.layer(timeout()), nothing).await,
                false => Shop::open(routes, |it| it.layer(timeout())).await,
            };
            feed.data("one ");
            let mut first = shop.call().open().await;
            assert_eq!(first.read(4).await, "one ");
            timeout_is_over(&shop).await;
            assert_refused(&shop.call().send().await, 423, "in-flight");
            feed.data("order");
            feed.end();
            assert_eq!(first.finish().await.whole(), "order");
            assert_replay(&shop.call().send().await, "one order");
            assert_eq!(runs.count(), 1);
        }
    }

    #[tokio::test]
    async fn of_the_body_outside_the_client_is_cut_off_and_the_recording_goes_on() {
        let (runs, feed) = (Runs::new(), Feed::new());
        let around = |it: Router| it.layer(ResponseBodyTimeoutLayer::new(SHORT));
        let shop = Shop::open(fed(&runs, &feed), around).await;
        feed.data("one ");
        let first = shop.call().open().await;
        assert!(first.finish().await.is_broken);
        assert_refused(&shop.call().send().await, 423, "in-flight");
        feed.data("order");
        feed.end();
        shop.layer.drain().await;
        assert_replay(&shop.call().send().await, "one order");
        assert_eq!(runs.count(), 1);
    }

    #[tokio::test]
    async fn of_the_body_inside_the_answer_is_broken_for_everybody() {
        let (runs, feed) = (Runs::new(), Feed::new());
        let routes = fed(&runs, &feed).layer(ResponseBodyTimeoutLayer::new(SHORT));
        let shop = Shop::open(routes, nothing).await;
        feed.data("one ");
        let first = shop.call().open().await;
        assert!(first.finish().await.is_broken);
        assert_refused(&shop.call().send().await, 409, "not-replayable");
        assert_eq!(runs.count(), 1);
    }
}

/// At most one at a time, in all clones that axum makes of a route: a plain `ConcurrencyLimitLayer` on a router has a limit for
/// each.
mod concurrency {
    use axum::error_handling::HandleErrorLayer;
    use tower::{
        BoxError, ServiceBuilder, limit::GlobalConcurrencyLimitLayer, load_shed::LoadShedLayer,
    };

    use super::*;

    /// All others are turned away at once.
    macro_rules! one_or_shed {
        () => {
            ServiceBuilder::new()
                .layer(HandleErrorLayer::new(shed))
                .layer(LoadShedLayer::new())
                .layer(GlobalConcurrencyLimitLayer::new(1))
        };
    }

    async fn shed(_: BoxError) -> (StatusCode, &'static str) {
        (StatusCode::SERVICE_UNAVAILABLE, "busy")
    }

    #[track_caller]
    fn assert_shed(answer: &Answer) {
        assert_eq!((answer.code(), answer.text()), (503, "busy"));
        assert!(!answer.is_replay());
    }

    /// It counts the clients that wait, so retries need a place too.
    #[tokio::test]
    async fn outside_it_counts_clients() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let shop = Shop::open(gated(&runs, &gate), |it| it.layer(one_or_shed!())).await;
        let other = || shop.server.post("/order").key("other");
        let first = shop.call().start();
        gate.arrived(1).await;
        assert_shed(&shop.call().send().await);
        assert_shed(&other().send().await);
        gate.open(1);
        assert_ran(&first.await.unwrap(), 1);
        assert_replay(&shop.call().send().await, "order 1");

        // Two operations run, one of them without a client.
        shop.leave_at(&gate, 2, other()).await;
        let third = shop.server.post("/order").key("third").start();
        gate.arrived(3).await;
        assert_eq!(shop.layer.engine().running(), 2);
        gate.open(2);
        assert_eq!(third.await.unwrap().code(), 200);
        shop.layer.drain().await;
        assert_replay(&other().send().await, "order 2");
        assert_eq!(runs.count(), 3);
    }

    /// It counts operations, also those whose client has left, and turns no retry away.
    #[tokio::test]
    async fn inside_it_counts_operations() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let shop = Shop::open(gated(&runs, &gate).layer(one_or_shed!()), nothing).await;
        let other = || shop.server.post("/order").key("other");
        gate.open(1);
        assert_ran(&shop.call().send().await, 1);

        shop.leave_at(&gate, 2, other()).await;
        assert_refused(&other().send().await, 423, "in-flight");
        assert_replay(&shop.call().send().await, "order 1");
        // Its answer is a handler's, and 503 is not stored.
        let third = || shop.server.post("/order").key("third");
        assert_shed(&third().send().await);
        assert_shed(&third().send().await);
        assert_eq!(runs.count(), 2);

        gate.open(2);
        shop.layer.drain().await;
        assert_replay(&other().send().await, "order 2");
        assert_ran(&third().send().await, 3);
        assert_replay(&third().send().await, "order 3");
    }

    /// Notes who comes.
    async fn arrival(State(door): State<Gate>, request: Request, next: Next) -> Response {
        door.open(1);
        door.enter().await;
        next.run(request).await
    }

    /// Who finds no place waits for one before its key is looked at: a duplicate gets the replay.
    #[tokio::test]
    async fn outside_without_shedding_everybody_waits_before_the_key() {
        let (runs, gate, door) = (Runs::new(), Gate::new(), Gate::new());
        let arrival = middleware::from_fn_with_state(door.clone(), arrival);
        let one = GlobalConcurrencyLimitLayer::new(1);
        let shop = Shop::open(gated(&runs, &gate), |it| it.layer(one).layer(arrival)).await;
        let first = shop.call().start();
        gate.arrived(1).await;
        let duplicate = shop.call().start();
        door.arrived(2).await;
        let other = shop.server.post("/order").key("other").start();
        door.arrived(3).await;
        assert_eq!(shop.events.count("executing"), 1);
        assert_eq!(shop.events.count("refused"), 0);

        gate.open(2);
        assert_ran(&first.await.unwrap(), 1);
        assert_replay(&duplicate.await.unwrap(), "order 1");
        assert_ran(&other.await.unwrap(), 2);
        assert_eq!(runs.count(), 2);
    }

    /// Below ours in one stack a replay, a refusal and a duplicate need no place, whoever has it.
    #[tokio::test]
    async fn inside_in_one_stack_what_does_not_run_needs_no_place() {
        let (runs, gate, events) = (Runs::new(), Gate::new(), Events::new());
        let lock = LockPolicy::default().timeout(Duration::ZERO);
        let config = Config::ietf().lock(lock).observer(events.clone());
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
        let stack = ServiceBuilder::new()
            .layer(layer.clone())
            .layer(GlobalConcurrencyLimitLayer::new(1));
        let server = Server::start(gated(&runs, &gate).layer(stack)).await;
        let call = |key: &str| server.post("/order").key(key);
        gate.open(1);
        assert_ran(&call("abc").send().await, 1);

        let second = call("second").start();
        gate.arrived(2).await;
        let replay = call("abc").send().await;
        assert_eq!((replay.text(), replay.is_replay()), ("order 1", true));
        assert_refused(&call("abc").body("other").send().await, 422, "key-reused");
        assert_refused(&call("second").send().await, 409, "in-flight");
        assert_refused(&server.post("/order").send().await, 400, "missing-key");
        assert_refused(&call("a,b").send().await, 400, "invalid-key");

        // One that has to run waits with its key.
        let third = call("third").start();
        events.until("executing", 3).await;
        assert_refused(&call("third").send().await, 409, "in-flight");
        assert_eq!(runs.count(), 2);
        gate.open(2);
        assert_ran(&second.await.unwrap(), 2);
        assert_ran(&third.await.unwrap(), 3);
    }

    /// Who finds no place holds its key while it waits for one, and still runs if its client has left by then.
    #[tokio::test]
    async fn inside_without_shedding_an_operation_waits_with_its_key() {
        let (runs, gate) = (Runs::new(), Gate::new());
        let one = GlobalConcurrencyLimitLayer::new(1);
        let shop = Shop::open(gated(&runs, &gate).layer(one), nothing).await;
        let first = shop.call().start();
        gate.arrived(1).await;
        assert_refused(&shop.call().send().await, 423, "in-flight");
        let other = || shop.server.post("/order").key("other");
        let waiting = other().start();
        shop.events.until("executing", 2).await;
        assert_refused(&other().send().await, 423, "in-flight");
        assert_eq!(runs.count(), 1);
        waiting.abort();
        shop.events.until("adopted", 1).await;

        gate.open(2);
        assert_ran(&first.await.unwrap(), 1);
        shop.layer.drain().await;
        assert_replay(&other().send().await, "order 2");
        assert_eq!(runs.count(), 2);
    }
}

mod panics {
    use tower_http::catch_panic::CatchPanicLayer;

    use super::*;

    fn panics_once(runs: &Runs) -> Router {
        let runs = runs.clone();
        let handler = async move || {
            let run = runs.next();
            assert!(run > 1, "the first run panics, as it should");
            format!("order {run}")
        };
        Router::new().route("/order", post(handler))
    }

    #[tokio::test]
    async fn caught_outside_the_first_client_gets_500_and_a_retry_runs() {
        let runs = Runs::new();
        let around = |it: Router| it.layer(CatchPanicLayer::new());
        let shop = Shop::open(panics_once(&runs), around).await;
        assert_eq!(shop.call().send().await.code(), 500);
        assert_eq!(shop.events.count("released"), 1);
        assert_ran(&shop.call().send().await, 2);
        assert_replay(&shop.call().send().await, "order 2");
    }

    #[tokio::test]
    async fn caught_inside_it_is_the_same() {
        let runs = Runs::new();
        let routes = panics_once(&runs).layer(CatchPanicLayer::new());
        let shop = Shop::open(routes, nothing).await;
        assert_eq!(shop.call().send().await.code(), 500);
        assert_eq!(shop.events.count("released"), 1);
        assert_ran(&shop.call().send().await, 2);
        assert_replay(&shop.call().send().await, "order 2");
    }

    /// Where a 500 is stored: outside there is no answer to replay, inside there is the one of the layer that caught.
    #[tokio::test]
    async fn where_500_is_stored_a_retry_does_not_run() {
        for is_inside in [true, false] {
            let runs = Runs::new();
            let (routes, stripe) = (panics_once(&runs), Config::stripe());
            let catch = CatchPanicLayer::new;
            let shop = match is_inside {
                true => Shop::with(stripe, routes.layer(catch()), nothing).await,
                false => Shop::with(stripe, routes, |it| it.layer(catch())).await,
            };
            let first = shop.call().send().await;
            assert_eq!(first.code(), 500);
            let retry = shop.call().send().await;
            match is_inside {
                true => {
                    assert_eq!(retry.header("idempotent-replayed"), Some("true"));
                    assert_eq!((retry.code(), &retry.body), (500, &first.body));
                }
                false => assert_refused(&retry, 409, "not-replayable"),
            }
            assert_eq!(runs.count(), 1);
        }
    }
}

mod body_limits {
    use tower_http::limit::RequestBodyLimitLayer;

    use super::*;

    /// Reads its body.
    fn length(runs: &Runs) -> Router {
        let runs = runs.clone();
        let handler = async move |body: String| format!("order {} {}", runs.next(), body.len());
        Router::new().route("/order", post(handler))
    }

    const CHUNKS: &str = "POST /order HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\
        idempotency-key: abc\r\ntransfer-encoding: chunked\r\n\r\n5\r\n12345\r\n4\r\n6789\r\n0\r\n\r\n";

    #[tokio::test]
    async fn outside_nothing_over_it_takes_the_key() {
        let runs = Runs::new();
        let around = |it: Router| it.layer(RequestBodyLimitLayer::new(8));
        let shop = Shop::open(length(&runs), around).await;
        // By its announced length it does not get to us.
        let announced = shop.call().body("123456789").send().await;
        assert_eq!((announced.code(), announced.problem()), (413, None));
        // In chunks it turns out while we read.
        let chunks = shop.server.raw(CHUNKS).await;
        assert_eq!(chunks.code(), 413, "{chunks:?}");
        assert!(chunks.text().contains("body-too-large"), "{chunks:?}");
        let ours = Config::default().max_request_body.to_string();
        assert!(!chunks.text().contains(&ours), "not ours: {chunks:?}");
        assert_eq!((runs.count(), shop.events.count("executing")), (0, 0));

        let within = || shop.call().body("12345678");
        assert_eq!(within().send().await.text(), "order 1 8");
        assert_replay(&within().send().await, "order 1 8");
        assert_eq!(runs.count(), 1);
    }

    /// Its answer is as good as a handler's: with the configuration's `store_on` a retry gets it again or asks again.
    #[tokio::test]
    async fn inside_its_refusal_is_the_handler_s() {
        for (config, is_stored) in [(Config::default(), false), (Config::ietf(), true)] {
            let runs = Runs::new();
            let routes = length(&runs).layer(RequestBodyLimitLayer::new(8));
            let shop = Shop::with(config, routes, nothing).await;
            let over = || shop.call().body("123456789");
            let first = over().send().await;
            assert_eq!((first.code(), first.problem()), (413, None));
            let retry = over().send().await;
            assert_eq!((retry.code(), retry.is_replay()), (413, is_stored));
            assert_eq!(retry.body, first.body);
            assert_eq!(
                (runs.count(), shop.events.count("executing") > 0),
                (0, true)
            );
        }
    }

    /// Ours comes first.
    #[tokio::test]
    async fn inside_it_sees_only_what_is_within_ours() {
        let runs = Runs::new();
        let routes = length(&runs).layer(RequestBodyLimitLayer::new(8));
        let config = Config::default().max_request_body(4);
        let shop = Shop::with(config, routes, nothing).await;
        for body in ["12345", "123456789"] {
            let refused = shop.call().body(body).send().await;
            assert_refused(&refused, 413, "body-too-large");
        }
        assert_eq!(shop.call().body("1234").send().await.text(), "order 1 4");
    }
}

/// A body that a layer outside can't give whole, and says so only while we read.
mod broken_bodies {
    use tower_http::{decompression::RequestDecompressionLayer, timeout::RequestBodyTimeoutLayer};

    use super::*;

    /// `order` in gzip.
    const GZIP: [u8; 25] = [
        0x1f, 0x8b, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0xcb, 0x2f, 0x4a, 0x49, 0x2d,
        0x02, 0x00, 0x98, 0x93, 0x29, 0xf5, 0x05, 0x00, 0x00, 0x00,
    ];

    #[tokio::test]
    async fn what_can_not_be_decompressed_is_refused() {
        let runs = Runs::new();
        let around = |it: Router| it.layer(RequestDecompressionLayer::new());
        let shop = Shop::open(counted(&runs), around).await;
        let zipped = |body| shop.call().header("content-encoding", "gzip").body(body);
        let mut corrupt = GZIP;
        corrupt[12] ^= 0xff;
        for corrupt in [corrupt.to_vec(), GZIP[..20].to_vec(), b"not gzip".to_vec()] {
            let refused = zipped(corrupt).send().await;
            assert_refused(&refused, 400, "body-unreadable");
        }
        assert_eq!((runs.count(), shop.events.count("executing")), (0, 0));
        assert_eq!(shop.events.count("refused"), 3);
        assert_ran(&zipped(GZIP.to_vec()).send().await, 1);
        // However it was sent, it is the same body.
        assert_replay(&shop.call().body("order").send().await, "order 1");
    }

    #[tokio::test]
    async fn a_timeout_of_the_request_body_is_408() {
        let runs = Runs::new();
        let around = |it: Router| it.layer(RequestBodyTimeoutLayer::new(super::timeouts::SHORT));
        let shop = Shop::open(counted(&runs), around).await;
        let request = "POST /order HTTP/1.1\r\nhost: shop\r\nconnection: close\r\nidempotency-key: abc\r\n\
                       content-length: 5\r\n\r\nor";
        assert_refused(&shop.server.raw(request).await, 408, "body-unreadable");
        assert_eq!((runs.count(), shop.events.count("executing")), (0, 0));
        assert_ran(&shop.call().body("order").send().await, 1);
    }
}

mod paths {
    use tower::Layer;
    use tower_http::normalize_path::NormalizePathLayer;

    use super::*;

    fn layered(runs: &Runs) -> Router {
        counted(runs).layer(IdempotencyLayer::enforce(MemoryStorage::new()))
    }

    /// Around the router that is served, where it has to stand: both spellings are one operation.
    #[tokio::test]
    async fn normalized_outside_of_the_router_are_one_operation() {
        let runs = Runs::new();
        let trim = NormalizePathLayer::trim_trailing_slash();
        let server = Server::start_service(trim.layer(layered(&runs))).await;
        let call = |path| server.post(path).key("abc").send();
        assert_ran(&call("/order/").await, 1);
        for path in ["/order", "/order/", "/order//"] {
            assert_replay(&call(path).await, "order 1");
        }
        assert_ran(&call("/order?page=1").await, 2);
        assert_eq!(runs.count(), 2);
    }

    /// Behind another router that has seen the path already the original one counts, as with `nest`.
    #[tokio::test]
    async fn normalized_behind_a_router_are_as_many_as_were_sent() {
        let runs = Runs::new();
        let trim = NormalizePathLayer::trim_trailing_slash();
        let router = Router::new().fallback_service(trim.layer(layered(&runs)));
        let server = Server::start(router).await;
        let call = |path| server.post(path).key("abc").send();
        for (run, path) in (1..).zip(["/order/", "/order"]) {
            assert_ran(&call(path).await, run);
            assert_replay(&call(path).await, format!("order {run}"));
        }
    }
}

mod cors {
    use http::{HeaderValue, Method};
    use tower_http::cors::{AllowOrigin, CorsLayer};

    use super::*;

    const ORIGINS: [&str; 2] = ["https://one.example", "https://two.example"];

    fn cors() -> CorsLayer {
        let origins = ORIGINS.map(HeaderValue::from_static);
        CorsLayer::new()
            .allow_origin(AllowOrigin::list(origins))
            .allow_methods([Method::POST])
    }

    fn from(shop: &Shop, origin: &str) -> Call {
        shop.server.post("/order").header("origin", origin)
    }

    fn allowed(answer: &Answer) -> Option<&str> {
        answer.header("access-control-allow-origin")
    }

    #[tokio::test]
    async fn outside_refusals_and_replays_have_the_headers_of_their_own_request() {
        let [one, two] = ORIGINS;
        let runs = Runs::new();
        let shop = Shop::open(counted(&runs), |it| it.layer(cors())).await;
        let refused = from(&shop, one).send().await;
        assert_refused(&refused, 400, "missing-key");
        assert_eq!(allowed(&refused), Some(one));
        let first = from(&shop, one).key("abc").send().await;
        assert_eq!(allowed(&first), Some(one));
        let retry = from(&shop, two).key("abc").send().await;
        assert_replay(&retry, "order 1");
        assert_eq!(allowed(&retry), Some(two));
        assert_eq!(runs.count(), 1);
    }

    #[tokio::test]
    async fn inside_a_refusal_has_none_and_a_replay_those_of_the_first() {
        let [one, two] = ORIGINS;
        let runs = Runs::new();
        let shop = Shop::open(counted(&runs).layer(cors()), nothing).await;
        let refused = from(&shop, one).send().await;
        assert_refused(&refused, 400, "missing-key");
        assert_eq!(allowed(&refused), None);
        let first = from(&shop, one).key("abc").send().await;
        assert_eq!(allowed(&first), Some(one));
        let retry = from(&shop, two).key("abc").send().await;
        assert_replay(&retry, "order 1");
        assert_eq!(
            allowed(&retry),
            Some(one),
            "so its browser keeps it from it"
        );
        assert_eq!(runs.count(), 1);
    }

    #[tokio::test]
    async fn a_preflight_request_needs_no_key() {
        for is_inside in [true, false] {
            let runs = Runs::new();
            let shop = match is_inside {
                true => Shop::open(counted(&runs).layer(cors()), nothing).await,
                false => Shop::open(counted(&runs), |it| it.layer(cors())).await,
            };
            let preflight = shop.server.call(Method::OPTIONS, "/order");
            let preflight = preflight
                .header("origin", ORIGINS[0])
                .header("access-control-request-method", "POST")
                .send()
                .await;
            assert_eq!(preflight.code(), 200);
            assert_eq!(
                preflight.header("access-control-allow-methods"),
                Some("POST")
            );
            assert_eq!(runs.count(), 0);
        }
    }
}
