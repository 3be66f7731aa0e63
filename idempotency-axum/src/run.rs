//! One run of a handler, and its end.

use idempotency_core::{Claim, StoredResponse, TombstoneReason, Turn};

/// The first run of a key, under its claim, or one on a conflict, in its turn.
///
/// The engine tells its observers what became of the outcome, and the client gets its answer in any case; so no end returns
/// anything.
///
/// The future of a request is as large as the largest thing that it awaits, so what is rare is boxed.
#[derive(Debug)]
#[must_use = "a run that is dropped is as good as one that never was"]
pub(crate) enum Run {
    First(Claim),
    Conflict(Box<Turn>),
}

impl Run {
    /// Keeps the answer for retries.
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

    /// The handler is done, and left no answer that could be kept: it must not run again. On a conflict the record stays.
    pub(crate) async fn store_none(self, reason: TombstoneReason) {
        match self {
            Self::First(claim) => {
                let _ = Box::pin(claim.tombstone(reason)).await;
            }
            Self::Conflict(turn) => Box::pin(turn.keep()).await,
        }
    }

    /// The answer is one that is not kept: a retry runs. On a conflict the record stays.
    pub(crate) async fn release(self) {
        match self {
            Self::First(claim) => claim.release().await,
            Self::Conflict(turn) => Box::pin(turn.keep()).await,
        }
    }
}
