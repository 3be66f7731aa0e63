//! From a class and its location to an open storage.

use std::{collections::BTreeMap, fmt::Display, time::Duration};

use super::{
    error::{
        Result, SettingsError,
        SettingsErrorKind::{self, Conflict, Invalid, Missing, Unavailable, Unsupported},
    },
    field::{Field, Table, table},
    scalar::{is_host_and_port, nonzero},
    secret::{Location, may_hold_a_secret},
};
use crate::{AnyStorage, Lock, LockPolicy, ProcessLock};

table! {
    /// `storage`, or one of `storages`.
    pub(super) struct StorageSettings {
        class: StorageKind = |field| field.one_of(&STORAGES);
        location: Location = Field::location;
        name: String = Field::name;
        max_bytes: usize = nonzero(Field::bytes, "would keep no record, so every retry would run again; give more");
        when_full: WhatWhenFull = |field| field.one_of(&[(&["evict"], WhatWhenFull::Evict), (&["refuse"], WhatWhenFull::Refuse)]);
        require_noeviction: bool = Field::flag;
        purge_every: Duration = nonzero(Field::duration, "would purge without a pause; give a duration such as \"10m\"");
        max_transaction: Duration =
            nonzero(Field::duration, "would roll every transaction back at once; give a duration such as \"10s\"");
    }
}

/// How often a storage in a database is purged, unless the settings say otherwise.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
const PURGE_EVERY: Duration = Duration::from_secs(600);

