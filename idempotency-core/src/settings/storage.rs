//! From a class and its location to a storage that is open.

use std::time::Duration;

use super::{
    LockSettings, StorageSettings,
    error::{Path, SettingsError, SettingsErrorKind},
    secret::Location,
};
use crate::{AnyStorage, Lock, ProcessLock};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum StorageKind {
    Memory,
    Redis,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum LockKind {
    /// The claims of the storage.
    Storage,
    Process,
    Redis,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum WhatWhenFull {
    Evict,
    Refuse,
}

/// What holds the claims, with all that it needs.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Claims {
    /// The storage itself.
    Storage,
    Process,
    Redis {
        location: Location,
        name: Option<String>,
    },
}

/// A storage's place in the settings.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) path: &'a Path,
    /// The name of the cache, if it is not the default one.
    pub(super) cache: Option<&'a str>,
    /// `storage_timeout`, the limit for all storages.
    #[cfg_attr(
        not(feature = "redis"),
        expect(
            dead_code,
            reason = "only what is reached over a network takes its time"
        )
    )]
    pub(super) time_limit: Duration,
}

impl StorageSettings {
    /// Opens the storage that stands at `place`.
    pub(super) async fn open(
        &self,
        place: Place<'_>,
        claims: &Claims,
    ) -> Result<AnyStorage, SettingsError> {
        let path = place.path;
        let class = class(self.class, self.location.as_ref(), path)?;
        let class = class.unwrap_or(StorageKind::Memory);
        match (class, claims) {
            (StorageKind::Memory, Claims::Storage) => self.open_memory(path),
            (StorageKind::Redis, Claims::Storage) => self.open_redis(place).await,
            (_, Claims::Process) => self.open_locked(class, place, ProcessLock::new()).await,
            (_, Claims::Redis { location, name }) => {
                let name = prefix(name.as_deref(), &lock_path(), place.cache);
                self.open_locked_by_redis(class, place, &location.0, name)
                    .await
            }
        }
    }

    /// Records of this class, with claims by `lock`.
    async fn open_locked(
        &self,
        class: StorageKind,
        place: Place<'_>,
        lock: impl Lock,
    ) -> Result<AnyStorage, SettingsError> {
        match class {
            StorageKind::Memory => self.open_locked_memory(place.path, lock),
            StorageKind::Redis => self.open_locked_redis(place, lock).await,
        }
    }

    /// The location, if it is of the form that the class needs.
    fn location(
        &self,
        path: &Path,
        has_form: fn(&str) -> bool,
        form: &str,
    ) -> Result<&str, SettingsError> {
        checked_location(self.location.as_ref(), path, has_form, form)
    }
}

#[cfg(feature = "memory")]
impl StorageSettings {
    #[expect(clippy::unnecessary_wraps, reason = "without the feature it fails")]
    fn open_memory(&self, _: &Path) -> Result<AnyStorage, SettingsError> {
        use crate::{MemoryStorage, WhenFull};

        let mut memory = MemoryStorage::builder();
        if let Some(bytes) = self.max_bytes {
            memory = memory.max_bytes(bytes);
        }
        memory = match self.when_full {
            None => memory,
            Some(WhatWhenFull::Evict) => memory.when_full(WhenFull::Evict),
            Some(WhatWhenFull::Refuse) => memory.when_full(WhenFull::Refuse),
        };
        Ok(AnyStorage::new(memory.build()))
    }

    fn open_locked_memory(
        &self,
        path: &Path,
        lock: impl Lock,
    ) -> Result<AnyStorage, SettingsError> {
        use crate::{LockedStorage, MokaCache};

        if self.when_full == Some(WhatWhenFull::Refuse) {
            // What was begun has to be completed, and the cache doesn't know what was begun.
            let message = "\"refuse\" needs the claims of the storage; give \"evict\", or set `lock.class` to \"storage\"";
            return Err(SettingsError::new(
                SettingsErrorKind::Conflict,
                &path.field("when_full"),
                message,
            ));
        }
        let cache = match self.max_bytes {
            None => MokaCache::new(),
            Some(bytes) => MokaCache::new().max_bytes(bytes),
        };
        Ok(AnyStorage::new(LockedStorage::new(cache, lock)))
    }
}

#[cfg(not(feature = "memory"))]
impl StorageSettings {
    fn open_memory(&self, path: &Path) -> Result<AnyStorage, SettingsError> {
        let (_, _) = (self.max_bytes, self.when_full);
        let message = "this build has no memory storage, which is the default; switch the feature `memory` on";
        Err(SettingsError::new(
            SettingsErrorKind::Unsupported,
            &path.field("class"),
            message,
        ))
    }

