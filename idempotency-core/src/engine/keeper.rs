//! One task per engine that keeps its claims alive and stores what could not be stored.
//!
//! It lives while there is something to keep: started by the first claim, it looks at all of them when the earliest is due, and
//! ends when there are none. So a request that is answered within a third of the lease costs no spawn and no timer beyond the
//! one that the keeper already has.

use std::{collections::HashSet, panic::AssertUnwindSafe, pin::pin, sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, future::select, stream};

use super::{
    Shared,
    ledger::{Phase, Run},
};
use crate::{
    Begin, EncodedKey, Event, Held, NewClaim, Operation, Outcome, Record, Spawner, Storage, Token,
    TombstoneReason,
};

/// How many storage operations the keeper has under way at once.
const CONCURRENCY: usize = 64;

/// The longest pause between two attempts to store an outcome.
const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// Spawns the keeper.
pub(super) fn start(shared: &Arc<Shared>, spawner: Option<&Spawner>) {
    let Some(spawner) = spawner else {
        shared.ledger.stop_keeper();
        tracing::error!(
            target: "idempotency",
            "no tokio runtime to renew claims on: they end with their lease; call the engine inside a runtime"
        );
        return;
    };
    let keeper = Keeper {
        shared: shared.clone(),
        leaving: false,
    };
    spawner.spawn(keeper.run());
}

/// The keeper was dropped with the runtime that it was on. Claims that were made on others still need one.
fn start_elsewhere(shared: &Arc<Shared>) {
    if !shared.ledger.keeper_is_gone() {
        return;
    }
    let mut tried = HashSet::new();
    while let Some(spawners) = shared.ledger.untried(&mut tried) {
        for spawner in spawners {
            // Where that runtime has ended as well, the new keeper is dropped at once, and the next one is tried.
            if shared.ledger.start_keeper() {
                start(shared, Some(&spawner));
            }
        }
    }
}

/// Leaves the outcome of a finished run to the keeper, from now on this process's answer to the key. Says whether there was one
/// to leave: a key that was removed by hand has none.
pub(super) fn defer(shared: &Arc<Shared>, token: Token, spawner: Option<&Spawner>) -> bool {
    let now = shared.config.env.now();
    let deferred = shared.ledger.change(token, |run| {
        let record = match &run.phase {
            Phase::Finishing(record) => record.clone(),
            // `Held`: the tombstone could not be stored since the caller looked.
            Phase::GivingUp | Phase::Held => gave_up(run),
            _ => return None,
        };
        run.phase = Phase::Pending {
            record,
            replaced: 0,
            retry_at: now + retry_pause(shared, 0),
            attempts: 0,
            expires: now.saturating_add(run.ttl),
        };
        Some(run.key)
    });
    let key = match deferred {
        Some(Some(key)) => key,
        // Removed by hand, or given up, since the caller looked: nothing is left to store.
        Some(None) => {
            let _ = shared.ledger.end(token);
            return false;
        }
        None => return false,
    };
    shared.config.emit(&Event::Deferred { key });
    shared.ledger.wake_all(&key);
    if shared.ledger.start_keeper() {
        start(shared, spawner);
    } else {
        shared.ledger.wake_keeper();
    }
    true
}

/// The storage took an outcome, or said that the key is another's.
pub(super) fn completed(
    shared: &Shared,
    key: &EncodedKey,
    run: Option<&Run>,
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
            took: run.map_or(Duration::ZERO, |run| {
                shared.config.env.now().saturating_sub(run.since)
            }),
        },
    };
    shared.config.emit(&event);
    shared.ledger.wake_all(key);
}

/// 100 ms, doubling, at most a third of the lease and ten seconds.
fn retry_pause(shared: &Shared, attempts: u32) -> Duration {
    let pause = Duration::from_millis(100) * 2_u32.pow(attempts.min(10));
    pause.min(shared.config.lock.lease() / 3).min(LONGEST_RETRY)
}

struct Keeper {
    shared: Arc<Shared>,
    leaving: bool,
}

