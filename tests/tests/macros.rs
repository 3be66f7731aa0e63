//! The attributes: what they work with (`macros/pass`), and what they make of a handler. What they refuse is in
//! `idempotency-macros/tests`.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Path, State},
    handler::Handler,
    http::{HeaderName, Method, Request, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{any, post},
};
use http_body_util::BodyExt;
use idempotency_axum::{
    Config, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy, ManualIdempotency,
    MemoryStorage, Scope, StoreOn, idempotency_exempt, idempotency_key,
};
use idempotency_tests::Logs;
use tower::ServiceExt;

/// Programs that must compile and run. They are modules of this test, and no cases of trybuild's, which would build all
/// dependencies once more for them.
#[path = "macros/pass"]
mod pass {
    pub(crate) mod arguments;
    pub(crate) mod cfg;
    pub(crate) mod debug_handler;
    pub(crate) mod forbidden_lints;
    pub(crate) mod hygiene;
    pub(crate) mod instrument;
    pub(crate) mod lints;
    pub(crate) mod manual;
    pub(crate) mod module_of_the_same_name;
    pub(crate) mod parameters;
    pub(crate) mod patterns;
    pub(crate) mod places;
    pub(crate) mod raw_identifier;
    pub(crate) mod results;
    pub(crate) mod state;
    pub(crate) mod utoipa;

    pub(crate) const ALL: [(&str, fn()); 16] = [
        ("arguments", arguments::main),
        ("cfg", cfg::main),
        ("debug_handler", debug_handler::main),
        ("forbidden_lints", forbidden_lints::main),
        ("hygiene", hygiene::main),
        ("instrument", instrument::main),
        ("lints", lints::main),
        ("manual", manual::main),
        ("module_of_the_same_name", module_of_the_same_name::main),
        ("parameters", parameters::main),
        ("patterns", patterns::main),
        ("places", places::main),
        ("raw_identifier", raw_identifier::main),
        ("results", results::main),
        ("state", state::main),
        ("utoipa", utoipa::main),
    ];
}

#[test]
fn what_works_runs() {
    for (name, program) in pass::ALL {
        eprintln!("{name}");
        program();
    }
}

#[test]
fn every_program_that_must_work_is_run() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/macros/pass");
    let mut there: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().path())
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    there.sort();
    assert_eq!(there, pass::ALL.map(|(name, _)| name));
}

fn request(method: Method, uri: &str, key: Option<&str>, body: &str) -> Request<Body> {
    let mut request = Request::builder()
        .method(method)
        .uri(uri)
        .header(header::CONTENT_TYPE, "application/json");
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    request.body(body.to_owned().into()).unwrap()
}

async fn send(app: &Router, uri: &str, key: Option<&str>, body: &str) -> (StatusCode, String) {
    let request = request(Method::POST, uri, key, body);
    read(app.clone().oneshot(request).await.unwrap()).await
}

