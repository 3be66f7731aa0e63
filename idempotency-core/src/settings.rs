//! Settings from a file or the environment.
//!
//! A document becomes [`Settings`] in three steps. It is read as a tree of values ([`value`]), which any self-describing format
//! gives. The derives of serde then read the fields from the tree, with the path of each. Last, [`Document::checked`] refuses
//! settings that contradict each other or would not protect. So an error is the same in all formats.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Deserializer, de::Error as _};

use self::{
    error::SettingsErrorKind::{Conflict, Invalid},
    scalar::{
        BodyTimeout, Bytes, CacheName, ConflictStatus, Count, Documentation, Flag, Header,
        MaxBuffered, MaxRunning, Name, RefusalStatus, ReplayHeader, StorageTimeout, Ttl,
    },
    secret::Shown,
    storage::{DefaultStorage, LockSettings, Place, StorageSettings},
    table::{Headers, Methods, ScopeSettings, StoreOnSettings},
    value::Value,
};
use crate::{
    AnyStorage, BasicKeyEncoder, Config, FingerprintKeyEncoder, KeyEncoder, KeyFormat,
    KeyOnlyEncoder, Mode, OnStorageError, OnUnreadable, Scope,
};

mod error;
mod scalar;
mod secret;
#[cfg_attr(
    not(all(
        feature = "memory",
        feature = "redis",
        feature = "postgres",
        feature = "sqlite"
    )),
    allow(
        dead_code,
        unused_imports,
        unused_variables,
        reason = "some of it is only for storages that this build does not have"
    )
)]
mod storage;
mod table;
mod units;
mod value;

pub use self::error::{SettingsError, SettingsErrorKind};

