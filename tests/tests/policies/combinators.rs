//! Combinators on everything that is a handler, and which of several policies holds.

use std::marker::PhantomData;

use axum::{
    Json, Router,
    extract::{Path, Query, State},
    handler::Handler,
    http::StatusCode,
    routing::post,
};
use idempotency_axum::{IdempotencyHandler, KeyPolicy, MemoryStorage, idempotency_key};
use idempotency_tests::{Runs, Server};
use serde::{Deserialize, de::DeserializeOwned};
use tower_http::trace::TraceLayer;

use crate::{Served, assert_refused, enforce, exempt, modes, optional, rows::order, serve};

#[tokio::test]
async fn on_a_closure() {
    let closure = |State(runs): State<Runs>| async move {
        (StatusCode::CREATED, format!("order {}", runs.next()))
    };
    for layer in modes() {
        let required = closure.idempotency_key(KeyPolicy::required());
        serve(layer(), required).await.assert_required().await;
        let handler = closure.idempotency_key(optional());
        serve(layer(), handler).await.assert_optional().await;
        serve(layer(), closure.idempotency_exempt())
            .await
            .assert_exempt()
            .await;
    }
}

#[tokio::test]
async fn on_a_closure_that_captures() {
    let name = "order".to_owned();
    let closure = move |State(runs): State<Runs>| async move {
        (StatusCode::CREATED, format!("{name} {}", runs.next()))
    };
    let handler = closure.idempotency_key(KeyPolicy::required());
    serve(exempt(), handler).await.assert_required().await;
}

#[tokio::test]
async fn on_an_async_closure() {
    let closure =
        async |State(runs): State<Runs>| (StatusCode::CREATED, format!("order {}", runs.next()));
    let handler = closure.idempotency_key(KeyPolicy::required());
    serve(exempt(), handler).await.assert_required().await;
}

struct Orders<T>(PhantomData<T>);

impl<T: Send + 'static> Orders<T> {
    async fn create(State(runs): State<Runs>) -> (StatusCode, String) {
        (StatusCode::CREATED, format!("order {}", runs.next()))
    }
}

#[tokio::test]
async fn on_an_associated_function() {
    for layer in modes() {
        let create = Orders::<u8>::create;
        let required = create.idempotency_key(KeyPolicy::required());
        serve(layer(), required).await.assert_required().await;
        let handler = create.idempotency_key(optional());
        serve(layer(), handler).await.assert_optional().await;
        serve(layer(), create.idempotency_exempt())
            .await
            .assert_exempt()
            .await;
    }
}

trait Item: DeserializeOwned + Send + 'static {
    fn name(&self) -> String;
}

#[derive(Deserialize)]
struct Book {
    title: String,
}

impl Item for Book {
    fn name(&self) -> String {
        self.title.clone()
    }
}

async fn create<T: Item>(
    State(runs): State<Runs>,
    Path(shop): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
    Json(item): Json<T>,
) -> (StatusCode, String) {
    let text = format!("{} {shop} {query:?} {}", runs.next(), item.name());
    (StatusCode::CREATED, text)
}