impl Keeper {
    async fn run(mut self) {
        let shared = self.shared.clone();
        let config = &shared.config;
        // Claims that are due a little later are renewed along, so that the keeper wakes for many at once.
        let slack = config.lock.lease() / 12;
        // A keeper before this one may have been dropped while it gave up.
        shared.ledger.give_up_again();

        while let Some(kept) = shared.ledger.kept() {
            let now = config.env.now();
            // A new claim does not wake us, and is due in a third of the lease: we never sleep longer. An outcome that could not
            // be stored does wake us.
            let latest = now.saturating_add(config.lock.lease() / 3);
            let due = kept.first().map(|(_, run)| run.due());
            let wake_at = due.unwrap_or(now).min(latest);
            if wake_at > now {
                let sleep = pin!(config.env.sleep(wake_at - now));
                let _ = select(sleep, pin!(shared.ledger.deferred())).await;
                continue;
            }
            let horizon = now + slack;
            // What may hang goes last, and no more of it than fits at once: a renewal never queues behind it.
            let (mut batch, outcomes): (Vec<_>, Vec<_>) = kept
                .into_iter()
                .filter(|(_, run)| run.due() <= horizon)
                .partition(|(_, run)| !matches!(run.phase, Phase::Pending { .. }));
            batch.extend(outcomes.into_iter().take(CONCURRENCY));
            stream::iter(batch)
                .for_each_concurrent(CONCURRENCY, |(token, run)| {
                    let shared = &shared;
                    async move {
                        let kept = AssertUnwindSafe(keep(shared, token, run, now, horizon));
                        if kept.catch_unwind().await.is_err() {
                            // One storage that panics must not cost the other claims their renewal.
                            put_off(shared, token, now);
                        }
                    }
                })
                .await;
        }
        self.leaving = true;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if !self.leaving {
            start_elsewhere(&self.shared);
        }
    }
}

/// The time limit of the keeper's operations: one that hangs must not cost the other claims their renewal.
fn limit(shared: &Shared) -> Duration {
    let config = &shared.config;
    config.storage_timeout.min(config.lock.lease() / 3)
}

/// Leaves a run alone for a while.
fn put_off(shared: &Shared, token: Token, now: Duration) {
    let later = now + shared.config.lock.lease() / 6;
    let _ = shared.ledger.change(token, |run| {
        run.renew_at = run.renew_at.max(later);
        run.give_up_at = run.give_up_at.max(later);
        if matches!(run.phase, Phase::GivingUp) {
            run.phase = Phase::Held;
        }
        if let Phase::Pending { retry_at, .. } = &mut run.phase {
            *retry_at = later.max(*retry_at);
        }
    });
}

/// Does what is due for one run.
async fn keep(shared: &Shared, token: Token, run: Run, now: Duration, horizon: Duration) {
    match &run.phase {
        Phase::Held if run.give_up_at <= now => give_up(shared, token, &run).await,
        Phase::Pending {
            retry_at, expires, ..
        } if *retry_at <= now || *expires <= now => store(shared, token, &run, now).await,
        _ if run.renew_at <= horizon => renew(shared, token, &run).await,
        _ => {}
    }
}

/// Lets the claim live for another lease; takes it again where the storage has forgotten it.
async fn renew(shared: &Shared, token: Token, run: &Run) {
    let lease = shared.config.lock.lease();
    let renewed = shared
        .limited_to(limit(shared), shared.storage.renew(&run.key, token, lease))
        .await;
    let renewed = match renewed {
        Ok(Held::Lost) if matches!(run.phase, Phase::Held) => {
            return reclaim(shared, token, run).await;
        }
        Ok(held) => held,
        Err(error) => {
            shared.config.emit(&Event::StorageFailed {
                key: run.key,
                operation: Operation::Renew,
                error: &error,
            });
            let soon = shared.config.env.now() + lease / 6;
            return renew_at(shared, token, soon);
        }
    };
    let now = shared.config.env.now();
    match renewed {
        Held::Yes => renew_at(shared, token, now + lease / 3),
        // The operation is over: storing its outcome will show whose the key is.
        Held::Lost => renew_at(shared, token, Duration::MAX),
    }
}

fn renew_at(shared: &Shared, token: Token, at: Duration) {
    // A run that ended meanwhile needs no renewal.
    let _ = shared.ledger.change(token, |run| run.renew_at = at);
}

/// The claim is not ours any more. If that is because the storage lost it (a restart without its data), and nobody else has
/// begun, it is ours again; the operation still runs, so nobody else may begin.
async fn reclaim(shared: &Shared, token: Token, run: &Run) {
    // Set before the claim is taken again, so that whoever finds it renewable finds this too.
    let interrupt = |run: &mut Run| {
        run.interrupted = true;
        matches!(run.phase, Phase::Held)
    };
    if shared.ledger.change(token, interrupt) != Some(true) {
        return;
    }
    let lease = shared.config.lock.lease();
    let claim = NewClaim {
        token,
        fingerprint: run.fingerprint,
        lease,
    };
    let begun = shared
        .limited_to(limit(shared), shared.storage.begin(&run.key, &claim))
        .await;
    match begun {
        Ok(Begin::Acquired) => {
            let renew_at = shared.config.env.now() + lease / 3;
            let is_wanted = shared.ledger.change(token, |run| {
                run.renew_at = renew_at;
                !matches!(run.phase, Phase::Lost | Phase::Expired)
            });
            if is_wanted == Some(true) {
                shared.config.emit(&Event::Reclaimed { key: run.key });
            } else {
                // It was released or removed meanwhile, which is why the claim was gone.
                unclaim(shared, token, run).await;
            }
        }
        Ok(Begin::InFlight { .. } | Begin::Completed(_)) => lost(shared, token, run),
        Err(error) => {
            shared.config.emit(&Event::StorageFailed {
                key: run.key,
                operation: Operation::Begin,
                error: &error,
            });
            renew_at(shared, token, shared.config.env.now() + lease / 6);
        }
    }
}

