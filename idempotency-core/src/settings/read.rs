//! What every field means.

use std::{collections::BTreeMap, time::Duration};

use http::{HeaderName, Method, StatusCode, header};

use super::{
    EncoderName, KeyFormatName, LockSettings, Mode, Preset, Settings, StorageSettings, Terms,
    error::{SettingsError, SettingsErrorKind},
    field::{Field, Fields, either},
    secret::{Location, may_hold_a_secret},
    storage::{LockKind, StorageKind, WhatWhenFull, is_host_and_port},
    value::Value,
};
use crate::{LockPolicy, OnStorageError, OnUnreadable, Scope, StoreOn};

type Result<T, E = SettingsError> = std::result::Result<T, E>;

impl Settings {
    pub(super) fn read(document: Field) -> Result<Self> {
        let mut fields = document.fields("a table of settings")?;
        let mode = fields.read("mode", read_mode)?;
        let lock = fields.read("lock", LockSettings::read)?;
        let storage = fields.read("storage", read_storage)?;
        let DefaultStorage {
            storage,
            cache_name,
            store_on,
        } = storage.unwrap_or_default();
        let storages = fields.read("storages", read_storages)?;
        let terms = Terms::read(&mut fields, store_on)?;
        fields.finish()?;
        Ok(Self {
            mode: mode.unwrap_or_default(),
            terms,
            lock: lock.unwrap_or_default(),
            default_cache: cache_name,
            storage,
            storages: storages.unwrap_or_default(),
        })
    }
}

impl Terms {
    /// `store_on` may stand in the storage's table too.
    fn read(fields: &mut Fields, storages_store_on: Option<Field>) -> Result<Self> {
        let preset = fields.read("preset", read_preset)?;
        let preset = preset.unwrap_or_default();

        let store_on = fields.take_either("store_on", "store_on_statuses")?;
        let store_on = either(store_on, storages_store_on)?;
        let strip_headers = fields.read("strip_headers", read_headers)?;
        let strip_headers = strip_headers.unwrap_or_default();
        let keep_headers = fields.read("keep_headers", |field| read_kept(field, &strip_headers))?;
        Ok(Self {
            preset,
            header: fields.read("header", Field::header_name)?,
            methods: fields.read("methods", read_methods)?,
            key_format: fields.read("key_format", read_key_format)?,
            encoder: fields.read_either("encoder", "encoder_class", read_encoder)?,
            scope: read_scope(fields)?,
            conflict_status: fields.read_either(
                "conflict_status",
                "conflict_status_code",
                read_conflict_status,
            )?,
            in_flight_status: fields.read("in_flight_status", read_refusal)?,
            mismatch_status: fields.read("mismatch_status", read_refusal)?,
            store_on: store_on
                .map(|field| read_store_on(&field, preset))
                .transpose()?,
            ttl: fields.read("ttl", |field| {
                field.positive_duration("would keep no record, so every retry would run again")
            })?,
            on_storage_error: fields.read("on_storage_error", read_on_storage_error)?,
            on_unreadable: fields.read("on_unreadable", read_on_unreadable)?,
            storage_timeout: fields.read("storage_timeout", |field| {
                let why = "would leave the storage no time, so every request would be refused";
                field.positive_duration(why)
            })?,
            max_request_body: fields.read("max_request_body", Field::bytes)?,
            max_response_body: fields.read("max_response_body", Field::bytes)?,
            max_running: fields.read("max_running", read_max_running)?,
            max_waiting: fields.read("max_waiting", Field::count)?,
            max_buffered: fields.read("max_buffered", read_max_buffered)?,
            body_timeout: fields.read("body_timeout", |field| {
                field
                    .positive_duration("would refuse every request whose body is not there at once")
            })?,
            replay_header: fields.read("replay_header", read_replay_header)?,
            documentation: fields.read("documentation", read_documentation)?.flatten(),
            strip_headers,
            keep_headers: keep_headers.unwrap_or_default(),
        })
    }
}

fn read_mode(field: &Field) -> Result<Mode> {
    field.one_of(
        "\"enforce\", \"exempt\" or \"optional\"",
        &[
            ("enforce", Mode::Enforce),
            ("exempt", Mode::Exempt),
            ("optional", Mode::Optional),
        ],
    )
}

