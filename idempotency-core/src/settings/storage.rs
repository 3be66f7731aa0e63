//! From a class and its location to an open storage.

use std::{fmt::Display, net::Ipv6Addr, time::Duration};

use serde::Deserialize;

use super::{
    error::{
        SettingsError,
        SettingsErrorKind::{self, Conflict, Invalid, Missing, Unavailable, Unsupported},
    },
    scalar::{Flag, Lease, MaxHold, Name, Period, PurgePeriod, Room, TransactionLimit},
    secret::Location,
    table::StoreOnSettings,
};
use crate::{AnyStorage, Lock, LockPolicy, ProcessLock};

type Result<T, E = SettingsError> = std::result::Result<T, E>;

macro_rules! storages {
    ($($field:ident: $type:ty,)*) => {
        /// One of `storages`.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        #[serde(default, deny_unknown_fields, expecting = "\"memory\", \"redis\", \"postgres\", \"sqlite\", or a table with `class` and more")]
        pub(super) struct StorageSettings {
            #[serde(alias = "=")]
            class: Option<StorageKind>,
            $($field: Option<$type>,)*
        }

        /// `storage`, which has more fields.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        #[serde(default, deny_unknown_fields, expecting = "\"memory\", \"redis\", \"postgres\", \"sqlite\", or a table with `class` and more")]
        pub(super) struct DefaultStorage {
            pub(super) cache_name: Option<Name>,
            #[serde(alias = "store_on_statuses")]
            pub(super) store_on: Option<StoreOnSettings>,
            #[serde(alias = "=")]
            class: Option<StorageKind>,
            $($field: Option<$type>,)*
        }

        impl DefaultStorage {
            pub(super) fn storage(&self) -> StorageSettings {
                StorageSettings { class: self.class, $($field: self.$field.clone(),)* }
            }
        }
    };
}

storages! {
    location: Location,
    name: Name,
    max_bytes: Room,
    when_full: WhatWhenFull,
    require_noeviction: Flag,
    purge_every: PurgePeriod,
    max_transaction: TransactionLimit,
}

/// How often a storage in a database is purged, unless the settings say otherwise.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
const PURGE_EVERY: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum StorageKind {
    #[serde(alias = "MemoryStorage", alias = "MemoryKeyStorage")]
    Memory,
    #[serde(alias = "RedisStorage")]
    Redis,
    #[serde(alias = "PostgresStorage")]
    Postgres,
    #[serde(alias = "SqliteStorage")]
    Sqlite,
}

impl StorageKind {
    /// The feature that it needs.
    fn feature(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Redis => "redis",
            Self::Postgres => "postgres",
            Self::Sqlite => "sqlite",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum WhatWhenFull {
    Evict,
    Refuse,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "a table, such as { \"timeout\": \"5s\" }"
)]
pub(super) struct LockSettings {
    enable: Option<Flag>,
    timeout: Option<Period>,
    ttl: Option<Lease>,
    max_hold: Option<MaxHold>,
    class: Option<LockKind>,
    location: Option<Location>,
    name: Option<Name>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LockKind {
    /// The claims of the storage. The original's `ThreadLock` is held within one process, and these are at least that.
    #[serde(alias = "ThreadLock")]
    Storage,
    #[serde(alias = "ProcessLock")]
    Process,
    #[serde(alias = "RedisLock", alias = "MultiProcessRedisLock")]
    Redis,
}

impl LockSettings {
    /// `preset` with the changes of these settings.
    pub(super) fn policy(&self, preset: LockPolicy) -> LockPolicy {
        let mut policy = preset;
        if self.enable == Some(Flag(false)) {
            policy = LockPolicy::disabled();
        }
        if let Some(Period(timeout)) = self.timeout {
            policy = policy.timeout(timeout);
        }
        if let Some(Lease(ttl)) = self.ttl {
            policy = policy.ttl(ttl);
        }
        if let Some(MaxHold(limit)) = self.max_hold {
            policy = policy.max_hold(limit);
        }
        policy
    }

