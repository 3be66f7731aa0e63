//! Why there is no connection.

use std::{error::Error, fmt};

use redis::RedisError;

use crate::{BoxError, StorageError};

/// The oldest version that has `SET … NX GET` and flags of scripts.
pub(super) const OLDEST: u32 = 7;

/// Redis could not be connected to, or is not fit to keep records.
///
/// Neither it nor its sources show the URL, which may hold a password.
#[derive(Debug)]
pub struct RedisConnectError {
    reason: Reason,
    source: Option<BoxError>,
}

/// Why; see [`RedisConnectError::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RedisConnectErrorKind {
    /// The URL can't be read, or asks for what this build does not have.
    Url,
    /// No server answers there, or it does not let this user in.
    Unreachable,
    /// The server is older than Redis 7.
    TooOld,
    /// The server evicts records, or does not tell, and
    /// [`require_noeviction`](crate::RedisConnect::require_noeviction) is set.
    Evicts,
}

#[derive(Debug)]
pub(super) enum Reason {
    Url,
    Unreachable,
    TooOld(String),
    Evicts(String),
    EvictionUnknown,
}

impl RedisConnectError {
    pub(super) fn new(reason: Reason) -> Self {
        Self {
            reason,
            source: None,
        }
    }

    pub(super) fn url(error: RedisError) -> Self {
        Self {
            reason: Reason::Url,
            source: Some(error.into()),
        }
    }

    pub(super) fn unreachable(source: impl Into<BoxError>) -> Self {
        Self {
            reason: Reason::Unreachable,
            source: Some(source.into()),
        }
    }

    /// Why it failed.
    #[must_use]
    pub fn kind(&self) -> RedisConnectErrorKind {
        match self.reason {
            Reason::Url => RedisConnectErrorKind::Url,
            Reason::Unreachable => RedisConnectErrorKind::Unreachable,
            Reason::TooOld(_) => RedisConnectErrorKind::TooOld,
            Reason::Evicts(_) | Reason::EvictionUnknown => RedisConnectErrorKind::Evicts,
        }
    }
}

impl fmt::Display for RedisConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::Url => f.write_str("the URL of Redis can't be used"),
            Reason::Unreachable => f.write_str("Redis can't be reached"),
            Reason::TooOld(version) => write!(
                f,
                "Redis {version} is too old: version {OLDEST} or newer is needed, or Valkey"
            ),
            Reason::Evicts(policy) => write!(
                f,
                "Redis evicts records by the policy {policy} when its memory is full; set `maxmemory-policy noeviction`"
            ),
            Reason::EvictionUnknown => f.write_str(
                "Redis does not tell whether it evicts records; allow its user INFO or CONFIG GET",
            ),
        }
    }
}

impl Error for RedisConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<RedisConnectError> for StorageError {
    fn from(error: RedisConnectError) -> Self {
        Self::unavailable(error)
    }
}
