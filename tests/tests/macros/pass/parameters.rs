//! 0 to 16 parameters, as many as axum takes.
#![deny(warnings)]

use axum::{
    Router,
    http::{Method, Uri},
    routing::post,
};
use idempotency_axum::idempotency_key;

#[idempotency_key]
async fn take_0() -> String {
    String::new()
}

#[idempotency_key]
async fn take_1(body: String) -> String {
    [body].concat()
}

#[idempotency_key]
async fn take_2(p1: Uri, body: String) -> String {
    [p1.to_string(), body].concat()
}

#[idempotency_key]
async fn take_3(p1: Uri, p2: Method, body: String) -> String {
    [p1.to_string(), p2.to_string(), body].concat()
}

#[idempotency_key]
async fn take_4(p1: Uri, p2: Method, p3: Uri, body: String) -> String {
    [p1.to_string(), p2.to_string(), p3.to_string(), body].concat()
}

#[idempotency_key]
async fn take_5(p1: Uri, p2: Method, p3: Uri, p4: Method, body: String) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
async fn take_6(p1: Uri, p2: Method, p3: Uri, p4: Method, p5: Uri, body: String) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
async fn take_7(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_8(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_9(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    p8: Method,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        p8.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_10(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    p8: Method,
    p9: Uri,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        p8.to_string(),
        p9.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_11(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    p8: Method,
    p9: Uri,
    p10: Method,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        p8.to_string(),
        p9.to_string(),
        p10.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_12(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    p8: Method,
    p9: Uri,
    p10: Method,
    p11: Uri,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        p8.to_string(),
        p9.to_string(),
        p10.to_string(),
        p11.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_13(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    p8: Method,
    p9: Uri,
    p10: Method,
    p11: Uri,
    p12: Method,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        p8.to_string(),
        p9.to_string(),
        p10.to_string(),
        p11.to_string(),
        p12.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_14(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    p8: Method,
    p9: Uri,
    p10: Method,
    p11: Uri,
    p12: Method,
    p13: Uri,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        p8.to_string(),
        p9.to_string(),
        p10.to_string(),
        p11.to_string(),
        p12.to_string(),
        p13.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_15(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    p8: Method,
    p9: Uri,
    p10: Method,
    p11: Uri,
    p12: Method,
    p13: Uri,
    p14: Method,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        p8.to_string(),
        p9.to_string(),
        p10.to_string(),
        p11.to_string(),
        p12.to_string(),
        p13.to_string(),
        p14.to_string(),
        body,
    ]
    .concat()
}

#[idempotency_key]
#[allow(clippy::too_many_arguments)]
async fn take_16(
    p1: Uri,
    p2: Method,
    p3: Uri,
    p4: Method,
    p5: Uri,
    p6: Method,
    p7: Uri,
    p8: Method,
    p9: Uri,
    p10: Method,
    p11: Uri,
    p12: Method,
    p13: Uri,
    p14: Method,
    p15: Uri,
    body: String,
) -> String {
    [
        p1.to_string(),
        p2.to_string(),
        p3.to_string(),
        p4.to_string(),
        p5.to_string(),
        p6.to_string(),
        p7.to_string(),
        p8.to_string(),
        p9.to_string(),
        p10.to_string(),
        p11.to_string(),
        p12.to_string(),
        p13.to_string(),
        p14.to_string(),
        p15.to_string(),
        body,
    ]
    .concat()
}

pub(crate) fn app() -> Router {
    Router::new()
        .route("/0", post(take_0))
        .route("/1", post(take_1))
        .route("/2", post(take_2))
        .route("/3", post(take_3))
        .route("/4", post(take_4))
        .route("/5", post(take_5))
        .route("/6", post(take_6))
        .route("/7", post(take_7))
        .route("/8", post(take_8))
        .route("/9", post(take_9))
        .route("/10", post(take_10))
        .route("/11", post(take_11))
        .route("/12", post(take_12))
        .route("/13", post(take_13))
        .route("/14", post(take_14))
        .route("/15", post(take_15))
        .route("/16", post(take_16))
}

pub(crate) fn main() {
    let _ = app();
}
