//! A mistake in how handlers and the layer are put together, found before the server listens.

use std::fmt;

use crate::policy::{KeyPolicy, Requirement};

/// A layer that can't do what a handler asks; see [`IdempotencyLayer::check`](crate::IdempotencyLayer::check).
#[derive(Clone, Debug, PartialEq)]
pub struct Misuse {
    kind: MisuseKind,
}

/// What is wrong; see [`Misuse::kind`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum MisuseKind {
    /// A policy names a cache that the layer does not have.
    #[non_exhaustive]
    UnknownCache {
        /// The handler; `None` if the policy was set on the layer.
        handler: Option<String>,
        /// The name.
        cache: String,
        /// The names that the layer has.
        known: Vec<String>,
    },
    /// A handler that uses keys stands on a route that no layer wraps: added after `.layer`, or in a router that was merged or nested
    /// without one. It answers 500.
    #[non_exhaustive]
    NoLayer {
        /// The handler.
        handler: String,
        /// Its policy.
        policy: Box<KeyPolicy>,
    },
}

impl Misuse {
    pub(crate) fn new(kind: MisuseKind) -> Self {
        Self { kind }
    }

    /// What is wrong.
    #[must_use]
    pub fn kind(&self) -> &MisuseKind {
        &self.kind
    }
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            MisuseKind::UnknownCache {
                handler,
                cache,
                known,
            } => {
                match handler {
                    Some(handler) => write!(f, "handler `{handler}`")?,
                    None => f.write_str("the policy of the layer")?,
                }
                write!(
                    f,
                    " uses the cache {cache:?}, which the layer does not have ("
                )?;
                match known.is_empty() {
                    true => f.write_str("it has no named caches")?,
                    false => write!(f, "it has: {}", known.join(", "))?,
                }
                write!(f, "): add `.cache({cache:?}, storage)`")
            }
            MisuseKind::NoLayer { handler, policy } => {
                let asks = match policy.requirement {
                    Requirement::Required => "requires a key",
                    Requirement::Optional => "takes an optional key",
                    Requirement::Exempt => "is exempt",
                };
                write!(
                    f,
                    "handler `{handler}`, which {asks}, stands on a route without an idempotency layer, so it answers 500: add the \
                     route before `.layer(…)`, or put the layer on the router that is merged or nested too"
                )
            }
        }
    }
}

impl std::error::Error for Misuse {}
