//! From the layer to the listening server: `check`, what `layer()` survives, and `axum::serve`, which makes the layers of a
//! router without state again for each connection.

use std::{
    collections::HashSet,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, handler::Handler, routing};
use idempotency_axum::{
    Config, IdempotencyHandler, IdempotencyLayer, KeyPolicy, LockPolicy, MemoryStorage, MisuseKind,
    idempotency_key,
};
use idempotency_tests::{Answer, Events, Gate, Logs, Runs, Server};
use tokio::task::JoinSet;
use tower::{Layer, ServiceBuilder};

use self::layers_support::{ask, post, run};

mod layers_support;

async fn pay() -> String {
    run(None).await
}

#[idempotency_key(cache_name = "payments")]
async fn pay_by_attribute() -> String {
    run(None).await
}

fn required() -> KeyPolicy {
    KeyPolicy::required()
}

fn layer() -> IdempotencyLayer {
    IdempotencyLayer::enforce(MemoryStorage::new())
        .cache("orders", MemoryStorage::new())
        .cache("refunds", MemoryStorage::new())
}

/// One route whose handler wants a cache that [`layer`] does not have, among others.
fn misused() -> Router {
    let order = run.idempotency_key(required().cache_name("orders"));
    let payment = pay.idempotency_key(required().cache_name("payments"));
    Router::new()
        .route("/order", routing::post(order))
        .route("/payment", routing::get(run).post(payment))
        .route("/search", routing::post(run.idempotency_exempt()))
}

mod unknown_cache {
    use super::*;

    #[tokio::test]
    async fn its_route_answers_500_and_the_log_names_handler_and_caches() {
        let (logs, _guard) = Logs::install();
        let exempt = IdempotencyLayer::exempt(MemoryStorage::new())
            .cache("orders", MemoryStorage::new())
            .cache("refunds", MemoryStorage::new());
        for layer in [layer(), exempt] {
            let app: Router = misused().layer(layer).with_state(());
            for key in [None, Some("key")] {
                let before = logs.lines().len();
                assert_eq!(post(&app, "/payment", key).await.code(), 500);
                let lines = logs.lines();
                let [line] = &lines[before..] else {
                    panic!("not one line but {:?}", &lines[before..]);
                };
                let cure = ".cache(\"payments\"";
                for part in ["ERROR", "::pay", "\"payments\"", "orders, refunds", cure] {
                    assert!(line.contains(part), "no {part:?} in {line}");
                }
            }
            assert_eq!(post(&app, "/order", None).await.code(), 400);
            assert_eq!(post(&app, "/order", Some("key")).await.code(), 200);
            assert!(post(&app, "/order", Some("key")).await.is_replay());
            assert_eq!(post(&app, "/search", None).await.code(), 200);
        }
    }

    #[tokio::test]
    async fn a_layer_without_named_caches_says_so() {
        let (logs, _guard) = Logs::install();
        let app = Router::new().route("/payment", routing::post(pay_by_attribute));
        let app = app.layer(IdempotencyLayer::enforce(MemoryStorage::new()));
        assert_eq!(post(&app, "/payment", Some("key")).await.code(), 500);
        let handler = "::pay_by_attribute";
        let errors = logs.with(&["ERROR", handler, "\"payments\"", "no named caches"]);
        assert_ne!(errors, [""; 0], "{:?}", logs.lines());
    }
}

mod check {
    use super::*;

    #[tokio::test]
    async fn names_the_handler_the_unknown_cache_and_the_known_ones() {
        named(misused(), "::pay");
        let by_attribute = routing::post(pay_by_attribute);
        named(
            Router::new().route("/payment", by_attribute),
            "::pay_by_attribute",
        );
    }

    fn named(router: Router, name: &str) {
        let layer = layer();
        let misuse = layer.check(router.layer(layer.clone())).unwrap_err();
        let MisuseKind::UnknownCache {
            handler,
            cache,
            known,
            ..
        } = misuse.kind()
        else {
            panic!("another misuse: {misuse}");
        };
        let handler = handler.as_deref().expect("the handler's name");
        assert!(handler.ends_with(name), "{handler}");
        assert_eq!(cache, "payments");
        assert_eq!(known, &["orders", "refunds"]);
        let message = misuse.to_string();
        for part in [
            handler,
            "\"payments\"",
            "orders, refunds",
            ".cache(\"payments\"",
        ] {
            assert!(message.contains(part), "no {part:?} in {message}");
        }
    }

