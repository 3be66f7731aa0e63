//! Those who wait for the end of a claim, and who of them must have learnt of it.

use std::{
    task::{Context, Waker},
    time::Duration,
};

use futures_util::future::{BoxFuture, FutureExt as _};
use idempotency_core::{EncodedKey, Storage};

use crate::model::{End, Model};

pub(crate) struct Waiters(Vec<Waiter>);

struct Waiter {
    wait: BoxFuture<'static, ()>,
    key: EncodedKey,
    deadline: Duration,
    /// Whether a claim held the key when it looked last. If not, a release went to somebody else, and it need not know.
    saw_a_claim: bool,
}

impl Waiters {
    pub(crate) fn new() -> Self {
        Self(Vec::new())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// One more waits, unless there is nothing to wait for.
    pub(crate) fn wait<S: Storage + Clone>(
        &mut self,
        storage: &S,
        key: EncodedKey,
        timeout: Duration,
        model: &Model,
    ) {
        let storage = storage.clone();
        let mut waiter = Waiter {
            wait: async move { storage.wait(&key, timeout).await.unwrap() }.boxed(),
            key,
            deadline: model.now().saturating_add(timeout),
            saw_a_claim: true,
        };
        let over = waiter.is_over();
        assert_eq!(
            over,
            !model.is_claimed(&key) || timeout.is_zero(),
            "a `wait` began"
        );
        if !over {
            self.0.push(waiter);
        }
    }

    /// One of them leaves, if there are any.
    pub(crate) fn leave(&mut self, who: Option<usize>) {
        if let (Some(who), false) = (who, self.0.is_empty()) {
            self.0.remove(who % self.0.len());
        }
    }

    /// Polls all, and checks that those return who must, and nobody who must not.
    pub(crate) fn assert_woken(&mut self, end: End, model: &Model) {
        let mut told_of_release = 0;
        let mut to_tell_of_release = 0;
        self.0.retain_mut(|waiter| {
            let over = waiter.is_over();
            let claimed = model.is_claimed(&waiter.key);
            if waiter.deadline <= model.now() {
                assert!(over, "a `wait` outlived its timeout");
            } else if claimed {
                assert!(!over, "a `wait` returned though a claim holds the key");
            } else if waiter.saw_a_claim && end == End::ForAll {
                assert!(over, "a `wait` missed the end of the claim");
            } else if waiter.saw_a_claim && end == End::Released {
                to_tell_of_release += 1;
                told_of_release += usize::from(over);
            }
            waiter.saw_a_claim = claimed;
            !over
        });
        assert!(
            to_tell_of_release == 0 || told_of_release > 0,
            "a release woke nobody"
        );
    }
}

impl Waiter {
    fn is_over(&mut self) -> bool {
        self.wait
            .poll_unpin(&mut Context::from_waker(Waker::noop()))
            .is_ready()
    }
}
