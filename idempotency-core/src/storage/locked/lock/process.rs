//! Locks within this process.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use super::Lock;
use crate::{
    EncodedKey, Env, Held, StorageError, Token,
    storage::lease::{self, Lease, LeaseTable, Wake},
};

/// Locks keys within this process. Clones share the locks.
///
/// Other processes do not see them: where several share a cache, use a lock that all of them share.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), idempotency_core::StorageError> {
/// use std::time::Duration;
/// use idempotency_core::{EncodedKey, Held, Lock, ProcessLock};
///
/// let lock = ProcessLock::new();
/// let key = EncodedKey::from_bytes([7; 32]);
/// let minute = Duration::from_secs(60);
///
/// let token = lock.acquire(&key, minute).await?.expect("the key is free");
/// assert_eq!(lock.acquire(&key, minute).await?, None);
/// assert_eq!(lock.release(&key, token).await?, Held::Yes);
/// assert_eq!(lock.release(&key, token).await?, Held::Lost);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
#[must_use]
pub struct ProcessLock {
    /// `std`'s lock, because sections are short and never await.
    leases: Arc<Mutex<Leases>>,
    env: Env,
}

type Leases = LeaseTable<EncodedKey, ()>;

impl ProcessLock {
    /// No key is locked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// No key is locked yet, and the locks end by the clock of `env`, whose randomness makes their tokens. Default:
    /// [`Env::system`].
    pub fn env(self, env: Env) -> Self {
        Self {
            leases: Arc::default(),
            env,
        }
    }

    /// How many keys are locked.
    #[must_use]
    pub fn locked(&self) -> usize {
        let now = self.env.now();
        lease::lock(&self.leases).count(now)
    }

    /// The leases, after that of `key` was removed if it is over by `now`.
    fn leases(&self, key: &EncodedKey, now: Duration) -> MutexGuard<'_, Leases> {
        let mut leases = lease::lock(&self.leases);
        leases.end_if_over(key, now);
        leases
    }
}

impl Lock for ProcessLock {
    async fn acquire(
        &self,
        key: &EncodedKey,
        ttl: Duration,
    ) -> Result<Option<Token>, StorageError> {
        // Made before the table is locked: a user's environment may panic.
        let token = Token::random_from(&self.env);
        let now = self.env.now();
        let mut leases = self.leases(key, now);
        leases.sweep(now);
        if leases.get(key).is_some() {
            return Ok(None);
        }
        let end = now.saturating_add(ttl);
        leases.start(key, Lease { token, end, of: () });
        Ok(Some(token))
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let now = self.env.now();
        let end = now.saturating_add(ttl);
        match self.leases(key, now).renew(key, token, end) {
            Some(&mut ()) => Ok(Held::Yes),
            None => Ok(Held::Lost),
        }
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        let mut leases = self.leases(key, self.env.now());
        match leases.end(key, token, Wake::All) {
            true => Ok(Held::Yes),
            false => Ok(Held::Lost),
        }
    }

    /// Returns when the key is free.
    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        lease::wait(&self.leases, key, &self.env, timeout).await;
        Ok(())
    }
}

