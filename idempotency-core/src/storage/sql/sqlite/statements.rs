//! The statements. Each is one step on one key, so it is atomic by itself.

use std::{sync::Arc, time::Duration};

use super::{
    database::Statement,
    rows::{self, CLAIMED, COMPLETED},
};
use crate::{
    EncodedKey, Fingerprint, NewClaim, Record, Token,
    storage::sql::table::{InvalidTableName, TableName},
};

/// The time in milliseconds since 1970: the first value, or the machine's time of day. SQLite reads that once for a statement, and
/// after it has the write lock.
const NOW: &str = "coalesce(?1, CAST(unixepoch('subsec') * 1000 + 0.5 AS INTEGER))";

/// The schema, with [`TableName::DEFAULT`] for the table.
const SCHEMA: &str = include_str!("schema.sql");

/// The columns that a table must have.
pub(super) const COLUMNS: [&str; 6] = ["key", "state", "token", "value", "checksum", "expires_at"];

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
        Ok(Self {
            look: format!(
                "SELECT state, token, value, checksum, expires_at - {NOW} FROM {t} WHERE key = ?2 AND expires_at > {NOW}"
            )
            .into(),
            claim: format!(
                "INSERT INTO {t} AS old (key, state, token, value, checksum, expires_at) VALUES (?2, ?3, ?4, ?5, ?6, {NOW} + ?7) \
                 ON CONFLICT (key) DO UPDATE SET state = excluded.state, token = excluded.token, value = excluded.value, \
                 checksum = excluded.checksum, expires_at = excluded.expires_at \
                 WHERE old.expires_at <= {NOW} OR (old.state = '{CLAIMED}' AND old.token = excluded.token) \
                 RETURNING 1"
            )
            .into(),
            // Where the token completed the key before, its record stays and its TTL starts anew.
            complete: format!(
                "INSERT INTO {t} AS old (key, state, token, value, checksum, expires_at) VALUES (?2, ?3, ?4, ?5, ?6, {NOW} + ?7) \
                 ON CONFLICT (key) DO UPDATE SET state = excluded.state, token = excluded.token, \
                 value = CASE WHEN old.state = '{COMPLETED}' AND old.expires_at > {NOW} THEN old.value ELSE excluded.value END, \
                 checksum = excluded.checksum, expires_at = excluded.expires_at \
                 WHERE old.expires_at <= {NOW} OR (old.state IN ('{CLAIMED}', '{COMPLETED}') AND old.token = excluded.token) \
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
                "DELETE FROM {t} WHERE rowid IN (SELECT rowid FROM {t} WHERE expires_at <= {NOW} LIMIT ?2) RETURNING 1"
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
        let fingerprint = claim.fingerprint.as_ref().map(Fingerprint::as_bytes);
        let value = fingerprint.map_or(&[][..], |print| &print[..]);
        on(&self.claim, now, key)
            .text(CLAIMED)
            .bytes(*claim.token.as_bytes())
            .bytes(value)
            .number(rows::claim_checksum(key, claim.token, value))
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

    /// Returns a row for each that was removed, up to `most`.
    pub(super) fn purge(&self, now: Now, most: i64) -> Statement {
        Statement::new(self.purge.clone()).number(now).number(most)
    }
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
