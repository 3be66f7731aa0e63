//! A storage made of two independent parts: a cache for the records, a lock for the claims.
//!
//! `django-idempotency-key` composes them the same way. Here, however, each key has a lock of its own, and the lock is held until
//! the record is stored, not only during the look-up. Neither part can hold a claim's token and fingerprint, so [`claims`] keeps
//! them in this process. The cache holds each record with the token that completed it: [`envelope`].

use std::{fmt, sync::Arc, time::Duration};

use self::claims::{Claims, LockedClaim};
use super::lease::Lease;
use crate::{
    Begin, EncodedKey, Entry, Env, Fingerprint, Held, NewClaim, Outcome, Record, Storage,
    StorageError, StorageErrorKind, Token,
    record::envelope::{self, Envelope},
};

mod cache;
mod claims;
mod lock;
#[cfg(all(test, feature = "memory", feature = "conformance"))]
mod tests;

pub use self::{
    cache::Cache,
    lock::{Lock, ProcessLock},
};

#[cfg(feature = "memory")]
pub use self::cache::moka::MokaCache;
#[cfg(feature = "redis")]
pub use self::{cache::redis::RedisCache, lock::RedisLock};

/// How long a key is locked to store a record whose claim is not known here; `LockPolicy`'s default lease.
const COMPLETING: Duration = Duration::from_secs(30);

/// How long a key is locked to replace its record.
const REPLACING: Duration = Duration::from_secs(5);

/// A [`Storage`] of any [`Cache`] and any [`Lock`]. Clones share both.
///
/// Use it with a cache and a lock that you already have. A storage of this library, where one fits, guarantees more and needs
/// fewer round trips.
///
/// ```
/// # #[cfg(feature = "memory")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), idempotency_core::StorageError> {
/// use std::time::Duration;
/// use idempotency_core::{
///     Begin, EncodedKey, LockedStorage, MokaCache, NewClaim, ProcessLock, Storage, Token,
/// };
///
/// let storage = LockedStorage::new(MokaCache::new(), ProcessLock::new());
/// let key = EncodedKey::from_bytes([7; 32]);
/// let claim = |token| NewClaim { token, fingerprint: None, lease: Duration::from_secs(30) };
///
/// assert_eq!(storage.begin(&key, &claim(Token::random())).await?, Begin::Acquired);
/// // A duplicate meanwhile:
/// assert!(matches!(storage.begin(&key, &claim(Token::random())).await?, Begin::InFlight { .. }));
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "memory"))]
/// # fn main() {}
/// ```
///
/// # How it works
///
/// | call | what it does |
/// |---|---|
/// | `begin` | reads the cache, locks the key, reads again: if a holder completed in between, it unlocks. Starts over if a `remove` unlocked the key meanwhile |
/// | `complete` | reads the cache, renews the lock or takes it again if it has expired, sets the record, unlocks. A repeated call locks the key, reads again, sets the stored record with the new TTL, unlocks |
/// | `renew`, `release` | those of the lock |
/// | `replace` | reads the cache, locks the key, reads again, sets the record, unlocks |
/// | `remove` | unlocks the key if it was locked here, removes the record from the cache |
///
/// A first execution takes seven calls, a retry one. A cache entry is a version byte, the token that completed the key, a
/// checksum of both, and the record ([`Record::encode`]).
///
/// # What it can't promise
///
/// Cache and lock are two systems, so no step is atomic over both. As long as every lock holds for its whole lease all rules of
/// [`Storage`] are kept for the claims of one process, by this storage and its clones. Beyond that:
///
/// * **No fencing.** `complete` renews the lock right before it sets the record. If the process pauses between the two for longer
///   than the lease, it overwrites its successor's record. Both ran, as with any lease, but here the late answer remains. A `set`
///   that was abandoned (a timeout, a dropped future) and arrives late does the same.
/// * **The guarantees are no stronger than the lock's.** A lock that is lost early (a server that restarts empty) allows a second
///   execution.
/// * **Claims of other processes are visible only through the lock.** `get` finds nothing. `begin` returns [`Begin::InFlight`]
///   without a fingerprint, so a request with another body waits, and is a mismatch only once the record exists. `remove` leaves
///   the claim to its holder or its lease. `wait` returns at once when a claim of this process ends; for a claim elsewhere, as
///   soon as [`Lock::wait`] can. A conformance suite that checks one process's claims from another leaves out
///   `begin_tells_of_the_running_claim`, `complete_when_absent`, `dropped_calls_are_safe`,
///   `get_changes_nothing`, `keys_are_independent`, `remove_takes_records_and_claims` and `wait_sees_removal`, and no other rule.
/// * **A `begin` that is dropped, or fails, while it waits for the lock** may leave the key locked for one lease under a token that
///   nobody knows. A `begin` repeated with the same token is in flight until that lease expires; with such a lock a suite leaves
///   out `dropped_calls_are_safe`. For the same reason a `complete` after the claim expired may fail for up to 30 s, and a
///   `replace` may block the key for 5 s if its record disappears.
/// * **A `complete` that is repeated while another call holds the lock** of the key fails. The record exists, with its earlier TTL.
///   Call it again.
/// * **A `remove` concurrent with a `complete` or `replace`** that has already read the cache is undone by it. So is a `replace`
///   concurrent with a repeated `complete`, if it found the key locked.
/// * **An evicted record runs again**, if the cache evicts.
///
/// A claim's token is known here from its [`begin`](Storage::begin) until its lease is over, so the clock of
/// [`env`](Self::env) should run at the lock's pace.
///
/// If the cache has no room for a record ([`StorageErrorKind::Full`]), a tombstone is stored instead
/// ([`NoRoom`](crate::TombstoneReason::NoRoom)), with a warning in the log.
#[must_use]
pub struct LockedStorage<C, L> {
    parts: Arc<Parts<C, L>>,
    env: Env,
}