    /// What holds the claims. Without claims it is the storage, but mistakes in the location are errors all the same.
    fn holder(&self) -> Result<LockKind> {
        let class = class(self.class, &self.location, "lock", LockKind::Storage)?;
        if class == LockKind::Redis {
            redis_location(&self.location, "lock")?;
        }
        Ok(match self.enable {
            Some(Flag(false)) => LockKind::Storage,
            _ => class,
        })
    }
}

/// The place of a storage in the settings, and what it shares with the others.
pub(super) struct Place<'a> {
    /// Its table, such as `storages.orders`.
    pub(super) table: String,
    /// The name of the cache, if it is not the default one.
    pub(super) cache: Option<&'a str>,
    pub(super) lock: &'a LockSettings,
    pub(super) time_limit: Duration,
}

impl Place<'_> {
    /// An error of one of its fields.
    fn error(&self, kind: SettingsErrorKind, field: &str, message: impl Display) -> SettingsError {
        SettingsError::new(kind, format_args!("{}.{field}", self.table), message)
    }
}

impl StorageSettings {
    /// Opens the storage that is at `place`.
    pub(super) async fn open(&self, place: Place<'_>) -> Result<AnyStorage> {
        let holder = place.lock.holder()?;
        let class = class(
            self.class,
            &self.location,
            &place.table,
            StorageKind::Memory,
        )?;
        match (class, holder) {
            (StorageKind::Postgres | StorageKind::Sqlite, LockKind::Process | LockKind::Redis) => {
                Err(has_own_claims())
            }
            #[cfg(feature = "postgres")]
            (StorageKind::Postgres, LockKind::Storage) => self.open_postgres(&place).await,
            #[cfg(feature = "sqlite")]
            (StorageKind::Sqlite, LockKind::Storage) => self.open_sqlite(&place).await,
            (_, LockKind::Process) => self.open_locked(class, &place, ProcessLock::new()).await,
            #[cfg(feature = "memory")]
            (StorageKind::Memory, LockKind::Storage) => {
                let mut memory = crate::MemoryStorage::builder();
                if let Some(Room(bytes)) = self.max_bytes {
                    memory = memory.max_bytes(bytes);
                }
                if self.when_full == Some(WhatWhenFull::Refuse) {
                    memory = memory.when_full(crate::WhenFull::Refuse);
                }
                Ok(AnyStorage::new(memory.build()))
            }
            #[cfg(feature = "redis")]
            (StorageKind::Redis, LockKind::Storage) => {
                let make =
                    |location: &str, name| crate::RedisStorage::connect(location).prefix(name);
                Ok(AnyStorage::new(self.connect(&place, make).await?))
            }
            #[cfg(feature = "redis")]
            (_, LockKind::Redis) => {
                let server = Self {
                    location: place.lock.location.clone(),
                    name: place.lock.name.clone(),
                    ..self.clone()
                };
                let table = "lock".to_owned();
                let make = |location: &str, name| crate::RedisLock::connect(location).name(name);
                let lock = server.connect(&Place { table, ..place }, make).await?;
                if class == StorageKind::Memory {
                    tracing::warn!(
                        target: "idempotency",
                        storage = %place.table,
                        "`lock.class` is \"redis\" and this storage is \"memory\": processes share their locks but not their \
                         records, so a retry that reaches another process runs again"
                    );
                }
                self.open_locked(class, &place, lock).await
            }
            #[cfg(not(feature = "redis"))]
            (_, LockKind::Redis) => Err(not_built("redis", "lock")),
            #[allow(unreachable_patterns, reason = "a build may have every class")]
            (class, LockKind::Storage) => Err(not_built(class.feature(), &place.table)),
        }
    }

    /// Opens a cache of this class, with claims by `lock`.
    async fn open_locked(
        &self,
        class: StorageKind,
        place: &Place<'_>,
        lock: impl Lock,
    ) -> Result<AnyStorage> {
        match class {
            #[cfg(feature = "memory")]
            StorageKind::Memory => {
                if self.when_full == Some(WhatWhenFull::Refuse) {
                    // An operation that began has to be completed, and a cache does not know which ones began.
                    let message = "\"refuse\" needs the claims of the storage; give \"evict\", or set `lock.class` to \"storage\"";
                    return Err(place.error(Conflict, "when_full", message));
                }
                let mut cache = crate::MokaCache::new();
                if let Some(Room(bytes)) = self.max_bytes {
                    cache = cache.max_bytes(bytes);
                }
                Ok(AnyStorage::new(crate::LockedStorage::new(cache, lock)))
            }
            #[cfg(feature = "redis")]
            StorageKind::Redis => {
                let make = |location: &str, name| crate::RedisCache::connect(location).prefix(name);
                let cache = self.connect(place, make).await?;
                Ok(AnyStorage::new(crate::LockedStorage::new(cache, lock)))
            }
            StorageKind::Postgres | StorageKind::Sqlite => Err(has_own_claims()),
            #[allow(unreachable_patterns, reason = "a build may have every class")]
            class => Err(not_built(class.feature(), &place.table)),
        }
    }

