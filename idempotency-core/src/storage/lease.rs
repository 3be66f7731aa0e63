//! The table of leases: who holds a key, until when, and who waits for the end.
//!
//! [`MemoryStorage`](crate::MemoryStorage), [`LockedStorage`](crate::LockedStorage) and
//! [`ProcessLock`](crate::ProcessLock) keep their leases here. The table has no clock: each call is given the time.

use std::{
    collections::{HashMap, hash_map},
    hash::Hash,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::select;
use tokio::sync::Notify;

use crate::{Env, Token, key::HashKeys};

/// A sweep looks at every slot of the table, so it waits for one call for so many slots. A call pays for this many, on average.
const SLOTS_PER_CALL: usize = 16;

/// Leases by key, at most one each. `T` is what else is known of a lease.
pub(crate) struct LeaseTable<K, T> {
    slots: HashMap<K, Slot<T>, HashKeys>,
    /// No lease ends earlier. Not always the end of one: it is only computed anew by a sweep.
    earliest_end: Duration,
    calls_since_sweep: usize,
}

/// Exists as long as its key has a lease or a waiter.
struct Slot<T> {
    lease: Option<Lease<T>>,
    /// Boxed, because most leases never have a waiter.
    waiters: Option<Box<Waiters>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Lease<T> {
    pub(crate) token: Token,
    /// The lease is over from then on.
    pub(crate) end: Duration,
    pub(crate) of: T,
}

/// The waiters of one key. There is at least one.
struct Waiters {
    count: usize,
    /// No waiter sleeps longer than this without looking again.
    asleep_until: Duration,
    wakes: Arc<Notify>,
}

/// Which waiters the end of a lease wakes.
#[derive(Clone, Copy)]
pub(crate) enum Wake {
    /// One, because the key is free for one.
    #[cfg(any(feature = "memory", test))]
    One,
    /// All: there is an answer, or nobody is left who would wake the next.
    All,
}

impl<K, T> Default for LeaseTable<K, T> {
    fn default() -> Self {
        Self {
            slots: HashMap::default(),
            earliest_end: Duration::MAX,
            calls_since_sweep: 0,
        }
    }
}

impl<K: Copy + Eq + Hash, T> LeaseTable<K, T> {
    /// How many leases run.
    pub(crate) fn count(&self, now: Duration) -> usize {
        let leases = self.slots.values().filter_map(|slot| slot.lease.as_ref());
        leases.filter(|lease| lease.end > now).count()
    }

    /// How many waiters there are, of all keys.
    #[cfg(any(feature = "memory", test))]
    pub(crate) fn waiters(&self) -> usize {
        let waiters = self.slots.values().filter_map(|slot| slot.waiters.as_ref());
        waiters.map(|waiters| waiters.count).sum()
    }

    /// The lease of `key`, which may be over.
    pub(crate) fn get(&self, key: &K) -> Option<&Lease<T>> {
        self.slots.get(key)?.lease.as_ref()
    }

    /// The lease of `key`, unless it is over.
    pub(crate) fn running(&self, key: &K, now: Duration) -> Option<&Lease<T>> {
        self.get(key).filter(|lease| lease.end > now)
    }

    /// Starts a lease. One that `key` has already is taken over: its token no longer ends or renews anything.
    pub(crate) fn start(&mut self, key: &K, lease: Lease<T>) {
        let end = lease.end;
        let slot = self.slots.entry(*key).or_insert(Slot {
            lease: None,
            waiters: None,
        });
        slot.lease = Some(lease);
        slot.ends_at(end);
        self.earliest_end = self.earliest_end.min(end);
    }

    /// Moves the end of the lease of `key` if `token` holds it, and returns what is known of it.
    pub(crate) fn renew(&mut self, key: &K, token: Token, end: Duration) -> Option<&mut T> {
        let slot = self.slots.get_mut(key)?;
        let lease = slot.lease.as_mut().filter(|lease| lease.token == token)?;
        lease.end = end;
        slot.ends_at(end);
        self.earliest_end = self.earliest_end.min(end);
        slot.lease.as_mut().map(|lease| &mut lease.of)
    }

    /// Ends the lease of `key` if `token` holds it. Says whether it did.
    pub(crate) fn end(&mut self, key: &K, token: Token, wake: Wake) -> bool {
        self.get(key).is_some_and(|lease| lease.token == token) && self.remove(key, wake)
    }

    /// Ends the lease of `key`, whoever holds it. Says whether there was one.
    pub(crate) fn remove(&mut self, key: &K, wake: Wake) -> bool {
        let hash_map::Entry::Occupied(mut slot) = self.slots.entry(*key) else {
            return false;
        };
        if slot.get_mut().lease.take().is_none() {
            return false;
        }
        match (&slot.get().waiters, wake) {
            (None, _) => drop(slot.remove()),
            #[cfg(any(feature = "memory", test))]
            (Some(waiters), Wake::One) => waiters.wakes.notify_one(),
            (Some(waiters), Wake::All) => waiters.wakes.notify_waiters(),
        }
        true
    }

    /// Ends the lease of `key` if it is over. Says whether it did.
    pub(crate) fn end_if_over(&mut self, key: &K, now: Duration) -> bool {
        self.get(key).is_some_and(|lease| lease.end <= now) && self.remove(key, Wake::All)
    }

    /// Ends the leases that are over, if enough calls came since that was done last. Returns how many ended.
    pub(crate) fn sweep(&mut self, now: Duration) -> usize {
        self.calls_since_sweep += 1;
        if self.calls_since_sweep < self.slots.capacity() / SLOTS_PER_CALL {
            return 0;
        }
        self.end_all_over(now)
    }

    /// Ends all leases that are over. Returns how many ended.
    pub(crate) fn end_all_over(&mut self, now: Duration) -> usize {
        if now < self.earliest_end {
            return 0;
        }
        let mut ended = 0;
        self.calls_since_sweep = 0;
        self.earliest_end = Duration::MAX;
        self.slots.retain(|_, slot| {
            if slot.lease.take_if(|lease| lease.end <= now).is_some() {
                ended += 1;
                slot.wake_all();
            }
            if let Some(lease) = &slot.lease {
                self.earliest_end = self.earliest_end.min(lease.end);
            }
            slot.is_used()
        });
        ended
    }

    /// Counts a waiter for the end of the lease of `key`; `None` if none runs.
    fn subscribe(&mut self, key: &K, now: Duration) -> Option<Arc<Notify>> {
        let slot = self.slots.get_mut(key)?;
        let end = slot.lease.as_ref().filter(|lease| lease.end > now)?.end;
        let waiters = slot.waiters.get_or_insert_with(|| {
            Box::new(Waiters {
                count: 0,
                asleep_until: end,
                wakes: Arc::default(),
            })
        });
        waiters.count += 1;
        Some(waiters.wakes.clone())
    }

    /// Takes back one [`subscribe`](Self::subscribe).
    fn unsubscribe(&mut self, key: &K) {
        let hash_map::Entry::Occupied(mut slot) = self.slots.entry(*key) else {
            return;
        };
        slot.get_mut().waiters.take_if(|waiters| {
            waiters.count -= 1;
            waiters.count == 0
        });
        if !slot.get().is_used() {
            slot.remove();
        }
    }

    /// How many leases there are, with those that are over and not yet removed.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        let slots = self.slots.values();
        slots.filter(|slot| slot.lease.is_some()).count()
    }

    /// How many keys have a lease or a waiter.
    #[cfg(test)]
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }
}

