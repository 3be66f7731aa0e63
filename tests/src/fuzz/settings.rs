//! Settings from anywhere.

use futures_util::FutureExt;
use idempotency_axum::Settings;
use serde::Deserialize;
use serde_json::{Map, Value};

const PASSWORD: &str = "hunter2-hunter2";

/// A document gives settings that make a configuration, or an error; neither shows a password. It is read as JSON, as TOML,
/// and as the flat text that an environment is.
///
/// # Panics
///
/// Panics if that is not so.
pub fn settings(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(document) = serde_json::from_str::<Map<String, Value>>(text) {
        check(document.clone());
        check(with_password(document, "storage"));
    }
    if let Ok(Ok(Value::Object(document))) =
        toml::from_str::<toml::Table>(text).map(serde_json::to_value)
    {
        check(document.clone());
        check(with_password(document, "lock"));
    }
    let lines = text.lines().filter_map(|line| line.split_once('='));
    check(
        lines
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect(),
    );
}

fn with_password(mut document: Map<String, Value>, table: &str) -> Map<String, Value> {
    let location = format!("redis://user:{PASSWORD}@localhost/0").into();
    match document
        .entry(table)
        .or_insert_with(|| Value::Object(Map::new()))
    {
        Value::Object(table) => {
            table.insert("location".to_owned(), location);
        }
        other => *other = location,
    }
    document
}

fn check(document: Map<String, Value>) {
    let is_shown = |shown: String| {
        assert!(!shown.is_empty());
        assert!(!shown.contains(PASSWORD), "{shown}");
    };
    match Settings::deserialize(Value::Object(document)) {
        Err(error) => is_shown(format!("{error} {error:?}")),
        Ok(settings) => {
            is_shown(format!("{settings:?} {:?}", settings.config()));
            // Nothing that is in this process has to wait.
            if let Some(Err(error)) = settings.open().now_or_never() {
                is_shown(format!("{error} {error:?}"));
            }
        }
    }
}
