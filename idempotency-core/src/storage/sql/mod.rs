//! Claims and records in a table of a database.

#[cfg(feature = "postgres")]
pub(crate) mod postgres;
pub(crate) mod purger;
pub(crate) mod table;