    #[tokio::test]
    async fn sees_nested_merged_and_fallback_routes() {
        let layer = layer();
        let unknown = || pay.idempotency_key(required().cache_name("payments"));
        for router in [
            Router::new().nest("/api", misused()),
            Router::new().merge(misused()),
            Router::new().fallback(unknown()),
            Router::new().route("/pay", routing::get(run).fallback(unknown())),
            Router::new().nest_service("/api", misused().layer(layer.clone()).with_state::<()>(())),
        ] {
            let misuse = layer.check(router.layer(layer.clone())).unwrap_err();
            assert!(misuse.to_string().contains("payments"), "{misuse}");
        }
    }

    #[tokio::test]
    async fn sees_a_fixed_policy() {
        let layer = layer().policy(required().cache_name("payments"));
        let router = Router::new().route("/plain", routing::post(run));
        let misuse = layer.check(router.layer(layer.clone())).unwrap_err();
        let MisuseKind::UnknownCache { handler, cache, .. } = misuse.kind() else {
            panic!("another misuse: {misuse}");
        };
        assert_eq!((handler.as_deref(), cache.as_str()), (None, "payments"));
    }

    #[tokio::test]
    async fn warns_of_a_layer_that_it_can_not_see_on_the_router() {
        let (logs, _guard) = Logs::install();
        let layer = layer();
        let router = Router::new().route("/plain", routing::post(run));
        assert!(layer.check(router.clone()).is_ok());
        // A setter makes another layer.
        assert!(
            layer
                .check(router.layer(layer.clone().config(Config::ietf())))
                .is_ok()
        );
        // axum makes this one for each request.
        let on_handler = routing::post(run.layer(layer.clone()));
        assert!(
            layer
                .check(Router::new().route("/plain", on_handler))
                .is_ok()
        );
        let warned = logs.with(&["WARN", "`check` saw no route", ".layer("]);
        assert_eq!(warned.len(), 3, "{:?}", logs.lines());

        let layered = Router::new()
            .route("/plain", routing::post(run))
            .layer(layer.clone());
        assert!(layer.check(layered).is_ok());
        assert_eq!(logs.with(&["`check` saw no route"]).len(), 3);
    }

    #[tokio::test]
    async fn gives_back_a_router_that_can_be_served() {
        let layer = layer().cache("payments", MemoryStorage::new());
        let router = layer.check(misused().layer(layer.clone()));
        let server = Server::start(router.expect("every cache is known")).await;
        assert_eq!(server.post("/order").send().await.code(), 400);
        for path in ["/order", "/payment"] {
            assert_eq!(server.post(path).key("key").send().await.code(), 200);
            assert!(server.post(path).key("key").send().await.is_replay());
        }
        assert_eq!(server.post("/search").send().await.code(), 200);
    }

    /// Where a handler that uses keys has no layer of ours.
    fn without_layer(layer: &IdempotencyLayer) -> Vec<(&'static str, Router)> {
        let order = || routing::post(run.idempotency_key(required()));
        let layered = || {
            Router::new()
                .route("/plain", routing::post(run))
                .layer(layer.clone())
        };
        let optional = routing::post(run.idempotency_key(KeyPolicy::optional()));
        vec![
            ("added after the layer", layered().route("/order", order())),
            ("optional", layered().route("/order", optional)),
            (
                "merged",
                layered().merge(Router::new().route("/order", order())),
            ),
            (
                "nested",
                layered().nest("/api", Router::new().route("/order", order())),
            ),
            (
                "a fallback",
                layered().fallback(run.idempotency_key(required())),
            ),
            (
                "another layer around it",
                Router::new()
                    .route("/order", order())
                    .layer(tower::limit::ConcurrencyLimitLayer::new(1))
                    .merge(layered()),
            ),
            (
                "one method of a route",
                layered().route("/order", routing::get(run).merge(order())),
            ),
        ]
    }

    #[tokio::test]
    async fn names_a_handler_that_no_layer_wraps() {
        let layer = layer();
        for (place, router) in without_layer(&layer) {
            let misuse = layer.check(router).expect_err(place);
            let MisuseKind::NoLayer { handler, .. } = misuse.kind() else {
                panic!("{place}: another misuse: {misuse}");
            };
            assert!(handler.ends_with("::run"), "{place}: {handler}");
            let message = misuse.to_string();
            let asks = match place {
                "optional" => "takes an optional key",
                _ => "requires a key",
            };
            for part in [handler, asks, "before `.layer(…)`"] {
                assert!(message.contains(part), "no {part:?} in {message}");
            }
        }
        let by_attribute = Router::new()
            .route("/plain", routing::post(run))
            .layer(layer.clone())
            .route("/payment", routing::post(pay_by_attribute));
        let misuse = layer.check(by_attribute).unwrap_err();
        assert!(
            misuse.to_string().contains("::pay_by_attribute"),
            "{misuse}"
        );
    }

