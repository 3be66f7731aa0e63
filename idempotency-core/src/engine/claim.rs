//! The right to run an operation once, and its end.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use super::{
    Shared, keeper,
    ledger::{Phase, Run},
};
use crate::{
    EncodedKey, Event, Fingerprint, Held, Operation, Outcome, Record, Spawner, Storage,
    StorageError, StoredResponse, Token, TombstoneReason,
};

/// The right to run the operation of a key. End it with [`complete`](Self::complete), [`tombstone`](Self::tombstone) or
/// [`release`](Self::release).
///
/// It is renewed until it ends, however long that takes, up to [`LockPolicy::max_hold`](crate::LockPolicy::max_hold).
///
/// A claim that is dropped is released in the background, if the runtime that it was made on still runs; otherwise the key is
/// blocked until the lease is over. Once an outcome was handed to it, dropping the future of that call changes nothing: the
/// outcome will be stored.
#[must_use = "a claim that is dropped is released, and the operation may run again"]
pub struct Claim {
    shared: Arc<Shared>,
    key: EncodedKey,
    token: Token,
    fingerprint: Option<Fingerprint>,
    spawner: Option<Spawner>,
    ended: bool,
}

// Not `#[non_exhaustive]`: these are all the ends there are.
/// What became of an outcome; see [`Claim::complete`]. In every case the operation's own client gets its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an outcome that is not stored means that a retry does not get this answer"]
pub enum Completion {
    /// It is stored.
    Stored,
    /// The storage could not take it yet. This process answers the key from memory, and keeps trying until the TTL is over.
    Deferred,
    /// Another holder has the key: nothing was stored.
    Lost,
    /// The claim was held longer than [`LockPolicy::max_hold`](crate::LockPolicy::max_hold): a tombstone stands instead.
    Expired,
}

impl Claim {
    /// The key that is claimed.
    #[must_use]
    pub fn key(&self) -> EncodedKey {
        self.key
    }

    /// Names this claim at the storage.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    /// How long the outcome will be kept. Default: [`Config::ttl`](crate::Config::ttl).
    pub fn ttl(self, ttl: Duration) -> Self {
        // A run that is gone was removed by hand; it has no outcome to keep.
        let _ = self.shared.ledger.change(self.token, |run| run.ttl = ttl);
        self
    }

    /// Stores the operation's answer and ends the claim.
    pub async fn complete(self, response: StoredResponse) -> Completion {
        self.finish(Outcome::Response(response)).await
    }

    /// Ends the claim with a tombstone: the operation ran, has no answer to replay, and must not run again.
    pub async fn tombstone(self, reason: TombstoneReason) -> Completion {
        self.finish(Outcome::Tombstone(reason)).await
    }

    /// Ends the claim without a record: a retry runs.
    ///
    /// Where the storage fails it is tried again in the background, until the lease is over anyway.
    pub async fn release(mut self) {
        if self.is_given_up() {
            return self.expire();
        }
        if let Some(release) = self.end_without_record() {
            release.run().await;
        }
    }

    /// Whether nobody else held the key since this claim was made. Always, where claims are switched off.
    pub(super) async fn was_held_throughout(&self) -> Result<bool, StorageError> {
        let Self {
            shared, key, token, ..
        } = self;
        let lease = shared.config.lock.lease();
        let is_unclaimed = |run: &mut Run| matches!(run.phase, Phase::Unclaimed);
        if shared.ledger.change(*token, is_unclaimed) == Some(true) {
            return Ok(true);
        }
        let renewed = shared.limited(shared.storage.renew(key, *token, lease));
        let is_held = renewed.await? == Held::Yes;
        // Looked at last: the keeper may have taken the claim again just before it was renewed.
        let is_whole = |run: &mut Run| matches!(run.phase, Phase::Held) && !run.interrupted;
        Ok(is_held && shared.ledger.change(*token, is_whole) == Some(true))
    }

    /// Ends the run; what is left is to tell the storage. `None` if the run is gone already.
    fn end_without_record(&mut self) -> Option<Release> {
        self.ended = true;
        let run = self.shared.ledger.end_but_stay(self.token)?;
        Some(Release::new(
            &self.shared,
            self.key,
            self.token,
            self.spawner.clone(),
            Claimed::by(&run),
        ))
    }

