//! What of an answer's headers a retry gets.

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::IntoResponse,
    routing::post,
};
use futures_util::stream;
use idempotency_axum::{Config, MemoryStorage};
use idempotency_tests::Answer;

use crate::{Column, Shop};

columns!(headers_of_a_replay, content_length_of_a_replay);

const LINES: [(&str, &str); 17] = [
    ("location", "/orders/1"),
    ("etag", "\"1\""),
    ("cache-control", "no-store"),
    ("content-type", "application/vnd.order+json"),
    ("content-language", "eo"),
    ("vary", "accept"),
    ("vary", "origin"),
    ("x-multi", "b"),
    ("x-multi", "a"),
    ("x-request-cost", "7"),
    ("set-cookie", "session=secret"),
    ("set-cookie", "theme=dark"),
    ("date", "Thu, 01 Jan 1970 00:00:00 GMT"),
    ("connection", "X-Hop, keep-alive"),
    ("x-hop", "1"),
    ("keep-alive", "timeout=5"),
    ("proxy-authenticate", "Basic"),
];

async fn order() -> impl IntoResponse {
    let mut headers = HeaderMap::new();
    for (name, value) in LINES {
        headers.append(name, HeaderValue::from_static(value));
    }
    headers.append("x-opaque", HeaderValue::from_bytes(b"caf\xe9").unwrap());
    (StatusCode::CREATED, headers, "order 1")
}

/// First answer and retry.
async fn twice(config: Config) -> [Answer; 2] {
    let routes = Router::new().route("/headers", post(order));
    let shop = Shop::with(MemoryStorage::new(), config, routes).await;
    let call = || shop.server.post("/headers").key("abc").send();
    [call().await, call().await]
}

fn all<'a>(answer: &'a Answer, name: &str) -> Vec<&'a [u8]> {
    let values = answer.headers.get_all(name);
    values.iter().map(HeaderValue::as_bytes).collect()
}

async fn headers_of_a_replay(column: Column) {
    let [first, retry] = twice(column.config()).await;
    column.assert_replay(&retry, 201, "order 1");

    for kept in [
        "location",
        "etag",
        "cache-control",
        "content-type",
        "content-language",
        "vary",
        "x-multi",
        "x-request-cost",
        "x-opaque",
    ] {
        assert!(!all(&first, kept).is_empty(), "{kept}");
        assert_eq!(all(&first, kept), all(&retry, kept), "{kept}");
    }
    for of_the_first_alone in ["set-cookie", "x-hop", "keep-alive", "proxy-authenticate"] {
        assert!(
            !all(&first, of_the_first_alone).is_empty(),
            "{of_the_first_alone}"
        );
        assert!(
            all(&retry, of_the_first_alone).is_empty(),
            "{of_the_first_alone}"
        );
    }
    assert!(!all(&retry, "connection").contains(&b"X-Hop, keep-alive".as_slice()));

    // The server dates every answer that has no date.
    assert_eq!(first.header("date"), Some("Thu, 01 Jan 1970 00:00:00 GMT"));
    assert_ne!(retry.header("date"), first.header("date"));
}

#[tokio::test]
async fn a_kept_cookie_and_a_stripped_header() {
    let config = Config::ietf()
        .keep_header(header::SET_COOKIE)
        .strip_header(HeaderName::from_static("x-request-cost"));
    let [first, retry] = twice(config).await;
    assert_eq!(all(&retry, "set-cookie"), all(&first, "set-cookie"));
    assert_eq!(all(&retry, "set-cookie").len(), 2);
    assert!(all(&retry, "x-request-cost").is_empty());
    assert_eq!(retry.header("etag"), Some("\"1\""));
}

/// A hop-by-hop header stays out, whatever is configured.
#[tokio::test]
async fn connection_headers_cannot_be_kept() {
    let config = Config::ietf()
        .keep_header(HeaderName::from_static("x-hop"))
        .keep_header(HeaderName::from_static("keep-alive"));
    let [_, retry] = twice(config).await;
    assert!(all(&retry, "x-hop").is_empty());
    assert!(all(&retry, "keep-alive").is_empty());
}

async fn content_length_of_a_replay(column: Column) {
    let routes = Router::new()
        .route("/empty", post(|| async { StatusCode::CREATED }))
        .route("/no-content", post(|| async { StatusCode::NO_CONTENT }))
        .route("/fixed", post(|| async { "12345" }))
        .route("/chunked", post(chunked));
    let shop = Shop::with(MemoryStorage::new(), column.config(), routes).await;
    for (path, status, body) in [
        ("/empty", 201, ""),
        ("/no-content", 204, ""),
        ("/fixed", 200, "12345"),
        ("/chunked", 200, "12345"),
    ] {
        let call = || shop.server.post(path).key(path.trim_start_matches('/'));
        assert_eq!(call().send().await.text(), body);
        let retry = call().send().await;
        column.assert_replay(&retry, status, body);
        // An answer with 204 has none.
        let length = body.len().to_string();
        let length = (retry.code() != 204).then_some(&*length);
        assert_eq!(retry.header("content-length"), length, "{path}");
        assert_eq!(retry.header("transfer-encoding"), None);
    }
}

async fn chunked() -> Body {
    let chunks = ["12", "", "345"].map(Ok::<_, std::convert::Infallible>);
    Body::from_stream(stream::iter(chunks))
}