fn read_preset(field: &Field) -> Result<Preset> {
    field.one_of(
        "\"default\", \"django\", \"ietf\" or \"stripe\"",
        &[
            ("default", Preset::Default),
            ("django", Preset::Default),
            ("ietf", Preset::Ietf),
            ("stripe", Preset::Stripe),
        ],
    )
}

fn read_encoder(field: &Field) -> Result<EncoderName> {
    field.one_of(
        "\"basic\", \"fingerprint\" or \"key_only\"",
        &[
            ("basic", EncoderName::Basic),
            ("BasicKeyEncoder", EncoderName::Basic),
            ("fingerprint", EncoderName::Fingerprint),
            ("FingerprintKeyEncoder", EncoderName::Fingerprint),
            ("key_only", EncoderName::KeyOnly),
            ("KeyOnlyEncoder", EncoderName::KeyOnly),
        ],
    )
}

fn read_key_format(field: &Field) -> Result<KeyFormatName> {
    field.one_of(
        "\"any\" or \"uuid\"",
        &[("any", KeyFormatName::Any), ("uuid", KeyFormatName::Uuid)],
    )
}

fn read_on_storage_error(field: &Field) -> Result<OnStorageError> {
    field.one_of(
        "\"reject\" or \"run_unprotected\"",
        &[
            ("reject", OnStorageError::Reject),
            ("run_unprotected", OnStorageError::RunUnprotected),
        ],
    )
}

fn read_on_unreadable(field: &Field) -> Result<OnUnreadable> {
    field.one_of(
        "\"reject\" or \"treat_as_absent\"",
        &[
            ("reject", OnUnreadable::Reject),
            ("treat_as_absent", OnUnreadable::TreatAsAbsent),
        ],
    )
}

/// The replay header has the value `true`, which would break an answer under these names.
fn read_replay_header(field: &Field) -> Result<Option<HeaderName>> {
    const MEAN_SOMETHING: [HeaderName; 8] = [
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::CONTENT_ENCODING,
        header::CONTENT_TYPE,
        header::TRANSFER_ENCODING,
        header::TRAILER,
        header::UPGRADE,
        header::TE,
    ];
    if field.is_null() {
        return Ok(None);
    }
    let name = field.header_name()?;
    if MEAN_SOMETHING.contains(&name) {
        let why =
            format_args!("{name} says how an answer is to be read; choose a name of your own");
        return Err(field.refused(why));
    }
    Ok(Some(name))
}

fn read_headers(field: &Field) -> Result<Vec<HeaderName>> {
    let items = field.items("a list of names of headers")?;
    items.iter().map(Field::header_name).collect()
}

/// Headers that are not `stripped`.
fn read_kept(field: &Field, stripped: &[HeaderName]) -> Result<Vec<HeaderName>> {
    let kept = read_headers(field)?;
    match kept.iter().position(|name| stripped.contains(name)) {
        None => Ok(kept),
        Some(index) => {
            let name = &kept[index];
            let message = format_args!("{name} is in `strip_headers` too; keep it in one of them");
            Err(SettingsError::new(
                SettingsErrorKind::Conflict,
                &field.path.item(index),
                message,
            ))
        }
    }
}

fn read_methods(field: &Field) -> Result<Vec<Method>> {
    const ALLOWED: &str = "a list of HTTP methods, such as [\"POST\", \"PATCH\"]";

    let mut methods = Vec::new();
    for item in field.items(ALLOWED)? {
        let name = item.text()?.to_ascii_uppercase();
        let method = Method::from_bytes(name.as_bytes()).map_err(|error| {
            item.expected("an HTTP method, such as \"POST\"")
                .because_of(error)
        })?;
        if method.is_safe() {
            let why = format_args!("{method} is safe to repeat and never uses keys; remove it");
            return Err(item.refused(why));
        }
        if method == Method::CONNECT {
            let why = format_args!("{method} opens a tunnel and never uses keys; remove it");
            return Err(item.refused(why));
        }
        methods.push(method);
    }
    match methods.is_empty() {
        false => Ok(methods),
        true => Err(field.refused(
            "is empty, so nothing would be protected; leave it out for all unsafe methods",
        )),
    }
}