impl<T> Slot<T> {
    fn is_used(&self) -> bool {
        self.lease.is_some() || self.waiters.is_some()
    }

    /// Wakes the waiters that would sleep past the new end of the lease, of this one or of the one that follows it.
    fn ends_at(&mut self, end: Duration) {
        if let Some(waiters) = &mut self.waiters
            && end < std::mem::replace(&mut waiters.asleep_until, end)
        {
            self.wake_all();
        }
    }

    fn wake_all(&self) {
        if let Some(waiters) = &self.waiters {
            waiters.wakes.notify_waiters();
        }
    }
}

/// Locks a table, or what lies beside one, whose steps make their changes after all that could panic: under a poisoned lock it is whole.
pub(crate) fn lock<T>(table: &Mutex<T>) -> MutexGuard<'_, T> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns when no lease of `key` runs, or after `timeout`. Says whether one ran at the call.
pub(crate) async fn wait<K: Copy + Eq + Hash, T>(
    table: &Mutex<LeaseTable<K, T>>,
    key: &K,
    env: &Env,
    timeout: Duration,
) -> bool {
    let now = env.now();
    let deadline = now.saturating_add(timeout);
    let Some(waiter) = Waiter::subscribe(table, key, now) else {
        return false;
    };
    loop {
        // Enabled before the table is read, so that an end in between is not missed. Dropped with an unused permit, it
        // passes the permit on.
        let mut woken = pin!(waiter.wakes.notified());
        woken.as_mut().enable();

        let now = env.now();
        let end = lock(table).running(key, now).map(|lease| lease.end);
        if end.is_none() && now >= deadline {
            // The caller may have given up. If the permit was for this waiter, another gets it.
            waiter.wakes.notify_one();
        }
        match end {
            Some(end) if now < deadline => {
                let pause = pin!(env.sleep(end.min(deadline) - now));
                let _ = select(woken, pause).await;
            }
            _ => return true,
        }
    }
}

/// Counted in the slot of its key until it is dropped.
struct Waiter<'a, K: Copy + Eq + Hash, T> {
    table: &'a Mutex<LeaseTable<K, T>>,
    key: K,
    wakes: Arc<Notify>,
}

