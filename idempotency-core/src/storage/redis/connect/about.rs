//! What a server tells of itself, and whether it is fit to keep records.

use redis::{RedisError, Value, aio::MultiplexedConnection};

use super::error::{OLDEST, Reason, RedisConnectError};

/// Checks version and memory. Says whether the server is part of a Cluster.
pub(super) async fn check(
    connection: &mut MultiplexedConnection,
    require_noeviction: bool,
) -> Result<bool, RedisConnectError> {
    let about = About::ask(connection).await;
    match &about.version {
        Some(version) => {
            let major = version
                .split('.')
                .next()
                .and_then(|major| major.parse().ok());
            // Who says something else is no Redis, and may well do what a new one does.
            if major.is_some_and(|major: u32| major < OLDEST) {
                return Err(RedisConnectError::new(Reason::TooOld(version.clone())));
            }
        }
        None => tracing::warn!(
            target: "idempotency",
            "Redis does not tell its version: the user may not call HELLO, nor INFO"
        ),
    }
    let advice = "set `maxmemory-policy noeviction`, so that it refuses new keys instead of forgetting payments";
    match about.evicts {
        Some(None) => {}
        Some(Some(policy)) if require_noeviction => {
            return Err(RedisConnectError::new(Reason::Evicts(policy)));
        }
        Some(Some(policy)) => tracing::warn!(
            target: "idempotency", policy, advice,
            "Redis evicts records when its memory is full, and what they answered for runs again"
        ),
        None if require_noeviction => {
            return Err(RedisConnectError::new(Reason::EvictionUnknown));
        }
        None => tracing::warn!(
            target: "idempotency", advice,
            "Redis does not tell whether it evicts records: the user may call neither INFO nor CONFIG GET"
        ),
    }
    Ok(about.is_cluster)
}

/// What a server tells of itself, as far as its user may ask.
struct About {
    version: Option<String>,
    is_cluster: bool,
    /// The policy by which it evicts, if it does.
    evicts: Option<Option<String>>,
}

impl About {
    async fn ask(connection: &mut MultiplexedConnection) -> Self {
        // Everybody may say hello. What INFO and CONFIG tell is often not for every user.
        let hello = pairs(redis::cmd("HELLO").query_async(connection).await);
        let info = lines(redis::cmd("INFO").query_async(connection).await);
        let find = |pairs: &[(String, String)], name: &str| {
            let mut found = pairs.iter().filter(|(key, _)| key == name);
            found.next().map(|(_, value)| value.clone())
        };
        let version = find(&hello, "version").or_else(|| find(&info, "redis_version"));
        let mode = find(&hello, "mode").or_else(|| find(&info, "redis_mode"));

        let mut memory = info;
        if find(&memory, "maxmemory_policy").is_none() {
            let mut config = redis::cmd("CONFIG");
            config.arg("GET").arg("maxmemory*");
            memory = pairs(config.query_async(connection).await);
            for (name, _) in &mut memory {
                *name = name.replace('-', "_");
            }
        }
        let limit = find(&memory, "maxmemory");
        let evicts = find(&memory, "maxmemory_policy").map(|policy| {
            let is_bounded = limit.is_none_or(|limit| limit != "0");
            (is_bounded && policy != "noeviction").then_some(policy)
        });
        Self {
            version,
            is_cluster: mode.as_deref() == Some("cluster"),
            evicts,
        }
    }
}

/// A map as either protocol gives it.
fn pairs(answer: Result<Value, RedisError>) -> Vec<(String, String)> {
    let flat = match answer {
        Ok(Value::Map(pairs)) => pairs.into_iter().flat_map(|(k, v)| [k, v]).collect(),
        Ok(Value::Array(flat)) => flat,
        _ => Vec::new(),
    };
    let mut flat = flat.into_iter();
    let mut pairs = Vec::new();
    while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
        if let (Some(name), Some(value)) = (text(name), text(value)) {
            pairs.push((name, value));
        }
    }
    pairs
}

fn lines(answer: Result<Value, RedisError>) -> Vec<(String, String)> {
    let text = answer.ok().and_then(text).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Some(text),
        _ => None,
    }
}
