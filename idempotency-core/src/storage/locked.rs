//! A storage out of two parts that know nothing of each other: a cache for the records, a lock for the claims.
//!
//! That is how `django-idempotency-key` composes them, except that here the lock is one per key and is held until the record is
//! there, not only while it is looked for. What a claim says besides being one (its token and fingerprint) fits into neither
//! part, so it is kept in this process: [`claims`]. What lies in the cache is a record and the token that completed it:
//! [`envelope`].

use std::{fmt, sync::Arc, time::Duration};

use self::{
    claims::{Claims, LockedClaim},
    envelope::Envelope,
};
use super::lease::Lease;
use crate::{
    Begin, Cache, EncodedKey, Entry, Env, Fingerprint, Held, Lock, NewClaim, Outcome, Record,
    Storage, StorageError, StorageErrorKind, Token,
};

mod claims;
mod envelope;
#[cfg(all(test, feature = "memory", feature = "conformance"))]
mod tests;

/// For how long a key is locked to store a record of which no claim is known here; `LockPolicy`'s default lease.
const COMPLETING: Duration = Duration::from_secs(30);

/// For how long a key is locked to replace its record.
const REPLACING: Duration = Duration::from_secs(5);

/// A [`Storage`] of any [`Cache`] and any [`Lock`]. Clones share both.
///
/// For what you have already: a key-value cache of three functions, and a lock. Where one of our own storages fits, it keeps
/// more promises in fewer round trips.
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
/// | `begin` | looks at the cache, locks the key, looks again: a holder may have completed in between, and then it unlocks. Starts anew if a `remove` has unlocked it meanwhile |
/// | `complete` | looks at the cache, renews the lock or, where it is over, takes it again, sets the record, unlocks. Repeated it locks the key, looks again, sets the record that is there with the new TTL, unlocks |
/// | `renew`, `release` | those of the lock |
/// | `replace` | looks at the cache, locks the key, looks again, sets the record, unlocks |
/// | `remove` | unlocks the key if it was locked here, removes what is in the cache |
///
/// A first execution takes seven calls, a retry one. What lies in the cache is a byte of version, the token that completed the
/// key, a checksum of both, and the record ([`Record::encode`]).
///
/// # What it can't promise
///
/// Cache and lock are two systems, so no step is atomic over both. As long as every lock holds for its whole lease all rules of
/// [`Storage`] are kept for the claims of one process, by this storage and its clones. Beyond that:
///
/// * **No fencing.** `complete` asks for the lock right before it sets the record. A process that stops between the two for
///   longer than the lease overwrites what its successor recorded; both ran, as is so with any lease, but here the late answer
///   is the one that stays. A `set` that was given up (a timeout, a dropped future) and arrives late does the same.
/// * **The lock is as good as it is.** One that is lost early (a server that restarts empty) lets a second execution in.
/// * **Claims of other processes are not seen**, only bumped into. For those `get` finds nothing, `begin` answers
///   [`Begin::InFlight`] without a fingerprint, so that another request under the key is told to wait, not that the key is taken
///   (until the record is there), and `remove` leaves the claim to its holder or its lease. `wait` is told at once of the end of
///   a claim of this process; of one elsewhere as soon as [`Lock::wait`] can. A conformance suite that looks at one process's
///   claims from another leaves out `begin_tells_of_the_running_claim`, `complete_when_absent`, `dropped_calls_are_safe`,
///   `get_changes_nothing`, `keys_are_independent`, `remove_takes_records_and_claims` and `wait_sees_removal`, and no other rule.
/// * **A `begin` that is dropped, or that fails, while the lock answers** may leave the key locked for one lease, by a lock that
///   nobody can name. Repeated with the same token it is then in flight until that lease is over: with such a lock a suite leaves
///   out `dropped_calls_are_safe`. In the same way a `complete`
///   whose claim was over may fail for 30 s until it succeeds, and a `replace` may block the key for 5 s, should its record go.
/// * **A `complete` that is repeated while another call holds the lock** of the key fails: the record is there, with the TTL that
///   it had. Call it again.
/// * **A `remove` beside a `complete` or `replace`** that has looked already is undone by it, and so is a `replace` beside a
///   repeated `complete` if it found the key locked.
/// * **An evicted record runs again**, if the cache evicts.
///
/// What a claim is called is known here from its [`begin`](Storage::begin) until its lease is over, so the clock of
/// [`env`](Self::env) should run at the lock's pace.
///
/// A record that the cache has no room for ([`StorageErrorKind::Full`]) is stored as a tombstone
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

    /// The clock that tells when the lease of a claim is over, and the sleep of those who wait for that. Set it before the storage
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
                // A `remove` took the lock, and then the record that it was meant for.
                Ok(None) => {}
                Ok(Some(found)) => {
                    self.let_go(key, locked).await;
                    return Ok(Begin::Completed(found.record));
                }
                Err(error) => {
                    // Where something lies there, nothing was claimed. Where it is not known, the claim is left to be released.
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
            // Locked since before the look, so nothing can have come in between.
            Some(locked) => locked,
            None => {
                let taken = self.take(key, token, record.fingerprint, COMPLETING);
                let locked = match taken.await? {
                    Taken::Yes(locked) => locked,
                    Taken::ByAnother => return Ok(Held::Lost),
                    // To be told that it is lost would cost the answer, and nobody else may have one.
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
        // Known here under a name of its own, so that `remove` can end what is left of a call that was dropped.
        let name = Token::random_from(&self.env);
        // Another may hold it where a record is: who completed or found it, has not let go yet, and changes nothing any more.
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
        // Subscribed before the look, so that an end in between is not missed.
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

/// What came of locking a key.
enum Taken {
    Yes(Token),
    ByAnother,
    /// By another, or by an earlier call of the same claim, to which the lock never answered.
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
        // The lease counts from before it was asked for: it is over here no later than there.
        let since = self.env.now();
        let earlier = self.known().doubt(key, token, since, lease);
        // Dropped here, or failed, it leaves the doubt.
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

    /// Unlocks `key` after all was done that counts.
    async fn let_go(&self, key: &EncodedKey, locked: Token) {
        if let Err(error) = self.unlock(key, locked).await {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(target: "idempotency", %key, %error, source, "a lock could not be released: it stays until its lease is over");
        }
    }

    /// `complete` where a record is. One that `token` stored stays and gets the new TTL.
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
        // Locked, so that a `replace` that comes in between is not undone. An earlier `complete` that was dropped, or failed,
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
            // Its TTL was over, or it was removed.
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
