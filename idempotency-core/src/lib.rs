//! Idempotency keys without a web framework: what a key, a claim and a record are, where they are kept, and the engine that
//! decides who runs an operation.
//!
//! For axum use [`idempotency-axum`](https://docs.rs/idempotency-axum), which re-exports all of this. Use this crate directly
//! to protect something else, say the consumer of a queue, or to write a storage.
//!
//! # The story
//!
//! A client names its operation with a [`Key`]. A [`KeyEncoder`] makes an [`EncodedKey`] of it, a hash that also holds what
//! else makes it *this* operation (path, caller, body), and perhaps a [`Fingerprint`] that tells a retry from another request
//! under the same key. [`Engine::begin`] then asks the [`Storage`] in one atomic step for a claim:
//!
//! ```text
//!                    begin
//!         ┌──────┐ (one wins)   ┌─────────┐  complete    ┌───────────────────────┐
//!  ──────►│ free ├─────────────►│ claimed ├─────────────►│ record                │──┐ begin:
//!         └──────┘              └┬─┬────▲─┘  tombstone   │  answer, or tombstone │◄─┘ replayed
//!            ▲ ▲     release     │ │    │                └───────────┬───────────┘
//!            │ └─────────────────┘ └────┘ renew                      │
//!            │   (not stored,        (every third                    │
//!            │    panicked,           of the lease)                  │
//!            │    lease over)                                        │
//!            └───────────────────────────────────────────────────────┘
//!                          TTL over, or removed by hand
//! ```
//!
//! * **free → claimed.** Exactly one of any number of callers gets [`Decision::Execute`] with a [`Claim`]. The others wait up to
//!   [`LockPolicy::timeout`], woken when the first is done, and are then refused.
//! * **claimed.** A *keeper* task, on a thread of its own, renews the claim for as long as the operation takes, so the lease bounds only
//!   how long a key stays blocked after its process died. After [`LockPolicy::max_hold`] the key gets a tombstone, which stays while
//!   the operation runs and for the TTL after that.
//! * **claimed → record.** [`Claim::complete`] stores the answer; every retry gets it. A **tombstone** says that the operation
//!   ran but left no answer to replay: a retry is told so, and never runs.
//! * **claimed → free.** [`Claim::release`]: what the operation answered is not kept, so a retry runs.
//!
//! # Guarantees
//!
//! Never two executions of a key at once while its lease lives, and never another one once an outcome is recorded. A claim is
//! named by a random [`Token`], so a holder that was taken over can't end its successor's claim: it is told [`Held::Lost`].
//! When a record can't be stored the engine answers the key from memory, keeps the claim alive and tries again until the
//! record's TTL is over.
//!
//! What no lease can give is exactly-once: a process that is stopped for longer than its lease, and then goes on, runs beside
//! its successor.
//!
//! # Storages
//!
//! | storage | keeps records | claims |
//! |---|---|---|
//! | [`MemoryStorage`] | in this process, bounded by bytes | in this process |
//! | [`RedisStorage`] | in Redis 7, Valkey or a Cluster of them | there, for any number of processes |
//! | [`SqliteStorage`] | in one SQLite file, through restarts | there, for the processes of one machine |
//! | [`PostgresStorage`] | in a table of PostgreSQL | there, for any number of processes |
//! | [`LockedStorage`] | in any [`Cache`]: three functions | by any [`Lock`], say [`ProcessLock`]; no fencing where the lock has none |
//! | [`NearCache`] over one of them | also in this process, for 60 s at most | where the storage keeps them |
//! | your own [`Storage`] | | checked by the suite in [`storage::conformance`] |
//!
//! # Features
//!
//! | feature | default | build | adds |
//! |---|---|---|---|
//! | `memory` | yes | 0.8 | [`MemoryStorage`]: records in this process; [`MokaCache`] and [`NearCache`] |
//! | `redis` | no | 1.5 | [`RedisStorage`], [`RedisLock`], [`RedisCache`]: records and claims that any number of processes share |
//! | `redis-tls` | no | 1.5 | `rediss://` for them, by rustls with the system's root certificates |
//! | `settings` | yes | 0.7 | [`Settings`]: [`Config`] and the storages from a file or the environment |
//! | `postgres` | no | 1.8 | [`PostgresStorage`]: records and claims in a table of PostgreSQL, which any number of processes share |
//! | `sqlite` | no | 1.7 | [`SqliteStorage`]: records and claims in one SQLite file, for the processes of one machine; SQLite is compiled in |
//! | `conformance` | no | | [`storage::conformance`]: the suite that every storage must pass; [`Env::simulated`] |
//!
//! `build` is the CPU time of `cargo build -p idempotency-axum --no-default-features --features …` from nothing, over the 37 s with the
//! default features; without any feature it is 0.8, with all of them 2.1. On two cores of an AMD EPYC that other builds kept busy, so
//! true to about a fifth.
#![forbid(unsafe_code)]
// Shows on docs.rs, which builds with nightly, what needs a feature.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod budget;
mod codes;
mod config;
mod encoder;
mod engine;
mod env;
mod error;
mod event;
mod key;
mod record;
#[cfg(feature = "settings")]
mod settings;
pub mod storage;

