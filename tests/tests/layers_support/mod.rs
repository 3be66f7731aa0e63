//! What the suites about layers share.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicUsize, Ordering},
};

use axum::{body::Body, response::Response};
use http::{Method, Request};
use http_body_util::BodyExt;
use idempotency_axum::IdempotencyKey;
use idempotency_tests::Answer;
use tower::{Service, ServiceExt};

/// A handler whose every run answers differently, with what names the operation if the run is protected.
pub async fn run(key: Option<IdempotencyKey>) -> String {
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    match key {
        Some(key) => format!("{run} {}", key.encoded()),
        None => format!("{run} unprotected"),
    }
}

/// Asks without a network in between: what the handler logs is logged on this thread.
pub async fn ask<S>(app: &S, method: Method, path: &str, key: Option<&str>) -> Answer
where
    S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone,
{
    let mut request = Request::builder().method(method).uri(path);
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    let request = request.body(Body::empty()).expect("a valid path");
    let (parts, body) = match app.clone().oneshot(request).await {
        Ok(response) => response.into_parts(),
        Err(never) => match never {},
    };
    let body = body.collect().await.expect("a whole answer").to_bytes();
    Answer {
        status: parts.status,
        headers: parts.headers,
        body,
    }
}

/// `POST`, as [`ask`].
pub async fn post<S>(app: &S, path: &str, key: Option<&str>) -> Answer
where
    S: Service<Request<Body>, Response = Response, Error = Infallible> + Clone,
{
    ask(app, Method::POST, path, key).await
}
