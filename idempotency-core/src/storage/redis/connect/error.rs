//! Why there is no connection.

use std::borrow::Cow;

use redis::{ErrorKind, RedisError};

use crate::{BoxError, StorageError};

/// Redis could not be connected to, or is not fit to keep records.
///
/// Neither it nor its sources show the URL, which may hold a password.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct RedisConnectError {
    kind: RedisConnectErrorKind,
    message: Cow<'static, str>,
    source: Option<BoxError>,
}

/// Why; see [`RedisConnectError::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RedisConnectErrorKind {
    /// The URL can't be read, or asks for what this build does not have.
    Url,
    /// No server answers there.
    Unreachable,
    /// A server answers, and does not let this user in: the password is wrong or missing, or the user lacks a right that connecting
    /// needs.
    Refused,
    /// The server is older than Redis 7.
    TooOld,
    /// Several servers are named, and they are no Cluster: each process could keep its records in another one.
    NotACluster,
    /// The server is a replica or a sentinel, which keeps no records.
    NotAMaster,
    /// The server evicts records, or does not tell, and
    /// [`require_noeviction`](crate::RedisConnect::require_noeviction) is set.
    Evicts,
    /// The server can't do what is asked of it: it has no database of that number, or is a Cluster and
    /// [`wait_replicas`](crate::RedisConnect::wait_replicas) is set.
    Unsupported,
}

impl RedisConnectError {
    pub(super) fn new(kind: RedisConnectErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    fn caused_by(mut self, source: impl Into<BoxError>) -> Self {
        self.source = Some(source.into());
        self
    }

    pub(super) fn url(error: RedisError) -> Self {
        let message = "the URL of Redis can't be used";
        Self::new(RedisConnectErrorKind::Url, message).caused_by(error)
    }

    /// What came of connecting, or of the first commands.
    pub(super) fn connecting(error: RedisError) -> Self {
        let refused = if is_refusal(&error) {
            Self::new(
                RedisConnectErrorKind::Refused,
                "Redis refuses this user: check the user, the password (in a URL its special characters are percent-encoded) and the rights of the user",
            )
        } else if error.to_string().contains("refused to switch database") {
            // Of a failed `SELECT` the driver keeps no more than the text.
            Self::new(
                RedisConnectErrorKind::Unsupported,
                "Redis has no database of the number in the URL: a Cluster has only 0, a server 16 unless `databases` says otherwise",
            )
        } else {
            return Self::unreachable(error);
        };
        refused.caused_by(error)
    }

    pub(super) fn unreachable(source: impl Into<BoxError>) -> Self {
        let message = "Redis can't be reached";
        Self::new(RedisConnectErrorKind::Unreachable, message).caused_by(source)
    }

    /// Why it failed.
    #[must_use]
    pub fn kind(&self) -> RedisConnectErrorKind {
        self.kind
    }
}

/// Whether the server does not let the user in, or not do what connecting takes.
fn is_refusal(error: &RedisError) -> bool {
    // Of a refused `SELECT` the driver keeps no more than the text.
    let says = |text| error.detail().is_some_and(|detail| detail.contains(text));
    error.kind() == ErrorKind::AuthenticationFailed
        || matches!(error.code(), Some("NOPERM" | "WRONGPASS" | "NOAUTH"))
        || says("has no permissions to run")
        || says("Authentication required")
}

impl From<RedisConnectError> for StorageError {
    fn from(error: RedisConnectError) -> Self {
        Self::unavailable(error)
    }
}