pub use self::{
    budget::{Budget, Reservation},
    config::{
        Config, LockPolicy, Mode, OnStorageError, OnUnreadable, Scope, StoreOn, UnknownCaller,
    },
    encoder::{
        BasicKeyEncoder, Encoded, Fingerprint, FingerprintFieldsEncoder, FingerprintKeyEncoder,
        KeyEncoder, KeyOnlyEncoder, RequestView,
    },
    engine::{
        Claim, Completion, Decision, Engine, KeyTransaction, NotLent, Progress, Ran, Refused,
        Replay, TransactionClaim, TransactionEnd, TransactionSlot,
    },
    env::{Env, Environment, Spawner},
    error::{BoxError, StorageError, StorageErrorKind},
    event::{Event, Observer, Operation, Refusal, TracingObserver},
    key::{EncodedKey, InvalidKey, InvalidKeyKind, Key, KeyFormat, ParseEncodedKeyError},
    record::{DecodeError, DecodeErrorKind, Outcome, Record, StoredResponse, TombstoneReason},
    storage::{
        AnyStorage, Begin, BeginTransaction, Cache, Committed, Entry, Held, Lock, LockedStorage,
        NewClaim, NewTransaction, PhaseError, ProcessLock, RolledBack, Storage, Token, Transaction,
        TransactionDatabase, Transactions, Writes,
    },
};

/// The driver, for its connections and clients.
#[cfg(feature = "redis")]
pub use redis;

/// The driver of PostgreSQL and SQLite, for its pools and connections.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub use sqlx;

#[cfg(any(test, feature = "conformance"))]
pub use self::env::SimulatedClock;
#[cfg(feature = "settings")]
pub use self::settings::{Opened, Settings, SettingsError, SettingsErrorKind};
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub use self::storage::sql::{purge_timer::Purger, table::InvalidTableName};
#[cfg(feature = "memory")]
pub use self::storage::{
    MokaCache, NearCache,
    memory::{MemoryStorage, MemoryStorageBuilder, WhenFull},
};
#[cfg(feature = "redis")]
pub use self::storage::{
    RedisCache, RedisLock,
    redis::{
        RedisStorage,
        connect::{RedisConnect, RedisConnectError, RedisConnectErrorKind},
    },
};

#[cfg(feature = "postgres")]
pub use self::storage::sql::postgres::{
    PostgresStorage,
    connect::{PostgresConnect, PostgresConnectError, PostgresConnectErrorKind},
    transaction::{IsolationLevel, PostgresTransaction},
};

#[cfg(feature = "sqlite")]
pub use self::storage::sql::sqlite::{
    SqliteStorage,
    error::{SqliteStorageError, SqliteStorageErrorKind},
    transaction::SqliteTransaction,
};
