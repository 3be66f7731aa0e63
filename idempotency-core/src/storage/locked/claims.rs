//! What this process knows of its claims: which lock each holds, and what the lock can't keep.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::sync::{Notify, futures::OwnedNotified};

use crate::{EncodedKey, Fingerprint, Token};

/// For how long a claim is remembered after its lease is over: by the lock's clock it may not be over yet, and until then only
/// the lock's token can end it.
const GRACE: Duration = Duration::from_secs(60);

/// How many claims, and how many doubts, to be forgotten a new one clears away: more than one keeps up.
const SWEEP: usize = 8;

/// Of one key there may be several: one that runs, and those that lost it and don't know yet.
type Name = (EncodedKey, [u8; 16]);

#[derive(Default)]
pub(super) struct Claims {
    by_name: BTreeMap<Name, Known>,
    /// End of the lease and name of every claim.
    ends: BTreeSet<(Duration, Name)>,
    /// Claims for which the lock was asked and has not answered (yet): it may hold the key for them. And until when at most.
    doubts: BTreeMap<Name, Duration>,
    doubt_ends: BTreeSet<(Duration, Name)>,
}

struct Known {
    claim: Claim,
    /// Made for the first who waits: most claims never have one.
    ended: Option<Arc<Notify>>,
}

#[derive(Clone, Copy)]
pub(super) struct Claim {
    /// The lock's token.
    pub(super) locked: Token,
    pub(super) fingerprint: Option<Fingerprint>,
    /// The one that it was locked or renewed for last.
    pub(super) lease: Duration,
    pub(super) lease_end: Duration,
}

impl Claims {
    pub(super) fn get(&self, key: &EncodedKey, token: Token) -> Option<Claim> {
        let known = self.by_name.get(&(*key, *token.as_bytes()))?;
        Some(known.claim)
    }

    /// All claims of `key` that are known, running or not.
    pub(super) fn all(&self, key: &EncodedKey) -> Vec<(Token, Claim)> {
        self.of(key)
            .map(|((_, token), known)| (Token::from_bytes(*token), known.claim))
            .collect()
    }

    /// The claim of `key` that runs, as far as is known.
    pub(super) fn latest(&self, key: &EncodedKey, now: Duration) -> Option<Claim> {
        self.of(key)
            .map(|(_, known)| known.claim)
            .filter(|claim| claim.lease_end > now)
            .max_by_key(|claim| claim.lease_end)
    }

    /// How many claims run.
    pub(super) fn running(&self, now: Duration) -> usize {
        let leases = self.by_name.values().map(|known| known.claim.lease_end);
        leases.filter(|lease_end| *lease_end > now).count()
    }

    pub(super) fn start(&mut self, key: &EncodedKey, token: Token, claim: Claim, now: Duration) {
        self.sweep(now);
        let name = (*key, *token.as_bytes());
        // The lock gave the key away again, so an earlier claim of this name is over.
        self.forget(&name);
        self.ends.insert((claim.lease_end, name));
        let ended = None;
        self.by_name.insert(name, Known { claim, ended });
    }

    pub(super) fn renew(
        &mut self,
        key: &EncodedKey,
        token: Token,
        locked: Token,
        lease: Duration,
        lease_end: Duration,
    ) {
        let name = (*key, *token.as_bytes());
        let Some(known) = self.by_name.get_mut(&name) else {
            return;
        };
        let claim = &mut known.claim;
        if claim.locked != locked {
            return;
        }
        self.ends.remove(&(claim.lease_end, name));
        self.ends.insert((lease_end, name));
        (claim.lease, claim.lease_end) = (lease, lease_end);
        if let Some(ended) = &known.ended {
            // It may end sooner than they think.
            ended.notify_waiters();
        }
    }

    /// Forgets the claim of `token` if it is the one that held `locked`, and wakes all who wait for its end.
    pub(super) fn end(&mut self, key: &EncodedKey, token: Token, locked: Token) {
        let name = (*key, *token.as_bytes());
        if self
            .by_name
            .get(&name)
            .is_some_and(|known| known.claim.locked == locked)
        {
            self.forget(&name);
        }
    }

    /// What tells of the end of the claim of `key` that runs, and when it ends by itself; `None` when none runs.
    pub(super) fn watch(
        &mut self,
        key: &EncodedKey,
        now: Duration,
    ) -> Option<(OwnedNotified, Duration)> {
        let known = self
            .by_name
            .range_mut(names(key))
            .map(|(_, known)| known)
            .filter(|known| known.claim.lease_end > now)
            .max_by_key(|known| known.claim.lease_end)?;
        let ended = known.ended.get_or_insert_default().clone();
        // Made under the lock: it is told of everything that happens from here on, polled or not.
        Some((ended.notified_owned(), known.claim.lease_end))
    }

    /// The lock is going to be asked for a `lease`. Returns the end of an earlier doubt about this claim, if there is one.
    pub(super) fn doubt(
        &mut self,
        key: &EncodedKey,
        token: Token,
        now: Duration,
        lease: Duration,
    ) -> Option<Duration> {
        for _ in 0..SWEEP {
            match self.doubt_ends.first() {
                Some(&(end, name)) if end <= now => self.set_doubt(name, None),
                _ => break,
            };
        }
        let name = (*key, *token.as_bytes());
        let end = now.saturating_add(lease).saturating_add(GRACE);
        let earlier = self.set_doubt(name, Some(end));
        earlier.filter(|end| *end > now)
    }

    /// The lock has answered: what is left is the `earlier` doubt.
    pub(super) fn answered(&mut self, key: &EncodedKey, token: Token, earlier: Option<Duration>) {
        self.set_doubt((*key, *token.as_bytes()), earlier);
    }

    fn set_doubt(&mut self, name: Name, end: Option<Duration>) -> Option<Duration> {
        let earlier = match end {
            Some(end) => {
                self.doubt_ends.insert((end, name));
                self.doubts.insert(name, end)
            }
            None => self.doubts.remove(&name),
        };
        if let Some(earlier) = earlier
            && Some(earlier) != end
        {
            self.doubt_ends.remove(&(earlier, name));
        }
        earlier
    }

    fn of(&self, key: &EncodedKey) -> impl Iterator<Item = (&Name, &Known)> {
        self.by_name.range(names(key))
    }

    fn sweep(&mut self, now: Duration) {
        for _ in 0..SWEEP {
            match self.ends.first() {
                Some(&(lease_end, name)) if lease_end.saturating_add(GRACE) <= now => {
                    self.forget(&name);
                }
                _ => return,
            }
        }
    }

    fn forget(&mut self, name: &Name) {
        let Some(known) = self.by_name.remove(name) else {
            return;
        };
        self.ends.remove(&(known.claim.lease_end, *name));
        if let Some(ended) = known.ended {
            ended.notify_waiters();
        }
    }

    /// How many claims and doubts are remembered.
    #[cfg(all(test, feature = "memory", feature = "conformance"))]
    pub(super) fn len(&self) -> (usize, usize) {
        assert_eq!(self.by_name.len(), self.ends.len());
        assert_eq!(self.doubts.len(), self.doubt_ends.len());
        (self.by_name.len(), self.doubts.len())
    }
}

fn names(key: &EncodedKey) -> std::ops::RangeInclusive<Name> {
    (*key, [0; 16])..=(*key, [u8::MAX; 16])
}
