//! Rules of `wait`: a waiter is woken when the claim ends.

#![expect(
    clippy::missing_panics_doc,
    reason = "to panic is what a rule does, and the module's documentation says when"
)]

use std::{pin::pin, time::Duration};

use futures_util::future::{Either, FutureExt, select};
use tokio::task::JoinSet;

use super::{
    Harness,
    harness::{Found, LONG, Subject, answer, breathe, claim, fine, fresh_key, must},
};
use crate::{Begin, EncodedKey, Held, Storage, Token};

const MISSED: &str =
    "`wait` missed the end of the claim: a duplicate waits for nothing, and gives up";

impl<H: Harness> Subject<'_, H> {
    /// Checks that a `wait` for `key` does not return while a unit passes, so that it is under way, and lets `end` happen.
    /// Returns when it has returned, and those of `others` in tasks.
    async fn assert_wait_ends(
        &self,
        key: &EncodedKey,
        others: usize,
        end: impl Future<Output = ()>,
    ) {
        let others = self.waiters(*key, others);
        breathe().await;
        let mut wait = pin!(self.storage.wait(key, LONG));
        self.assert_waits(wait.as_mut(), 1).await;
        end.await;
        fine(self.soon(wait, MISSED).await);
        self.soon(others.join_all(), MISSED).await;
    }

    /// Checks that `wait` does not return while `units` pass.
    async fn assert_waits<F: Future + Unpin>(&self, wait: F, units: u32) {
        if let Either::Left(_) = select(wait, pin!(self.pass(units))).await {
            panic!(
                "`wait` returned although a claim holds the key: duplicates spin instead of waiting"
            );
        }
    }
}

/// `wait` returns at once where no claim holds the key (rule 8).
pub async fn wait_returns_at_once_without_a_claim<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (completed, _) = subject.completed(&answer("done"), LONG).await;
    for key in [fresh_key(), completed] {
        let wait = subject.storage.wait(&key, LONG);
        fine(subject.soon(wait, "`wait` waits where no claim is").await);
    }
    let key = fresh_key();
    fine(subject.storage.wait(&key, LONG).await);
    must!(subject.find(&key) => Found::Nothing, "`wait` left something");
}

/// `wait` returns when its timeout is over, without an error, and leaves the claim alone (rule 8).
pub async fn wait_times_out<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    let wait = subject.storage.wait(&key, Duration::ZERO);
    let otherwise = "`wait` with a timeout of zero did not return";
    fine(subject.soon(wait, otherwise).await);

    let mut wait = pin!(subject.storage.wait(&key, subject.units(4)));
    subject.assert_waits(wait.as_mut(), 1).await;
    // Whether a storage counts from the call or from its first look, this is enough.
    for _ in 0..12 {
        if let Either::Left((over, _)) = select(wait.as_mut(), pin!(subject.pass(1))).await {
            fine(over);
            must!(subject.renew(&key, token, LONG) => Held::Yes,
                "a `wait` that timed out took the claim from its holder");
            return;
        }
        breathe().await;
    }
    panic!("`wait` did not return after three times its timeout: a duplicate hangs");
}

/// `wait` returns for all waiters when the key is completed (rule 8).
pub async fn wait_sees_completion<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("done");
    for others in [0, 8] {
        let (key, token) = subject.claimed().await;
        let end = async { must!(subject.complete(&key, token, &record, LONG) => Held::Yes) };
        subject.assert_wait_ends(&key, others, end).await;
    }
}

/// `wait` returns when the claim is released (rule 8).
pub async fn wait_sees_release<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    let end = async { must!(subject.release(&key, token) => Held::Yes) };
    subject.assert_wait_ends(&key, 0, end).await;
}

/// `wait` returns for all waiters when the claim is removed (rule 8).
pub async fn wait_sees_removal<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    for others in [0, 8] {
        let (key, _) = subject.claimed().await;
        let end = async { must!(subject.remove(&key) => true) };
        subject.assert_wait_ends(&key, others, end).await;
    }
}