fn read_conflict_status(field: &Field) -> Result<Option<StatusCode>> {
    if field.is_null() || is_word(field, "original") {
        return Ok(None);
    }
    // hyper can't send a 1xx as an answer.
    let allowed =
        "an HTTP status (200 to 999), or null or \"original\" for that of the recorded answer";
    field.status_within(200, allowed).map(Some)
}

/// The status of a request that did not run: with one below 400 its client would think that it did.
fn read_refusal(field: &Field) -> Result<StatusCode> {
    field.status_within(400, "an HTTP status of an error (400 to 999)")
}

fn read_max_running(field: &Field) -> Result<usize> {
    match field.count()? {
        0 => Err(field.refused("zero would refuse every request; give a higher number")),
        operations => Ok(operations),
    }
}

fn read_max_buffered(field: &Field) -> Result<usize> {
    match field.bytes()? {
        0 => Err(field.refused("zero would refuse every request; give a higher number")),
        bytes => Ok(bytes),
    }
}

/// Clients are sent the URL, so it must not be one with a password; what has no proper host may be one.
fn read_documentation(field: &Field) -> Result<Option<String>> {
    const ALLOWED: &str =
        "an http or https URL without a user and a password, or a path that begins with `/`";

    if field.is_null() {
        return Ok(None);
    }
    let url = field.text()?;
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"));
    let is_public = match rest {
        Some(rest) => is_host_and_port(rest.split(['/', '?', '#']).next().unwrap_or_default()),
        None => url.starts_with('/'),
    };
    match is_public {
        true => Ok(Some(url.to_owned())),
        false => Err(field.expected(ALLOWED)),
    }
}

fn is_word(field: &Field, word: &str) -> bool {
    field
        .text()
        .is_ok_and(|text| text.eq_ignore_ascii_case(word))
}

// ---- scope

fn read_scope(fields: &mut Fields) -> Result<Option<Scope>> {
    const ALLOWED: &str = "\"default\", \"authorization\", \"none\", { \"cookie\": \"<name>\" } or { \"header\": \"<name>\" }";

    let scope = fields.take("scope");
    let mut required = fields.take("scope_required");
    let scope = match scope {
        None => None,
        Some(field) if is_word(&field, "default") => Some(Scope::default()),
        Some(field) if is_word(&field, "authorization") => Some(Scope::authorization()),
        Some(field) if is_word(&field, "none") => Some(Scope::none()),
        Some(field) => {
            let mut table = field.fields(ALLOWED)?;
            let cookie = table.take("cookie");
            let header = table.take("header");
            required = either(required, table.take("required"))?;
            table.finish()?;
            match (cookie, header) {
                (Some(cookie), None) => Some(read_cookie(&cookie)?),
                // A name that was checked, so that `Scope::header` can't panic.
                (None, Some(header)) => Some(Scope::header(header.header_name()?)),
                (None, None) if required.is_some() => None,
                (None, None) => return Err(field.expected(ALLOWED)),
                (Some(_), Some(header)) => {
                    let message = format_args!(
                        "a scope is one thing; remove this or `{}.cookie`",
                        field.path
                    );
                    return Err(SettingsError::new(
                        SettingsErrorKind::Conflict,
                        &header.path,
                        message,
                    ));
                }
            }
        }
    };
    let Some(required) = required else {
        return Ok(scope);
    };
    if !required.flag()? {
        return Ok(Some(scope.unwrap_or_default().or_anonymous()));
    }
    if scope == Some(Scope::none()) {
        let message = "nobody has the scope \"none\", so every request would be refused; choose another scope, or false \
                       here";
        return Err(SettingsError::new(
            SettingsErrorKind::Conflict,
            &required.path,
            message,
        ));
    }
    Ok(Some(scope.unwrap_or_default().required()))
}

/// RFC 6265: the name of a cookie is a token, as that of a header is.
fn read_cookie(field: &Field) -> Result<Scope> {
    let name = field.text()?;
    match HeaderName::from_bytes(name.as_bytes()) {
        Ok(_) => Ok(Scope::cookie(name)),
        Err(error) => Err(field.expected("the name of a cookie").because_of(error)),
    }
}

// ---- store_on

const STORE_ON: &str = "\"success\", \"all\", a list of statuses, or a table of `statuses`, `below`, `except` and \
                        `except_rejections`";

