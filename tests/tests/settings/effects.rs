//! What each field does, seen by a client.

use std::time::Duration;

use axum::{Router, routing::post};
use http::Method;
use idempotency_axum::{
    Config, EncodedKey, Entry, IdempotencyHandler, IdempotencyKey, KeyPolicy, MisuseKind,
    OnStorageError, OnUnreadable,
};
use idempotency_tests::{PATIENCE, postgres::Postgres, sqlite::SqliteFile};
use serde_json::{Value, json};
use tokio::time::Instant;
use tower::ServiceExt;

use crate::{App, layer, settings};

// ---- the rows of the table in the behaviour document

#[tokio::test]
async fn encoder() {
    // (setting, the status for another body, for another path)
    for (encoder, other_body, other_path) in [
        (json!("basic"), 201, 201),
        (json!("BasicKeyEncoder"), 201, 201),
        (json!("idempotency_key.encoders.BasicKeyEncoder"), 201, 201),
        (json!("fingerprint"), 422, 201),
        (json!("FingerprintKeyEncoder"), 422, 201),
        (json!("key_only"), 422, 422),
        (json!("KeyOnlyEncoder"), 422, 422),
    ] {
        for name in ["encoder", "encoder_class"] {
            let app = App::new(json!({ name: encoder })).await;
            assert_eq!(app.post("/orders").key("a").code().await, 201);
            let changed = app.post("/orders").key("a").body("x").code().await;
            let moved = app.post("/refunds").key("a").code().await;
            assert_eq!((changed, moved), (other_body, other_path), "{encoder}");
        }
    }
}

#[tokio::test]
async fn conflict_status() {
    for (status, replayed) in [
        (json!(409), 409),
        (json!("409"), 409),
        (json!(409.0), 409),
        (json!(208), 208),
        (json!(999), 999),
        (json!(null), 201),
        (json!("original"), 201),
        (json!("null"), 201),
        (json!(""), 201),
    ] {
        for name in ["conflict_status", "conflict_status_code"] {
            let app = App::new(json!({ name: status })).await;
            assert_eq!(app.post("/orders").key("a").code().await, 201);
            let replay = app.post("/orders").key("a").send().await;
            assert_eq!(replay.code(), replayed, "{status}");
            assert!(replay.is_replay());
            assert_eq!(replay.text(), "order 1");
            assert_eq!(replay.header("location"), Some("/orders/1"));
        }
    }
}

#[tokio::test]
async fn header() {
    let app = App::new(json!({ "header": "X-Request-Key" })).await;
    assert_eq!(app.post("/orders").key("a").code().await, 400);
    for code in [201, 409] {
        let ask = app.post("/orders").with("x-request-key", "a");
        assert_eq!(ask.code().await, code);
    }
}

#[tokio::test]
async fn storage_class() {
    for storage in [
        json!(null),
        json!({}),
        json!("memory"),
        json!({ "class": "memory" }),
        json!({ "class": "MemoryStorage" }),
        json!({ "class": "idempotency_key.storage.MemoryKeyStorage", "cache_name": "default" }),
    ] {
        let app = App::new(json!({ "storage": storage })).await;
        let codes = [
            app.post("/orders").key("a").code().await,
            app.post("/orders").key("a").code().await,
        ];
        assert_eq!(codes, [201, 409], "{storage}");
    }
}

#[tokio::test]
async fn storage_cache_name_is_what_handlers_may_call_the_default_cache() {
    // (settings, the name of the default cache, one that is unknown)
    for (json, name, unknown) in [
        (json!({}), "default", "main"),
        (json!({ "storage": "memory" }), "default", "main"),
        (
            json!({ "storage": { "cache_name": "main" } }),
            "main",
            "default",
        ),
    ] {
        let json = with(json, json!({ "encoder": "key_only" }));
        let app = App::new(json.clone()).await;
        let default = format!("/cache/{name}");
        assert_eq!(app.post("/orders").key("a").code().await, 201);
        // The same cache: the key was used there.
        assert_eq!(app.post(&default).key("a").code().await, 422, "{json}");
        assert_eq!(app.post(&default).key("b").code().await, 201);
        assert_eq!(app.post("/orders").key("b").code().await, 422);
        let missing = format!("/cache/{unknown}");
        assert_eq!(app.post(&missing).key("a").code().await, 500, "{json}");
    }
}

