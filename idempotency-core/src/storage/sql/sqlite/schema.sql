-- The table of a `SqliteStorage`, as `SqliteStorage::migrate` makes it. Here it has the default name, `idempotency`.
CREATE TABLE IF NOT EXISTS "idempotency" (
    -- The encoded key: 32 bytes.
    key        BLOB    NOT NULL PRIMARY KEY,
    -- 'claimed' while the operation runs, 'completed' once its outcome is recorded.
    state      TEXT    NOT NULL,
    -- The token of the claim that holds or completed the key: 16 bytes.
    token      BLOB    NOT NULL,
    -- Of a claim: the fingerprint of its request, or nothing. Of a record: what `Record::encode` makes.
    value      BLOB    NOT NULL,
    -- CRC-32 of key, state and token, and of a claim's value. An encoded record has a checksum of its own.
    checksum   INTEGER NOT NULL,
    -- When the lease or the TTL is over, in milliseconds since 1970. The row counts as absent from then on.
    expires_at INTEGER NOT NULL,
    -- Of a claim whose operation has committed a part of its work: where a retry goes on, and until when it may. Such a claim is kept
    -- until then.
    recovery_point TEXT,
    resume_until   INTEGER
) STRICT;

-- For `purge_expired`.
CREATE INDEX IF NOT EXISTS "idempotency_expires_at" ON "idempotency" (expires_at);