    async fn finish(mut self, outcome: Outcome) -> Completion {
        let shared = self.shared.clone();
        let record = Record {
            fingerprint: self.fingerprint,
            outcome,
        };
        let ttl = shared.ledger.change(self.token, |run| {
            if matches!(run.phase, Phase::Expired | Phase::GivingUp) {
                return None;
            }
            let was_lost = matches!(run.phase, Phase::Lost);
            // The key of a lost claim is another's: its outcome is tried once, and nobody here answers from it.
            if !was_lost {
                run.phase = Phase::Finishing(record.clone());
            }
            Some((run.ttl, was_lost))
        });
        let (ttl, was_lost) = match ttl {
            Some(Some(known)) => known,
            Some(None) => {
                self.expire();
                return Completion::Expired;
            }
            // Removed by hand, or this is a second end, which consuming `self` rules out.
            None => {
                self.ended = true;
                return Completion::Lost;
            }
        };
        let stored = shared.storage.complete(&self.key, self.token, &record, ttl);
        match shared.limited(stored).await {
            Ok(held) => {
                let run = self.end();
                keeper::completed(&shared, &self.key, run.as_ref(), &record, held);
                match held {
                    Held::Yes => Completion::Stored,
                    Held::Lost => Completion::Lost,
                }
            }
            Err(error) => {
                shared.config.emit(&Event::StorageFailed {
                    key: self.key,
                    operation: Operation::Complete,
                    error: &error,
                });
                if was_lost {
                    // The key is another's, and so is the answer to it.
                    self.end();
                    return Completion::Lost;
                }
                self.ended = true;
                if self.defer() {
                    Completion::Deferred
                } else {
                    Completion::Lost
                }
            }
        }
    }

    /// Ends a claim that was given up, or leaves the tombstone that is being stored for it to the keeper.
    fn expire(&mut self) {
        if self.is_given_up() {
            self.ended = true;
            let _ = self.defer();
        } else {
            self.end();
        }
    }

    fn is_given_up(&self) -> bool {
        let is_given_up = |run: &mut Run| matches!(run.phase, Phase::GivingUp);
        self.shared.ledger.change(self.token, is_given_up) == Some(true)
    }

    fn end(&mut self) -> Option<Run> {
        self.ended = true;
        self.shared.ledger.end(self.token)
    }

    /// Leaves the outcome to the keeper. Says whether there was one to leave.
    fn defer(&self) -> bool {
        keeper::defer(&self.shared, self.token, self.spawner.as_ref())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let finishing = self.shared.ledger.change(self.token, |run| {
            matches!(run.phase, Phase::Finishing(_) | Phase::GivingUp)
        });
        match finishing {
            // The outcome is known, and the future that was storing it is being dropped, or the keeper is at it.
            Some(true) => {
                let _ = self.defer();
            }
            Some(false) => {
                if let Some(release) = self.end_without_record() {
                    release.in_background();
                }
            }
            None => {}
        }
    }
}

impl fmt::Debug for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claim")
            .field("key", &self.key)
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

/// A place among those that run, from before the storage is asked until it is known what it said.
///
/// Dropped in between, it gives back what may have been claimed.
pub(super) struct Begun {
    shared: Arc<Shared>,
    key: EncodedKey,
    token: Token,
    spawner: Option<Spawner>,
    ended: bool,
}

impl Begun {
    pub(super) fn enter(shared: &Arc<Shared>, key: EncodedKey) -> Option<Self> {
        let env = &shared.config.env;
        // Made before the place is taken: an environment of a user's may panic.
        let (token, spawner) = (Token::random_from(env), env.spawner());
        shared.ledger.enter().then(|| Self {
            shared: shared.clone(),
            key,
            token,
            spawner,
            ended: false,
        })
    }

    pub(super) fn token(&self) -> Token {
        self.token
    }

    /// The storage said yes, to a question that was asked at `since`: the lease counts from then.
    pub(super) async fn acquired(self, fingerprint: Option<Fingerprint>, since: Duration) -> Claim {
        let (claim, needs_keeper) = self.into_claim(fingerprint, Phase::Held, since);
        if needs_keeper {
            keeper::start(&claim.shared, claim.spawner.as_ref());
            // A task that was just spawned may sit where only this thread runs it, and the operation may block this thread.
            YieldNow(false).await;
        }
        claim
    }

    pub(super) fn without_claim(self, fingerprint: Option<Fingerprint>) -> Claim {
        let now = self.shared.config.env.now();
        self.into_claim(fingerprint, Phase::Unclaimed, now).0
    }