struct Parts<C, L> {
    cache: C,
    lock: L,
    claims: Claims,
}

impl<C: Cache, L: Lock> LockedStorage<C, L> {
    /// A storage that keeps its records in `cache` and holds its claims by `lock`.
    pub fn new(cache: C, lock: L) -> Self {
        Self {
            parts: Arc::new(Parts {
                cache,
                lock,
                claims: Claims::default(),
            }),
            env: Env::system(),
        }
    }

    /// The clock for the leases, and the sleep of waiters. Set it before the storage
    /// is used. Default: [`Env::system`].
    pub fn env(mut self, env: Env) -> Self {
        self.env = env;
        self
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> &C {
        &self.parts.cache
    }

    /// The lock.
    #[must_use]
    pub fn lock(&self) -> &L {
        &self.parts.lock
    }

    /// How many claims of this process are running.
    #[must_use]
    pub fn claims(&self) -> usize {
        let now = self.env.now();
        self.known().count(now)
    }

    fn known(&self) -> &Claims {
        &self.parts.claims
    }
}

impl<C, L> Clone for LockedStorage<C, L> {
    fn clone(&self) -> Self {
        Self {
            parts: self.parts.clone(),
            env: self.env.clone(),
        }
    }
}

impl<C: Cache, L: Lock> fmt::Debug for LockedStorage<C, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockedStorage")
            .field("cache", &std::any::type_name::<C>())
            .field("lock", &std::any::type_name::<L>())
            .field("claims", &self.claims())
            .finish_non_exhaustive()
    }
}

