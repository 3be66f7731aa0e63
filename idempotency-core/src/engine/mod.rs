//! Decides what a request gets, and keeps the claim while its operation runs. Knows nothing of HTTP.
//!
//! [`Engine::begin`] answers with a [`Decision`]. On [`Decision::Execute`] the caller runs the operation and ends the
//! [`Claim`]; the engine's *keeper*, one task for all claims, renews it meanwhile, so how long an operation takes, or whether
//! it blocks its thread, does not matter. The [`Runs`] list the operations of this process: their
//! duplicates wait here and do not ask the storage, whatever the storage says about the lease.

use std::{fmt, sync::Arc, time::Duration};

use self::{
    decide::{Lease, Request},
    runs::Runs,
};
use crate::{
    AnyStorage, Config, Encoded, EncodedKey, Entry, Event, Record, Refusal, Storage, StorageError,
    Transactions,
};

mod call;
mod claim;
mod decide;
mod keeper;
mod manual;
mod progress;
mod releases;
mod run;
mod runs;
mod transaction;
mod waiters;

pub use self::{
    call::Ran,
    claim::{Claim, Completion},
    progress::Progress,
    transaction::{KeyTransaction, NotLent, TransactionClaim, TransactionEnd, TransactionSlot},
};

/// Runs operations at most once per key; clones share everything.
///
/// ```
/// # #[cfg(feature = "memory")]
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use http::{HeaderMap, StatusCode};
/// use idempotency_core::{
///     Config, Decision, Encoded, EncodedKey, Engine, MemoryStorage, Outcome, StoredResponse,
/// };
///
/// let engine = Engine::new(MemoryStorage::new(), Config::default());
/// let message = Encoded { key: EncodedKey::from_bytes([7; 32]), fingerprint: None };
///
/// let Decision::Execute(claim) = engine.begin(&message).await else { panic!("the key is new") };
/// let answer = StoredResponse::new(StatusCode::CREATED, &HeaderMap::new(), "order 1");
/// let _ = claim.complete(answer.clone()).await;
///
/// let Decision::Replay(replay) = engine.begin(&message).await else { panic!("the key has a record") };
/// assert_eq!(replay.record.outcome, Outcome::Response(answer));
/// # }
/// # #[cfg(not(feature = "memory"))]
/// # fn main() {}
/// ```
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

struct Shared {
    storage: AnyStorage,
    transactions: Option<Arc<dyn Transactions>>,
    config: Config,
    runs: Runs,
}

// Not `#[non_exhaustive]`: a caller that ignores a case runs an operation twice or not at all.
/// What to do with a request; see [`Engine::begin`].
#[derive(Debug)]
#[must_use = "only `Execute` and `Unprotected` allow the operation to run"]
pub enum Decision<C = Claim> {
    /// Run the operation, then end the claim.
    Execute(C),
    /// It ran before: answer with its outcome.
    Replay(Replay),
    /// Don't run it, and tell the client why.
    Refuse(Refused),
    /// The storage failed, and the configuration says to run the operation all the same. Never for one that runs in a transaction.
    Unprotected,
}

/// A recorded outcome, for a retry; see [`Decision::Replay`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Replay {
    /// The record of the first execution.
    pub record: Record,
    /// How long this duplicate waited for the running original; zero if the record was there at once.
    pub waited: Duration,
}

/// Why the operation does not run; see [`Decision::Refuse`].
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// The kind of refusal.
    pub refusal: Refusal,
    /// The error of the storage, if it caused the refusal.
    pub error: Option<StorageError>,
}

impl Engine {
    /// An engine that keeps claims and records in `storage`.
    pub fn new(storage: impl Storage, config: Config) -> Self {
        let storage = AnyStorage::new(storage);
        Self {
            shared: Arc::new(Shared {
                transactions: storage.transactions(),
                storage,
                runs: Runs::new(config.max_running, config.max_waiting),
                config,
            }),
        }
    }

    /// Decides what a request gets, waiting up to [`LockPolicy::timeout`](crate::LockPolicy::timeout) for a running original.
    ///
    /// If the future is dropped, a background task releases the claim that it may have taken, as far as the storage answers. To leave
    /// no claim behind, don't drop it: see [`begin_with`](Self::begin_with).
    pub async fn begin(&self, encoded: &Encoded) -> Decision {
        self.begin_with(encoded, &Progress::new()).await
    }

    /// [`begin`](Self::begin), with a `progress` that tells whether the future may be dropped.
    pub async fn begin_with(&self, encoded: &Encoded, progress: &Progress) -> Decision {
        let request = self.request(encoded, progress);
        let decision = request.decide(&Lease, self.wait_limit()).await;
        self.shared.announce(&encoded.key, &decision);
        decision
    }

    fn request<'a>(&'a self, encoded: &'a Encoded, progress: &'a Progress) -> Request<'a> {
        Request {
            shared: &self.shared,
            encoded,
            progress,
        }
    }

    fn wait_limit(&self) -> Duration {
        self.config().lock.wait_timeout()
    }

    /// The claim or record of `key` in the storage.
    ///
    /// # Errors
    ///
    /// If the storage fails, or the record can't be read.
    pub async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        self.shared.get(key).await
    }

    /// Replaces the completed record of `key`, or one that is still to be stored, and restarts its TTL. Does nothing if there is none.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    pub async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let shared = &self.shared;
        let expires = shared.now().saturating_add(ttl);
        if shared.runs.replace(key, record, expires) {
            return Ok(());
        }
        shared
            .limited(shared.storage.replace(key, record, ttl))
            .await
    }

    /// Removes the record or claim of `key`, readable or not, so that the next request runs. Returns whether there was one.
    ///
    /// Removing a claim does not stop the operation that holds it.
    ///
    /// # Errors
    ///
    /// If the storage fails.
    pub async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let shared = &self.shared;
        // Read first: a run that claims the key after the removal must not be forgotten.
        let holder = shared.runs.holder(key);
        let removed = shared.limited(shared.storage.remove(key)).await?;
        let forgotten = shared.runs.forget(key, holder);
        Ok(removed || forgotten)
    }

    /// How many operations of this engine run, or have an outcome that is still to be stored.
    #[must_use]
    pub fn running(&self) -> usize {
        self.shared.runs.running()
    }

    /// How many duplicates wait in this engine.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.shared.runs.waiting()
    }

    /// Returns once no operation of this engine runs and every outcome is stored or given up.
    ///
    /// For shutdown: stop taking requests, then drain, under a time limit of your own (an outcome that a dead storage can't
    /// take is tried until its TTL is over).
    pub async fn drain(&self) {
        // Runs that ended outside a runtime, or in one that has ended, are still to be released at the storage.
        keeper::wake(&self.shared);
        self.shared.runs.drained().await;
    }

    /// The configuration of this engine.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// How long a claim lives without being renewed: [`LockPolicy::ttl`](crate::LockPolicy::ttl).
    #[must_use]
    pub fn lease(&self) -> Duration {
        self.shared.lease()
    }

    /// Where this engine keeps claims and records.
    #[must_use]
    pub fn storage(&self) -> &AnyStorage {
        &self.shared.storage
    }
}

impl Shared {
    fn now(&self) -> Duration {
        self.config.env.now()
    }

    fn lease(&self) -> Duration {
        self.config.lock.lease()
    }

    fn emit(&self, event: &Event<'_>) {
        self.config.observers.emit(event);
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("storage", &self.shared.storage)
            .field("running", &self.running())
            .field("waiting", &self.waiting())
            .finish_non_exhaustive()
    }
}
