//! The keeper: one task per engine that renews its claims, retries outcomes that the storage did not take, stores the tombstone of a run
//! that is older than `max_hold`, and releases claims that were dropped.
//!
//! It lives while there is something to keep: started by the first claim, it looks at what is due and ends when nothing is left. So
//! a request that is answered within a third of the lease costs no spawn and no timer beyond the one that the keeper already has.
//! It runs on [`Env::background`](crate::Env::background), so that no runtime of the program has to run for it.
//!
//! When a run is due, and how long the pauses between attempts are, [`run`](super::run) decides.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::Arc,
};

use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, select},
    stream::FuturesUnordered,
};
use tokio::sync::Semaphore;
use tracing::instrument::WithSubscriber;

use super::{
    Shared,
    releases::{Claimed, Release},
    run::{Job, Late, Run},
};
use crate::{
    Begin, EncodedKey, Event, Fingerprint, Held, NewClaim, Operation, Outcome, Record, Storage,
    StorageError, StorageErrorKind, Token, TombstoneReason,
};

/// How many outcomes the keeper stores at once. Renewals have no such limit: one that hangs delays only itself.
const STORES: usize = 64;

/// Wakes the keeper, or starts one: there is work before it would look.
pub(super) fn wake(shared: &Arc<Shared>) {
    if shared.runs.call_keeper() {
        start(shared);
    }
}

/// Starts the keeper, where the runs say that there is none.
pub(super) fn start(shared: &Arc<Shared>) {
    // If a user's `Env` panics here, the drop of the keeper marks it as stopped. The panic is not passed on, because this may be called
    // during another one.
    let keeper = Keeper {
        shared: shared.clone(),
        leaving: false,
    };
    let started = catch_unwind(AssertUnwindSafe(|| {
        let spawner = shared.config.env.background()?;
        spawner.spawn(keeper.run().with_current_subscriber());
        Some(())
    }));
    if !matches!(started, Ok(Some(()))) {
        tracing::error!(
            target: "idempotency",
            "no runtime to renew claims on: they end with their lease; call the engine inside a tokio runtime"
        );
    }
}

/// Leaves a claim to the keeper to be released.
pub(super) fn release(shared: &Shared, key: &EncodedKey, token: Token, claimed: Claimed) {
    shared.runs.release(Release {
        key: *key,
        token,
        claimed,
        lease_end: shared.now().saturating_add(shared.lease()),
    });
}

/// What the storage said to the release of a claim. Returns whether it answered; if not, the other releases pause too.
pub(super) fn released(
    shared: &Shared,
    key: &EncodedKey,
    claimed: Claimed,
    released: Result<Held, StorageError>,
) -> bool {
    let key = *key;
    match released {
        Ok(Held::Yes) => shared.emit(&Event::Released { key }),
        Ok(Held::Lost) if claimed == Claimed::Yes => shared.emit(&Event::Lost {
            key,
            operation: Operation::Release,
        }),
        Ok(Held::Lost) => {}
        Err(error) => {
            shared.failed(&key, Operation::Release, &error);
            shared.runs.pause_releases(shared.now(), shared.lease());
            return false;
        }
    }
    true
}

struct Keeper {
    shared: Arc<Shared>,
    leaving: bool,
}

impl Keeper {
    async fn run(mut self) {
        let shared = &self.shared.clone();
        let config = &shared.config;
        let lease = shared.lease();
        // Claims that are due a little later are renewed along, so that the keeper wakes for many at once.
        let slack = lease / 12;
        // A new claim does not wake the keeper, so it sleeps no longer than until that would be due.
        let longest = (lease / 3).min(config.lock.longest_hold());
        shared.runs.start_over();

        let stores = &Semaphore::new(STORES);
        let mut under_way = FuturesUnordered::<BoxFuture<'_, ()>>::new();
        loop {
            let now = shared.now();
            for (token, job) in shared.runs.take_due(now, now.saturating_add(slack)) {
                under_way.push(match job {
                    Job::Renew => Box::pin(guarded(shared, token, job, renew(shared, token))),
                    Job::Store => Box::pin(async move {
                        let _permit = stores.acquire().await;
                        // Boxed, since thousands may wait for their turn in an outage.
                        let work = Box::pin(store(shared, token));
                        guarded(shared, token, job, work).await;
                    }),
                });
            }
            for release in shared.runs.drop_releases(now) {
                shared.runs.waiters.wake_one(&release.key);
            }
            while let Some(release) = shared.runs.take_release(now) {
                under_way.push(Box::pin(release_late(shared, release)));
            }

            if under_way.is_empty() && shared.runs.dismiss_keeper() {
                break;
            }
            let wake_at = shared.runs.next_due().min(now.saturating_add(longest));
            let asleep = pin!(config.env.sleep(wake_at.saturating_sub(shared.now())));
            let called = pin!(shared.runs.work());
            let woken = select(asleep, called);
            if under_way.is_empty() {
                woken.await;
            } else {
                select(under_way.next(), woken).await;
            }
            // The others that have ended, so that they are not looked at one by one.
            while let Some(Some(())) = under_way.next().now_or_never() {}
        }
        self.leaving = true;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if !self.leaving {
            self.shared.runs.lose_keeper();
        }
    }
}

