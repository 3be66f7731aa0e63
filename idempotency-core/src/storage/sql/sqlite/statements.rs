//! The statements. Each is one step on one key, so it is atomic by itself.

use std::{sync::Arc, time::Duration};

use super::{
    database::Statement,
    rows::{self, CLAIMED, COMPLETED},
};
use crate::{
    EncodedKey, Fingerprint, NewClaim, NewTransaction, Record, Token,
    storage::sql::{
        committed_by_hand,
        table::{InvalidTableName, TableName},
    },
};

/// The time in milliseconds since 1970: the first value, or the machine's time of day. SQLite reads that once for a statement, and
/// after it has the write lock.
const NOW: &str = "coalesce(?1, CAST(unixepoch('subsec') * 1000 + 0.5 AS INTEGER))";

/// The schema, with [`TableName::DEFAULT`] for the table.
const SCHEMA: &str = include_str!("schema.sql");

/// The columns that a table must have.
pub(super) const COLUMNS: [&str; 8] = [
    "key",
    "state",
    "token",
    "value",
    "checksum",
    "expires_at",
    "recovery_point",
    "resume_until",
];

/// The statements for one table.
pub(super) struct Statements {
    look: Arc<str>,
    claim: Arc<str>,
    complete: Arc<str>,
    renew: Arc<str>,
    release: Arc<str>,
    replace: Arc<str>,
    remove: Arc<str>,
    purge: Arc<str>,
    enter: Arc<str>,
    record: Arc<str>,
    advance: Arc<str>,
    resume: Arc<str>,
    stop: Arc<str>,
    columns: Arc<str>,
    probe: String,
    schema: [String; 2],
    schema_name: String,
    table_name: String,
}

/// The time for a statement: `None` is the machine's time of day.
pub(super) type Now = Option<i64>;

impl Statements {
    pub(super) fn new(table: &TableName) -> Result<Self, InvalidTableName> {
        let (t, name) = (table.quoted()?, table.unqualified()?);
        // Only a name in quotes can have a dot between.
        let schema_name = match t.split_once('.') {
            Some((schema, _)) => schema.trim_matches('"').to_owned(),
            None => "main".to_owned(),
        };
        // A claim at a recovery point is kept after its lease is over, for a retry to go on.
        let is_old = |row: &str| {
            format!(
                "{row}expires_at <= {NOW} AND ({row}resume_until IS NULL OR {row}resume_until <= {NOW})"
            )
        };
        let (is_old, old_is_old) = (is_old(""), is_old("old."));
        Ok(Self {
            look: format!(
                "SELECT state, token, value, checksum, expires_at - {NOW} FROM {t} WHERE key = ?2 AND NOT ({is_old})"
            )
            .into(),
            claim: format!(
                "INSERT INTO {t} AS old (key, state, token, value, checksum, expires_at) VALUES (?2, ?3, ?4, ?5, ?6, {NOW} + ?7) \
                 ON CONFLICT (key) DO UPDATE SET state = excluded.state, token = excluded.token, value = excluded.value, \
                 checksum = excluded.checksum, expires_at = excluded.expires_at, \
                 recovery_point = NULL, resume_until = NULL \
                 WHERE ({old_is_old}) OR (old.state = '{CLAIMED}' AND old.token = excluded.token) \
                 RETURNING 1"
            )
            .into(),
            // Where the token completed the key before, its record stays and its TTL starts anew.
            complete: format!(
                "INSERT INTO {t} AS old (key, state, token, value, checksum, expires_at) VALUES (?2, ?3, ?4, ?5, ?6, {NOW} + ?7) \
                 ON CONFLICT (key) DO UPDATE SET state = excluded.state, token = excluded.token, \
                 value = CASE WHEN old.state = '{COMPLETED}' AND old.expires_at > {NOW} THEN old.value ELSE excluded.value END, \
                 checksum = excluded.checksum, expires_at = excluded.expires_at, \
                 recovery_point = NULL, resume_until = NULL \
                 WHERE ({old_is_old}) OR (old.state IN ('{CLAIMED}', '{COMPLETED}') AND old.token = excluded.token) \
                 RETURNING 1"
            )
            .into(),
            renew: format!(
                "UPDATE {t} SET expires_at = {NOW} + ?4 WHERE key = ?2 AND state = '{CLAIMED}' AND token = ?3 RETURNING 1"
            )
            .into(),
            release: format!(
                "DELETE FROM {t} WHERE key = ?2 AND state = '{CLAIMED}' AND token = ?3 RETURNING 1"
            )
            .into(),
            replace: format!(
                "UPDATE {t} SET value = ?3, expires_at = {NOW} + ?4 \
                 WHERE key = ?2 AND state = '{COMPLETED}' AND expires_at > {NOW} RETURNING 1"
            )
            .into(),
            remove: format!("DELETE FROM {t} WHERE key = ?2 RETURNING expires_at > {NOW}").into(),
            purge: format!(
                "DELETE FROM {t} WHERE rowid IN (SELECT rowid FROM {t} WHERE {is_old} LIMIT ?2) RETURNING 1"
            )
            .into(),
            // As `claim`, but what it inserts is a record, no token holds the key already, and a claim at a recovery point is taken over
            // by the same request once its lease is over.
            enter: format!(
                "INSERT INTO {t} AS old (key, state, token, value, checksum, expires_at) VALUES (?2, ?3, ?4, ?5, ?6, {NOW} + ?7) \
                 ON CONFLICT (key) DO UPDATE SET state = excluded.state, token = excluded.token, value = excluded.value, \
                 checksum = excluded.checksum, expires_at = excluded.expires_at, \
                 recovery_point = CASE WHEN old.resume_until > {NOW} THEN old.recovery_point END, resume_until = NULL \
                 WHERE ({old_is_old}) OR (old.expires_at <= {NOW} AND old.state = '{CLAIMED}' AND old.value = ?8) \
                 RETURNING recovery_point"
            )
            .into(),
            record: format!(
                "UPDATE {t} SET value = ?4, expires_at = {NOW} + ?5, recovery_point = NULL, resume_until = NULL \
                 WHERE key = ?2 AND state = '{COMPLETED}' AND token = ?3 RETURNING 1"
            )
            .into(),
            advance: format!(
                "UPDATE {t} SET state = '{CLAIMED}', value = ?4, checksum = ?5, expires_at = {NOW} + ?6, \
                 recovery_point = ?7, resume_until = {NOW} + ?8 \
                 WHERE key = ?2 AND state = '{COMPLETED}' AND token = ?3 RETURNING 1"
            )
            .into(),
            resume: format!(
                "UPDATE {t} SET state = '{COMPLETED}', value = ?4, checksum = ?5, expires_at = {NOW} + ?6, \
                 recovery_point = NULL, resume_until = NULL \
                 WHERE key = ?2 AND state = '{CLAIMED}' AND token = ?3 RETURNING 1"
            )
            .into(),
            stop: format!(
                "UPDATE {t} SET expires_at = {NOW} WHERE key = ?2 AND state = '{CLAIMED}' AND token = ?3 RETURNING 1"
            )
            .into(),
            probe: format!("DELETE FROM {t} WHERE key = x''"),
            columns: "SELECT name FROM pragma_table_info(?1, ?2)".into(),
            schema: schema(&t, &name),
            schema_name,
            table_name: name,
        })
    }