#[tokio::test]
async fn on_a_generic_function_with_extractors() {
    for layer in modes() {
        let runs = Runs::new();
        let handler = create::<Book>.idempotency_key(KeyPolicy::required());
        let router = Router::new()
            .route("/{shop}/books", post(handler))
            .layer(layer())
            .with_state(runs.clone());
        let server = Server::start(router).await;
        let call = || server.post("/north/books?a=b").json(r#"{"title":"Emma"}"#);
        assert_eq!(call().send().await.code(), 400);
        let first = call().key("abc").send().await;
        assert_eq!(
            (first.code(), first.text()),
            (201, r#"1 north [("a", "b")] Emma"#)
        );
        let retry = call().key("abc").send().await;
        assert!(retry.is_replay());
        assert_eq!(retry.text(), first.text());
        assert_eq!(runs.count(), 1);
    }
}

#[tokio::test]
async fn on_a_handler_with_a_layer_of_its_own() {
    let handler = Handler::layer(order, TraceLayer::new_for_http());
    let handler = handler.idempotency_key(KeyPolicy::required());
    serve(exempt(), handler).await.assert_required().await;
}

#[tokio::test]
async fn outermost_required_over_exempt() {
    for layer in modes() {
        let handler = order
            .idempotency_exempt()
            .idempotency_key(KeyPolicy::required());
        serve(layer(), handler).await.assert_required().await;
    }
}

#[tokio::test]
async fn outermost_exempt_over_required() {
    for layer in modes() {
        let handler = order
            .idempotency_key(KeyPolicy::required())
            .idempotency_exempt();
        serve(layer(), handler).await.assert_exempt().await;
    }
}

#[tokio::test]
async fn outermost_optional_over_required() {
    for layer in modes() {
        let handler = order
            .idempotency_key(KeyPolicy::required())
            .idempotency_key(optional());
        serve(layer(), handler).await.assert_optional().await;
    }
}

#[tokio::test]
async fn outermost_required_over_optional() {
    for layer in modes() {
        let handler = order
            .idempotency_key(optional())
            .idempotency_key(KeyPolicy::required());
        serve(layer(), handler).await.assert_required().await;
    }
}

#[tokio::test]
async fn outermost_of_three() {
    for layer in modes() {
        let handler = order
            .idempotency_key(optional())
            .idempotency_key(KeyPolicy::required())
            .idempotency_exempt();
        serve(layer(), handler).await.assert_exempt().await;
    }
}

/// The inner one's cache is not asked for, so that it does not exist does not matter.
#[tokio::test]
async fn outermost_cache() {
    let layer = exempt().cache("outer", MemoryStorage::new());
    let outer = KeyPolicy::required().cache_name("outer");
    let handler = order
        .idempotency_key(KeyPolicy::required().cache_name("inner"))
        .idempotency_key(outer);
    let router: Router<Runs> = Router::new().route("/orders", post(handler.clone()));
    let router = router.layer(layer.clone()).with_state(Runs::new());
    let _ = layer.check(router).unwrap();
    serve(layer, handler).await.assert_required().await;
}

#[idempotency_key]
async fn annotated(State(runs): State<Runs>) -> (StatusCode, String) {
    order(State(runs)).await
}

#[idempotency_axum::idempotency_exempt]
async fn annotated_exempt(State(runs): State<Runs>) -> (StatusCode, String) {
    order(State(runs)).await
}

#[tokio::test]
async fn over_an_attribute() {
    for layer in modes() {
        let handler = annotated.idempotency_exempt();
        serve(layer(), handler).await.assert_exempt().await;
        let handler = annotated.idempotency_key(optional());
        serve(layer(), handler).await.assert_optional().await;
        let handler = annotated_exempt.idempotency_key(KeyPolicy::required());
        serve(layer(), handler).await.assert_required().await;
        let handler = annotated_exempt.idempotency_key(optional());
        serve(layer(), handler).await.assert_optional().await;
    }
}

/// The combinators don't change what they are called on.
#[tokio::test]
async fn the_same_handler_under_several_policies() {
    for layer in modes() {
        let runs = Runs::new();
        let router = Router::new()
            .route(
                "/required",
                post(order.idempotency_key(KeyPolicy::required())),
            )
            .route("/exempt", post(order.idempotency_exempt()))
            .route("/optional", post(order.idempotency_key(optional())))
            .layer(layer())
            .with_state(runs.clone());
        let server = Server::start(router).await;
        for (path, status) in [("/required", 400), ("/exempt", 201), ("/optional", 201)] {
            assert_eq!(server.post(path).send().await.code(), status, "{path}");
        }
        for (path, is_replay) in [("/required", true), ("/exempt", false), ("/optional", true)] {
            server.post(path).key("abc").send().await;
            let retry = server.post(path).key("abc").send().await;
            assert_eq!(retry.is_replay(), is_replay, "{path}");
        }
    }
}

#[tokio::test]
async fn methods_of_one_path_under_several_policies() {
    let router = Router::new()
        .route(
            "/orders",
            post(order.idempotency_key(KeyPolicy::required()))
                .put(order.idempotency_exempt())
                .delete(order),
        )
        .with_state(Runs::new());
    for (layer, delete) in [(enforce(), 400), (exempt(), 201)] {
        let server = Server::start(router.clone().layer(layer)).await;
        for (method, status) in [("POST", 400), ("PUT", 201), ("DELETE", delete)] {
            let method = method.parse().unwrap();
            let answer = server.call(method, "/orders").send().await;
            assert_eq!(answer.code(), status);
        }
    }
}

/// `or` of axum-extra takes functions, so the policy goes around both.
#[tokio::test]
async fn on_handlers_that_or_combines() {
    use axum_extra::handler::HandlerCallWithExtractors as _;

    async fn by_number(Path(number): Path<u32>) -> (StatusCode, String) {
        (StatusCode::CREATED, format!("number {number}"))
    }
    async fn by_name(Path(name): Path<String>) -> (StatusCode, String) {
        (StatusCode::CREATED, format!("name {name}"))
    }
    for layer in modes() {
        let handler = by_number.or(by_name).idempotency_key(KeyPolicy::required());
        let router = Router::new().route("/{id}", post(handler)).layer(layer());
        let server = Server::start(router).await;
        for (path, text) in [("/7", "number 7"), ("/x", "name x")] {
            assert_refused(&server.post(path).send().await, 400, "missing-key");
            let first = server.post(path).key("abc").send().await;
            assert_eq!((first.code(), first.text()), (201, text));
            let retry = server.post(path).key("abc").send().await;
            assert_eq!((retry.is_replay(), retry.text()), (true, text));
        }
    }
}

/// What is generated for an OpenAPI document may want the function itself: then the layer around its route has the policy.
#[tokio::test]
async fn a_layer_around_a_method_router_has_the_policy() {
    for layer in modes() {
        let layer = layer();
        let routes = post(order).layer(layer.clone().policy(KeyPolicy::required()));
        let runs = Runs::new();
        let router = Router::new()
            .route("/orders", routes)
            .layer(layer)
            .with_state(runs.clone());
        let server = Server::start(router).await;
        Served { server, runs }.assert_required().await;
    }
}
