//! One run of a handler, and its end.

use idempotency_core::{Claim, StoredResponse, TombstoneReason, Turn};

/// The first run of a key, under its claim, or a manual handler's run on a conflict, in its turn.
///
/// The engine reports to its observers whether the outcome was stored, and the client gets its answer in any case. So these methods
/// return nothing.
///
/// A request's future is as large as the largest future that it awaits, so rare ones are boxed.
#[derive(Debug)]
#[must_use = "a run that is dropped is as good as one that never was"]
pub(crate) enum Run {
    First(Claim),
    Conflict(Box<Turn>),
}

impl Run {
    /// Stores the answer for retries.
    pub(crate) async fn store(self, response: StoredResponse) {
        match self {
            Self::First(claim) => {
                let _ = claim.complete(response).await;
            }
            Self::Conflict(turn) => {
                let _ = Box::pin(turn.replace(response)).await;
            }
        }
    }

    /// Stores a tombstone: the handler ran, and its answer can't be stored. On a conflict the record stays.
    pub(crate) async fn store_none(self, reason: TombstoneReason) {
        match self {
            Self::First(claim) => {
                let _ = Box::pin(claim.tombstone(reason)).await;
            }
            Self::Conflict(turn) => Box::pin(turn.keep()).await,
        }
    }

    /// Releases the key, so that a retry runs. On a conflict the record stays.
    pub(crate) async fn release(self) {
        match self {
            Self::First(claim) => claim.release().await,
            Self::Conflict(turn) => Box::pin(turn.keep()).await,
        }
    }
}
