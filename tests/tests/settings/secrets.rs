//! No password is shown, wherever it stands, whatever it is made of.

use idempotency_axum::{IdempotencyLayer, Settings};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use crate::{from_environment, layered, settings};

/// Made so that nothing else in a message can contain it.
const PASSWORD: &str = "hunter2";

/// All that a document leads to: an error of its format, or what its settings show.
fn shown(document: &Value) -> Vec<String> {
    let layered = layered(document).map(|settings| match settings {
        Ok(settings) => format!("{settings:?}"),
        Err(error) => format!("{error} {error:?}"),
    });
    let mut shown = Vec::from_iter(layered);
    match serde_json::from_value::<Settings>(document.clone()) {
        Err(error) => shown.push(format!("{error} {error:?}")),
        Ok(settings) => {
            shown.push(format!(
                "{settings:?} {settings:#?} {:?}",
                settings.config()
            ));
            let layer =
                futures_util::FutureExt::now_or_never(IdempotencyLayer::from_settings(settings));
            shown.push(match layer.expect("nothing to wait for") {
                Ok(layer) => format!("{layer:?}"),
                Err(error) => format!(
                    "{error} {error:?} {} {:?}",
                    error.field(),
                    std::error::Error::source(&error)
                ),
            });
        }
    }
    shown
}

#[track_caller]
fn assert_hidden(document: &Value) {
    for shown in shown(document) {
        assert!(!shown.contains(PASSWORD), "{document}: {shown}");
    }
}

fn urls() -> Vec<String> {
    let mut urls = Vec::new();
    for (before, after) in [
        ("", ""),
        ("a@", "@b"),
        ("/", "/"),
        ("", ":x"),
        ("?", "#"),
        ("\"", "'"),
        ("%20", "%40"),
        (" ", "\n"),
        ("[", "]"),
        ("__", ","),
    ] {
        for user in ["", "shop"] {
            for scheme in ["redis", "postgres", "redis+unix", "http"] {
                urls.push(format!(
                    "{scheme}://{user}:{before}{PASSWORD}{after}@cache:6379/0"
                ));
            }
        }
    }
    urls.push(format!(":{PASSWORD}@cache:6379"));
    urls.push(format!("redis://:{PASSWORD}"));
    urls.push(format!("postgres://db/shop?user=a&password={PASSWORD}"));
    urls.push(format!("host=db password={PASSWORD}"));
    urls
}

const FIELDS: [&str; 28] = [
    "mode",
    "preset",
    "encoder",
    "conflict_status",
    "in_flight_status",
    "mismatch_status",
    "header",
    "methods",
    "key_format",
    "scope",
    "scope_required",
    "store_on",
    "ttl",
    "lock",
    "on_storage_error",
    "on_unreadable",
    "storage_timeout",
    "max_request_body",
    "max_running",
    "max_waiting",
    "max_buffered",
    "body_timeout",
    "replay_header",
    "strip_headers",
    "keep_headers",
    "documentation",
    "storage",
    "storages",
];

#[test]
fn a_url_in_the_wrong_place_does_not_show_its_password() {
    for url in urls() {
        assert_hidden(&json!(url));
        assert_hidden(&json!({ &url: 1 }));
        for field in FIELDS {
            assert_hidden(&json!({ field: url }));
            assert_hidden(&json!({ field: [url] }));
            assert_hidden(&json!({ field: { &url: url } }));
            assert_hidden(&json!({ field: { &url: { "class": "redis" } } }));
        }
        for field in [
            "class", "location", "name", "enable", "ttl", "max_hold", "timeout", "password",
        ] {
            assert_hidden(&json!({ "lock": { field: url } }));
            assert_hidden(&json!({ "lock": { "class": "redis", "location": url, field: url } }));
        }
        for field in [
            "class",
            "location",
            "name",
            "cache_name",
            "store_on",
            "max_bytes",
            "when_full",
            "require_noeviction",
            "password",
        ] {
            for class in ["memory", "redis"] {
                assert_hidden(
                    &json!({ "storage": { "class": class, "location": url, field: url } }),
                );
                assert_hidden(
                    &json!({ "storages": { "x": { "class": class, "location": url, field: url } } }),
                );
            }
        }
    }
}