#[tokio::test]
async fn a_running_operation_is_known_under_both_names_of_its_cache() {
    let app = App::new(json!({ "lock": { "timeout": 0 } })).await;
    let running = app
        .post("/cache/default")
        .key("a")
        .with("x-gate", "")
        .start();
    app.kitchen.gate.arrived(1).await;
    assert_eq!(app.layer.engine().running(), 1);
    assert_eq!(app.layer.engine_of("default").unwrap().running(), 1);
    app.kitchen.gate.open(1);
    assert_eq!(running.await.unwrap().code(), 201);
}

#[tokio::test]
async fn store_on() {
    // (setting, statuses that are stored, statuses that are not)
    let table: [(Value, &[u16], &[u16]); 14] = [
        (json!({}), &[200, 207], &[208, 303, 404]),
        (json!({ "store_on": "success" }), &[200, 207], &[208, 303]),
        (json!({ "store_on": "all" }), &[200, 303, 404, 500], &[]),
        (json!({ "store_on": [200, 201] }), &[200, 201], &[202, 303]),
        (json!({ "store_on": "200,201" }), &[200, 201], &[202, 303]),
        (
            json!({ "store_on": ["303", "400-404"] }),
            &[303, 400, 404],
            &[200, 405],
        ),
        (
            json!({ "store_on": "200-207 303" }),
            &[200, 207, 303],
            &[208],
        ),
        (json!({ "store_on": 201 }), &[201], &[200]),
        (json!({ "store_on": { "below": 500 } }), &[200, 404], &[500]),
        (
            json!({ "store_on": { "below": "500", "except": "404" } }),
            &[200],
            &[404, 500],
        ),
        (
            json!({ "store_on": { "statuses": "all", "except": [500] } }),
            &[404],
            &[500],
        ),
        (json!({ "store_on": { "except": [201] } }), &[200], &[201]),
        (json!({ "storage": { "store_on": [303] } }), &[303], &[200]),
        (
            json!({ "storage": { "store_on_statuses": [200, 303] } }),
            &[200, 303],
            &[201],
        ),
    ];
    for (json, stored, not_stored) in table {
        let app = App::new(with(json.clone(), json!({ "conflict_status": null }))).await;
        let all = stored.iter().map(|status| (status, true));
        for (status, is_stored) in all.chain(not_stored.iter().map(|status| (status, false))) {
            let status = status.to_string();
            let ask = || app.post("/orders").key(&status).with("x-status", &status);
            assert!(!ask().send().await.is_replay());
            assert_eq!(
                ask().send().await.is_replay(),
                is_stored,
                "{json}: {status}"
            );
        }
    }
}

#[tokio::test]
async fn store_on_as_a_table_without_statuses_changes_the_presets() {
    let json =
        json!({ "preset": "ietf", "store_on": { "except": [404], "except_rejections": true } });
    let store_on = settings(json).config().store_on;
    let preset = Config::ietf().store_on;
    assert_eq!(
        store_on,
        preset
            .except([http::StatusCode::NOT_FOUND])
            .except_rejections()
    );
}

#[tokio::test]
async fn lock_class_storage_is_the_default() {
    for lock in [
        json!({}),
        json!({ "class": "storage" }),
        json!({ "class": "storage", "location": "" }),
        json!({ "class": "idempotency_key.locks.basic.ThreadLock" }),
    ] {
        let app = App::new(json!({ "lock": lock })).await;
        assert_eq!(app.post("/orders").key("a").code().await, 201);
        assert_eq!(app.post("/orders").key("a").code().await, 409);
    }
}

