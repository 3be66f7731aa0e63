//! What is refused: each error names the field, and says what is wrong or what is allowed.

use idempotency_axum::{IdempotencyLayer, Settings, SettingsErrorKind};
use idempotency_tests::sqlite::SqliteFile;
use serde_json::{Value, json};

use crate::{errors, from_environment, try_layer};

/// That a document is refused in all formats alike, with an error that begins with the field.
async fn assert_refused(document: Value, field: &str, says: &[&str]) {
    for error in errors(document.clone()).await {
        let begins = match field {
            "" => "the settings: ".to_owned(),
            field => format!("`{field}`: "),
        };
        assert!(error.starts_with(&begins), "{document}: {error}");
        for part in says {
            assert!(error.contains(part), "{document}: {error} lacks {part:?}");
        }
    }
}

#[tokio::test]
async fn unknown_fields() {
    for (document, field, known) in [
        (
            json!({ "lock_timeout": 5 }),
            "lock_timeout",
            "lock, max_buffered, max_request_body",
        ),
        (json!({ "Mode": "exempt" }), "Mode", "mode"),
        (
            json!({ "lock": { "timeot": 5 } }),
            "lock.timeot",
            "class, enable, location, max_hold, name, timeout, ttl",
        ),
        (
            json!({ "storage": { "url": "x" } }),
            "storage.url",
            "cache_name, class, location",
        ),
        (
            json!({ "storages": { "orders": { "cache_name": "x" } } }),
            "storages.orders.cache_name",
            "class, location",
        ),
        (
            json!({ "storages": { "orders": { "store_on": "all" } } }),
            "storages.orders.store_on",
            "when_full",
        ),
        (
            json!({ "scope": { "cookies": "x" } }),
            "scope.cookies",
            "cookie, header, required",
        ),
        (
            json!({ "store_on": { "above": 200 } }),
            "store_on.above",
            "below, except",
        ),
        (json!({ "lock__timeot": 5 }), "lock.timeot", "timeout"),
        (json!({ "__lock": 5 }), "__lock", "lock"),
        // Of several it is always the same one.
        (
            json!({ "z": 1, "b": 1, "a": 1, "y": 1 }),
            "a",
            "there are: ",
        ),
    ] {
        assert_refused(document, field, &["there is no such field", known]).await;
    }
    let error = toml::from_str::<Settings>("[lock]\ntimeot = 5").unwrap_err();
    assert!(error.to_string().starts_with("`lock.timeot`: "), "{error}");
    let error = from_environment(&[("IDEMPOTENCY__LOCK__TIMEOT", "5")]).unwrap_err();
    assert!(error.to_string().starts_with("`lock.timeot`: "), "{error}");
}

