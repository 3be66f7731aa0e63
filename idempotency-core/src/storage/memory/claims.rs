//! The running claims of one shard, and who waits for their end.

use std::{
    collections::{BTreeSet, HashMap, hash_map},
    sync::Arc,
    time::Duration,
};

use tokio::sync::Notify;

use super::ledger::Ledger;
use crate::{EncodedKey, Fingerprint, NewClaim, Token, key::HashKeys};

pub(super) struct Claims {
    slots: HashMap<EncodedKey, Slot, HashKeys>,
    /// End of the lease and key of every claim, so that those of dead holders are found without a search.
    leases: BTreeSet<(Duration, EncodedKey)>,
    ledger: Arc<Ledger>,
}

/// There is one as long as a claim or a waiter is.
#[derive(Default)]
struct Slot {
    claim: Option<Claim>,
    /// Apart from the claim, as most claims never have any.
    waiters: Option<Box<Waiters>>,
}

/// Who waits for one key. There is at least one.
struct Waiters {
    count: usize,
    /// No one sleeps longer than this without looking again.
    asleep_until: Duration,
    wakes: Arc<Notify>,
}

#[derive(Clone, Copy)]
pub(super) struct Claim {
    pub(super) token: Token,
    pub(super) fingerprint: Option<Fingerprint>,
    /// By the storage's clock. The claim is over from then on.
    pub(super) lease_end: Duration,
}

/// Whom the end of a claim wakes.
pub(super) enum Wake {
    /// One, as the key is free for one.
    One,
    /// All: there is an answer, or nobody is left who would wake the next.
    All,
}

impl Claims {
    pub(super) fn new(ledger: Arc<Ledger>) -> Self {
        Self {
            slots: HashMap::default(),
            leases: BTreeSet::new(),
            ledger,
        }
    }

    pub(super) fn get(&self, key: &EncodedKey) -> Option<&Claim> {
        self.slots.get(key)?.claim.as_ref()
    }

    /// Stores a claim where none is, unless what the storage holds has reached `limit`. Says whether it did.
    #[must_use]
    pub(super) fn start(
        &mut self,
        key: &EncodedKey,
        claim: &NewClaim,
        lease_end: Duration,
        limit: Option<u64>,
    ) -> bool {
        if !self.ledger.claim_started(limit) {
            return false;
        }
        self.leases.insert((lease_end, *key));
        let slot = self.slots.entry(*key).or_default();
        slot.claim = Some(Claim {
            token: claim.token,
            fingerprint: claim.fingerprint,
            lease_end,
        });
        slot.lease_ends_at(lease_end);
        true
    }

    /// Moves the end of the lease of the claim of `key`.
    pub(super) fn renew(&mut self, key: &EncodedKey, lease_end: Duration) {
        let Some(slot) = self.slots.get_mut(key) else {
            return;
        };
        let Some(claim) = &mut slot.claim else {
            return;
        };
        self.leases.remove(&(claim.lease_end, *key));
        self.leases.insert((lease_end, *key));
        claim.lease_end = lease_end;
        slot.lease_ends_at(lease_end);
    }

    /// Ends the claim of `key`. Says whether there was one.
    pub(super) fn end(&mut self, key: &EncodedKey, wake: Wake) -> bool {
        let hash_map::Entry::Occupied(mut slot) = self.slots.entry(*key) else {
            return false;
        };
        let Some(claim) = slot.get_mut().claim.take() else {
            return false;
        };
        self.leases.remove(&(claim.lease_end, *key));
        self.ledger.claim_ended();
        match (&slot.get().waiters, wake) {
            (None, _) => drop(slot.remove()),
            (Some(waiters), Wake::One) => waiters.wakes.notify_one(),
            (Some(waiters), Wake::All) => waiters.wakes.notify_waiters(),
        }
        true
    }

    /// Ends the claim of `key` if its lease is over.
    pub(super) fn end_if_over(&mut self, key: &EncodedKey, now: Duration) {
        if self.get(key).is_some_and(|claim| claim.lease_end <= now) {
            self.end(key, Wake::All);
        }
    }

    /// Ends up to `at_most` claims whose lease is over. Says whether there may be more.
    pub(super) fn sweep(&mut self, now: Duration, at_most: usize) -> bool {
        for _ in 0..at_most {
            match self.leases.first() {
                Some(&(lease_end, key)) if lease_end <= now => self.end(&key, Wake::All),
                _ => return false,
            };
        }
        true
    }

    /// Counts one who waits for the end of the claim of `key`; `None` when there is no claim.
    pub(super) fn subscribe(&mut self, key: &EncodedKey) -> Option<Arc<Notify>> {
        let slot = self.slots.get_mut(key)?;
        let lease_end = slot.claim.as_ref()?.lease_end;
        let waiters = slot.waiters.get_or_insert_with(|| {
            Box::new(Waiters {
                count: 0,
                asleep_until: lease_end,
                wakes: Arc::default(),
            })
        });
        waiters.count += 1;
        self.ledger.waiter_came();
        Some(waiters.wakes.clone())
    }

    /// Takes back one [`subscribe`](Self::subscribe).
    pub(super) fn unsubscribe(&mut self, key: &EncodedKey) {
        self.ledger.waiter_left();
        let hash_map::Entry::Occupied(mut entry) = self.slots.entry(*key) else {
            return;
        };
        let slot = entry.get_mut();
        slot.waiters.take_if(|waiters| {
            waiters.count -= 1;
            waiters.count == 0
        });
        if slot.waiters.is_none() && slot.claim.is_none() {
            entry.remove();
        }
    }

    /// How many keys have a claim or a waiter.
    #[cfg(test)]
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }
}

impl Slot {
    /// Tells those who would sleep past the new end of the lease, of this claim or of the one that follows it.
    fn lease_ends_at(&mut self, lease_end: Duration) {
        let Some(waiters) = &mut self.waiters else {
            return;
        };
        let shortened = lease_end < waiters.asleep_until;
        waiters.asleep_until = lease_end;
        if shortened {
            waiters.wakes.notify_waiters();
        }
    }
}
