//! Settings from a file or the environment.
//!
//! A document becomes [`Settings`] in two steps. It is read as a tree of values ([`value`]), which any self-describing format
//! gives, and the tree is then taken apart field by field ([`read`]): so every error names the whole path of its field,
//! what was found and what is allowed, the same in all formats. [`Settings::config`] and [`Settings::open`] make of them what
//! a middleware needs.

use std::{collections::BTreeMap, time::Duration};

use http::{HeaderName, Method, StatusCode};
use serde::{Deserialize, Deserializer, de::Error as _};

use self::{
    error::Path,
    field::Field,
    secret::Location,
    storage::{LockKind, Place, StorageKind, WhatWhenFull},
    value::Value,
};
use crate::{
    AnyStorage, BasicKeyEncoder, Budget, Config, FingerprintKeyEncoder, KeyFormat, KeyOnlyEncoder,
    LockPolicy, OnStorageError, OnUnreadable, Scope, StoreOn,
};

mod error;
mod field;
mod read;
mod secret;
mod storage;
mod units;
mod value;

pub use self::error::{SettingsError, SettingsErrorKind};

/// All that can be set in a file or in the environment: a [`Config`], the mode, and the storages.
///
/// It is deserialized with serde from JSON, TOML or any other self-describing format. Every field may be left out, and an
/// empty document is [`Config::default`] with a [`MemoryStorage`](crate::MemoryStorage) in mode `enforce`. A field that does
/// not exist is refused by its name.
///
/// ```
/// use std::time::Duration;
/// use idempotency_core::Settings;
///
/// let settings: Settings = serde_json::from_str(
///     r#"{
///         "preset": "ietf",
///         "ttl": "12h",
///         "lock": { "timeout": "5s" },
///         "storage": { "max_bytes": "256MiB", "when_full": "refuse" },
///         "storages": { "orders": "memory" }
///     }"#,
/// )?;
/// assert_eq!(settings.config().ttl, Duration::from_secs(12 * 3600));
///
/// let error = serde_json::from_str::<Settings>(r#"{ "lock": { "timeot": 5 } }"#).unwrap_err();
/// assert!(error.to_string().starts_with("`lock.timeot`: there is no such field; there are: class, enable, "));
/// # Ok::<(), serde_json::Error>(())
/// ```
///
/// # Files and the environment
///
/// The crate [`config`](https://docs.rs/config) lays one over the other. Here `IDEMPOTENCY__LOCK__TIMEOUT=5s` overrides what
/// `[lock]` in `idempotency.toml` says:
///
/// ```
/// use idempotency_core::Settings;
///
/// # fn main() -> Result<(), config::ConfigError> {
/// let settings: Settings = config::Config::builder()
///     .add_source(config::File::with_name("idempotency").required(false))
///     .add_source(config::Environment::with_prefix("IDEMPOTENCY").separator("__"))
///     .build()?
///     .try_deserialize()?;
/// # assert_eq!(settings, Settings::default());
/// # Ok(())
/// # }
/// ```
///
/// The environment has only text, so every value may be text: `"true"`, `"409"`, `"0.1"`, a list as `"200,201"`. A loader that
/// gives the environment as one flat table works too: `lock__timeout` is `lock.timeout`.
///
/// # Fields
///
/// | field | value | default | in django-idempotency-key |
/// |---|---|---|---|
/// | `mode` | `enforce`, `exempt`, `optional` | `enforce` | the class of the middleware |
/// | `preset` | `default` or `django`, `ietf`, `stripe`: where the defaults of all below come from | `default` | |
/// | `encoder` | `basic`, `fingerprint`, `key_only`, or the name of the type | `basic` | `ENCODER_CLASS` |
/// | `conflict_status` | a status; null or `original` for that of the recorded answer | 409 | `CONFLICT_STATUS_CODE` |
/// | `in_flight_status`, `mismatch_status` | a status from 400 | 423, 422 | |
/// | `header` | name of a header | `Idempotency-Key` | `HEADER` |
/// | `methods` | list of unsafe methods on which `enforce` asks for a key | all; `ietf`: POST, PATCH; `stripe`: POST | |
/// | `key_format` | `any`, `uuid` | `any` | |
/// | `scope` | `default`, `authorization`, `none`, `{ cookie = "…" }`, `{ header = "…" }`, with `required` perhaps: see [`Scope`] | `default` | |
/// | `scope_required` | whether a request in which the scope finds no caller is refused; if false, such requests share their keys | true for a cookie and a header; `default` refuses a cookie alone | |
/// | `store_on` | see below | `success` | `STORAGE.STORE_ON_STATUSES` |
/// | `ttl` | duration: how long a record is kept; not zero | 24 h | |
/// | `lock.enable` | whether there are claims | true | `LOCK.ENABLE` |
/// | `lock.timeout` | duration: how long a duplicate waits | 100 ms | `LOCK.TIMEOUT` |
/// | `lock.ttl` | duration: the lease, at least 10 ms | 30 s | `LOCK.TTL` |
/// | `lock.max_hold` | duration: when a running operation is given up | 10 min | |
/// | `lock.class` | `storage`: claims of the storage; `process`: a [`ProcessLock`](crate::ProcessLock); `redis`: a lock in Redis | `storage` | `LOCK.CLASS` |
/// | `lock.location` | `host[:port]` or a URL, for class `redis` | | `LOCK.LOCATION` |
/// | `lock.name` | prefix of the lock's keys, for class `redis` | `idempotency` | `LOCK.NAME` |
/// | `on_storage_error` | `reject`, `run_unprotected` | `reject` | |
/// | `on_unreadable` | `reject`, `treat_as_absent` | `reject` | |
/// | `storage_timeout` | duration: how long a call of a storage may take | 1 s | |
/// | `max_request_body`, `max_response_body` | bytes | 2 MiB, 1 MiB | |
/// | `max_buffered` | bytes: how much is held in memory at once | 256 MiB | |
/// | `body_timeout` | duration: how long a request body may be silent | 30 s | |
/// | `max_running`, `max_waiting` | number | 16,384 | |
/// | `replay_header` | name of a header; null for none | `idempotency-replayed` | |
/// | `strip_headers`, `keep_headers` | lists of names: not recorded; recorded after all | | |
/// | `documentation` | an http or https URL, or a path | | |
/// | `storage` | a class, or a table with the fields below | `memory` | |
/// | `storage.class` | `memory`, `redis` | `memory` | `STORAGE.CLASS` |
/// | `storage.cache_name` | what `cache_name` calls the default cache | `default` | `STORAGE.CACHE_NAME` |
/// | `storage.store_on` | `store_on`, here as in the original | | `STORAGE.STORE_ON_STATUSES` |
/// | `storage.location` | `host[:port]` or a URL, for class `redis` | | |
/// | `storage.name` | prefix of the storage's keys, for these classes | `idempotency` | |
/// | `storage.max_bytes` | bytes, for class `memory` | 64 MiB | |
/// | `storage.when_full` | `evict`, `refuse`, for class `memory`; `refuse` only with its own claims | `evict` | |
/// | `storage.require_noeviction` | whether a Redis that may evict is refused, for class `redis` and for its lock | false: warned of | |
/// | `storages.<name>` | a cache for `cache_name = "<name>"`: as `storage`, without `cache_name` and `store_on` | | |
///
/// * A **duration** is text with units (`"30s"`, `"100ms"`, `"1h30m"`; `ms`, `s`, `m`, `h`, `d`) or a number of seconds.
/// * **Bytes** are a number, or text with a unit (`"64KiB"`, `"2MB"`).
/// * **`store_on`** is `success` (200 to 207), `all`, a list of statuses and ranges (`[201, "400-499"]`), or a table:
///   `statuses` is one of these, or `below` all statuses below a number; `except` is a list to leave out; with
///   `except_rejections` what extractors answer is not recorded. A table without `statuses` and `below` changes the preset's.
/// * The default cache may also be one of **`storages`**, if `storage` says nothing but `cache_name`: the one of that name.
/// * Of a cache in **`storages`** the prefixes of storage and lock are followed by a colon and its name, so caches in one Redis
///   share nothing.
/// * With `lock.class = "redis"` the storage is a plain cache under that lock, as in the original, and takes more round trips than
///   a `redis` storage with its own claims. Where the cache is `memory`, each process has records of its own.
/// * What only another **class** uses may stay in the file. So the environment can set `storage.class` to `memory` for a
///   test, over a file with a `location`.
/// * Names of the original's settings are understood in lower case: `encoder_class`, `conflict_status_code`,
///   `storage.store_on_statuses`; and so are the names of its classes, with their module or without.
///
/// # Secrets
///
/// Neither `Debug` nor an error shows a password. But a document that is no JSON or TOML at all is refused by its parser, whose
/// own message may quote it; so may `toml`'s when settings are part of a larger document and stand there on one line. A
/// password is best given by the environment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    mode: Mode,
    terms: Terms,
    lock: LockSettings,
    default_cache: Option<String>,
    storage: StorageSettings,
    storages: BTreeMap<String, StorageSettings>,
}

