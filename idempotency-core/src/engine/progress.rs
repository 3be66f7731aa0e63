//! What the caller of the engine may ask of a begin that is under way.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::Notify;

/// Tells whether an unfinished [`Engine::begin_with`](crate::Engine::begin_with) may be dropped without leaving a claim behind.
///
/// Once a claim may have been taken, the future and the operation that follows it should be run to their end.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<ProgressState>);

#[derive(Debug, Default)]
struct ProgressState {
    committed: AtomicBool,
    given_up: AtomicBool,
    gave_up: Notify,
}

impl Progress {
    /// Nothing has begun.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a claim is, or may have been, taken.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        self.0.committed.load(Ordering::Relaxed)
    }

    pub(super) fn set(&self, committed: bool) {
        // Read only when the future is dropped, never while it is polled, so no order has to be kept.
        self.0.committed.store(committed, Ordering::Relaxed);
    }

    /// Whether the claim was held longer than [`LockPolicy::max_hold`](crate::LockPolicy::max_hold) and has been given up: its key
    /// has a tombstone, and an operation whose client is gone is of no use any more.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        self.0.given_up.load(Ordering::Acquire)
    }

    /// Returns once the claim has been [given up](Self::is_given_up); never, if it ends before.
    pub async fn given_up(&self) {
        let mut gave_up = pin!(self.0.gave_up.notified());
        // Enabled before the look, so that a claim that is given up in between is not missed.
        gave_up.as_mut().enable();
        if !self.is_given_up() {
            gave_up.await;
        }
    }

    /// Marks the claim as given up, as the engine does; for tests.
    #[doc(hidden)]
    pub fn give_up(&self) {
        self.0.given_up.store(true, Ordering::Release);
        self.0.gave_up.notify_waiters();
    }
}
