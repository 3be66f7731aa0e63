//! JSON, TOML and the environment say the same.

use std::{collections::HashMap, time::Duration};

use idempotency_axum::{IdempotencyLayer, LockPolicy, Settings, SettingsErrorKind};
use serde::{
    Deserialize,
    de::{IntoDeserializer, value::Error, value::MapDeserializer},
};
use serde_json::json;

use crate::{from_environment, settings};

const TOML: &str = r#"
mode = "exempt"
preset = "ietf"
header = "X-Key"
methods = ["POST", "PATCH"]
key_format = "uuid"
encoder = "key_only"
scope = { cookie = "session", required = true }
conflict_status = "original"
in_flight_status = 409
store_on = { below = 500, except = [404] }
ttl = "1h30m"
on_storage_error = "run_unprotected"
storage_timeout = 0.5
max_request_body = "64KiB"
max_running = 10
max_buffered = "1MiB"
body_timeout = 5.0
replay_header = "x-replayed"
strip_headers = ["location", "etag"]

[lock]
enable = false
timeout = 0.1
ttl = "10s"
class = "storage"
name = "MyLock"

[storage]
class = "memory"
cache_name = "main"
max_bytes = 1048576

[storages]
orders = "memory"
refunds = { class = "memory", when_full = "refuse" }
"#;

const JSON: &str = r#"{
    "mode": "exempt",
    "preset": "ietf",
    "header": "x-key",
    "methods": ["POST", "PATCH"],
    "key_format": "uuid",
    "encoder": "KeyOnlyEncoder",
    "scope": { "cookie": "session" },
    "scope_required": true,
    "conflict_status": null,
    "in_flight_status": 409,
    "store_on": { "below": 500, "except": [404] },
    "ttl": 5400,
    "on_storage_error": "run_unprotected",
    "storage_timeout": "500ms",
    "max_request_body": 65536,
    "max_running": 10,
    "max_buffered": 1048576,
    "body_timeout": "5s",
    "replay_header": "x-replayed",
    "strip_headers": ["location", "etag"],
    "lock": { "enable": false, "timeout": "100ms", "ttl": 10.0, "class": "storage", "name": "MyLock" },
    "storage": { "class": "memory", "cache_name": "main", "max_bytes": "1MiB" },
    "storages": { "orders": "memory", "refunds": { "class": "memory", "when_full": "refuse" } }
}"#;

const ENVIRONMENT: [(&str, &str); 32] = [
    ("IDEMPOTENCY__MODE", "exempt"),
    ("IDEMPOTENCY__PRESET", "ietf"),
    ("IDEMPOTENCY__HEADER", "X-Key"),
    ("IDEMPOTENCY__METHODS", "POST,PATCH"),
    ("IDEMPOTENCY__KEY_FORMAT", "uuid"),
    ("IDEMPOTENCY__ENCODER", "key_only"),
    ("IDEMPOTENCY__SCOPE__COOKIE", "session"),
    ("IDEMPOTENCY__SCOPE__REQUIRED", "true"),
    ("IDEMPOTENCY__CONFLICT_STATUS", "original"),
    ("IDEMPOTENCY__IN_FLIGHT_STATUS", "409"),
    ("IDEMPOTENCY__STORE_ON__BELOW", "500"),
    ("IDEMPOTENCY__STORE_ON__EXCEPT", "404"),
    ("IDEMPOTENCY__TTL", "1h30m"),
    ("IDEMPOTENCY__ON_STORAGE_ERROR", "run_unprotected"),
    ("IDEMPOTENCY__STORAGE_TIMEOUT", "0.5"),
    ("IDEMPOTENCY__MAX_REQUEST_BODY", "64KiB"),
    ("IDEMPOTENCY__MAX_RUNNING", "10"),
    ("IDEMPOTENCY__MAX_BUFFERED", "1 MiB"),
    ("IDEMPOTENCY__BODY_TIMEOUT", "5"),
    ("IDEMPOTENCY__REPLAY_HEADER", "x-replayed"),
    ("IDEMPOTENCY__STRIP_HEADERS", "location, etag"),
    ("IDEMPOTENCY__LOCK__ENABLE", "false"),
    ("IDEMPOTENCY__LOCK__TIMEOUT", "0.1"),
    ("IDEMPOTENCY__LOCK__TTL", "10"),
    ("IDEMPOTENCY__LOCK__CLASS", "storage"),
    ("IDEMPOTENCY__LOCK__NAME", "MyLock"),
    ("IDEMPOTENCY__STORAGE__CLASS", "memory"),
    ("IDEMPOTENCY__STORAGE__CACHE_NAME", "main"),
    ("IDEMPOTENCY__STORAGE__MAX_BYTES", "1048576"),
    ("IDEMPOTENCY__STORAGES__ORDERS", "memory"),
    ("IDEMPOTENCY__STORAGES__REFUNDS__CLASS", "memory"),
    ("IDEMPOTENCY__STORAGES__REFUNDS__WHEN_FULL", "refuse"),
];

