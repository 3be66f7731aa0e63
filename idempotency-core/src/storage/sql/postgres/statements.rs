//! The statements. Each is one atomic step; the server's clock decides what has expired.
//!
//! `clock_timestamp()` is the time of day when it is evaluated, which may be long after the statement began if it waited for a lock.
//! `now()` would be the time when the transaction began.
//!
//! The end of a claim is notified by the statement that ends it, and only if the row says that somebody waits: commits that notify
//! queue behind each other in the whole server.

use super::super::table::{InvalidTableName, TableName};

/// What is returned of a row: see [`row`](super::row).
const ROW: &str = "token, fingerprint, record, checksum, \
    ceil(extract(epoch FROM expires_at - clock_timestamp()) * 1000)::bigint AS lease_left";

/// The same columns, for a key whose row can't be seen.
const NO_ROW: &str = "NULL::bytea, NULL::bytea, NULL::bytea, NULL::bigint, NULL::bigint";

const LEASE_LEFT: &str =
    "ceil(extract(epoch FROM expires_at - clock_timestamp()) * 1000)::bigint AS lease_left";

/// Whether the row was written by the current transaction.
const OURS: &str = "xmin = (txid_current() & 4294967295::bigint)::text::xid";

/// The statements for one table.
pub(super) struct Statements {
    pub(super) begin: String,
    pub(super) complete: String,
    pub(super) renew: String,
    pub(super) release: String,
    pub(super) get: String,
    pub(super) replace: String,
    pub(super) remove: String,
    pub(super) look: String,
    pub(super) mark: String,
    pub(super) purge: String,
    pub(super) enter: String,
    pub(super) record: String,
    pub(super) advance: String,
    pub(super) resume: String,
    pub(super) stop: String,
    pub(super) recorded: String,
    pub(super) exists: String,
    pub(super) columns: String,
    pub(super) create: String,
    pub(super) channel: String,
    pub(super) hello: String,
}

