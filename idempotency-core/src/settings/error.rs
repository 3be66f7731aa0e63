//! What can be wrong with settings.

use std::fmt;

use serde::de::{self, Error as _, Expected, Unexpected};
use serde_path_to_error::Segment;

use super::{
    secret::{Shown, may_hold_a_secret},
    value::{BRIEF, BRIEF_LIST},
};
use crate::BoxError;

/// Settings that can't be used. The message names the field, what is wrong with it and what is allowed.
///
/// The message shows no password. It quotes values only of fields that hold no secret, and of a URL that is there by mistake only the
/// scheme and the host.
///
/// ```
/// use idempotency_core::{Settings, SettingsErrorKind};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), serde_json::Error> {
/// let settings: Settings = serde_json::from_str(r#"{ "storage": { "class": "redis", "location": "" } }"#)?;
/// let error = settings.open().await.unwrap_err();
/// assert_eq!(error.kind(), SettingsErrorKind::Missing);
/// assert_eq!(error.field(), "storage.location");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", match self.field() {
    "" => "the settings".to_owned(),
    field => format!("`{field}`"),
})]
pub struct SettingsError {
    kind: SettingsErrorKind,
    field: String,
    /// Free of secrets: our own words, and values only of fields that hold none.
    message: String,
    source: Option<BoxError>,
}

/// What is wrong; see [`SettingsError::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SettingsErrorKind {
    /// The document can't be read, for example because it is not valid JSON.
    Unreadable,
    /// There is no such field.
    UnknownField,
    /// The field has a value of another type, or one that it can't have.
    Invalid,
    /// The field is needed, and is absent or empty.
    Missing,
    /// The field contradicts another one, or is there twice.
    Conflict,
    /// This build has no such storage or lock.
    Unsupported,
    /// The storage or the lock is configured well, but it can't be reached or is not fit for its task.
    Unavailable,
}

impl SettingsError {
    /// `field` may be shown: names in it that come from the document are [`Shown`].
    pub(super) fn new(
        kind: SettingsErrorKind,
        field: impl fmt::Display,
        message: impl fmt::Display,
    ) -> Self {
        Self {
            kind,
            field: field.to_string(),
            message: message.to_string(),
            source: None,
        }
    }

    /// That a field has another value, which must not be a secret.
    pub(super) fn expected(expected: &dyn Expected, found: &str) -> Self {
        Self::custom(format_args!("expected {expected}, found {found}"))
    }

    /// An error of a format. Its first line has the position; in the next ones some formats quote the document.
    pub(super) fn unreadable(error: &impl fmt::Display) -> Self {
        let error = error.to_string();
        let first = error.lines().next().filter(|line| !may_hold_a_secret(line));
        let message = first.unwrap_or("its format is not valid");
        Self::new(
            SettingsErrorKind::Unreadable,
            "",
            format_args!("can't be read: {message}"),
        )
    }

    /// The same error, with the path of its field from the document.
    pub(super) fn at(mut self, place: &serde_path_to_error::Path) -> Self {
        let mut path = String::new();
        for segment in place {
            match segment {
                Segment::Map { key } if key == BRIEF || key == BRIEF_LIST => {}
                Segment::Map { key } => push_field(&mut path, Shown(key)),
                Segment::Seq { index } => path += &format!("[{index}]"),
                Segment::Enum { .. } | Segment::Unknown => {}
            }
        }
        if !self.field.is_empty() {
            push_field(&mut path, &self.field);
        }
        self.field = path;
        self
    }

    /// Keeps the error that caused this one. It must not show secrets.
    #[cfg(any(feature = "redis", feature = "postgres", feature = "sqlite"))]
    pub(super) fn because_of(mut self, source: impl Into<BoxError>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What is wrong.
    #[must_use]
    pub fn kind(&self) -> SettingsErrorKind {
        self.kind
    }

    /// The whole path of the field, as in `lock.timeout`, `storages.orders.location` or `methods[0]`; empty for the document
    /// as a whole.
    #[must_use]
    pub fn field(&self) -> &str {
        &self.field
    }
}

fn push_field(path: &mut String, name: impl fmt::Display) {
    let dot = if path.is_empty() { "" } else { "." };
    *path += &format!("{dot}{name}");
}

/// For our own deserializer.
impl de::Error for SettingsError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(SettingsErrorKind::Invalid, "", message)
    }

    /// Only for `storages`: any other type checks the kind of value itself. The value may be a secret.
    fn invalid_type(_: Unexpected<'_>, _: &dyn Expected) -> Self {
        Self::custom(
            "expected a table of storages, such as { \"orders\": \"memory\" }, found another value",
        )
    }

    fn unknown_field(_: &str, known: &'static [&'static str]) -> Self {
        let known = known.iter().filter(|name| !NOT_LISTED.contains(name));
        let mut known: Vec<_> = known.copied().collect();
        known.sort_unstable();
        let message = format_args!("there is no such field; there are: {}", known.join(", "));
        Self::new(SettingsErrorKind::UnknownField, "", message)
    }
}

/// The names of fields that are understood but not recommended, and our own.
const NOT_LISTED: [&str; 5] = [
    "conflict_status_code",
    "encoder_class",
    "store_on_statuses",
    BRIEF,
    BRIEF_LIST,
];
