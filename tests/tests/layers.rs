//! Wherever axum lets a layer stand, it learns the policy of the handler, in both modes.

use std::time::Duration;

use axum::{
    BoxError, Extension, Router,
    error_handling::HandleErrorLayer,
    extract::{Request, State},
    handler::Handler,
    middleware::{self, Next},
    response::Response,
    routing::{self, MethodRouter},
};
use http::{Method, StatusCode};
use idempotency_axum::{
    EncodedKey, Entry, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy,
    MemoryStorage, idempotency_exempt, idempotency_key,
};
use tower::{
    Layer, ServiceBuilder,
    limit::ConcurrencyLimitLayer,
    load_shed::LoadShedLayer,
    util::{BoxCloneSyncServiceLayer, option_layer},
};
use tower_http::{
    catch_panic::CatchPanicLayer, compression::CompressionLayer, timeout::TimeoutLayer,
    trace::TraceLayer,
};

use self::layers_support::{ask, post, run};

mod layers_support;

/// A handler of the suite: what it wants, and how it says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sample {
    /// It says nothing.
    Plain,
    Exempt(By),
    Optional(By),
    Required(By),
    Cached(By),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Combinator,
    Attribute,
}

use By::{Attribute, Combinator};

async fn run_with_key(key: IdempotencyKey) -> String {
    run(Some(key)).await
}

mod attributes {
    use super::*;

    #[idempotency_exempt]
    pub async fn exempt(key: Option<IdempotencyKey>) -> String {
        run(key).await
    }

    #[idempotency_key(optional)]
    pub async fn optional(key: Option<IdempotencyKey>) -> String {
        run(key).await
    }

    #[idempotency_key]
    pub async fn required(key: IdempotencyKey) -> String {
        run_with_key(key).await
    }

    #[idempotency_key(cache_name = "orders")]
    pub async fn cached(key: IdempotencyKey) -> String {
        run_with_key(key).await
    }
}

fn optional() -> KeyPolicy {
    KeyPolicy::optional()
}

fn cached() -> KeyPolicy {
    KeyPolicy::required().cache_name("orders")
}

/// Makes something of the handler of a sample. Each has a type of its own, so a function can't take them.
macro_rules! with_handler {
    ($sample:expr, |$handler:ident| $made:expr) => {{
        macro_rules! made {
            ($of:expr) => {{
                let $handler = $of;
                $made
            }};
        }
        match $sample {
            Sample::Plain => made!(run),
            Sample::Exempt(Combinator) => made!(run.idempotency_exempt()),
            Sample::Exempt(Attribute) => made!(attributes::exempt),
            Sample::Optional(Combinator) => made!(run.idempotency_key(optional())),
            Sample::Optional(Attribute) => made!(attributes::optional),
            Sample::Required(Combinator) => {
                made!(run_with_key.idempotency_key(KeyPolicy::required()))
            }
            Sample::Required(Attribute) => made!(attributes::required),
            Sample::Cached(Combinator) => made!(run_with_key.idempotency_key(cached())),
            Sample::Cached(Attribute) => made!(attributes::cached),
        }
    }};
}

impl Sample {
    const ALL: [Self; 9] = [
        Self::Plain,
        Self::Exempt(Combinator),
        Self::Exempt(Attribute),
        Self::Optional(Combinator),
        Self::Optional(Attribute),
        Self::Required(Combinator),
        Self::Required(Attribute),
        Self::Cached(Combinator),
        Self::Cached(Attribute),
    ];

    fn path(self) -> &'static str {
        match self {
            Self::Plain => "/plain",
            Self::Exempt(Combinator) => "/exempt",
            Self::Exempt(Attribute) => "/attribute/exempt",
            Self::Optional(Combinator) => "/optional",
            Self::Optional(Attribute) => "/attribute/optional",
            Self::Required(Combinator) => "/required",
            Self::Required(Attribute) => "/attribute/required",
            Self::Cached(Combinator) => "/cached",
            Self::Cached(Attribute) => "/attribute/cached",
        }
    }

    fn methods<S: Clone + Send + Sync + 'static>(self) -> MethodRouter<S> {
        with_handler!(self, |handler| routing::post(handler))
    }
}