#[test]
fn toml_and_the_environment_do_not_show_it_either() {
    for line in ["typo = 1", "class = 5", "max_bytes = \"much\""] {
        let text = format!("[storage]\nlocation = \"redis://:{PASSWORD}@cache\"\n{line}\n");
        let error = toml::from_str::<Settings>(&text).unwrap_err();
        assert!(!error.to_string().contains(PASSWORD), "{error}");
    }
    let url = format!("redis://:{PASSWORD}@cache");
    for name in [
        "STORAGE",
        "TTL",
        "LOCK__TIMEOUT",
        "STORAGE__TYPO",
        "STORAGE__CLASS",
    ] {
        let name = format!("IDEMPOTENCY__{name}");
        let error = from_environment(&[(&name, &url)]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains(PASSWORD), "{error}");
    }
}

#[tokio::test]
async fn the_host_is_shown_where_it_can_be_told() {
    let url = format!("redis://shop:{PASSWORD}@cache:6379/0");
    let error = serde_json::from_value::<Settings>(json!({ "ttl": url })).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("found \"redis://***@cache:6379\""),
        "{error}"
    );
    let document = json!({ "storage": { "class": "redis", "location": url } });
    let shown = format!("{:?}", settings(document));
    assert!(shown.contains("redis://***@cache:6379"), "{shown}");
}

fn secret_text() -> impl Strategy<Value = String> {
    let parts = "[a-z@:/?#%,_ .\"'\\\\-]{0,6}";
    prop_oneof![
        Just("memory".to_owned()),
        Just("redis".to_owned()),
        "[a-z0-9 .:-]{0,8}",
        (parts, parts, "[a-z]{1,8}").prop_map(|(before, after, host)| {
            format!("redis://user:{before}{PASSWORD}{after}@{host}:6379")
        }),
    ]
}

fn name() -> impl Strategy<Value = String> {
    let nested = [
        "class",
        "location",
        "name",
        "enable",
        "timeout",
        "ttl",
        "max_hold",
        "cookie",
        "header",
        "required",
        "statuses",
        "below",
        "except",
        "cache_name",
        "max_bytes",
        "when_full",
        "require_noeviction",
        "lock__timeout",
        "storage__location",
    ];
    let known: Vec<_> = FIELDS.into_iter().chain(nested).collect();
    prop_oneof![
        6 => proptest::sample::select(known).prop_map(str::to_owned),
        1 => secret_text(),
    ]
}

fn document() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0..1100).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        secret_text().prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(3, 12, 4, |value| {
        prop_oneof![
            prop::collection::vec(value.clone(), 0..4).prop_map(Value::from),
            table(value),
        ]
    });
    prop_oneof![1 => value.clone(), 9 => table(value)]
}

fn table(value: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    let entries = prop::collection::vec((name(), value), 0..4);
    entries.prop_map(|entries| Value::Object(entries.into_iter().collect::<Map<_, _>>()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_document_is_settings_or_an_error_and_never_shows_a_password(document in document()) {
        for shown in shown(&document) {
            prop_assert!(!shown.contains(PASSWORD), "{}: {}", document, shown);
        }
    }

    #[test]
    fn any_text_is_a_value_or_an_error(text in any::<String>(), field in proptest::sample::select(&FIELDS[..])) {
        shown(&json!({ field: text }));
    }
}

/// A bare word can't be recognized as a password, so it is quoted only in fields that hold none.
#[test]
fn a_bare_password_is_not_quoted_where_one_may_be() {
    let word = json!(PASSWORD);
    assert_hidden(&word);
    assert_hidden(&json!([word]));
    for field in ["lock", "storages", "documentation"] {
        assert_hidden(&json!({ field: word }));
        assert_hidden(&json!({ field: [word] }));
    }
    for field in ["location", "name"] {
        let lock = json!({ "class": "redis", field: [word] });
        assert_hidden(&json!({ "lock": lock, "storages": { "x": lock } }));
        assert_hidden(&json!({ "storages": { "x": { "class": "redis", field: { "x": word } } } }));
    }
}