    /// What makes the table and its index, if they do not exist.
    pub(super) fn schema(&self) -> [Statement; 2] {
        self.schema.each_ref().map(|sql| Statement::new(&**sql))
    }

    /// Changes nothing, and fails where nothing can be changed. (`BEGIN IMMEDIATE` would not.)
    pub(super) fn probe(&self) -> Statement {
        Statement::new(&*self.probe)
    }

    /// The names of the table's columns; none if it does not exist.
    pub(super) fn columns(&self) -> Statement {
        Statement::new(self.columns.clone())
            .text(self.table_name.clone())
            .text(self.schema_name.clone())
    }

    /// Reads the row of a key, unless it has expired.
    pub(super) fn look(&self, now: Now, key: &EncodedKey) -> Statement {
        on(&self.look, now, key)
    }

    /// Returns a row if the claim is stored.
    pub(super) fn claim(&self, now: Now, key: &EncodedKey, claim: &NewClaim) -> Statement {
        let value = claimed_value(claim.fingerprint.as_ref());
        let checksum = rows::claim_checksum(key, claim.token, &value);
        on(&self.claim, now, key)
            .text(CLAIMED)
            .bytes(*claim.token.as_bytes())
            .bytes(value)
            .number(checksum)
            .number(milliseconds(claim.lease))
    }

