//! A mistake in how handlers and the layer are put together, found before the server listens.

use std::{fmt, time::Duration};

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
    /// A policy asks for a transaction that its cache can't lend. Its routes answer 500.
    #[non_exhaustive]
    NoTransaction {
        /// The handler; `None` if the policy was set on the layer.
        handler: Option<String>,
        /// Why not.
        problem: TransactionProblem,
    },
}

/// Why a storage can't lend the transaction that a handler takes; see [`MisuseKind::NoTransaction`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransactionProblem {
    /// The storage lends none, or stands behind another one that can't pass them on.
    NoneLent {
        /// The database that the handler asks for.
        database: &'static str,
    },
    /// The storage is in another database.
    OtherDatabase {
        /// The database that the handler asks for.
        database: &'static str,
        /// The database of the storage.
        storage: &'static str,
    },
    /// The pool has one connection: a transaction would leave none for claims and replays.
    PoolTooSmall,
    /// The database has one writer, and renewals of other claims could wait until their lease is over.
    TooLong {
        /// How long a transaction may be open.
        max_transaction: Duration,
        /// The lease.
        lease: Duration,
    },
    /// A manual handler runs on conflicts too, which have no transaction.
    Manual,
}

impl fmt::Display for TransactionProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoneLent { database } => write!(
                f,
                "its cache lends no transactions: give it a storage of {database} itself (no `NearCache` in front), or name one by \
                 `cache_name`"
            ),
            Self::OtherDatabase { database, storage } => write!(
                f,
                "it asks for {database} and its cache is in {storage}: name another cache by `cache_name`, or take a transaction of \
                 {storage}"
            ),
            Self::PoolTooSmall => f.write_str(
                "the pool of its cache has one connection, which a transaction would take: set `max_connections` to two or more",
            ),
            Self::TooLong {
                max_transaction,
                lease,
            } => write!(
                f,
                "its transactions may be open for {max_transaction:?}, and other claims with a lease of {lease:?} can't be renewed \
                 meanwhile: set `max_transaction` below a third of `LockPolicy::ttl`"
            ),
            Self::Manual => f.write_str(
                "it answers conflicts itself, and those have no transaction: remove `manual` or the transaction",
            ),
        }
    }
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
                write_owner(f, handler.as_deref())?;
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
            MisuseKind::NoTransaction { handler, problem } => {
                write_owner(f, handler.as_deref())?;
                write!(f, " can't have its transaction: {problem}")
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

/// Whose policy it is.
fn write_owner(f: &mut fmt::Formatter<'_>, handler: Option<&str>) -> fmt::Result {
    match handler {
        Some(handler) => write!(f, "handler `{handler}`"),
        None => f.write_str("the policy of the layer"),
    }
}

impl std::error::Error for Misuse {}