    #[tokio::test]
    async fn finds_no_fault_with_handlers_that_have_a_layer() {
        let layer = layer();
        let order = || run.idempotency_key(required());
        for (place, router) in [
            (
                "layer",
                Router::new()
                    .route("/order", routing::post(order()))
                    .layer(layer.clone()),
            ),
            (
                "route_layer",
                Router::new()
                    .route("/order", routing::post(order()))
                    .route_layer(layer.clone()),
            ),
            (
                "method router",
                Router::new().route("/order", routing::post(order()).layer(layer.clone())),
            ),
            (
                "handler",
                Router::new().route("/order", routing::post(order().layer(layer.clone()))),
            ),
            (
                "a stack on the handler",
                Router::new().route(
                    "/order",
                    routing::post(
                        order().layer(
                            ServiceBuilder::new()
                                .layer(tower::limit::ConcurrencyLimitLayer::new(1))
                                .layer(layer.clone()),
                        ),
                    ),
                ),
            ),
            (
                "nested",
                Router::new().nest(
                    "/api",
                    Router::new()
                        .route("/order", routing::post(order()))
                        .layer(layer.clone()),
                ),
            ),
            (
                "a layer around both",
                Router::new()
                    .nest(
                        "/api",
                        Router::new().route("/order", routing::post(order())),
                    )
                    .fallback(order())
                    .layer(layer.clone()),
            ),
            (
                "exempt",
                Router::new().route("/order", routing::post(run.idempotency_exempt())),
            ),
            (
                "another layer of ours",
                Router::new()
                    .route("/order", routing::post(order()))
                    .layer(layer.clone().config(Config::ietf())),
            ),
        ] {
            if let Err(misuse) = layer.check(router) {
                panic!("{place}: {misuse}");
            }
        }
    }

    #[tokio::test]
    async fn does_not_see_behind_nest_service() {
        let layer = layer();
        let inner = Router::new().route("/order", routing::post(run.idempotency_key(required())));
        let router = Router::new()
            .route("/plain", routing::post(run))
            .layer(layer.clone())
            .nest_service("/api", inner.with_state::<()>(()));
        let app = layer.check(router).expect("a clone does not show it");
        assert_eq!(post(&app, "/api/order", Some("key")).await.code(), 500);
    }

    #[tokio::test]
    async fn a_layer_with_state_after_it_is_seen() {
        let layer = layer();
        let router = Router::<u32>::new().route("/plain", routing::post(run));
        let router = router.layer(layer.clone()).with_state(7);
        let _ = layer.check(router).expect("it wraps a route");
    }
}

mod layer_never_panics {
    use super::*;

    /// Its clone panics while it is armed.
    struct Fragile(Arc<AtomicBool>);

    impl Clone for Fragile {
        fn clone(&self) -> Self {
            assert!(!self.0.load(Ordering::Relaxed), "a Clone that panics");
            Self(self.0.clone())
        }
    }

    #[tokio::test]
    async fn a_clone_that_panics_poisons_nothing() {
        let layer = layer();
        let armed = Arc::new(AtomicBool::new(true));
        let services = (
            run.idempotency_exempt(),
            Fragile(armed.clone()),
            run.idempotency_key(required()),
        );
        for _ in 0..2 {
            let made = catch_unwind(AssertUnwindSafe(|| layer.layer(services.clone())));
            assert!(made.is_err(), "the panic is the service's own");
        }
        // The same thread and the same layer: a later route hears nothing of what was announced before the panic.
        let app = Router::new()
            .route("/plain", routing::post(run))
            .route("/exempt", routing::post(run.idempotency_exempt()))
            .route("/required", routing::post(run.idempotency_key(required())))
            .layer(layer.clone());
        assert_eq!(post(&app, "/plain", None).await.code(), 400);
        assert_eq!(post(&app, "/exempt", None).await.code(), 200);
        assert_eq!(post(&app, "/required", None).await.code(), 400);
        assert_eq!(post(&app, "/required", Some("key")).await.code(), 200);

        armed.store(false, Ordering::Relaxed);
        let _ = layer.layer(services);
    }