#[tokio::test]
async fn wrong_types_and_values() {
    const DURATION: &str = "expected a duration such as \"30s\"";
    const STATUS: &str = "an HTTP status";
    for (document, field, says) in [
        (json!([]), "", "expected a table of settings, found a list"),
        (
            json!("enforce"),
            "",
            "expected a table of settings, found text",
        ),
        (
            json!({ "mode": "strict" }),
            "mode",
            "expected \"enforce\", \"exempt\" or \"optional\", found \"strict\"",
        ),
        (json!({ "mode": null }), "mode", "found null"),
        (
            json!({ "preset": true }),
            "preset",
            "\"stripe\", found true",
        ),
        (
            json!({ "encoder": "sha1" }),
            "encoder",
            "\"key_only\", found \"sha1\"",
        ),
        (json!({ "key_format": {} }), "key_format", "found a table"),
        (
            json!({ "header": 5 }),
            "header",
            "the name of an HTTP header",
        ),
        (
            json!({ "header": "no header" }),
            "header",
            "found \"no header\"",
        ),
        (json!({ "header": "" }), "header", "found \"\""),
        (
            json!({ "methods": true }),
            "methods",
            "a list of HTTP methods",
        ),
        (
            json!({ "methods": ["POST", "P ST"] }),
            "methods[1]",
            "an HTTP method",
        ),
        (json!({ "methods": ["POST", 5] }), "methods[1]", "found 5"),
        (
            json!({ "conflict_status": "maybe" }),
            "conflict_status",
            "\"original\" for that of the recorded answer, found \"maybe\"",
        ),
        (json!({ "conflict_status": 99 }), "conflict_status", STATUS),
        (
            json!({ "conflict_status": 1000 }),
            "conflict_status",
            STATUS,
        ),
        (
            json!({ "conflict_status": -409 }),
            "conflict_status",
            STATUS,
        ),
        (
            json!({ "conflict_status": 409.5 }),
            "conflict_status",
            STATUS,
        ),
        (
            json!({ "conflict_status": false }),
            "conflict_status",
            STATUS,
        ),
        (
            json!({ "in_flight_status": null }),
            "in_flight_status",
            STATUS,
        ),
        (
            json!({ "store_on": "sometimes" }),
            "store_on[0]",
            "found \"sometimes\"",
        ),
        (
            json!({ "store_on": [200, "all"] }),
            "store_on[1]",
            "an HTTP status (100 to 999), found \"all\"",
        ),
        (
            json!({ "store_on": "200, x" }),
            "store_on[1]",
            "an HTTP status (100 to 999), found \"x\"",
        ),
        (
            json!({ "store_on": [200, 65736] }),
            "store_on[1]",
            "found 65736",
        ),
        (
            json!({ "store_on": ["207-200"] }),
            "store_on[0]",
            "a range of statuses",
        ),
        (
            json!({ "store_on": true }),
            "store_on",
            "\"success\", \"all\", a list",
        ),
        (
            json!({ "store_on": { "below": 100 } }),
            "store_on.below",
            "from 101 to 1000",
        ),
        (
            json!({ "store_on": { "except_rejections": 1 } }),
            "store_on.except_rejections",
            "true or false",
        ),
        (
            json!({ "scope": "session" }),
            "scope",
            "{ \"cookie\": \"<name>\" }",
        ),
        (json!({ "scope": {} }), "scope", "\"authorization\""),
        (
            json!({ "scope": { "header": "x y" } }),
            "scope.header",
            "the name of an HTTP header",
        ),
        (
            json!({ "scope": { "cookie": "a=b" } }),
            "scope.cookie",
            "the name of a cookie",
        ),
        (
            json!({ "scope_required": "perhaps" }),
            "scope_required",
            "true or false",
        ),
        (json!({ "ttl": "soon" }), "ttl", DURATION),
        (json!({ "ttl": "" }), "ttl", DURATION),
        (json!({ "ttl": null }), "ttl", DURATION),
        (json!({ "ttl": true }), "ttl", DURATION),
        (json!({ "ttl": -1 }), "ttl", DURATION),
        (json!({ "ttl": "-1s" }), "ttl", DURATION),
        (json!({ "ttl": 1e300 }), "ttl", DURATION),
        (json!({ "ttl": u64::MAX }), "ttl", "at most 100 years"),
        (json!({ "ttl": "36501d" }), "ttl", "at most 100 years"),
        (json!({ "lock": 5 }), "lock", "expected a table"),
        (
            json!({ "lock": { "enable": "maybe" } }),
            "lock.enable",
            "true or false",
        ),
        (
            json!({ "lock": { "timeout": [] } }),
            "lock.timeout",
            DURATION,
        ),
        (
            json!({ "lock": { "timeout": -0.1 } }),
            "lock.timeout",
            "found -0.1",
        ),
        (
            json!({ "lock": { "class": "file" } }),
            "lock.class",
            "expected \"storage\", \"process\" or \"redis\"",
        ),
        (
            json!({ "lock": { "location": 6379 } }),
            "lock.location",
            "host[:port]",
        ),
        (json!({ "lock": { "name": "" } }), "lock.name", "text"),
        (
            json!({ "on_storage_error": "ignore" }),
            "on_storage_error",
            "\"run_unprotected\"",
        ),
        (
            json!({ "on_unreadable": "ignore" }),
            "on_unreadable",
            "\"treat_as_absent\"",
        ),
        (
            json!({ "storage_timeout": "1 sek" }),
            "storage_timeout",
            DURATION,
        ),
        (
            json!({ "max_request_body": "1M" }),
            "max_request_body",
            "a number of bytes",
        ),
        (
            json!({ "max_response_body": -1 }),
            "max_response_body",
            "a number of bytes",
        ),
        (
            json!({ "max_running": "many" }),
            "max_running",
            "a whole number",
        ),
        (
            json!({ "max_waiting": 0.5 }),
            "max_waiting",
            "a whole number",
        ),
        (
            json!({ "max_buffered": "256M" }),
            "max_buffered",
            "a number of bytes",
        ),
        (
            json!({ "max_buffered": -1 }),
            "max_buffered",
            "a number of bytes",
        ),
        (json!({ "body_timeout": "soon" }), "body_timeout", DURATION),
        (json!({ "body_timeout": null }), "body_timeout", DURATION),
        (
            json!({ "replay_header": 1 }),
            "replay_header",
            "the name of an HTTP header",
        ),
        (
            json!({ "strip_headers": ["a b"] }),
            "strip_headers[0]",
            "the name of an HTTP header",
        ),
        (
            json!({ "keep_headers": {} }),
            "keep_headers",
            "a list of names of headers",
        ),
        (json!({ "documentation": ["x"] }), "documentation", "text"),
        (
            json!({ "storage": "mongodb" }),
            "storage",
            "\"memory\", \"redis\", \"postgres\", \"sqlite\", or a table",
        ),
        (
            json!({ "storage": "redis://cache.memory" }),
            "storage",
            "found \"redis://***\"",
        ),
        (
            json!({ "encoder": "sha.basic" }),
            "encoder",
            "found \"sha.basic\"",
        ),
        (json!({ "storage": 5 }), "storage", "a table"),
        (
            json!({ "storage": { "class": "mongodb" } }),
            "storage.class",
            "expected \"memory\", \"redis\", \"postgres\" or \"sqlite\", found \"mongodb\"",
        ),
        (
            json!({ "storage": { "max_bytes": [] } }),
            "storage.max_bytes",
            "a number of bytes",
        ),
        (
            json!({ "storage": { "when_full": "panic" } }),
            "storage.when_full",
            "\"evict\" or \"refuse\"",
        ),
        (
            json!({ "storage": { "cache_name": " " } }),
            "storage.cache_name",
            "text",
        ),
        (
            json!({ "storages": ["memory"] }),
            "storages",
            "a table of storages",
        ),
        (
            json!({ "storages": { "orders": "mongodb" } }),
            "storages.orders",
            "found \"mongodb\"",
        ),
        (
            json!({ "storages": { "orders": { "class": 1 } } }),
            "storages.orders.class",
            "found 1",
        ),
        (
            json!({ "storages": { "": "memory" } }),
            "storages.",
            "can't be the name of a cache",
        ),
    ] {
        assert_refused(document, field, &[says]).await;
    }
    for text in ["ttl = nan", "ttl = inf", "ttl = -inf", "ttl = 1979-05-27"] {
        let error = toml::from_str::<Settings>(text).unwrap_err();
        assert!(
            error.to_string().starts_with("`ttl`: expected a duration"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn what_would_not_protect() {
    for (document, field, says) in [
        (json!({ "ttl": 0 }), "ttl", "every retry would run again"),
        (json!({ "lock": { "ttl": 0 } }), "lock.ttl", "at least 10ms"),
        (
            json!({ "lock": { "ttl": "9ms" } }),
            "lock.ttl",
            "at least 10ms",
        ),
        (
            json!({ "lock": { "max_hold": 0 } }),
            "lock.max_hold",
            "zero",
        ),
        (
            json!({ "storage_timeout": 0.0 }),
            "storage_timeout",
            "every request would be refused",
        ),
        (
            json!({ "max_running": 0 }),
            "max_running",
            "would refuse every request",
        ),
        (
            json!({ "max_buffered": 0 }),
            "max_buffered",
            "would refuse every request",
        ),
        (
            json!({ "body_timeout": "0s" }),
            "body_timeout",
            "would refuse every request whose body is not there at once",
        ),
        (
            json!({ "storage": { "max_bytes": 0 } }),
            "storage.max_bytes",
            "would keep no record",
        ),
        (
            json!({ "methods": [] }),
            "methods",
            "nothing would be protected",
        ),
        (
            json!({ "methods": ["GET", "POST"] }),
            "methods[0]",
            "never uses keys",
        ),
        (
            json!({ "methods": ["POST", "CONNECT"] }),
            "methods[1]",
            "opens a tunnel and never uses keys",
        ),
        (
            json!({ "store_on": [] }),
            "store_on",
            "every retry would run again",
        ),
        (
            json!({ "store_on": { "statuses": [201], "except": [201] } }),
            "store_on",
            "every retry would run again",
        ),
        (
            json!({ "conflict_status": 101 }),
            "conflict_status",
            "200 to 999",
        ),
        (
            json!({ "in_flight_status": 200 }),
            "in_flight_status",
            "400 to 999",
        ),
        (
            json!({ "mismatch_status": 303 }),
            "mismatch_status",
            "400 to 999",
        ),
        (
            json!({ "replay_header": "Content-Length" }),
            "replay_header",
            "how an answer is to be read",
        ),
        (
            json!({ "scope": "none", "scope_required": true }),
            "scope_required",
            "every request would be refused",
        ),
        (
            json!({ "documentation": "https://a:b@docs.example" }),
            "documentation",
            "without a user and a password",
        ),
    ] {
        assert_refused(document, field, &[says]).await;
    }
}

#[tokio::test]
async fn contradictions() {
    for (document, field, other) in [
        (
            json!({ "store_on": "all", "storage": { "store_on": "all" } }),
            "store_on",
            "`storage.store_on`",
        ),
        (
            json!({ "store_on": "all", "storage": { "store_on_statuses": [200] } }),
            "store_on",
            "`storage.store_on_statuses`",
        ),
        (
            json!({ "encoder": "basic", "encoder_class": "basic" }),
            "encoder",
            "`encoder_class`",
        ),
        (
            json!({ "conflict_status": 1, "conflict_status_code": 1 }),
            "conflict_status",
            "`conflict_status_code`",
        ),
        (
            json!({ "store_on": { "statuses": "all", "below": 500 } }),
            "store_on.below",
            "`store_on.statuses`",
        ),
        (
            json!({ "scope": { "cookie": "a", "header": "b" } }),
            "scope.header",
            "`scope.cookie`",
        ),
        (
            json!({ "scope": { "cookie": "a", "required": true }, "scope_required": true }),
            "scope_required",
            "`scope.required`",
        ),
        (
            json!({ "strip_headers": ["etag"], "keep_headers": ["location", "ETag"] }),
            "keep_headers[1]",
            "`strip_headers`",
        ),
        (
            json!({ "storage": "memory", "storages": { "default": "memory" } }),
            "storages.default",
            "`storage.cache_name`",
        ),
        (
            json!({ "storage": { "cache_name": "orders", "class": "memory" }, "storages": { "orders": "memory" } }),
            "storages.orders",
            "`storage`",
        ),
        (
            json!({ "lock": { "class": "process" }, "storages": { "orders": { "when_full": "refuse" } } }),
            "storages.orders.when_full",
            "`lock.class`",
        ),
        (
            json!({ "lock": { "timeout": 1 }, "lock__timeout": 1 }),
            "lock.timeout",
            "there twice",
        ),
    ] {
        assert_refused(document, field, &[other]).await;
    }
    let twice = r#"{ "lock": { "timeout": 1, "timeout": 1 } }"#;
    let error = serde_json::from_str::<Settings>(twice).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("`lock.timeout`: is there twice"),
        "{error}"
    );
}

#[tokio::test]
async fn a_redis_lock_needs_a_location() {
    for lock in [
        json!({ "class": "redis" }),
        json!({ "class": "redis", "location": "" }),
        json!({ "class": "redis", "location": "  " }),
        json!({ "class": "RedisLock" }),
        json!({ "class": "idempotency_key.locks.basic.MultiProcessRedisLock", "location": "" }),
        json!({ "class": "redis", "enable": false }),
    ] {
        let document = json!({ "lock": lock });
        let error = try_layer(document.clone()).await.unwrap_err();
        assert_eq!(error.kind(), SettingsErrorKind::Missing);
        assert_refused(
            document,
            "lock.location",
            &["missing or empty", "host[:port]", "redis://"],
        )
        .await;
    }
    assert_refused(
        json!({ "lock": { "location": "" } }),
        "lock.location",
        &["is empty", "host[:port]"],
    )
    .await;
    let forgotten = json!({ "lock": { "location": "cache:6379" } });
    assert_refused(
        forgotten,
        "lock.class",
        &["is missing", "`location`", "\"redis\""],
    )
    .await;
}

#[tokio::test]
async fn a_storage_elsewhere_needs_a_location() {
    for (class, form) in [
        ("redis", "host[:port]"),
        ("postgres", "postgres://"),
        ("sqlite", "path of a file"),
    ] {
        for (document, field) in [
            (json!({ "storage": class }), "storage.location"),
            (json!({ "storage": { "class": class } }), "storage.location"),
            (
                json!({ "storage": { "class": class, "location": "" } }),
                "storage.location",
            ),
            (
                json!({ "storages": { "orders": class } }),
                "storages.orders.location",
            ),
            (
                json!({ "storages": { "orders": { "class": class, "location": " " } } }),
                "storages.orders.location",
            ),
        ] {
            let error = try_layer(document.clone()).await.unwrap_err();
            assert_eq!(error.kind(), SettingsErrorKind::Missing, "{error}");
            assert_refused(document, field, &["missing or empty", form]).await;
        }
    }
    assert_refused(
        json!({ "storage": { "location": "" } }),
        "storage.location",
        &["is empty"],
    )
    .await;
    let forgotten = json!({ "storage": { "location": "cache:6379" } });
    assert_refused(forgotten, "storage.class", &["is missing", "`location`"]).await;
}

#[tokio::test]
async fn a_location_has_a_form() {
    let error = |class: &str, location: &str| {
        try_layer(json!({ "storage": { "class": class, "location": location } }))
    };
    for location in [
        "cache.invalid",
        "cache.invalid:6379",
        "127.0.0.1:1",
        "[::1]:1",
        "redis://127.0.0.1:1",
        "redis://shop:hunter2@127.0.0.1:1/0",
        "rediss://127.0.0.1:1",
        "127.0.0.1:1, 127.0.0.1:2",
        "redis+unix:///nowhere/redis.sock",
        "unix:///nowhere/redis.sock",
    ] {
        let error = error("redis", location).await.unwrap_err();
        // The form is right, but nobody is there.
        assert_eq!(
            error.kind(),
            SettingsErrorKind::Unavailable,
            "{location}: {error}"
        );
        assert_eq!(error.field(), "storage.location");
        assert!(error.to_string().contains("Redis can't be reached"));
        assert!(std::error::Error::source(&error).is_some());
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
    for location in [
        "cache:port",
        "cache:70000",
        ":6379",
        "two words",
        "http://cache",
        "redis://",
        "[::1",
        "a:b:1",
        "cache:6379/0",
    ] {
        let error = error("redis", location).await.unwrap_err();
        assert_eq!(
            (error.kind(), error.field()),
            (SettingsErrorKind::Invalid, "storage.location"),
            "{location}"
        );
        assert!(
            error
                .to_string()
                .contains("expected host[:port] or redis://")
        );
    }
}

#[tokio::test]
async fn a_database_that_can_not_be_used() {
    let file = SqliteFile::new();
    let storage = |class: &str, location: &str, name: &str| json!({ "storage": { "class": class, "location": location, "name": name } });
    for (document, kind, field) in [
        (
            storage(
                "postgres",
                "postgres://shop:hunter2@127.0.0.1:1/shop",
                "shop",
            ),
            SettingsErrorKind::Unavailable,
            "storage.location",
        ),
        (
            storage("postgres", "postgres://127.0.0.1/shop", "no table"),
            SettingsErrorKind::Invalid,
            "storage.name",
        ),
        (
            storage("sqlite", ":memory:", "shop"),
            SettingsErrorKind::Invalid,
            "storage.location",
        ),
        (
            storage("sqlite", "/no/such/directory/orders.db", "shop"),
            SettingsErrorKind::Unavailable,
            "storage.location",
        ),
        (
            storage("sqlite", &file.path().to_string_lossy(), "no table"),
            SettingsErrorKind::Invalid,
            "storage.name",
        ),
    ] {
        let error = try_layer(document.clone()).await.unwrap_err();
        assert_eq!((error.kind(), error.field()), (kind, field), "{document}");
        if field == "storage.name" {
            assert!(error.to_string().contains("lower-case letters"), "{error}");
        }
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn a_body_that_never_fits() {
    assert_refused(
        json!({ "max_request_body": "300MiB" }),
        "max_request_body",
        &["`max_buffered`", "268435456"],
    )
    .await;
    assert_refused(
        json!({ "max_buffered": "1MiB", "max_request_body": "2MiB" }),
        "max_request_body",
        &["2097152", "1048576"],
    )
    .await;
    let zero = json!({ "storage": { "class": "sqlite", "location": "x", "purge_every": 0 } });
    assert_refused(zero, "storage.purge_every", &["without a pause"]).await;
    let zero =
        json!({ "storage": { "class": "sqlite", "location": "x", "max_transaction": "0s" } });
    assert_refused(zero, "storage.max_transaction", &["at once"]).await;
}

#[tokio::test]
async fn a_database_holds_its_own_claims() {
    for class in ["postgres", "sqlite"] {
        for lock in [
            json!({ "class": "process" }),
            json!({ "class": "redis", "location": "127.0.0.1:1" }),
        ] {
            let storage = json!({ "class": class, "location": "orders.db" });
            let document = json!({ "storage": storage, "lock": lock });
            let error = try_layer(document.clone()).await.unwrap_err();
            assert_eq!(error.kind(), SettingsErrorKind::Conflict);
            assert_refused(document, "lock.class", &["own claims", "\"storage\""]).await;
        }
    }
}

#[tokio::test]
async fn a_lock_that_nobody_answers_for() {
    let lock = |enable| json!({ "lock": { "class": "redis", "location": "127.0.0.1:1", "enable": enable } });
    let error = try_layer(lock(true)).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.field()),
        (SettingsErrorKind::Unavailable, "lock.location")
    );
    // Without claims there is no lock to be missed.
    let _ = try_layer(lock(false)).await.unwrap();
}

#[tokio::test]
async fn the_future_is_send_and_an_error_is_an_error() {
    fn is_send<F: Future + Send>(future: F) -> F {
        future
    }
    let _ = is_send(IdempotencyLayer::from_settings(Settings::default()))
        .await
        .unwrap();
    let document = json!({ "storage": "redis" });
    let error: Box<dyn std::error::Error + Send + Sync> =
        try_layer(document).await.unwrap_err().into();
    assert!(error.source().is_none());
}
