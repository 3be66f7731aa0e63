//! Settings from a file or the environment.
//!
//! A document becomes [`Settings`] in three steps. It is read as a tree of values ([`value`]), which any self-describing format
//! gives. [`Document::read`] then takes the fields out of the tree, each with its path ([`field`]), and refuses those that are left.
//! Last, [`Document::check`] refuses fields that contradict each other. So an error is the same in all formats.

use std::{collections::BTreeMap, time::Duration};

use http::{HeaderName, HeaderValue, Method, StatusCode};
use serde::{Deserialize, Deserializer, de::Error as _};

use self::{
    error::{Result, SettingsErrorKind::Conflict},
    field::{Field, Table, either, table},
    scalar::nonzero,
    secret::Shown,
    storage::{LockSettings, StorageSettings},
    value::Value,
};
use crate::{
    AnyStorage, BasicKeyEncoder, Config, FingerprintKeyEncoder, KeyFormat, KeyOnlyEncoder, Mode,
    OnStorageError, OnUnreadable, Scope, StoreOn,
};

mod error;
mod field;
mod scalar;
mod scope;
mod secret;
#[cfg_attr(
    not(feature = "redis"),
    allow(unused, reason = "without Redis some of it is not called")
)]
mod storage;
mod store_on;
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
        let document = Value::deserialize(document).map_err(SettingsError::unreadable)?;
        Document::read(document).map(Self)
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
        let lock = document.fields.lock.clone().unwrap_or_default();
        let limit = config.storage_timeout;
        let mut caches = BTreeMap::new();
        for (name, storage) in document.fields.storages.iter().flatten() {
            let table = format!("storages.{}", Shown(name));
            let storage = storage.open(&table, Some(name), &lock, limit).await?;
            caches.insert(name.clone(), storage);
        }
        let default_cache = document.default_cache.as_deref().unwrap_or("default");
        let storage = match (caches.remove(default_cache), &document.storage) {
            (None, storage) => storage.open("storage", None, &lock, limit).await?,
            (Some(default), storage) if *storage == StorageSettings::default() => default,
            (Some(_), _) => {
                let field = format_args!("storages.{}", Shown(default_cache));
                let message = "is the name of the default cache, which `storage` describes; choose another name, or another \
                               `storage.cache_name`";
                return Err(SettingsError::new(Conflict, field, message));
            }
        };
        Ok(Opened {
            mode: document.fields.mode.unwrap_or_default(),
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
        Document::read(document).map(Self).map_err(D::Error::custom)
    }
}

/// What [`Settings`] hold, checked. `None` is the value of the preset.
#[derive(Clone, Debug, Default, PartialEq)]
struct Document {
    fields: Fields,
    scope: Option<Scope>,
    store_on: Option<StoreOn>,
    default_cache: Option<String>,
    storage: StorageSettings,
}

/// Of the fields under `set`, each is an option of [`Config`] by its name.
macro_rules! fields {
    (
        set { $($option:ident $(or $other:ident)?: $type:ty = $read:expr;)* }
        keep { $($field:ident $(or $other_field:ident)?: $field_type:ty = $read_field:expr;)* }
    ) => {
        table! {
            /// The fields that are read one by one.
            struct Fields {
                $($option $(or $other)?: $type = $read;)*
                $($field $(or $other_field)?: $field_type = $read_field;)*
            }
        }

        impl Fields {
            fn set(&self, config: &mut Config) {
                $(if let Some(value) = self.$option.clone() {
                    config.$option = value.into();
                })*
            }
        }
    };
}

