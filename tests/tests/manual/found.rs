//! A handler is manual by its parameter's type, however that is spelled, or by its policy; in both modes.

use axum::{
    Router,
    extract::{FromRequestParts, State},
    handler::Handler,
    http::{StatusCode, request::Parts},
    routing::any,
};
use idempotency_axum::{
    ExtractorNeeds, IdempotencyHandler, IdempotencyLayer, KeyPolicy, ManualIdempotency,
    MemoryStorage, Needs, NotProtected, idempotency_key,
};
use idempotency_tests::{Answer, Runs, Server};

type Order = (StatusCode, String);

fn order(runs: &Runs, manual: Option<&ManualIdempotency>) -> Order {
    let saw = manual.map_or("no policy".to_owned(), crate::seen);
    (StatusCode::CREATED, format!("{} {saw}", runs.next()))
}

mod aliases {
    pub(super) type Previous = super::ManualIdempotency;
    pub(super) type MaybePrevious = Option<Previous>;
}

#[idempotency_key]
async fn direct(State(runs): State<Runs>, manual: ManualIdempotency) -> Order {
    order(&runs, Some(&manual))
}

#[idempotency_key]
async fn by_alias(State(runs): State<Runs>, manual: aliases::Previous) -> Order {
    order(&runs, Some(&manual))
}

#[idempotency_key]
async fn maybe(State(runs): State<Runs>, manual: Option<ManualIdempotency>) -> Order {
    order(&runs, manual.as_ref())
}

#[idempotency_key]
async fn maybe_by_alias(manual: aliases::MaybePrevious, State(runs): State<Runs>) -> Order {
    order(&runs, manual.as_ref())
}

#[idempotency_key]
async fn fallible(
    State(runs): State<Runs>,
    manual: Result<ManualIdempotency, NotProtected>,
) -> Order {
    order(&runs, manual.ok().as_ref())
}

/// An extractor of a user's that takes the conflict.
struct Conflict(ManualIdempotency);

impl<S: Sync> FromRequestParts<S> for Conflict {
    type Rejection = NotProtected;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, NotProtected> {
        ManualIdempotency::from_request_parts(parts, state)
            .await
            .map(Self)
    }
}

impl ExtractorNeeds for Conflict {
    const NEEDS: Needs = Needs::MANUAL;
}

#[idempotency_key]
async fn by_an_extractor(State(runs): State<Runs>, conflict: Conflict) -> Order {
    order(&runs, Some(&conflict.0))
}

#[idempotency_key(optional)]
async fn optional(State(runs): State<Runs>, manual: Option<ManualIdempotency>) -> Order {
    order(&runs, manual.as_ref())
}

#[idempotency_key(optional)]
async fn bare_optional(State(runs): State<Runs>, manual: ManualIdempotency) -> Order {
    order(&runs, Some(&manual))
}

/// Not manual by itself: a plain function has no attribute that could look at its types.
async fn plain(State(runs): State<Runs>, manual: Option<ManualIdempotency>) -> Order {
    order(&runs, manual.as_ref())
}

/// Serves `handler` in both modes.
async fn in_both_modes<T: 'static>(handler: impl Handler<T, Runs>) -> [Server; 2] {
    let layers = [
        IdempotencyLayer::enforce(MemoryStorage::new()),
        IdempotencyLayer::exempt(MemoryStorage::new()),
    ];
    let [enforce, exempt] = layers.map(|layer| {
        let router = Router::new().route("/orders", any(handler.clone()));
        Server::start(router.layer(layer).with_state(Runs::new()))
    });
    [enforce.await, exempt.await]
}

#[track_caller]
fn assert_ran(answer: &Answer, text: &str) {
    assert_eq!((answer.code(), answer.text()), (201, text), "{answer:?}");
    assert!(!answer.is_replay());
}

