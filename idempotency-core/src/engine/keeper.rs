//! The keeper: one task per engine that renews its claims, retries outcomes that the storage did not take, and stores the tombstone of a
//! run that is older than `max_hold`.
//!
//! It lives while there is something to keep: started by the first claim, it looks at what is due and ends when nothing is left. So
//! a request that is answered within a third of the lease costs no spawn and no timer beyond the one that the keeper already has.
//! It runs on [`Env::background`](crate::Env::background), so that no runtime of the program has to run for it.
//!
//! When a run is due, and how long the pauses between attempts are, [`run`](super::run) decides.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, Either, select},
    stream::FuturesUnordered,
};
use tracing::instrument::WithSubscriber;

use super::{
    Shared,
    releases::{Claimed, Release},
    run::{Failure, Job, Late, Next, Run},
};
use crate::{
    Begin, EncodedKey, Event, Held, NewClaim, Operation, Outcome, Record, Storage, StorageError,
    StorageErrorKind, Token, TombstoneReason,
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
        let spawner = shared.options.env.background()?;
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

/// Leaves the outcome of a finished run to the keeper; meanwhile this process answers the key with it. `failed`: the storage refused it.
/// Returns whether there was an outcome: a key that was removed by hand has none.
pub(super) fn defer(shared: &Arc<Shared>, token: Token, failed: bool) -> bool {
    let now = shared.options.now();
    let hold = |record: &Record| {
        shared.options.budget.count(match &record.outcome {
            Outcome::Response(response) => response.body().len(),
            Outcome::Tombstone(_) => 0,
        })
    };
    let mut late = None;
    let next = shared.runs.advance(token, |run| {
        let next = run.defer(now, failed, hold);
        late = run.late_record().map(|record| (run.key, record));
        next
    });
    if next != Some(Next::Goes) {
        return false;
    }
    if let Some((key, record)) = late {
        shared.options.emit(&Event::Deferred { key });
        shared.runs.waiters.hand_over(&key, &record);
    }
    wake(shared);
    true
}

/// Leaves a claim to the keeper to be released.
pub(super) fn release(shared: &Arc<Shared>, key: EncodedKey, token: Token, claimed: Claimed) {
    unclaim(shared, &key, token, claimed);
    wake(shared);
}

fn unclaim(shared: &Shared, key: &EncodedKey, token: Token, claimed: Claimed) {
    let options = &shared.options;
    shared.runs.release(Release {
        key: *key,
        token,
        claimed,
        lease_end: options.now().saturating_add(options.lease()),
    });
}

/// Releases a claim at the storage. Returns whether the storage answered; if not, the other releases pause too.
pub(super) async fn try_release(
    shared: &Shared,
    key: &EncodedKey,
    token: Token,
    claimed: Claimed,
) -> bool {
    let event = match shared.limited(shared.storage.release(key, token)).await {
        Ok(Held::Yes) => Event::Released { key: *key },
        Ok(Held::Lost) if claimed == Claimed::Yes => Event::Lost {
            key: *key,
            operation: Operation::Release,
        },
        Ok(Held::Lost) => return true,
        Err(error) => {
            shared.failed(key, Operation::Release, &error);
            let options = &shared.options;
            shared.runs.pause_releases(options.now(), options.lease());
            return false;
        }
    };
    shared.options.emit(&event);
    true
}

/// The storage took an outcome, or said that the key is another's: tells the observers and those who wait.
pub(super) fn completed(
    shared: &Shared,
    key: &EncodedKey,
    since: Duration,
    record: &Record,
    held: Held,
) {
    tell_observers(shared, key, since, record, held);
    match held {
        Held::Yes => shared.runs.waiters.hand_over(key, record),
        Held::Lost => shared.runs.waiters.wake_all(key),
    }
}

pub(super) fn tell_observers(
    shared: &Shared,
    key: &EncodedKey,
    since: Duration,
    record: &Record,
    held: Held,
) {
    let event = match (held, &record.outcome) {
        (Held::Lost, _) => Event::Lost {
            key: *key,
            operation: Operation::Complete,
        },
        (Held::Yes, Outcome::Tombstone(reason)) => Event::Tombstoned {
            key: *key,
            reason: *reason,
        },
        (Held::Yes, Outcome::Response(response)) => Event::Completed {
            key: *key,
            status: response.status(),
            took: shared.options.now().saturating_sub(since),
        },
    };
    shared.options.emit(&event);
}

struct Keeper {
    shared: Arc<Shared>,
    leaving: bool,
}

/// Which work has ended.
enum Done {
    Store,
    Other,
}

impl Keeper {
    async fn run(mut self) {
        let shared = &self.shared.clone();
        let options = &shared.options;
        let lease = options.lease();
        // Claims that are due a little later are renewed along, so that the keeper wakes for many at once.
        let slack = lease / 12;
        // A new claim does not wake the keeper, so it sleeps no longer than until that would be due.
        let longest = (lease / 3).min(options.lock.longest_hold());
        shared.runs.start_over();

        let mut under_way = FuturesUnordered::<BoxFuture<'_, Done>>::new();
        let mut storing = 0;
        let mut to_store = VecDeque::new();
        loop {
            let now = options.now();
            for (token, job) in shared.runs.take_due(now, now.saturating_add(slack)) {
                match job {
                    Job::Renew => under_way.push(Box::pin(async move {
                        guarded(shared, token, job, renew(shared, token)).await;
                        Done::Other
                    })),
                    Job::Tombstone | Job::Outcome => to_store.push_back((token, job)),
                }
            }
            while storing < STORES
                && let Some((token, job)) = to_store.pop_front()
            {
                storing += 1;
                under_way.push(Box::pin(async move {
                    let work = async {
                        match job {
                            Job::Tombstone => store_tombstone(shared, token).await,
                            _ => store_outcome(shared, token).await,
                        }
                    };
                    guarded(shared, token, job, work).await;
                    Done::Store
                }));
            }
            for release in shared.runs.drop_releases(now) {
                shared.runs.waiters.wake_one(&release.key);
            }
            while let Some(release) = shared.runs.take_release(now) {
                under_way.push(Box::pin(async move {
                    release_late(shared, release).await;
                    Done::Other
                }));
            }

            if under_way.is_empty() && shared.runs.dismiss_keeper() {
                break;
            }
            let now = options.now();
            let wake_at = shared.runs.next_due().min(now.saturating_add(longest));
            if wake_at <= now && under_way.is_empty() {
                continue;
            }
            let asleep = pin!(options.env.sleep(wake_at.saturating_sub(now)));
            let woken = pin!(shared.runs.work());
            let first = match under_way.is_empty() {
                true => {
                    let _ = select(asleep, woken).await;
                    None
                }
                false => match select(under_way.next(), select(asleep, woken)).await {
                    Either::Left((done, _)) => done,
                    Either::Right(_) => None,
                },
            };
            let others = std::iter::from_fn(|| under_way.next().now_or_never().flatten());
            for done in first.into_iter().chain(others) {
                storing -= usize::from(matches!(done, Done::Store));
            }
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

/// Runs `work`; if the storage panics in it, the other claims are renewed all the same.
async fn guarded(shared: &Shared, token: Token, job: Job, work: impl Future<Output = ()>) {
    if AssertUnwindSafe(work).catch_unwind().await.is_err() {
        let now = shared.options.now();
        let _ = shared.runs.change(token, |run| run.put_off(job, now));
    }
}

/// `operation` under the keeper's time limit: a renewal that hangs has to be tried again before the lease is over. A panic of the storage
/// counts as a failure, and is retried at the same pace.
async fn limited<T>(
    shared: &Shared,
    operation: impl Future<Output = Result<T, StorageError>>,
) -> Result<T, StorageError> {
    let options = &shared.options;
    let limit = options.storage_timeout.min(options.lease() / 3);
    let operation = AssertUnwindSafe(operation).catch_unwind();
    let operation = operation.map(|done| match done {
        Ok(done) => done,
        Err(_) => Err(StorageError::unavailable("the storage panicked")),
    });
    shared.limited_to(limit, operation).await
}

/// Renews the claim for another lease, or claims the key again if the storage has forgotten the claim.
async fn renew(shared: &Shared, token: Token) {
    let Some(key) = shared.runs.change(token, |run| run.key) else {
        return;
    };
    let lease = shared.options.lease();
    let renewed = limited(shared, shared.storage.renew(&key, token, lease)).await;
    let now = shared.options.now();
    match renewed {
        Ok(Held::Yes) => {
            let _ = shared.runs.change(token, |run| run.renewed(now));
        }
        Ok(Held::Lost) => {
            if shared.runs.change(token, Run::claim_is_gone) == Some(true) {
                reclaim(shared, token).await;
            }
        }
        Err(error) => {
            shared.failed(&key, Operation::Renew, &error);
            let _ = shared.runs.change(token, |run| run.renewal_failed(now));
        }
    }
}

/// Claims the key again after the storage has lost the claim (a restart without its data), unless another holder has it by now. The
/// operation still runs, so nobody else may begin.
async fn reclaim(shared: &Shared, token: Token) {
    let Some((key, fingerprint)) = shared.runs.change(token, |run| (run.key, run.fingerprint))
    else {
        return;
    };
    let claim = NewClaim {
        token,
        fingerprint,
        lease: shared.options.lease(),
    };
    let begun = limited(shared, shared.storage.begin(&key, &claim)).await;
    let now = shared.options.now();
    match begun {
        Ok(Begin::Acquired) => match shared.runs.change(token, |run| run.reclaimed(now)) {
            Some(true) => shared.options.emit(&Event::Reclaimed { key }),
            // It was released or removed meanwhile, which is why the claim was gone.
            _ => unclaim(shared, &key, token, Claimed::Perhaps),
        },
        Ok(Begin::InFlight { .. } | Begin::Completed(_)) => lost(shared, &key, token),
        Err(error) => {
            shared.failed(&key, Operation::Begin, &error);
            let is_wanted = shared.runs.change(token, |run| {
                run.renewal_failed(now);
                run.answers()
            });
            // It may have been made all the same.
            if is_wanted != Some(true) {
                unclaim(shared, &key, token, Claimed::Perhaps);
            }
        }
    }
}

fn lost(shared: &Shared, key: &EncodedKey, token: Token) {
    if shared.runs.change(token, Run::lose) == Some(true) {
        shared.options.emit(&Event::Lost {
            key: *key,
            operation: Operation::Renew,
        });
        shared.runs.waiters.wake_all(key);
    }
}

/// The claim was held too long: a tombstone makes sure that the operation, which may still be at it, is never run again. It is
/// stored again and again while the operation runs, each time for the TTL and a lease.
async fn store_tombstone(shared: &Shared, token: Token) {
    let Some((key, since, tombstone, ttl)) = shared.runs.change(token, |run| {
        (run.key, run.since, run.tombstone(), run.tombstone_ttl())
    }) else {
        return;
    };
    // This process answers with it from now on, whatever becomes of the storage.
    shared.runs.waiters.hand_over(&key, &tombstone);
    let stored = shared.storage.complete(&key, token, &tombstone, ttl);
    let stored = limited(shared, stored).await;
    let now = shared.options.now();
    let _telling = shared.runs.telling();
    match stored {
        Ok(Held::Yes) => {
            let is_first = shared.runs.change(token, |run| run.tombstone_stored(now));
            match is_first {
                Some(Some(false)) => return,
                Some(Some(true)) | None => {}
                // The operation ended meanwhile, and left it to us.
                Some(None) => drop(shared.runs.end(token)),
            }
            if is_first.is_some() {
                completed(shared, &key, since, &tombstone, Held::Yes);
            }
        }
        Ok(Held::Lost) => {
            if shared.runs.advance(token, Run::tombstone_lost).is_some() {
                completed(shared, &key, since, &tombstone, Held::Lost);
            }
        }
        Err(error) => {
            shared.failed(&key, Operation::Complete, &error);
            let _ = shared.runs.change(token, |run| run.tombstone_failed(now));
        }
    }
}

/// Tries again to store an outcome.
async fn store_outcome(shared: &Shared, token: Token) {
    let late = shared
        .runs
        .change(token, |run| Some((run.key, run.since, run.late()?)));
    let Some(Some((key, since, late))) = late else {
        return;
    };
    let now = shared.options.now();
    if late.expires <= now {
        let _telling = shared.runs.telling();
        if shared
            .runs
            .advance(token, |run| run.late_stored(late.replaced))
            == Some(Next::Over)
        {
            shared.options.emit(&Event::Abandoned { key });
        }
        return;
    }
    let stored = try_to_store(shared, &key, token, &late).await;
    let _telling = shared.runs.telling();
    match stored {
        Ok((record, held)) => {
            let next = shared
                .runs
                .advance(token, |run| run.late_stored(late.replaced));
            if next == Some(Next::Over) {
                completed(shared, &key, since, &record, held);
            }
        }
        Err((failure, operation, error)) => {
            shared.failed(&key, operation, &error);
            let now = shared.options.now();
            let _ = shared
                .runs
                .change(token, |run| run.late_failed(now, failure));
        }
    }
}

/// Tries to store a late outcome. Returns the record that the storage has now, and whether the key is ours.
///
/// The storage is asked first what it has: the record may have arrived though its answer did not, and sending it again can take
/// longer than any time limit.
async fn try_to_store(
    shared: &Shared,
    key: &EncodedKey,
    token: Token,
    late: &Late,
) -> Result<(Record, Held), (Failure, Operation, StorageError)> {
    let lease = shared.options.lease();
    let storage = &shared.storage;
    let unanswered = |operation| move |error| (Failure::Unanswered, operation, error);

    let is_claimed = limited(shared, storage.renew(key, token, lease))
        .await
        .map_err(unanswered(Operation::Renew))?
        == Held::Yes;
    let now = shared.options.now();
    let record = late.record.clone();
    let mut offered = record.clone();
    let mut is_last = false;
    if is_claimed {
        let answered = shared.runs.change(token, |run| {
            run.renewed(now);
            run.answered()
        });
        is_last = answered == Some(true);
    } else {
        let claim = NewClaim {
            token,
            fingerprint: record.fingerprint,
            lease,
        };
        match limited(shared, storage.begin(key, &claim)).await {
            // The storage had lost the claim.
            Ok(Begin::Acquired) => {
                let answered = shared.runs.change(token, |run| {
                    run.renewed(shared.options.now());
                    run.answered()
                });
                if answered.is_none() {
                    // Removed by hand meanwhile.
                    unclaim(shared, key, token, Claimed::Perhaps);
                    return Ok((record, Held::Lost));
                }
                is_last = answered == Some(true);
                shared.options.emit(&Event::Reclaimed { key: *key });
            }
            Ok(Begin::Completed(there)) if there == record => return Ok((record, Held::Yes)),
            // The claim or record may be ours or another's. Completing with a tombstone tells which, and it is small: for our token the
            // storage keeps its first record.
            Ok(Begin::Completed(_) | Begin::InFlight { .. }) => offered = unstorable(&record),
            // What is there may be too large to arrive in time.
            Err(error) if error.kind() == StorageErrorKind::Timeout => {
                let renewed = limited(shared, storage.renew(key, token, lease)).await;
                match renewed.map_err(unanswered(Operation::Renew))? {
                    Held::Yes => {}
                    Held::Lost => offered = unstorable(&record),
                }
            }
            Err(error) => return Err(unanswered(Operation::Begin)(error)),
        }
    }
    let ttl = late.expires.saturating_sub(now);
    let completed = async {
        let held = storage.complete(key, token, &offered, ttl).await?;
        if held == Held::Yes && late.replaced > 0 {
            // An attempt before may have stored the record that this one replaced, and the storage keeps the first.
            storage.replace(key, &record, ttl).await?;
        }
        Ok(held)
    };
    let error = match limited(shared, completed).await {
        Ok(held) => return Ok((record, held)),
        Err(error) => error,
    };
    if is_last {
        // If the storage accepts the tombstone, the failure was due to the record.
        let tombstone = unstorable(&record);
        let completed = storage.complete(key, token, &tombstone, ttl);
        if let Ok(held) = limited(shared, completed).await {
            shared.failed(key, Operation::Complete, &error);
            return Ok((tombstone, held));
        }
    }
    Err((Failure::Refused, Operation::Complete, error))
}

/// The tombstone in the place of a record that the storage does not take.
fn unstorable(record: &Record) -> Record {
    Record {
        fingerprint: record.fingerprint,
        outcome: Outcome::Tombstone(TombstoneReason::Unstorable),
    }
}

/// Releases a claim that could not be released before.
async fn release_late(shared: &Shared, release: Release) {
    let Release {
        key,
        token,
        claimed,
        ..
    } = release;
    let told = AssertUnwindSafe(try_release(shared, &key, token, claimed)).catch_unwind();
    let told = told.await.unwrap_or_else(|_| {
        // A storage that panics did not answer.
        let options = &shared.options;
        shared.runs.pause_releases(options.now(), options.lease());
        false
    });
    if told {
        shared.runs.released();
        shared.runs.waiters.wake_one(&key);
        return;
    }
    shared.runs.release_failed(release);
}