    /// Returns a row if the record is stored, or was before.
    pub(super) fn complete(
        &self,
        now: Now,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Statement {
        on(&self.complete, now, key)
            .text(COMPLETED)
            .bytes(*token.as_bytes())
            .bytes(record.encode())
            .number(rows::record_checksum(key, token))
            .number(milliseconds(ttl))
    }

    /// Returns a row if the claim is the token's.
    pub(super) fn renew(
        &self,
        now: Now,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Statement {
        on(&self.renew, now, key)
            .bytes(*token.as_bytes())
            .number(milliseconds(lease))
    }

    /// Returns a row if the claim was the token's.
    pub(super) fn release(&self, key: &EncodedKey, token: Token) -> Statement {
        on(&self.release, None, key).bytes(*token.as_bytes())
    }

    /// Returns a row if there was a record.
    pub(super) fn replace(
        &self,
        now: Now,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Statement {
        on(&self.replace, now, key)
            .bytes(record.encode())
            .number(milliseconds(ttl))
    }

    /// Returns a row if there was one, and in it whether that had not expired.
    pub(super) fn remove(&self, now: Now, key: &EncodedKey) -> Statement {
        on(&self.remove, now, key)
    }

    /// Inserts what an operation leaves that commits its transaction by itself. Returns a row if it did, and in it the recovery point at
    /// which an attempt before stopped.
    pub(super) fn enter(&self, now: Now, key: &EncodedKey, claim: &NewTransaction) -> Statement {
        on(&self.enter, now, key)
            .text(COMPLETED)
            .bytes(*claim.token.as_bytes())
            .bytes(committed_by_hand(claim).encode())
            .number(rows::record_checksum(key, claim.token))
            .number(milliseconds(claim.ttl))
            .bytes(claimed_value(claim.fingerprint.as_ref()))
    }

    /// Puts the record in the place of what [`enter`](Self::enter) inserted. Returns a row if that is there.
    pub(super) fn record(
        &self,
        now: Now,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Statement {
        on(&self.record, now, key)
            .bytes(*token.as_bytes())
            .bytes(record.encode())
            .number(milliseconds(ttl))
    }

    /// Puts a claim at a recovery point in its place. Returns a row if that is there.
    pub(super) fn advance(
        &self,
        now: Now,
        key: &EncodedKey,
        claim: &NewTransaction,
        point: &str,
        lease: Duration,
    ) -> Statement {
        let value = claimed_value(claim.fingerprint.as_ref());
        let checksum = rows::claim_checksum(key, claim.token, &value);
        on(&self.advance, now, key)
            .bytes(*claim.token.as_bytes())
            .bytes(value)
            .number(checksum)
            .number(milliseconds(lease))
            .text(point.to_owned())
            .number(milliseconds(claim.ttl))
    }

    /// The opposite of [`advance`](Self::advance). Returns a row if the claim is the token's.
    pub(super) fn resume(&self, now: Now, key: &EncodedKey, claim: &NewTransaction) -> Statement {
        on(&self.resume, now, key)
            .bytes(*claim.token.as_bytes())
            .bytes(committed_by_hand(claim).encode())
            .number(rows::record_checksum(key, claim.token))
            .number(milliseconds(claim.ttl))
    }

    /// Ends the lease of a claim at a recovery point. Returns a row if it is the token's.
    pub(super) fn stop(&self, now: Now, key: &EncodedKey, token: Token) -> Statement {
        on(&self.stop, now, key).bytes(*token.as_bytes())
    }

    /// Returns a row for each that was removed, up to `most`.
    pub(super) fn purge(&self, now: Now, most: i64) -> Statement {
        Statement::new(self.purge.clone()).number(now).number(most)
    }
}

/// The value of a claim's row.
fn claimed_value(fingerprint: Option<&Fingerprint>) -> Vec<u8> {
    fingerprint.map_or_else(Vec::new, |print| print.as_bytes().to_vec())
}

fn on(sql: &Arc<str>, now: Now, key: &EncodedKey) -> Statement {
    Statement::new(sql.clone())
        .number(now)
        .bytes(*key.as_bytes())
}

/// The statements of `schema.sql` for another table.
fn schema(quoted: &str, name: &str) -> [String; 2] {
    let default = TableName::DEFAULT;
    // SQLite wants the schema before the index's name, and not before the table's.
    let of_index = format!("{}_expires_at\"", quoted.trim_end_matches('"'));
    let code = SCHEMA
        .lines()
        .filter(|line| !line.trim_start().starts_with("--"));
    let code = code.collect::<Vec<_>>().join("\n");
    let (table, index) = code.split_once(';').unwrap_or_default();
    [
        table.replacen(&format!("\"{default}\""), quoted, 1),
        index
            .trim()
            .trim_end_matches(';')
            .replace(&format!("\"{default}_expires_at\""), &of_index)
            .replace(&format!("\"{default}\""), &format!("\"{name}\"")),
    ]
}

/// A duration as the table counts: whole milliseconds, at least one, at most a hundred years, so that no sum of it and the time of
/// day is too large.
pub(super) fn milliseconds(duration: Duration) -> i64 {
    const LONGEST: u128 = 100 * 366 * 24 * 3600 * 1000;
    let rounded_up = duration.as_nanos().div_ceil(1_000_000);
    i64::try_from(rounded_up.clamp(1, LONGEST)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_schema_is_made_for_any_table() {
        let table = TableName::new("idempotency");
        let made = schema(&table.quoted().unwrap(), "idempotency");
        assert!(made[0].starts_with("CREATE TABLE IF NOT EXISTS \"idempotency\" ("));
        let table = TableName::new("main.shop");
        let made = schema(&table.quoted().unwrap(), "shop");
        assert!(made[0].starts_with("CREATE TABLE IF NOT EXISTS \"main\".\"shop\" ("));
        assert_eq!(
            made[1],
            "CREATE INDEX IF NOT EXISTS \"main\".\"shop_expires_at\" ON \"shop\" (expires_at)"
        );
    }

    #[test]
    fn durations_are_rounded_up_and_bounded() {
        for (duration, expected) in [
            (Duration::ZERO, 1),
            (Duration::from_micros(1_001), 2),
            (Duration::from_secs(30), 30_000),
            (Duration::MAX, 3_162_240_000_000),
        ] {
            assert_eq!(milliseconds(duration), expected, "{duration:?}");
        }
    }
}
