//! Whether the handler on whose word a request was let through is the one that answered.

use std::sync::Arc;

use axum::{extract::MatchedPath, response::Response};
use http::Extensions;

use crate::{plan::Shared, request::Acknowledgement};

/// Proof, to come, that the handler on whose word a request was let through is the one that answered.
pub(crate) struct Receipt {
    acknowledgement: Acknowledgement,
    handler: &'static str,
    path: Option<MatchedPath>,
    shared: Arc<Shared>,
}

impl Receipt {
    pub(crate) fn new(
        acknowledgement: Acknowledgement,
        handler: &'static str,
        extensions: &Extensions,
        shared: &Arc<Shared>,
    ) -> Self {
        Self {
            acknowledgement,
            handler,
            path: extensions.get().cloned(),
            shared: shared.clone(),
        }
    }

    /// A refusal, an error or a redirect may come from a middleware between us and the handler, and a client may provoke it. A
    /// success without the handler's acknowledgement is another handler's, which never said that it may run without a key.
    pub(crate) fn check(self, response: &Response) {
        if self.acknowledgement.was_given() || !response.status().is_success() {
            self.shared.give_back(self.acknowledgement);
            return;
        }
        let path = self.path.as_ref().map_or("", |path| path.as_str());
        tracing::error!(
            target: "idempotency",
            handler = self.handler,
            path,
            cure = "put the layer on the routes inside this service, or fix its policy with `.policy(…)`",
            "a request ran unprotected because of the policy of a handler that did not answer it; this route now has the \
             mode's default policy"
        );
        self.shared.distrust(self.handler, path.to_owned());
    }
}