#[derive(Clone, Copy, Debug, PartialEq)]
enum StorageKind {
    Memory,
    Redis,
    Postgres,
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

const STORAGES: [(&[&str], StorageKind); 4] = [
    (
        &["memory", "MemoryStorage", "MemoryKeyStorage"],
        StorageKind::Memory,
    ),
    (&["redis", "RedisStorage"], StorageKind::Redis),
    (&["postgres", "PostgresStorage"], StorageKind::Postgres),
    (&["sqlite", "SqliteStorage"], StorageKind::Sqlite),
];

#[derive(Clone, Copy, Debug, PartialEq)]
enum WhatWhenFull {
    Evict,
    Refuse,
}

table! {
    pub(super) struct LockSettings {
        enable: bool = Field::flag;
        timeout: Duration = Field::duration;
        ttl: Duration = Field::lease;
        max_hold: Duration = nonzero(Field::duration, "would give every operation up at once");
        class: LockKind = |field| field.one_of(&LOCKS);
        location: Location = Field::location;
        name: String = Field::name;
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum LockKind {
    Storage,
    Process,
    Redis,
}

const LOCKS: [(&[&str], LockKind); 3] = [
    // The original's `ThreadLock` is held within one process, and the claims of a storage are at least that.
    (&["storage", "ThreadLock"], LockKind::Storage),
    (&["process", "ProcessLock"], LockKind::Process),
    (
        &["redis", "RedisLock", "MultiProcessRedisLock"],
        LockKind::Redis,
    ),
];

impl LockSettings {
    /// `preset` with the changes of these settings.
    pub(super) fn policy(&self, preset: LockPolicy) -> LockPolicy {
        let policy = match self.enable {
            Some(false) => LockPolicy::disabled(),
            _ => preset,
        };
        let timeout = self.timeout.unwrap_or(policy.wait_timeout());
        let ttl = self.ttl.unwrap_or(policy.lease());
        let max_hold = self.max_hold.unwrap_or(policy.longest_hold());
        policy.timeout(timeout).ttl(ttl).max_hold(max_hold)
    }

    /// What holds the claims. Without claims it is the storage, but mistakes in the location are errors all the same.
    fn holder(&self, place: &Place<'_>) -> Result<LockKind> {
        let class = place.class(self.class, LockKind::Storage)?;
        if class == LockKind::Redis {
            place.redis_location()?;
        }
        Ok(match self.enable {
            Some(false) => LockKind::Storage,
            _ => class,
        })
    }
}

/// Reads the table of a storage with `read`. Instead of a table its class is enough.
pub(super) fn table<T>(field: &Field, read: impl FnOnce(&mut Table<'_>) -> Result<T>) -> Result<T> {
    const EXPECTED: &str =
        "\"memory\", \"redis\", \"postgres\", \"sqlite\", or a table with `class` and more";

    if field.is_table() {
        return field.table(EXPECTED, read);
    }
    field
        .one_of(&STORAGES)
        .map_err(|_| field.expected(EXPECTED))?;
    let class = ("class".to_owned(), field.value.clone());
    read(&mut Table::new(&field.path, vec![class])?)
}

/// Reads `storages`.
pub(super) fn read_named(storages: &Field) -> Result<BTreeMap<String, StorageSettings>> {
    let expected = "a table of storages, such as { \"orders\": \"memory\" }";
    let read = |(name, field): (String, Field)| {
        if name.trim().is_empty() || may_hold_a_secret(&name) {
            let message = "this can't be the name of a cache; choose one such as \"orders\"";
            return Err(field.invalid(message));
        }
        Ok((name, table(&field, StorageSettings::read)?))
    };
    storages.table(expected, |named| named.take_all().map(read).collect())
}

impl StorageSettings {
    /// Opens the storage of this table in the settings. It is of a `cache`, if that is not the default one.
    pub(super) async fn open(
        &self,
        table: &str,
        cache: Option<&str>,
        lock: &LockSettings,
        time_limit: Duration,
    ) -> Result<AnyStorage> {
        let place = Place {
            table,
            cache,
            settings: self,
            time_limit,
        };
        let lock_settings = Self {
            location: lock.location.clone(),
            name: lock.name.clone(),
            ..self.clone()
        };
        let lock_place = Place {
            table: "lock",
            settings: &lock_settings,
            ..place
        };
        let holder = lock.holder(&lock_place)?;
        let class = place.class(self.class, StorageKind::Memory)?;
        match (class, holder) {
            // A table of a database is no plain cache: its claims lie in it too.
            (StorageKind::Postgres | StorageKind::Sqlite, LockKind::Process | LockKind::Redis) => {
                let message = "does not go with a storage in a database, which holds its own claims; set it to \"storage\"";
                Err(lock_place.error(Conflict, "class", message))
            }
            #[cfg(feature = "postgres")]
            (StorageKind::Postgres, LockKind::Storage) => self.open_postgres(&place).await,
            #[cfg(feature = "sqlite")]
            (StorageKind::Sqlite, LockKind::Storage) => self.open_sqlite(&place).await,
            (_, LockKind::Process) => self.open_locked(class, &place, ProcessLock::new()).await,
            #[cfg(feature = "memory")]
            (StorageKind::Memory, LockKind::Storage) => {
                let mut memory = crate::MemoryStorage::builder();
                if let Some(bytes) = self.max_bytes {
                    memory = memory.max_bytes(bytes);
                }
                if self.when_full == Some(WhatWhenFull::Refuse) {
                    memory = memory.when_full(crate::WhenFull::Refuse);
                }
                Ok(AnyStorage::new(memory.build()))
            }
            #[cfg(feature = "redis")]
            (StorageKind::Redis, LockKind::Storage) => {
                let make = |url: &str, name| crate::RedisStorage::connect(url).prefix(name);
                Ok(AnyStorage::new(place.connect(make).await?))
            }
            #[cfg(feature = "redis")]
            (_, LockKind::Redis) => {
                let make = |url: &str, name| crate::RedisLock::connect(url).name(name);
                let lock = lock_place.connect(make).await?;
                if class == StorageKind::Memory {
                    tracing::warn!(
                        target: "idempotency",
                        storage = %table,
                        "`lock.class` is \"redis\" and this storage is \"memory\": processes share their locks but not their \
                         records, so a retry that reaches another process runs again"
                    );
                }
                self.open_locked(class, &place, lock).await
            }
            #[cfg(not(feature = "redis"))]
            (_, LockKind::Redis) => Err(lock_place.not_built("redis")),
            #[allow(unreachable_patterns, reason = "a build may have every class")]
            (class, LockKind::Storage) => Err(place.not_built(class.feature())),
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
                if let Some(bytes) = self.max_bytes {
                    cache = cache.max_bytes(bytes);
                }
                Ok(AnyStorage::new(crate::LockedStorage::new(cache, lock)))
            }
            #[cfg(feature = "redis")]
            StorageKind::Redis => {
                let make = |url: &str, name| crate::RedisCache::connect(url).prefix(name);
                let cache = place.connect(make).await?;
                Ok(AnyStorage::new(crate::LockedStorage::new(cache, lock)))
            }
            #[allow(unreachable_patterns, reason = "a build may have every class")]
            class => Err(place.not_built(class.feature())),
        }
    }

    #[cfg(feature = "postgres")]
    async fn open_postgres(&self, place: &Place<'_>) -> Result<AnyStorage> {
        use crate::PostgresConnectErrorKind::{Table, Url};

        let url = place.location("postgres://[user:password@]host[:port]/database")?;
        let connecting = crate::PostgresStorage::connect(url)
            .table(place.full_name('_'))
            .time_limit(place.time_limit);
        let mut storage = connecting.await.map_err(|error| {
            let kind = match error.kind() {
                Url => Invalid,
                Table => return place.no_table_name(),
                _ => Unavailable,
            };
            place.error(kind, "location", &error).because_of(error)
        })?;
        storage.migrate().await.map_err(|error| {
            let message = "the table can't be made in PostgreSQL";
            let failed = place.error(Unavailable, "location", message);
            failed.because_of(error)
        })?;
        if let Some(limit) = self.max_transaction {
            storage = storage.max_transaction(limit);
        }
        let purged = storage.purging(self.purge_every.unwrap_or(PURGE_EVERY));
        Ok(AnyStorage::new(purged))
    }

    #[cfg(feature = "sqlite")]
    async fn open_sqlite(&self, place: &Place<'_>) -> Result<AnyStorage> {
        use crate::SqliteStorageErrorKind::{InMemory, Path, TableName};

        let path = place.location("the path of a file")?;
        let opened = async {
            let storage = crate::SqliteStorage::open(path).await?;
            let mut storage = storage
                .table(place.full_name('_'))
                .time_limit(place.time_limit);
            if let Some(limit) = self.max_transaction {
                storage = storage.max_transaction(limit);
            }
            storage.migrate().await?;
            let purged = storage.purging(self.purge_every.unwrap_or(PURGE_EVERY));
            Ok(AnyStorage::new(purged))
        };
        opened.await.map_err(|error: crate::SqliteStorageError| {
            let kind = match error.kind() {
                TableName => return place.no_table_name(),
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
}

/// The place of a storage or a lock in the settings.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// Its table, such as `storages.orders`.
    table: &'a str,
    cache: Option<&'a str>,
    /// Where it is, and how it is connected to.
    settings: &'a StorageSettings,
    time_limit: Duration,
}

impl<'a> Place<'a> {
    /// The class. With a location the default is not meant, so then a class is needed.
    fn class<C>(&self, class: Option<C>, default: C) -> Result<C> {
        match (class, &self.settings.location) {
            (Some(class), _) => Ok(class),
            (None, None) => Ok(default),
            (None, Some(Location(location))) if location.is_empty() => {
                let message = "is empty; give host[:port] or a URL, or leave it out";
                Err(self.error(Missing, "location", message))
            }
            (None, Some(_)) => {
                let message = "is missing, and `location` needs one, such as \"redis\"";
                Err(self.error(Missing, "class", message))
            }
        }
    }

    /// The location, which must be there.
    fn location(&self, form: &str) -> Result<&'a str> {
        match &self.settings.location {
            Some(Location(location)) if !location.is_empty() => Ok(location),
            _ => {
                let message = format_args!("is missing or empty; give {form}");
                Err(self.error(Missing, "location", message))
            }
        }
    }

    /// The location, if it is one of Redis. An error shows nothing of it: it may be a password in the wrong place.
    fn redis_location(&self) -> Result<&'a str> {
        const FORM: &str = "host[:port] or redis://[user:password@]host[:port][/database]";
        const SCHEMES: [&str; 5] = ["redis", "rediss", "valkey", "valkeys", "unix"];

        let location = self.location(FORM)?;
        let has_form = match location.split_once("://") {
            Some((scheme, rest)) => {
                let scheme = scheme.rsplit('+').next().unwrap_or_default();
                SCHEMES.contains(&scheme) && !rest.is_empty()
            }
            // Several are nodes of a Cluster.
            None => location
                .split(',')
                .all(|node| is_host_and_port(node.trim())),
        };
        if !has_form {
            let message = format_args!("expected {FORM}, found something else");
            return Err(self.error(Invalid, "location", message));
        }
        Ok(location)
    }

    /// The name of the table, or the prefix of the keys. Each cache has its own, so caches in one Redis or database share nothing.
    fn full_name(&self, separator: char) -> String {
        let name = self.settings.name.as_deref().unwrap_or("idempotency");
        match self.cache {
            None => name.to_owned(),
            Some(cache) => format!("{name}{separator}{cache}"),
        }
    }

    /// Connects to Redis, with a prefix for the keys.
    #[cfg(feature = "redis")]
    async fn connect<T: 'static>(
        &self,
        make: impl FnOnce(&str, String) -> crate::RedisConnect<T>,
    ) -> Result<T> {
        let location = self.redis_location()?;
        if self.settings.name.is_none() {
            tracing::warn!(
                target: "idempotency",
                setting = %format_args!("{}.name", self.table),
                "the keys in Redis begin with the default name: two services that share a Redis and keep it share their keys; set one for each"
            );
        }
        let connecting = self.terms(make(location, self.full_name(':')));
        connecting.await.map_err(|error| {
            let kind = match error.kind() {
                crate::RedisConnectErrorKind::Url => Invalid,
                _ => Unavailable,
            };
            self.error(kind, "location", &error).because_of(error)
        })
    }

    #[cfg(feature = "redis")]
    fn terms<T>(&self, connecting: crate::RedisConnect<T>) -> crate::RedisConnect<T> {
        let connecting = connecting.time_limit(self.time_limit);
        match self.settings.require_noeviction {
            Some(true) => connecting.require_noeviction(),
            _ => connecting,
        }
    }

    /// An error of one of its fields.
    fn error(&self, kind: SettingsErrorKind, field: &str, message: impl Display) -> SettingsError {
        SettingsError::new(kind, format_args!("{}.{field}", self.table), message)
    }

    /// A cache adds an underscore and its name to the table's.
    #[cfg(any(feature = "postgres", feature = "sqlite"))]
    fn no_table_name(&self) -> SettingsError {
        let message = "can't be the name of a table: it takes 1 to 48 lower-case letters, digits and underscores, and no digit first; for \
                       one of `storages`, an underscore and the name of the cache are a part of it";
        self.error(Invalid, "name", message)
    }

    fn not_built(&self, feature: &str) -> SettingsError {
        let message = format_args!(
            "needs the feature `{feature}`, which is off; turn it on, or choose another class"
        );
        self.error(Unsupported, "class", message)
    }
}

#[cfg(all(test, feature = "redis"))]
mod tests {
    use super::*;
    use crate::RedisStorage;

    #[test]
    fn redis_is_connected_to_on_the_terms_of_the_settings() {
        let terms = |require_noeviction: Option<bool>| {
            let settings = StorageSettings {
                require_noeviction,
                ..StorageSettings::default()
            };
            let connecting = RedisStorage::connect("cache");
            let place = Place {
                table: "storage",
                cache: None,
                settings: &settings,
                time_limit: Duration::from_secs(3),
            };
            format!("{:?}", place.terms(connecting))
        };
        for (set, required) in [(None, false), (Some(false), false), (Some(true), true)] {
            let expected = format!("require_noeviction: {required}, time_limit: 3s");
            assert!(terms(set).contains(&expected), "{}", terms(set));
        }
    }
}
