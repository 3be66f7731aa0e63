//! Claims and records in a table of a database.

use crate::{BeginTransaction, Entry, NewTransaction, Record, TombstoneReason};

#[cfg(feature = "postgres")]
pub(crate) mod postgres;
pub(crate) mod purge_timer;
#[cfg(feature = "sqlite")]
pub(crate) mod sqlite;
pub(crate) mod table;

/// The tombstone that an operation leaves which commits by itself.
fn committed_by_hand(claim: &NewTransaction) -> Record {
    Record::tombstone(claim.fingerprint, TombstoneReason::HandlerFailed)
}

/// What a key has that a transaction could not take. Where nothing can be seen, another transaction has it, or it was free a moment
/// later.
fn not_acquired(found: Option<Entry>) -> BeginTransaction {
    match found {
        Some(Entry::Completed(record)) => BeginTransaction::Completed(record),
        Some(Entry::Claimed { fingerprint, .. }) => BeginTransaction::InFlight { fingerprint },
        None => BeginTransaction::InFlight { fingerprint: None },
    }
}
