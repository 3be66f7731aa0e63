//! A storage made of two independent parts: a cache for the records, a lock for the claims.
//!
//! `django-idempotency-key` composes them the same way. Here, however, each key has a lock of its own, and the lock is held until
//! the record is stored, not only during the look-up. Neither part can hold a claim's token and fingerprint, so they are kept in
//! this process. The cache holds each record with the token that completed it: [`envelope`].

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use super::lease::{self, Lease, LeaseTable, Wake};
use crate::{
    Begin, EncodedKey, Entry, Env, Fingerprint, Held, NewClaim, Outcome, Record, Storage,
    StorageError, StorageErrorKind, Token,
    record::envelope::{self, Envelope},
};

mod cache;
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

/// How long a key is locked to store its record, unless more is left of its lease; `LockPolicy`'s default lease.
const COMPLETING: Duration = Duration::from_secs(30);

/// How long a key is locked to replace its record.
const REPLACING: Duration = Duration::from_secs(5);

/// How long a claim is remembered after its lease is over. By the lock's clock it may still run, and then only the lock's token
/// can end it.
const GRACE: Duration = Duration::from_secs(60);

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
/// | `complete` | renews the lock, or takes it again if it has expired, reads the cache, sets the record, unlocks. A repeated call sets the stored record with the new TTL |
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
/// * **No fencing.** `complete` renews the lock before it reads the cache and sets the record. If the process pauses in between for
///   longer than the lease, it overwrites its successor's record. Both ran, as with any lease, but here the late answer remains. A `set`
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
    /// The claims of this process, by the tokens of their locks. `std`'s lock, because sections are short and never await.
    claims: Mutex<LeaseTable<EncodedKey, LockedClaim>>,
    /// Claims whose `acquire` got no response (yet), and until when the lock may hold the key for them.
    doubts: Mutex<LeaseTable<(EncodedKey, Token), ()>>,
}

/// What the lock can't store of a claim.
#[derive(Clone, Copy)]
struct LockedClaim {
    token: Token,
    fingerprint: Option<Fingerprint>,
}