impl Statements {
    pub(super) fn new(table: &TableName) -> Result<Self, InvalidTableName> {
        let (t, last) = (table.quoted()?, table.unqualified()?);
        // The number of the table is the same by whatever name and search path it is found.
        let channel = format!("'idempotency_' || '{t}'::regclass::oid::text");
        let notify = |whom| {
            format!(
                "CASE WHEN awaited THEN pg_notify({channel}, '{whom} ' || encode(key, 'hex'))::text END"
            )
        };
        let (all, one) = (notify("all"), notify("one"));
        // With the number of the table, so that tables share no locks.
        let lock =
            |mode, number| format!("{mode}({number} # ('{t}'::regclass::oid::bigint << 32))");
        // Of the first eight bytes of the key, which is a hash.
        let number = "('x' || encode(substring($1::bytea FROM 1 FOR 8), 'hex'))::bit(64)::bigint";
        let share = lock("pg_try_advisory_xact_lock_shared", number);
        let hold = lock("pg_try_advisory_xact_lock", number);
        let take = lock("pg_advisory_xact_lock", number);
        // A claim at a recovery point is kept after its lease is over, for a retry to go on.
        let old = |row: &str| {
            format!(
                "{row}expires_at <= clock_timestamp() \
                 AND ({row}resume_until IS NULL OR {row}resume_until <= clock_timestamp())"
            )
        };
        let (old_kept, old_row) = (old("kept."), old(""));
        Ok(Self {
            // Looks first, so that a replay writes nothing: `ON CONFLICT DO UPDATE` locks the row, which is a write, also where its
            // WHERE is false. A row that is committed after the look is not overwritten either; the statement then returns nothing.
            begin: format!(
                "WITH found AS MATERIALIZED (\
                   SELECT {ROW} FROM {t} \
                   WHERE key = $1::bytea AND NOT ({old_row}) \
                     AND NOT (token = $2::bytea AND record IS NULL)\
                 ), free AS MATERIALIZED (\
                   SELECT {share} AS is_free WHERE NOT EXISTS (SELECT FROM found)\
                 ), taken AS (\
                   INSERT INTO {t} AS kept (key, token, fingerprint, checksum, expires_at) \
                   SELECT $1::bytea, $2::bytea, $3::bytea, $4::bigint, \
                     clock_timestamp() + make_interval(secs => $5::float8) \
                   FROM free WHERE is_free \
                   ON CONFLICT (key) DO UPDATE SET token = EXCLUDED.token, \
                     fingerprint = EXCLUDED.fingerprint, record = NULL, \
                     checksum = EXCLUDED.checksum, expires_at = EXCLUDED.expires_at, \
                     recovery_point = NULL, resume_until = NULL \
                   WHERE ({old_kept}) \
                     OR (kept.token = EXCLUDED.token AND kept.record IS NULL) \
                   RETURNING {ROW}\
                 ) SELECT false AS taken, false AS busy, * FROM found \
                 UNION ALL SELECT true, false, * FROM taken \
                 UNION ALL SELECT false, true, {NO_ROW} FROM free WHERE NOT is_free"
            ),
            // Where the token has completed the key before, its record stays.
            complete: format!(
                "WITH stored AS (\
                   INSERT INTO {t} AS kept (key, token, record, checksum, expires_at) \
                   VALUES ($1::bytea, $2::bytea, $3::bytea, $4::bigint, \
                     clock_timestamp() + make_interval(secs => $5::float8)) \
                   ON CONFLICT (key) DO UPDATE SET token = EXCLUDED.token, fingerprint = NULL, \
                     record = CASE WHEN kept.record IS NOT NULL AND kept.token = EXCLUDED.token \
                       AND kept.expires_at > clock_timestamp() \
                       THEN kept.record ELSE EXCLUDED.record END, \
                     checksum = EXCLUDED.checksum, expires_at = EXCLUDED.expires_at, \
                     recovery_point = NULL, resume_until = NULL \
                   WHERE kept.token = EXCLUDED.token OR ({old_kept}) \
                   RETURNING key, awaited\
                 ) SELECT {all} FROM stored"
            ),
            renew: format!(
                "UPDATE {t} SET expires_at = clock_timestamp() + make_interval(secs => $3::float8) \
                 WHERE key = $1::bytea AND token = $2::bytea AND record IS NULL RETURNING true"
            ),
            release: format!(
                "WITH gone AS (\
                   DELETE FROM {t} WHERE key = $1::bytea AND token = $2::bytea AND record IS NULL \
                   RETURNING key, awaited\
                 ) SELECT {one} FROM gone"
            ),
            get: format!("SELECT {ROW} FROM {t} WHERE key = $1::bytea AND NOT ({old_row})"),
            replace: format!(
                "UPDATE {t} SET record = $2::bytea, \
                   expires_at = clock_timestamp() + make_interval(secs => $3::float8) \
                 WHERE key = $1::bytea AND record IS NOT NULL AND expires_at > clock_timestamp() \
                 RETURNING token, checksum"
            ),
            remove: format!(
                "WITH gone AS (\
                   DELETE FROM {t} WHERE key = $1::bytea \
                   RETURNING key, awaited, expires_at > clock_timestamp() AS lives\
                 ) SELECT lives, {all} FROM gone"
            ),
            // A key without a row may have an open transaction, whose end is not notified.
            look: format!(
                "WITH found AS MATERIALIZED (\
                   SELECT record IS NOT NULL AS is_completed, true AS is_marked, {LEASE_LEFT} \
                   FROM {t} WHERE key = $1::bytea AND expires_at > clock_timestamp()\
                 ) SELECT * FROM found UNION ALL SELECT false, true, NULL::bigint \
                 WHERE NOT EXISTS (SELECT FROM found) AND NOT {share}"
            ),
            // The outer SELECT sees the row as it was when the statement began. If the claim ended since, nothing is marked.
            mark: format!(
                "WITH marked AS (\
                   UPDATE {t} SET awaited = true \
                   WHERE key = $1::bytea AND record IS NULL AND NOT awaited \
                     AND expires_at > clock_timestamp() \
                   RETURNING 1\
                 ), found AS MATERIALIZED (\
                   SELECT record IS NOT NULL AS is_completed, \
                     awaited OR EXISTS (SELECT FROM marked) AS is_marked, {LEASE_LEFT} \
                   FROM {t} WHERE key = $1::bytea AND expires_at > clock_timestamp()\
                 ) SELECT * FROM found UNION ALL SELECT false, true, NULL::bigint \
                 WHERE NOT EXISTS (SELECT FROM found) AND NOT {share}"
            ),
            // The inner SELECT makes the time a constant, without which the index is of no use. A row that another statement has
            // locked is left to the next purge.
            purge: format!(
                "WITH old AS MATERIALIZED (\
                   SELECT key FROM {t} WHERE expires_at <= (SELECT clock_timestamp()) \
                     AND (resume_until IS NULL OR resume_until <= clock_timestamp()) \
                   ORDER BY expires_at LIMIT $1::bigint FOR UPDATE SKIP LOCKED\
                 ), gone AS (\
                   DELETE FROM {t} AS kept USING old WHERE kept.key = old.key RETURNING 1\
                 ) SELECT count(*) FROM gone"
            ),
            // As `begin`, but what it inserts is a record, no token holds the key already, and a claim at a recovery point is taken over
            // once its lease is over.
            enter: format!(
                "WITH found AS MATERIALIZED (\
                   SELECT {ROW} FROM {t} \
                   WHERE key = $1::bytea AND (expires_at > clock_timestamp() \
                     OR (resume_until > clock_timestamp() AND fingerprint IS DISTINCT FROM $6::bytea))\
                 ), free AS MATERIALIZED (\
                   SELECT {hold} AS is_free WHERE NOT EXISTS (SELECT FROM found)\
                 ), taken AS (\
                   INSERT INTO {t} AS kept (key, token, record, checksum, expires_at) \
                   SELECT $1::bytea, $2::bytea, $3::bytea, $4::bigint, \
                     clock_timestamp() + make_interval(secs => $5::float8) \
                   FROM free WHERE is_free \
                   ON CONFLICT (key) DO UPDATE SET token = EXCLUDED.token, fingerprint = NULL, \
                     record = EXCLUDED.record, checksum = EXCLUDED.checksum, \
                     expires_at = EXCLUDED.expires_at, resume_until = NULL, \
                     recovery_point = CASE WHEN kept.resume_until > clock_timestamp() \
                       THEN kept.recovery_point END \
                   WHERE kept.expires_at <= clock_timestamp() \
                   RETURNING recovery_point, {ROW}\
                 ) SELECT false AS taken, false AS busy, 0::bigint AS transaction, \
                   NULL::text AS recovery_point, * FROM found \
                 UNION ALL SELECT true, false, txid_current(), * FROM taken \
                 UNION ALL SELECT false, true, 0, NULL, {NO_ROW} FROM free WHERE NOT is_free"
            ),
            // `xmin` is the transaction that wrote the row. If that is not the current one, the operation has ended our transaction
            // itself.
            record: format!(
                "UPDATE {t} SET record = $3::bytea, fingerprint = NULL, checksum = $5::bigint, \
                   expires_at = clock_timestamp() + make_interval(secs => $4::float8), \
                   recovery_point = NULL, resume_until = NULL \
                 WHERE key = $1::bytea AND token = $2::bytea AND {OURS} RETURNING true"
            ),
            advance: format!(
                "UPDATE {t} SET record = NULL, fingerprint = $3::bytea, checksum = $4::bigint, \
                   expires_at = clock_timestamp() + make_interval(secs => $5::float8), \
                   recovery_point = convert_from($6::bytea, 'UTF8'), \
                   resume_until = clock_timestamp() + make_interval(secs => $7::float8) \
                 WHERE key = $1::bytea AND token = $2::bytea AND {OURS} RETURNING true"
            ),
            // Only who held the lock before can have a claim of this token in its way.
            resume: format!(
                "WITH mine AS MATERIALIZED (SELECT {take}) \
                 UPDATE {t} SET record = $3::bytea, fingerprint = NULL, checksum = $4::bigint, \
                   expires_at = clock_timestamp() + make_interval(secs => $5::float8) \
                 FROM mine WHERE key = $1::bytea AND token = $2::bytea AND record IS NULL \
                 RETURNING txid_current() AS transaction"
            ),
            stop: format!(
                "UPDATE {t} SET expires_at = clock_timestamp() \
                 WHERE key = $1::bytea AND token = $2::bytea AND record IS NULL RETURNING true"
            ),
            recorded: format!(
                "SELECT true AS is_recorded FROM {t} \
                 WHERE key = $1::bytea AND token = $2::bytea AND record IS NOT NULL"
            ),
            exists: format!("SELECT to_regclass('{t}') IS NOT NULL"),
            columns: format!(
                "SELECT key, token, fingerprint, record, checksum, awaited, expires_at, recovery_point, resume_until FROM {t} LIMIT 0"
            ),
            create: format!(
                "SELECT pg_advisory_xact_lock({});\n{}",
                lock_number(&t),
                include_str!("schema.sql")
                    .replace(
                        "\"idempotency_expires_at\"",
                        &format!("\"{last}_expires_at\"")
                    )
                    .replace("\"idempotency\"", &t)
            ),
            channel: format!("SELECT {channel}"),
            hello: format!(
                "SELECT pg_notify({channel}, 'hello ' || encode($1::bytea, 'hex'))::text"
            ),
        })
    }
}

/// Which advisory lock keeps two migrations of a table apart.
fn lock_number(table: &str) -> i64 {
    // "idem", and what tells tables apart.
    (0x6964_656d << 32) | i64::from(crc32fast::hash(table.as_bytes()))
}