    fn open_locked_memory(&self, path: &Path, _: impl Lock) -> Result<AnyStorage, SettingsError> {
        self.open_memory(path)
    }
}

#[cfg(feature = "redis")]
impl StorageSettings {
    async fn open_redis(&self, place: Place<'_>) -> Result<AnyStorage, SettingsError> {
        let location = self.location(place.path, redis_location, REDIS_LOCATION)?;
        let prefix = prefix(self.name.as_deref(), place.path, place.cache);
        let connecting = crate::RedisStorage::connect(location).prefix(prefix);
        Ok(AnyStorage::new(self.connect(place, connecting).await?))
    }

    async fn open_locked_redis(
        &self,
        place: Place<'_>,
        lock: impl Lock,
    ) -> Result<AnyStorage, SettingsError> {
        let location = self.location(place.path, redis_location, REDIS_LOCATION)?;
        let prefix = prefix(self.name.as_deref(), place.path, place.cache);
        let connecting = crate::RedisCache::connect(location).prefix(prefix);
        let records = self.connect(place, connecting).await?;
        Ok(AnyStorage::new(crate::LockedStorage::new(records, lock)))
    }

    async fn open_locked_by_redis(
        &self,
        class: StorageKind,
        place: Place<'_>,
        location: &str,
        name: String,
    ) -> Result<AnyStorage, SettingsError> {
        let connecting = crate::RedisLock::connect(location).name(name);
        let lock = self.terms(connecting, place.time_limit).await;
        let lock = lock.map_err(|error| not_connected(&lock_path(), error))?;
        if class == StorageKind::Memory {
            tracing::warn!(
                target: "idempotency",
                storage = %place.path,
                "`lock.class` is \"redis\" and this storage is \"memory\": processes share their locks but not their records, so a retry \
                 that another process gets runs again"
            );
        }
        self.open_locked(class, place, lock).await
    }

    async fn connect<T: 'static>(
        &self,
        place: Place<'_>,
        connecting: crate::RedisConnect<T>,
    ) -> Result<T, SettingsError> {
        let connecting = self.terms(connecting, place.time_limit);
        let connected = connecting.await;
        connected.map_err(|error| not_connected(place.path, error))
    }

    /// How it is connected to.
    fn terms<T>(
        &self,
        connecting: crate::RedisConnect<T>,
        time_limit: Duration,
    ) -> crate::RedisConnect<T> {
        let connecting = connecting.time_limit(time_limit);
        match self.require_noeviction {
            Some(true) => connecting.require_noeviction(),
            Some(false) | None => connecting,
        }
    }
}

#[cfg(not(feature = "redis"))]
#[expect(clippy::unused_async, reason = "with the feature they connect")]
impl StorageSettings {
    async fn open_redis(&self, place: Place<'_>) -> Result<AnyStorage, SettingsError> {
        self.location(place.path, redis_location, REDIS_LOCATION)?;
        let _ = self.require_noeviction;
        Err(no_such_storage(place.path, "Redis"))
    }

    async fn open_locked_redis(
        &self,
        place: Place<'_>,
        _: impl Lock,
    ) -> Result<AnyStorage, SettingsError> {
        self.open_redis(place).await
    }

    async fn open_locked_by_redis(
        &self,
        _: StorageKind,
        _: Place<'_>,
        _: &str,
        _: String,
    ) -> Result<AnyStorage, SettingsError> {
        Err(no_such_lock("Redis"))
    }
}

/// What keys begin with: caches that stand in one Redis share nothing.
fn prefix(name: Option<&str>, path: &Path, cache: Option<&str>) -> String {
    if name.is_none() {
        tracing::warn!(
            target: "idempotency",
            setting = %path.field("name"),
            "the keys in Redis begin with the default name: two services that share a Redis and keep it share their keys; set one for each"
        );
    }
    let name = name.unwrap_or("idempotency");
    match cache {
        None => name.to_owned(),
        Some(cache) => format!("{name}:{cache}"),
    }
}

#[cfg(feature = "redis")]
fn not_connected(path: &Path, error: crate::RedisConnectError) -> SettingsError {
    use crate::RedisConnectErrorKind::Url;

    let kind = match error.kind() {
        Url => SettingsErrorKind::Invalid,
        _ => SettingsErrorKind::Unavailable,
    };
    SettingsError::new(kind, &path.field("location"), &error).because_of(error)
}

