//! Extractors on handlers whose policy does not give what they need.

use axum::{
    Router,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::post,
};
use idempotency_axum::{
    Config, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy, ManualIdempotency,
    MemoryStorage, NotProtected, StoreOn, idempotency_key,
};
use idempotency_tests::{Answer, Logs, Runs, Server};

use crate::{enforce, exempt, modes, optional};

async fn with_key(State(runs): State<Runs>, _: IdempotencyKey) {
    runs.next();
}

async fn manual(State(runs): State<Runs>, _: ManualIdempotency) {
    runs.next();
}

/// Sends `key` to the route `/orders/{id}`, and asserts that no handler ran.
async fn ask(
    layer: &IdempotencyLayer,
    routes: axum::routing::MethodRouter<Runs>,
    key: Option<&str>,
) -> Answer {
    let runs = Runs::new();
    let router = Router::new()
        .route("/orders/{id}", routes)
        .layer(layer.clone())
        .with_state(runs.clone());
    let server = Server::start(router).await;
    let call = server.post("/orders/7?secret=1");
    let answer = match key {
        Some(key) => call.key(key).send().await,
        None => call.send().await,
    };
    assert_eq!(runs.count(), 0);
    answer
}

/// A 500 that says nothing of what is inside, and one line in the log with all of `parts`.
#[track_caller]
fn assert_misuse(answer: &Answer, logs: &Logs, parts: &[&str]) {
    assert_eq!((answer.code(), answer.text()), (500, ""));
    let errors = logs.with(&["ERROR"]);
    assert_eq!(errors.len(), 1, "{errors:?}");
    for part in parts {
        assert!(errors[0].contains(part), "{part}: {errors:?}");
    }
    assert!(!errors[0].contains("secret"), "{errors:?}");
}

#[tokio::test]
async fn a_closure_that_is_manual_without_saying_so_is_refused() {
    let closure = |State(runs): State<Runs>, _: ManualIdempotency| async move {
        runs.next();
    };
    for layer in modes() {
        let (logs, _guard) = Logs::install();
        let answer = ask(&layer(), post(closure), Some("abc")).await;
        assert_misuse(&answer, &logs, &[r#"path="/orders/{id}""#, ".manual()"]);
    }
}

#[tokio::test]
async fn its_refusal_is_not_recorded() {
    let storage = MemoryStorage::new();
    let config = Config::default().store_on(StoreOn::all());
    let layer = IdempotencyLayer::enforce(storage.clone()).config(config);
    for _ in 0..2 {
        let answer = ask(&layer, post(manual), Some("abc")).await;
        assert_eq!((answer.code(), answer.is_replay()), (500, false));
        assert_eq!((layer.engine().running(), storage.records()), (0, 0));
    }
}

/// A handler that looks at the failure itself was entered, so its answer counts.
#[tokio::test]
async fn the_answer_of_a_handler_that_takes_the_failure_is_recorded() {
    let handler = |manual: Result<ManualIdempotency, NotProtected>| async move {
        assert!(manual.is_err());
    };
    let router = Router::new()
        .route("/orders", post(handler))
        .layer(enforce());
    let server = Server::start(router).await;
    assert_eq!(server.post("/orders").key("abc").send().await.code(), 200);
    assert!(server.post("/orders").key("abc").send().await.is_replay());
}

#[tokio::test]
async fn the_log_names_handler_and_path() {
    let path = r#"path="/orders/{id}""#;
    for layer in modes() {
        let (logs, _guard) = Logs::install();
        let routes = post(with_key.idempotency_exempt());
        let answer = ask(&layer(), routes, Some("abc")).await;
        assert_misuse(
            &answer,
            &logs,
            &["misuse::with_key", path, "Option<IdempotencyKey>"],
        );

        let (logs, _guard) = Logs::install();
        let routes = post(with_key.idempotency_key(optional()));
        let answer = ask(&layer(), routes, None).await;
        assert_misuse(
            &answer,
            &logs,
            &["misuse::with_key", path, "Option<IdempotencyKey>"],
        );

        let (logs, _guard) = Logs::install();
        let routes = post(manual.idempotency_key(KeyPolicy::required()));
        let answer = ask(&layer(), routes, Some("abc")).await;
        assert_misuse(&answer, &logs, &["misuse::manual", path, ".manual()"]);

        let (logs, _guard) = Logs::install();
        let routes = post(manual.idempotency_exempt());
        let answer = ask(&layer(), routes, Some("abc")).await;
        assert_misuse(&answer, &logs, &["misuse::manual", path, ".manual()"]);
    }
}

#[tokio::test]
async fn a_plain_handler_in_exempt_mode_is_named_by_its_path() {
    let (logs, _guard) = Logs::install();
    let answer = ask(&exempt(), post(with_key), Some("abc")).await;
    assert_misuse(
        &answer,
        &logs,
        &[r#"path="/orders/{id}""#, "IdempotencyKey"],
    );
}

#[idempotency_key]
async fn annotated(State(runs): State<Runs>) {
    runs.next();
}

#[tokio::test]
async fn a_handler_without_a_layer_is_named_with_its_path() {
    let (logs, _guard) = Logs::install();
    let runs = Runs::new();
    let router = Router::new()
        .route("/orders/{id}", post(annotated))
        .fallback(annotated)
        .with_state(runs.clone());
    let server = Server::start(router).await;
    let answer = server.post("/orders/7?secret=1").key("abc").send().await;
    let parts = [
        "misuse::annotated",
        r#"path="/orders/{id}""#,
        "IdempotencyLayer",
    ];
    assert_misuse(&answer, &logs, &parts);

    let (logs, _guard) = Logs::install();
    let answer = server.post("/of/no/route?secret=1").key("abc").send().await;
    assert_misuse(
        &answer,
        &logs,
        &["misuse::annotated", r#"path="/of/no/route""#],
    );
    assert_eq!(runs.count(), 0);
}

/// The name is that of the handler that is polled, not of one that was polled before on this thread.
#[tokio::test]
async fn a_handler_that_is_done_is_not_named() {
    let (logs, _guard) = Logs::install();
    let router = Router::new()
        .route(
            "/named",
            post((async || {}).idempotency_key(KeyPolicy::required())),
        )
        .route("/nameless", post(|_: ManualIdempotency| async {}))
        .layer(enforce());
    let server = Server::start(router).await;
    assert_eq!(server.post("/named").key("abc").send().await.code(), 200);
    assert_eq!(server.post("/nameless").key("abc").send().await.code(), 500);
    assert!(
        logs.with(&["ERROR", "handler="]).is_empty(),
        "{:?}",
        logs.lines()
    );
    assert_eq!(logs.with(&["ERROR", "/nameless"]).len(), 1);
}

/// `NotProtected` is an answer that anybody may give.
#[tokio::test]
async fn the_failure_says_what_is_wrong_and_its_answer_does_not() {
    async fn failure(key: Result<IdempotencyKey, NotProtected>) -> Response {
        let failure = key.unwrap_err();
        assert_eq!(failure.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let text = failure.to_string();
        assert!(text.contains("`IdempotencyKey`"), "{text}");
        failure.into_response()
    }
    let router = Router::new().route("/", post(failure));
    let server = Server::start(router).await;
    let answer = server.post("/").send().await;
    assert_eq!((answer.code(), answer.text()), (500, ""));
}
