//! A document as its format gave it.
//!
//! All settings are read from a [`Value`], so errors are the same in every format. The environment has only text, so text is also
//! read as what its field takes: `"true"`, `"409"`, `"POST, PATCH"`.

use std::{fmt, str::FromStr};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::secret::{Shown, may_hold_a_secret};

/// What JSON, TOML and the environment have in common. A table keeps names that are repeated.
#[derive(Clone, Deserialize)]
#[serde(untagged)]
pub(super) enum Value {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(String),
    List(Vec<Value>),
    Table(#[serde(deserialize_with = "table")] Vec<(String, Value)>),
}

impl Value {
    /// Makes tables of the fields of a flat document, as a loader gives it that knows none: `lock__timeout` is a table `lock` with a
    /// field `timeout`.
    pub(super) fn nested(self) -> Self {
        match self {
            Self::Table(fields) => Self::Table(fields.into_iter().map(nest).collect()),
            other => other,
        }
    }

    /// Text that is not blank, without the space around it.
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text.trim()).filter(|text| !text.is_empty()),
            _ => None,
        }
    }

    /// Whether it says "none", which the environment writes as a word or as nothing.
    pub(super) fn is_null(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Text(text) => matches!(plain(text).as_str(), "" | "null" | "none"),
            _ => false,
        }
    }

    pub(super) fn integer<N: TryFrom<i128> + FromStr>(&self) -> Option<N> {
        /// Up to here every whole number is exact.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        match self {
            Self::Unsigned(number) => N::try_from(i128::from(*number)).ok(),
            Self::Signed(number) => N::try_from(i128::from(*number)).ok(),
            #[expect(clippy::cast_possible_truncation, reason = "it is whole and in range")]
            Self::Float(number) if number.fract() == 0.0 && number.abs() <= EXACT => {
                N::try_from(*number as i128).ok()
            }
            Self::Text(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    /// The kind of value, for a field that may hold a secret.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Unsigned(_) | Self::Signed(_) | Self::Float(_) => "a number",
            Self::Text(text) if text.trim().is_empty() => "empty text",
            Self::Text(_) => "text",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
        }
    }
}

fn nest((path, value): (String, Value)) -> (String, Value) {
    let is_path = path.split("__").all(|name| !name.is_empty()) && !may_hold_a_secret(&path);
    match path.split_once("__") {
        Some((table, field)) if is_path => {
            let field = nest((field.to_owned(), value));
            (table.to_owned(), Value::Table(vec![field]))
        }
        _ => (path, value),
    }
}

/// A name without what does not matter in it.
pub(super) fn plain(name: &str) -> String {
    name.trim().replace(['_', '-'], "").to_ascii_lowercase()
}

/// The value as a message shows it, which masks passwords. Only for fields that hold no secret.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Unsigned(value) => value.fmt(f),
            Self::Signed(value) => value.fmt(f),
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Text(text) => write!(f, "\"{}\"", Shown(text)),
            Self::Null | Self::List(_) | Self::Table(_) => f.write_str(self.kind()),
        }
    }
}

/// Like a map, but it keeps all fields and their order.
fn table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(String, Value)>, D::Error> {
    struct TableVisitor;

    impl<'de> Visitor<'de> for TableVisitor {
        type Value = Vec<(String, Value)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Self::Value, A::Error> {
            let mut table = Vec::new();
            while let Some((name, value)) = fields.next_entry()? {
                table.push(match name {
                    Value::Text(name) => (name, value),
                    // No field has such a name, so it is refused as unknown.
                    other => (other.to_string(), value),
                });
            }
            Ok(table)
        }
    }

    deserializer.deserialize_map(TableVisitor)
}
