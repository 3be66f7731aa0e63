//! Refusals as [RFC 9457](https://www.rfc-editor.org/rfc/rfc9457) problem details.
//!
//! | `type` ends with | default status | meaning | retry with the same key? |
//! |---|---|---|---|
//! | <a id="missing-key"></a>`#missing-key` | 400 | the operation needs a key | no: send a key |
//! | <a id="invalid-key"></a>`#invalid-key` | 400 | the key is not valid | no: send a valid key |
//! | <a id="in-flight"></a>`#in-flight` | 423 | the original still runs | yes, after `Retry-After` |
//! | <a id="key-reused"></a>`#key-reused` | 422 | the key was used for another request | no: use a new key |
//! | <a id="not-replayable"></a>`#not-replayable` | 409 | the operation ran, its answer was not recorded | no: look at what it did |
//! | <a id="body-too-large"></a>`#body-too-large` | 413 | the request's body is over the limit | no |
//! | <a id="body-unreadable"></a>`#body-unreadable` | 400 | the request's body broke off or can't be decoded, or (408) stopped coming; nothing ran | yes: send all of it |
//! | <a id="scope-required"></a>`#scope-required` | 403 | the request does not say whose key it is | no: authenticate |
//! | <a id="storage-unavailable"></a>`#storage-unavailable` | 503 | the storage failed, or the record can't be read; nothing ran | yes, after `Retry-After` |
//! | <a id="rolled-back"></a>`#rolled-back` | 503 | the operation ran in a transaction that met another one, failed or took too long; nothing of it is kept | yes, after `Retry-After` |
//! | <a id="in-doubt"></a>`#in-doubt` | 503 | the connection to the database was lost during the commit | yes: the retry gets the answer, or runs |
//! | <a id="overloaded"></a>`#overloaded` | 503 | too many operations run or wait, or too many bytes are held in memory; nothing ran | yes, after `Retry-After` |

use std::fmt;

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use idempotency_core::{Config, InvalidKey, Refusal, TombstoneReason};
use serde_json::json;

use crate::key_source::KeySource;

/// Where the kinds of problem are described; the fragment names the kind.
const TYPE_BASE: &str = "https://docs.rs/idempotency-axum/latest/idempotency_axum/problem/#";

/// Why a request was refused: the typed form of the answer, also in the answer's extensions.
///
/// Replace the format with [`IdempotencyLayer::problem_response`](crate::IdempotencyLayer::problem_response).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    refusal: Refusal,
    status: StatusCode,
    detail: Detail,
    retry_after: Option<u32>,
    documentation: Option<HeaderValue>,
}

/// What there is to say beyond the kind.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Detail {
    Usual,
    Header(http::HeaderName),
    NoHeader,
    InvalidKey(InvalidKey),
    Limit(usize),
    Tombstone(TombstoneReason),
}

