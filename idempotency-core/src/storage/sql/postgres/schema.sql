-- The table of `PostgresStorage`: a row for each claim and each record. `PostgresStorage::migrate` runs this file with the name of
-- your table; it can as well be a step of your own migrations.
CREATE TABLE IF NOT EXISTS "idempotency" (
    -- The encoded key: a SHA-256.
    key         bytea       PRIMARY KEY CHECK (octet_length(key) = 32),
    -- Who claimed the key, or completed it.
    token       bytea       NOT NULL CHECK (octet_length(token) = 16),
    -- What the request of a claim was. A record has it inside.
    fingerprint bytea       CHECK (octet_length(fingerprint) = 32),
    -- `Record::encode`, which has a checksum of its own. NULL: this is a claim.
    record      bytea,
    -- CRC-32 (ISO-HDLC) of `c1` or `r1`, key, token and, of a claim, fingerprint.
    checksum    bigint      NOT NULL,
    -- Whether the end of the claim is to be notified.
    awaited     boolean     NOT NULL DEFAULT false,
    -- When the lease or the TTL is over. From then on the row counts as absent.
    expires_at  timestamptz NOT NULL,
    -- Of a claim whose operation has committed a part of its work: where a retry goes on, and until when it may.
    recovery_point text,
    resume_until   timestamptz
) WITH (autovacuum_vacuum_scale_factor = 0.05);

-- For `PostgresStorage::purge_expired`.
CREATE INDEX IF NOT EXISTS "idempotency_expires_at" ON "idempotency" (expires_at);
