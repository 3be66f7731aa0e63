//! The table *Modes* of the behaviour document, and what holds in every mode: safe methods, placements, custom methods.

use axum::{
    Router,
    http::Method,
    routing::{any, get, post},
};
use idempotency_axum::{
    Config, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy, MemoryStorage,
};
use idempotency_tests::{Logs, Protocol, Runs, Server};

fn enforce() -> IdempotencyLayer {
    IdempotencyLayer::enforce(MemoryStorage::new())
}

fn exempt() -> IdempotencyLayer {
    IdempotencyLayer::exempt(MemoryStorage::new())
}

/// `/orders` with every method, whose handler has no policy and counts its runs.
async fn serve(layer: IdempotencyLayer, runs: &Runs) -> Server {
    let router = Router::new().route("/orders", any(runs.handler()));
    Server::start(router.layer(layer)).await
}

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

fn safe_methods() -> [Method; 4] {
    [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE]
}

#[tokio::test]
async fn enforce_requires_a_key() {
    let runs = Runs::new();
    let server = serve(enforce(), &runs).await;
    for method in unsafe_methods() {
        let answer = server.call(method, "/orders").send().await;
        assert_eq!(answer.code(), 400);
        assert_eq!(answer.problem().as_deref(), Some("missing-key"));
    }
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn enforce_protects() {
    let runs = Runs::new();
    let server = serve(enforce(), &runs).await;
    for (number, method) in (1..).zip(unsafe_methods()) {
        let call = || server.call(method.clone(), "/orders").key("abc").send();
        let first = call().await;
        assert_eq!(
            (first.code(), first.text()),
            (201, &*format!("order {number}"))
        );
        let retry = call().await;
        assert_eq!((retry.code(), retry.text()), (409, first.text()));
        assert!(retry.is_replay());
        assert_eq!(runs.count(), number);
    }
}

#[tokio::test]
async fn exempt_runs_unprotected() {
    let runs = Runs::new();
    let server = serve(exempt(), &runs).await;
    for method in unsafe_methods() {
        let before = runs.count();
        let call = || server.call(method.clone(), "/orders");
        let answers = [
            call().send().await,
            call().key("abc").send().await,
            call().key("abc").send().await,
            call().key("\"invalid").send().await,
            call().key("a").key("b").send().await,
        ];
        for (number, answer) in (before + 1..).zip(answers) {
            assert_eq!(
                (answer.code(), answer.text()),
                (201, &*format!("order {number}"))
            );
            assert!(!answer.is_replay());
        }
    }
}

/// Every safe method runs each time, whatever key it has.
async fn assert_safe_methods_run(server: &Server, runs: &Runs) {
    for method in safe_methods() {
        for keys in [&[][..], &["abc"], &["abc"], &["\"invalid"], &["a", "b"]] {
            let before = runs.count();
            let call = server.call(method.clone(), "/orders");
            let call = keys.iter().fold(call, |call, key| call.key(key));
            let answer = call.send().await;
            assert_eq!(answer.code(), 201, "{method} {keys:?}");
            assert!(!answer.is_replay());
            assert_eq!(runs.count(), before + 1, "{method} {keys:?}");
        }
    }
}

#[tokio::test]
async fn safe_methods_are_exempt_in_enforce() {
    let runs = Runs::new();
    assert_safe_methods_run(&serve(enforce(), &runs).await, &runs).await;
}

#[tokio::test]
async fn safe_methods_are_exempt_in_exempt() {
    let runs = Runs::new();
    assert_safe_methods_run(&serve(exempt(), &runs).await, &runs).await;
}

#[tokio::test]
async fn safe_methods_are_exempt_where_a_key_is_required() {
    let runs = Runs::new();
    let handler = runs.handler().idempotency_key(KeyPolicy::required());
    let router = Router::new()
        .route("/orders", any(handler))
        .layer(enforce());
    assert_safe_methods_run(&Server::start(router).await, &runs).await;
}

#[tokio::test]
async fn safe_methods_are_exempt_where_the_policy_is_fixed() {
    let runs = Runs::new();
    let layer = exempt().policy(KeyPolicy::required());
    assert_safe_methods_run(&serve(layer, &runs).await, &runs).await;
}

#[tokio::test]
async fn safe_methods_are_exempt_even_if_listed() {
    let runs = Runs::new();
    let methods = safe_methods().into_iter().chain([Method::POST]);
    let layer = enforce().config(Config::default().methods(methods));
    let server = serve(layer, &runs).await;
    assert_safe_methods_run(&server, &runs).await;
    assert_eq!(server.post("/orders").send().await.code(), 400);
}

#[tokio::test]
async fn safe_methods_are_exempt_without_a_layer() {
    let runs = Runs::new();
    let handler = runs.handler().idempotency_key(KeyPolicy::required());
    let router = Router::new().route("/orders", any(handler));
    assert_safe_methods_run(&Server::start(router).await, &runs).await;
}

/// `CONNECT /orders` as a WebSocket over HTTP/2 begins: it runs each time, whatever key it has.
async fn assert_tunnels_open(router: Router, runs: &Runs) {
    let server = Server::start(router).await;
    for keys in [&[][..], &["abc"], &["abc"], &["\"invalid"], &["a", "b"]] {
        let before = runs.count();
        let call = server.call(Method::CONNECT, "/orders");
        let call = keys.iter().fold(call, |call, key| call.key(key));
        let answer = call.over(Protocol::Http2).send().await;
        assert_eq!(
            (answer.code(), answer.is_replay()),
            (201, false),
            "{keys:?}"
        );
        assert_eq!(runs.count(), before + 1, "{keys:?}");
    }
}

#[tokio::test]
async fn connect_never_uses_keys() {
    let listed = Config::default().methods([Method::CONNECT, Method::POST]);
    for layer in [
        enforce(),
        exempt(),
        enforce().config(listed),
        enforce().policy(KeyPolicy::required()),
        exempt().policy(KeyPolicy::optional()),
    ] {
        let runs = Runs::new();
        let router = Router::new().route("/orders", any(runs.handler()));
        assert_tunnels_open(router.layer(layer), &runs).await;
    }
}

#[tokio::test]
async fn connect_never_uses_keys_whatever_the_handler_wants() {
    for policy in [
        KeyPolicy::required(),
        KeyPolicy::optional(),
        KeyPolicy::required().manual(),
        KeyPolicy::exempt(),
    ] {
        for layer in [Some(enforce()), Some(exempt()), None] {
            let runs = Runs::new();
            let handler = runs.handler().idempotency_key(policy.clone());
            let router = Router::new().route("/orders", any(handler));
            let router = router.layer(tower::util::option_layer(layer));
            assert_tunnels_open(router, &runs).await;
        }
    }
}

#[tokio::test]
async fn custom_methods() {
    let runs = Runs::new();
    let config = Config::default().methods([Method::POST]);
    let server = serve(enforce().config(config), &runs).await;
    assert_eq!(server.post("/orders").send().await.code(), 400);
    assert_eq!(
        server.post("/orders").key("abc").send().await.text(),
        "order 1"
    );
    assert!(server.post("/orders").key("abc").send().await.is_replay());
    // The other methods are not asked, and a key is honoured.
    let put = || server.call(Method::PUT, "/orders").key("abc").send();
    assert_eq!(put().await.text(), "order 2");
    assert!(put().await.is_replay());
    let without = server.call(Method::DELETE, "/orders").send().await;
    assert_eq!(without.text(), "order 3");
}

#[tokio::test]
async fn custom_methods_change_nothing_for_handlers_with_a_policy() {
    let runs = Runs::new();
    let config = Config::default().methods([Method::POST]);
    let handler = runs.handler().idempotency_key(KeyPolicy::required());
    let router = Router::new().route("/orders", any(handler));
    let server = Server::start(router.layer(exempt().config(config))).await;
    assert_eq!(server.post("/orders").send().await.code(), 400);
    let answer = server.call(Method::PUT, "/orders").send().await;
    assert_eq!(answer.problem().as_deref(), Some("missing-key"));
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn route_layer_of_a_router_leaves_404() {
    for layer in [enforce(), exempt()] {
        let runs = Runs::new();
        let router = Router::new()
            .route("/orders", post(runs.handler()))
            .route_layer(layer);
        let server = Server::start(router).await;
        let call = || server.post("/nothing");
        for call in [
            call(),
            call().key("abc"),
            call().key("abc"),
            call().key("a,b"),
        ] {
            let answer = call.send().await;
            assert_eq!((answer.code(), answer.text()), (404, ""));
        }
        assert_eq!(runs.count(), 0);
    }
}

#[tokio::test]
async fn route_layer_of_a_method_router_leaves_405() {
    for layer in [enforce(), exempt()] {
        let runs = Runs::new();
        let router = Router::new()
            .route("/orders", post(runs.handler()).route_layer(layer.clone()))
            .route("/list", get(runs.handler()).route_layer(layer));
        let server = Server::start(router).await;
        for (method, path, allowed) in [
            (Method::PUT, "/orders", "POST"),
            (Method::GET, "/orders", "POST"),
            (Method::POST, "/list", "GET,HEAD"),
        ] {
            let call = || server.call(method.clone(), path);
            for call in [
                call(),
                call().key("abc"),
                call().key("abc"),
                call().key("a,b"),
            ] {
                let answer = call.send().await;
                assert_eq!((answer.code(), answer.text()), (405, ""));
                assert_eq!(answer.header("allow"), Some(allowed));
                assert!(!answer.is_replay());
            }
        }
        assert_eq!(runs.count(), 0);
    }
}

#[tokio::test]
async fn route_layer_protects_what_it_matches() {
    let runs = Runs::new();
    let router = Router::new().route("/orders", post(runs.handler()));
    let server = Server::start(router.route_layer(enforce())).await;
    assert_eq!(server.post("/orders").send().await.code(), 400);
    assert_eq!(server.post("/orders").key("abc").send().await.code(), 201);
    assert!(server.post("/orders").key("abc").send().await.is_replay());
}

/// A request that no handler answers is no operation: its 404 does not use up the key.
#[tokio::test]
async fn layer_does_not_record_404_and_405() {
    let runs = Runs::new();
    let server = {
        let router = Router::new().route("/orders", post(runs.handler()));
        Server::start(router.layer(enforce())).await
    };
    for _ in 0..2 {
        let unmatched = server.post("/nothing").key("abc").send().await;
        assert_eq!((unmatched.code(), unmatched.is_replay()), (404, false));
        let wrong = server.call(Method::PUT, "/orders").key("abc").send().await;
        assert_eq!((wrong.code(), wrong.is_replay()), (405, false));
    }
}

async fn serve_without_layer(policy: KeyPolicy, runs: &Runs) -> Server {
    let handler = runs.handler().idempotency_key(policy);
    Server::start(Router::new().route("/orders", post(handler))).await
}

#[tokio::test]
async fn exempt_handlers_run_without_a_layer() {
    let runs = Runs::new();
    let server = serve_without_layer(KeyPolicy::exempt(), &runs).await;
    assert_eq!(server.post("/orders").send().await.text(), "order 1");
    assert_eq!(
        server.post("/orders").key("abc").send().await.text(),
        "order 2"
    );
    assert_eq!(
        server.post("/orders").key("abc").send().await.text(),
        "order 3"
    );
}

#[tokio::test]
async fn required_optional_and_manual_handlers_answer_500_without_a_layer() {
    for policy in [
        KeyPolicy::required(),
        KeyPolicy::optional(),
        KeyPolicy::required().manual(),
        KeyPolicy::optional().manual(),
        KeyPolicy::required().cache_name("orders"),
    ] {
        let (logs, _guard) = Logs::install();
        let runs = Runs::new();
        let server = serve_without_layer(policy.clone(), &runs).await;
        assert_eq!(
            server.post("/orders").send().await.code(),
            500,
            "{policy:?}"
        );
        let keyed = server.post("/orders").key("abc").send().await;
        assert_eq!(keyed.code(), 500, "{policy:?}");
        assert_eq!(runs.count(), 0);
        let errors = logs.with(&["ERROR", "handler", "cure", "IdempotencyLayer"]);
        assert_eq!(errors.len(), 2, "{:?}", logs.lines());
        assert!(logs.with(&["abc"]).is_empty(), "the key was logged");
    }
}

/// Handlers that nobody has put a policy on don't know of layers.
#[tokio::test]
async fn plain_handlers_run_without_a_layer() {
    let runs = Runs::new();
    let router = Router::new().route("/orders", post(runs.handler()));
    let server = Server::start(router).await;
    assert_eq!(
        server.post("/orders").key("abc").send().await.text(),
        "order 1"
    );
}

#[tokio::test]
async fn a_fixed_policy_needs_no_handler_of_ours() {
    let runs = Runs::new();
    let server = serve(exempt().policy(KeyPolicy::required()), &runs).await;
    assert_eq!(server.post("/orders").send().await.code(), 400);
    assert_eq!(
        server.post("/orders").key("abc").send().await.text(),
        "order 1"
    );
    assert!(server.post("/orders").key("abc").send().await.is_replay());

    let runs = Runs::new();
    let server = serve(enforce().policy(KeyPolicy::exempt()), &runs).await;
    assert_eq!(server.post("/orders").send().await.text(), "order 1");
    assert_eq!(
        server.post("/orders").key("abc").send().await.text(),
        "order 2"
    );

    let runs = Runs::new();
    let server = serve(enforce().policy(KeyPolicy::optional()), &runs).await;
    assert_eq!(server.post("/orders").send().await.text(), "order 1");
    assert_eq!(
        server.post("/orders").key("abc").send().await.text(),
        "order 2"
    );
    assert!(server.post("/orders").key("abc").send().await.is_replay());
}

#[tokio::test]
async fn a_fixed_policy_holds_for_handlers_of_ours() {
    let runs = Runs::new();
    let router = Router::new()
        .route("/exempt", post(runs.handler().idempotency_exempt()))
        .route(
            "/required",
            post(runs.handler().idempotency_key(KeyPolicy::required())),
        )
        .layer(exempt().policy(KeyPolicy::required()));
    let server = Server::start(router).await;
    for (number, path) in [(1, "/exempt"), (2, "/required")] {
        assert_eq!(server.post(path).send().await.code(), 400, "{path}");
        let first = server.post(path).key("abc").send().await;
        assert_eq!(
            (first.code(), first.text()),
            (201, &*format!("order {number}"))
        );
        assert!(
            server.post(path).key("abc").send().await.is_replay(),
            "{path}"
        );
    }
}

/// One layer for the whole router: each route by its own policy, the rest by the mode.
#[tokio::test]
async fn one_layer_for_routes_of_every_policy() {
    for (layer, plain) in [(enforce(), 400), (exempt(), 201)] {
        let runs = Runs::new();
        let optional = KeyPolicy::optional();
        let router = Router::new()
            .route("/plain", post(runs.handler()))
            .route("/exempt", post(runs.handler().idempotency_exempt()))
            .route("/optional", post(runs.handler().idempotency_key(optional)))
            .route(
                "/required",
                post(runs.handler().idempotency_key(KeyPolicy::required())),
            )
            .layer(layer);
        let server = Server::start(router).await;
        for (path, status) in [
            ("/plain", plain),
            ("/exempt", 201),
            ("/optional", 201),
            ("/required", 400),
        ] {
            assert_eq!(server.post(path).send().await.code(), status, "{path}");
        }
    }
}

#[tokio::test]
async fn check_gives_the_router_back() {
    let runs = Runs::new();
    let layer = enforce();
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(layer.clone());
    let server = Server::start(layer.check(router).unwrap()).await;
    assert_eq!(server.post("/orders").send().await.code(), 400);
    assert_eq!(server.post("/orders").key("abc").send().await.code(), 201);
    assert!(server.post("/orders").key("abc").send().await.is_replay());
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn clones_of_a_layer_share_their_records() {
    let runs = Runs::new();
    let layer = enforce();
    let routes = |path| Router::new().route(path, post(runs.handler()));
    let router = routes("/a")
        .layer(layer.clone())
        .merge(routes("/b").layer(layer.clone()));
    let server = Server::start(router).await;
    server.post("/a").key("abc").send().await;
    server.post("/b").key("abc").send().await;
    assert!(server.post("/a").key("abc").send().await.is_replay());
    assert!(server.post("/b").key("abc").send().await.is_replay());
    assert_eq!(runs.count(), 2);
}

/// The extractors where nothing protects the request.
#[tokio::test]
async fn extractors_without_a_layer() {
    let (logs, _guard) = Logs::install();
    let optional = |key: Option<IdempotencyKey>| async move { key.is_none().to_string() };
    let required = |_: IdempotencyKey| async { "unreachable" };
    let router = Router::new()
        .route("/optional", any(optional))
        .route("/required", any(required));
    let server = Server::start(router).await;
    for method in [Method::GET, Method::POST] {
        let answer = server
            .call(method.clone(), "/optional")
            .key("abc")
            .send()
            .await;
        assert_eq!((answer.code(), answer.text()), (200, "true"));
        let answer = server.call(method, "/required").key("abc").send().await;
        assert_eq!((answer.code(), answer.text()), (500, ""));
    }
    let errors = logs.with(&["ERROR", "`IdempotencyLayer`", "/required"]);
    assert_eq!(errors.len(), 2, "{:?}", logs.lines());
}

// ---- the third mode, and the methods that are asked

fn optional() -> IdempotencyLayer {
    IdempotencyLayer::optional(MemoryStorage::new())
}

#[tokio::test]
async fn optional_honours_a_key_and_asks_for_none() {
    let runs = Runs::new();
    let server = serve(optional(), &runs).await;
    for method in unsafe_methods() {
        let before = runs.count();
        let call = || server.call(method.clone(), "/orders");
        for run in 1..=2 {
            assert_eq!(call().send().await.code(), 201, "{method}");
            assert_eq!(runs.count(), before + run, "{method}");
        }
        let first = call().key("abc").send().await;
        let retry = call().key("abc").send().await;
        assert_eq!((first.code(), retry.code()), (201, 409), "{method}");
        assert_eq!(retry.text(), first.text(), "{method}");
        let invalid = call().key("\"invalid").send().await;
        assert_eq!(invalid.problem().as_deref(), Some("invalid-key"));
        assert_eq!(runs.count(), before + 3, "{method}");
    }
}

#[tokio::test]
async fn handlers_override_optional() {
    let runs = Runs::new();
    let required = runs.handler().idempotency_key(KeyPolicy::required());
    let router = Router::new()
        .route("/required", post(required))
        .route("/exempt", post(runs.handler().idempotency_exempt()));
    let server = Server::start(router.layer(optional())).await;
    let missing = server.post("/required").send().await;
    assert_eq!(missing.problem().as_deref(), Some("missing-key"));
    for run in 1..=2 {
        let answer = server.post("/exempt").key("abc").send().await;
        assert_eq!(answer.code(), 201);
        assert_eq!(runs.count(), run);
    }
}

#[tokio::test]
async fn safe_methods_are_exempt_in_optional() {
    let runs = Runs::new();
    assert_safe_methods_run(&serve(optional(), &runs).await, &runs).await;
}

#[tokio::test]
async fn presets_ask_on_their_methods_and_honour_a_key_on_others() {
    let all = unsafe_methods().to_vec();
    for (config, asked) in [
        (Config::default(), all.clone()),
        (Config::django(), all),
        (Config::ietf(), vec![Method::POST, Method::PATCH]),
        (Config::stripe(), vec![Method::POST]),
    ] {
        let runs = Runs::new();
        let server = serve(enforce().config(config), &runs).await;
        for method in unsafe_methods() {
            let call = || server.call(method.clone(), "/orders");
            let before = runs.count();
            let without = call().send().await;
            if asked.contains(&method) {
                assert_eq!(without.problem().as_deref(), Some("missing-key"));
                assert_eq!(runs.count(), before, "{method}");
            } else {
                assert_eq!(without.code(), 201, "{method}");
                assert_eq!(runs.count(), before + 1, "{method}");
            }
            let before = runs.count();
            let key = format!("of-{method}");
            let first = call().key(&key).send().await;
            assert_eq!(first.code(), 201, "{method}");
            assert_eq!(call().key(&key).send().await.text(), first.text());
            assert_eq!(runs.count(), before + 1, "{method}");
        }
    }
}

#[tokio::test]
async fn a_policy_asks_whatever_the_method() {
    let runs = Runs::new();
    let handler = || runs.handler().idempotency_key(KeyPolicy::required());
    for layer in [enforce(), exempt(), optional()] {
        let layer = layer.config(Config::stripe());
        let router = Router::new().route("/orders", any(handler())).layer(layer);
        let server = Server::start(router).await;
        for method in unsafe_methods() {
            let missing = server.call(method.clone(), "/orders").send().await;
            assert_eq!(
                missing.problem().as_deref(),
                Some("missing-key"),
                "{method}"
            );
        }
    }
    assert_eq!(runs.count(), 0);
}

#[tokio::test]
async fn map_config_changes_what_was_set() {
    let runs = Runs::new();
    let layer = enforce()
        .config(Config::ietf())
        .map_config(|config| config.header(http::HeaderName::from_static("x-request-id")));
    let server = serve(layer, &runs).await;
    let call = || server.post("/orders").header("x-request-id", "abc").send();
    assert_eq!(call().await.code(), 201);
    let retry = call().await;
    assert_eq!(retry.code(), 201, "the preset is still that of IETF");
    assert!(retry.is_replay());
}