    #[cfg(feature = "postgres")]
    async fn open_postgres(&self, place: &Place<'_>) -> Result<AnyStorage> {
        use crate::PostgresConnectErrorKind::{Table, Url};

        let url = self.location_or("postgres://[user:password@]host[:port]/database", place)?;
        let connecting = crate::PostgresStorage::connect(url)
            .table(self.name_at(place, '_'))
            .time_limit(place.time_limit);
        let mut storage = connecting.await.map_err(|error| {
            let (kind, field) = match error.kind() {
                Url => (Invalid, "location"),
                Table => return no_table_name(place),
                _ => (Unavailable, "location"),
            };
            place.error(kind, field, &error).because_of(error)
        })?;
        storage.migrate().await.map_err(|error| {
            let message = "the table can't be made in PostgreSQL";
            place
                .error(Unavailable, "location", message)
                .because_of(error)
        })?;
        if let Some(TransactionLimit(limit)) = self.max_transaction {
            storage = storage.max_transaction(limit);
        }
        Ok(AnyStorage::new(storage.purging(self.purge_period())))
    }

    #[cfg(feature = "sqlite")]
    async fn open_sqlite(&self, place: &Place<'_>) -> Result<AnyStorage> {
        use crate::SqliteStorageErrorKind::{InMemory, Path, TableName};

        let path = self.location_or("the path of a file", place)?;
        let opened = async {
            let storage = crate::SqliteStorage::open(path).await?;
            let mut storage = storage
                .table(self.name_at(place, '_'))
                .time_limit(place.time_limit);
            if let Some(TransactionLimit(limit)) = self.max_transaction {
                storage = storage.max_transaction(limit);
            }
            storage.migrate().await?;
            Ok(AnyStorage::new(storage.purging(self.purge_period())))
        };
        opened.await.map_err(|error: crate::SqliteStorageError| {
            let kind = match error.kind() {
                TableName => return no_table_name(place),
                InMemory => {
                    let message = "is in memory and would be forgotten; give the path of a file, or set the class to \"memory\"";
                    return place.error(Invalid, "location", message);
                }
                Path => Invalid,
                _ => Unavailable,
            };
            place.error(kind, "location", &error).because_of(error)
        })
    }

    /// The location, which must be there.
    #[cfg(any(feature = "postgres", feature = "sqlite"))]
    fn location_or(&self, form: &str, place: &Place<'_>) -> Result<&str> {
        match &self.location {
            Some(Location(location)) if !location.is_empty() => Ok(location),
            _ => {
                let message = format_args!("is missing or empty; give {form}");
                Err(place.error(Missing, "location", message))
            }
        }
    }

    /// The name of the table, or the prefix of the keys. Each cache has its own, so caches in one Redis or database share nothing.
    fn name_at(&self, place: &Place<'_>, separator: char) -> String {
        let name = self.name.as_ref().map_or("idempotency", |Name(name)| name);
        match place.cache {
            None => name.to_owned(),
            Some(cache) => format!("{name}{separator}{cache}"),
        }
    }

    #[cfg(any(feature = "postgres", feature = "sqlite"))]
    fn purge_period(&self) -> Duration {
        let chosen = self.purge_every.as_ref();
        chosen.map_or(PURGE_EVERY, |PurgePeriod(period)| *period)
    }