/// All that can be set in a file or in the environment: a [`Config`], the mode, and the storages.
///
/// [`Settings::read`] and `Deserialize` read them from JSON, TOML or any other self-describing format of serde. Every field has a
/// default: an empty document is [`Config::default`] with a [`MemoryStorage`](crate::MemoryStorage) in mode `enforce`. An unknown
/// field is an error.
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
/// The crate [`config`](https://docs.rs/config) merges them. Here `IDEMPOTENCY__LOCK__TIMEOUT=5s` overrides the `timeout` under
/// `[lock]` in `idempotency.toml`:
///
/// ```
/// use idempotency_core::Settings;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let document = config::Config::builder()
///     .add_source(config::File::with_name("idempotency").required(false))
///     .add_source(config::Environment::with_prefix("IDEMPOTENCY").separator("__"))
///     .build()?;
/// let settings = Settings::read(document)?;
/// # assert_eq!(settings, Settings::default());
/// # Ok(())
/// # }
/// ```
///
/// The environment has only text, so every value may be text: `"true"`, `"409"`, `"0.1"`, a list as `"200,201"`. A loader that
/// gives the environment as one flat table also works: `lock__timeout` is `lock.timeout`.
///
/// # Fields
///
/// | field | value | default | in django-idempotency-key |
/// |---|---|---|---|
/// | `mode` | `enforce`, `exempt`, `optional` | `enforce` | the class of the middleware |
/// | `preset` | `default` or `django`, `ietf`, `stripe`: sets the defaults of all fields below | `default` | |
/// | `encoder` | `basic`, `fingerprint`, `key_only`, or the name of the type | `basic` | `ENCODER_CLASS` |
/// | `conflict_status` | a status; null or `original` for that of the recorded answer | 409 | `CONFLICT_STATUS_CODE` |
/// | `in_flight_status`, `mismatch_status` | a status from 400 | 423, 422 | |
/// | `header` | name of a header | `Idempotency-Key` | `HEADER` |
/// | `methods` | list of unsafe methods on which `enforce` asks for a key | all; `ietf`: POST, PATCH; `stripe`: POST | |
/// | `key_format` | `any`, `uuid` | `any` | |
/// | `scope` | `default`, `authorization`, `none`, `{ cookie = "…" }`, `{ header = "…" }`, optionally with `required`: see [`Scope`] | `default` | |
/// | `scope_required` | whether a request in which the scope finds no caller is refused; if false, such requests share their keys | true for a cookie and a header; `default` refuses a cookie alone | |
/// | `store_on` | see below | `success` | `STORAGE.STORE_ON_STATUSES` |
/// | `ttl` | duration: how long a record is kept; not zero | 24 h | |
/// | `lock.enable` | whether there are claims | true | `LOCK.ENABLE` |
/// | `lock.timeout` | duration: how long a duplicate waits | 100 ms | `LOCK.TIMEOUT` |
/// | `lock.ttl` | duration: the lease, at least 10 ms | 30 s | `LOCK.TTL` |
/// | `lock.max_hold` | duration: after how long a running operation is given up | 10 min | |
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
/// | `storage.class` | `memory`, `redis`, `postgres`, `sqlite`; each but the first is a feature | `memory` | `STORAGE.CLASS` |
/// | `storage.cache_name` | the name of the default cache for `cache_name` | `default` | `STORAGE.CACHE_NAME` |
/// | `storage.store_on` | `store_on`, at its place in the original | | `STORAGE.STORE_ON_STATUSES` |
/// | `storage.location` | `host[:port]` or a URL, for class `redis`; a URL for `postgres`; the path of a file for `sqlite` | | |
/// | `storage.name` | prefix of the storage's keys, for class `redis`; name of the table, which is made if it is missing, for `postgres` and `sqlite`: 1 to 48 lower-case letters, digits and underscores, no digit first | `idempotency` | |
/// | `storage.max_bytes` | bytes, for class `memory` | 64 MiB | |
/// | `storage.when_full` | `evict`, `refuse`, for class `memory`; `refuse` only with its own claims | `evict` | |
/// | `storage.require_noeviction` | whether a Redis that may evict is refused, for class `redis` and for a Redis lock | false: a warning | |
/// | `storage.purge_every` | duration: how often expired rows are removed, for classes `postgres` and `sqlite` | 10 min | |
/// | `storage.max_transaction` | duration: how long a handler's transaction may be open, for classes `postgres` and `sqlite` | 30 s, 5 s | |
/// | `storages.<name>` | a cache for `cache_name = "<name>"`: as `storage`, without `cache_name` and `store_on` | | |
///
/// * A **duration** is text with units (`"30s"`, `"100ms"`, `"1h30m"`; `ms`, `s`, `m`, `h`, `d`) or a number of seconds.
/// * **Bytes** are a number, or text with a unit (`"64KiB"`, `"2MB"`).
/// * **`store_on`** is `success` (200 to 207), `all`, a list of statuses and ranges (`[201, "400-499"]`), or a table. In the table
///   `statuses` is one of these, or `below` is a number and stands for all statuses below it; `except` is a list of statuses that are
///   not recorded; with `except_rejections` the answers of extractors are not recorded. A table without `statuses` and `below` changes
///   the preset's statuses.
/// * The default cache may also be one of **`storages`**: the one named `storage.cache_name`, if `storage` has no other field.
/// * For a cache in **`storages`** the prefixes of storage and lock are followed by a colon and its name, and the name of a table by
///   an underscore and its name, so caches in one Redis or database share nothing.
/// * A storage in a **database** holds its own claims: with `lock.class` `process` or `redis` it is refused.
/// * With `lock.class = "redis"` the storage is a plain cache under that lock, as in the original, and takes more round trips than
///   a `redis` storage with its own claims. If the cache is `memory`, each process has records of its own.
/// * Fields that only another **class** uses are ignored. So the environment can set `storage.class` to `memory` for a test, over a
///   file with a `location`.
/// * Names of the original's settings are understood in lower case: `encoder_class`, `conflict_status_code`,
///   `storage.store_on_statuses`; and so are the names of its classes, with or without their module.
///
/// # Secrets
///
/// Neither `Debug` nor an error of ours shows a password. An error quotes a value only if its field holds no secret, and masks what
/// looks like a URL with a password even there. But a parser refuses a document that is not valid JSON or TOML with a message of its
/// own, which may quote the document. The crate `toml` also quotes the line if settings are part of a larger document and are on one
/// line there. A password is best given by the environment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings(Document);

/// What [`Settings::open`] returns: all that a middleware is made of.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Opened {
    /// What happens to a request whose handler has no policy.
    pub mode: Mode,
    /// The configuration.
    pub config: Config,
    /// The default cache.
    pub storage: AnyStorage,
    /// The name that a handler's `cache_name` may use for the default cache.
    pub default_cache: String,
    /// The named caches, without the default one.
    pub caches: BTreeMap<String, AnyStorage>,
}

impl Settings {
    /// Reads settings as `Deserialize` does, but with an error that tells what is wrong by its kind and its field. Its message has no
    /// additions of the format, such as the blank line in which an error of the crate `toml` ends.
    ///
    /// ```
    /// use idempotency_core::{Settings, SettingsErrorKind};
    ///
    /// let mut document = serde_json::Deserializer::from_str(r#"{ "lock": { "timeout": "soon" } }"#);
    /// let error = Settings::read(&mut document).unwrap_err();
    /// assert_eq!(error.kind(), SettingsErrorKind::Invalid);
    /// assert_eq!(error.field(), "lock.timeout");
    /// ```
    ///
    /// # Errors
    ///
    /// If the document can't be read, or if it has a field or a value that is not allowed, or values that contradict each other.
    pub fn read<'de, D: Deserializer<'de>>(document: D) -> Result<Self, SettingsError> {
        Self::from_value(
            Value::deserialize(document).map_err(|error| SettingsError::unreadable(&error))?,
        )
    }

