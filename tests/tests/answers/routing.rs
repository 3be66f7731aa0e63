//! The row *405, and 404 where no route matched*: a router's answer says nothing about the operation, and another release may have
//! the route.

use std::convert::Infallible;

use axum::{
    Router,
    body::Body,
    extract::{FromRequestParts, Request, State},
    http::{Method, StatusCode, request::Parts},
    response::Response,
    routing::{MethodRouter, any, get, post},
};
use idempotency_axum::{
    IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage, idempotency_key,
};
use idempotency_tests::{Answer, Call, Runs, Server};
use tower::{Layer, ServiceBuilder, service_fn};

use crate::{Column, Shop, Work, assert_ran, order};

columns!(
    path_of_a_later_release,
    method_of_a_later_release,
    fallbacks_without_a_policy,
    fallbacks_with_a_policy,
    rejection_in_a_fallback_with_an_attribute,
    own_404_of_a_handler_on_its_route,
    own_405_of_a_handler,
    behind_a_wall,
    of_a_service_without_routes,
);

type NotHere = (StatusCode, String);

/// What a handler answers that looks for something and does not find it.
async fn missing(State(work): State<Work>) -> NotHere {
    let run = work.runs.next();
    (StatusCode::NOT_FOUND, format!("order {run}"))
}

async fn wrong_method(State(work): State<Work>) -> NotHere {
    let run = work.runs.next();
    (StatusCode::METHOD_NOT_ALLOWED, format!("order {run}"))
}

mod annotated {
    use super::*;

    #[idempotency_key]
    pub async fn missing(state: State<Work>) -> NotHere {
        super::missing(state).await
    }

    #[idempotency_key]
    pub async fn wrong_method(state: State<Work>) -> NotHere {
        super::wrong_method(state).await
    }

    #[idempotency_key]
    pub async fn of_a_tenant(_: Tenant, state: State<Work>) -> NotHere {
        super::missing(state).await
    }
}

/// An extractor that finds nobody.
struct Tenant;

impl<S: Sync> FromRequestParts<S> for Tenant {
    type Rejection = StatusCode;

    async fn from_request_parts(_: &mut Parts, _: &S) -> Result<Self, StatusCode> {
        Err(StatusCode::NOT_FOUND)
    }
}

/// Sends `call` twice.
async fn twice(call: Call) -> (Answer, Answer) {
    let first = call.clone().send().await;
    (first, call.send().await)
}

/// That a retry of `call` runs, and gets the same status.
async fn assert_not_recorded(column: Column, status: u16, call: Call) {
    let (first, retry) = twice(call).await;
    assert_eq!((first.code(), retry.code()), (status, status));
    assert!(!column.is_replay(&first) && !column.is_replay(&retry));
}

/// That the answer of run number `run` is recorded where the column stores its status, and returns the number of the next run.
async fn assert_as_its_status_says(column: Column, status: u16, call: Call, run: usize) -> usize {
    let (first, retry) = twice(call).await;
    assert_eq!(first.code(), status);
    assert_eq!(first.text(), format!("order {run}"));
    assert!(!column.is_replay(&first));
    assert_eq!(retry.code(), status);
    assert_eq!(column.is_replay(&retry), column != Column::Default);
    match column {
        Column::Default => run + 2,
        Column::Ietf | Column::Stripe => {
            assert_eq!(retry.body, first.body);
            run + 1
        }
    }
}

/// Two releases on one storage: the retry of what `old` answers runs in `new`.
async fn assert_runs_in_the_new_release(
    column: Column,
    old: Router<Work>,
    new: Router<Work>,
    status: u16,
) {
    let memory = MemoryStorage::new();
    let old = Shop::with(memory.clone(), column.config(), old).await;
    let new = Shop::with(memory.clone(), column.config(), new).await;
    let call = |shop: &Shop| shop.server.post("/v2/orders").key("abc");
    assert_not_recorded(column, status, call(&old)).await;
    assert_eq!((memory.claims(), memory.records()), (0, 0));
    assert_ran(&call(&new).send().await, 1);
    // By now it has an answer, and the old release gives that.
    column.assert_replay(&call(&old).send().await, 201, "order 1");
}

async fn path_of_a_later_release(column: Column) {
    let new = || Router::new().route("/v2/orders", post(order));
    assert_runs_in_the_new_release(column, Router::new(), new(), 404).await;
    let old = Router::new().nest("/v2", Router::new().route("/payments", post(order)));
    assert_runs_in_the_new_release(column, old, new(), 404).await;
}

async fn method_of_a_later_release(column: Column) {
    let new = || Router::new().route("/v2/orders", post(order));
    let old = Router::new().route("/v2/orders", get(order));
    assert_runs_in_the_new_release(column, old, new(), 405).await;
    let old = Router::new().nest("/v2", Router::new().route("/orders", get(order)));
    assert_runs_in_the_new_release(column, old, new(), 405).await;
    let methods: MethodRouter = get(async || "an order");
    let old = Router::new().route_service("/v2/orders", methods);
    assert_runs_in_the_new_release(column, old, new(), 405).await;
}

/// Nobody says that such a handler is more than an error page.
async fn fallbacks_without_a_policy(column: Column) {
    let routes = Router::new()
        .route("/v2/orders", get(order))
        .fallback(missing)
        .method_not_allowed_fallback(wrong_method);
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    let post = |path| shop.server.post(path).key("abc");
    assert_not_recorded(column, 404, post("/v3/orders")).await;
    assert_not_recorded(column, 405, post("/v2/orders")).await;
    assert_eq!(shop.runs(), 4);

    let nested = Router::new()
        .route("/payments", post_order())
        .fallback(missing);
    let routes = Router::new().nest("/v2", nested);
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    assert_not_recorded(column, 404, shop.server.post("/v2/orders").key("abc")).await;
    assert_eq!(shop.runs(), 2);
}

