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
    /// Several servers are named, and they are no Cluster: each process could keep its records in another one.
    NotACluster,
    /// The server is a replica or a sentinel, which keeps no records.
    NotAMaster,
    /// The server evicts records, or does not tell, and
    /// [`require_noeviction`](crate::RedisConnect::require_noeviction) is set.
    Evicts,
}

#[derive(Debug)]
pub(super) enum Reason {
    Url,
    Unreachable,
    TooOld(String),
    NotACluster,
    Replica,
    Sentinel,
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
            Reason::NotACluster => RedisConnectErrorKind::NotACluster,
            Reason::Replica | Reason::Sentinel => RedisConnectErrorKind::NotAMaster,
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
            Reason::NotACluster => f.write_str(
                "the servers that are named are no Cluster; name one of them, or use `RedisStorage::sentinel` to follow a master",
            ),
            Reason::Replica => f.write_str(
                "Redis is a replica there, which keeps no records of ours; name its master, or use `RedisStorage::sentinel`",
            ),
            Reason::Sentinel => f.write_str(
                "a sentinel answers there, which keeps no records; give it to `RedisStorage::sentinel`",
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
