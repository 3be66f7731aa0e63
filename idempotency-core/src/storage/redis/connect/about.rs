//! Reads the version and configuration of a server, and checks that it can keep records.

use redis::{Cmd, RedisError, Value, aio::MultiplexedConnection};

use super::error::{OLDEST, Reason, RedisConnectError};

/// Version and configuration, as far as the user may read them.
#[derive(Default)]
pub(super) struct About {
    version: Option<String>,
    mode: Option<String>,
    role: Option<String>,
    /// The policy by which it evicts, if it does.
    evicts: Option<Option<String>>,
}

impl About {
    /// Asks the server behind `connection`.
    pub(super) async fn server(
        connection: &mut MultiplexedConnection,
    ) -> Result<Self, RedisConnectError> {
        // Everybody may say hello. What INFO and CONFIG tell is often not for every user.
        let hello = redis::cmd("HELLO").query_async(connection).await;
        let info = redis::cmd("INFO").query_async(connection).await;
        for answer in [&hello, &info] {
            if let Err(error) = answer
                && error.code() == Some("NOAUTH")
            {
                return Err(RedisConnectError::connecting(error.clone()));
            }
        }
        let (hello, info) = (pairs(hello), lines(info));
        let config = match info.of("maxmemory_policy") {
            Some(_) => ServerInfo::default(),
            None => pairs(memory_settings().query_async(connection).await),
        };
        Ok(Self::read(&hello, &info, &config))
    }

    fn read(hello: &ServerInfo, info: &ServerInfo, config: &ServerInfo) -> Self {
        let told = |in_hello, in_info| hello.of(in_hello).or_else(|| info.of(in_info));
        let set = |in_info, in_config| info.of(in_info).or_else(|| config.of(in_config));
        let evicts = set("maxmemory_policy", "maxmemory-policy").map(|policy| {
            let limit = set("maxmemory", "maxmemory");
            let is_bounded = limit.is_none_or(|limit| limit != "0");
            (is_bounded && policy != "noeviction").then(|| policy.to_owned())
        });
        Self {
            version: told("version", "redis_version").map(str::to_owned),
            mode: told("mode", "redis_mode").map(str::to_owned),
            role: told("role", "role").map(str::to_owned),
            evicts,
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        self.mode.as_deref() == Some("cluster")
    }

    /// Checks that it can keep records, and warns of what may lose them.
    pub(super) fn check(self, require_noeviction: bool) -> Result<(), RedisConnectError> {
        if self.mode.as_deref() == Some("sentinel") {
            return Err(RedisConnectError::new(Reason::Sentinel));
        }
        match self.version {
            Some(version) => {
                let major = version
                    .split('.')
                    .next()
                    .and_then(|major| major.parse().ok());
                // Who says something else is no Redis, and may well do what a new one does.
                if major.is_some_and(|major: u32| major < OLDEST) {
                    return Err(RedisConnectError::new(Reason::TooOld(version)));
                }
            }
            None => tracing::warn!(
                target: "idempotency",
                "Redis does not tell its version: the user may not call HELLO, nor INFO"
            ),
        }
        // HELLO says `replica`, INFO says `slave`.
        if self
            .role
            .is_some_and(|role| ["replica", "slave"].contains(&&*role))
        {
            return Err(RedisConnectError::new(Reason::Replica));
        }
        let advice = "set `maxmemory-policy noeviction`, so that it refuses new keys instead of forgetting payments";
        match self.evicts {
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
        Ok(())
    }
}

/// Names and values.
#[derive(Default)]
struct ServerInfo(Vec<(String, String)>);

impl ServerInfo {
    /// The value of `name`.
    fn of(&self, name: &str) -> Option<&str> {
        let mut found = self.0.iter().filter(|(key, _)| key == name);
        found.next().map(|(_, value)| &**value)
    }
}

fn memory_settings() -> Cmd {
    let mut config = redis::cmd("CONFIG");
    config.arg("GET").arg("maxmemory*");
    config
}

/// A map as either protocol gives it.
fn pairs(answer: Result<Value, RedisError>) -> ServerInfo {
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
    ServerInfo(pairs)
}

fn lines(answer: Result<Value, RedisError>) -> ServerInfo {
    let text = answer.ok().and_then(text).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    let pairs = pairs.map(|(name, value)| (name.to_owned(), value.trim().to_owned()));
    ServerInfo(pairs.collect())
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Some(text),
        _ => None,
    }
}
