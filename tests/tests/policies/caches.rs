//! Named caches.

use axum::{Router, extract::State, routing::post};
use futures_util::FutureExt;
use idempotency_axum::{
    Config, EncodedKey, Entry, IdempotencyHandler, IdempotencyKey, IdempotencyLayer,
    KeyOnlyEncoder, KeyPolicy, MemoryStorage, MisuseKind,
};
use idempotency_tests::{Gate, Logs, Runs, Server};

use crate::{
    assert_ran, assert_refused, assert_replay, enforce, exempt, modes, rows::order, serve,
};

fn cached(name: &'static str) -> KeyPolicy {
    KeyPolicy::required().cache_name(name)
}

#[tokio::test]
async fn a_named_cache_protects() {
    for layer in modes() {
        let layer = layer().cache("orders", MemoryStorage::new());
        let handler = order.idempotency_key(cached("orders"));
        serve(layer, handler).await.assert_required().await;
    }
    for layer in modes() {
        let layer = layer().cache("orders", MemoryStorage::new());
        let handler = order.idempotency_key(KeyPolicy::optional().cache_name("orders"));
        serve(layer, handler).await.assert_optional().await;
    }
}

/// What a handler tells of its key.
async fn encoded(key: IdempotencyKey) -> String {
    key.encoded().to_string()
}

#[tokio::test]
async fn records_lie_in_the_named_cache_alone() {
    let [first, orders, refunds] = [(); 3].map(|()| MemoryStorage::new());
    let layer = IdempotencyLayer::enforce(first.clone())
        .cache("orders", orders.clone())
        .cache("refunds", refunds.clone());
    let router = Router::new()
        .route("/default", post(encoded))
        .route("/orders", post(encoded.idempotency_key(cached("orders"))))
        .layer(layer.clone());
    let server = Server::start(router).await;

    let key = server.post("/orders").key("abc").send().await;
    let key: EncodedKey = key.text().parse().unwrap();
    let completed = |entry| matches!(entry, Some(Entry::Completed(_)));
    assert!(completed(
        layer.engine_of("orders").unwrap().get(&key).await.unwrap()
    ));
    assert!(layer.engine().get(&key).await.unwrap().is_none());
    assert!(
        layer
            .engine_of("refunds")
            .unwrap()
            .get(&key)
            .await
            .unwrap()
            .is_none()
    );
    let records = || [&first, &orders, &refunds].map(MemoryStorage::records);
    assert_eq!(records(), [0, 1, 0]);

    let key = server.post("/default").key("abc").send().await;
    let key: EncodedKey = key.text().parse().unwrap();
    assert!(completed(layer.engine().get(&key).await.unwrap()));
    assert!(
        layer
            .engine_of("orders")
            .unwrap()
            .get(&key)
            .await
            .unwrap()
            .is_none()
    );
    assert_eq!(records(), [1, 1, 0]);
}

/// With this encoder a key is one operation in a cache, and each cache has its own.
#[tokio::test]
async fn one_key_in_every_cache() {
    let runs = Runs::new();
    let layer = enforce()
        .config(Config::default().encoder(KeyOnlyEncoder))
        .cache("a", MemoryStorage::new())
        .cache("b", MemoryStorage::new());
    let router = Router::new()
        .route("/default", post(order))
        .route("/a", post(order.idempotency_key(cached("a"))))
        .route("/b", post(order.idempotency_key(cached("b"))))
        .route("/b2", post(order.idempotency_key(cached("b"))))
        .layer(layer)
        .with_state(runs.clone());
    let server = Server::start(router).await;
    for (run, path) in [(1, "/default"), (2, "/a"), (3, "/b")] {
        assert_ran(&server.post(path).key("abc").send().await, run);
    }
    // The same cache, so the key is taken.
    let reused = server.post("/b2").key("abc").send().await;
    assert_refused(&reused, 422, "key-reused");
    for (run, path) in [(1, "/default"), (2, "/a"), (3, "/b")] {
        assert_replay(&server.post(path).key("abc").send().await, run);
    }
}

#[tokio::test]
async fn one_storage_under_two_names() {
    let storage = MemoryStorage::new();
    let layer = exempt()
        .cache("a", storage.clone())
        .cache("b", storage.clone());
    let handler = order.idempotency_key(cached("a"));
    let served = serve(layer.clone(), handler).await;
    assert_ran(&served.post(Some("abc")).await, 1);
    let other = serve(layer, order.idempotency_key(cached("b"))).await;
    assert_replay(&other.post(Some("abc")).await, 1);
}

