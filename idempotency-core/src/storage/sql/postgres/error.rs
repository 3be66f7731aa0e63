//! What an error of the driver means. SQLSTATE tells, never the text.

use std::{borrow::Cow, error::Error, fmt};

use crate::{StorageError, StorageErrorKind};

/// What can be done about an error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cure {
    /// The connection is lost. Another one may do.
    AnotherConnection,
    /// The statement met another one. It may do when it is repeated.
    AnotherTry,
    /// Nothing. The connection leads to a server that does not write, or is in an unknown state, so it is closed.
    Close,
    /// Nothing. The connection is as good as before.
    Keep,
}

pub(super) fn cure(error: &sqlx::Error) -> Cure {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::WorkerCrashed => Cure::AnotherConnection,
        sqlx::Error::Database(_) => match &*code(error) {
            // serialization_failure, deadlock_detected
            "40001" | "40P01" => Cure::AnotherTry,
            // read_only_sql_transaction
            "25006" => Cure::Close,
            // admin_shutdown, crash_shutdown, cannot_connect_now, idle_session_timeout, idle_in_transaction_session_timeout,
            // transaction_timeout
            "57P01" | "57P02" | "57P03" | "57P05" | "25P03" | "25P04" => Cure::AnotherConnection,
            // What the proxy in between does with statements is not what we think.
            UNKNOWN_STATEMENT | STATEMENT_EXISTS => Cure::Close,
            code if code.starts_with("08") => Cure::AnotherConnection,
            _ => Cure::Keep,
        },
        _ => Cure::Close,
    }
}

const UNKNOWN_STATEMENT: &str = "26000";
const STATEMENT_EXISTS: &str = "42P05";

pub(super) fn into_storage_error(error: sqlx::Error) -> StorageError {
    use StorageErrorKind::{Full, Timeout, Unavailable};

    if matches!(error, sqlx::Error::PoolTimedOut) {
        return StorageError::new(Timeout, error);
    }
    let with = |kind, hint, error| StorageError::new(kind, Hinted { hint, error });
    match &*code(&error) {
        // undefined_table, undefined_column
        "42P01" | "42703" | "3F000" => with(
            Unavailable,
            "there is no such table, or one of another version: call `PostgresStorage::migrate` at the start",
            error,
        ),
        "25006" => with(
            Unavailable,
            "the server takes no writes: it is a replica, or `default_transaction_read_only` is on",
            error,
        ),
        UNKNOWN_STATEMENT | STATEMENT_EXISTS => with(
            Unavailable,
            "a proxy gives the statements of a connection to several servers: call `.transaction_pooling()`, or connect without it",
            error,
        ),
        // disk_full
        "53100" => with(Full, "PostgreSQL has no room on its disk", error),
        // query_canceled, lock_not_available
        "57014" | "55P03" => StorageError::new(Timeout, error),
        _ => StorageError::unavailable(error),
    }
}

/// A column that is not what it should be.
pub(super) fn decoding(error: sqlx::Error) -> StorageError {
    StorageError::unreadable(error)
}

/// The SQLSTATE, or nothing.
pub(super) fn code(error: &sqlx::Error) -> Cow<'_, str> {
    let code = error.as_database_error().and_then(|error| error.code());
    code.unwrap_or_default()
}

/// An error with what to do about it.
#[derive(Debug)]
struct Hinted {
    hint: &'static str,
    error: sqlx::Error,
}

impl fmt::Display for Hinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.hint)
    }
}

impl Error for Hinted {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.error)
    }
}