/// `wait` returns when the lease is over, because a holder that died ends its claim in no other way (rules 3 and 8).
pub async fn wait_sees_the_lease_end<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, _) = subject.claimed_for(subject.units(10)).await;
    let mut wait = pin!(subject.storage.wait(&key, LONG));
    subject.assert_waits(wait.as_mut(), 1).await;
    subject.pass(10).await;
    let otherwise = "`wait` did not see the lease end: a duplicate waits for a dead holder";
    fine(subject.soon(wait, otherwise).await);
}

/// `wait` stays pending when the claim is renewed, and when another claim follows before it looks (rule 8).
pub async fn wait_outlasts_renewals<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed_for(subject.units(10)).await;
    let mut wait = pin!(subject.storage.wait(&key, LONG));
    subject.assert_waits(wait.as_mut(), 5).await;
    must!(subject.renew(&key, token, LONG) => Held::Yes, "the holder's `renew` was Lost");
    subject.assert_waits(wait.as_mut(), 10).await;

    must!(subject.release(&key, token) => Held::Yes);
    let token = Token::random();
    must!(subject.begin(&key, token) => Begin::Acquired);
    // The end in between may have woken it, and then it may return. Otherwise it stays pending.
    if wait.as_mut().now_or_never().is_none() {
        must!(subject.complete(&key, token, &answer("done"), LONG) => Held::Yes);
        fine(subject.soon(wait, MISSED).await);
    }
}

/// A claim that ends while `wait` begins is not missed (rule 8).
pub async fn wait_misses_nothing<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    for round in 0..64 {
        let (key, token) = subject.claimed().await;
        let waiter = subject.waiters(key, 1);
        for _ in 0..round % 8 {
            tokio::task::yield_now().await;
        }
        if round % 2 == 0 {
            must!(subject.complete(&key, token, &answer("done"), LONG) => Held::Yes);
        } else {
            must!(subject.release(&key, token) => Held::Yes);
        }
        subject.soon(waiter.join_all(), MISSED).await;
    }
}

/// Each release wakes at least one waiter, so all waiters are woken if each releases in turn (rule 8).
pub async fn release_wakes_waiters<H: Harness>(harness: &H) {
    const WAITERS: usize = 5;
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    let turn = |_| {
        let storage = subject.storage.clone();
        async move {
            let claim = claim(Token::random(), LONG);
            loop {
                fine(storage.wait(&key, LONG).await);
                if fine(storage.begin(&key, &claim).await) == Begin::Acquired {
                    breathe().await;
                    assert_eq!(fine(storage.release(&key, claim.token).await), Held::Yes);
                    return;
                }
            }
        }
    };
    let turns: JoinSet<()> = (0..WAITERS).map(turn).collect();
    breathe().await;
    subject.pass(1).await;
    must!(subject.release(&key, token) => Held::Yes);
    let otherwise = "a released key was free, and a waiter was not told: it waits for nothing";
    subject.soon(turns.join_all(), otherwise).await;
}

/// A waiter that is woken and then dropped before it is polled passes the wake on (rule 8).
pub async fn cancelled_waiter_passes_its_wake_on<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    // Whichever of the two a release wakes, it is dropped in one of the rounds.
    for cancelled in [0, 1] {
        let (key, token) = subject.claimed().await;
        let wait = || Box::pin(subject.storage.wait(&key, LONG));
        let mut waits = vec![wait(), wait()];
        for wait in &mut waits {
            subject.assert_waits(wait.as_mut(), 1).await;
        }
        must!(subject.release(&key, token) => Held::Yes);
        drop(waits.remove(cancelled));
        let otherwise =
            "a cancelled waiter kept its wake: the other waits although the key is free";
        fine(subject.soon(waits.remove(0), otherwise).await);
    }
}