#[tokio::test]
async fn lock_class_process_makes_storages_of_a_cache_and_a_lock() {
    for class in ["process", "ProcessLock"] {
        let json = json!({
            "lock": { "class": class, "timeout": 0 },
            "storage": { "max_bytes": "1MiB" },
            "storages": { "orders": "memory" },
        });
        let app = App::new(json).await;
        let parts = format!("{:?}", app.layer);
        assert_eq!(parts.matches("LockedStorage<").count(), 2, "{parts}");
        assert_eq!(parts.matches("ProcessLock").count(), 2, "{parts}");
        for (arrived, path) in [(1, "/orders"), (2, "/cache/orders")] {
            let running = app.post(path).key("a").with("x-gate", "").start();
            app.kitchen.gate.arrived(arrived).await;
            assert_eq!(app.post(path).key("a").code().await, 423);
            app.kitchen.gate.open(1);
            assert_eq!(running.await.unwrap().code(), 201);
            assert_eq!(app.post(path).key("a").code().await, 409);
        }
    }
}

#[tokio::test]
async fn storage_max_bytes_holds_beside_a_process_lock() {
    let json = json!({ "lock": { "class": "process" }, "storage": { "max_bytes": "4KiB" } });
    let app = App::new(json).await;
    for key in 0..40 {
        assert_eq!(app.post("/orders").key(&key.to_string()).code().await, 201);
    }
    // The first one was evicted.
    assert_eq!(app.post("/orders").key("0").code().await, 201);
    assert_eq!(app.post("/orders").key("39").code().await, 409);
}

#[tokio::test]
async fn lock_name_does_nothing_where_the_lock_has_no_keys() {
    let app = App::new(json!({ "lock": { "name": "MyLock" } })).await;
    assert_eq!(app.post("/orders").key("a").code().await, 201);
}

/// What a handler tells of its key.
async fn encoded(key: IdempotencyKey) -> String {
    key.encoded().to_string()
}

#[tokio::test(start_paused = true)]
async fn lock_ttl_is_the_lease() {
    for (ttl, seconds) in [
        (json!({}), 30),
        (json!({ "ttl": "7s" }), 7),
        (json!({ "ttl": 7 }), 7),
    ] {
        let app = App::in_process(json!({ "lock": ttl })).await;
        let key = encoded_key(&app, "a").await;
        let running = app.post("/orders").key("a").with("x-gate", "").start();
        app.kitchen.gate.arrived(1).await;
        let Some(Entry::Claimed { lease_left, .. }) = app.layer.engine().get(&key).await.unwrap()
        else {
            panic!("no claim");
        };
        assert_eq!(lease_left, Some(Duration::from_secs(seconds)));
        app.kitchen.gate.open(1);
        running.await.unwrap();
    }
}

/// The key under which `/orders` keeps a request without a body.
async fn encoded_key(app: &App, key: &str) -> EncodedKey {
    let router = Router::new()
        .route("/orders", post(encoded))
        .layer(layer(json!({})).await);
    let ask = App {
        router,
        ..app.clone()
    };
    ask.post("/orders")
        .key(key)
        .send()
        .await
        .text()
        .parse()
        .unwrap()
}