/// Runs `work`; if something panics in it, the other claims are renewed all the same.
async fn guarded(shared: &Shared, token: Token, job: Job, work: impl Future<Output = ()>) {
    if AssertUnwindSafe(work).catch_unwind().await.is_err() {
        let now = shared.now();
        shared.runs.change(token, |run| run.put_off(job, now));
    }
}

/// `operation` under the keeper's time limit: a renewal that hangs has to be tried again before the lease is over. A panic of the storage
/// counts as a failure, and is retried at the same pace.
async fn limited<T>(
    shared: &Shared,
    operation: impl Future<Output = Result<T, StorageError>>,
) -> Result<T, StorageError> {
    let limit = shared.config.storage_timeout.min(shared.lease() / 3);
    let operation = AssertUnwindSafe(operation).catch_unwind();
    let done = shared.limited_to(limit, operation.map(Ok)).await?;
    done.unwrap_or_else(|_| Err(StorageError::unavailable("the storage panicked")))
}

/// Renews the claim for another lease, or claims the key again if the storage has forgotten the claim.
async fn renew(shared: &Shared, token: Token) {
    let claimed = shared.runs.change(token, |run| (run.key, run.fingerprint));
    let Some((key, fingerprint)) = claimed else {
        return;
    };
    let renewed = shared.storage.renew(&key, token, shared.lease());
    let (operation, error) = match limited(shared, renewed).await {
        Ok(Held::Yes) => {
            let now = shared.now();
            shared.runs.change(token, |run| run.renewed(now));
            return;
        }
        Ok(Held::Lost) if shared.runs.change(token, Run::claim_is_gone) == Some(true) => {
            match reclaim(shared, &key, token, fingerprint).await {
                Ok(None | Some(Begin::Acquired)) => return,
                Ok(Some(Begin::InFlight { .. } | Begin::Completed(_))) => {
                    if shared.runs.change(token, Run::lose) == Some(true) {
                        shared.lost(&key, Operation::Renew);
                    }
                    return;
                }
                Err(error) => (Operation::Begin, error),
            }
        }
        Ok(Held::Lost) => return,
        Err(error) => (Operation::Renew, error),
    };
    shared.failed(&key, operation, &error);
    let now = shared.now();
    shared.runs.change(token, |run| run.renewal_failed(now));
}

/// Claims the key again after the storage has lost the claim (a restart without its data), unless another holder has it by now. The
/// run has not ended, so nobody else may begin. `None` if it was released or removed meanwhile.
async fn reclaim(
    shared: &Shared,
    key: &EncodedKey,
    token: Token,
    fingerprint: Option<Fingerprint>,
) -> Result<Option<Begin>, StorageError> {
    let claim = NewClaim {
        token,
        fingerprint,
        lease: shared.lease(),
    };
    let begun = limited(shared, shared.storage.begin(key, &claim)).await;
    let is_claimed = matches!(begun, Ok(Begin::Acquired));
    let now = shared.now();
    let is_wanted = shared.runs.change(token, |run| {
        if is_claimed {
            run.renewed(now);
        }
        run.answers()
    });
    if is_wanted == Some(true) {
        if is_claimed {
            shared.emit(&Event::Reclaimed { key: *key });
        }
        return begun.map(Some);
    }
    // After an error it may have been claimed all the same.
    if is_claimed || begun.is_err() {
        release(shared, key, token, Claimed::Perhaps);
    }
    begun.map(|_| None)
}

