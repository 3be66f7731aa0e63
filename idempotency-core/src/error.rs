//! What can go wrong at a storage.

use std::error::Error;

/// A boxed error, kept as the source of ours.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// A storage could not do what it was asked.
///
/// The engine answers it as [`OnStorageError`](crate::OnStorageError) says: by default the request is refused with 503 and
/// its handler is not run.
///
/// ```
/// use idempotency_core::{StorageError, StorageErrorKind};
///
/// let error = StorageError::unavailable(std::io::Error::other("connection refused"));
/// assert_eq!(error.kind(), StorageErrorKind::Unavailable);
/// assert_eq!(error.to_string(), "the idempotency storage is unavailable");
/// ```
#[derive(Debug, thiserror::Error)]
#[error("{}", match kind {
    StorageErrorKind::Unavailable => "the idempotency storage is unavailable",
    StorageErrorKind::Timeout => "the idempotency storage did not answer in time (see `Config::storage_timeout`)",
    StorageErrorKind::Unreadable => "the record under this key can't be read; `Engine::remove` clears it, or its TTL will",
    StorageErrorKind::Full => "the idempotency storage has no room: give it more, or shorten the TTL",
})]
pub struct StorageError {
    kind: StorageErrorKind,
    source: Option<BoxError>,
}

/// Why a storage failed; see [`StorageError::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StorageErrorKind {
    /// The storage can't be reached, or answered with an error.
    Unavailable,
    /// The storage did not answer within the time limit, so whether the operation took effect is unknown.
    Timeout,
    /// What lies under the key is not a record that this version can read.
    Unreadable,
    /// The storage has no room, and does not evict records to make some. The source names the limit to raise.
    Full,
}

impl StorageError {
    /// An error of the given kind with the error that caused it.
    pub fn new(kind: StorageErrorKind, source: impl Into<BoxError>) -> Self {
        Self {
            kind,
            source: Some(source.into()),
        }
    }

    /// The storage can't be reached, or answered with an error.
    pub fn unavailable(source: impl Into<BoxError>) -> Self {
        Self::new(StorageErrorKind::Unavailable, source)
    }

    /// What lies under the key is not a record that this version can read.
    pub fn unreadable(source: impl Into<BoxError>) -> Self {
        Self::new(StorageErrorKind::Unreadable, source)
    }

    /// The storage did not answer within the time limit.
    #[must_use]
    pub fn timeout() -> Self {
        Self {
            kind: StorageErrorKind::Timeout,
            source: None,
        }
    }

    /// The storage has no room, and does not evict records to make some. [`new`](Self::new) with
    /// [`StorageErrorKind::Full`] also says which limit to raise.
    #[must_use]
    pub fn full() -> Self {
        Self {
            kind: StorageErrorKind::Full,
            source: None,
        }
    }

    /// Why the storage failed.
    #[must_use]
    pub fn kind(&self) -> StorageErrorKind {
        self.kind
    }
}

impl From<crate::DecodeError> for StorageError {
    fn from(error: crate::DecodeError) -> Self {
        Self::unreadable(error)
    }
}