#[tokio::test]
async fn lock_enable() {
    for (enable, runs) in [
        (json!(true), 1),
        (json!("true"), 1),
        (json!(false), 2),
        (json!("FALSE"), 2),
    ] {
        let app = App::new(json!({ "lock": { "enable": enable, "timeout": 0 } })).await;
        let ask = || app.post("/orders").key("a").with("x-gate", "").start();
        let first = ask();
        app.kitchen.gate.arrived(1).await;
        let second = ask();
        app.kitchen.gate.arrived(runs).await;
        app.kitchen.gate.open(2);
        let codes = [first.await.unwrap().code(), second.await.unwrap().code()];
        assert_eq!(app.runs(), runs, "{enable}: {codes:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn lock_timeout_is_how_long_a_duplicate_waits() {
    for (lock, millis) in [
        (json!({}), 100),
        (json!({ "timeout": 0 }), 0),
        (json!({ "timeout": 0.25 }), 250),
        (json!({ "timeout": "0.25" }), 250),
        (json!({ "timeout": "250ms" }), 250),
        (json!({ "timeout": "20s" }), 20_000),
        (json!({ "timeout": "1m 30s" }), 90_000),
    ] {
        let app = App::in_process(json!({ "lock": lock })).await;
        let first = app.post("/orders").key("a").with("x-gate", "").start();
        app.kitchen.gate.arrived(1).await;
        let since = Instant::now();
        let second = app.post("/orders").key("a").with("x-gate", "").send().await;
        let waited = since.elapsed().as_millis();
        assert_eq!(
            (second.code(), second.problem().as_deref()),
            (423, Some("in-flight"))
        );
        assert_eq!(second.header("retry-after"), Some("1"));
        // tokio's timers count whole milliseconds.
        assert!(
            (millis..=millis + 2).contains(&waited),
            "{lock}: {waited} ms"
        );
        app.kitchen.gate.open(1);
        assert_eq!(first.await.unwrap().code(), 201);
    }
}

// ---- the other fields

#[tokio::test]
async fn mode() {
    for (mode, code) in [
        (json!("enforce"), 400),
        (json!("exempt"), 201),
        (json!("EXEMPT"), 201),
        (json!("optional"), 201),
    ] {
        let app = App::new(json!({ "mode": mode })).await;
        assert_eq!(app.post("/orders").code().await, code, "{mode}");
    }
}

#[tokio::test]
async fn preset_is_where_defaults_come_from() {
    // (preset, other body, retry, replay header)
    for (preset, other_body, retry, replayed) in [
        ("default", 201, 409, "idempotency-replayed"),
        ("django", 201, 409, "idempotency-replayed"),
        ("ietf", 422, 201, "idempotency-replayed"),
        ("stripe", 400, 201, "idempotent-replayed"),
    ] {
        let app = App::new(json!({ "preset": preset })).await;
        assert_eq!(app.post("/orders").key("a").code().await, 201);
        let changed = app.post("/orders").key("a").body("x").code().await;
        let replay = app.post("/orders").key("a").send().await;
        assert_eq!((changed, replay.code()), (other_body, retry), "{preset}");
        assert_eq!(replay.header(replayed), Some("true"));
    }
    let app = App::new(json!({ "preset": "ietf", "conflict_status": 409 })).await;
    assert_eq!(app.post("/orders").key("a").code().await, 201);
    assert_eq!(app.post("/orders").key("a").code().await, 409);
}

#[tokio::test]
async fn in_flight_status_and_mismatch_status() {
    let json = json!({
        "encoder": "fingerprint", "in_flight_status": 409, "mismatch_status": "400", "lock": { "timeout": 0 },
    });
    let app = App::new(json).await;
    let first = app.post("/orders").key("a").with("x-gate", "").start();
    app.kitchen.gate.arrived(1).await;
    let duplicate = app.post("/orders").key("a").send().await;
    assert_eq!(
        (duplicate.code(), duplicate.problem().as_deref()),
        (409, Some("in-flight"))
    );
    let other = app.post("/orders").key("a").body("x").send().await;
    assert_eq!(
        (other.code(), other.problem().as_deref()),
        (400, Some("key-reused"))
    );
    app.kitchen.gate.open(1);
    first.await.unwrap();
}

#[tokio::test]
async fn methods() {
    for methods in [json!(["POST", "PATCH"]), json!("post, patch")] {
        let app = App::new(json!({ "methods": methods })).await;
        for (method, code) in [
            (Method::POST, 400),
            (Method::PATCH, 400),
            (Method::PUT, 201),
        ] {
            assert_eq!(app.ask(method, "/orders").code().await, code);
        }
    }
}

#[tokio::test]
async fn key_format() {
    let app = App::new(json!({ "key_format": "uuid" })).await;
    assert_eq!(app.post("/orders").key("a").code().await, 400);
    let uuid = "8e03978e-40d5-43dd-bc93-6894a57f9324";
    assert_eq!(app.post("/orders").key(uuid).code().await, 201);
    let app = App::new(json!({ "key_format": "any" })).await;
    assert_eq!(app.post("/orders").key("a").code().await, 201);
}

#[tokio::test]
async fn scope() {
    // (setting, the headers that make another caller)
    for (scope, headers) in [
        (json!("default"), &["authorization", "x-api-key"][..]),
        (json!("authorization"), &["authorization"]),
        (json!({ "cookie": "session" }), &["cookie"]),
        (json!({ "header": "X-Tenant" }), &["x-tenant"]),
        (json!("none"), &[]),
    ] {
        let app = App::new(json!({ "scope": scope, "scope_required": false })).await;
        for name in ["authorization", "cookie", "x-tenant", "x-api-key"] {
            let ask = |who: &str| {
                let who = format!("session={who}");
                app.post("/orders").key(name).with(name, &who).code()
            };
            let bob = if headers.contains(&name) { 201 } else { 409 };
            assert_eq!(
                (ask("alice").await, ask("bob").await),
                (201, bob),
                "{scope}"
            );
        }
    }
}

#[tokio::test]
async fn scope_required() {
    for json in [
        json!({ "scope_required": true }),
        json!({ "scope_required": "true" }),
        json!({ "scope": "default", "scope_required": true }),
        json!({ "scope": "authorization", "scope_required": true }),
        json!({ "scope": { "required": true } }),
        json!({ "scope": { "header": "authorization", "required": true } }),
        json!({ "scope": { "header": "authorization" } }),
    ] {
        let app = App::new(json.clone()).await;
        let refused = app.post("/orders").key("a").send().await;
        assert_eq!(
            (refused.code(), refused.problem().as_deref()),
            (403, Some("scope-required")),
            "{json}"
        );
        let ask = app.post("/orders").key("a").with("authorization", "alice");
        assert_eq!(ask.code().await, 201);
    }
    for json in [
        json!({}),
        json!({ "scope": "default" }),
        json!({ "scope": "none" }),
        json!({ "scope": { "cookie": "session", "required": false } }),
        json!({ "scope": { "header": "x-tenant", "required": false } }),
        json!({ "scope": { "header": "x-tenant" }, "scope_required": "false" }),
    ] {
        let app = App::new(json.clone()).await;
        assert_eq!(app.post("/orders").key("a").code().await, 201, "{json}");
    }
}

#[tokio::test]
async fn a_cookie_alone_is_refused_by_the_default_scope() {
    for (json, code) in [
        (json!({}), 403),
        (json!({ "scope": "default" }), 403),
        (json!({ "scope_required": false }), 201),
        (json!({ "scope": "default", "scope_required": false }), 201),
        (json!({ "scope": { "required": false } }), 201),
        (json!({ "scope": "authorization" }), 201),
    ] {
        let app = App::new(json.clone()).await;
        let ask = app.post("/orders").key("a").with("cookie", "session=alice");
        assert_eq!(ask.code().await, code, "{json}");
    }
}

#[tokio::test(start_paused = true)]
async fn ttl_is_how_long_a_record_is_kept() {
    for (json, seconds) in [
        (json!({}), 24 * 3600),
        (json!({ "ttl": "1h" }), 3600),
        (json!({ "ttl": 60 }), 60),
        (json!({ "ttl": "60" }), 60),
    ] {
        let app = App::in_process(json.clone()).await;
        assert_eq!(app.post("/orders").key("a").code().await, 201);
        tokio::time::advance(Duration::from_secs(seconds - 1)).await;
        assert_eq!(app.post("/orders").key("a").code().await, 409, "{json}");
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(app.post("/orders").key("a").code().await, 201, "{json}");
    }
}

#[tokio::test(start_paused = true)]
async fn lock_max_hold_is_when_an_operation_is_given_up() {
    let json = json!({ "lock": { "max_hold": "90s", "timeout": "5m" } });
    let app = App::in_process(json).await;
    let first = app.post("/orders").key("a").with("x-gate", "").start();
    app.kitchen.gate.arrived(1).await;
    let since = Instant::now();
    let duplicate = app.post("/orders").key("a").send().await;
    assert_eq!(
        (duplicate.code(), duplicate.problem().as_deref()),
        (409, Some("not-replayable"))
    );
    assert!(
        (89..=121).contains(&since.elapsed().as_secs()),
        "{:?}",
        since.elapsed()
    );
    app.kitchen.gate.open(1);
    first.await.unwrap();
}

#[tokio::test]
async fn max_request_body() {
    for bytes in [json!(1024), json!("1024"), json!("1KiB"), json!("1 kib")] {
        let app = App::new(json!({ "max_request_body": bytes })).await;
        assert_eq!(
            app.post("/orders")
                .key("a")
                .body(&"x".repeat(1024))
                .code()
                .await,
            201
        );
        assert_eq!(
            app.post("/orders")
                .key("b")
                .body(&"x".repeat(1025))
                .code()
                .await,
            413
        );
    }
}

#[tokio::test]
async fn max_response_body() {
    let app = App::new(json!({ "max_response_body": "1KiB" })).await;
    for code in [201, 409] {
        let long = app
            .post("/orders")
            .key("a")
            .with("x-size", "1024")
            .send()
            .await;
        assert_eq!((long.code(), long.is_replay()), (code, false));
    }
    assert_eq!(app.runs(), 1);
}

#[tokio::test]
async fn max_running_and_max_waiting() {
    let app =
        App::new(json!({ "max_running": 1, "max_waiting": "0", "lock": { "timeout": "10s" } }))
            .await;
    let first = app.post("/orders").key("a").with("x-gate", "").start();
    app.kitchen.gate.arrived(1).await;
    for key in ["a", "b"] {
        let refused = app.post("/orders").key(key).send().await;
        assert_eq!(
            (refused.code(), refused.problem().as_deref()),
            (503, Some("overloaded")),
            "{key}"
        );
    }
    app.kitchen.gate.open(1);
    first.await.unwrap();
}

#[tokio::test]
async fn max_buffered_is_a_limit_on_all_bodies_together() {
    for bytes in [json!(1024), json!("1KiB")] {
        let app = App::new(json!({ "max_buffered": bytes })).await;
        let post = |key| app.post("/orders").key(key).body(&"x".repeat(600));
        let first = post("a").with("x-gate", "").start();
        app.kitchen.gate.arrived(1).await;
        let refused = post("b").send().await;
        assert_eq!(
            (refused.code(), refused.problem().as_deref()),
            (503, Some("overloaded"))
        );
        app.kitchen.gate.open(1);
        assert_eq!(first.await.unwrap().code(), 201);
        assert_eq!(post("b").code().await, 201);
    }
}

#[tokio::test(start_paused = true)]
async fn body_timeout_is_how_long_a_body_may_be_silent() {
    for (body_timeout, seconds) in [(json!("5s"), 5), (json!(0.5), 0), (json!("1m"), 60)] {
        let app = App::in_process(json!({ "body_timeout": body_timeout })).await;
        let silent = axum::body::Body::from_stream(futures_util::stream::pending::<
            Result<axum::body::Bytes, std::convert::Infallible>,
        >());
        let request = http::Request::post("/orders").header("idempotency-key", "a");
        let since = Instant::now();
        let answer = app.router.oneshot(request.body(silent).unwrap()).await;
        assert_eq!(answer.unwrap().status(), 408);
        assert_eq!(since.elapsed().as_secs(), seconds);
        assert_eq!(app.kitchen.runs.count(), 0);
    }
}

#[tokio::test]
async fn replay_header() {
    for (replay_header, expected) in [
        (json!("X-Replayed"), Some("x-replayed")),
        (json!(null), None),
        (json!(""), None),
    ] {
        let app = App::new(json!({ "replay_header": replay_header })).await;
        app.post("/orders").key("a").send().await;
        let replay = app.post("/orders").key("a").send().await;
        assert_eq!((replay.code(), replay.is_replay()), (409, false));
        assert_eq!(
            expected.and_then(|name| replay.header(name)),
            expected.map(|_| "true")
        );
    }
}

#[tokio::test]
async fn strip_headers_and_keep_headers() {
    // (settings, whether a replay has the location, the cookie)
    for (json, location, cookie) in [
        (json!({}), true, false),
        (json!({ "strip_headers": ["Location"] }), false, false),
        (json!({ "keep_headers": "set-cookie" }), true, true),
        (
            json!({ "strip_headers": "location", "keep_headers": ["Set-Cookie"] }),
            false,
            true,
        ),
    ] {
        let app = App::new(json.clone()).await;
        app.post("/orders").key("a").send().await;
        let replay = app.post("/orders").key("a").send().await;
        let found = ["location", "set-cookie"].map(|name| replay.header(name).is_some());
        assert_eq!(found, [location, cookie], "{json}");
    }
}

#[tokio::test]
async fn documentation() {
    let app = App::new(json!({ "documentation": "https://api.example/keys" })).await;
    let refused = app.post("/orders").send().await;
    assert_eq!(
        refused.header("link"),
        Some("<https://api.example/keys>; rel=\"describedby\"")
    );
    let app = App::new(json!({ "documentation": null })).await;
    assert_eq!(app.post("/orders").send().await.header("link"), None);
}

/// What happens when a storage fails is tested with one that does, in other suites; here is that the setting arrives.
#[test]
fn on_storage_error_on_unreadable_and_storage_timeout() {
    let config = settings(json!({
        "on_storage_error": "run_unprotected", "on_unreadable": "treat_as_absent", "storage_timeout": "250ms",
    }))
    .config();
    assert_eq!(config.on_storage_error, OnStorageError::RunUnprotected);
    assert_eq!(config.on_unreadable, OnUnreadable::TreatAsAbsent);
    assert_eq!(config.storage_timeout, Duration::from_millis(250));
    let config =
        settings(json!({ "on_storage_error": "reject", "on_unreadable": "reject" })).config();
    assert_eq!(config.on_storage_error, OnStorageError::Reject);
    assert_eq!(config.on_unreadable, OnUnreadable::Reject);
}

#[tokio::test]
async fn a_memory_storage_that_is_full_refuses_or_evicts() {
    // (when_full, a new key when it is full, the first key again)
    for (when_full, new, first) in [("refuse", 503, 409), ("evict", 201, 201)] {
        let storage = json!({ "max_bytes": "4KiB", "when_full": when_full });
        // The default cache and a named one are set up alike.
        for (json, path) in [
            (json!({ "storage": storage }), "/orders"),
            (
                json!({ "storages": { "orders": storage } }),
                "/cache/orders",
            ),
        ] {
            let app = App::new(json).await;
            for key in 0..40 {
                let code = app.post(path).key(&key.to_string()).code().await;
                assert!(code == 201 || code == new, "{code}");
            }
            assert_eq!(app.post(path).key("last").code().await, new, "{when_full}");
            assert_eq!(app.post(path).key("0").code().await, first, "{when_full}");
        }
    }
}

#[tokio::test]
async fn named_storages_are_caches_of_their_own() {
    let json = json!({ "encoder": "key_only", "storages": { "orders": "memory", "refunds": { "class": "memory" } } });
    let app = App::new(json).await;
    for path in ["/orders", "/cache/orders", "/cache/refunds"] {
        assert_eq!(app.post(path).key("a").code().await, 201);
        assert_eq!(app.post(path).key("a").code().await, 409);
    }
}

#[tokio::test]
async fn the_default_cache_may_be_one_of_the_storages() {
    for (name, storage) in [
        ("default", json!(null)),
        ("default", json!({})),
        ("default", json!({ "cache_name": "default" })),
        (
            "main",
            json!({ "cache_name": "main", "store_on": "success" }),
        ),
    ] {
        let json = json!({
            "encoder": "key_only",
            "storage": storage,
            "storages": { name: { "max_bytes": "4MiB" }, "refunds": "memory" },
        });
        let app = App::new(json).await;
        assert_eq!(app.post("/orders").key("a").code().await, 201);
        let default = format!("/cache/{name}");
        assert_eq!(app.post(&default).key("a").code().await, 422);
        assert_eq!(app.post("/cache/refunds").key("a").code().await, 201);
    }
}

#[tokio::test]
async fn check_names_an_unknown_cache_and_the_known_ones() {
    let json = json!({ "storage": { "cache_name": "main" }, "storages": { "refunds": "memory" } });
    let layer = layer(json).await;
    let handler = encoded.idempotency_key(KeyPolicy::required().cache_name("orders"));
    let router = Router::new()
        .route("/orders", post(handler))
        .layer(layer.clone());
    let misuse = layer.check(router).unwrap_err();
    let MisuseKind::UnknownCache { cache, known, .. } = misuse.kind() else {
        panic!("{misuse:?}");
    };
    assert_eq!(
        (cache.as_str(), known),
        ("orders", &vec!["main".to_owned(), "refunds".to_owned()])
    );
    assert!(misuse.to_string().contains("\"orders\""));
    assert!(misuse.to_string().contains("main, refunds"));
}

#[tokio::test]
async fn what_a_file_cannot_say_is_set_afterwards() {
    let settings = settings(json!({ "header": "x-key" }));
    let config = settings.config().scope(idempotency_axum::Scope::none());
    let layer = idempotency_axum::IdempotencyLayer::from_settings(settings)
        .await
        .unwrap();
    let layer = layer.config(config);
    let handler = (|| async { "ok" }).idempotency_key(KeyPolicy::required().cache_name("default"));
    let router = Router::new().route("/", post(handler)).layer(layer.clone());
    let router = layer.check(router).unwrap();
    for (who, code) in [("alice", 200), ("bob", 409)] {
        let request = http::Request::post("/")
            .header("x-key", "a")
            .header("authorization", who);
        let request = request.body(axum::body::Body::empty()).unwrap();
        assert_eq!(
            router.clone().oneshot(request).await.unwrap().status(),
            code
        );
    }
}

/// One table with the fields of both.
fn with(table: Value, more: Value) -> Value {
    let (Value::Object(mut table), Value::Object(more)) = (table, more) else {
        panic!("tables are needed");
    };
    table.extend(more);
    Value::Object(table)
}

#[tokio::test]
async fn max_transaction() {
    let file = SqliteFile::new();
    let mut storage = json!({ "class": "sqlite", "location": file.path() });
    for (limit, expected) in [(None, 5), (Some("3s"), 3)] {
        if let Some(limit) = limit {
            storage["max_transaction"] = json!(limit);
        }
        let settings = serde_json::from_value(json!({ "storage": storage })).unwrap();
        let layer = idempotency_axum::IdempotencyLayer::from_settings(settings)
            .await
            .unwrap();
        let transactions = layer.engine().transactions().unwrap();
        assert_eq!(transactions.max_duration().as_secs(), expected);
    }
}

/// By the settings, every 50 ms: nobody else asks for it.
#[tokio::test]
async fn purge_every() {
    let file = SqliteFile::new();
    let storage = json!({ "class": "sqlite", "location": file.path(), "purge_every": "50ms" });
    let app =
        App::new(json!({ "ttl": "10ms", "storage_timeout": "60s", "storage": storage })).await;
    assert_eq!(app.post("/orders").key("a").code().await, 201);
    let looks = async {
        while file.number("SELECT count(*) FROM idempotency").await > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, looks)
        .await
        .expect("the row goes");
}

/// Records outlive the layer, and each cache has a table of its own.
#[tokio::test]
async fn a_storage_in_a_database() {
    let (file, server) = (SqliteFile::new(), Postgres::start());
    for (class, location) in [
        ("sqlite", file.path().to_string_lossy().into_owned()),
        ("postgres", server.url()),
    ] {
        let storage = json!({ "class": class, "location": location, "name": "shop" });
        let document = json!({
            "storage_timeout": "60s",
            "storage": storage,
            "storages": { "orders": storage },
        });
        let first = App::new(document.clone()).await;
        for path in ["/cache/default", "/cache/orders"] {
            assert_eq!(first.post(path).key("a").code().await, 201, "{class}");
        }
        assert_eq!(first.runs(), 2);
        drop(first);
        let second = App::new(document).await;
        for path in ["/cache/default", "/cache/orders"] {
            assert!(
                second.post(path).key("a").send().await.is_replay(),
                "{class}"
            );
        }
        assert_eq!(second.runs(), 0);
    }
    let tables = "SELECT count(*) FROM pg_tables WHERE tablename IN ('shop', 'shop_orders')";
    assert_eq!(server.number(tables).await, 2);
}
