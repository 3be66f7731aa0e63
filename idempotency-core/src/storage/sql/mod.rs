//! Claims and records in a table of a database.

pub(crate) mod purger;
pub(crate) mod table;
