//! Waits for the end of a claim: woken by this process, and looking now and then for other processes.
//!
//! The row of an open transaction is seen by nobody else, so the key that one of this process holds is known here.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::{Either, select};
use tokio::sync::Notify;

use crate::{EncodedKey, Env, Fingerprint, StorageError, key::HashKeys};

/// A waiter looks again after this, then after twice as long, and at last every [`LONGEST`]; not if another waiter of the key has
/// looked meanwhile.
const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_millis(500);

/// Who waits for which key, in this process.
#[derive(Default)]
pub(super) struct Waiters {
    /// `std`'s lock, because no section awaits.
    slots: Mutex<HashMap<EncodedKey, Slot, HashKeys>>,
    /// The keys of open transactions, and what their requests were. `std`'s lock, for the same reason.
    held: Mutex<HashMap<EncodedKey, Option<Fingerprint>, HashKeys>>,
}

/// The key of an open transaction of this process. Dropped, it wakes those who wait for the key.
pub(super) struct Hold {
    waiters: Arc<Waiters>,
    key: EncodedKey,
    /// Whom the end wakes.
    pub(super) whom: Whom,
}

impl Hold {
    pub(super) fn new(
        waiters: &Arc<Waiters>,
        key: &EncodedKey,
        fingerprint: Option<Fingerprint>,
    ) -> Self {
        waiters.held().insert(*key, fingerprint);
        Self {
            waiters: waiters.clone(),
            key: *key,
            whom: Whom::One,
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.waiters.held().remove(&self.key);
        self.waiters.wake(&self.key, self.whom);
    }
}

/// The waiters of one key. There is at least one.
struct Slot {
    count: usize,
    /// When one of them looked at the key last.
    looked_at: Duration,
    wakes: Arc<Notify>,
}

/// Whom a statement wakes if it changes the key.
pub(super) struct Wake {
    pub(super) waiters: Arc<Waiters>,
    pub(super) key: EncodedKey,
    pub(super) whom: Whom,
}

#[derive(Clone, Copy)]
pub(super) enum Whom {
    /// One, because the key is free for one.
    One,
    /// All: there is an answer.
    All,
}

impl Wake {
    pub(super) fn wake(self) {
        self.waiters.wake(&self.key, self.whom);
    }
}

/// What a waiter finds under its key.
pub(super) enum Seen {
    /// A claim, and what is left of its lease.
    Claimed(Duration),
    Free,
    Completed,
}

impl Waiters {
    fn wake(&self, key: &EncodedKey, whom: Whom) {
        if let Some(slot) = self.lock().get(key) {
            match whom {
                Whom::One => slot.wakes.notify_one(),
                Whom::All => slot.wakes.notify_waiters(),
            }
        }
    }

    /// Returns when `look` finds no claim of `key`, or after `timeout`.
    pub(super) async fn wait<F>(
        &self,
        key: &EncodedKey,
        env: &Env,
        timeout: Duration,
        look: impl Fn() -> F + Send + Sync,
    ) -> Result<(), StorageError>
    where
        F: Future<Output = Result<Seen, StorageError>> + Send,
    {
        let deadline = env.now().saturating_add(timeout);
        let mut waiter = Waiter::subscribe(self, key);
        let wakes = waiter.wakes.clone();
        let (mut interval, mut must_look) = (FIRST, true);
        loop {
            // Enabled before the key is looked at, so that an end in between is not missed. Dropped with an unused permit, it
            // passes the permit on.
            let mut wake = pin!(wakes.notified());
            wake.as_mut().enable();

            let mut pause = interval;
            if must_look || waiter.is_its_turn(env.now(), interval) {
                waiter.looks(env.now());
                match look().await? {
                    Seen::Claimed(left) => pause = pause.min(left),
                    Seen::Completed => {
                        wakes.notify_waiters();
                        waiter.owes_a_wake = false;
                        return Ok(());
                    }
                    Seen::Free => {
                        // The caller may have given up. If the permit was for this waiter, another gets it.
                        waiter.owes_a_wake &= env.now() >= deadline;
                        return Ok(());
                    }
                }
                waiter.owes_a_wake = false;
            }
            interval = (interval * 2).min(LONGEST);
            let now = env.now();
            if now >= deadline {
                return Ok(());
            }
            let pause = pin!(env.sleep(pause.min(deadline - now)));
            must_look = matches!(select(wake, pause).await, Either::Left(_));
            waiter.owes_a_wake = must_look;
        }
    }

    /// The request whose transaction holds a key, if one of this process does.
    pub(super) fn holder(&self, key: &EncodedKey) -> Option<Option<Fingerprint>> {
        self.held().get(key).copied()
    }

    /// Nothing panics while they are locked.
    fn held(&self) -> MutexGuard<'_, HashMap<EncodedKey, Option<Fingerprint>, HashKeys>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing panics while they are locked.
    fn lock(&self) -> MutexGuard<'_, HashMap<EncodedKey, Slot, HashKeys>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many keys have waiters.
    #[cfg(test)]
    pub(super) fn keys(&self) -> usize {
        self.lock().len()
    }
}

/// A waiter, counted in its key's slot until it is dropped.
struct Waiter<'a> {
    waiters: &'a Waiters,
    key: EncodedKey,
    wakes: Arc<Notify>,
    /// It took a permit and has not looked yet. If it is dropped, another gets the permit.
    owes_a_wake: bool,
}

