//! Everything that happens, told to whoever wants to know.

use std::{fmt, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use http::StatusCode;
use tracing::{debug, error, field::display, warn};

use crate::{EncodedKey, StorageError, TombstoneReason, codes::codes};

/// Something that happened to a key.
///
/// Keys appear only in their encoded form; no event carries a body, a credential or a header.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A claim was acquired: the operation runs.
    Executing {
        /// The key that is now claimed.
        key: EncodedKey,
    },
    /// A duplicate waits for the running original.
    Waiting {
        /// The key it waits for.
        key: EncodedKey,
    },
    /// The answer of an execution was stored.
    Completed {
        /// The key that now has a record.
        key: EncodedKey,
        /// Status of the stored answer.
        status: StatusCode,
        /// From the claim to the stored record.
        took: Duration,
    },
    /// A tombstone was stored: the operation ran, but its answer can't be replayed.
    Tombstoned {
        /// The key that now has a tombstone.
        key: EncodedKey,
        /// Why there is no answer to replay.
        reason: TombstoneReason,
    },
    /// A claim was given back without a record: a retry runs.
    Released {
        /// The key that is free again.
        key: EncodedKey,
    },
    /// A recorded outcome answered a retry.
    Replayed {
        /// The key that had a record.
        key: EncodedKey,
        /// How long the duplicate had waited for the original; zero if the record was there at once.
        waited: Duration,
    },
    /// A manual handler runs on a conflict. Meanwhile it holds a claim under a key of its own, derived from this one, about
    /// which there are events too.
    Conflict {
        /// The key that has a record.
        key: EncodedKey,
    },
    /// What a manual handler answered on a conflict took the place of the record.
    Replaced {
        /// The key that has another record now.
        key: EncodedKey,
        /// Status of the stored answer.
        status: StatusCode,
    },
    /// A request was refused before its operation ran.
    Refused {
        /// The key, if the request got far enough to have one.
        key: Option<EncodedKey>,
        /// Why.
        refusal: Refusal,
    },
    /// The client left; its operation goes on in a task of its own.
    Adopted,
    /// Another holder took over, or the record is someone else's: this claim's outcome was not stored.
    Lost {
        /// The key whose claim is gone.
        key: EncodedKey,
        /// What found it out.
        operation: Operation,
    },
    /// A claim that the storage had forgotten was taken again, before anyone else did.
    Reclaimed {
        /// The key that is claimed again.
        key: EncodedKey,
    },
    /// A storage operation failed.
    StorageFailed {
        /// The key it was for.
        key: EncodedKey,
        /// Which one.
        operation: Operation,
        /// Why.
        error: &'a StorageError,
    },
    /// An outcome could not be stored yet; this process answers the key from memory and keeps trying.
    Deferred {
        /// The key whose record is still to be stored.
        key: EncodedKey,
    },
    /// An outcome could not be stored before its TTL was over.
    Abandoned {
        /// The key that has no record.
        key: EncodedKey,
    },
    /// The storage failed and the configuration lets the operation run all the same.
    Unprotected {
        /// The key that protects nothing.
        key: EncodedKey,
    },
    /// Live records left the memory storage because it was full.
    Evicted {
        /// The first key that left.
        key: EncodedKey,
        /// How many records this storage has evicted since it was built.
        total: u64,
    },
}

impl Event<'_> {
    /// A fixed name for metrics and logs, in snake case.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Executing { .. } => "executing",
            Self::Waiting { .. } => "waiting",
            Self::Completed { .. } => "completed",
            Self::Tombstoned { .. } => "tombstoned",
            Self::Released { .. } => "released",
            Self::Replayed { .. } => "replayed",
            Self::Conflict { .. } => "conflict",
            Self::Replaced { .. } => "replaced",
            Self::Refused { .. } => "refused",
            Self::Adopted => "adopted",
            Self::Lost { .. } => "lost",
            Self::Reclaimed { .. } => "reclaimed",
            Self::StorageFailed { .. } => "storage_failed",
            Self::Deferred { .. } => "deferred",
            Self::Abandoned { .. } => "abandoned",
            Self::Unprotected { .. } => "unprotected",
            Self::Evicted { .. } => "evicted",
        }
    }

    /// The key that the event is about, if it is about one.
    #[must_use]
    pub fn key(&self) -> Option<EncodedKey> {
        match self {
            Self::Executing { key }
            | Self::Waiting { key }
            | Self::Completed { key, .. }
            | Self::Tombstoned { key, .. }
            | Self::Released { key }
            | Self::Replayed { key, .. }
            | Self::Conflict { key }
            | Self::Replaced { key, .. }
            | Self::Lost { key, .. }
            | Self::Reclaimed { key }
            | Self::StorageFailed { key, .. }
            | Self::Deferred { key }
            | Self::Abandoned { key }
            | Self::Unprotected { key }
            | Self::Evicted { key, .. } => Some(*key),
            Self::Refused { key, .. } => *key,
            Self::Adopted => None,
        }
    }
}