    #[test]
    fn around_anything_that_can_be_cloned() {
        let layer = layer();
        let exempt = run.idempotency_exempt();
        let unknown = run.idempotency_key(required().cache_name("payments"));
        let _ = layer.layer(());
        let _ = layer.layer(layer.clone());
        let _ = layer.layer((exempt.clone(), unknown.clone()));
        let _ = layer.layer(vec![unknown.clone(); 3]);
        let _ = layer.layer(layer.layer(unknown.clone()));
        let _ = layer.layer((layer.layer(exempt.clone()), exempt.clone(), unknown.clone()));
        let _ = ServiceBuilder::new()
            .layer(layer.clone())
            .service(misused());
        let _ = layer
            .clone()
            .policy(required().cache_name("nope"))
            .layer(unknown);
    }

    #[tokio::test]
    async fn on_many_threads_at_once() {
        let layer = layer();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let _: Router = misused().layer(layer.clone()).with_state(());
                    }
                });
            }
        });
        let misuse = layer.check(misused().layer(layer.clone())).unwrap_err();
        assert!(misuse.to_string().contains("payments"));
    }

    #[tokio::test]
    async fn a_clone_that_makes_a_layer_of_its_own() {
        struct Nested(IdempotencyLayer);
        impl Clone for Nested {
            fn clone(&self) -> Self {
                let _ = self.0.layer(run.idempotency_exempt());
                Self(self.0.clone())
            }
        }
        let nested = Nested(layer());
        let handler = move || {
            let _nested = &nested;
            run(None)
        };
        let app = Router::new()
            .route("/plain", routing::post(handler.clone()))
            .route("/exempt", routing::post(handler.idempotency_exempt()))
            .layer(layer());
        assert_eq!(post(&app, "/plain", None).await.code(), 400);
        assert_eq!(post(&app, "/exempt", None).await.code(), 200);
    }
}

mod served {
    use super::*;

    #[tokio::test]
    async fn an_unknown_cache_never_stops_the_server() {
        let router = || misused().layer(layer());
        for router in [router(), router().with_state(()), on_handlers()] {
            let server = Server::start(router).await;
            for round in 0..3 {
                // Each call has a connection of its own.
                for key in [None, Some("key")] {
                    let mut call = server.post("/payment");
                    if let Some(key) = key {
                        call = call.key(key);
                    }
                    assert_eq!(call.send().await.code(), 500);
                }
                let order = server.post("/order").key("key").send().await;
                assert_eq!(order.is_replay(), round > 0);
                assert_eq!(server.post("/order").send().await.code(), 400);
                assert_eq!(server.post("/search").send().await.code(), 200);
            }
        }
    }

    /// As [`misused`], with the layer on each handler.
    fn on_handlers() -> Router {
        let layer = layer();
        let order = run.idempotency_key(required().cache_name("orders"));
        let payment = pay.idempotency_key(required().cache_name("payments"));
        let search = run.idempotency_exempt();
        Router::new()
            .route("/order", routing::post(order.layer(layer.clone())))
            .route("/payment", routing::post(payment.layer(layer.clone())))
            .route("/search", routing::post(search.layer(layer)))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn connections_to_a_router_without_state_share_one_set_of_waiters() {
        const CLIENTS: usize = 1000;
        let events = Events::new();
        let lock = LockPolicy::default().timeout(Duration::from_secs(600));
        let config = Config::ietf().lock(lock).observer(events.clone());
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
        let (runs, gate) = (Runs::new(), Gate::new());
        let handler = {
            let (runs, gate) = (runs.clone(), gate.clone());
            async move || {
                let run = runs.next();
                gate.enter().await;
                format!("order {run}")
            }
        };
        // No `with_state`: `axum::serve` makes the layer's services again for each connection.
        let router = Router::new().route("/order", routing::post(handler));
        let server = Server::start(router.layer(layer.clone())).await;

        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(server.post("/order").key("key").send());
        }
        events.until("waiting", CLIENTS - 1).await;
        assert_eq!(layer.engine().waiting(), CLIENTS - 1);
        assert_eq!(layer.engine().running(), 1);
        gate.open(CLIENTS);

        let answers: Vec<Answer> = clients.join_all().await;
        assert_eq!(runs.count(), 1);
        assert!(answers.iter().all(|answer| answer.code() == 200));
        let replays = answers.iter().filter(|answer| answer.is_replay()).count();
        assert_eq!(replays, CLIENTS - 1);
        let bodies: HashSet<_> = answers.iter().map(|answer| &answer.body).collect();
        assert_eq!(bodies.len(), 1);
        let running = layer.engine().running();
        assert_eq!((layer.engine().waiting(), running), (0, 0));
    }

    #[tokio::test]
    async fn a_safe_method_of_a_misused_path_is_not_its_handler_s() {
        let app = misused().layer(layer());
        let get = ask(&app, http::Method::GET, "/payment", None).await;
        assert_eq!(get.code(), 200, "GET has a handler without a policy");
    }
}