#[tokio::test]
async fn all_formats_give_equal_settings() {
    let from_json: Settings = serde_json::from_str(JSON).unwrap();
    assert_ne!(from_json, Settings::default());
    assert_eq!(settings(serde_json::from_str(JSON).unwrap()), from_json);
    assert_eq!(toml::from_str::<Settings>(TOML).unwrap(), from_json);
    assert_eq!(from_environment(&ENVIRONMENT).unwrap(), from_json);
    for (text, format) in [
        (JSON, config::FileFormat::Json),
        (TOML, config::FileFormat::Toml),
    ] {
        let file = config::File::from_str(text, format);
        let config = config::Config::builder().add_source(file).build().unwrap();
        assert_eq!(config.try_deserialize::<Settings>().unwrap(), from_json);
    }
    let _ = IdempotencyLayer::from_settings(from_json).await.unwrap();
}

/// A loader may turn what looks like a number into one.
#[test]
fn an_environment_that_is_parsed_is_the_same() {
    let variables = ENVIRONMENT
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let environment = config::Environment::with_prefix("IDEMPOTENCY")
        .separator("__")
        .try_parsing(true)
        .source(Some(variables.collect()));
    let config = config::Config::builder()
        .add_source(environment)
        .build()
        .unwrap();
    let parsed: Settings = config.try_deserialize().unwrap();
    assert_eq!(parsed, from_environment(&ENVIRONMENT).unwrap());
}

/// A loader that knows no nesting gives one table of text.
#[test]
fn a_flat_environment_is_the_same() {
    let flat: HashMap<String, String> = ENVIRONMENT
        .iter()
        .map(|(name, value)| {
            let name = name.strip_prefix("IDEMPOTENCY__").unwrap();
            (name.to_lowercase(), (*value).to_owned())
        })
        .collect();
    let deserializer: MapDeserializer<'_, _, Error> = flat.into_deserializer();
    let flat = Settings::deserialize(deserializer).unwrap();
    assert_eq!(flat, from_environment(&ENVIRONMENT).unwrap());
}

#[test]
fn the_environment_overrides_a_file() {
    let environment = |variables: &[(&str, &str)]| {
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        config::Environment::with_prefix("IDEMPOTENCY")
            .separator("__")
            .source(Some(variables.collect()))
    };
    let overridden = config::Config::builder()
        .add_source(config::File::from_str(TOML, config::FileFormat::Toml))
        .add_source(environment(&[
            ("IDEMPOTENCY__LOCK__TIMEOUT", "2s"),
            ("IDEMPOTENCY__CONFLICT_STATUS", "208"),
            ("IDEMPOTENCY__STORAGES__ORDERS__MAX_BYTES", "1MiB"),
            ("ELSEWHERE__MODE", "nonsense"),
        ]))
        .build()
        .unwrap()
        .try_deserialize::<Settings>()
        .unwrap();
    let mut expected: serde_json::Value = serde_json::from_str(JSON).unwrap();
    expected["lock"]["timeout"] = json!(2);
    expected["conflict_status"] = json!(208);
    expected["storages"]["orders"] = json!({ "max_bytes": 1 << 20 });
    assert_eq!(overridden, settings(expected));
}

