//! What SQLite refuses, told apart by its result codes.

use std::{error::Error, fmt, io};

use crate::{BoxError, StorageError, StorageErrorKind, storage::sql::table::InvalidTableName};

/// A SQLite file could not be opened or prepared; also the source of a [`StorageError`] of a
/// [`SqliteStorage`](crate::SqliteStorage).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// use idempotency_core::{SqliteStorage, SqliteStorageErrorKind};
///
/// let refused = SqliteStorage::open("/no/such/directory/orders.db").await;
/// let error = refused.unwrap_err();
/// assert_eq!(error.kind(), SqliteStorageErrorKind::CantOpen);
/// assert!(error.to_string().contains("create its directory"));
/// # }
/// ```
#[derive(Debug)]
pub struct SqliteStorageError {
    kind: SqliteStorageErrorKind,
    source: Option<BoxError>,
}

/// Why; see [`SqliteStorageError::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SqliteStorageErrorKind {
    /// The path is not UTF-8, or the URL is not one of sqlx.
    Path,
    /// The file can't be opened or created: its directory is missing, or the process has no right to it.
    CantOpen,
    /// The file is not a SQLite database, or an encrypted one.
    NotADatabase,
    /// The database is in memory, so it ends with its last connection.
    InMemory,
    /// The file, its directory or the connection is read-only.
    ReadOnly,
    /// The disk is full, or the file is as large as it may become.
    Full,
    /// The [time limit](crate::SqliteStorage::time_limit) was over: another connection holds the write lock, or the disk is slow.
    Busy,
    /// The file is damaged.
    Damaged,
    /// The table does not exist.
    NotMigrated,
    /// A table of this name exists and has other columns.
    ForeignTable,
    /// The table's name is not one that this library uses.
    TableName,
    /// Anything else; the source tells.
    Other,
}

impl SqliteStorageError {
    pub(super) fn new(kind: SqliteStorageErrorKind) -> Self {
        Self { kind, source: None }
    }

    /// What the driver says.
    pub(super) fn of(error: sqlx::Error) -> Self {
        let kind = match (primary_code(&error), &error) {
            (Some(code), _) => kind_of(code),
            // The driver refuses a path before SQLite sees it.
            (None, sqlx::Error::Configuration(_)) => SqliteStorageErrorKind::Path,
            (None, sqlx::Error::Io(error)) if error.kind() == io::ErrorKind::InvalidData => {
                SqliteStorageErrorKind::Path
            }
            (None, _) => SqliteStorageErrorKind::Other,
        };
        Self {
            kind,
            source: Some(error.into()),
        }
    }

    pub(super) fn other(source: impl Into<BoxError>) -> Self {
        Self {
            kind: SqliteStorageErrorKind::Other,
            source: Some(source.into()),
        }
    }

    pub(super) fn with_kind(self, kind: SqliteStorageErrorKind) -> Self {
        Self { kind, ..self }
    }

    /// Why it failed.
    #[must_use]
    pub fn kind(&self) -> SqliteStorageErrorKind {
        self.kind
    }
}

/// The primary result code of SQLite: <https://www.sqlite.org/rescode.html>.
fn primary_code(error: &sqlx::Error) -> Option<i32> {
    let extended: i32 = error.as_database_error()?.code()?.parse().ok()?;
    Some(extended & 0xff)
}

fn kind_of(code: i32) -> SqliteStorageErrorKind {
    use SqliteStorageErrorKind as Kind;

    match code {
        BUSY | LOCKED => Kind::Busy,
        READONLY => Kind::ReadOnly,
        FULL => Kind::Full,
        CANTOPEN => Kind::CantOpen,
        NOTADB => Kind::NotADatabase,
        CORRUPT => Kind::Damaged,
        _ => Kind::Other,
    }
}

const ERROR: i32 = 1;
const BUSY: i32 = 5;
const LOCKED: i32 = 6;
const READONLY: i32 = 8;
const CORRUPT: i32 = 11;
const FULL: i32 = 13;
const CANTOPEN: i32 = 14;
const TOOBIG: i32 = 18;
const CONSTRAINT: i32 = 19;
const NOTADB: i32 = 26;

/// Whether another connection holds a lock that this one needs.
pub(super) fn is_busy(error: &sqlx::Error) -> bool {
    matches!(primary_code(error), Some(BUSY | LOCKED))
}

/// Whether a statement about a savepoint failed because there is no such savepoint, for which SQLite has no code of its own.
pub(super) fn is_no_savepoint(error: &sqlx::Error) -> bool {
    primary_code(error) == Some(ERROR)
}

/// Whether what was written can't be committed, however often it is tried.
pub(super) fn is_final(error: &sqlx::Error) -> bool {
    matches!(primary_code(error), Some(ERROR | TOOBIG | CONSTRAINT))
}

impl fmt::Display for SqliteStorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use SqliteStorageErrorKind as Kind;

        f.write_str(match self.kind {
            Kind::Path => "this is no path or URL of a SQLite file: give a path in UTF-8, or `sqlite:orders.db`",
            Kind::CantOpen => {
                "the SQLite file can't be opened: create its directory, and let this process read and write both"
            }
            Kind::NotADatabase => "the file is not a SQLite database: name another file",
            Kind::InMemory => {
                "the SQLite database is in memory and would be forgotten: name a file, or use `MemoryStorage`"
            }
            Kind::ReadOnly => {
                "the SQLite database is read-only: let this process write the file and its directory, and don't open it with `mode=ro`"
            }
            Kind::Full => {
                "there is no room for the SQLite database: free some on its disk, or raise `max_page_count`"
            }
            Kind::Busy => {
                "the SQLite database was busy for longer than the time limit: shorten the transactions of whoever else writes, or raise `SqliteStorage::time_limit`"
            }
            Kind::Damaged => {
                "the SQLite database is damaged: restore it from a backup, or with `sqlite3 FILE .recover`"
            }
            Kind::NotMigrated => {
                "the table does not exist: call `SqliteStorage::migrate` when the program starts"
            }
            Kind::ForeignTable => {
                "the table has other columns than this library needs: choose another one with `SqliteStorage::table`"
            }
            Kind::TableName => "the table's name can't be used: choose another one with `SqliteStorage::table`",
            Kind::Other => "SQLite failed",
        })
    }
}

impl Error for SqliteStorageError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<InvalidTableName> for SqliteStorageError {
    fn from(error: InvalidTableName) -> Self {
        Self {
            kind: SqliteStorageErrorKind::TableName,
            source: Some(error.into()),
        }
    }
}

impl From<SqliteStorageError> for StorageError {
    fn from(error: SqliteStorageError) -> Self {
        let kind = match error.kind {
            SqliteStorageErrorKind::Busy => StorageErrorKind::Timeout,
            SqliteStorageErrorKind::Full => StorageErrorKind::Full,
            _ => StorageErrorKind::Unavailable,
        };
        Self::new(kind, error)
    }
}
