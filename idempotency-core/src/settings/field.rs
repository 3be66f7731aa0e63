//! One field of a document, and what it can be read as; and the fields of a table, each of which has to be known.

use std::{fmt, str::FromStr, time::Duration};

use http::{HeaderName, StatusCode};

use super::{
    error::{Path, SettingsError, SettingsErrorKind},
    secret::may_hold_a_secret,
    units,
    value::Value,
};

/// A value and where it stands.
pub(super) struct Field {
    pub(super) path: Path,
    pub(super) value: Value,
}

impl Field {
    pub(super) fn document(value: Value) -> Self {
        Self {
            path: Path::default(),
            value,
        }
    }

    /// That the value is of a wrong type, or not one of those allowed.
    pub(super) fn expected(&self, allowed: impl fmt::Display) -> SettingsError {
        let Self { path, value } = self;
        let message = format_args!("expected {allowed}, found {value}");
        SettingsError::new(SettingsErrorKind::Invalid, path, message)
    }

    /// That the value is of the right type, and still of no use.
    pub(super) fn refused(&self, why: impl fmt::Display) -> SettingsError {
        SettingsError::new(SettingsErrorKind::Invalid, &self.path, why)
    }

    /// Whether it says "none". The environment has no null, so it says that with a word or with nothing.
    pub(super) fn is_null(&self) -> bool {
        match &self.value {
            Value::Null => true,
            Value::Text(text) => ["", "null", "none"]
                .iter()
                .any(|word| text.trim().eq_ignore_ascii_case(word)),
            _ => false,
        }
    }

    /// Text that is not blank, without space around it.
    pub(super) fn text(&self) -> Result<&str, SettingsError> {
        match &self.value {
            Value::Text(text) if !text.trim().is_empty() => Ok(text.trim()),
            _ => Err(self.expected("text that is not empty")),
        }
    }

    pub(super) fn flag(&self) -> Result<bool, SettingsError> {
        match &self.value {
            Value::Bool(flag) => Ok(*flag),
            Value::Text(text) if text.trim().eq_ignore_ascii_case("true") => Ok(true),
            Value::Text(text) if text.trim().eq_ignore_ascii_case("false") => Ok(false),
            _ => Err(self.expected("true or false")),
        }
    }

    /// One of several names, each for a value. Case, `-` and `_` don't matter. The name of a class may come with its module, as
    /// in the settings of the original.
    pub(super) fn one_of<T: Copy>(
        &self,
        allowed: &str,
        names: &[(&str, T)],
    ) -> Result<T, SettingsError> {
        let Value::Text(text) = &self.value else {
            return Err(self.expected(allowed));
        };
        let name = match text.rsplit_once(['.', ':']) {
            Some((_, class)) if class.starts_with(|c: char| c.is_ascii_uppercase()) => class,
            _ => text,
        };
        let plain = |name: &str| name.trim().replace(['_', '-'], "").to_ascii_lowercase();
        let name = plain(name);
        names
            .iter()
            .find(|(allowed, _)| plain(allowed) == name)
            .map(|(_, value)| *value)
            .ok_or_else(|| self.expected(allowed))
    }

    pub(super) fn duration(&self) -> Result<Duration, SettingsError> {
        const ALLOWED: &str = "a duration such as \"30s\", \"100ms\" or \"1h30m\" (units: ms, s, m, h, d), or a number of \
                               seconds";

        let duration = match &self.value {
            Value::Integer(seconds) => match u64::try_from(*seconds) {
                Ok(seconds) => Duration::from_secs(seconds),
                Err(_) => return Err(self.expected(ALLOWED)),
            },
            Value::Float(seconds) => Duration::try_from_secs_f64(*seconds)
                .map_err(|error| self.expected(ALLOWED).because_of(error))?,
            Value::Text(text) => units::duration(text).ok_or_else(|| self.expected(ALLOWED))?,
            _ => return Err(self.expected(ALLOWED)),
        };
        if duration > units::LONGEST {
            return Err(self.expected("a duration of at most 100 years (36500 days)"));
        }
        Ok(duration)
    }

