//! Why there is no connection.

use std::{error::Error, fmt};

use redis::{ErrorKind, RedisError, ServerErrorKind};

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

#[derive(Debug)]
pub(super) enum Reason {
    Url,
    Unreachable,
    Refused,
    TooOld(String),
    NotACluster,
    Replica,
    Sentinel,
    Evicts(String),
    EvictionUnknown,
    NoSuchDatabase,
    ReplicasOfACluster,
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

    /// What came of connecting, or of the first commands.
    pub(super) fn connecting(error: RedisError) -> Self {
        let reason = match is_refusal(&error) {
            true => Reason::Refused,
            false if is_of_the_database(&error) => Reason::NoSuchDatabase,
            false => Reason::Unreachable,
        };
        Self {
            reason,
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
            Reason::Refused => RedisConnectErrorKind::Refused,
            Reason::TooOld(_) => RedisConnectErrorKind::TooOld,
            Reason::NotACluster => RedisConnectErrorKind::NotACluster,
            Reason::Replica | Reason::Sentinel => RedisConnectErrorKind::NotAMaster,
            Reason::Evicts(_) | Reason::EvictionUnknown => RedisConnectErrorKind::Evicts,
            Reason::NoSuchDatabase | Reason::ReplicasOfACluster => {
                RedisConnectErrorKind::Unsupported
            }
        }
    }
}

impl fmt::Display for RedisConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::Url => f.write_str("the URL of Redis can't be used"),
            Reason::Unreachable => f.write_str("Redis can't be reached"),
            Reason::Refused => f.write_str(
                "Redis refuses this user: check the user, the password (in a URL its special characters are percent-encoded) and the rights of the user",
            ),
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
            Reason::NoSuchDatabase => f.write_str(
                "Redis has no database of the number in the URL: a Cluster has only 0, a server 16 unless `databases` says otherwise",
            ),
            Reason::ReplicasOfACluster => f.write_str(
                "`wait_replicas` is for one server with replicas, and this is a Cluster: leave it out, or use one server or sentinels",
            ),
        }
    }
}

/// Whether the server does not let the user in, or not do what connecting takes.
pub(super) fn is_refusal(error: &RedisError) -> bool {
    let kinds = [
        ErrorKind::AuthenticationFailed,
        ErrorKind::Server(ServerErrorKind::NoPerm),
    ];
    // Of a refused `SELECT` the driver keeps no more than the text.
    let says = |text| error.detail().is_some_and(|detail| detail.contains(text));
    kinds.contains(&error.kind())
        || ["WRONGPASS", "NOAUTH"].map(Some).contains(&error.code())
        || says("has no permissions to run")
        || says("Authentication required")
}

/// Whether `SELECT` failed. The driver says so by no more than its text.
fn is_of_the_database(error: &RedisError) -> bool {
    error.to_string().contains("refused to switch database")
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