// A new option of `Config` needs a line here, and a row in the docs of `Settings`.
fields! {
    set {
        header: HeaderName = Field::header_name;
        methods: Vec<Method> = Field::methods;
        conflict_status or conflict_status_code: Option<StatusCode> = Field::conflict_status;
        in_flight_status: StatusCode = Field::refusal_status;
        mismatch_status: StatusCode = Field::refusal_status;
        ttl: Duration = nonzero(Field::duration, "would keep no record, so every retry would run again");
        on_storage_error: OnStorageError = |field| field.one_of(&[
            (&["reject"], OnStorageError::Reject),
            (&["run_unprotected"], OnStorageError::RunUnprotected),
        ]);
        on_unreadable: OnUnreadable = |field| field.one_of(&[
            (&["reject"], OnUnreadable::Reject),
            (&["treat_as_absent"], OnUnreadable::TreatAsAbsent),
        ]);
        storage_timeout: Duration = nonzero(Field::duration, "would leave the storage no time, so every request would be refused");
        max_request_body: usize = Field::bytes;
        max_response_body: usize = Field::bytes;
        max_running: usize = nonzero(Field::count, "would refuse every request; give a higher number");
        max_waiting: usize = Field::count;
        body_timeout: Duration = nonzero(Field::duration, "would refuse every request whose body is not there at once");
        replay_header: Option<HeaderName> = Field::replay_header;
        documentation: Option<HeaderValue> = Field::documentation;
    }
    keep {
        mode: Mode = |field| field.one_of(&[
            (&["enforce"], Mode::Enforce),
            (&["exempt"], Mode::Exempt),
            (&["optional"], Mode::Optional),
        ]);
        preset: Preset = |field| field.one_of(&[
            (&["default", "django"], Preset::Default),
            (&["ietf"], Preset::Ietf),
            (&["stripe"], Preset::Stripe),
        ]);
        key_format: KeyFormatName = |field| field.one_of(&[
            (&["any"], KeyFormatName::Any),
            (&["uuid"], KeyFormatName::Uuid),
        ]);
        encoder or encoder_class: EncoderName = |field| field.one_of(&[
            (&["basic", "BasicKeyEncoder"], EncoderName::Basic),
            (&["fingerprint", "FingerprintKeyEncoder"], EncoderName::Fingerprint),
            (&["key_only", "KeyOnlyEncoder"], EncoderName::KeyOnly),
        ]);
        strip_headers: Vec<HeaderName> = Field::header_names;
        keep_headers: Vec<HeaderName> = Field::header_names;
        max_buffered: usize = nonzero(Field::bytes, "would refuse every request; give a higher number");
        lock: LockSettings = |field| field.table("a table, such as { \"timeout\": \"5s\" }", LockSettings::read);
        storages: BTreeMap<String, StorageSettings> = storage::read_named;
    }
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

impl From<Preset> for Config {
    fn from(preset: Preset) -> Self {
        match preset {
            Preset::Default => Self::default(),
            Preset::Ietf => Self::ietf(),
            Preset::Stripe => Self::stripe(),
        }
    }
}

impl Document {
    fn read(document: Value) -> Result<Self> {
        let path = String::new();
        let value = document.nested();
        Field { path, value }.table("a table of settings", Self::read_fields)
    }

    fn read_fields(table: &mut Table<'_>) -> Result<Self> {
        const STORE_ON: [&str; 2] = ["store_on", "store_on_statuses"];

        let fields = Fields::read(table)?;
        let storage = |table: &mut Table<'_>| {
            let store_on = table.take(&STORE_ON)?;
            let cache_name = table.read(&["cache_name"], Field::name)?;
            Ok((store_on, cache_name, StorageSettings::read(table)?))
        };
        let storage = table.read(&["storage"], |field| storage::table(field, storage))?;
        let (nested, default_cache, storage) = storage.unwrap_or_default();
        let store_on = either(table.take(&STORE_ON)?, nested)?;
        let preset = Config::from(fields.preset.unwrap_or_default()).store_on;
        let store_on = store_on.map(|field| store_on::read(&field, preset));
        let document = Self {
            fields,
            scope: scope::read(table.take(&["scope"])?, table.take(&["scope_required"])?)?,
            store_on: store_on.transpose()?,
            default_cache,
            storage,
        };
        document.check().map(|()| document)
    }

    /// Refuses fields that contradict each other.
    fn check(&self) -> Result<()> {
        let stripped = self.fields.strip_headers.as_deref().unwrap_or_default();
        let kept = self.fields.keep_headers.iter().flatten();
        if let Some((index, name)) = kept.enumerate().find(|(_, name)| stripped.contains(name)) {
            let field = format_args!("keep_headers[{index}]");
            let message = format_args!("{name} is in `strip_headers` too; keep it in one of them");
            return Err(SettingsError::new(Conflict, field, message));
        }
        let all = self.config().budget.limit();
        if let Some(body) = self.fields.max_request_body
            && body > all
        {
            let message = format_args!(
                "is {body} bytes, and `max_buffered` allows {all} for all bodies together, so such a body would never be taken; raise `max_buffered`"
            );
            return Err(SettingsError::new(Conflict, "max_request_body", message));
        }
        Ok(())
    }

    fn config(&self) -> Config {
        let fields = &self.fields;
        let mut config = Config::from(fields.preset.unwrap_or_default());
        fields.set(&mut config);
        config = match fields.key_format {
            None => config,
            Some(KeyFormatName::Any) => config.key_format(KeyFormat::any()),
            Some(KeyFormatName::Uuid) => config.key_format(KeyFormat::uuid()),
        };
        config = match fields.encoder {
            None => config,
            Some(EncoderName::Basic) => config.encoder(BasicKeyEncoder),
            Some(EncoderName::Fingerprint) => config.encoder(FingerprintKeyEncoder),
            Some(EncoderName::KeyOnly) => config.encoder(KeyOnlyEncoder),
        };
        config.scope = self.scope.clone().unwrap_or(config.scope);
        config.store_on = self.store_on.clone().unwrap_or(config.store_on);
        if let Some(lock) = &fields.lock {
            config.lock = lock.policy(config.lock);
        }
        if let Some(bytes) = fields.max_buffered {
            config = config.max_buffered(bytes);
        }
        let stripped = fields.strip_headers.iter().flatten().cloned();
        let config = stripped.fold(config, Config::strip_header);
        let kept = fields.keep_headers.iter().flatten().cloned();
        kept.fold(config, Config::keep_header)
    }
}
