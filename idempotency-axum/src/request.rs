//! How the path of a request is read, and how its operation is named.

use axum::extract::{MatchedPath, OriginalUri};
use http::{Extensions, Uri, request::Parts};
use idempotency_core::{Config, Encoded, Key, RequestView};

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

/// The route's own pattern, so that names built from it are as few as the routes. Empty if no route matched.
pub(crate) fn matched_path(extensions: &Extensions) -> &str {
    extensions
        .get::<MatchedPath>()
        .map_or("", MatchedPath::as_str)
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