fn read_store_on(field: &Field, preset: Preset) -> Result<StoreOn> {
    let store_on = match &field.value {
        Value::Table(_) => read_store_on_table(field, preset)?,
        _ => read_statuses(field)?,
    };
    if (100..=999)
        .any(|status| StatusCode::from_u16(status).is_ok_and(|status| store_on.stores(status)))
    {
        return Ok(store_on);
    }
    Err(field.refused(
        "records no answer at all, so every retry would run again; name a status at least",
    ))
}

fn read_store_on_table(field: &Field, preset: Preset) -> Result<StoreOn> {
    let mut table = field.fields(STORE_ON)?;
    let statuses = table.take("statuses");
    let below = table.take("below");
    let except = table.take("except");
    let rejections = table.read("except_rejections", Field::flag)?;
    table.finish()?;
    let store_on = match (statuses, below) {
        (Some(statuses), None) => read_statuses(&statuses)?,
        (None, Some(below)) => match below.integer::<u16>() {
            Some(limit @ 101..=1000) => StoreOn::below(limit),
            _ => return Err(below.expected("a number from 101 to 1000, such as 500")),
        },
        (None, None) => preset.config().store_on,
        (Some(_), Some(below)) => {
            let message = format_args!("contradicts `{}.statuses`; keep one of them", field.path);
            return Err(SettingsError::new(
                SettingsErrorKind::Conflict,
                &below.path,
                message,
            ));
        }
    };
    let store_on = match except {
        None => store_on,
        Some(except) => store_on.except(status_list(&except, "a list of statuses")?),
    };
    match rejections {
        Some(true) => Ok(store_on.except_rejections()),
        Some(false) | None => Ok(store_on),
    }
}

fn read_statuses(field: &Field) -> Result<StoreOn> {
    if is_word(field, "success") {
        return Ok(StoreOn::success());
    }
    if is_word(field, "all") {
        return Ok(StoreOn::all());
    }
    Ok(StoreOn::statuses(status_list(field, STORE_ON)?))
}

/// Statuses, and ranges of them as text: `200-207`.
fn status_list(field: &Field, allowed: &str) -> Result<Vec<StatusCode>> {
    let mut statuses = Vec::new();
    for item in field.items(allowed)? {
        let range = match &item.value {
            Value::Text(text) => text.split_once('-'),
            _ => None,
        };
        let Some((first, last)) = range else {
            statuses.push(item.status()?);
            continue;
        };
        let status = |text: &str| {
            let status = text.trim().parse().ok()?;
            StatusCode::from_u16(status).ok()
        };
        match (status(first), status(last)) {
            (Some(first), Some(last)) if first <= last => statuses.extend(
                (first.as_u16()..=last.as_u16())
                    .filter_map(|status| StatusCode::from_u16(status).ok()),
            ),
            _ => return Err(item.expected("a range of statuses, such as \"200-207\"")),
        }
    }
    Ok(statuses)
}

// ---- lock and storages

impl LockSettings {
    fn read(field: &Field) -> Result<Self> {
        let mut fields = field.fields("a table, such as { \"timeout\": \"5s\" }")?;
        let lock = Self {
            class: fields.read("class", read_lock_class)?,
            enable: fields.read("enable", Field::flag)?,
            timeout: fields.read("timeout", Field::duration)?,
            ttl: fields.read("ttl", read_lease)?,
            max_hold: fields.read("max_hold", |field| {
                field.positive_duration("would give every operation up at once")
            })?,
            location: fields.read("location", read_location)?,
            name: fields.read("name", read_name)?,
        };
        fields.finish()?;
        Ok(lock)
    }
}

fn read_lock_class(field: &Field) -> Result<LockKind> {
    field.one_of(
        "\"storage\", \"process\" or \"redis\"",
        &[
            ("storage", LockKind::Storage),
            // The original's is held within one process. The storage's claims are that at least.
            ("ThreadLock", LockKind::Storage),
            ("process", LockKind::Process),
            ("ProcessLock", LockKind::Process),
            ("redis", LockKind::Redis),
            ("RedisLock", LockKind::Redis),
            ("MultiProcessRedisLock", LockKind::Redis),
        ],
    )
}

