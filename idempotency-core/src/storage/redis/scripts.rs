//! The Lua scripts. Each is one step on one key, so it is atomic, also in a Cluster.
//!
//! Every script reads only the [first bytes](super::layout) of a value. It notifies waiters by `PUBLISH` on the channel with the name
//! of the key: `all` when there is a record, `one` when the key is free. `PUBLISH` is called by `pcall`, so that a user without a right
//! to the channel can still complete and release claims; waiters then poll.

use std::sync::LazyLock;

use redis::{RedisResult, aio::ConnectionLike};

/// A script and its SHA-1, by which `EVALSHA` calls it.
pub(super) struct Script {
    pub(super) code: String,
    pub(super) hash: String,
}

impl Script {
    fn new(code: &str) -> Self {
        Self {
            code: code.to_owned(),
            hash: redis::Script::new(code).get_hash().to_owned(),
        }
    }
}

/// The key is as the script should leave it.
pub(super) const DONE: i64 = 1;
/// The key has no claim of the token, or no record to replace. Nothing was changed.
pub(super) const NOT_HELD: i64 = 0;
/// The key has neither a claim nor a record. Nothing was changed.
pub(super) const FOREIGN: i64 = -1;
/// The key has another value than the one that was read. Nothing was removed.
pub(super) const CHANGED: i64 = -1;
/// The key does not exist.
pub(super) const FREE: i64 = -1;

/// Token, value, TTL in milliseconds. Stores the value if the token holds the claim or the key does not exist. If the token has
/// completed the key before, the record stays and its TTL restarts. Returns [`DONE`], [`NOT_HELD`] or [`FOREIGN`].
const COMPLETE_CODE: &str = "\
local head = redis.call('GETRANGE', KEYS[1], 0, 17)
local kind = string.sub(head, 1, 2)
if kind == 'c1' or kind == 'r1' then
  if string.sub(head, 3) ~= ARGV[1] then return 0 end
  if kind == 'r1' then
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return 1
  end
elseif head ~= '' or redis.call('EXISTS', KEYS[1]) == 1 then
  return -1
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.pcall('PUBLISH', KEYS[1], 'all')
return 1
";

pub(super) static COMPLETE: LazyLock<Script> = LazyLock::new(|| Script::new(COMPLETE_CODE));

/// [`COMPLETE`] for a tombstone, sent after a server without free memory refused the record. It is about as small as the claim that it
/// replaces.
pub(super) static COMPLETE_SMALL: LazyLock<Script> =
    LazyLock::new(|| Script::new(&format!("#!lua flags=allow-oom\n{COMPLETE_CODE}")));

/// Token, lease in milliseconds.
const RENEW_CODE: &str = "\
if redis.call('GETRANGE', KEYS[1], 0, 17) ~= 'c1' .. ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
";

pub(super) static RENEW: LazyLock<Script> = LazyLock::new(|| Script::new(RENEW_CODE));

/// Token.
const RELEASE_CODE: &str = "\
if redis.call('GETRANGE', KEYS[1], 0, 17) ~= 'c1' .. ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.pcall('PUBLISH', KEYS[1], 'one')
return 1
";

pub(super) static RELEASE: LazyLock<Script> = LazyLock::new(|| Script::new(RELEASE_CODE));

/// The encoded record, TTL in milliseconds. Keeps the token that completed the key, and the checksum of that.
const REPLACE_CODE: &str = "\
local head = redis.call('GETRANGE', KEYS[1], 0, 21)
local kind = string.sub(head, 1, 2)
if kind == 'r1' then
  redis.call('SET', KEYS[1], head .. ARGV[1], 'PX', ARGV[2])
  return 1
end
if kind == 'c1' or (head == '' and redis.call('EXISTS', KEYS[1]) == 0) then return 0 end
return -1
";

pub(super) static REPLACE: LazyLock<Script> = LazyLock::new(|| Script::new(REPLACE_CODE));

/// The first bytes that were read, or [`NOT_BYTES`]. Compares and deletes, so that it removes no newer claim or record.
pub(super) static REMOVE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(&format!(
        "\
local head = redis.pcall('GETRANGE', KEYS[1], 0, 17)
if type(head) == 'table' then head = '{NOT_BYTES}' end
if head ~= ARGV[1] then return -redis.call('EXISTS', KEYS[1]) end
local removed = redis.call('DEL', KEYS[1])
if removed == 1 then redis.pcall('PUBLISH', KEYS[1], 'all') end
return removed
"
    ))
});

/// Stands for the first bytes of a list, a set and so on in [`REMOVE`].
pub(super) const NOT_BYTES: &str = "not bytes";

/// The rest of the claim's lease in milliseconds; [`FREE`]; or less if there is a record. A claim without an expiry, which somebody
/// has persisted, has a minute left.
const LEASE_LEFT_CODE: &str = "\
local kind = redis.call('GETRANGE', KEYS[1], 0, 1)
if kind == '' then return -1 end
if kind ~= 'c1' then return -2 end
local left = redis.call('PTTL', KEYS[1])
if left < 0 then return 60000 end
return left
";

pub(super) static LEASE_LEFT: LazyLock<Script> = LazyLock::new(|| Script::new(LEASE_LEFT_CODE));

/// Loads all scripts.
pub(super) async fn load(connection: &mut impl ConnectionLike) -> RedisResult<()> {
    let mut load = redis::pipe();
    for script in [
        &COMPLETE,
        &COMPLETE_SMALL,
        &RENEW,
        &RELEASE,
        &REPLACE,
        &REMOVE,
        &LEASE_LEFT,
    ] {
        load.cmd("SCRIPT").arg("LOAD").arg(&script.code);
    }
    load.exec_async(connection).await
}

/// The message that wakes all waiters.
pub(super) const WAKE_ALL: &[u8] = b"all";