impl<C: Cache, L: Lock> Storage for LockedStorage<C, L> {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        loop {
            if let Some(found) = self.look(key).await? {
                return Ok(Begin::Completed(found.record));
            }
            let locked = match self.hold(key, claim.token, Some(claim.lease)).await? {
                Some(locked) => locked,
                None => match self
                    .take(key, claim.token, claim.fingerprint, claim.lease)
                    .await?
                {
                    Taken::Yes(locked) => locked,
                    Taken::ByAnother | Taken::Perhaps => return Ok(self.in_flight(key)),
                },
            };
            match self.look(key).await {
                Ok(None) if self.is_known(key, claim.token, locked) => return Ok(Begin::Acquired),
                // A `remove` released the lock, and then removed the record that it was meant for.
                Ok(None) => {}
                Ok(Some(found)) => {
                    self.let_go(key, locked).await;
                    return Ok(Begin::Completed(found.record));
                }
                Err(error) => {
                    // A record exists, so nothing was claimed. If the read failed, the engine releases the claim.
                    if error.kind() == StorageErrorKind::Unreadable {
                        self.let_go(key, locked).await;
                    }
                    return Err(error);
                }
            }
        }
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        if let Some(found) = self.look(key).await? {
            return self.complete_again(key, token, &found, record, ttl).await;
        }
        let locked = match self.hold(key, token, None).await? {
            // The key was locked before the read, so nothing can have changed in between.
            Some(locked) => locked,
            None => {
                let taken = self.take(key, token, record.fingerprint, COMPLETING);
                let locked = match taken.await? {
                    Taken::Yes(locked) => locked,
                    Taken::ByAnother => return Ok(Held::Lost),
                    // `Lost` would discard the answer, and nobody else may have one.
                    Taken::Perhaps => {
                        return Err(StorageError::unavailable(
                            "the key is locked, perhaps by an earlier call of this claim that was given up",
                        ));
                    }
                };
                if let Some(found) = self.look(key).await? {
                    return self.complete_again(key, token, &found, record, ttl).await;
                }
                locked
            }
        };
        self.set(key, token, record, ttl).await?;
        self.let_go(key, locked).await;
        Ok(Held::Yes)
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let Some(claim) = self.known().get(key, token) else {
            return Ok(Held::Lost);
        };
        self.renew_lock(key, claim.token, lease).await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        let Some(claim) = self.known().get(key, token) else {
            return Ok(Held::Lost);
        };
        self.unlock(key, claim.token).await
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        if let Some(found) = self.look(key).await? {
            return Ok(Some(Entry::Completed(found.record)));
        }
        let now = self.env.now();
        let running = self.known().running(key, now);
        Ok(running.map(|claim| Entry::Claimed {
            fingerprint: claim.of.fingerprint,
            lease_left: Some(claim.end - now),
        }))
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        if self.look(key).await?.is_none() {
            return Ok(());
        }
        // Registered under a token of its own, so that `remove` can end the lock of a call that was dropped.
        let name = Token::random_from(&self.env);
        // Another caller that completed or found the record may still hold the lock; it changes nothing any more.
        let taken = self.take(key, name, None, REPLACING).await?;
        let replaced = match self.look(key).await {
            Ok(Some(found)) => self.set(key, found.completed_by, record, ttl).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Taken::Yes(locked) = taken {
            self.let_go(key, locked).await;
        }
        replaced
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let mut removed = false;
        if let Some(claim) = self.known().last(key) {
            removed = self.unlock(key, claim.token).await? == Held::Yes;
        }
        if self.parts.cache.get(key).await?.is_some() {
            self.parts.cache.remove(key).await?;
            removed = true;
        }
        Ok(removed)
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let now = self.env.now();
        let deadline = now.saturating_add(timeout);
        // Subscribes before it reads, so that an end in between is not missed.
        let waiter = self.known().subscribe(key, now);
        if timeout.is_zero() || self.parts.cache.get(key).await?.is_some() {
            return Ok(());
        }
        match waiter {
            Some(waiter) => waiter.wait(&self.env, deadline).await,
            // Free, or locked by another process.
            None => {
                let left = deadline.saturating_sub(self.env.now());
                self.parts.lock.wait(key, left).await?;
            }
        }
        Ok(())
    }
}

/// The result of locking a key.
enum Taken {
    Yes(Token),
    ByAnother,
    /// By another caller, or by an earlier call of the same claim to which the lock never responded.
    Perhaps,
}

/// The steps that the calls are made of.
impl<C: Cache, L: Lock> LockedStorage<C, L> {
    /// The record of `key`.
    async fn look(&self, key: &EncodedKey) -> Result<Option<Envelope>, StorageError> {
        match self.parts.cache.get(key).await? {
            Some(bytes) => envelope::open(bytes).map(Some),
            None => Ok(None),
        }
    }

    async fn set(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let Err(error) = self.set_whole(key, token, record, ttl).await else {
            return Ok(());
        };
        if error.kind() != StorageErrorKind::Full || matches!(record.outcome, Outcome::Tombstone(_))
        {
            return Err(error);
        }
        tracing::warn!(target: "idempotency", %key, cause = ?std::error::Error::source(&error), "the cache has no room for the answer: its key gets a tombstone");
        self.set_whole(key, token, &record.without_answer(), ttl)
            .await
    }

    /// Sets the record as it is, or fails.
    async fn set_whole(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let cache = &self.parts.cache;
        if ttl.is_zero() {
            // Over at once.
            return cache.remove(key).await;
        }
        cache.set(key, envelope::seal(token, record), ttl).await
    }