    fn into_claim(
        mut self,
        fingerprint: Option<Fingerprint>,
        phase: Phase,
        since: Duration,
    ) -> (Claim, bool) {
        self.ended = true;
        let config = &self.shared.config;
        let needs_keeper = self.shared.ledger.add(
            self.token,
            Run {
                key: self.key,
                fingerprint,
                since,
                ttl: config.ttl,
                renew_at: since.saturating_add(config.lock.lease() / 3),
                give_up_at: since.saturating_add(config.lock.hold_limit()),
                interrupted: false,
                spawner: self.spawner.clone(),
                phase,
            },
        );
        let claim = Claim {
            shared: self.shared.clone(),
            key: self.key,
            token: self.token,
            fingerprint,
            spawner: self.spawner.clone(),
            ended: false,
        };
        (claim, needs_keeper)
    }

    /// The storage said no.
    pub(super) fn not_acquired(mut self) {
        self.leave();
    }

    /// The storage did not say: the claim may be there, and is given back in the background.
    pub(super) fn unknown(self) {
        drop(self);
    }

    fn leave(&mut self) {
        self.ended = true;
        self.shared.ledger.leave();
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        self.ended = true;
        // It takes over the place among those that run.
        Release::new(
            &self.shared,
            self.key,
            self.token,
            self.spawner.clone(),
            Claimed::Perhaps,
        )
        .in_background();
    }
}

/// Tells the storage that a claim is over, and keeps the claim's place among those that run until it did.
///
/// Dropped before its end it goes on in the background, once: what is dropped there, by a panic or by a runtime that ends, is
/// left to the lease.
struct Release {
    shared: Arc<Shared>,
    key: EncodedKey,
    token: Token,
    spawner: Option<Spawner>,
    claimed: Claimed,
    is_in_background: bool,
    ended: bool,
}

/// What is known of a claim at the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Claimed {
    Yes,
    /// The storage never answered.
    Perhaps,
    No,
}

impl Claimed {
    fn by(run: &Run) -> Self {
        match run.phase {
            Phase::Held => Self::Yes,
            _ => Self::No,
        }
    }
}

impl Release {
    /// How often the storage is asked. A claim that could not be released ends with its lease.
    const ATTEMPTS: u32 = 4;
    const FIRST_PAUSE: Duration = Duration::from_millis(100);

    fn new(
        shared: &Arc<Shared>,
        key: EncodedKey,
        token: Token,
        spawner: Option<Spawner>,
        claimed: Claimed,
    ) -> Self {
        Self {
            shared: shared.clone(),
            key,
            token,
            spawner,
            claimed,
            is_in_background: false,
            ended: false,
        }
    }

    /// Asks once, and where that fails, again in the background.
    async fn run(mut self) {
        if self.attempt().await {
            self.end();
        } else {
            self.again_in_background(Self::FIRST_PAUSE);
        }
    }

    fn in_background(self) {
        self.again_in_background(Duration::ZERO);
    }

    fn again_in_background(mut self, mut pause: Duration) {
        self.is_in_background = true;
        let Some(spawner) = self.spawner.clone() else {
            tracing::warn!(
                target: "idempotency",
                key = %self.key,
                "a claim was dropped outside a runtime: its key is blocked until the lease is over"
            );
            return;
        };
        spawner.spawn(async move {
            for _ in 0..Self::ATTEMPTS {
                if !pause.is_zero() {
                    self.shared.config.env.sleep(pause).await;
                }
                if self.attempt().await {
                    break;
                }
                pause = (pause * 4).max(Self::FIRST_PAUSE);
            }
            self.end();
        });
    }

    /// Says whether the storage answered.
    async fn attempt(&mut self) -> bool {
        let Self {
            shared, key, token, ..
        } = self;
        if self.claimed == Claimed::No {
            return true;
        }
        let event = match shared.limited(shared.storage.release(key, *token)).await {
            Ok(Held::Yes) => Event::Released { key: *key },
            Ok(Held::Lost) if self.claimed == Claimed::Yes => Event::Lost {
                key: *key,
                operation: Operation::Release,
            },
            Ok(Held::Lost) => return true,
            Err(error) => {
                shared.config.emit(&Event::StorageFailed {
                    key: *key,
                    operation: Operation::Release,
                    error: &error,
                });
                // It may have been released, only nobody said so.
                self.claimed = Claimed::Perhaps;
                return false;
            }
        };
        shared.config.emit(&event);
        true
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.ended, true) {
            self.shared.ledger.leave();
            self.shared.ledger.wake_one(&self.key);
        }
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if self.is_in_background || std::thread::panicking() {
            return self.end();
        }
        self.ended = true;
        Self {
            shared: self.shared.clone(),
            spawner: self.spawner.clone(),
            ended: false,
            ..*self
        }
        .in_background();
    }
}

/// Lets the executor run something else once.
struct YieldNow(bool);

impl Future for YieldNow {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if std::mem::replace(&mut self.0, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
