//! The key itself: missing, invalid, in its several forms, under another header name.

use http::HeaderName;
use idempotency_axum::{Config, KeyFormat};

use crate::{Column, Shop, assert_ran, assert_refused, unsafe_methods};

columns!(
    key_missing_required,
    key_invalid,
    a_refused_key_does_not_use_up_the_key
);

async fn key_missing_required(column: Column) {
    let config = column.config();
    let asked = unsafe_methods().map(|method| (config.asks(&method), method));
    let shop = Shop::open(config).await;
    for (_, method) in asked.into_iter().filter(|(is_asked, _)| *is_asked) {
        let answer = shop.server.call(method, "/orders").json("{}").send().await;
        assert_refused(&answer, 400, "missing-key");
        assert_eq!(answer.header("retry-after"), None);
    }
    assert_eq!(shop.runs(), 0);
}

async fn key_invalid(column: Column) {
    let shop = Shop::open(column.config()).await;
    let too_long = "k".repeat(256);
    let too_long_quoted = format!("\"{too_long}\"");
    let invalid: [(&str, &[u8]); 18] = [
        ("empty", b""),
        ("empty in quotes", b"\"\""),
        ("256 bytes", too_long.as_bytes()),
        ("256 bytes in quotes", too_long_quoted.as_bytes()),
        ("a tab", b"a\tb"),
        ("a tab in quotes", b"\"a\tb\""),
        ("UTF-8", "caf\u{e9}".as_bytes()),
        ("UTF-8 in quotes", "\"caf\u{e9}\"".as_bytes()),
        ("Latin-1", b"caf\xe9"),
        ("no text at all", b"\xff\x80\xfe"),
        ("a quote that opens", b"\"abc"),
        ("a quote that closes", b"abc\""),
        ("a quote inside", b"a\"c"),
        ("an escaped last quote", b"\"abc\\\""),
        ("a bare comma", b"abc,def"),
        ("a bare comma at the end", b"abc,"),
        ("a list of strings", b"\"abc\", \"def\""),
        ("more after the string", b"\"abc\" def"),
    ];
    for (name, key) in invalid {
        let answer = shop.server.post("/orders").key(key).send().await;
        assert_refused(&answer, 400, "invalid-key");
        assert_eq!(answer.header("retry-after"), None, "{name}");
    }
    for (one, other) in [
        ("abc", "def"),
        ("abc", "abc"),
        ("abc", "\"abc\""),
        ("abc", ""),
    ] {
        let repeated = shop.server.post("/orders").key(one).key(other);
        assert_refused(&repeated.send().await, 400, "invalid-key");
    }
    assert_eq!(shop.runs(), 0);
}

async fn a_refused_key_does_not_use_up_the_key(column: Column) {
    let shop = Shop::open(column.config()).await;
    let repeated = shop.server.post("/orders").key("abc").key("abc");
    assert_refused(&repeated.send().await, 400, "invalid-key");
    assert_ran(&shop.server.post("/orders").key("abc").send().await, 1);
}

#[tokio::test]
async fn bytes_that_http_forbids() {
    let shop = Shop::open(Config::default()).await;
    for byte in [0x00, 0x01, 0x08, 0x0b, 0x1b, 0x1f, 0x7f] {
        let mut request =
            b"POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key: a".to_vec();
        request.push(byte);
        request.extend_from_slice(b"b\r\ncontent-length: 0\r\n\r\n");
        let answer = shop.server.raw(request).await;
        assert_eq!(answer.code(), 400, "{byte:#x}: {answer:?}");
    }
    assert_eq!(shop.runs(), 0);
}

#[tokio::test]
async fn bytes_that_http_allows_and_a_key_does_not() {
    let shop = Shop::open(Config::default()).await;
    let request = b"POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key: a\xffb\r\ncontent-length: 0\r\n\r\n";
    assert_refused(&shop.server.raw(request).await, 400, "invalid-key");
    let request = b"POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nidempotency-key:\r\ncontent-length: 0\r\n\r\n";
    assert_refused(&shop.server.raw(request).await, 400, "invalid-key");
    assert_eq!(shop.runs(), 0);
}

#[tokio::test]
async fn space_around_the_value_is_not_part_of_the_key() {
    let shop = Shop::open(Config::ietf()).await;
    assert_ran(&shop.server.post("/orders").key("abc").send().await, 1);
    let request = b"POST /orders HTTP/1.1\r\nhost: x\r\nconnection: close\r\nIDEMPOTENCY-KEY: \t abc \t \r\ncontent-length: 0\r\n\r\n";
    let retry = shop.server.raw(request).await;
    Column::Ietf.assert_replay(&retry, 201, "order 1");
}