    /// A duration that is not zero; `zero` says what zero would mean.
    pub(super) fn positive_duration(&self, zero: &str) -> Result<Duration, SettingsError> {
        match self.duration()? {
            Duration::ZERO => Err(self.refused(format_args!("zero {zero}"))),
            duration => Ok(duration),
        }
    }

    /// A number of bytes.
    pub(super) fn bytes(&self) -> Result<usize, SettingsError> {
        let bytes = match &self.value {
            Value::Text(text) => units::bytes(text),
            _ => self.integer(),
        };
        bytes.ok_or_else(|| {
            self.expected("a number of bytes, or one with a unit such as \"64KiB\" or \"1MiB\"")
        })
    }

    pub(super) fn count(&self) -> Result<usize, SettingsError> {
        self.integer()
            .ok_or_else(|| self.expected("a whole number, zero or more"))
    }

    /// Any status, for answers of handlers.
    pub(super) fn status(&self) -> Result<StatusCode, SettingsError> {
        self.status_within(100, "an HTTP status (100 to 999)")
    }

    /// A status of at least `lowest`.
    pub(super) fn status_within(
        &self,
        lowest: u16,
        allowed: &str,
    ) -> Result<StatusCode, SettingsError> {
        self.integer::<u16>()
            .filter(|status| *status >= lowest)
            .and_then(|status| StatusCode::from_u16(status).ok())
            .ok_or_else(|| self.expected(allowed))
    }

    pub(super) fn header_name(&self) -> Result<HeaderName, SettingsError> {
        const ALLOWED: &str = "the name of an HTTP header (letters, digits and `-`)";
        let Value::Text(text) = &self.value else {
            return Err(self.expected(ALLOWED));
        };
        HeaderName::from_bytes(text.trim().as_bytes())
            .map_err(|error| self.expected(ALLOWED).because_of(error))
    }

    /// The items of a list, or of text with commas or spaces between them, which is how the environment writes a list. What
    /// is no text there is a number that its loader has parsed.
    pub(super) fn items(&self, allowed: &str) -> Result<Vec<Self>, SettingsError> {
        let values = match &self.value {
            Value::List(values) => values.clone(),
            Value::Integer(_) | Value::Float(_) => vec![self.value.clone()],
            // One item; taken apart it might no longer be recognised as what must not be shown.
            Value::Text(text) if may_hold_a_secret(text) => vec![self.value.clone()],
            Value::Text(text) => text
                .split([',', ' '])
                .filter(|item| !item.is_empty())
                .map(|item| Value::Text(item.to_owned()))
                .collect(),
            _ => return Err(self.expected(allowed)),
        };
        let items = values.into_iter().enumerate().map(|(index, value)| Self {
            path: self.path.item(index),
            value,
        });
        Ok(items.collect())
    }

    pub(super) fn fields(&self, allowed: &str) -> Result<Fields, SettingsError> {
        match &self.value {
            Value::Table(entries) => Fields::new(self.path.clone(), entries.clone()),
            Value::Null => Fields::new(self.path.clone(), Vec::new()),
            _ => Err(self.expected(allowed)),
        }
    }

    pub(super) fn integer<N: TryFrom<i128> + FromStr>(&self) -> Option<N> {
        /// Up to here every whole number is exact.
        const EXACT: f64 = 9_007_199_254_740_992.0;
        match &self.value {
            Value::Integer(number) => N::try_from(*number).ok(),
            Value::Float(number) if number.fract() == 0.0 && number.abs() <= EXACT =>
            {
                #[expect(clippy::cast_possible_truncation, reason = "it is whole and in range")]
                N::try_from(*number as i128).ok()
            }
            Value::Text(text) => text.trim().parse().ok(),
            _ => None,
        }
    }
}

/// The fields of a table. Each is taken by its name; what is left in the end is unknown.
pub(super) struct Fields {
    path: Path,
    entries: Vec<(String, Value)>,
    known: Vec<&'static str>,
}

