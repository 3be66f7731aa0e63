//! How a [`MemoryStorage`] is set up.

use std::{fmt, sync::Arc};

use super::{MemoryStorage, Shelf};
use crate::{Env, Observer, event::Observers};

/// What a [`MemoryStorage`] does with a new key when its records weigh [`max_bytes`](MemoryStorageBuilder::max_bytes).
///
/// Neither loses a running claim.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhenFull {
    /// Evicts the records that were not used for longest. **A retry of an evicted one runs its operation again.** So evictions
    /// are counted ([`MemoryStorage::evicted`]), and observers and the log are told
    /// ([`Event::Evicted`](crate::Event::Evicted)) of the first and then whenever their number has doubled.
    ///
    /// A record that is larger than `max_bytes` by itself is stored as a tombstone
    /// ([`ResponseTooLarge`](crate::TombstoneReason::ResponseTooLarge)): its retries get a conflict, and run nothing.
    #[default]
    Evict,
    /// Refuses the key with [`StorageErrorKind::Full`](crate::StorageErrorKind::Full), by default a 503 for the client, until
    /// records expire.
    ///
    /// What was begun is completed: no record of a running operation is refused, however large it is. So the weight may go
    /// over `max_bytes` by the answers of what runs, at most `Config::max_running` times `Config::max_response_body`.
    Refuse,
}

/// Sets up a [`MemoryStorage`]; made by [`MemoryStorage::builder`].
///
/// ```
/// use idempotency_core::{Event, MemoryStorage, WhenFull};
///
/// let refusing = MemoryStorage::builder()
///     .max_bytes(256 << 20)
///     .when_full(WhenFull::Refuse)
///     .build();
/// assert_eq!(refusing.records(), 0);
///
/// let evicting = MemoryStorage::builder()
///     .observer(|event: &Event<'_>| {
///         if let Event::Evicted { total, .. } = event {
///             eprintln!("{total} records evicted");
///         }
///     })
///     .build();
/// # let _ = evicting;
/// ```
#[must_use]
pub struct MemoryStorageBuilder {
    max_bytes: usize,
    when_full: WhenFull,
    env: Env,
    observers: Observers,
}

impl MemoryStorageBuilder {
    /// How much the records may weigh, in bytes; see [Memory](MemoryStorage#memory). Default: 64 MiB.
    ///
    /// At least one tombstone is kept, however little this is.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// What happens when the records weigh that much. Default: [`WhenFull::Evict`].
    pub fn when_full(mut self, when_full: WhenFull) -> Self {
        self.when_full = when_full;
        self
    }

    /// The clock for leases and TTLs, and the sleep of waiters. Default: [`Env::system`].
    pub fn env(mut self, env: Env) -> Self {
        self.env = env;
        self
    }

    /// Adds an observer of what the storage does by itself: [`Event::Evicted`](crate::Event::Evicted), and
    /// [`Event::Tombstoned`](crate::Event::Tombstoned) for a record that is larger than `max_bytes`. Both are logged in any
    /// case.
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observers.add(observer);
        self
    }

    /// Builds the storage, empty.
    #[must_use]
    pub fn build(self) -> MemoryStorage {
        let Self {
            max_bytes,
            when_full,
            env,
            observers,
        } = self;
        MemoryStorage(Arc::new(Shelf::new(
            max_bytes,
            when_full,
            env,
            Some(observers),
        )))
    }
}

impl Default for MemoryStorageBuilder {
    fn default() -> Self {
        Self {
            max_bytes: 64 << 20,
            when_full: WhenFull::default(),
            env: Env::system(),
            observers: Observers::default(),
        }
    }
}

impl fmt::Debug for MemoryStorageBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryStorageBuilder")
            .field("max_bytes", &self.max_bytes)
            .field("when_full", &self.when_full)
            .field("env", &self.env)
            .field("observers", &self.observers.len())
            .finish()
    }
}
