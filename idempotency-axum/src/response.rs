//! Which parts of an answer are recorded, and how a recorded answer is replayed.

use std::convert::Infallible;

use axum::{
    body::Body,
    response::{IntoResponse, IntoResponseParts, Response, ResponseParts},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use idempotency_core::{Config, StoredResponse};

/// A part of a response by which a handler says that this answer is not kept, whatever its status: the key is released, and a retry
/// runs again.
///
/// For an error that is sent with the status of a success, as GraphQL does. If a manual handler answers a conflict with it, the record
/// stays as it is.
///
/// ```
/// use axum::{Json, response::IntoResponse};
/// use idempotency_axum::{DoNotRecord, idempotency_key};
/// use serde_json::json;
///
/// #[idempotency_key]
/// async fn graphql() -> impl IntoResponse {
///     (DoNotRecord, Json(json!({ "errors": [{ "message": "try again" }] })))
/// }
/// # let _ = graphql;
/// ```
///
/// It works in a tuple, before the body, as `Extension(DoNotRecord)`, and from what an error's `IntoResponse` makes.
#[derive(Clone, Copy, Debug)]
#[must_use = "it has to be a part of the response"]
pub struct DoNotRecord;

impl DoNotRecord {
    pub(crate) fn is_part_of<B>(response: &http::Response<B>) -> bool {
        response.extensions().get::<Self>().is_some()
    }
}

impl IntoResponseParts for DoNotRecord {
    type Error = Infallible;

    fn into_response_parts(self, mut parts: ResponseParts) -> Result<ResponseParts, Infallible> {
        parts.extensions_mut().insert(self);
        Ok(parts)
    }
}

/// An empty answer that is not kept.
impl IntoResponse for DoNotRecord {
    fn into_response(self) -> Response {
        (self, ()).into_response()
    }
}

/// Headers that belong to one connection, RFC 9110 section 7.6.1 and RFC 9112 section 9.
static HOP_BY_HOP: [HeaderName; 9] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The stored form of an answer.
pub(crate) fn stored(
    status: StatusCode,
    headers: &HeaderMap,
    body: Bytes,
    config: &Config,
) -> StoredResponse {
    let named = named_in_connection(headers);
    let is_kept = |name: &HeaderName| {
        let dropped = HOP_BY_HOP.contains(name)
            || named.contains(name)
            || config.stripped_headers.contains(name)
            // Computed anew from the body that is sent.
            || name == header::CONTENT_LENGTH;
        !dropped
    };
    StoredResponse::of_kept(status, headers, is_kept, body)
}

fn named_in_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    headers
        .get_all(header::CONNECTION)
        .into_iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok())
        .collect()
}

/// The recorded answer, for a retry.
pub(crate) fn replayed(stored: &StoredResponse, config: &Config) -> Response {
    let mut response = Response::new(Body::from(stored.body().clone()));
    *response.status_mut() = config.conflict_status.unwrap_or(stored.status());
    *response.headers_mut() = stored.headers();
    mark_replayed(response.headers_mut(), config);
    response
}

pub(crate) fn mark_replayed(headers: &mut HeaderMap, config: &Config) {
    if let Some(name) = &config.replay_header {
        headers.insert(name, HeaderValue::from_static("true"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(config: &Config) -> HeaderMap {
        let mut response = Response::new(());
        let headers = response.headers_mut();
        for (name, value) in [
            ("connection", "close, X-Hop"),
            ("x-hop", "1"),
            ("keep-alive", "5"),
            ("transfer-encoding", "chunked"),
            ("te", "trailers"),
            ("trailer", "x-sum"),
            ("upgrade", "h2c"),
            ("proxy-authenticate", "Basic"),
            ("date", "Mon, 01 Jan 2026 00:00:00 GMT"),
            ("set-cookie", "session=1"),
            ("content-length", "99"),
            ("location", "/orders/1"),
            ("etag", "\"1\""),
            ("cache-control", "no-store"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let (parts, ()) = response.into_parts();
        stored(parts.status, &parts.headers, Bytes::from("body"), config).headers()
    }

    #[test]
    fn what_belongs_to_one_answer_is_not_recorded() {
        let names: Vec<_> = kept(&Config::default())
            .keys()
            .map(|name| name.as_str().to_owned())
            .collect();
        assert_eq!(names, ["location", "etag", "cache-control"]);
    }

    #[test]
    fn a_cookie_can_be_kept_and_more_be_stripped() {
        let config = Config::default()
            .keep_header(header::SET_COOKIE)
            .strip_header(header::ETAG);
        let kept = kept(&config);
        assert!(kept.contains_key(header::SET_COOKIE));
        assert!(!kept.contains_key(header::ETAG));
    }

    #[test]
    fn a_replay_has_the_conflict_status_or_the_original_one() {
        let stored = StoredResponse::new(StatusCode::CREATED, &HeaderMap::new(), "x");
        let replay = replayed(&stored, &Config::default());
        assert_eq!(replay.status(), StatusCode::CONFLICT);
        assert_eq!(replay.headers()["idempotency-replayed"], "true");
        let config = Config::default().conflict_status(None).replay_header(None);
        let replay = replayed(&stored, &config);
        assert_eq!(replay.status(), StatusCode::CREATED);
        assert!(replay.headers().is_empty());
    }
}