async fn is_manual<T: 'static>(handler: impl Handler<T, Runs>) {
    for server in in_both_modes(handler).await {
        let missing = server.post("/orders").send().await;
        assert_eq!(missing.problem().as_deref(), Some("missing-key"));
        let call = || server.post("/orders").key("abc").send();
        assert_ran(&call().await, "1 nothing");
        assert_ran(&call().await, "2 201 1 nothing");
        assert_ran(&call().await, "3 201 2 201 1 nothing");
    }
}

#[tokio::test]
async fn by_type() {
    is_manual(direct).await;
}

#[tokio::test]
async fn by_an_alias() {
    is_manual(by_alias).await;
}

#[tokio::test]
async fn by_an_option() {
    is_manual(maybe).await;
}

#[tokio::test]
async fn by_an_alias_of_an_option() {
    is_manual(maybe_by_alias).await;
}

#[tokio::test]
async fn by_a_result() {
    is_manual(fallible).await;
}

#[tokio::test]
async fn by_an_extractor_that_says_so() {
    is_manual(by_an_extractor).await;
}

#[tokio::test]
async fn by_policy() {
    is_manual(plain.idempotency_key(KeyPolicy::required().manual())).await;
}

/// Also if nobody takes the conflict.
#[tokio::test]
async fn by_policy_of_a_handler_without_the_parameter() {
    let handler = async |State(runs): State<Runs>| format!("{}", runs.next());
    let handler = handler.idempotency_key(KeyPolicy::required().manual());
    for server in in_both_modes(handler).await {
        for run in ["1", "2", "3"] {
            let answer = server.post("/orders").key("abc").send().await;
            assert_eq!((answer.code(), answer.text()), (200, run));
        }
    }
}

/// The outermost policy wins.
#[tokio::test]
async fn a_policy_around_it_that_is_not_manual() {
    for server in in_both_modes(maybe.idempotency_key(KeyPolicy::required())).await {
        let call = || server.post("/orders").key("abc").send();
        assert_eq!(call().await.code(), 201);
        let retry = call().await;
        assert!(retry.is_replay(), "{retry:?}");
    }
}

#[tokio::test]
async fn with_an_optional_key() {
    for server in in_both_modes(optional).await {
        for text in ["1 no policy", "2 no policy"] {
            assert_ran(&server.post("/orders").send().await, text);
        }
        let call = || server.post("/orders").key("abc").send();
        assert_ran(&call().await, "3 nothing");
        assert_ran(&call().await, "4 201 3 nothing");
        let invalid = server.post("/orders").key("a,b").send().await;
        assert_eq!(invalid.problem().as_deref(), Some("invalid-key"));
    }
}

/// Without a key nothing is recorded, so each request is a first one.
#[tokio::test]
async fn bare_with_an_optional_key() {
    for server in in_both_modes(bare_optional).await {
        for text in ["1 nothing", "2 nothing"] {
            assert_ran(&server.post("/orders").send().await, text);
        }
        let call = || server.post("/orders").key("abc").send();
        assert_ran(&call().await, "3 nothing");
        assert_ran(&call().await, "4 201 3 nothing");
        assert_ran(&server.post("/orders").send().await, "5 nothing");
    }
}

/// The outer policy decides that a key is optional, whatever the inner one says.
#[tokio::test]
async fn bare_under_an_optional_policy() {
    let policy = KeyPolicy::optional().manual();
    for server in in_both_modes(by_an_extractor.idempotency_key(policy)).await {
        assert_ran(&server.post("/orders").send().await, "1 nothing");
        let call = || server.post("/orders").key("abc").send();
        assert_ran(&call().await, "2 nothing");
        assert_ran(&call().await, "3 201 2 nothing");
    }
}

/// They are exempt, key or no key, so there is never a conflict.
#[tokio::test]
async fn safe_methods() {
    for server in in_both_modes(maybe).await {
        for run in 1..=2 {
            let answer = server.get("/orders").key("abc").send().await;
            assert_ran(&answer, &format!("{run} no policy"));
        }
        let post = server.post("/orders").key("abc").send().await;
        assert_ran(&post, "3 nothing");
        let get = server.get("/orders").key("abc").send().await;
        assert_ran(&get, "4 no policy");
    }
}