impl Fields {
    fn new(path: Path, entries: Vec<(String, Value)>) -> Result<Self, SettingsError> {
        for (index, (name, _)) in entries.iter().enumerate() {
            if entries[..index].iter().any(|(earlier, _)| earlier == name) {
                let path = path.field(name);
                let message = "is there twice; keep one of them";
                return Err(SettingsError::new(
                    SettingsErrorKind::Conflict,
                    &path,
                    message,
                ));
            }
        }
        Ok(Self {
            path,
            entries,
            known: Vec::new(),
        })
    }

    pub(super) fn take(&mut self, name: &'static str) -> Option<Field> {
        self.known.push(name);
        let index = self.entries.iter().position(|(entry, _)| entry == name)?;
        let (_, value) = self.entries.swap_remove(index);
        Some(Field {
            path: self.path.field(name),
            value,
        })
    }

    /// Takes the field `name`, if it is there, and reads it.
    pub(super) fn read<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&Field) -> Result<T, SettingsError>,
    ) -> Result<Option<T>, SettingsError> {
        self.take(name).as_ref().map(read).transpose()
    }

    /// The field `name`, which may also be called `seed`, as in the settings of the original.
    pub(super) fn take_either(
        &mut self,
        name: &'static str,
        seed: &'static str,
    ) -> Result<Option<Field>, SettingsError> {
        let field = self.take(name);
        let other = self.take(seed);
        self.known.pop();
        either(field, other)
    }

    pub(super) fn read_either<T>(
        &mut self,
        name: &'static str,
        seed: &'static str,
        read: impl FnOnce(&Field) -> Result<T, SettingsError>,
    ) -> Result<Option<T>, SettingsError> {
        self.take_either(name, seed)?.as_ref().map(read).transpose()
    }

    /// All fields that are left, whatever their names.
    pub(super) fn into_rest(self) -> impl Iterator<Item = (String, Field)> {
        self.entries.into_iter().map(move |(name, value)| {
            let path = self.path.field(&name);
            (name, Field { path, value })
        })
    }

    /// That no field is left.
    pub(super) fn finish(mut self) -> Result<(), SettingsError> {
        let Some(name) = self.entries.iter().map(|(name, _)| name).min() else {
            return Ok(());
        };
        self.known.sort_unstable();
        let message = format!(
            "there is no such field; there are: {}",
            self.known.join(", ")
        );
        let path = self.path.field(name);
        Err(SettingsError::new(
            SettingsErrorKind::UnknownField,
            &path,
            message,
        ))
    }
}

/// The one of two fields that is there.
pub(super) fn either(
    field: Option<Field>,
    other: Option<Field>,
) -> Result<Option<Field>, SettingsError> {
    let (Some(field), Some(other)) = (&field, &other) else {
        return Ok(field.or(other));
    };
    let message = format_args!("says the same as `{}`; keep one of them", other.path);
    Err(SettingsError::new(
        SettingsErrorKind::Conflict,
        &field.path,
        message,
    ))
}

/// The fields of the document. The name of one that lies deeper may be written as a path with `__`, since there are loaders
/// that give the environment as one flat table.
pub(super) fn unfolded(document: Value) -> Value {
    let Value::Table(entries) = document else {
        return document;
    };
    let is_path = |(name, _): &(String, Value)| {
        name.contains("__") && !name.split("__").any(str::is_empty) && !may_hold_a_secret(name)
    };
    // A table comes before what lies in it, in whatever order a loader gives them.
    let (paths, mut table): (Vec<_>, Vec<_>) = entries.into_iter().partition(is_path);
    for (path, value) in paths {
        insert(&mut table, &path.split("__").collect::<Vec<_>>(), value);
    }
    Value::Table(table)
}

fn insert(table: &mut Vec<(String, Value)>, names: &[&str], value: Value) {
    let [name, deeper @ ..] = names else {
        return;
    };
    if deeper.is_empty() {
        table.push(((*name).to_owned(), value));
        return;
    }
    let there = table.iter_mut().find_map(|(entry, value)| match value {
        Value::Table(fields) if entry == name => Some(fields),
        _ => None,
    });
    match there {
        Some(fields) => insert(fields, deeper, value),
        None => {
            let mut fields = Vec::new();
            insert(&mut fields, deeper, value);
            table.push(((*name).to_owned(), Value::Table(fields)));
        }
    }
}
