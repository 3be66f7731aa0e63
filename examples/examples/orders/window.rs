//! A window into the service: what the layer did for each request, and what it has stored.
//!
//! No service needs this. Every answer gets a [`Server-Timing`] header with the events that the observer saw while the answer
//! was made, so the page (and `curl -i`) shows what happened to *this* request and guesses nothing.
//!
//! [`Server-Timing`]: https://www.w3.org/TR/server-timing/

use std::{cell::RefCell, fmt::Write as _, time::Duration, time::Instant};

use axum::{
    Json, Router,
    extract::{Path, Request},
    http::{HeaderValue, StatusCode},
    middleware::Next,
    response::{Html, Response},
    routing::get,
};
use idempotency_axum::{EncodedKey, Engine, Entry, Event, Outcome};
use serde_json::{Value, json};

tokio::task_local! {
    static SEEN: RefCell<Seen>;
}

/// What the observer saw of the request that this task is at.
#[derive(Default)]
struct Seen {
    /// Events, as a `Server-Timing` value.
    events: String,
    key: Option<EncodedKey>,
}

/// The observer. It is called on the task that the event happens on, so a task-local tells whose event it is. An event without
/// a request, say of an order whose client has left, has nobody here to tell.
pub(crate) fn observe(event: &Event<'_>) {
    let _ = SEEN.try_with(|seen| {
        let mut seen = seen.borrow_mut();
        seen.key = seen.key.or(event.key());
        let events = &mut seen.events;
        events.push_str(event.name());
        // Writing to a `String` can't fail.
        let _ = match event {
            Event::Completed { took, .. } => write!(events, ";dur={}", millis(*took)),
            Event::Replayed { waited, .. } => write!(events, ";dur={}", millis(*waited)),
            Event::Refused { refusal, .. } => write!(events, ";desc=\"{refusal}\""),
            _ => Ok(()),
        };
        events.push_str(", ");
    });
}

/// Puts what the observer saw onto the answer. This middleware is outside of the idempotency layer: what it adds is about one
/// answer, and must not be recorded with it.
pub(crate) async fn tell(request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let answer = async {
        let response = next.run(request).await;
        (response, SEEN.with(RefCell::take))
    };
    let (mut response, seen) = SEEN.scope(RefCell::default(), answer).await;
    let mut told = seen.events;
    let _ = write!(told, "total;dur={}", millis(begun.elapsed()));
    if let Some(key) = seen.key {
        let _ = write!(told, ", key;desc=\"{key}\"");
    }
    if let Ok(told) = HeaderValue::try_from(told) {
        response.headers_mut().insert("server-timing", told);
    }
    response
}

/// `GET /records/{encoded key}`: what a retry with this key would get.
pub(crate) fn records(engine: &Engine) -> Router {
    let engine = engine.clone();
    let show = |Path(key): Path<String>| async move {
        let key: EncodedKey = key.parse().map_err(|_| StatusCode::NOT_FOUND)?;
        record(&engine, &key).await
    };
    Router::new().route("/records/{key}", get(show))
}

async fn record(engine: &Engine, key: &EncodedKey) -> Result<Json<Value>, StatusCode> {
    let entry = engine.get(key).await;
    let entry = entry.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let Some(Entry::Completed(record)) = entry else {
        return Err(StatusCode::NOT_FOUND);
    };
    let Outcome::Response(stored) = record.outcome else {
        return Err(StatusCode::NOT_FOUND);
    };
    let headers: Vec<_> = stored
        .headers()
        .iter()
        .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())))
        .collect();
    Ok(Json(json!({
        "status": stored.status().as_u16(),
        "headers": headers,
        "body": String::from_utf8_lossy(stored.body()),
        "kept_for_seconds": engine.config().ttl.as_secs(),
    })))
}

/// `GET /`: the page.
pub(crate) fn page() -> Router {
    Router::new().route("/", get(Html(include_str!("page.html"))))
}

fn millis(duration: Duration) -> f64 {
    // Tenths are enough to read.
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}