impl<'a> Waiter<'a> {
    fn subscribe(waiters: &'a Waiters, key: &EncodedKey) -> Self {
        let mut slots = waiters.lock();
        let slot = slots.entry(*key).or_insert_with(|| Slot {
            count: 0,
            looked_at: Duration::ZERO,
            wakes: Arc::default(),
        });
        slot.count += 1;
        Self {
            waiters,
            key: *key,
            wakes: slot.wakes.clone(),
            owes_a_wake: false,
        }
    }

    /// Whether no waiter of the key has looked for this long.
    fn is_its_turn(&self, now: Duration, interval: Duration) -> bool {
        let slots = self.waiters.lock();
        let last = slots.get(&self.key).map(|slot| slot.looked_at);
        last.is_none_or(|last| last.saturating_add(interval) <= now)
    }

    fn looks(&self, now: Duration) {
        if let Some(slot) = self.waiters.lock().get_mut(&self.key) {
            slot.looked_at = now;
        }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if self.owes_a_wake {
            self.wakes.notify_one();
        }
        let mut slots = self.waiters.lock();
        if let Some(slot) = slots.get_mut(&self.key) {
            slot.count -= 1;
            if slot.count == 0 {
                slots.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::{
        future::poll_fn,
        sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        task::Poll,
    };

    use super::*;

    const KEY: EncodedKey = EncodedKey::from_bytes([7; 32]);
    const LONG: Duration = Duration::from_secs(3600);

    /// A key that has a claim until it is freed, and counts how often it was looked at.
    #[derive(Default)]
    struct Claim {
        is_free: AtomicBool,
        looks: AtomicUsize,
    }

    impl Claim {
        async fn look(&self) -> Result<Seen, StorageError> {
            self.looks.fetch_add(1, SeqCst);
            match self.is_free.load(SeqCst) {
                true => Ok(Seen::Free),
                false => Ok(Seen::Claimed(LONG)),
            }
        }
    }

    async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
        // tokio lets a task do so much between two yields, and then all seems pending.
        tokio::task::yield_now().await;
        poll_fn(|context| Poll::Ready(pin!(&mut *future).poll(context).is_pending())).await
    }

    #[tokio::test]
    async fn many_waiters_look_as_often_as_one() {
        let (env, clock) = Env::simulated(7);
        let (waiters, claim) = (Waiters::default(), Claim::default());
        let mut waits: Vec<_> = (0..100)
            .map(|_| Box::pin(waiters.wait(&KEY, &env, LONG, || claim.look())))
            .collect();
        for wait in &mut waits {
            assert!(is_pending(wait).await);
        }
        assert_eq!(claim.looks.load(SeqCst), 100, "each looks when it comes");
        for _ in 0..60 {
            clock.advance(LONGEST);
            for wait in &mut waits {
                assert!(is_pending(wait).await);
            }
        }
        let looks = claim.looks.load(SeqCst) - 100;
        assert!((50..=70).contains(&looks), "{looks} looks in 30 s");
        drop(waits);
        assert_eq!(waiters.keys(), 0);
    }

    #[tokio::test]
    async fn a_wake_reaches_one_waiter_that_is_left() {
        let (env, _clock) = Env::simulated(7);
        for dropped in 0..2 {
            let (waiters, claim) = (Waiters::default(), Claim::default());
            let mut waits: Vec<_> = (0..2)
                .map(|_| Box::pin(waiters.wait(&KEY, &env, LONG, || claim.look())))
                .collect();
            for wait in &mut waits {
                assert!(is_pending(wait).await);
            }
            claim.is_free.store(true, SeqCst);
            waiters.wake(&KEY, Whom::One);
            drop(waits.remove(dropped));
            waits.remove(0).await.unwrap();
            assert_eq!(waiters.keys(), 0);
        }
    }

    #[tokio::test]
    async fn a_waiter_that_is_dropped_while_it_looks_passes_its_wake_on() {
        let (env, _clock) = Env::simulated(7);
        let (waiters, claim) = (Waiters::default(), Claim::default());
        let looks = AtomicUsize::new(0);
        // Its second look takes for ever.
        let mut first = Box::pin(waiters.wait(&KEY, &env, LONG, || async {
            if looks.fetch_add(1, SeqCst) > 0 {
                std::future::pending::<()>().await;
            }
            Ok(Seen::Claimed(LONG))
        }));
        assert!(is_pending(&mut first).await);
        let mut second = Box::pin(waiters.wait(&KEY, &env, LONG, || claim.look()));
        assert!(is_pending(&mut second).await);
        claim.is_free.store(true, SeqCst);
        waiters.wake(&KEY, Whom::One);
        assert!(is_pending(&mut first).await);
        assert_eq!(looks.load(SeqCst), 2);
        assert!(is_pending(&mut second).await);
        drop(first);
        second.await.unwrap();
    }
}
