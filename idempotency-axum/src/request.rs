//! What a request carries from the layer to the handler, and how its body and path are read.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use axum::{body::Body, extract::OriginalUri};
use bytes::Bytes;
use http::{Uri, header, request::Parts};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use idempotency_core::{BoxError, EncodedKey, Key, Record};

use crate::policy::{KeyPolicy, Requirement, Terms};

/// Request extension: this request is protected, and how.
#[derive(Clone)]
pub(crate) struct Protection(Arc<Protected>);

struct Protected {
    key: Key,
    encoded: EncodedKey,
    terms: Terms,
    conflict: Conflict,
    entry: AtomicU8,
}

/// What stands recorded when a manual handler runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conflict(pub(crate) Option<Record>);

/// The handler is not one of ours, so nobody says when it is entered.
const ENTRY_UNKNOWN: u8 = 0;
/// A handler with a combinator was called, and does not say whether its extractors are done: it counts as entered.
const CALLED: u8 = 1;
const ENTRY_EXPECTED: u8 = 2;
const ENTERED: u8 = 3;
/// Nothing may be recorded: the layer applied another policy than the handler's own.
const REFUSED: u8 = 4;

impl Protection {
    pub(crate) fn new(key: Key, encoded: EncodedKey, terms: Terms, conflict: Conflict) -> Self {
        Self(Arc::new(Protected {
            key,
            encoded,
            terms,
            conflict,
            entry: AtomicU8::new(ENTRY_UNKNOWN),
        }))
    }

    pub(crate) fn key(&self) -> &Key {
        &self.0.key
    }

    pub(crate) fn encoded(&self) -> EncodedKey {
        self.0.encoded
    }

    pub(crate) fn conflict(&self) -> Option<&Conflict> {
        self.0.terms.manual.then_some(&self.0.conflict)
    }

    /// Whether the layer did what `policy` asks. A key that is there protects alike, required or optional.
    pub(crate) fn is_on_terms_of(&self, policy: &KeyPolicy) -> bool {
        policy.requirement != Requirement::Exempt && self.0.terms == policy.terms
    }

    pub(crate) fn call(&self) {
        self.0.entry.fetch_max(CALLED, Ordering::Relaxed);
    }

    pub(crate) fn expect_entry(&self) {
        self.0.entry.fetch_max(ENTRY_EXPECTED, Ordering::Relaxed);
    }

    pub(crate) fn enter(&self) {
        self.0.entry.store(ENTERED, Ordering::Relaxed);
    }

    pub(crate) fn refuse(&self) {
        self.0.entry.store(REFUSED, Ordering::Relaxed);
    }

    /// Whether nothing may be recorded: the answer is our own 500, or that of a handler which wants no key.
    pub(crate) fn was_refused(&self) -> bool {
        self.0.entry.load(Ordering::Relaxed) == REFUSED
    }

    /// Whether a handler of ours was entered, as far as it says so.
    pub(crate) fn was_entered(&self) -> bool {
        matches!(self.0.entry.load(Ordering::Relaxed), CALLED | ENTERED)
    }

    /// Whether extractors answered for a handler that was never entered. The answer itself orders this after `enter`.
    pub(crate) fn was_rejected(&self) -> bool {
        self.0.entry.load(Ordering::Relaxed) == ENTRY_EXPECTED
    }
}

impl fmt::Debug for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protection")
            .field("encoded", &self.0.encoded)
            .field("terms", &self.0.terms)
            .finish_non_exhaustive()
    }
}

/// Request extension: a policy nearer to the client has decided, or the layer has, and inner policies accept it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decided;

/// Request extension: a layer with a fixed policy has seen that there is no key, which optional handlers accept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WithoutKey;

/// The URI that the client sent: `nest` strips the prefix from the one that an inner layer sees.
pub(crate) fn original_uri(parts: &Parts) -> &Uri {
    parts
        .extensions
        .get::<OriginalUri>()
        .map_or(&parts.uri, |OriginalUri(uri)| uri)
}

/// Path and query as the client sent them.
pub(crate) fn path_and_query(uri: &Uri) -> &str {
    uri.path_and_query()
        .map_or_else(|| uri.path(), |path_and_query| path_and_query.as_str())
}

/// A body that could not be buffered.
#[derive(Debug)]
pub(crate) enum Unbuffered {
    TooLarge,
    /// A layer outside has a lower limit, which nobody tells us.
    TooLargeOutside,
    Broken(BoxError),
}

/// The whole body in memory, and the same body to read again, trailers included.
pub(crate) async fn buffer(
    parts: &Parts,
    body: Body,
    limit: usize,
) -> Result<(Bytes, Body), Unbuffered> {
    if announced_length(parts).is_some_and(|length| length > limit as u64) {
        return Err(Unbuffered::TooLarge);
    }
    let collected = Limited::new(body, limit).collect().await;
    let collected = collected.map_err(|error| {
        if error.is::<LengthLimitError>() {
            Unbuffered::TooLarge
        } else if has_length_limit(&*error) {
            Unbuffered::TooLargeOutside
        } else {
            Unbuffered::Broken(error)
        }
    })?;
    let trailers = collected.trailers().cloned();
    let bytes = collected.to_bytes();
    let full = Full::new(bytes.clone());
    let body = match trailers {
        None => Body::new(full),
        Some(trailers) => Body::new(full.with_trailers(std::future::ready(Some(Ok(trailers))))),
    };
    Ok((bytes, body))
}

/// `Content-Length`, so that a body over the limit is refused before it is read.
fn announced_length(parts: &Parts) -> Option<u64> {
    let length = parts.headers.get(header::CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

/// Whether a limit was hit somewhere. Our own says so itself, that of a layer outside is in the error of the body.
fn has_length_limit(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source())
        .any(|error| error.is::<LengthLimitError>())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(uri: &str) -> Parts {
        Request::builder().uri(uri).body(()).unwrap().into_parts().0
    }

    #[tokio::test]
    async fn the_limit_is_inclusive() {
        let parts = parts("/");
        let (bytes, again) = buffer(&parts, Body::from("12345"), 5).await.unwrap();
        assert_eq!(bytes, "12345");
        assert_eq!(again.collect().await.unwrap().to_bytes(), "12345");
        let error = buffer(&parts, Body::from("123456"), 5).await.unwrap_err();
        assert!(matches!(error, Unbuffered::TooLarge));
    }

    #[tokio::test]
    async fn trailers_survive() {
        let mut trailers = http::HeaderMap::new();
        trailers.insert("x-checksum", http::HeaderValue::from_static("1"));
        let body = Full::new(Bytes::from("x"))
            .with_trailers(std::future::ready(Some(Ok(trailers.clone()))));
        let (_, again) = buffer(&parts("/"), Body::new(body), 5).await.unwrap();
        assert_eq!(again.collect().await.unwrap().trailers(), Some(&trailers));
    }

    #[test]
    fn scheme_and_authority_are_left_out() {
        let parts = parts("https://shop.example/orders?page=1");
        assert_eq!(path_and_query(original_uri(&parts)), "/orders?page=1");
    }
}