    /// Connects to the location, with a prefix for the keys.
    #[cfg(feature = "redis")]
    async fn connect<T: 'static>(
        &self,
        place: &Place<'_>,
        make: impl FnOnce(&str, String) -> crate::RedisConnect<T>,
    ) -> Result<T> {
        let table = &place.table;
        let location = redis_location(&self.location, table)?;
        if self.name.is_none() {
            tracing::warn!(
                target: "idempotency",
                setting = %format_args!("{table}.name"),
                "the keys in Redis begin with the default name: two services that share a Redis and keep it share their keys; set one for each"
            );
        }
        let connecting = make(location, self.name_at(place, ':'));
        let connected = self.terms(connecting, place.time_limit).await;
        connected.map_err(|error| {
            let kind = match error.kind() {
                crate::RedisConnectErrorKind::Url => Invalid,
                _ => Unavailable,
            };
            place.error(kind, "location", &error).because_of(error)
        })
    }

    #[cfg(feature = "redis")]
    fn terms<T>(
        &self,
        connecting: crate::RedisConnect<T>,
        time_limit: Duration,
    ) -> crate::RedisConnect<T> {
        let connecting = connecting.time_limit(time_limit);
        match self.require_noeviction {
            Some(Flag(true)) => connecting.require_noeviction(),
            _ => connecting,
        }
    }
}

/// A cache adds an underscore and its name to the table's.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
fn no_table_name(place: &Place<'_>) -> SettingsError {
    let message = "can't be the name of a table: it takes 1 to 48 lower-case letters, digits and underscores, and no digit first; for \
                   one of `storages`, an underscore and the name of the cache are a part of it";
    place.error(Invalid, "name", message)
}

/// A table of a database is no plain cache: its claims lie in it too.
fn has_own_claims() -> SettingsError {
    let message = "does not go with a storage in a database, which holds its own claims; set it to \"storage\"";
    SettingsError::new(Conflict, "lock.class", message)
}

fn not_built(feature: &str, table: &str) -> SettingsError {
    let message = format_args!(
        "needs the feature `{feature}`, which is off; turn it on, or choose another class"
    );
    SettingsError::new(Unsupported, format_args!("{table}.class"), message)
}

/// The class. With a location the default is not meant, so then a class is needed.
fn class<C>(class: Option<C>, location: &Option<Location>, table: &str, default: C) -> Result<C> {
    let (field, message) = match (class, location) {
        (Some(class), _) => return Ok(class),
        (None, None) => return Ok(default),
        (None, Some(Location(location))) if location.is_empty() => (
            "location",
            "is empty; give host[:port] or a URL, or leave it out",
        ),
        (None, Some(_)) => (
            "class",
            "is missing, and `location` needs one, such as \"redis\"",
        ),
    };
    let field = format_args!("{table}.{field}");
    Err(SettingsError::new(Missing, field, message))
}

/// The location, if it is one of Redis. An error shows nothing of it: it may be a password in the wrong place.
fn redis_location<'a>(location: &'a Option<Location>, table: &str) -> Result<&'a str> {
    const FORM: &str = "host[:port] or redis://[user:password@]host[:port][/database]";
    const SCHEMES: [&str; 5] = ["redis", "rediss", "valkey", "valkeys", "unix"];

    let text = location.as_ref().map_or("", |Location(text)| text);
    let has_form = match text.split_once("://") {
        Some((scheme, rest)) => {
            let scheme = scheme.rsplit('+').next().unwrap_or_default();
            SCHEMES.contains(&scheme) && !rest.is_empty()
        }
        // Several are nodes of a Cluster.
        None => text.split(',').all(|node| is_host_and_port(node.trim())),
    };
    let (kind, message) = match has_form {
        true => return Ok(text),
        false if text.is_empty() => (Missing, format!("is missing or empty; give {FORM}")),
        false => (Invalid, format!("expected {FORM}, found something else")),
    };
    let field = format_args!("{table}.location");
    Err(SettingsError::new(kind, field, message))
}

/// `host`, `host:port`, `[::1]:port`.
pub(super) fn is_host_and_port(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (text, "0"),
    };
    let address = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let is_host_byte = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    let is_host = match address {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(is_host_byte),
    };
    is_host && port.parse::<u16>().is_ok()
}

#[cfg(all(test, feature = "redis"))]
mod tests {
    use super::*;
    use crate::RedisStorage;

    #[test]
    fn redis_is_connected_to_on_the_terms_of_the_settings() {
        let terms = |require_noeviction: Option<bool>| {
            let settings = StorageSettings {
                require_noeviction: require_noeviction.map(Flag),
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