impl<'a, K: Copy + Eq + Hash, T> Waiter<'a, K, T> {
    /// `None` if no lease of `key` runs.
    fn subscribe(table: &'a Mutex<LeaseTable<K, T>>, key: &K, now: Duration) -> Option<Self> {
        let wakes = lock(table).subscribe(key, now)?;
        Some(Self {
            table,
            key: *key,
            wakes,
        })
    }
}

impl<K: Copy + Eq + Hash, T> Drop for Waiter<'_, K, T> {
    fn drop(&mut self) {
        lock(self.table).unsubscribe(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn token(number: u8) -> Token {
        Token::from_bytes([number; 16])
    }

    fn lease(number: u8, seconds: u32) -> Lease<u8> {
        Lease {
            token: token(number),
            end: SECOND * seconds,
            of: number,
        }
    }

    #[test]
    fn a_lease_that_was_taken_over_changes_nothing() {
        let mut table = LeaseTable::default();
        table.start(&0, lease(1, 10));
        table.start(&0, lease(2, 20));
        assert_eq!(table.len(), 1);
        assert_eq!(table.renew(&0, token(1), SECOND * 99), None);
        assert!(!table.end(&0, token(1), Wake::All));
        assert_eq!(table.get(&0), Some(&lease(2, 20)));
        assert!(table.end(&0, token(2), Wake::All));
        assert!(!table.end(&0, token(2), Wake::All));
        assert_eq!((table.len(), table.slots()), (0, 0));
    }

    #[test]
    fn a_renewed_lease_outlives_its_first_end() {
        let mut table = LeaseTable::default();
        table.start(&0, lease(1, 10));
        assert_eq!(table.renew(&0, token(1), SECOND * 20), Some(&mut 1));
        assert_eq!(table.end_all_over(SECOND * 19), 0);
        assert_eq!(table.running(&0, SECOND * 19), Some(&lease(1, 20)));
        assert_eq!(table.running(&0, SECOND * 20), None);
        assert!(!table.end_if_over(&0, SECOND * 19));
        assert!(table.end_if_over(&0, SECOND * 20));
        assert_eq!(table.slots(), 0);
    }

    #[test]
    fn a_shortened_lease_ends_at_its_new_end() {
        let mut table = LeaseTable::default();
        table.start(&0, lease(1, 30));
        table.renew(&0, token(1), SECOND);
        assert_eq!(table.end_all_over(SECOND), 1);
        assert_eq!(table.slots(), 0);
    }

    #[test]
    fn a_sweep_ends_what_is_over_and_nothing_else() {
        let mut table = LeaseTable::default();
        for key in 0..200 {
            table.start(&key, lease(1, key + 1));
        }
        assert_eq!(table.end_all_over(SECOND * 100), 100);
        assert_eq!(table.len(), 100);
        assert!(table.get(&99).is_none() && table.get(&100).is_some());
        let calls = (0..200).find(|_| table.sweep(SECOND * 200) > 0);
        assert!(
            calls.is_some_and(|calls| (1..100).contains(&calls)),
            "{calls:?}"
        );
        assert_eq!((table.len(), table.slots()), (0, 0));
    }

    #[test]
    fn a_lease_ends_for_one_waiter_or_for_all() {
        for (wake, woken) in [(Wake::One, 1), (Wake::All, 3)] {
            let mut table = LeaseTable::default();
            table.start(&0, lease(1, 10));
            let wakes: Vec<_> = (0..3).filter_map(|_| table.subscribe(&0, SECOND)).collect();
            let mut waiting: Vec<_> = wakes
                .iter()
                .map(|wakes| Box::pin(wakes.notified()))
                .collect();
            for waiting in &mut waiting {
                waiting.as_mut().enable();
            }
            assert!(table.end(&0, token(1), wake));
            let ready = waiting
                .iter_mut()
                .filter_map(|waiting| waiting.as_mut().enable().then_some(()));
            assert_eq!(ready.count(), woken);
        }
    }

    #[test]
    fn a_slot_stays_for_its_waiters() {
        let table = Mutex::new(LeaseTable::default());
        assert!(Waiter::subscribe(&table, &0, SECOND).is_none());
        lock(&table).start(&0, lease(1, 10));
        assert!(Waiter::subscribe(&table, &0, SECOND * 10).is_none());
        let waiters: Vec<_> = (0..3)
            .filter_map(|_| Waiter::subscribe(&table, &0, SECOND))
            .collect();
        assert_eq!(lock(&table).end_all_over(SECOND * 10), 1);
        let counts = |table: &LeaseTable<_, _>| (table.len(), table.waiters(), table.slots());
        assert_eq!(counts(&lock(&table)), (0, 3, 1));
        drop(waiters);
        assert_eq!(counts(&lock(&table)), (0, 0, 0));
    }
}
