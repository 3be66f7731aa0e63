//! Claims and records in a table of a database.

#[cfg(feature = "postgres")]
pub(crate) mod postgres;
pub(crate) mod purge_timer;
#[cfg(feature = "sqlite")]
pub(crate) mod sqlite;
pub(crate) mod table;