fn post_order() -> MethodRouter<Work> {
    post(order)
}

async fn fallbacks_with_a_policy(column: Column) {
    let required = KeyPolicy::required;
    let by_attribute = Router::new()
        .route("/v2/orders", get(order))
        .fallback(annotated::missing)
        .method_not_allowed_fallback(annotated::wrong_method);
    let by_combinator = Router::new()
        .route("/v2/orders", get(order))
        .fallback(missing.idempotency_key(required()))
        .method_not_allowed_fallback(wrong_method.idempotency_key(required()));
    let by_both = Router::new()
        .route("/v2/orders", get(order))
        .fallback(annotated::missing.idempotency_key(required()))
        .method_not_allowed_fallback(annotated::wrong_method.idempotency_key(required()));
    for routes in [by_attribute, by_combinator, by_both] {
        let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
        // Stripe's keys are not tied to a path.
        let post = |path, key: &str| shop.server.post(path).key(key);
        let next = assert_as_its_status_says(column, 404, post("/v3/orders", "a"), 1).await;
        assert_as_its_status_says(column, 405, post("/v2/orders", "b"), next).await;
    }
}

/// It was not entered, so nothing ran.
async fn rejection_in_a_fallback_with_an_attribute(column: Column) {
    for routes in [
        Router::new().fallback(annotated::of_a_tenant),
        Router::new().fallback(annotated::of_a_tenant.idempotency_key(KeyPolicy::required())),
    ] {
        let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
        assert_not_recorded(column, 404, shop.server.post("/v3/orders").key("abc")).await;
        assert_eq!(shop.runs(), 0);
    }
}

async fn own_404_of_a_handler_on_its_route(column: Column) {
    let work = Work::default();
    let routes = Router::new()
        .route("/routed", post(missing))
        .route("/annotated", post(annotated::missing))
        .nest("/nested", Router::new().route("/order", post(missing)))
        .route_service("/service", post(missing).with_state(work.clone()));
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    let post = |path, key: &str| shop.server.post(path).key(key);
    let next = assert_as_its_status_says(column, 404, post("/routed", "a"), 1).await;
    let next = assert_as_its_status_says(column, 404, post("/annotated", "b"), next).await;
    assert_as_its_status_says(column, 404, post("/nested/order", "c"), next).await;
    // It has a count of its own.
    assert_as_its_status_says(column, 404, post("/service", "d"), 1).await;

    // A layer inside the wall sees the route.
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(column.config());
    let inner = Router::new().route("/order", post_missing()).layer(layer);
    let app = Router::new().nest_service("/api", inner.with_state(Work::default()));
    let server = Server::start(app).await;
    let call = server.post("/api/order").key("abc");
    assert_as_its_status_says(column, 404, call, 1).await;
}

fn post_missing() -> MethodRouter<Work> {
    post(missing)
}

/// Without a policy it can't be told from a router's.
async fn own_405_of_a_handler(column: Column) {
    let routes = Router::new()
        .route("/plain", any(wrong_method))
        .route("/annotated", any(annotated::wrong_method));
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    let call = |path, key: &str| shop.server.call(Method::PUT, path).key(key);
    assert_not_recorded(column, 405, call("/plain", "a")).await;
    assert_as_its_status_says(column, 405, call("/annotated", "b"), 3).await;
}

/// The layer sees no route there, so only a handler with a policy can say that it was one.
async fn behind_a_wall(column: Column) {
    let inner = || {
        Router::new()
            .route("/plain", post(missing))
            .route("/annotated", post(annotated::missing))
            .with_state(Work::default())
    };
    let layer = || IdempotencyLayer::enforce(MemoryStorage::new()).config(column.config());
    let fixed = || layer().policy(KeyPolicy::required());
    for app in [
        Router::new().nest_service("/api", inner()).layer(layer()),
        Router::new().nest_service("/api", inner()).layer(fixed()),
        Router::new().fallback_service(
            ServiceBuilder::new()
                .layer(layer())
                .service(Router::new().nest("/api", inner())),
        ),
    ] {
        let server = Server::start(app).await;
        let post = |path, key: &str| server.post(path).key(key);
        assert_not_recorded(column, 404, post("/api/plain", "a")).await;
        assert_not_recorded(column, 404, post("/api/absent", "b")).await;
        assert_not_recorded(column, 405, server.call(Method::PUT, "/api/plain").key("c")).await;
        assert_as_its_status_says(column, 404, post("/api/annotated", "d"), 3).await;
    }
}

async fn of_a_service_without_routes(column: Column) {
    let runs = Runs::new();
    let service = {
        let runs = runs.clone();
        service_fn(move |request: Request| {
            let run = runs.next();
            async move {
                let status = request.uri().path().trim_start_matches('/');
                let mut response = Response::new(Body::from(format!("order {run}")));
                *response.status_mut() = StatusCode::from_bytes(status.as_bytes()).unwrap();
                Ok::<_, Infallible>(response)
            }
        })
    };
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(column.config());
    let service = layer.policy(KeyPolicy::required()).layer(service);
    let server = Server::start_service(service).await;
    for status in [404, 405] {
        let call = server.post(&format!("/{status}")).key(status.to_string());
        assert_not_recorded(column, status, call).await;
    }
    assert_as_its_status_says(column, 400, server.post("/400").key("400"), 5).await;
}
