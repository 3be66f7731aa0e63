//! The fields of a document, with their paths: an error names its field.

use std::{collections::BTreeMap, fmt::Display};

use super::{
    error::{
        Result, SettingsError,
        SettingsErrorKind::{self, Conflict, Invalid, UnknownField},
    },
    secret::{Shown, may_hold_a_secret},
    value::Value,
};

/// A value and its path in the document.
pub(super) struct Field {
    pub(super) path: String,
    pub(super) value: Value,
}

impl Field {
    pub(super) fn error(&self, kind: SettingsErrorKind, message: impl Display) -> SettingsError {
        SettingsError::new(kind, &self.path, message)
    }

    pub(super) fn invalid(&self, message: impl Display) -> SettingsError {
        self.error(Invalid, message)
    }

    /// The message quotes the value, so this is only for fields that hold no secret.
    pub(super) fn expected(&self, expected: &str) -> SettingsError {
        self.invalid(format_args!("expected {expected}, found {}", self.value))
    }

    /// As [`expected`](Self::expected), for a value that may be a secret.
    pub(super) fn expected_hidden(&self, expected: &str) -> SettingsError {
        let found = self.value.kind();
        self.invalid(format_args!("expected {expected}, found {found}"))
    }

    /// Whether it is a table. One without fields may be written as null.
    pub(super) fn is_table(&self) -> bool {
        matches!(self.value, Value::Table(_) | Value::Null)
    }

    /// Reads the fields of this table with `read`. A field that `read` does not take is refused.
    pub(super) fn table<T>(
        &self,
        expected: &str,
        read: impl FnOnce(&mut Table<'_>) -> Result<T>,
    ) -> Result<T> {
        let fields = match &self.value {
            Value::Table(fields) => fields.clone(),
            Value::Null => Vec::new(),
            _ => return Err(self.expected_hidden(expected)),
        };
        let mut table = Table::new(&self.path, fields)?;
        let read = read(&mut table)?;
        table.end().map(|()| read)
    }

    /// The items of a list. It may be text with commas or spaces between its items, and a loader may have read one item as a number.
    pub(super) fn items<T>(
        &self,
        expected: &str,
        read: impl Fn(&Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let values = match &self.value {
            Value::List(items) => items.clone(),
            // In pieces a secret might not be recognized.
            Value::Text(text) if !may_hold_a_secret(text) => {
                let items = text.split([',', ' ']).filter(|item| !item.is_empty());
                items.map(|item| Value::Text(item.to_owned())).collect()
            }
            Value::Null | Value::Bool(_) | Value::Table(_) => {
                return Err(self.expected_hidden(expected));
            }
            single => vec![single.clone()],
        };
        let items = values.into_iter().enumerate().map(|(index, value)| {
            let path = format!("{}[{index}]", self.path);
            read(&Self { path, value })
        });
        items.collect()
    }
}

/// The fields of a table that nobody has taken yet.
pub(super) struct Table<'a> {
    path: &'a str,
    fields: BTreeMap<String, Value>,
    known: Vec<&'static str>,
}

impl<'a> Table<'a> {
    pub(super) fn new(path: &'a str, all: Vec<(String, Value)>) -> Result<Self> {
        let mut fields = BTreeMap::new();
        for (name, value) in all {
            let value = match (fields.remove(&name), value) {
                (None, value) => value,
                // `lock__timeout` is one more field of the table `lock`.
                (Some(Value::Table(fields)), Value::Table(more)) => {
                    Value::Table([fields, more].concat())
                }
                _ => {
                    let message = "is there twice; keep one of them";
                    return Err(SettingsError::new(Conflict, join(path, &name), message));
                }
            };
            fields.insert(name, value);
        }
        Ok(Self {
            path,
            fields,
            known: Vec::new(),
        })
    }

    /// Takes the field that has one of these names. Errors list only the first.
    pub(super) fn take(&mut self, names: &[&'static str]) -> Result<Option<Field>> {
        self.known.extend(names.first());
        names.iter().try_fold(None, |found, name| {
            let field = self.fields.remove(*name).map(|value| Field {
                path: join(self.path, name),
                value,
            });
            either(found, field)
        })
    }

    /// Takes the field that has one of these names, and reads it.
    pub(super) fn read<T>(
        &mut self,
        names: &[&'static str],
        read: impl FnOnce(&Field) -> Result<T>,
    ) -> Result<Option<T>> {
        self.take(names)?.as_ref().map(read).transpose()
    }

    /// Takes all fields, whatever their names.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = (String, Field)> {
        let fields = std::mem::take(&mut self.fields).into_iter();
        fields.map(|(name, value)| {
            let path = join(self.path, &name);
            (name, Field { path, value })
        })
    }

    /// Refuses a field that was not taken.
    fn end(mut self) -> Result<()> {
        let Some(unknown) = self.fields.keys().next() else {
            return Ok(());
        };
        self.known.sort_unstable();
        let known = self.known.join(", ");
        let message = format_args!("there is no such field; there are: {known}");
        let path = join(self.path, unknown);
        Err(SettingsError::new(UnknownField, path, message))
    }
}

fn join(table: &str, name: &str) -> String {
    let dot = if table.is_empty() { "" } else { "." };
    format!("{table}{dot}{}", Shown(name))
}

/// The one that is there, of fields that say the same.
pub(super) fn either(one: Option<Field>, other: Option<Field>) -> Result<Option<Field>> {
    match (one, other) {
        (Some(one), Some(Field { path, .. })) => {
            let message = format_args!("says the same as `{path}`; keep one of them");
            Err(one.error(Conflict, message))
        }
        (one, other) => Ok(one.or(other)),
    }
}

/// Makes a struct of the fields of a table, and `read`, which reads each field by its function. A field that is absent is `None`.
macro_rules! table {
    (
        $(#[$doc:meta])*
        $visible:vis struct $name:ident {
            $($field:ident $(or $other:ident)?: $type:ty = $read:expr;)*
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq)]
        $visible struct $name {
            $($field: Option<$type>,)*
        }

        impl $name {
            $visible fn read(table: &mut Table<'_>) -> Result<Self> {
                Ok(Self {
                    $($field: table.read(&[stringify!($field) $(, stringify!($other))?], $read)?,)*
                })
            }
        }
    };
}
pub(super) use table;