/// All samples, each on its path.
fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    routes_of(Sample::methods)
}

fn routes_of<S: Clone + Send + Sync + 'static>(
    methods: impl Fn(Sample) -> MethodRouter<S>,
) -> Router<S> {
    let samples = Sample::ALL.into_iter();
    samples.fold(Router::new(), |router, sample| {
        router.route(sample.path(), methods(sample))
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Enforce,
    Exempt,
}

/// A layer of `mode` and the router that it stands on.
struct Case {
    mode: Mode,
    layer: IdempotencyLayer,
    app: Router,
}

impl Case {
    fn new(mode: Mode, place: impl FnOnce(IdempotencyLayer) -> Router) -> Self {
        let layer = match mode {
            Mode::Enforce => IdempotencyLayer::enforce(MemoryStorage::new()),
            Mode::Exempt => IdempotencyLayer::exempt(MemoryStorage::new()),
        };
        let layer = layer.cache("orders", MemoryStorage::new());
        let app = place(layer.clone());
        Self { mode, layer, app }
    }

    /// The handler at `path` is treated as `sample` wants it.
    async fn holds(&self, sample: Sample, path: &str) {
        match (sample, self.mode) {
            (Sample::Exempt(_), _) | (Sample::Plain, Mode::Exempt) => self.runs_always(path).await,
            (Sample::Required(_), _) | (Sample::Plain, Mode::Enforce) => {
                self.needs_a_key(path).await;
                self.is_protected(path, false).await;
            }
            (Sample::Optional(_), _) => {
                self.runs_without_a_key(path).await;
                self.is_protected(path, false).await;
            }
            (Sample::Cached(_), _) => {
                self.needs_a_key(path).await;
                self.is_protected(path, true).await;
            }
        }
    }

    async fn runs_always(&self, path: &str) {
        self.runs_without_a_key(path).await;
        let first = post(&self.app, path, Some("key")).await;
        let second = post(&self.app, path, Some("key")).await;
        assert_eq!((first.code(), second.code()), (200, 200), "{path}");
        assert!(first.text().ends_with("unprotected"), "{path}");
        assert_ne!(first.body, second.body, "{path} runs each time");
    }

    async fn runs_without_a_key(&self, path: &str) {
        let first = post(&self.app, path, None).await;
        let second = post(&self.app, path, None).await;
        assert_eq!((first.code(), second.code()), (200, 200), "{path}");
        assert!(first.text().ends_with("unprotected"), "{path}");
        assert_ne!(first.body, second.body, "{path} runs each time");
    }

    async fn needs_a_key(&self, path: &str) {
        let refused = post(&self.app, path, None).await;
        assert_eq!(refused.code(), 400, "{path}");
        assert_eq!(refused.problem().as_deref(), Some("missing-key"), "{path}");
    }

    async fn is_protected(&self, path: &str, named_cache: bool) {
        let first = post(&self.app, path, Some("key")).await;
        let retry = post(&self.app, path, Some("key")).await;
        assert_eq!((first.code(), first.is_replay()), (200, false), "{path}");
        assert_eq!((retry.code(), retry.is_replay()), (409, true), "{path}");
        assert_eq!(first.body, retry.body, "{path}");

        let (_, encoded) = first.text().split_once(' ').expect("a run and its key");
        let encoded: EncodedKey = encoded.parse().expect("the handler saw its key");
        let default = self.layer.engine().get(&encoded).await.unwrap();
        let named = self
            .layer
            .engine_of("orders")
            .unwrap()
            .get(&encoded)
            .await
            .unwrap();
        let is_record = |entry| matches!(entry, Some(Entry::Completed(_)));
        assert_eq!(is_record(default), !named_cache, "{path}");
        assert_eq!(is_record(named), named_cache, "{path}");
    }
}

/// Puts the layer on a router with handlers of all kinds, and tries each of them in both modes.
async fn every_policy_is_found(place: impl Fn(IdempotencyLayer) -> Router) {
    every_policy_is_found_under("", place).await;
}

async fn every_policy_is_found_under(prefix: &str, place: impl Fn(IdempotencyLayer) -> Router) {
    for mode in [Mode::Enforce, Mode::Exempt] {
        let case = Case::new(mode, &place);
        for sample in Sample::ALL {
            case.holds(sample, &format!("{prefix}{}", sample.path()))
                .await;
        }
    }
}

#[tokio::test]
async fn router_layer() {
    every_policy_is_found(|layer| routes().layer(layer)).await;
}

#[tokio::test]
async fn router_route_layer() {
    every_policy_is_found(|layer| routes().route_layer(layer)).await;
}

#[tokio::test]
async fn with_route_layer_unmatched_paths_stay_404() {
    let case = Case::new(Mode::Enforce, |layer| routes().route_layer(layer));
    assert_eq!(post(&case.app, "/nowhere", None).await.code(), 404);
}

#[tokio::test]
async fn with_route_layer_of_a_method_router_wrong_methods_stay_405() {
    let case = Case::new(Mode::Enforce, |layer| {
        routes_of(|sample| sample.methods().route_layer(layer.clone()))
    });
    let wrong = ask(&case.app, Method::DELETE, "/required", None).await;
    assert_eq!((wrong.code(), wrong.header("allow")), (405, Some("POST")));
}

#[tokio::test]
async fn route_layer_of_a_router_also_wraps_the_405_of_its_routes() {
    // axum's, and a layer can't tell it from a handler that says nothing: `enforce` wants a key before it may answer.
    let case = Case::new(Mode::Enforce, |layer| routes().route_layer(layer));
    let wrong = ask(&case.app, Method::DELETE, "/required", None).await;
    assert_eq!(wrong.code(), 400);
    let wrong = ask(&case.app, Method::DELETE, "/required", Some("key")).await;
    assert_eq!((wrong.code(), wrong.header("allow")), (405, Some("POST")));

    let case = Case::new(Mode::Exempt, |layer| routes().route_layer(layer));
    let wrong = ask(&case.app, Method::DELETE, "/required", None).await;
    assert_eq!((wrong.code(), wrong.header("allow")), (405, Some("POST")));
}

#[tokio::test]
async fn method_router_layer() {
    every_policy_is_found(|layer| routes_of(|sample| sample.methods().layer(layer.clone()))).await;
}

#[tokio::test]
async fn method_router_route_layer() {
    every_policy_is_found(|layer| routes_of(|sample| sample.methods().route_layer(layer.clone())))
        .await;
}

#[tokio::test]
async fn handler_layer() {
    every_policy_is_found(|layer| {
        routes_of(|sample| {
            with_handler!(sample, |handler| routing::post(
                handler.layer(layer.clone())
            ))
        })
    })
    .await;
}

#[tokio::test]
async fn methods_of_one_path_keep_their_own_policies() {
    for mode in [Mode::Enforce, Mode::Exempt] {
        let case = Case::new(mode, |layer| {
            let methods = routing::put(run.idempotency_exempt())
                .post(run.idempotency_key(KeyPolicy::required()))
                .delete(run.idempotency_key(optional()))
                .get(run.idempotency_key(KeyPolicy::required()));
            Router::new().route("/order", methods).layer(layer)
        });
        let ask = async |method| ask(&case.app, method, "/order", None).await.code();
        assert_eq!(ask(Method::PUT).await, 200);
        assert_eq!(ask(Method::POST).await, 400);
        assert_eq!(ask(Method::DELETE).await, 200);
        assert_eq!(ask(Method::GET).await, 200, "a safe method needs no key");
    }
}

#[tokio::test]
async fn around_nested_routes() {
    every_policy_is_found_under("/api/v1", |layer| {
        let v1 = Router::new().nest("/v1", routes());
        Router::new().nest("/api", v1).layer(layer)
    })
    .await;
}

#[tokio::test]
async fn inside_a_nested_router() {
    every_policy_is_found_under("/api", |layer| {
        Router::new().nest("/api", routes().layer(layer))
    })
    .await;
}

#[tokio::test]
async fn merged_before() {
    every_policy_is_found(|layer| {
        let other = Router::new().route("/other", routing::get(run));
        other.merge(routes()).layer(layer)
    })
    .await;
}

#[tokio::test]
async fn merged_after() {
    every_policy_is_found(|layer| {
        let other = Router::new().route("/other", routing::post(run));
        other.merge(routes().layer(layer))
    })
    .await;
}

#[tokio::test]
async fn fallback_of_a_router() {
    for mode in [Mode::Enforce, Mode::Exempt] {
        for sample in Sample::ALL {
            let case = Case::new(mode, |layer| {
                with_handler!(sample, |handler| Router::new().fallback(handler)).layer(layer)
            });
            case.holds(sample, "/anywhere").await;
        }
    }
}

#[tokio::test]
async fn fallback_of_a_nested_router() {
    every_policy_is_found(|layer| {
        let samples = Sample::ALL.into_iter();
        let router = samples.fold(Router::new(), |router, sample| {
            let nested = with_handler!(sample, |handler| Router::new().fallback(handler));
            router.nest(sample.path(), nested)
        });
        router.layer(layer)
    })
    .await;
}

#[tokio::test]
async fn fallback_of_a_method_router() {
    every_policy_is_found(|layer| {
        routes_of(|sample| {
            let other = routing::get(async || "for GET");
            with_handler!(sample, |handler| other.fallback(handler))
        })
        .layer(layer)
    })
    .await;
}

#[tokio::test]
async fn fallback_for_methods_that_are_not_allowed() {
    for mode in [Mode::Enforce, Mode::Exempt] {
        for sample in Sample::ALL {
            let case = Case::new(mode, |layer| {
                let router = Router::new().route("/order", routing::get(async || "for GET"));
                with_handler!(sample, |handler| router
                    .method_not_allowed_fallback(handler))
                .layer(layer)
            });
            case.holds(sample, "/order").await;
        }
    }
}

#[tokio::test]
async fn state_given_before() {
    every_policy_is_found(|layer| routes::<u32>().with_state(7).layer(layer)).await;
}

#[tokio::test]
async fn state_given_after() {
    every_policy_is_found(|layer| routes::<u32>().layer(layer).with_state(7)).await;
}

#[tokio::test]
async fn state_given_before_and_after() {
    every_policy_is_found(|layer| {
        let inner = routes::<&'static str>().with_state::<u32>("inner");
        inner.layer(layer).with_state(7)
    })
    .await;
}

#[tokio::test]
async fn service_builder_with_tracing_and_a_timeout() {
    every_policy_is_found(|layer| {
        routes().layer(
            ServiceBuilder::new()
                .layer(TraceLayer::new_for_http())
                .layer(layer)
                .layer(TimeoutLayer::with_status_code(
                    StatusCode::REQUEST_TIMEOUT,
                    Duration::from_secs(60),
                )),
        )
    })
    .await;
}

/// On either side of ours, as a layer of the router and within one stack.
macro_rules! both_sides {
    ($($name:ident: $other:expr;)*) => {$(
        mod $name {
            use super::*;

            #[tokio::test]
            async fn outside() {
                every_policy_is_found(|layer| routes().layer(layer).layer($other)).await;
            }

            #[tokio::test]
            async fn inside() {
                every_policy_is_found(|layer| routes().layer($other).layer(layer)).await;
            }

            #[tokio::test]
            async fn inside_one_stack() {
                every_policy_is_found(|layer| {
                    routes().layer(ServiceBuilder::new().layer(layer).layer($other))
                })
                .await;
            }

            #[tokio::test]
            async fn outside_in_one_stack() {
                every_policy_is_found(|layer| {
                    routes().layer(ServiceBuilder::new().layer($other).layer(layer))
                })
                .await;
            }
        }
    )*};
}

both_sides! {
    trace: TraceLayer::new_for_http();
    timeout: TimeoutLayer::with_status_code(StatusCode::REQUEST_TIMEOUT, Duration::from_secs(60));
    compression: CompressionLayer::new();
    catch_panic: CatchPanicLayer::new();
    extension: Extension("shared");
    from_fn: middleware::from_fn(pass);
    from_fn_with_state: middleware::from_fn_with_state(7, pass_with_state);
    from_fn_that_spawns: middleware::from_fn(spawn);
    map_request: middleware::map_request(async |request: Request| request);
    handle_error: ServiceBuilder::new()
        .layer(HandleErrorLayer::new(overloaded))
        .layer(LoadShedLayer::new());
    a_layer_that_is_switched_off: option_layer(None::<IdempotencyLayer>);
}

async fn pass(request: Request, next: Next) -> Response {
    next.run(request).await
}

async fn pass_with_state(State(_): State<u32>, request: Request, next: Next) -> Response {
    next.run(request).await
}

/// Runs the rest of the stack on another task.
async fn spawn(request: Request, next: Next) -> Response {
    tokio::spawn(next.run(request))
        .await
        .expect("the handler does not panic")
}

async fn overloaded(_: BoxError) -> StatusCode {
    StatusCode::SERVICE_UNAVAILABLE
}

#[tokio::test]
async fn directly_around_services_that_can_fail() {
    every_policy_is_found(|layer| {
        routes().layer(
            ServiceBuilder::new()
                .layer(HandleErrorLayer::new(overloaded))
                .layer(layer)
                .layer(LoadShedLayer::new()),
        )
    })
    .await;
}

#[tokio::test]
async fn directly_around_a_service_that_must_be_ready() {
    // It panics if a clone of it is called that was not polled ready.
    every_policy_is_found(|layer| {
        routes().layer(
            ServiceBuilder::new()
                .layer(layer)
                .layer(ConcurrencyLimitLayer::new(1)),
        )
    })
    .await;
}

#[tokio::test]
async fn optional_layer() {
    every_policy_is_found(|layer| routes().layer(option_layer(Some(layer)))).await;
}

#[tokio::test]
async fn boxed_layer() {
    every_policy_is_found(|layer| routes().layer(BoxCloneSyncServiceLayer::new(layer))).await;
}

#[tokio::test]
async fn layers_as_a_tuple() {
    every_policy_is_found(|layer| routes().layer((TraceLayer::new_for_http(), layer))).await;
}

#[tokio::test]
async fn around_one_handler_as_a_service() {
    for mode in [Mode::Enforce, Mode::Exempt] {
        for sample in Sample::ALL {
            let case = Case::new(mode, |layer| {
                with_handler!(sample, |handler| {
                    let service = layer.layer(handler.with_state(()));
                    Router::new().route_service("/order", service)
                })
            });
            case.holds(sample, "/order").await;
        }
    }
}

#[tokio::test]
async fn the_outermost_policy_of_a_handler_wins() {
    for mode in [Mode::Enforce, Mode::Exempt] {
        let case = Case::new(mode, |layer| {
            let exempt = run
                .idempotency_key(KeyPolicy::required())
                .idempotency_exempt();
            let required = run
                .idempotency_exempt()
                .idempotency_key(optional())
                .idempotency_key(KeyPolicy::required());
            let over_attribute = attributes::exempt.idempotency_key(optional());
            Router::new()
                .route("/exempt", routing::post(exempt))
                .route("/required", routing::post(required))
                .route("/optional", routing::post(over_attribute))
                .layer(layer)
        });
        case.holds(Sample::Exempt(Combinator), "/exempt").await;
        case.holds(Sample::Required(Combinator), "/required").await;
        case.holds(Sample::Optional(Combinator), "/optional").await;
    }
}

#[tokio::test]
async fn a_handler_of_any_extractors_keeps_its_policy() {
    for mode in [Mode::Enforce, Mode::Exempt] {
        let case = Case::new(mode, |layer| {
            let with_state = async |State(seven): State<u32>, key: IdempotencyKey, body: String| {
                assert_eq!((seven, body.as_str()), (7, ""));
                run(Some(key)).await
            };
            Router::new()
                .route(
                    "/order",
                    routing::post(with_state.idempotency_key(cached())),
                )
                .layer(layer)
                .with_state(7)
        });
        case.holds(Sample::Cached(Combinator), "/order").await;
    }
}