#[tokio::test]
async fn remove_at_the_engine_of_a_cache_lets_it_run_again() {
    let layer = exempt().cache("orders", MemoryStorage::new());
    let handler = encoded.idempotency_key(cached("orders"));
    let served = serve(layer.clone(), handler).await;
    let first = served.post(Some("abc")).await;
    assert!(served.post(Some("abc")).await.is_replay());
    let key: EncodedKey = first.text().parse().unwrap();
    assert!(!layer.engine().remove(&key).await.unwrap());
    assert!(
        layer
            .engine_of("orders")
            .unwrap()
            .remove(&key)
            .await
            .unwrap()
    );
    let again = served.post(Some("abc")).await;
    assert!(!again.is_replay());
    assert_eq!(again.text(), first.text());
}

#[tokio::test]
async fn check_finds_an_unknown_name() {
    for layer in modes() {
        let layer = layer()
            .cache("orders", MemoryStorage::new())
            .cache("refunds", MemoryStorage::new());
        let router: Router = Router::new()
            .route("/plain", post(order))
            .route("/orders", post(order.idempotency_key(cached("oders"))))
            .layer(layer.clone())
            .with_state(Runs::new());
        let misuse = layer.check(router).unwrap_err();
        let MisuseKind::UnknownCache {
            handler: Some(handler),
            cache,
            known,
            ..
        } = misuse.kind()
        else {
            panic!("{misuse:?}")
        };
        assert!(handler.ends_with("order"), "{handler}");
        assert_eq!(cache, "oders");
        assert_eq!(*known, ["orders", "refunds"]);
        let message = misuse.to_string();
        for part in ["order", "\"oders\"", "orders, refunds"] {
            assert!(message.contains(part), "{message}");
        }
    }
}

#[tokio::test]
async fn check_of_a_router_whose_state_comes_later() {
    let layer = exempt();
    let router: Router<Runs> = Router::new()
        .route("/orders", post(order.idempotency_key(cached("oders"))))
        .layer(layer.clone());
    assert!(layer.check(router.with_state(Runs::new())).is_err());
}

#[tokio::test]
async fn check_finds_an_unknown_name_of_the_layer_itself() {
    let layer = exempt().policy(cached("oders"));
    let router = Router::new().route("/orders", post(|| async {}));
    let misuse = layer.check(router.layer(layer.clone())).unwrap_err();
    assert!(matches!(
        misuse.kind(),
        MisuseKind::UnknownCache { handler: None, .. }
    ));
}

#[tokio::test]
async fn without_check_the_route_of_an_unknown_name_answers_500() {
    for layer in modes() {
        let (logs, _guard) = Logs::install();
        let runs = Runs::new();
        let layer = layer().cache("orders", MemoryStorage::new());
        let router = Router::new()
            .route("/wrong", post(order.idempotency_key(cached("oders"))))
            .route("/right", post(order.idempotency_key(cached("orders"))))
            .layer(layer)
            .with_state(runs.clone());
        let server = Server::start(router).await;
        assert_eq!(server.post("/wrong").send().await.code(), 500);
        assert_eq!(server.post("/wrong").key("abc").send().await.code(), 500);
        assert_eq!(runs.count(), 0);
        let errors = logs.with(&["ERROR", "oders", "it has: orders"]);
        assert!(!errors.is_empty(), "{:?}", logs.lines());
        // The rest of the router works.
        assert_ran(&server.post("/right").key("abc").send().await, 1);
        assert_replay(&server.post("/right").key("abc").send().await, 1);
    }
}

#[tokio::test]
async fn an_unknown_cache_has_no_engine() {
    let layer = exempt().cache("orders", MemoryStorage::new());
    assert!(layer.engine_of("oders").is_none());
    assert!(layer.engine_of("orders").is_some());
}

#[tokio::test]
async fn drain_waits_for_the_operations_of_every_cache() {
    for path in ["/default", "/orders"] {
        let gate = Gate::new();
        let gated = |State(gate): State<Gate>| async move { gate.enter().await };
        let layer = enforce().cache("orders", MemoryStorage::new());
        let router = Router::new()
            .route("/default", post(gated))
            .route("/orders", post(gated.idempotency_key(cached("orders"))))
            .layer(layer.clone())
            .with_state(gate.clone());
        let server = Server::start(router).await;
        let running = server.post(path).key("abc").start();
        gate.arrived(1).await;

        let mut drained = Box::pin(layer.drain());
        assert_eq!((&mut drained).now_or_never(), None, "{path}");
        gate.open(1);
        drained.await;
        assert_eq!(layer.engine().running(), 0);
        assert_eq!(layer.engine_of("orders").unwrap().running(), 0);
        assert_eq!(running.await.unwrap().code(), 200);
    }
}
