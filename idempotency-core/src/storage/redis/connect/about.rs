//! Reads the version and configuration of a server, and checks that it can keep records.

use std::collections::HashMap;

use redis::{FromRedisValue as _, InfoDict, RedisResult, Value, aio::MultiplexedConnection};

use super::error::{RedisConnectError, RedisConnectErrorKind as Kind};

/// The oldest version that has `SET … NX GET` and flags of scripts.
const OLDEST: u32 = 7;

/// What a server says in HELLO, INFO and CONFIG, as far as the user may read them.
pub(super) struct About(HashMap<String, Value>);

impl About {
    /// Asks the server behind `connection`.
    pub(super) async fn server(
        connection: &mut MultiplexedConnection,
    ) -> Result<Self, RedisConnectError> {
        // Everybody may say hello. What INFO and CONFIG tell is often not for every user.
        let hello: RedisResult<HashMap<_, _>> = redis::cmd("HELLO").query_async(connection).await;
        let info: RedisResult<InfoDict> = redis::cmd("INFO").query_async(connection).await;
        if let Err(error) = &info
            && error.code() == Some("NOAUTH")
        {
            return Err(RedisConnectError::connecting(error.clone()));
        }
        let mut facts = info.map(|info| (*info).clone()).unwrap_or_default();
        facts.extend(hello.unwrap_or_default());
        if !facts.contains_key("maxmemory_policy") {
            let mut config = redis::cmd("CONFIG");
            config.arg("GET").arg("maxmemory*");
            let config: RedisResult<HashMap<_, _>> = config.query_async(connection).await;
            facts.extend(config.unwrap_or_default());
        }
        Ok(Self(facts))
    }

    /// The first of these facts that is known: what is one name in HELLO may be another in INFO or CONFIG.
    fn fact(&self, names: &[&str]) -> Option<String> {
        let text = |name: &&str| String::from_redis_value_ref(self.0.get(*name)?).ok();
        names.iter().find_map(text)
    }

    /// Whether the server is `standalone`, `cluster` or `sentinel`.
    pub(super) fn runs_as(&self, mode: &str) -> bool {
        self.fact(&["mode", "redis_mode"]).as_deref() == Some(mode)
    }

    /// Checks that it can keep records, and warns of what may lose them.
    pub(super) fn check(self, require_noeviction: bool) -> Result<(), RedisConnectError> {
        if self.runs_as("sentinel") {
            return Err(RedisConnectError::new(
                Kind::NotAMaster,
                "a sentinel answers there, which keeps no records; give it to `RedisStorage::sentinel`",
            ));
        }
        match self.fact(&["version", "redis_version"]) {
            Some(version) => {
                let major = version.split('.').next().map(str::parse);
                // Who says something else is no Redis, and may well do what a new one does.
                if let Some(Ok(0..OLDEST)) = major {
                    return Err(RedisConnectError::new(
                        Kind::TooOld,
                        format!(
                            "Redis {version} is too old: version {OLDEST} or newer is needed, or Valkey"
                        ),
                    ));
                }
            }
            None => tracing::warn!(
                target: "idempotency",
                "Redis does not tell its version: the user may not call HELLO, nor INFO"
            ),
        }
        // HELLO says `replica`, INFO says `slave`.
        if let Some("replica" | "slave") = self.fact(&["role"]).as_deref() {
            return Err(RedisConnectError::new(
                Kind::NotAMaster,
                "Redis is a replica there, which keeps no records of ours; name its master, or use `RedisStorage::sentinel`",
            ));
        }
        let advice = "set `maxmemory-policy noeviction`, so that it refuses new keys instead of forgetting payments";
        let is_bounded = self.fact(&["maxmemory"]).is_none_or(|limit| limit != "0");
        match self.fact(&["maxmemory_policy", "maxmemory-policy"]) {
            Some(policy) if policy == "noeviction" || !is_bounded => {}
            Some(policy) if require_noeviction => {
                return Err(RedisConnectError::new(
                    Kind::Evicts,
                    format!(
                        "Redis evicts records by the policy {policy} when its memory is full; set `maxmemory-policy noeviction`"
                    ),
                ));
            }
            Some(policy) => tracing::warn!(
                target: "idempotency", policy, advice,
                "Redis evicts records when its memory is full, and what they answered for runs again"
            ),
            None if require_noeviction => {
                return Err(RedisConnectError::new(
                    Kind::Evicts,
                    "Redis does not tell whether it evicts records; allow its user INFO or CONFIG GET",
                ));
            }
            None => tracing::warn!(
                target: "idempotency", advice,
                "Redis does not tell whether it evicts records: the user may call neither INFO nor CONFIG GET"
            ),
        }
        Ok(())
    }
}