    fn from_value(document: Value) -> Result<Self, SettingsError> {
        let document = document.nested();
        for same in SAME {
            let mut there = same.iter().filter(|field| document.has(field));
            if let (Some(field), Some(other)) = (there.next(), there.next()) {
                let message = format_args!("says the same as `{other}`; keep one of them");
                return Err(SettingsError::new(Conflict, field, message));
            }
        }
        let store_on = STORE_ON.iter().find(|field| document.has(field));
        let document: Document = serde_path_to_error::deserialize(document).map_err(|error| {
            let place = error.path().clone();
            error.into_inner().at(&place)
        })?;
        document.checked(store_on.unwrap_or(&"store_on")).map(Self)
    }

    /// The configuration that they describe.
    pub fn config(&self) -> Config {
        self.0.config()
    }

    /// Opens the storages that they name.
    ///
    /// # Errors
    ///
    /// If a storage or the lock lacks its location, if this build does not have it or it can't be reached, if a storage does not
    /// support its settings with that lock, or if both `storage` and one of `storages` describe the default cache.
    pub async fn open(&self) -> Result<Opened, SettingsError> {
        let Self(document) = self;
        let config = self.config();
        let place = |table: String, cache| Place {
            table,
            cache,
            lock: &document.lock,
            time_limit: config.storage_timeout,
        };
        let mut caches = BTreeMap::new();
        for (CacheName(name), storage) in &document.storages {
            let place = place(format!("storages.{}", Shown(name)), Some(name.as_str()));
            caches.insert(name.clone(), storage.open(place).await?);
        }
        let default_cache = document.storage.cache_name.as_ref();
        let default_cache = default_cache.map_or("default", |Name(name)| name);
        let storage = document.storage.storage();
        let storage = match caches.remove(default_cache) {
            None => storage.open(place("storage".to_owned(), None)).await?,
            Some(default) if storage == StorageSettings::default() => default,
            Some(_) => {
                let field = format_args!("storages.{}", Shown(default_cache));
                let message = "is the name of the default cache, which `storage` describes; choose another name, or another \
                               `storage.cache_name`";
                return Err(SettingsError::new(Conflict, field, message));
            }
        };
        Ok(Opened {
            mode: document.mode,
            default_cache: default_cache.to_owned(),
            config,
            storage,
            caches,
        })
    }
}

impl<'de> Deserialize<'de> for Settings {
    /// The error of the format has the message of a [`SettingsError`]; [`Settings::read`] returns that error itself.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // Read to the end first. A deserializer adds its position to an error in between, and some formats then quote the line with
        // all that it holds.
        let document = Value::deserialize(deserializer)?;
        Self::from_value(document).map_err(D::Error::custom)
    }
}

/// Names of the same setting: ours first, then those of django-idempotency-key.
const SAME: [&[&str]; 4] = [
    &["conflict_status", "conflict_status_code"],
    &["encoder", "encoder_class"],
    &["scope_required", "scope.required"],
    &STORE_ON,
];

const STORE_ON: [&str; 4] = [
    "store_on",
    "store_on_statuses",
    "storage.store_on",
    "storage.store_on_statuses",
];