/// Counts only.
impl fmt::Debug for ProcessLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessLock")
            .field("locked", &self.locked())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, feature = "conformance"))]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::expect_used,
        reason = "a test fails by panicking"
    )]

    use std::{
        pin::{Pin, pin},
        sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        task::{Context, Poll, Waker},
    };

    use futures_util::FutureExt as _;

    use super::*;
    use crate::SimulatedClock;

    const TTL: Duration = Duration::from_secs(30);

    fn key(number: u8) -> EncodedKey {
        EncodedKey::from_bytes([number; 32])
    }

    fn simulated() -> (ProcessLock, SimulatedClock) {
        let (env, clock) = Env::simulated(1);
        (ProcessLock::new().env(env), clock)
    }

    fn now<T>(call: impl Future<Output = Result<T, StorageError>>) -> T {
        call.now_or_never().expect("the call is over").unwrap()
    }

    fn poll<F: Future>(call: Pin<&mut F>) -> Poll<F::Output> {
        call.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn a_lock_ends_with_its_time_and_not_before() {
        let (lock, clock) = simulated();
        let first = now(lock.acquire(&key(1), TTL)).unwrap();
        clock.advance(TTL / 2);
        assert_eq!(now(lock.clone().acquire(&key(1), TTL)), None);
        assert!(now(lock.acquire(&key(2), TTL)).is_some());
        assert_eq!(now(lock.renew(&key(1), first, TTL)), Held::Yes);
        clock.advance(TTL - Duration::from_nanos(1));
        assert_eq!(now(lock.acquire(&key(1), TTL)), None);
        assert_eq!(lock.locked(), 2);
        clock.advance(Duration::from_nanos(1));
        assert_eq!(lock.locked(), 0);
        assert_eq!(now(lock.renew(&key(1), first, TTL)), Held::Lost);
        assert_eq!(now(lock.release(&key(1), first)), Held::Lost);

        let second = now(lock.acquire(&key(1), Duration::MAX)).unwrap();
        assert_ne!(second, first);
        for late in [first, Token::from_bytes([9; 16])] {
            assert_eq!(now(lock.renew(&key(1), late, TTL)), Held::Lost);
            assert_eq!(now(lock.release(&key(1), late)), Held::Lost);
        }
        assert_eq!(now(lock.release(&key(1), second)), Held::Yes);
        assert!(now(lock.acquire(&key(1), TTL)).is_some());
    }

    #[test]
    fn locks_of_dead_holders_leave_nothing() {
        let (lock, clock) = simulated();
        for number in 0..=255 {
            assert!(now(lock.acquire(&key(number), TTL)).is_some());
            clock.advance(TTL / 2);
        }
        let leases = lease::lock(&lock.leases);
        assert!(leases.len() <= 3, "{}", leases.len());
        assert_eq!(leases.len(), leases.slots());
    }

    #[test]
    fn who_waits_is_told_of_every_end() {
        let (lock, clock) = simulated();
        let key = key(1);
        now(lock.wait(&key, TTL));
        let token = now(lock.acquire(&key, TTL)).unwrap();
        now(lock.wait(&key, Duration::ZERO));

        let mut waiters: Vec<_> = (0..3)
            .map(|_| Box::pin(lock.wait(&key, Duration::MAX)))
            .collect();
        let mut impatient = pin!(lock.wait(&key, TTL / 3));
        for waiter in &mut waiters {
            assert!(poll(waiter.as_mut()).is_pending());
        }
        assert!(poll(impatient.as_mut()).is_pending());
        clock.advance(TTL / 3);
        assert!(poll(impatient).is_ready());

        // A renewal is no end, but may bring it nearer.
        assert_eq!(now(lock.renew(&key, token, TTL / 3)), Held::Yes);
        for waiter in &mut waiters {
            assert!(poll(waiter.as_mut()).is_pending());
        }
        clock.advance(TTL / 3);
        for mut waiter in waiters.drain(1..) {
            assert!(poll(waiter.as_mut()).is_ready());
        }

        // One that was not polled in between goes on to wait for the next, and hears of its release.
        let token = now(lock.acquire(&key, TTL)).unwrap();
        assert!(poll(waiters[0].as_mut()).is_pending());
        assert_eq!(now(lock.release(&key, token)), Held::Yes);
        assert!(poll(waiters[0].as_mut()).is_ready());
        assert_eq!(clock.sleeping(), 0);
    }

    #[test]
    fn one_holder_at_a_time() {
        const THREADS: usize = 4;
        let lock = ProcessLock::new();
        let held: [AtomicBool; 2] = Default::default();
        let turns = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (lock, held, turns) = (&lock, &held, &turns);
                scope.spawn(move || {
                    for round in 0..5_000 {
                        let at = (round + thread) % 2;
                        let key = key(at as u8);
                        let Some(token) = now(lock.acquire(&key, TTL)) else {
                            continue;
                        };
                        assert!(!held[at].swap(true, SeqCst), "two holders");
                        turns.fetch_add(1, SeqCst);
                        held[at].store(false, SeqCst);
                        assert_eq!(now(lock.release(&key, token)), Held::Yes);
                    }
                });
            }
        });
        assert!(turns.load(SeqCst) > 1_000);
        assert_eq!(lock.locked(), 0);
    }
}
