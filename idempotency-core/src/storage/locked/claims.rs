//! The claims of this process: the lock that each holds, and the data that a lock can't store.

use std::{sync::Mutex, time::Duration};

use crate::{
    EncodedKey, Fingerprint, Token,
    storage::lease::{self, Lease, LeaseTable, Waiter, Wake},
};

/// How long a claim is remembered after its lease is over. By the lock's clock it may still run, and then only the lock's token
/// can end it.
const GRACE: Duration = Duration::from_secs(60);

/// The claims of this process, and the calls to which the lock has not responded.
#[derive(Default)]
pub(super) struct Claims {
    /// Leases by the token of their lock.
    leases: Mutex<LeaseTable<EncodedKey, LockedClaim>>,
    /// Claims whose `acquire` got no response (yet), and until when the lock may hold the key for them.
    doubts: Mutex<LeaseTable<(EncodedKey, Token), ()>>,
}

/// A claim that holds a lock.
#[derive(Clone, Copy)]
pub(super) struct LockedClaim {
    pub(super) token: Token,
    pub(super) fingerprint: Option<Fingerprint>,
    /// The lease of the last lock or renewal.
    pub(super) lease: Duration,
}

impl Claims {
    /// The claim of `token`, which may have expired.
    pub(super) fn get(&self, key: &EncodedKey, token: Token) -> Option<Lease<LockedClaim>> {
        self.last(key).filter(|lease| lease.of.token == token)
    }

    /// The last known claim of `key`, which may have expired.
    pub(super) fn last(&self, key: &EncodedKey) -> Option<Lease<LockedClaim>> {
        lease::lock(&self.leases).get(key).copied()
    }

    /// The claim of `key` that runs.
    pub(super) fn running(&self, key: &EncodedKey, now: Duration) -> Option<Lease<LockedClaim>> {
        lease::lock(&self.leases).running(key, now).copied()
    }

    /// How many claims run.
    pub(super) fn count(&self, now: Duration) -> usize {
        let leases = lease::lock(&self.leases);
        leases.iter().filter(|lease| lease.end > now).count()
    }

    /// Remembers a claim that the lock has granted. An earlier claim of the key has then ended.
    pub(super) fn start(&self, key: &EncodedKey, lease: Lease<LockedClaim>, now: Duration) {
        let mut leases = lease::lock(&self.leases);
        leases.sweep(now.saturating_sub(GRACE));
        // If the response came so late that the key was granted again, the later claim stays.
        if leases.get(key).is_none_or(|known| known.end <= lease.end) {
            leases.start(key, lease);
        }
    }

    /// Renews the claim that holds `lock`.
    pub(super) fn renew(&self, key: &EncodedKey, lock: Token, lease: Duration, end: Duration) {
        if let Some(claim) = lease::lock(&self.leases).renew(key, lock, end) {
            claim.lease = lease;
        }
    }

    /// Forgets the claim that held `lock`, and wakes all who wait for its end.
    pub(super) fn end(&self, key: &EncodedKey, lock: Token) {
        lease::lock(&self.leases).end(key, lock, Wake::All);
    }

    /// A waiter for the end of the claim of `key` that runs; `None` if none runs.
    pub(super) fn subscribe(
        &self,
        key: &EncodedKey,
        now: Duration,
    ) -> Option<Waiter<'_, EncodedKey, LockedClaim>> {
        Waiter::subscribe(&self.leases, key, now)
    }

    /// Called before `acquire` with this `lease`. Returns the end of an earlier unanswered call for this claim, if there is one.
    pub(super) fn doubt(
        &self,
        key: &EncodedKey,
        token: Token,
        now: Duration,
        lease: Duration,
    ) -> Option<Duration> {
        let mut doubts = lease::lock(&self.doubts);
        doubts.sweep(now);
        let name = (*key, token);
        let earlier = doubts.running(&name, now).map(|doubt| doubt.end);
        let end = now.saturating_add(lease).saturating_add(GRACE);
        doubts.start(&name, Lease { token, end, of: () });
        earlier
    }

    /// The lock has responded: only the `earlier` unanswered call is left.
    pub(super) fn answered(&self, key: &EncodedKey, token: Token, earlier: Option<Duration>) {
        let mut doubts = lease::lock(&self.doubts);
        let name = (*key, token);
        match earlier {
            Some(end) => drop(doubts.renew(&name, token, end)),
            None => drop(doubts.end(&name, token, Wake::All)),
        }
    }

    /// How many claims and unanswered calls are remembered.
    #[cfg(all(test, feature = "memory", feature = "conformance"))]
    pub(super) fn len(&self) -> (usize, usize) {
        let claims = lease::lock(&self.leases).slots();
        (claims, lease::lock(&self.doubts).slots())
    }
}