impl Problem {
    pub(crate) fn new(refusal: Refusal, config: &Config) -> Self {
        let (status, retry_after) = match refusal {
            Refusal::InFlight => (config.in_flight_status, Some(1)),
            Refusal::KeyReused => (config.mismatch_status, None),
            Refusal::NotReplayable => (StatusCode::CONFLICT, None),
            Refusal::BodyTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, None),
            Refusal::ScopeRequired => (StatusCode::FORBIDDEN, None),
            Refusal::StorageUnavailable
            | Refusal::RolledBack
            | Refusal::InDoubt
            | Refusal::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, Some(1)),
            _ => (StatusCode::BAD_REQUEST, None),
        };
        Self {
            refusal,
            status,
            detail: match refusal {
                Refusal::MissingKey => Detail::Header(config.header.clone()),
                _ => Detail::Usual,
            },
            retry_after,
            documentation: config.documentation.clone(),
        }
    }

    pub(crate) fn missing_key(source: &KeySource, config: &Config) -> Self {
        let usual = Self::new(Refusal::MissingKey, config);
        match source {
            KeySource::Configured => usual,
            KeySource::Header(header) => Self {
                detail: Detail::Header(header.clone()),
                ..usual
            },
            KeySource::Fn(_) => Self {
                detail: Detail::NoHeader,
                ..usual
            },
        }
    }

    pub(crate) fn invalid_key(error: InvalidKey, config: &Config) -> Self {
        Self {
            detail: Detail::InvalidKey(error),
            ..Self::new(Refusal::InvalidKey, config)
        }
    }

    pub(crate) fn body_too_large(limit: usize, config: &Config) -> Self {
        Self {
            detail: Detail::Limit(limit),
            ..Self::new(Refusal::BodyTooLarge, config)
        }
    }

    /// With the status of what went wrong.
    pub(crate) fn body_unreadable(status: StatusCode, config: &Config) -> Self {
        Self {
            status,
            ..Self::new(Refusal::BodyUnreadable, config)
        }
    }

    pub(crate) fn not_replayable(reason: TombstoneReason, config: &Config) -> Self {
        Self {
            detail: Detail::Tombstone(reason),
            ..Self::new(Refusal::NotReplayable, config)
        }
    }

    /// Adds `Retry-After` and `Link` where they apply and are missing.
    pub(crate) fn complete_headers(&self, headers: &mut HeaderMap) {
        if let Some(seconds) = self.retry_after
            && !headers.contains_key(header::RETRY_AFTER)
        {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(link) = &self.documentation
            && !headers.contains_key(header::LINK)
        {
            headers.insert(header::LINK, link.clone());
        }
    }

    /// The kind of problem.
    #[must_use]
    pub fn refusal(&self) -> Refusal {
        self.refusal
    }

    /// The status of the answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The URI that names the kind of problem, the same for every problem of the kind.
    #[must_use]
    pub fn type_uri(&self) -> String {
        format!("{TYPE_BASE}{}", self.refusal)
    }

    /// A short summary, the same for every problem of the kind.
    #[must_use]
    pub fn title(&self) -> &'static str {
        match self.refusal {
            Refusal::MissingKey => "Idempotency key is missing",
            Refusal::InvalidKey => "Idempotency key is invalid",
            Refusal::InFlight => "The original request is still running",
            Refusal::KeyReused => "Idempotency key was used for another request",
            Refusal::NotReplayable => "The answer can't be replayed",
            Refusal::BodyTooLarge => "Request body is too large",
            Refusal::BodyUnreadable => "Request body can't be read",
            Refusal::ScopeRequired => "The caller is unknown",
            Refusal::StorageUnavailable => "Idempotency storage is unavailable",
            Refusal::RolledBack => "The operation was rolled back",
            Refusal::InDoubt => "Whether the operation was committed is not known",
            Refusal::Overloaded => "Too many requests are running, waiting or held in memory",
            _ => "The request was refused",
        }
    }

    /// What is wrong with this request and what to do about it.
    #[must_use]
    pub fn detail(&self) -> String {
        match &self.detail {
            Detail::Header(header) => format!(
                "This operation requires the request header `{header}`. Send a value that is unique to the operation, and the \
                 same one with every retry."
            ),
            Detail::NoHeader => "This operation requires an idempotency key, and none was found where this server looks for it. Nothing was run."
                .to_owned(),
            Detail::InvalidKey(error) => error.to_string(),
            Detail::Limit(limit) => format!(
                "A request with an idempotency key may have a body of at most {limit} bytes here. Nothing was run."
            ),
            Detail::Tombstone(reason) => format!(
                "The operation ran, and is not run again, but its answer was not recorded: {reason}. Look up what it did \
                 before you try it with a new key."
            ),
            Detail::Usual => match self.refusal {
                Refusal::InFlight => {
                    "A request with this key is being processed. Retry later with the same key to get its answer."
                }
                Refusal::KeyReused => {
                    "This key belongs to another request. Use a new key for a new operation, and the same body for a retry."
                }
                Refusal::BodyTooLarge => {
                    "The request's body is larger than this server takes. Nothing was run."
                }
                Refusal::BodyUnreadable => {
                    "The request's body could not be read to its end. Nothing was run. Send the whole request again, with the \
                     same key."
                }
                Refusal::ScopeRequired => {
                    "A request with an idempotency key must say whose key it is, usually by its credentials."
                }
                Refusal::RolledBack => {
                    "Nothing of the operation was kept. Retry later with the same key."
                }
                Refusal::InDoubt => {
                    "Retry later with the same key: the retry gets the answer of the operation, or runs it if it was not committed."
                }
                Refusal::StorageUnavailable | Refusal::Overloaded => {
                    "Nothing was run. Retry later with the same key."
                }
                _ => self.title(),
            }
            .to_owned(),
        }
    }

    /// After how many seconds a retry makes sense, if one does.
    #[must_use]
    pub fn retry_after(&self) -> Option<u32> {
        self.retry_after
    }

    /// The value of the `Link` header, if [`Config::documentation`](crate::Config::documentation) is set.
    #[must_use]
    pub fn link(&self) -> Option<&HeaderValue> {
        self.documentation.as_ref()
    }
}

/// `application/problem+json` with `Retry-After` and `Link` as they apply.
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = json!({
            "type": self.type_uri(),
            "title": self.title(),
            "status": self.status.as_u16(),
            "detail": self.detail(),
        });
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        self.complete_headers(headers);
        response
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}
