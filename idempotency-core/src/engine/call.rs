//! Claim, run and record in one call, for what is not HTTP.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::pin,
};

use futures_util::future::{Either, select};
use http::{HeaderMap, StatusCode};
use serde::{Serialize, de::DeserializeOwned};

use super::{Decision, Engine, KeyTransaction, Progress, TransactionEnd};
use crate::{
    Encoded, Outcome, Refusal, RolledBack, StorageError, StoredResponse, TombstoneReason,
    TransactionDatabase, Writes,
};

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
        let claim = match claimed(self.begin(encoded).await) {
            Ok(Some(claim)) => claim,
            Ok(None) => {
                return match operation().await {
                    Ok(value) => Ran::Executed(value),
                    Err(error) => Ran::Failed(error),
                };
            }
            Err(ran) => return ran,
        };
        let value = match operation().await {
            Ok(value) => value,
            Err(error) => {
                claim.release().await;
                return Ran::Failed(error);
            }
        };
        // Where the value can't be stored, observers and the log are told why; it was executed all the same.
        let _ = match to_json(&value) {
            Ok(Ok(response)) => claim.complete(response).await,
            Ok(Err(error)) => {
                tracing::error!(
                    target: "idempotency",
                    key = %encoded.key,
                    %error,
                    "what an operation returned can't be written as JSON: its key gets a tombstone"
                );
                claim.tombstone(TombstoneReason::Unstorable).await
            }
            Err(panic) => {
                // What was executed must not be executed again.
                let _ = claim.tombstone(TombstoneReason::Unstorable).await;
                resume_unwind(panic);
            }
        };
        Ran::Executed(value)
    }

    /// Runs `operation` exactly once per key, if all that it does is written through the transaction that it is given: its writes and the
    /// record of its value are committed together, or not at all.
    ///
    /// An `Ok` value is recorded as JSON, for [`Config::ttl`](crate::Config::ttl). An `Err` rolls back, and the next call runs the
    /// operation again. So does an operation that meets another transaction (`40001`, `40P01`), or is open for longer than
    /// [`Transactions::max_duration`](crate::Transactions::max_duration): [`Ran::StorageFailed`]. Dropping the future, or a panic, rolls
    /// back too. What an operation does elsewhere is not rolled back.
    ///
    #[cfg_attr(feature = "sqlite", doc = "```")]
    #[cfg_attr(not(feature = "sqlite"), doc = "```ignore")]
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let path = std::env::temp_dir().join(format!("run-in-{}.db", std::process::id()));
    /// use idempotency_core::{
    ///     Config, Encoded, EncodedKey, Engine, Ran, SqliteStorage,
    ///     sqlx::{self, Sqlite},
    /// };
    ///
    /// let storage = SqliteStorage::open(&path).await?;
    /// storage.migrate().await?;
    /// sqlx::query("CREATE TABLE parcels (id INTEGER PRIMARY KEY)").execute(storage.pool()).await?;
    ///
    /// let engine = Engine::new(storage.clone(), Config::default());
    /// let message = Encoded { key: EncodedKey::from_bytes([7; 32]), fingerprint: None };
    /// for _ in 0..2 {
    ///     let ran: Ran<i64, sqlx::Error> = engine
    ///         .run_in::<Sqlite, _, _>(&message, async |transaction| {
    ///             let statement = "INSERT INTO parcels DEFAULT VALUES RETURNING id";
    ///             sqlx::query_scalar(statement).fetch_one(&mut **transaction).await
    ///         })
    ///         .await;
    ///     assert!(matches!(ran, Ran::Executed(1) | Ran::Replayed(1)), "{ran:?}");
    /// }
    /// # drop((engine, storage));
    /// # std::fs::remove_file(path)?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn run_in<DB, T, E>(
        &self,
        encoded: &Encoded,
        operation: impl AsyncFnOnce(&mut KeyTransaction<DB>) -> Result<T, E>,
    ) -> Ran<T, E>
    where
        DB: TransactionDatabase,
        T: Serialize + DeserializeOwned,
    {
        let progress = Progress::new();
        let begun = self.begin_in_transaction(encoded, &progress, None);
        let claim = match claimed(begun.await) {
            Ok(Some(claim)) => claim,
            Ok(None) => return Ran::Overloaded,
            Err(ran) => return ran,
        };
        let mut transaction = match claim.slot().take::<DB>() {
            Ok(transaction) => transaction,
            Err(error) => {
                let _ = claim.roll_back().await;
                return Ran::StorageFailed(StorageError::unavailable(error));
            }
        };
        let ran = match select(pin!(operation(&mut transaction)), pin!(claim.expired())).await {
            Either::Left((ran, _)) => Some(ran),
            Either::Right(_) => None,
        };
        drop(transaction);
        let not_kept = match ran {
            Some(Ok(value)) => match to_json(&value) {
                Ok(Ok(response)) => {
                    let outcome = Outcome::Response(response);
                    return match claim.commit(outcome, Writes::Keep).await {
                        TransactionEnd::Committed => Ran::Executed(value),
                        TransactionEnd::RolledBack(error)
                        | TransactionEnd::Failed(error)
                        | TransactionEnd::Unknown(error) => Ran::StorageFailed(error),
                        TransactionEnd::EndedByHand | TransactionEnd::NotGivenBack => {
                            Ran::NotReplayable(TombstoneReason::HandlerFailed)
                        }
                    };
                }
                Ok(Err(error)) => Ran::StorageFailed(StorageError::unavailable(error)),
                Err(panic) => {
                    let _ = claim.roll_back().await;
                    resume_unwind(panic);
                }
            },
            Some(Err(error)) => Ran::Failed(error),
            None => Ran::StorageFailed(StorageError::timeout()),
        };
        match claim.roll_back().await {
            RolledBack::Yes => not_kept,
            RolledBack::EndedByHand => Ran::NotReplayable(TombstoneReason::HandlerFailed),
        }
    }
}

/// The claim of an operation that may run; `None` if it may run without one.
fn claimed<C, T: DeserializeOwned, E>(decision: Decision<C>) -> Result<Option<C>, Ran<T, E>> {
    Err(match decision {
        Decision::Execute(claim) => return Ok(Some(claim)),
        Decision::Unprotected => return Ok(None),
        Decision::Replay(replay) => match replay.record.outcome {
            Outcome::Response(response) => match serde_json::from_slice(response.body()) {
                Ok(value) => Ran::Replayed(value),
                Err(error) => Ran::StorageFailed(StorageError::unreadable(error)),
            },
            Outcome::Tombstone(reason) => Ran::NotReplayable(reason),
        },
        Decision::Refuse(refused) => match (refused.refusal, refused.error) {
            (_, Some(error)) => Ran::StorageFailed(error),
            (Refusal::InFlight, None) => Ran::InFlight,
            (Refusal::KeyReused, None) => Ran::Mismatch,
            _ => Ran::Overloaded,
        },
    })
}

/// `value` as an answer. A panic is caught, so that the claim can be ended before it goes on.
fn to_json(value: &impl Serialize) -> std::thread::Result<serde_json::Result<StoredResponse>> {
    catch_unwind(AssertUnwindSafe(|| {
        let json = serde_json::to_vec(value)?;
        Ok(StoredResponse::new(StatusCode::OK, &HeaderMap::new(), json))
    }))
}