macro_rules! document {
    ($($(#[$attribute:meta])* $option:ident: $type:ty,)*) => {
        /// The fields of a document. `None` is the value of the preset.
        #[derive(Clone, Debug, Default, PartialEq, Deserialize)]
        #[serde(default, deny_unknown_fields, expecting = "a table of settings")]
        struct Document {
            mode: Mode,
            preset: Preset,
            $($(#[$attribute])* $option: Option<$type>,)*
            max_buffered: Option<MaxBuffered>,
            strip_headers: Headers,
            keep_headers: Headers,
            documentation: Option<Documentation>,
            scope: Option<ScopeSettings>,
            scope_required: Option<Flag>,
            #[serde(alias = "store_on_statuses")]
            store_on: Option<StoreOnSettings>,
            lock: LockSettings,
            storage: DefaultStorage,
            storages: BTreeMap<CacheName, StorageSettings>,
        }

        impl Document {
            /// Sets the options that are fields of [`Config`].
            fn set(&self, config: &mut Config) {
                $(if let Some(value) = self.$option.clone() {
                    config.$option = value.into();
                })*
            }
        }
    };
}

// A new option of `Config` needs a line here, and a row in the docs of `Settings`.
document! {
    header: Header,
    methods: Methods,
    key_format: KeyFormatName,
    #[serde(alias = "encoder_class")]
    encoder: EncoderName,
    #[serde(alias = "conflict_status_code")]
    conflict_status: ConflictStatus,
    in_flight_status: RefusalStatus,
    mismatch_status: RefusalStatus,
    ttl: Ttl,
    on_storage_error: OnStorageError,
    on_unreadable: OnUnreadable,
    storage_timeout: StorageTimeout,
    max_request_body: Bytes,
    max_response_body: Bytes,
    max_running: MaxRunning,
    max_waiting: Count,
    body_timeout: BodyTimeout,
    replay_header: ReplayHeader,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Preset {
    #[default]
    #[serde(alias = "django")]
    Default,
    Ietf,
    Stripe,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KeyFormatName {
    Any,
    Uuid,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum EncoderName {
    #[serde(alias = "BasicKeyEncoder")]
    Basic,
    #[serde(alias = "FingerprintKeyEncoder")]
    Fingerprint,
    #[serde(alias = "KeyOnlyEncoder")]
    KeyOnly,
}

impl From<Preset> for Config {
    fn from(preset: Preset) -> Self {
        match preset {
            Preset::Default => Self::default(),
            Preset::Ietf => Self::ietf(),
            Preset::Stripe => Self::stripe(),
        }
    }
}

impl From<KeyFormatName> for KeyFormat {
    fn from(name: KeyFormatName) -> Self {
        match name {
            KeyFormatName::Any => Self::any(),
            KeyFormatName::Uuid => Self::uuid(),
        }
    }
}

impl From<EncoderName> for Arc<dyn KeyEncoder> {
    fn from(name: EncoderName) -> Self {
        match name {
            EncoderName::Basic => Arc::new(BasicKeyEncoder),
            EncoderName::Fingerprint => Arc::new(FingerprintKeyEncoder),
            EncoderName::KeyOnly => Arc::new(KeyOnlyEncoder),
        }
    }
}

impl Document {
    fn config(&self) -> Config {
        let mut config = Config::from(self.preset);
        self.set(&mut config);
        config.lock = self.lock.policy(config.lock);
        if let Some(store_on) = &self.store_on {
            config.store_on = store_on.store_on(config.store_on);
        }
        if let Some(scope) = self.scope().unwrap_or_default() {
            config.scope = scope;
        }
        if let Some(MaxBuffered(bytes)) = self.max_buffered {
            config = config.max_buffered(bytes);
        }
        for Header(name) in &self.strip_headers.0 {
            config = config.strip_header(name.clone());
        }
        for Header(name) in &self.keep_headers.0 {
            config = config.keep_header(name.clone());
        }
        match &self.documentation {
            Some(Documentation(Some(url))) => config.documentation(url),
            _ => config,
        }
    }

    fn scope(&self) -> Result<Option<Scope>, SettingsError> {
        let scope = self.scope.as_ref().map(ScopeSettings::scope);
        let scope = scope.transpose()?.flatten();
        Ok(match self.scope_required {
            None => scope,
            Some(Flag(true)) => Some(scope.unwrap_or_default().required()),
            Some(Flag(false)) => Some(scope.unwrap_or_default().or_anonymous()),
        })
    }

    /// Moves each value to one place, and refuses what contradicts itself or would not protect. `store_on` is called by the name in
    /// the document.
    fn checked(mut self, store_on: &str) -> Result<Self, SettingsError> {
        self.store_on = self.store_on.or(self.storage.store_on.take());
        if let Some(statuses) = &self.store_on {
            statuses.check(store_on, Config::from(self.preset).store_on)?;
        }
        self.scope()?;
        let nested = self.scope.as_mut().and_then(|scope| scope.required.take());
        self.scope_required = self.scope_required.or(nested);
        self.scope = self
            .scope
            .filter(|scope| *scope != ScopeSettings::default());
        if self.scope()? == Some(Scope::none().required()) {
            let message = "nobody has the scope \"none\", so every request would be refused; choose another scope, or false here";
            return Err(SettingsError::new(Conflict, "scope_required", message));
        }
        if let Some(Methods(methods)) = &self.methods
            && methods.is_empty()
        {
            let message =
                "is empty, so nothing would be protected; leave it out for all unsafe methods";
            return Err(SettingsError::new(Invalid, "methods", message));
        }
        let Headers(stripped) = &self.strip_headers;
        let mut kept = self.keep_headers.0.iter().enumerate();
        if let Some((index, Header(name))) = kept.find(|(_, kept)| stripped.contains(kept)) {
            let message = format_args!("{name} is in `strip_headers` too; keep it in one of them");
            let field = format_args!("keep_headers[{index}]");
            return Err(SettingsError::new(Conflict, field, message));
        }
        let all = self.config().budget.limit();
        if let Some(Bytes(body)) = self.max_request_body
            && body > all
        {
            let message = format_args!(
                "is {body} bytes, and `max_buffered` allows {all} for all bodies together, so such a body would never be taken; raise `max_buffered`"
            );
            return Err(SettingsError::new(Conflict, "max_request_body", message));
        }
        Ok(self)
    }
}