async fn read(response: Response) -> (StatusCode, String) {
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[derive(Clone, Default)]
struct Counter(std::sync::Arc<AtomicUsize>);

impl Counter {
    fn next(&self) -> String {
        (self.0.fetch_add(1, Ordering::Relaxed) + 1).to_string()
    }

    fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

#[idempotency_key]
async fn required(State(counter): State<Counter>, _body: String) -> String {
    counter.next()
}

#[idempotency_key(optional)]
async fn optional(State(counter): State<Counter>) -> impl IntoResponse {
    counter.next()
}

#[idempotency_exempt]
async fn exempt(State(counter): State<Counter>) -> String {
    counter.next()
}

#[idempotency_key(cache_name = "orders", ttl = "250ms")]
async fn in_a_cache(State(counter): State<Counter>) -> String {
    counter.next()
}

#[idempotency_key]
async fn manual(State(counter): State<Counter>, manual: Option<ManualIdempotency>) -> String {
    let exists = manual.is_some_and(|manual| manual.exists());
    format!("{} {exists}", counter.next())
}

fn app(layer: IdempotencyLayer) -> (Router, Counter) {
    let counter = Counter::default();
    let router = Router::new()
        .route("/required", post(required))
        .route("/optional", post(optional))
        .route("/exempt", post(exempt))
        .route("/cache", post(in_a_cache))
        .route("/manual", post(manual))
        .layer(layer)
        .with_state(counter.clone());
    (router, counter)
}

#[tokio::test]
async fn the_layer_does_what_the_attributes_say_in_both_modes() {
    for new in [IdempotencyLayer::enforce, IdempotencyLayer::exempt] {
        let (default, orders) = (MemoryStorage::new(), MemoryStorage::new());
        let (app, counter) = app(new(default.clone()).cache("orders", orders.clone()));

        assert_eq!(
            send(&app, "/required", None, "").await.0,
            StatusCode::BAD_REQUEST
        );
        assert_eq!(
            send(&app, "/cache", None, "").await.0,
            StatusCode::BAD_REQUEST
        );
        assert_eq!(counter.count(), 0);

        assert_eq!(send(&app, "/required", Some("a"), "").await.1, "1");
        assert_eq!(send(&app, "/required", Some("a"), "").await.1, "1");
        assert_eq!(send(&app, "/required", Some("b"), "").await.1, "2");

        assert_eq!(send(&app, "/optional", None, "").await.1, "3");
        assert_eq!(send(&app, "/optional", None, "").await.1, "4");
        assert_eq!(send(&app, "/optional", Some("a"), "").await.1, "5");
        assert_eq!(send(&app, "/optional", Some("a"), "").await.1, "5");

        assert_eq!(send(&app, "/exempt", None, "").await.1, "6");
        assert_eq!(send(&app, "/exempt", Some("a"), "").await.1, "7");
        assert_eq!(send(&app, "/exempt", Some("a"), "").await.1, "8");

        assert_eq!(orders.records(), 0);
        assert_eq!(send(&app, "/cache", Some("a"), "").await.1, "9");
        assert_eq!((default.records(), orders.records()), (3, 1));

        assert_eq!(send(&app, "/manual", Some("a"), "").await.1, "10 false");
        assert_eq!(send(&app, "/manual", Some("a"), "").await.1, "11 true");
    }
}

/// The policy and the name that the log of a handler without a layer shows.
async fn logged<M: 'static>(handler: impl Handler<M, Counter>) -> String {
    let (logs, _guard) = Logs::install();
    let app = Router::new()
        .route("/", post(handler))
        .with_state(Counter::default());
    let (status, _) = send(&app, "/", None, "").await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    logs.lines().concat()
}

#[tokio::test(flavor = "current_thread")]
async fn the_policy_is_the_one_that_the_arguments_and_the_parameters_give() {
    #[idempotency_key(ttl = "24h", cache_name = "orders", optional = true)]
    async fn all_arguments() {}

    #[idempotency_key(
        header = "X-GitHub-Delivery",
        max_request_body = "2MiB",
        store_on = StoreOn::all,
        scope = Scope::none
    )]
    async fn terms() {}

    #[idempotency_key(ttl = "90", optional = false)]
    async fn seconds() {}

    type Previous = Option<ManualIdempotency>;

    #[idempotency_key]
    async fn alias(_uri: Uri, _previous: Previous, _request: Request<Body>) {}

    #[idempotency_key(optional)]
    async fn no_needs(_key: Option<IdempotencyKey>) {}

    let orders = || KeyPolicy::required().cache_name("orders");
    for (line, policy) in [
        (logged(required).await, KeyPolicy::required()),
        (logged(optional).await, KeyPolicy::optional()),
        (
            logged(in_a_cache).await,
            orders().ttl(Duration::from_millis(250)),
        ),
        (logged(manual).await, KeyPolicy::required().manual()),
        (
            logged(all_arguments).await,
            KeyPolicy::optional()
                .cache_name("orders")
                .ttl(Duration::from_secs(86_400)),
        ),
        (
            logged(terms).await,
            KeyPolicy::required()
                .header(HeaderName::from_static("x-github-delivery"))
                .max_request_body(2 << 20)
                .store_on(StoreOn::all())
                .scope(Scope::none()),
        ),
        (
            logged(seconds).await,
            KeyPolicy::required().ttl(Duration::from_secs(90)),
        ),
        (logged(alias).await, KeyPolicy::required().manual()),
        (logged(no_needs).await, KeyPolicy::optional()),
    ] {
        assert!(
            line.contains(&format!("policy={policy:?} ")),
            "{line}\n{policy:?}"
        );
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_handler_is_called_as_in_the_source() {
    #[tracing::instrument(skip_all)]
    #[idempotency_key]
    #[axum::debug_handler(state = Counter)]
    async fn with_attributes() {}

    assert_eq!(format!("{required:?}"), "macros::required");
    assert!(
        logged(required)
            .await
            .contains("handler=\"macros::required\"")
    );
    assert!(
        logged(with_attributes)
            .await
            .contains("macros::with_attributes\"")
    );
}

#[tokio::test]
async fn a_handler_takes_as_many_parameters_as_in_axum() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let app = pass::parameters::app().layer(layer);
    assert_eq!(send(&app, "/0", Some("a"), "body").await.1, "");
    for count in 1..=16 {
        let (status, body) = send(&app, &format!("/{count}"), Some("a"), "body").await;
        assert_eq!(status, StatusCode::OK);
        let expected: String = (1..count)
            .map(|index| {
                if index % 2 == 1 {
                    format!("/{count}")
                } else {
                    "POST".into()
                }
            })
            .chain(["body".into()])
            .collect();
        assert_eq!(body, expected);
    }
}