fn read_lease(field: &Field) -> Result<Duration> {
    let lease = field.duration()?;
    if lease < LockPolicy::MIN_TTL {
        let shortest = LockPolicy::MIN_TTL;
        let why = format_args!(
            "a lease of {lease:?} would end before it is renewed; give at least {shortest:?}"
        );
        return Err(field.refused(why));
    }
    Ok(lease)
}

/// What `storage` says, which may be more than a storage.
#[derive(Default)]
struct DefaultStorage {
    storage: StorageSettings,
    cache_name: Option<String>,
    store_on: Option<Field>,
}

fn read_storage(field: &Field) -> Result<DefaultStorage> {
    if let Value::Text(_) = &field.value {
        return Ok(DefaultStorage {
            storage: StorageSettings::of_class(field)?,
            ..DefaultStorage::default()
        });
    }
    let mut fields = field.fields(STORAGE)?;
    let cache_name = fields.read("cache_name", read_name)?;
    let store_on = fields.take_either("store_on", "store_on_statuses")?;
    let storage = StorageSettings::read(&mut fields)?;
    fields.finish()?;
    Ok(DefaultStorage {
        storage,
        cache_name,
        store_on,
    })
}

fn read_storages(field: &Field) -> Result<BTreeMap<String, StorageSettings>> {
    let fields = field.fields("a table of storages, such as { \"orders\": \"memory\" }")?;
    let mut storages = BTreeMap::new();
    for (name, field) in fields.into_rest() {
        if name.trim().is_empty() || may_hold_a_secret(&name) {
            return Err(
                field.refused("this can't be the name of a cache; choose one such as \"orders\"")
            );
        }
        let storage = match &field.value {
            Value::Text(_) => StorageSettings::of_class(&field)?,
            _ => {
                let mut fields = field.fields(STORAGE)?;
                let storage = StorageSettings::read(&mut fields)?;
                fields.finish()?;
                storage
            }
        };
        storages.insert(name, storage);
    }
    Ok(storages)
}

const STORAGE: &str = "\"memory\", \"redis\", or a table with `class` and more";

impl StorageSettings {
    /// What is only a class.
    fn of_class(field: &Field) -> Result<Self> {
        Ok(Self {
            class: Some(read_storage_class(field, STORAGE)?),
            ..Self::default()
        })
    }

    fn read(fields: &mut Fields) -> Result<Self> {
        const CLASSES: &str = "\"memory\" or \"redis\"";
        Ok(Self {
            class: fields.read("class", |field| read_storage_class(field, CLASSES))?,
            location: fields.read("location", read_location)?,
            name: fields.read("name", read_name)?,
            max_bytes: fields.read("max_bytes", read_max_bytes)?,
            when_full: fields.read("when_full", read_when_full)?,
            require_noeviction: fields.read("require_noeviction", Field::flag)?,
        })
    }
}

fn read_storage_class(field: &Field, allowed: &str) -> Result<StorageKind> {
    field.one_of(
        allowed,
        &[
            ("memory", StorageKind::Memory),
            ("MemoryStorage", StorageKind::Memory),
            ("MemoryKeyStorage", StorageKind::Memory),
            ("redis", StorageKind::Redis),
            ("RedisStorage", StorageKind::Redis),
        ],
    )
}

/// Its form depends on the class, so it is checked when it is opened.
fn read_location(field: &Field) -> Result<Location> {
    match &field.value {
        Value::Text(text) => Ok(Location(text.trim().to_owned())),
        _ => Err(field.expected("text: host[:port] or a URL")),
    }
}

/// A name is shown to whoever asks for a cache that is not there.
fn read_name(field: &Field) -> Result<String> {
    let name = field.text()?;
    match may_hold_a_secret(name) {
        false => Ok(name.to_owned()),
        true => Err(field.expected("a name, such as \"orders\"")),
    }
}

fn read_max_bytes(field: &Field) -> Result<usize> {
    match field.bytes()? {
        0 => {
            Err(field
                .refused("zero would keep no record, so every retry would run again; give more"))
        }
        bytes => Ok(bytes),
    }
}

fn read_when_full(field: &Field) -> Result<WhatWhenFull> {
    field.one_of(
        "\"evict\" or \"refuse\"",
        &[
            ("evict", WhatWhenFull::Evict),
            ("refuse", WhatWhenFull::Refuse),
        ],
    )
}