codes! {
    /// Why a request was refused before its operation ran; the kinds of problem that a client can meet.
    pub enum Refusal {
        /// A required key is missing.
        MissingKey = "missing-key",
        /// The key is not valid.
        InvalidKey = "invalid-key",
        /// The original is still running.
        InFlight = "in-flight",
        /// The key was used for another request.
        KeyReused = "key-reused",
        /// The operation ran, but its answer was not recorded.
        NotReplayable = "not-replayable",
        /// The request's body is over the limit.
        BodyTooLarge = "body-too-large",
        /// The request's body could not be read to its end.
        BodyUnreadable = "body-unreadable",
        /// The request carries nothing that says whose key it is.
        ScopeRequired = "scope-required",
        /// The storage failed.
        StorageUnavailable = "storage-unavailable",
        /// The operation ran in a transaction, which was rolled back: it met another one, the database failed, or it took too long.
        RolledBack = "rolled-back",
        /// The connection was lost while the transaction of the operation was committed.
        InDoubt = "in-doubt",
        /// Too many operations are running or waiting, or too many bytes are held in memory.
        Overloaded = "overloaded",
    }

    /// The code of this refusal, in kebab case: the last part of its problem type.
    pub fn as_str;
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

codes! {
    /// An operation of a [`Storage`](crate::Storage), named in events.
    pub enum Operation {
        /// `Storage::begin`
        Begin = "begin",
        /// `Storage::complete`
        Complete = "complete",
        /// `Storage::renew`
        Renew = "renew",
        /// `Storage::release`
        Release = "release",
        /// `Storage::get`
        Get = "get",
        /// `Storage::replace`
        Replace = "replace",
        /// `Storage::remove`
        Remove = "remove",
        /// `Storage::wait`
        Wait = "wait",
    }

    /// The method's name.
    pub fn as_str;
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Is told every [`Event`], on the task that it happens on: be quick, and don't block.
///
/// Every `Fn(&Event)` is an observer. Logging through `tracing` is one too and always there, see [`TracingObserver`].
///
/// ```
/// use idempotency_core::{Config, Event};
///
/// let config = Config::default().observer(|event: &Event<'_>| {
///     if let Event::Replayed { waited, .. } = event {
///         println!("replayed after {waited:?}");
///     }
/// });
/// # let _ = config;
/// ```
pub trait Observer: Send + Sync + 'static {
    /// Something happened.
    fn on_event(&self, event: &Event<'_>);
}

impl<F: Fn(&Event<'_>) + Send + Sync + 'static> Observer for F {
    fn on_event(&self, event: &Event<'_>) {
        self(event);
    }
}

/// The observers that somebody added, and the log: what is told, all of them are told.
#[derive(Clone, Default)]
pub(crate) struct Observers(Vec<Arc<dyn Observer>>);

impl Observers {
    pub(crate) fn add(&mut self, observer: impl Observer) {
        self.0.push(Arc::new(observer));
    }

    /// How many were added; the log is not one of them.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Tells every observer of `event`. One that panics is logged: what it observes goes on.
    pub(crate) fn emit(&self, event: &Event<'_>) {
        TracingObserver.on_event(event);
        for observer in &self.0 {
            let told = std::panic::catch_unwind(AssertUnwindSafe(|| observer.on_event(event)));
            if told.is_err() {
                tracing::error!(target: "idempotency", event = event.name(), "an observer panicked");
            }
        }
    }
}

/// Logs every event through `tracing`, target `idempotency`; the engine always has one.
///
/// What protects money being at risk is an error (a lost claim, an abandoned record, an unprotected run), what an operator
/// should look at is a warning, the ordinary is `debug`.
#[derive(Clone, Copy, Debug, Default)]
pub struct TracingObserver;

impl Observer for TracingObserver {
    fn on_event(&self, event: &Event<'_>) {
        const TARGET: &str = "idempotency";
        let key = event.key().map(display);
        match event {
            Event::Lost { operation, .. } => {
                error!(target: TARGET, key, %operation, "another holder has the key: this execution's outcome is not stored");
            }
            Event::Abandoned { .. } => {
                error!(target: TARGET, key, "gave up storing the outcome: its TTL is over");
            }
            Event::Unprotected { .. } => {
                error!(target: TARGET, key, "running without protection: the storage failed and `RunUnprotected` is configured");
            }
            Event::StorageFailed {
                operation, error, ..
            } => {
                let source = std::error::Error::source(error).map(ToString::to_string);
                warn!(target: TARGET, key, %operation, %error, source, "storage operation failed");
            }
            Event::Deferred { .. } => {
                warn!(target: TARGET, key, "the outcome is not stored yet: answering from memory and trying again");
            }
            Event::Reclaimed { .. } => {
                warn!(target: TARGET, key, "the storage had forgotten a running claim: claimed again");
            }
            Event::Evicted { total, .. } => {
                warn!(target: TARGET, key, total, "live records were evicted: raise `max_bytes` or shorten the TTL");
            }
            Event::Tombstoned { reason, .. } => {
                warn!(target: TARGET, key, %reason, "the operation ran, but its answer can't be replayed");
            }
            Event::Refused { refusal, .. } => debug!(target: TARGET, key, %refusal, "refused"),
            Event::Completed { status, took, .. } => {
                debug!(target: TARGET, key, status = status.as_u16(), ?took, "completed");
            }
            Event::Replayed { waited, .. } => debug!(target: TARGET, key, ?waited, "replayed"),
            Event::Replaced { status, .. } => {
                debug!(target: TARGET, key, status = status.as_u16(), "replaced");
            }
            Event::Executing { .. }
            | Event::Conflict { .. }
            | Event::Waiting { .. }
            | Event::Released { .. }
            | Event::Adopted => debug!(target: TARGET, key, "{}", event.name()),
        }
    }
}