#[tokio::test]
async fn extractors_run_in_order_and_reject_as_in_axum() {
    async fn plain(method: Method, Path(id): Path<u8>, Json(names): Json<Vec<String>>) -> String {
        format!("{method} {id} {}", names.join(","))
    }

    #[idempotency_exempt]
    async fn annotated(
        method: Method,
        Path(id): Path<u8>,
        Json(names): Json<Vec<String>>,
    ) -> String {
        plain(method, Path(id), Json(names)).await
    }

    let app = Router::new()
        .route("/plain/{id}", post(plain))
        .route("/annotated/{id}", post(annotated));
    for (id, body) in [
        ("7", r#"["a","b"]"#),
        ("7", "{}"),
        ("7", "no json"),
        ("x", "no json"),
    ] {
        let plain = send(&app, &format!("/plain/{id}"), None, body).await;
        assert_eq!(
            send(&app, &format!("/annotated/{id}"), None, body).await,
            plain
        );
    }
}

#[tokio::test]
async fn the_layer_can_tell_a_rejection_from_the_answer_of_the_handler() {
    #[idempotency_key]
    async fn refuses(State(counter): State<Counter>, Json(_): Json<Vec<u8>>) -> impl IntoResponse {
        (StatusCode::BAD_REQUEST, counter.next())
    }

    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::stripe());
    let app = Router::new()
        .route("/", post(refuses))
        .layer(layer)
        .with_state(Counter::default());
    // The extractor's answer is not recorded, so that the key can be used again.
    let rejection = send(&app, "/", Some("a"), "no json").await;
    assert_eq!(rejection.0, StatusCode::BAD_REQUEST);
    // The handler's is.
    for _ in 0..2 {
        let answer = send(&app, "/", Some("a"), "[1]").await;
        assert_eq!(answer, (StatusCode::BAD_REQUEST, "1".into()));
    }
}

#[tokio::test]
async fn a_handler_is_called_directly_by_invoke() {
    let counter = Counter::default();
    let answer = required.invoke(State(counter.clone()), String::new());
    assert_eq!(answer.await, "1");
    assert_eq!(
        read(optional.invoke(State(counter)).await.into_response())
            .await
            .1,
        "2"
    );

    // Its future is as sendable as the function's.
    fn is_send_and_static<T: Send + 'static>(_: &T) {}
    is_send_and_static(&exempt.invoke(State(Counter::default())));
}

#[tokio::test]
async fn a_handler_is_one_for_all_that_takes_handlers() {
    #[idempotency_key]
    async fn handler(uri: Uri) -> String {
        uri.to_string()
    }

    let layer = IdempotencyLayer::exempt(MemoryStorage::new());
    let app = Router::new()
        .route("/any", any(handler))
        .route("/layered", post(handler.layer(layer.clone())))
        .route("/combined", post(handler.idempotency_exempt()))
        .nest(
            "/nested",
            Router::new().route("/{id}", post(handler).get(handler)),
        )
        .fallback(handler)
        .layer(layer);
    for uri in ["/any", "/layered", "/nested/1", "/of/no/route"] {
        assert_eq!(
            send(&app, uri, None, "").await.0,
            StatusCode::BAD_REQUEST,
            "{uri}"
        );
        assert_eq!(
            send(&app, uri, Some("a"), "").await.0,
            StatusCode::OK,
            "{uri}"
        );
    }
    assert_eq!(send(&app, "/combined", None, "").await.1, "/combined");
    let get = request(Method::GET, "/nested/1", None, "");
    assert_eq!(
        read(app.oneshot(get).await.unwrap()).await.0,
        StatusCode::OK
    );
}