#[tokio::test]
async fn a_key_of_255_bytes_is_valid() {
    let shop = Shop::open(Config::default()).await;
    let longest = "k".repeat(255);
    let answer = shop.server.post("/orders").key(&longest).send().await;
    assert_ran(&answer, 1);
    let quoted = format!("\"{longest}\"");
    let retry = shop.server.post("/orders").key(&quoted).send().await;
    Column::Default.assert_replay(&retry, 201, "order 1");
    // 255 quotes, each of which needs two bytes on the wire.
    let escaped = format!("\"{}\"", "\\\"".repeat(255));
    let answer = shop.server.post("/orders").key(&escaped).send().await;
    assert_ran(&answer, 2);
}

#[tokio::test]
async fn the_longest_key_differs_from_another_in_its_last_byte() {
    let shop = Shop::open(Config::default()).await;
    for (run, last) in ["x", "y"].into_iter().enumerate() {
        let key = "k".repeat(254) + last;
        let answer = shop.server.post("/orders").key(&key).send().await;
        assert_ran(&answer, run + 1);
    }
}

#[tokio::test]
async fn a_quoted_key_is_the_bare_key() {
    let shop = Shop::open(Config::ietf()).await;
    assert_ran(&shop.server.post("/orders").key("a b=c;d").send().await, 1);
    for same in ["\"a b=c;d\"", "\"a b=c;d\";v=1", "\"a b=c;d\"; a; b=\"x\""] {
        let retry = shop.server.post("/orders").key(same).send().await;
        Column::Ietf.assert_replay(&retry, 201, "order 1");
    }
    assert_ran(&shop.server.post("/orders").key("A B=c;d").send().await, 2);
}

#[tokio::test]
async fn escapes_are_undone() {
    let shop = Shop::open(Config::ietf()).await;
    assert_ran(&shop.server.post("/orders").key(r"a\b").send().await, 1);
    let retry = shop.server.post("/orders").key(r#""a\\b""#).send().await;
    Column::Ietf.assert_replay(&retry, 201, "order 1");
    // A comma inside a string is part of the key, not a list.
    assert_ran(&shop.server.post("/orders").key(r#""a,b""#).send().await, 2);
}

#[tokio::test]
async fn another_key_is_another_operation() {
    let shop = Shop::open(Config::stripe()).await;
    for (run, key) in ["a", "b", "aa", "a b", "1", "01"].into_iter().enumerate() {
        assert_ran(&shop.server.post("/orders").key(key).send().await, run + 1);
    }
}

#[tokio::test]
async fn custom_header_name() {
    let config = Config::ietf().header(HeaderName::from_static("x-request-id"));
    let shop = Shop::open(config).await;
    let usual = shop.server.post("/orders").key("abc").send().await;
    assert_refused(&usual, 400, "missing-key");
    assert!(usual.text().contains("x-request-id"), "{}", usual.text());

    let call = || shop.server.post("/orders").header("X-Request-Id", "abc");
    assert_ran(&call().send().await, 1);
    Column::Ietf.assert_replay(&call().send().await, 201, "order 1");
    // The usual header means nothing here.
    let both = call().key("\"broken").send().await;
    Column::Ietf.assert_replay(&both, 201, "order 1");
}

#[tokio::test]
async fn a_missing_key_is_explained_with_the_header_to_send() {
    let shop = Shop::open(Config::default()).await;
    let answer = shop.server.post("/orders").send().await;
    assert!(answer.text().to_lowercase().contains("idempotency-key"));
}

#[tokio::test]
async fn key_format_uuid() {
    let shop = Shop::open(Config::default().key_format(KeyFormat::uuid())).await;
    for invalid in ["abc", "8e03978e40d543ddbc936894a57f9324"] {
        let answer = shop.server.post("/orders").key(invalid).send().await;
        assert_refused(&answer, 400, "invalid-key");
    }
    let uuid = "8e03978e-40d5-43dd-bc93-6894a57f9324";
    assert_ran(&shop.server.post("/orders").key(uuid).send().await, 1);
}

#[tokio::test]
async fn key_format_of_ones_own() {
    let format = KeyFormat::from_fn(|key| key.starts_with("ord_"));
    let shop = Shop::open(Config::default().key_format(format)).await;
    let answer = shop.server.post("/orders").key("abc").send().await;
    assert_refused(&answer, 400, "invalid-key");
    assert_ran(
        &shop.server.post("/orders").key("\"ord_1\"").send().await,
        1,
    );
}