    /// The lock of the claim of `token` if it is still held, for another `lease`, or its last one. It is not shortened.
    async fn hold(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Option<Duration>,
    ) -> Result<Option<Token>, StorageError> {
        let Some(claim) = self.known().get(key, token) else {
            return Ok(None);
        };
        let left = claim.end.saturating_sub(self.env.now());
        let lease = lease.unwrap_or(claim.of.lease).max(left);
        let held = self.renew_lock(key, claim.token, lease).await?;
        Ok((held == Held::Yes).then_some(claim.token))
    }

    /// Whether nothing here has ended the claim of `token` that holds `locked`.
    fn is_known(&self, key: &EncodedKey, token: Token, locked: Token) -> bool {
        let claim = self.known().get(key, token);
        claim.is_some_and(|claim| claim.token == locked)
    }

    /// Locks `key` for a claim of `token`, if it is free.
    async fn take(
        &self,
        key: &EncodedKey,
        token: Token,
        fingerprint: Option<Fingerprint>,
        lease: Duration,
    ) -> Result<Taken, StorageError> {
        // The lease is counted from before the request, so it ends here no later than at the lock.
        let since = self.env.now();
        let earlier = self.known().doubt(key, token, since, lease);
        // If this call fails or is dropped here, the entry in `doubts` remains.
        let Some(locked) = self.parts.lock.acquire(key, lease).await? else {
            self.known().answered(key, token, earlier);
            return Ok(match earlier {
                Some(_) => Taken::Perhaps,
                None => Taken::ByAnother,
            });
        };
        let claim = Lease {
            token: locked,
            end: since.saturating_add(lease),
            of: LockedClaim {
                token,
                fingerprint,
                lease,
            },
        };
        self.known().answered(key, token, None);
        self.known().start(key, claim, since);
        Ok(Taken::Yes(locked))
    }

    async fn renew_lock(
        &self,
        key: &EncodedKey,
        locked: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let since = self.env.now();
        let held = self.parts.lock.renew(key, locked, lease).await?;
        let lease_end = since.saturating_add(lease);
        match held {
            Held::Yes => self.known().renew(key, locked, lease, lease_end),
            Held::Lost => self.known().end(key, locked),
        }
        Ok(held)
    }

    async fn unlock(&self, key: &EncodedKey, locked: Token) -> Result<Held, StorageError> {
        let held = self.parts.lock.release(key, locked).await?;
        self.known().end(key, locked);
        Ok(held)
    }

    /// Unlocks `key` after the result is stored.
    async fn let_go(&self, key: &EncodedKey, locked: Token) {
        if let Err(error) = self.unlock(key, locked).await {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(target: "idempotency", %key, %error, source, "a lock could not be released: it stays until its lease is over");
        }
    }

    /// `complete` of a key that has a record. A record that `token` stored stays and gets the new TTL.
    async fn complete_again(
        &self,
        key: &EncodedKey,
        token: Token,
        found: &Envelope,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        if found.completed_by != token {
            let lost = self.known().get(key, token);
            if let Some(claim) = lost {
                self.let_go(key, claim.token).await;
            }
            return Ok(Held::Lost);
        }
        // The lock keeps a concurrent `replace` from being undone. An earlier `complete` that was dropped or failed
        // may have left its lock.
        let locked = match self.hold(key, token, None).await? {
            Some(locked) => locked,
            None => match self.take(key, token, None, REPLACING).await? {
                Taken::Yes(locked) => locked,
                Taken::ByAnother | Taken::Perhaps => {
                    return Err(StorageError::unavailable(
                        "the record is stored, but its TTL can't be restarted while another call holds the lock of the key",
                    ));
                }
            },
        };
        let completed = match self.look(key).await {
            Ok(Some(found)) if found.completed_by == token => self
                .set_whole(key, token, &found.record, ttl)
                .await
                .map(|()| Held::Yes),
            Ok(Some(_)) => Ok(Held::Lost),
            // It expired or was removed.
            Ok(None) => self.set(key, token, record, ttl).await.map(|()| Held::Yes),
            Err(error) => Err(error),
        };
        self.let_go(key, locked).await;
        completed
    }

    fn in_flight(&self, key: &EncodedKey) -> Begin {
        let now = self.env.now();
        let running = self.known().running(key, now);
        Begin::InFlight {
            fingerprint: running.and_then(|claim| claim.of.fingerprint),
            lease_left: running.map(|claim| claim.end - now),
        }
    }
}