async fn unclaim(shared: &Shared, token: Token, run: &Run) {
    let released = shared
        .limited_to(limit(shared), shared.storage.release(&run.key, token))
        .await;
    if let Err(error) = released {
        shared.config.emit(&Event::StorageFailed {
            key: run.key,
            operation: Operation::Release,
            error: &error,
        });
    }
    shared.ledger.wake_one(&run.key);
}

fn lost(shared: &Shared, token: Token, run: &Run) {
    let changed = shared.ledger.change(token, |run| {
        let held = matches!(run.phase, Phase::Held);
        if held {
            run.phase = Phase::Lost;
        }
        held
    });
    if changed == Some(true) {
        shared.config.emit(&Event::Lost {
            key: run.key,
            operation: Operation::Renew,
        });
        shared.ledger.wake_all(&run.key);
    }
}

/// The record of a claim that was held too long.
fn gave_up(run: &Run) -> Record {
    Record {
        fingerprint: run.fingerprint,
        outcome: Outcome::Tombstone(TombstoneReason::MaxHold),
    }
}

/// The claim was held too long: a tombstone makes sure that the operation, which may still be at it, is never run again. From
/// here on that is its outcome; an answer that comes later is not stored.
async fn give_up(shared: &Shared, token: Token, run: &Run) {
    let begun = shared.ledger.change(token, |run| {
        let is_held = matches!(run.phase, Phase::Held);
        if is_held {
            run.phase = Phase::GivingUp;
        }
        is_held
    });
    if begun != Some(true) {
        return;
    }
    let record = gave_up(run);
    let tombstone = shared.storage.complete(&run.key, token, &record, run.ttl);
    match shared.limited_to(limit(shared), tombstone).await {
        Ok(held) => {
            let is_over = shared.ledger.change(token, |run| match &mut run.phase {
                Phase::GivingUp => {
                    run.phase = match held {
                        Held::Yes => Phase::Expired,
                        Held::Lost => Phase::Lost,
                    };
                    false
                }
                // The operation ended meanwhile, and left the tombstone to us.
                Phase::Pending { .. } => true,
                _ => false,
            });
            if is_over == Some(true) {
                let _ = shared.ledger.end_stored(token, 0);
            }
            if is_over.is_some() {
                completed(shared, &run.key, Some(run), &record, held);
            }
        }
        Err(error) => {
            shared.config.emit(&Event::StorageFailed {
                key: run.key,
                operation: Operation::Complete,
                error: &error,
            });
            let again = shared.config.env.now() + retry_pause(shared, 0);
            let _ = shared.ledger.change(token, |run| {
                if matches!(run.phase, Phase::GivingUp) {
                    run.phase = Phase::Held;
                }
                run.give_up_at = again;
            });
            renew(shared, token, run).await;
        }
    }
}

/// Tries again to store an outcome.
async fn store(shared: &Shared, token: Token, run: &Run, now: Duration) {
    let Phase::Pending {
        record,
        replaced,
        expires,
        ..
    } = &run.phase
    else {
        return;
    };
    let Some(ttl) = expires.checked_sub(now).filter(|ttl| !ttl.is_zero()) else {
        if shared.ledger.end_stored(token, *replaced).is_some() {
            shared.config.emit(&Event::Abandoned { key: run.key });
        }
        return;
    };
    let stored = async {
        let storage = &shared.storage;
        let held = storage.complete(&run.key, token, record, ttl).await?;
        if held == Held::Yes && *replaced > 0 {
            // An attempt before may have stored the record that this one replaced, and the storage keeps the first.
            storage.replace(&run.key, record, ttl).await?;
        }
        Ok(held)
    };
    match shared.limited_to(limit(shared), stored).await {
        Ok(held) => {
            if shared.ledger.end_stored(token, *replaced).is_some() {
                completed(shared, &run.key, Some(run), record, held);
            }
        }
        Err(error) => {
            shared.config.emit(&Event::StorageFailed {
                key: run.key,
                operation: Operation::Complete,
                error: &error,
            });
            let now = shared.config.env.now();
            let _ = shared.ledger.change(token, |run| {
                if let Phase::Pending {
                    retry_at, attempts, ..
                } = &mut run.phase
                {
                    *attempts += 1;
                    *retry_at = now + retry_pause(shared, *attempts);
                }
            });
            if run.renew_at <= now {
                renew(shared, token, run).await;
            }
        }
    }
}
