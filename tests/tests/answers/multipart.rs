//! Forms of `multipart/form-data`: a client picks a new boundary for every attempt.

use axum::{Router, body::Bytes, http::StatusCode, routing::post};
use idempotency_axum::{Config, FingerprintKeyEncoder, IdempotencyLayer, MemoryStorage};
use idempotency_tests::{Answer, Protocol, Server};

use crate::{Column, Shop, assert_ran, assert_refused};

columns!(
    a_retry_with_another_boundary,
    another_form_is_another_operation,
    text_that_looks_like_the_other_boundary,
);

/// A form with two fields, as browsers write it.
fn form(boundary: &str, name: &str, note: &str) -> String {
    format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\n{name}\r\n\
         --{boundary}\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\n{note}\r\n\
         --{boundary}--\r\n"
    )
}

async fn send(server: &Server, content_type: &str, body: impl Into<Vec<u8>>) -> Answer {
    let call = server.post("/orders").key("abc").body(body.into());
    call.header("content-type", content_type).send().await
}

async fn send_form(shop: &Shop, boundary: &str, name: &str, note: &str) -> Answer {
    let content_type = format!("multipart/form-data; boundary={boundary}");
    send(&shop.server, &content_type, form(boundary, name, note)).await
}

async fn a_retry_with_another_boundary(column: Column) {
    let shop = Shop::open(column.config()).await;
    assert_ran(&send_form(&shop, "A1", "alice", "hello").await, 1);
    for boundary in ["B2", "A1", "----WebKitFormBoundary7MA4YWxkTrZu0gW", "A"] {
        let retry = send_form(&shop, boundary, "alice", "hello").await;
        column.assert_replay(&retry, 201, "order 1");
    }
    assert_eq!(shop.runs(), 1);
}

async fn another_form_is_another_operation(column: Column) {
    let shop = Shop::open(column.config()).await;
    assert_ran(&send_form(&shop, "A1", "alice", "hello").await, 1);
    for (run, (name, note)) in [("alice", "bye"), ("alicehello", ""), ("hello", "alice")]
        .into_iter()
        .enumerate()
    {
        let other = send_form(&shop, "B2", name, note).await;
        match column {
            Column::Default => assert_ran(&other, run + 2),
            Column::Ietf => assert_refused(&other, 422, "key-reused"),
            Column::Stripe => assert_refused(&other, 400, "key-reused"),
        }
    }
}

async fn text_that_looks_like_the_other_boundary(column: Column) {
    for note in [
        "--B2",
        "--B2--",
        "--B2\r\n",
        "--B2 and --A1\n--B2\n--B2--\r\n--B2x\r\n --B2\r\n--A1x\r\n--A1--x",
    ] {
        let shop = Shop::open(column.config()).await;
        assert_ran(&send_form(&shop, "A1", "alice", note).await, 1);
        let retry = send_form(&shop, "B2", "alice", note).await;
        column.assert_replay(&retry, 201, "order 1");

        // The name of a boundary is text like any other.
        let other = send_form(&shop, "B2", "alice", &note.replace("B2", "A1")).await;
        match column {
            Column::Default => assert_ran(&other, 2),
            Column::Ietf => assert_refused(&other, 422, "key-reused"),
            Column::Stripe => assert_refused(&other, 400, "key-reused"),
        }
    }
}

#[tokio::test]
async fn every_kind_of_multipart_and_spelling_of_its_type() {
    for content_type in [
        "multipart/form-data; boundary=\"{}\"",
        "Multipart/Form-Data;BOUNDARY={}",
        "multipart/mixed; charset=utf-8; boundary={}; x=\"a;b\\\"c\"",
        "multipart/related; type=\"text/xml\"; boundary={} ;",
    ] {
        let shop = Shop::open(Config::ietf()).await;
        for (run, boundary) in ["A1", "B2"].into_iter().enumerate() {
            let content_type = content_type.replace("{}", boundary);
            let answer = send(&shop.server, &content_type, form(boundary, "a", "b")).await;
            match run {
                0 => assert_ran(&answer, 1),
                _ => Column::Ietf.assert_replay(&answer, 201, "order 1"),
            }
        }
    }
}

#[tokio::test]
async fn a_boundary_that_needs_quotes() {
    let shop = Shop::open(Config::ietf()).await;
    let first = "multipart/form-data; boundary=\"a (1):2=/?\"";
    assert_ran(
        &send(&shop.server, first, form("a (1):2=/?", "a", "b")).await,
        1,
    );
    // A quoted pair stands for its second character.
    let escaped = "multipart/form-data; boundary=\"\\a\\\"2\"";
    let retry = send(&shop.server, escaped, form("a\"2", "a", "b")).await;
    Column::Ietf.assert_replay(&retry, 201, "order 1");
}

#[tokio::test]
async fn fields_of_a_fingerprint_see_the_form_and_its_boundary_does_not_count() {
    let encoder = FingerprintKeyEncoder.fields(|body| body.into());
    let shop = Shop::open(Config::ietf().encoder(encoder)).await;
    assert_ran(&send_form(&shop, "A1", "alice", "hello").await, 1);
    let retry = send_form(&shop, "B2", "alice", "hello").await;
    Column::Ietf.assert_replay(&retry, 201, "order 1");
    let other = send_form(&shop, "B2", "alice", "bye").await;
    assert_refused(&other, 422, "key-reused");
}

/// Its bytes count as those of any other body do.
#[tokio::test]
async fn a_body_that_is_not_multipart_after_all() {
    let whole = form("A1", "a", "b");
    let truncated = whole.replace("--A1--\r\n", "");
    for (content_type, body) in [
        ("multipart/form-data", &whole[..]),
        ("multipart/form-data; boundary=", &whole),
        ("multipart/form-data; boundary=\"A1", &whole),
        ("multipart/form-data; boundary=A1; boundary=A1", &whole),
        ("multipart/form-data; boundary=C3", &whole),
        ("multipart/; boundary=A1", &whole),
        ("application/x-multipart; boundary=A1", &whole),
        ("multipart/form-data; boundary=A1", &truncated),
        ("multipart/form-data; boundary=A1", ""),
        ("multipart/form-data; boundary=A1", "{}"),
    ] {
        let shop = Shop::open(Config::ietf()).await;
        let first = send(&shop.server, content_type, body).await;
        assert_ran(&first, 1);
        let retry = send(&shop.server, content_type, body).await;
        Column::Ietf.assert_replay(&retry, 201, "order 1");
        let same_bytes = send(&shop.server, "text/plain", body).await;
        Column::Ietf.assert_replay(&same_bytes, 201, "order 1");
        let other = send(&shop.server, content_type, body.replace("A1", "B2") + "x").await;
        assert_refused(&other, 422, "key-reused");
    }
}

/// The handler gets the body with the boundary that the client sent.
#[tokio::test]
async fn the_handler_sees_the_body_as_it_came() {
    let echo = |body: Bytes| async move { (StatusCode::CREATED, body) };
    let router = Router::new()
        .route("/orders", post(echo))
        .layer(IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::ietf()));
    let server = Server::start(router).await;
    let body = form("A1", "a", "b");
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let call = server.post("/orders").key(format!("{protocol:?}"));
        let call = call.header("content-type", "multipart/form-data; boundary=A1");
        let answer = call.body(body.clone()).over(protocol).send().await;
        assert_eq!((answer.code(), answer.text()), (201, &*body));
    }
}