impl<C: Cache, L: Lock> LockedStorage<C, L> {
    /// A storage that keeps its records in `cache` and holds its claims by `lock`.
    pub fn new(cache: C, lock: L) -> Self {
        Self {
            parts: Arc::new(Parts {
                cache,
                lock,
                claims: Mutex::default(),
                doubts: Mutex::default(),
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
            let Taken::Yes(lock) = self.take(key, claim).await? else {
                let (fingerprint, lease_left) = self.running(key).unzip();
                return Ok(Begin::InFlight {
                    fingerprint: fingerprint.flatten(),
                    lease_left,
                });
            };
            if let Some(found) = self.look_under(lock, key).await? {
                self.let_go(key, lock).await;
                return Ok(Begin::Completed(found.record));
            }
            let known = self.known_claim(key, claim.token);
            if known.is_some_and(|known| known.token == lock) {
                return Ok(Begin::Acquired);
            }
            // A `remove` released the lock, and then removed the record that it was meant for.
        }
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let claim = NewClaim {
            token,
            fingerprint: record.fingerprint,
            lease: COMPLETING,
        };
        let taken = self.take(key, &claim).await?;
        let Taken::Yes(lock) = taken else {
            return match (self.look(key).await?, taken) {
                (Some(found), _) if found.completed_by == token => Err(StorageError::unavailable(
                    "the record is stored, but its TTL can't be restarted while another call holds the lock of the key",
                )),
                // `Lost` would discard the answer, and nobody else may have one.
                (None, Taken::Perhaps) => Err(StorageError::unavailable(
                    "the key is locked, perhaps by an earlier call of this claim that was given up",
                )),
                _ => Ok(Held::Lost),
            };
        };
        let completed = match self.look_under(lock, key).await? {
            None => {
                // A claim whose record could not be stored stays.
                self.set(key, token, record, ttl).await?;
                Ok(Held::Yes)
            }
            // Repeated: the first record stays, and its TTL starts anew.
            Some(found) if found.completed_by == token => {
                let set = self.set_whole(key, token, &found.record, ttl).await;
                set.map(|()| Held::Yes)
            }
            Some(_) => Ok(Held::Lost),
        };
        self.let_go(key, lock).await;
        completed
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        match self.known_claim(key, token) {
            Some(claim) => self.renew_lock(key, claim.token, lease).await,
            None => Ok(Held::Lost),
        }
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        match self.known_claim(key, token) {
            Some(claim) => self.unlock(key, claim.token).await,
            None => Ok(Held::Lost),
        }
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        if let Some(found) = self.look(key).await? {
            return Ok(Some(Entry::Completed(found.record)));
        }
        let running = self.running(key);
        Ok(running.map(|(fingerprint, lease_left)| Entry::Claimed {
            fingerprint,
            lease_left: Some(lease_left),
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
        // Remembered under a token of its own, so that `remove` can end the lock of a call that was dropped.
        let claim = NewClaim {
            token: Token::random_from(&self.env),
            fingerprint: None,
            lease: REPLACING,
        };
        // Another caller that completed or found the record may still hold the lock; it changes nothing any more.
        let taken = self.acquire(key, &claim).await?;
        let replaced = match self.look(key).await {
            Ok(Some(found)) => self.set(key, found.completed_by, record, ttl).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Taken::Yes(lock) = taken {
            self.let_go(key, lock).await;
        }
        replaced
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let lock = self.known().get(key).map(|claim| claim.token);
        let mut removed = false;
        if let Some(lock) = lock {
            removed = self.unlock(key, lock).await? == Held::Yes;
        }
        if self.parts.cache.get(key).await?.is_some() {
            self.parts.cache.remove(key).await?;
            removed = true;
        }
        Ok(removed)
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let deadline = self.env.now().saturating_add(timeout);
        if timeout.is_zero() || self.parts.cache.get(key).await?.is_some() {
            return Ok(());
        }
        let left = deadline.saturating_sub(self.env.now());
        if !lease::wait(&self.parts.claims, key, &self.env, left).await {
            // Free, or locked by another process.
            self.parts.lock.wait(key, left).await?;
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

    /// The record of `key`, which `lock` holds. If there is one that can't be read, there is nothing to claim.
    async fn look_under(
        &self,
        lock: Token,
        key: &EncodedKey,
    ) -> Result<Option<Envelope>, StorageError> {
        let found = self.look(key).await;
        if let Err(error) = &found
            && error.kind() == StorageErrorKind::Unreadable
        {
            self.let_go(key, lock).await;
        }
        found
    }

    async fn set(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        match self.set_whole(key, token, record, ttl).await {
            Err(error)
                if error.kind() == StorageErrorKind::Full
                    && matches!(record.outcome, Outcome::Response(_)) =>
            {
                tracing::warn!(target: "idempotency", %key, cause = ?std::error::Error::source(&error), "the cache has no room for the answer: its key gets a tombstone");
                let tombstone = record.without_answer();
                self.set_whole(key, token, &tombstone, ttl).await
            }
            set => set,
        }
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

    /// The claims of this process.
    fn known(&self) -> MutexGuard<'_, LeaseTable<EncodedKey, LockedClaim>> {
        lease::lock(&self.parts.claims)
    }

    /// The claim of `token`, which may have expired.
    fn known_claim(&self, key: &EncodedKey, token: Token) -> Option<Lease<LockedClaim>> {
        let claim = self.known().get(key).copied();
        claim.filter(|claim| claim.of.token == token)
    }

    /// Fingerprint and lease of the claim of `key` that runs in this process.
    fn running(&self, key: &EncodedKey) -> Option<(Option<Fingerprint>, Duration)> {
        let now = self.env.now();
        let known = self.known();
        let claim = known.running(key, now)?;
        Some((claim.of.fingerprint, claim.end - now))
    }

    /// Locks `key` for `claim`: renews the lock that it has, or acquires one if the key is free.
    async fn take(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Taken, StorageError> {
        if let Some(known) = self.known_claim(key, claim.token) {
            let left = known.end.saturating_sub(self.env.now());
            // Not shortened.
            let lease = claim.lease.max(left);
            if self.renew_lock(key, known.token, lease).await? == Held::Yes {
                return Ok(Taken::Yes(known.token));
            }
        }
        self.acquire(key, claim).await
    }

    /// Locks `key` for `claim`, if the key is free.
    async fn acquire(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Taken, StorageError> {
        // The lease is counted from before the request, so it ends here no later than at the lock.
        let since = self.env.now();
        let end = since.saturating_add(claim.lease);
        let doubt = (*key, claim.token);
        let earlier = {
            let mut doubts = lease::lock(&self.parts.doubts);
            doubts.sweep(since);
            let earlier = doubts.running(&doubt, since).map(|earlier| earlier.end);
            let unanswered = Lease {
                token: claim.token,
                end: end.saturating_add(GRACE),
                of: (),
            };
            doubts.start(&doubt, unanswered);
            earlier
        };
        // If this call fails or is dropped here, the doubt remains.
        let acquired = self.parts.lock.acquire(key, claim.lease).await?;
        let mut doubts = lease::lock(&self.parts.doubts);
        if let (None, Some(end)) = (acquired, earlier) {
            doubts.renew(&doubt, claim.token, end);
            return Ok(Taken::Perhaps);
        }
        doubts.remove(&doubt, Wake::All);
        drop(doubts);
        let Some(token) = acquired else {
            return Ok(Taken::ByAnother);
        };
        let of = LockedClaim {
            token: claim.token,
            fingerprint: claim.fingerprint,
        };
        let mut known = self.known();
        known.sweep(since.saturating_sub(GRACE));
        // If the response came so late that the key was granted again, the later claim stays.
        if known.get(key).is_none_or(|later| later.end <= end) {
            known.start(key, Lease { token, end, of });
        }
        Ok(Taken::Yes(token))
    }

    async fn renew_lock(
        &self,
        key: &EncodedKey,
        lock: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let end = self.env.now().saturating_add(lease);
        let held = self.parts.lock.renew(key, lock, lease).await?;
        let mut known = self.known();
        match held {
            Held::Yes => drop(known.renew(key, lock, end)),
            Held::Lost => drop(known.end(key, lock, Wake::All)),
        }
        Ok(held)
    }

    async fn unlock(&self, key: &EncodedKey, lock: Token) -> Result<Held, StorageError> {
        let held = self.parts.lock.release(key, lock).await?;
        self.known().end(key, lock, Wake::All);
        Ok(held)
    }

    /// Unlocks `key` after the result is stored.
    async fn let_go(&self, key: &EncodedKey, lock: Token) {
        if let Err(error) = self.unlock(key, lock).await {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(target: "idempotency", %key, %error, source, "a lock could not be released: it stays until its lease is over");
        }
    }
}
