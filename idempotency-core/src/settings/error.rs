//! What can be wrong with settings.

use std::{error::Error, fmt};

use super::secret::Shown;
use crate::BoxError;

/// Settings that can't be used. Its message names the field, what is wrong with it and what is allowed.
///
/// No password is shown: of a URL in the settings the message has the scheme and the host, wherever it was found.
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
#[derive(Debug)]
pub struct SettingsError {
    kind: SettingsErrorKind,
    field: Path,
    /// Free of secrets: it is made of our own words, and of theirs through [`Shown`].
    message: String,
    source: Option<BoxError>,
}

/// What is wrong; see [`SettingsError::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SettingsErrorKind {
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
    /// The storage or the lock is configured well, but it can't be reached, or is not fit for its task.
    Unavailable,
}

impl SettingsError {
    pub(super) fn new(kind: SettingsErrorKind, field: &Path, message: impl fmt::Display) -> Self {
        Self {
            kind,
            field: field.clone(),
            message: message.to_string(),
            source: None,
        }
    }

    /// Keeps the error that caused this one. It must not show what may be secret.
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
        &self.field.0
    }
}

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.field() {
            "" => write!(f, "the settings: {}", self.message),
            field => write!(f, "`{field}`: {}", self.message),
        }
    }
}

impl Error for SettingsError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Where in the document, as it may be shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Path(String);

impl Path {
    /// The field `name` of this table; the name may come from the document.
    pub(super) fn field(&self, name: &str) -> Self {
        match self.0.as_str() {
            "" => Self(Shown(name).to_string()),
            table => Self(format!("{table}.{}", Shown(name))),
        }
    }

    /// An item of this list.
    pub(super) fn item(&self, index: usize) -> Self {
        Self(format!("{}[{index}]", self.0))
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