impl LockSettings {
    /// What holds the claims, if all is there that it needs; where there are no claims, their kind doesn't matter.
    pub(super) fn claims(&self) -> Result<Claims, SettingsError> {
        let path = lock_path();
        let class = class(self.class, self.location.as_ref(), &path)?;
        let claims = match class.unwrap_or(LockKind::Storage) {
            LockKind::Storage => Claims::Storage,
            LockKind::Process => Claims::Process,
            LockKind::Redis => {
                let location = self.location.as_ref();
                let location = checked_location(location, &path, redis_location, REDIS_LOCATION)?;
                Claims::Redis {
                    location: Location(location.to_owned()),
                    name: self.name.clone(),
                }
            }
        };
        match self.enable {
            Some(false) => Ok(Claims::Storage),
            Some(true) | None => Ok(claims),
        }
    }
}

fn lock_path() -> Path {
    Path::default().field("lock")
}

/// The class, which nobody may have forgotten: with a location the default is not meant.
fn class<C>(
    class: Option<C>,
    location: Option<&Location>,
    path: &Path,
) -> Result<Option<C>, SettingsError> {
    let (None, Some(Location(location))) = (&class, location) else {
        return Ok(class);
    };
    let (field, message) = match location.is_empty() {
        true => (
            "location",
            "is empty; give host[:port] or a URL, or leave it out",
        ),
        false => (
            "class",
            "is missing, and `location` needs one, such as \"redis\"",
        ),
    };
    Err(SettingsError::new(
        SettingsErrorKind::Missing,
        &path.field(field),
        message,
    ))
}

const REDIS_LOCATION: &str = "host[:port] or redis://[user:password@]host[:port][/database]";

/// Shows nothing of a location that is not one: it may be a password in the wrong place.
fn checked_location<'a>(
    location: Option<&'a Location>,
    path: &Path,
    has_form: fn(&str) -> bool,
    form: &str,
) -> Result<&'a str, SettingsError> {
    match location {
        Some(Location(location)) if has_form(location) => Ok(location),
        Some(Location(location)) if !location.is_empty() => Err(SettingsError::new(
            SettingsErrorKind::Invalid,
            &path.field("location"),
            format_args!("expected {form}, found something else"),
        )),
        _ => Err(SettingsError::new(
            SettingsErrorKind::Missing,
            &path.field("location"),
            format_args!("is missing or empty; give {form}"),
        )),
    }
}

fn redis_location(text: &str) -> bool {
    const SCHEMES: [&str; 5] = ["redis", "rediss", "valkey", "valkeys", "unix"];
    match text.split_once("://") {
        Some((scheme, rest)) => {
            let scheme = scheme.split('+').next_back().unwrap_or_default();
            SCHEMES.contains(&scheme) && !rest.is_empty()
        }
        // Several are nodes of a Cluster.
        None => text.split(',').all(|node| is_host_and_port(node.trim())),
    }
}

/// `host`, `host:port`, `[::1]:port`.
pub(super) fn is_host_and_port(text: &str) -> bool {
    let is_host = |host: &str| {
        let inside = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        match inside {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                !host.is_empty()
                    && host
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
            }
        }
    };
    match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => is_host(host) && port.parse::<u16>().is_ok(),
        _ => is_host(text),
    }
}

#[cfg(not(feature = "redis"))]
fn no_such_storage(path: &Path, name: &str) -> SettingsError {
    let message = format_args!("this build has no {name} storage; there is: \"memory\"");
    SettingsError::new(
        SettingsErrorKind::Unsupported,
        &path.field("class"),
        message,
    )
}

#[cfg(not(feature = "redis"))]
fn no_such_lock(name: &str) -> SettingsError {
    let message = format_args!("this build has no {name} lock; there is: \"storage\", \"process\"");
    SettingsError::new(
        SettingsErrorKind::Unsupported,
        &lock_path().field("class"),
        message,
    )
}

#[cfg(all(test, feature = "redis"))]
mod tests {
    use super::*;
    use crate::RedisStorage;

    #[test]
    fn redis_is_connected_to_on_the_terms_of_the_settings() {
        let terms = |require_noeviction| {
            let settings = StorageSettings {
                require_noeviction,
                ..StorageSettings::default()
            };
            let connecting = RedisStorage::connect("cache");
            format!("{:?}", settings.terms(connecting, Duration::from_secs(3)))
        };
        for (set, required) in [(None, false), (Some(false), false), (Some(true), true)] {
            let expected = format!("require_noeviction: {required}, time_limit: 3s");
            assert!(terms(set).contains(&expected), "{}", terms(set));
        }
    }
}
