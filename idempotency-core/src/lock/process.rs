//! Locks within this process.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::select;
use tokio::sync::{Notify, futures::OwnedNotified};

use super::Lock;
use crate::{EncodedKey, Env, Held, StorageError, Token, key::HashKeys};

/// How many locks that are over an operation clears away in passing: it adds one at most, so more than one keeps up.
const SWEEP: usize = 8;

/// Locks keys within this process. Clones share the locks.
///
/// Another process knows nothing of them: where a second one serves the same cache, use a lock that both ask.
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
    state: Arc<Mutex<State>>,
    env: Env,
}

#[derive(Default)]
struct State {
    /// Hashed with the default, keyed hasher: an encoder of the user's may make keys that are not hashes.
    locks: HashMap<EncodedKey, Locked, HashKeys>,
    /// End and key of every lock, so that those of dead holders are found without a search.
    ends: BTreeSet<(Duration, EncodedKey)>,
}

struct Locked {
    token: Token,
    /// By the clock of `env`. The lock is over from then on.
    end: Duration,
    /// Made for the first who waits: most locks never have one.
    ended: Option<Arc<Notify>>,
}

impl ProcessLock {
    /// No key is locked yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// No key is locked yet, and the locks end by the clock of `env`, whose randomness makes their tokens. Default:
    /// [`Env::system`].
    pub fn env(self, env: Env) -> Self {
        Self {
            state: Arc::default(),
            env,
        }
    }

    /// How many keys are locked.
    #[must_use]
    pub fn locked(&self) -> usize {
        let now = self.env.now();
        let mut state = self.lock();
        state.sweep(now, usize::MAX);
        state.locks.len()
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_held_by(&mut self, key: &EncodedKey, token: Token, now: Duration) -> bool {
        self.end_if_over(key, now);
        self.locks.get(key).is_some_and(|held| held.token == token)
    }

    fn end(&mut self, key: &EncodedKey) {
        let Some(held) = self.locks.remove(key) else {
            return;
        };
        self.ends.remove(&(held.end, *key));
        if let Some(ended) = held.ended {
            ended.notify_waiters();
        }
    }

    fn end_if_over(&mut self, key: &EncodedKey, now: Duration) {
        if self.locks.get(key).is_some_and(|held| held.end <= now) {
            self.end(key);
        }
    }

    /// Ends up to `at_most` locks whose time is over.
    fn sweep(&mut self, now: Duration, at_most: usize) {
        for _ in 0..at_most {
            match self.ends.first() {
                Some(&(end, key)) if end <= now => self.end(&key),
                _ => return,
            }
        }
    }

    /// What tells of the end of the lock of `key`, and when it ends by itself; `None` when it is free.
    fn watch(&mut self, key: &EncodedKey, now: Duration) -> Option<(OwnedNotified, Duration)> {
        self.end_if_over(key, now);
        let held = self.locks.get_mut(key)?;
        let ended = held.ended.get_or_insert_default().clone();
        // Made under the lock: it is told of everything that happens from here on, polled or not.
        Some((ended.notified_owned(), held.end))
    }
}

impl Lock for ProcessLock {
    async fn acquire(
        &self,
        key: &EncodedKey,
        ttl: Duration,
    ) -> Result<Option<Token>, StorageError> {
        let now = self.env.now();
        // Made before the lock is taken: an environment of a user's may panic.
        let token = Token::random_from(&self.env);
        let mut state = self.lock();
        state.end_if_over(key, now);
        state.sweep(now, SWEEP);
        if state.locks.contains_key(key) {
            return Ok(None);
        }
        let end = now.saturating_add(ttl);
        state.ends.insert((end, *key));
        let ended = None;
        state.locks.insert(*key, Locked { token, end, ended });
        Ok(Some(token))
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let now = self.env.now();
        let mut state = self.lock();
        if !state.is_held_by(key, token, now) {
            return Ok(Held::Lost);
        }
        let state = &mut *state;
        let Some(held) = state.locks.get_mut(key) else {
            return Ok(Held::Lost);
        };
        state.ends.remove(&(held.end, *key));
        held.end = now.saturating_add(ttl);
        state.ends.insert((held.end, *key));
        if let Some(ended) = &held.ended {
            // It may end sooner than they think.
            ended.notify_waiters();
        }
        Ok(Held::Yes)
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        let now = self.env.now();
        let mut state = self.lock();
        if !state.is_held_by(key, token, now) {
            return Ok(Held::Lost);
        }
        state.end(key);
        Ok(Held::Yes)
    }

    /// Returns when the key is free.
    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let deadline = self.env.now().saturating_add(timeout);
        loop {
            let now = self.env.now();
            let watched = self.lock().watch(key, now);
            let Some((ended, end)) = watched else {
                return Ok(());
            };
            if now >= deadline {
                return Ok(());
            }
            let over = pin!(self.env.sleep(end.min(deadline) - now));
            let _ = select(pin!(ended), over).await;
        }
    }
}

/// Counts only.
impl fmt::Debug for ProcessLock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessLock")
            .field("locked", &self.lock().locks.len())
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
        pin::Pin,
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
        let state = lock.lock();
        assert!(state.locks.len() <= 3, "{}", state.locks.len());
        assert_eq!(state.locks.len(), state.ends.len());
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
