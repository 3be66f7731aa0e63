//! A document as its format gave it, and the deserializer that takes it apart.
//!
//! The derives of serde read all settings from a [`Value`], so errors are ours whatever the format. The environment has only text, so
//! text is also read as whatever type the field has: `"true"`, `"409"`, `"POST, PATCH"`.

use std::{fmt, str::FromStr};

use serde::{
    Deserialize, Deserializer,
    de::{
        IntoDeserializer, MapAccess, Visitor,
        value::{MapDeserializer, SeqDeserializer},
    },
    forward_to_deserialize_any,
};

use super::{
    error::{SettingsError, SettingsErrorKind::Conflict},
    secret::{Shown, may_hold_a_secret},
};

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
    /// Nests the fields of a flat document, as a loader gives it that knows no tables: `lock__timeout` is `lock.timeout`.
    pub(super) fn nested(self) -> Self {
        let Self::Table(fields) = self else {
            return self;
        };
        let is_path = |name: &str| {
            let mut names = name.split("__");
            name.contains("__") && names.all(|name| !name.is_empty()) && !may_hold_a_secret(name)
        };
        // The tables come first, so that a path finds its table in whatever order the loader gives them.
        let (paths, mut table): (Vec<_>, Vec<_>) =
            fields.into_iter().partition(|(name, _)| is_path(name));
        for (path, value) in paths {
            insert(&mut table, &path, value);
        }
        Self::Table(table)
    }

    /// Whether this table has the field, such as `storage.class`.
    pub(super) fn has(&self, path: &str) -> bool {
        let found = path.split('.').try_fold(self, |table, name| match table {
            Self::Table(fields) => Some(&fields.iter().find(|(field, _)| field == name)?.1),
            _ => None,
        });
        found.is_some()
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

fn insert(table: &mut Vec<(String, Value)>, path: &str, value: Value) {
    let Some((name, deeper)) = path.split_once("__") else {
        table.push((path.to_owned(), value));
        return;
    };
    let index = table
        .iter()
        .position(|(field, value)| field == name && matches!(value, Value::Table(_)));
    let index = index.unwrap_or_else(|| {
        table.push((name.to_owned(), Value::Table(Vec::new())));
        table.len() - 1
    });
    if let Value::Table(fields) = &mut table[index].1 {
        insert(fields, deeper, value);
    }
}

/// A name without what does not matter in it.
fn plain(name: &str) -> String {
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

impl<'de> IntoDeserializer<'de, SettingsError> for Value {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

type Result<T, E = SettingsError> = std::result::Result<T, E>;

/// The other name of the field for which a word is enough: `"memory"` is `{ class = "memory" }`.
pub(super) const BRIEF: &str = "=";
/// The same for a list: `[200]` is `{ statuses = [200] }`.
pub(super) const BRIEF_LIST: &str = "=[]";

impl<'de> Deserializer<'de> for Value {
    type Error = SettingsError;

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq map tuple tuple_struct identifier ignored_any
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self {
            Self::Null => visitor.visit_unit(),
            Self::Bool(value) => visitor.visit_bool(value),
            Self::Unsigned(value) => visitor.visit_u64(value),
            Self::Signed(value) => visitor.visit_i64(value),
            Self::Float(value) => visitor.visit_f64(value),
            Self::Text(text) => visitor.visit_string(text),
            Self::List(items) => visitor.visit_seq(SeqDeserializer::new(items.into_iter())),
            Self::Table(fields) => visit_table(fields, visitor),
        }
    }

    /// A field that is there has a value: only some fields know null.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        visitor.visit_some(self)
    }

    /// Case, `-` and `_` don't matter. The name of a class may come with its module.
    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        let is_class = |name: &str| name.starts_with(|c: char| c.is_ascii_uppercase());
        let text = self.text().unwrap_or_default();
        let name = match text.rsplit_once(['.', ':']) {
            Some((_, class)) if is_class(class) => plain(class),
            _ => plain(text),
        };
        if let Some(name) = names.iter().find(|known| plain(known) == name) {
            return visitor.visit_enum((*name).into_deserializer());
        }
        let ours = names.iter().filter(|name| !is_class(name));
        let ours = ours.map(|name| format!("{name:?}")).collect::<Vec<_>>();
        let ours = ours.join(", ");
        let expected = match ours.rsplit_once(", ") {
            Some((others, last)) => format!("{others} or {last}"),
            None => ours,
        };
        Err(SettingsError::expected(
            &expected.as_str(),
            &self.to_string(),
        ))
    }

    /// All our newtypes are lists. A list may be text with commas or spaces between its items, and a loader may have read one item
    /// as a number.
    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        list: &'static str,
        visitor: V,
    ) -> Result<V::Value> {
        let items = match self {
            Self::List(items) => items,
            // In pieces a secret might not be recognized.
            Self::Text(text) if !may_hold_a_secret(&text) => {
                let text = match (list, plain(&text).as_str()) {
                    ("StatusesOrWord", "success") => "200-207",
                    ("StatusesOrWord", "all") => "100-999",
                    _ => &text,
                };
                let items = text.split([',', ' ']).filter(|item| !item.is_empty());
                items.map(|item| Self::Text(item.to_owned())).collect()
            }
            Self::Null | Self::Bool(_) | Self::Table(_) => {
                return Err(SettingsError::expected(&visitor, self.kind()));
            }
            _ => vec![self],
        };
        visitor.visit_newtype_struct(Self::List(items))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        let brief = |name: &str, value| vec![(name.to_owned(), value)];
        match self {
            Self::Table(fields) => visit_table(fields, visitor),
            Self::Null => visit_table(Vec::new(), visitor),
            _ if fields.contains(&BRIEF_LIST) => visit_table(brief(BRIEF_LIST, self), visitor),
            _ if fields.contains(&BRIEF) => {
                let error = SettingsError::expected(&visitor, &self.to_string());
                visit_table(brief(BRIEF, self), visitor).map_err(|_| error)
            }
            _ => Err(SettingsError::expected(&visitor, self.kind())),
        }
    }
}

/// Visits the fields in the order of their names, so that of several errors it is always the same one that is reported.
fn visit_table<'de, V: Visitor<'de>>(
    mut fields: Vec<(String, Value)>,
    visitor: V,
) -> Result<V::Value> {
    fields.sort_by(|(a, _), (b, _)| a.cmp(b));
    if let Some(twice) = fields.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let field = Shown(&twice[0].0);
        return Err(SettingsError::new(
            Conflict,
            field,
            "is there twice; keep one of them",
        ));
    }
    visitor.visit_map(MapDeserializer::new(fields.into_iter()))
}
