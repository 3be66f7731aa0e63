//! Claim, run and record in one call, for what is not HTTP.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use http::{HeaderMap, StatusCode};
use serde::{Serialize, de::DeserializeOwned};

use super::{Decision, Engine};
use crate::{Encoded, Outcome, Refusal, StorageError, StoredResponse, TombstoneReason};

// Not `#[non_exhaustive]`: a consumer that ignores a case loses a message or acknowledges one that was not worked on.
/// What came of [`Engine::run`].
#[derive(Debug)]
#[must_use = "most outcomes mean that the operation did not run"]
pub enum Ran<T, E> {
    /// The operation ran now and returned this, which is recorded.
    Executed(T),
    /// The operation ran before and returned this. It did not run now.
    Replayed(T),
    /// The operation ran now and failed. Nothing is recorded, so the next call runs it again.
    Failed(E),
    /// Another call still runs it, here or elsewhere: try again later.
    InFlight,
    /// The key was used for another operation: its fingerprint differs.
    Mismatch,
    /// The operation ran before, and is not run again, but what it returned is not known.
    NotReplayable(TombstoneReason),
    /// Too many operations run or wait in this process: try again later.
    Overloaded,
    /// The storage failed, or its record can't be read as this type. The operation did not run.
    StorageFailed(StorageError),
}

impl Engine {
    /// Runs `operation` at most once per key: claims the key, runs the operation, and records what it returns.
    ///
    /// `Ok` values are recorded as JSON, for [`Config::ttl`](crate::Config::ttl); an `Err` releases the key. A duplicate of a running
    /// operation waits up to [`LockPolicy::timeout`](crate::LockPolicy::timeout) for its value.
    ///
    /// Dropping the future cancels the operation and releases the key, and so does a panic of it. To let an operation survive its caller,
    /// run this in a task.
    ///
    /// ```
    /// # #[cfg(feature = "memory")]
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// use idempotency_core::{Config, Encoded, EncodedKey, Engine, MemoryStorage, Ran};
    ///
    /// async fn ship() -> Result<String, std::io::Error> {
    ///     Ok("parcel 1".to_owned())
    /// }
    ///
    /// let engine = Engine::new(MemoryStorage::new(), Config::default());
    /// let message = Encoded { key: EncodedKey::from_bytes([7; 32]), fingerprint: None };
    ///
    /// let first = engine.run(&message, ship).await;
    /// assert!(matches!(first, Ran::Executed(parcel) if parcel == "parcel 1"));
    /// let again = engine.run(&message, ship).await;
    /// assert!(matches!(again, Ran::Replayed(parcel) if parcel == "parcel 1"));
    /// # }
    /// # #[cfg(not(feature = "memory"))]
    /// # fn main() {}
    /// ```
    ///
    /// With [`OnStorageError::RunUnprotected`](crate::OnStorageError::RunUnprotected) the operation also runs, without a record, where
    /// the storage fails. A value that can't be written as JSON leaves a tombstone, and an error in the log;
    /// one that panics when it is written leaves a tombstone too.
    pub async fn run<T, E, F>(&self, encoded: &Encoded, operation: impl FnOnce() -> F) -> Ran<T, E>
    where
        T: Serialize + DeserializeOwned,
        F: Future<Output = Result<T, E>>,
    {
        let claim = match self.begin(encoded).await {
            Decision::Execute(claim) => claim,
            Decision::Replay(replay) => return replayed(&replay.record.outcome),
            Decision::Refuse(refused) => return not_run(refused.refusal, refused.error),
            Decision::Unprotected => {
                return match operation().await {
                    Ok(value) => Ran::Executed(value),
                    Err(error) => Ran::Failed(error),
                };
            }
        };
        let value = match operation().await {
            Ok(value) => value,
            Err(error) => {
                claim.release().await;
                return Ran::Failed(error);
            }
        };
        // Where the value can't be stored, observers and the log are told why; it was executed all the same.
        let written = catch_unwind(AssertUnwindSafe(|| serde_json::to_vec(&value)));
        let _ = match written {
            Ok(Ok(json)) => {
                let record = StoredResponse::new(StatusCode::OK, &HeaderMap::new(), json);
                claim.complete(record).await
            }
            Err(panic) => {
                // What was executed must not be executed again.
                let _ = claim.tombstone(TombstoneReason::Unstorable).await;
                resume_unwind(panic);
            }
            Ok(Err(error)) => {
                tracing::error!(
                    target: "idempotency",
                    key = %encoded.key,
                    %error,
                    "what an operation returned can't be written as JSON: its key gets a tombstone"
                );
                claim.tombstone(TombstoneReason::Unstorable).await
            }
        };
        Ran::Executed(value)
    }
}

pub(super) fn replayed<T: DeserializeOwned, E>(outcome: &Outcome) -> Ran<T, E> {
    match outcome {
        Outcome::Response(response) => match serde_json::from_slice(response.body()) {
            Ok(value) => Ran::Replayed(value),
            Err(error) => Ran::StorageFailed(StorageError::unreadable(error)),
        },
        Outcome::Tombstone(reason) => Ran::NotReplayable(*reason),
    }
}

pub(super) fn not_run<T, E>(refusal: Refusal, error: Option<StorageError>) -> Ran<T, E> {
    match (refusal, error) {
        (_, Some(error)) => Ran::StorageFailed(error),
        (Refusal::InFlight, None) => Ran::InFlight,
        (Refusal::KeyReused, None) => Ran::Mismatch,
        _ => Ran::Overloaded,
    }
}
