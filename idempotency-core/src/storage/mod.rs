//! Where claims and records are kept.
//!
//! A [`Storage`] decides who runs an operation, in one atomic step. [`MemoryStorage`](crate::MemoryStorage) serves one
//! process. A [`LockedStorage`] is made of a [`Cache`] of three functions and a [`Lock`]; a
//! [`NearCache`] answers retries in this process before it asks another storage. To write your own, implement the trait and
//! run [`conformance`] (feature `conformance`) against it: one documented test per rule.

use std::{future::Future, sync::Arc, time::Duration};

use crate::{EncodedKey, Env, Record, StorageError};

mod any;
mod claim;
#[cfg(feature = "conformance")]
pub mod conformance;
pub(crate) mod lease;
mod locked;
#[cfg(feature = "memory")]
pub(crate) mod memory;
#[cfg(feature = "memory")]
mod near;
#[cfg(feature = "redis")]
pub(crate) mod redis;
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(crate) mod sql;
pub(crate) mod transaction;
#[cfg(any(feature = "postgres", feature = "redis", feature = "sqlite"))]
#[cfg_attr(
    not(any(feature = "postgres", all(feature = "redis", feature = "sqlite"))),
    expect(dead_code, reason = "not every storage needs all of it")
)]
mod waits;

pub use self::{
    any::AnyStorage,
    claim::{Begin, Entry, Held, NewClaim, Token},
    locked::{Cache, Lock, LockedStorage, ProcessLock},
    transaction::{
        BeginTransaction, Committed, NewTransaction, PhaseError, RolledBack, Transaction,
        TransactionDatabase, Transactions, Writes,
    },
};

#[cfg(feature = "memory")]
pub use self::{locked::MokaCache, near::NearCache};

#[cfg(feature = "redis")]
pub use self::locked::{RedisCache, RedisLock};

/// Keeps claims and records.
///
/// # Rules
///
/// Each is a test in [`conformance`]:
///
/// 1. Every call is atomic. Of any number of concurrent [`begin`](Self::begin)s of a free key exactly one is
///    [`Begin::Acquired`].
/// 2. `begin` with a token that already holds the key is `Acquired`, because drivers resend calls that got no answer. `complete`
///    repeated with the token that completed the key is [`Held::Yes`]; it keeps the first record and restarts the TTL.
/// 3. A claim ends by itself when its lease is over and it was not renewed. Then, and not before, another token may take it.
/// 4. `complete` succeeds if the claim is the token's (its lease may be over, as long as nobody else took it) **or the key is
///    absent**. It is [`Held::Lost`] only if another holds or completed the key.
/// 5. `renew` and `release` are [`Held::Lost`] and change nothing unless the claim is the token's.
/// 6. A record is returned by `begin` until its TTL is over; time is measured by the storage's own clock.
/// 7. `replace` changes a completed record only; it never ends, creates or changes a claim.
/// 8. [`wait`](Self::wait) returns when no claim holds the key. It subscribes before it looks, so a claim that ends in
///    between is not missed; a completion wakes all waiters, a release at least one, and a waiter that is dropped after it
///    was woken passes the wake on.
/// 9. Dropping any of these futures is safe: the storage is in the state before or after the call.
/// 10. A value that is neither a claim nor a readable record is an error of kind
///     [`Unreadable`](crate::StorageErrorKind::Unreadable) for its key. The storage never treats the key as free.
///
/// # Threads
///
/// The engine renews claims, and stores late outcomes, on [`Env::background`](crate::Env::background): a thread with a
/// tokio runtime of its own. A connection that another runtime drives stops when that runtime stops. A storage that makes its own
/// connections should therefore keep one for these calls; [`Env::in_background`](crate::Env::in_background) recognises them. No
/// future may block its thread, because the renewals of other claims wait behind it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a storage",
    label = "not a storage",
    note = "`connect` returns a future of a `Result`: write `RedisStorage::connect(…).await?`"
)]
pub trait Storage: Send + Sync + 'static {
    /// Claims `key` if it has neither a live claim nor a record, and otherwise returns the one it has, in one atomic step.
    ///
    /// # Errors
    ///
    /// If the storage fails. Whether the claim was taken is then unknown.
    fn begin(
        &self,
        key: &EncodedKey,
        claim: &NewClaim,
    ) -> impl Future<Output = Result<Begin, StorageError>> + Send;

    /// Ends the claim of `token` with a record that expires after `ttl`, and wakes all waiters. If `token` has completed the key
    /// before, the first record stays and expires `ttl` from now.
    ///
    /// # Errors
    ///
    /// If the storage fails. Repeating the call is safe.
    fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> impl Future<Output = Result<Held, StorageError>> + Send;

    /// Extends the claim of `token`: its lease ends `lease` from now.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> impl Future<Output = Result<Held, StorageError>> + Send;

    /// Ends the claim of `token` without a record, and wakes at least one waiter.
    ///
    /// # Errors
    ///
    /// If the storage fails. Repeating the call is safe.
    fn release(
        &self,
        key: &EncodedKey,
        token: Token,
    ) -> impl Future<Output = Result<Held, StorageError>> + Send;

    /// The claim or record of `key`, if there is one.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    fn get(
        &self,
        key: &EncodedKey,
    ) -> impl Future<Output = Result<Option<Entry>, StorageError>> + Send;

    /// Replaces the completed record of `key` with `record` and restarts its TTL. Does nothing if there is no record.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> impl Future<Output = Result<(), StorageError>> + Send;

    /// Removes the record or claim of `key`, readable or not, and wakes all waiters. Returns whether there was one.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    fn remove(&self, key: &EncodedKey) -> impl Future<Output = Result<bool, StorageError>> + Send;

    /// Returns when no claim holds `key`, or after `timeout`. It is a hint: only `begin` decides.
    ///
    /// The default polls, first after 10 ms, at last every 500 ms. A storage that can be notified should do better.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    fn wait(
        &self,
        key: &EncodedKey,
        timeout: Duration,
    ) -> impl Future<Output = Result<(), StorageError>> + Send {
        wait_by_polling(self, key, timeout)
    }

    /// Transactions in which an operation writes to the database of this storage, and is recorded. Default: `None`.
    ///
    /// A storage in front of another one that keeps copies of records, or changes them, must not pass these on: they go past it.
    fn transactions(&self) -> Option<Arc<dyn Transactions>> {
        None
    }
}

async fn wait_by_polling<S: Storage + ?Sized>(
    storage: &S,
    key: &EncodedKey,
    timeout: Duration,
) -> Result<(), StorageError> {
    const FIRST: Duration = Duration::from_millis(10);
    const LONGEST: Duration = Duration::from_millis(500);

    let env = Env::system();
    let deadline = env.now().saturating_add(timeout);
    let mut pause = FIRST;
    while let Some(Entry::Claimed { .. }) = storage.get(key).await? {
        let left = deadline.saturating_sub(env.now());
        if left.is_zero() {
            break;
        }
        env.sleep(pause.min(left)).await;
        pause = (pause * 2).min(LONGEST);
    }
    Ok(())
}