/// The file keeps what the class of production needs.
#[tokio::test]
async fn the_environment_can_set_a_class_that_needs_no_location() {
    let file = r#"
        lock = { class = "redis", location = "cache:6379" }
        storage = { class = "redis", location = "redis://:pw@cache:6379", name = "shop" }
    "#;
    let read = |class: &str| {
        let variables = ["IDEMPOTENCY__LOCK__CLASS", "IDEMPOTENCY__STORAGE__CLASS"];
        let variables = variables.map(|name| (name.to_owned(), class.to_owned()));
        let environment = config::Environment::with_prefix("IDEMPOTENCY")
            .separator("__")
            .source(Some(variables.into()));
        let config = config::Config::builder()
            .add_source(config::File::from_str(file, config::FileFormat::Toml))
            .add_source(environment)
            .set_override("lock.class", "storage")
            .unwrap();
        config
            .build()
            .unwrap()
            .try_deserialize::<Settings>()
            .unwrap()
    };
    let _ = IdempotencyLayer::from_settings(read("memory"))
        .await
        .unwrap();
}

/// Settings are mostly one part of an application's own.
#[test]
fn settings_may_lie_in_a_larger_document() {
    #[derive(Deserialize)]
    struct Application {
        port: u16,
        #[serde(default)]
        idempotency: Settings,
    }
    let text = "port = 80\n[idempotency]\nmode = \"exempt\"\n[idempotency.lock]\ntimeout = 5";
    let application: Application = toml::from_str(text).unwrap();
    assert_eq!(application.port, 80);
    let expected = settings(json!({ "mode": "exempt", "lock": { "timeout": 5 } }));
    assert_eq!(application.idempotency, expected);
    let absent: Application = toml::from_str("port = 80").unwrap();
    assert_eq!(absent.idempotency, Settings::default());
}

#[test]
fn what_the_readme_shows_is_read() {
    let readme = include_str!("../../../README.md");
    let (_, rest) = readme.split_once("```toml\n").expect("settings in TOML");
    let (shown, _) = rest.split_once("```").expect("their end");
    let read: Settings = toml::from_str(shown).expect("valid settings");
    assert_eq!(read.config().ttl, Duration::from_secs(7 * 24 * 3600));
    assert_eq!(read.config().conflict_status, None);
    let lock = LockPolicy::default().timeout(Duration::from_secs(2));
    assert_eq!(read.config().lock, lock);
}

/// The same message as that of `Deserialize`, but nothing around it.
#[test]
fn read_returns_the_kind_and_the_field_in_every_format() {
    let toml = toml::Deserializer::parse("[lock]\ntimeout = \"soon\"").unwrap();
    let errors = [
        Settings::read(toml).unwrap_err(),
        Settings::read(json!({ "lock": { "timeout": "soon" } })).unwrap_err(),
        Settings::read(
            config::Config::builder()
                .set_override("lock.timeout", "soon")
                .unwrap()
                .build()
                .unwrap(),
        )
        .unwrap_err(),
    ];
    for error in errors {
        assert_eq!(
            (error.kind(), error.field()),
            (SettingsErrorKind::Invalid, "lock.timeout")
        );
        let message = error.to_string();
        assert!(
            message.starts_with("`lock.timeout`: expected a duration"),
            "{message}"
        );
        assert!(message.ends_with("found \"soon\""), "{message:?}");
    }
}

#[test]
fn read_refuses_what_is_not_of_its_format() {
    let text = "{ \"ttl\": 5,\n  \"header\" }";
    let error = Settings::read(&mut serde_json::Deserializer::from_str(text)).unwrap_err();
    assert_eq!(
        (error.kind(), error.field()),
        (SettingsErrorKind::Unreadable, "")
    );
    let message = error.to_string();
    assert!(
        message.starts_with("the settings: can't be read: "),
        "{message}"
    );
    assert!(message.ends_with("at line 2 column 12"), "{message}");
}