// Not `#[non_exhaustive]`: a middleware does one of these.
/// What becomes of a request whose handler says nothing about keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It needs a key, if its method is one of [`Config::methods`](crate::Config::methods).
    #[default]
    Enforce,
    /// It runs unprotected.
    Exempt,
    /// It is protected if it has a key, and runs unprotected if it has none.
    Optional,
}

/// What differs from the preset.
#[derive(Clone, Debug, Default, PartialEq)]
struct Terms {
    preset: Preset,
    header: Option<HeaderName>,
    methods: Option<Vec<Method>>,
    key_format: Option<KeyFormatName>,
    encoder: Option<EncoderName>,
    scope: Option<Scope>,
    conflict_status: Option<Option<StatusCode>>,
    in_flight_status: Option<StatusCode>,
    mismatch_status: Option<StatusCode>,
    store_on: Option<StoreOn>,
    ttl: Option<Duration>,
    on_storage_error: Option<OnStorageError>,
    on_unreadable: Option<OnUnreadable>,
    storage_timeout: Option<Duration>,
    max_request_body: Option<usize>,
    max_response_body: Option<usize>,
    max_running: Option<usize>,
    max_waiting: Option<usize>,
    max_buffered: Option<usize>,
    body_timeout: Option<Duration>,
    replay_header: Option<Option<HeaderName>>,
    strip_headers: Vec<HeaderName>,
    keep_headers: Vec<HeaderName>,
    documentation: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Preset {
    #[default]
    Default,
    Ietf,
    Stripe,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum KeyFormatName {
    Any,
    Uuid,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum EncoderName {
    Basic,
    Fingerprint,
    KeyOnly,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct LockSettings {
    enable: Option<bool>,
    timeout: Option<Duration>,
    ttl: Option<Duration>,
    max_hold: Option<Duration>,
    class: Option<LockKind>,
    location: Option<Location>,
    name: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct StorageSettings {
    class: Option<StorageKind>,
    location: Option<Location>,
    name: Option<String>,
    max_bytes: Option<usize>,
    when_full: Option<WhatWhenFull>,
    require_noeviction: Option<bool>,
}

/// What [`Settings::open`] gives: all that a middleware is made of.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Opened {
    /// What becomes of a request whose handler says nothing about keys.
    pub mode: Mode,
    /// The configuration.
    pub config: Config,
    /// The default cache.
    pub storage: AnyStorage,
    /// What a handler's `cache_name` may call the default cache.
    pub default_cache: String,
    /// The named caches, without the default one.
    pub caches: BTreeMap<String, AnyStorage>,
}

impl Settings {
    /// The configuration that they describe.
    pub fn config(&self) -> Config {
        let Terms {
            preset,
            header,
            methods,
            key_format,
            encoder,
            scope,
            conflict_status,
            in_flight_status,
            mismatch_status,
            store_on,
            ttl,
            on_storage_error,
            on_unreadable,
            storage_timeout,
            max_request_body,
            max_response_body,
            max_running,
            max_waiting,
            max_buffered,
            body_timeout,
            replay_header,
            strip_headers,
            keep_headers,
            documentation,
        } = self.terms.clone();
        let mut config = preset.config();
        set(&mut config.header, header);
        set(&mut config.methods, methods.map(Some));
        set(
            &mut config.key_format,
            key_format.map(KeyFormatName::format),
        );
        config = match encoder {
            None => config,
            Some(EncoderName::Basic) => config.encoder(BasicKeyEncoder),
            Some(EncoderName::Fingerprint) => config.encoder(FingerprintKeyEncoder),
            Some(EncoderName::KeyOnly) => config.encoder(KeyOnlyEncoder),
        };
        set(&mut config.scope, scope);
        set(&mut config.conflict_status, conflict_status);
        set(&mut config.in_flight_status, in_flight_status);
        set(&mut config.mismatch_status, mismatch_status);
        set(&mut config.store_on, store_on);
        set(&mut config.ttl, ttl);
        set(&mut config.on_storage_error, on_storage_error);
        set(&mut config.on_unreadable, on_unreadable);
        set(&mut config.storage_timeout, storage_timeout);
        set(&mut config.max_request_body, max_request_body);
        set(&mut config.max_response_body, max_response_body);
        set(&mut config.max_running, max_running);
        set(&mut config.max_waiting, max_waiting);
        set(&mut config.budget, max_buffered.map(Budget::new));
        set(&mut config.body_timeout, body_timeout);
        set(&mut config.replay_header, replay_header);
        config.lock = self.lock.policy(config.lock);
        let config = strip_headers.into_iter().fold(config, Config::strip_header);
        let config = keep_headers.into_iter().fold(config, Config::keep_header);
        match documentation {
            None => config,
            Some(url) => config.documentation(url),
        }
    }

    /// Opens the storages that they name.
    ///
    /// # Errors
    ///
    /// If a storage or the lock lacks its location, if this build does not have it or it can't be reached, if a storage can't do
    /// with that lock what it is set to, or if both `storage` and one of `storages` set up the default cache.
    pub async fn open(&self) -> Result<Opened, SettingsError> {
        let (config, claims) = (self.config(), self.lock.claims()?);
        let root = Path::default();
        let named = root.field("storages");
        let default_cache = self.default_cache.as_deref().unwrap_or("default");

        let mut caches = BTreeMap::new();
        for (name, storage) in &self.storages {
            let place = Place {
                path: &named.field(name),
                cache: Some(name),
                time_limit: config.storage_timeout,
            };
            let storage = storage.open(place, &claims).await?;
            caches.insert(name.clone(), storage);
        }
        let storage = match caches.remove(default_cache) {
            None => {
                let place = Place {
                    path: &root.field("storage"),
                    cache: None,
                    time_limit: config.storage_timeout,
                };
                self.storage.open(place, &claims).await?
            }
            Some(default) if self.storage == StorageSettings::default() => default,
            Some(_) => {
                let message = "is what the default cache is called, and `storage` sets that up; choose another name, or another \
                               `storage.cache_name`";
                return Err(SettingsError::new(
                    SettingsErrorKind::Conflict,
                    &named.field(default_cache),
                    message,
                ));
            }
        };
        Ok(Opened {
            mode: self.mode,
            config,
            storage,
            default_cache: default_cache.to_owned(),
            caches,
        })
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

impl Preset {
    fn config(self) -> Config {
        match self {
            Self::Default => Config::default(),
            Self::Ietf => Config::ietf(),
            Self::Stripe => Config::stripe(),
        }
    }
}

impl KeyFormatName {
    fn format(self) -> KeyFormat {
        match self {
            Self::Any => KeyFormat::any(),
            Self::Uuid => KeyFormat::uuid(),
        }
    }
}

impl LockSettings {
    /// `preset` with what is set here.
    fn policy(&self, preset: LockPolicy) -> LockPolicy {
        let policy = match self.enable {
            Some(false) => LockPolicy::disabled(),
            Some(true) | None => preset,
        };
        let policy = match self.timeout {
            None => policy,
            Some(timeout) => policy.timeout(timeout),
        };
        let policy = match self.ttl {
            None => policy,
            Some(ttl) => policy.ttl(ttl),
        };
        match self.max_hold {
            None => policy,
            Some(limit) => policy.max_hold(limit),
        }
    }
}

impl<'de> Deserialize<'de> for Settings {
    /// The error of the format has the message of a [`SettingsError`].
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Read to its end first. An error that a deserializer sees on its way gets a place from it, and some formats then
        // quote the line, whatever stands there.
        let document = Value::deserialize(deserializer)?;
        Self::read(Field::document(field::unfolded(document))).map_err(D::Error::custom)
    }
}
