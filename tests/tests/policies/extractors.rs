//! What a handler gets to know of its key.

use axum::{Router, http::Method, routing::any};
use idempotency_axum::{
    Config, EncodedKey, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy,
    MemoryStorage, StoreOn,
};
use idempotency_tests::{Answer, Server};

use crate::{enforce, exempt, modes, optional, serve};

/// A line each: the key, the encoded key, two derived ones.
async fn tell(key: IdempotencyKey) -> String {
    let (charge, mail) = (key.derive("psp-charge"), key.derive("mail"));
    format!("{}\n{}\n{charge}\n{mail}", key.as_str(), key.encoded())
}

async fn tell_if_any(key: Option<IdempotencyKey>) -> String {
    key.map_or_else(|| "none".to_owned(), |key| key.as_str().to_owned())
}

fn lines(answer: &Answer) -> [&str; 4] {
    assert_eq!(answer.code(), 200, "{answer:?}");
    let lines: Vec<_> = answer.text().split('\n').collect();
    lines.try_into().expect("four lines")
}

#[tokio::test]
async fn idempotency_key() {
    for layer in modes() {
        let layer = layer();
        let handler = tell.idempotency_key(KeyPolicy::required());
        let served = serve(layer.clone(), handler).await;
        let answer = served.post(Some("\"ord er-7\"")).await;
        let [key, encoded, charge, mail] = lines(&answer);
        assert_eq!(key, "ord er-7", "without its quotes");
        let encoded: EncodedKey = encoded.parse().unwrap();
        assert!(layer.engine().get(&encoded).await.unwrap().is_some());
        assert_ne!(charge, mail);
        assert!(!charge.contains("ord"), "the client's key can be read");
        assert_eq!(charge, encoded.derive("psp-charge"));
    }
}

/// A handler that says nothing of keys is protected in `enforce`, so it has one.
#[tokio::test]
async fn idempotency_key_of_a_plain_handler() {
    let served = serve(enforce(), tell).await;
    assert_eq!(lines(&served.post(Some("abc")).await)[0], "abc");
    let served = serve(exempt(), tell).await;
    assert_eq!(served.post(Some("abc")).await.code(), 500);
}

#[tokio::test]
async fn idempotency_key_where_nothing_is_protected() {
    for layer in modes() {
        let served = serve(layer(), tell.idempotency_exempt()).await;
        let answer = served.post(Some("abc")).await;
        assert_eq!(answer.code(), 500);

        let served = serve(layer(), tell.idempotency_key(optional())).await;
        assert_eq!(served.post(None).await.code(), 500);
        assert_eq!(lines(&served.post(Some("abc")).await)[0], "abc");
    }
}

#[tokio::test]
async fn idempotency_key_optional() {
    for layer in modes() {
        let handler = tell_if_any.idempotency_key(optional());
        let served = serve(layer(), handler).await;
        assert_eq!(served.post(None).await.text(), "none");
        assert_eq!(served.post(Some("abc")).await.text(), "abc");

        let handler = tell_if_any.idempotency_exempt();
        let served = serve(layer(), handler).await;
        assert_eq!(served.post(None).await.text(), "none");
        assert_eq!(served.post(Some("abc")).await.text(), "none");

        let handler = tell_if_any.idempotency_key(KeyPolicy::required());
        let served = serve(layer(), handler).await;
        assert_eq!(served.post(Some("abc")).await.text(), "abc");
        for method in [Method::GET, Method::OPTIONS] {
            let safe = served.server.call(method, "/orders").key("abc");
            assert_eq!(safe.send().await.text(), "none");
        }
    }
}

/// An attempt that is not stored and its retry are the same operation to everybody downstream.
#[tokio::test]
async fn derived_keys_are_those_of_the_operation() {
    let config = Config::default().store_on(StoreOn::statuses([]));
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
    let router = Router::new()
        .route("/orders", any(tell))
        .route("/other", any(tell));
    let server = Server::start(router.layer(layer)).await;
    let call = || {
        server
            .post("/orders")
            .key("abc")
            .body("x")
            .header("authorization", "alice")
    };
    let first = call().send().await;
    let retry = call().send().await;
    assert!(!retry.is_replay());
    assert_eq!(lines(&first), lines(&retry));

    let alone = server.post("/orders").key("abc").body("x");
    let others = [
        alone.header("authorization", "bob"),
        server
            .post("/orders")
            .key("abd")
            .body("x")
            .header("authorization", "alice"),
        server
            .post("/orders")
            .key("abc")
            .body("y")
            .header("authorization", "alice"),
        server
            .post("/other")
            .key("abc")
            .body("x")
            .header("authorization", "alice"),
    ];
    for other in others {
        let other = other.send().await;
        let [_, encoded, charge, mail] = lines(&other);
        let [_, first_encoded, first_charge, first_mail] = lines(&first);
        assert_ne!(encoded, first_encoded);
        assert_ne!(charge, first_charge);
        assert_ne!(mail, first_mail);
    }
}