/// Tries to store the record of a run: an outcome that its own future did not store, or the tombstone of an operation that was held too
/// long. This one makes sure that the operation, which may still be at it, is never run again; it is stored again and again while the
/// operation runs.
async fn store(shared: &Shared, token: Token) {
    let now = shared.now();
    let Some(late) = shared.runs.change(token, |run| run.late(now)).flatten() else {
        return;
    };
    let Late { key, replaced, .. } = late;
    if late.ttl.is_zero() {
        let abandon = |run: &mut Run| run.late_stored(Held::Lost, replaced, now);
        let _telling = shared.runs.telling();
        if shared.runs.change(token, abandon) == Some(true) {
            shared.emit(&Event::Abandoned { key });
            shared.runs.waiters.wake_all(&key);
        }
        return;
    }
    // This process answers with it from now on, whatever becomes of the storage.
    shared.runs.waiters.hand_over(&key, &late.record);
    let stored = try_to_store(shared, token, &late).await;
    let _telling = shared.runs.telling();
    let now = shared.now();
    match stored {
        Ok((record, held)) => {
            let stored = |run: &mut Run| run.late_stored(held, replaced, now);
            if shared.runs.change(token, stored) != Some(true) {
                return;
            }
            match held {
                Held::Yes => {
                    shared.announce_stored(&key, late.since, &record);
                    shared.runs.waiters.hand_over(&key, &record);
                }
                Held::Lost => shared.lost(&key, Operation::Complete),
            }
        }
        Err((operation, error)) => {
            shared.failed(&key, operation, &error);
            shared
                .runs
                .change(token, |run| run.late_failed(operation, now));
        }
    }
}

/// Tries to store a record. Returns the one that the storage has now, and whether the key is ours.
///
/// The storage is asked first what it has of an answer: that may have arrived though nobody said so, and sending it again can take
/// longer than any time limit.
async fn try_to_store(
    shared: &Shared,
    token: Token,
    late: &Late,
) -> Result<(Record, Held), (Operation, StorageError)> {
    let Late { key, record, .. } = late;
    let storage = &shared.storage;
    let renew = || limited(shared, storage.renew(key, token, shared.lease()));
    let complete = |record| limited(shared, storage.complete(key, token, record, late.ttl));
    let unanswered = |error| (Operation::Renew, error);
    if let Outcome::Tombstone(_) = record.outcome
        && late.replaced == 0
    {
        // It is small, and may be there for a while: its TTL is to begin anew.
        return match complete(record).await {
            Ok(held) => Ok((record.clone(), held)),
            Err(error) => Err((Operation::Complete, error)),
        };
    }

    let tombstone = Record::tombstone(record.fingerprint, TombstoneReason::Unstorable);
    let mut offered = record;
    match renew().await.map_err(unanswered)? {
        Held::Yes => {
            let now = shared.now();
            shared.runs.change(token, |run| run.renewed(now));
        }
        Held::Lost => match reclaim(shared, key, token, record.fingerprint).await {
            // The storage had lost the claim.
            Ok(Some(Begin::Acquired)) => {}
            Ok(None) => return Ok((record.clone(), Held::Lost)),
            Ok(Some(Begin::Completed(there))) if there == *record => return Ok((there, Held::Yes)),
            // The claim or record may be ours or another's. Completing with a tombstone tells which, and it is small: for our token the
            // storage keeps its first record.
            Ok(Some(Begin::Completed(_) | Begin::InFlight { .. })) => offered = &tombstone,
            // What is there may be too large to arrive in time.
            Err(error) if error.kind() == StorageErrorKind::Timeout => {
                if renew().await.map_err(unanswered)? == Held::Lost {
                    offered = &tombstone;
                }
            }
            Err(error) => return Err((Operation::Begin, error)),
        },
    }
    let mut stored = complete(offered).await;
    if late.replaced > 0 && matches!(stored, Ok(Held::Yes)) {
        // An attempt before may have stored the record that this one replaced, and the storage keeps the first.
        let replaced = limited(shared, storage.replace(key, record, late.ttl)).await;
        stored = replaced.map(|()| Held::Yes);
    }
    match stored {
        Ok(held) => Ok((record.clone(), held)),
        // If the storage accepts the tombstone, the failure was due to the record.
        Err(error) if late.is_last => match complete(&tombstone).await {
            Ok(held) => {
                shared.failed(key, Operation::Complete, &error);
                Ok((tombstone, held))
            }
            Err(_) => Err((Operation::Complete, error)),
        },
        Err(error) => Err((Operation::Complete, error)),
    }
}

/// Releases a claim that could not be released before.
async fn release_late(shared: &Shared, release: Release) {
    let key = &release.key;
    let held = limited(shared, shared.storage.release(key, release.token)).await;
    if released(shared, key, release.claimed, held) {
        shared.runs.released();
        shared.runs.waiters.wake_one(key);
    } else {
        shared.runs.release_failed(release);
    }
}
