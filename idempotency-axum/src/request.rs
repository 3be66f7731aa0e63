//! What a request carries from the layer to the handler, and how its path is read.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use axum::extract::OriginalUri;
use http::{Uri, request::Parts};
use idempotency_core::{Config, Encoded, EncodedKey, Key, Record, RequestView};

use crate::policy::{KeyPolicy, Requirement, Terms};

/// Request extension: this request is protected, and how.
#[derive(Clone)]
pub(crate) struct Protection(Arc<Protected>);

struct Protected {
    key: Key,
    encoded: EncodedKey,
    terms: Arc<Terms>,
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
    pub(crate) fn new(
        key: Key,
        encoded: EncodedKey,
        terms: Arc<Terms>,
        conflict: Conflict,
    ) -> Self {
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

/// Names the operation of a request. An encoder that does not read the body gets none.
pub(crate) fn encode(
    config: &Config,
    key: &Key,
    parts: &Parts,
    body: &[u8],
    scope: Option<&[u8]>,
) -> Encoded {
    let body = if config.encoder.reads_body() {
        body
    } else {
        &[]
    };
    config.encoder.encode(
        key,
        &RequestView {
            method: &parts.method,
            path_and_query: path_and_query(original_uri(parts)),
            headers: &parts.headers,
            body,
            scope,
        },
    )
}

/// Path and query as the client sent them.
pub(crate) fn path_and_query(uri: &Uri) -> &str {
    uri.path_and_query()
        .map_or_else(|| uri.path(), |path_and_query| path_and_query.as_str())
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(uri: &str) -> Parts {
        Request::builder().uri(uri).body(()).unwrap().into_parts().0
    }

    #[test]
    fn scheme_and_authority_are_left_out() {
        let parts = parts("https://shop.example/orders?page=1");
        assert_eq!(path_and_query(original_uri(&parts)), "/orders?page=1");
    }
}
