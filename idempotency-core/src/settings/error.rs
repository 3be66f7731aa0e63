//! What can be wrong with settings: the type, and what it never shows. [`field`](super::field) makes the messages.

use std::fmt::Display;

use super::secret::may_hold_a_secret;
use crate::BoxError;

pub(super) type Result<T, E = SettingsError> = std::result::Result<T, E>;

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
    /// `field` may be shown: names in it that come from the document are [`Shown`](super::secret::Shown).
    pub(super) fn new(kind: SettingsErrorKind, field: impl Display, message: impl Display) -> Self {
        Self {
            kind,
            field: field.to_string(),
            message: message.to_string(),
            source: None,
        }
    }

    /// An error of a format. Its first line has the position; in the next ones some formats quote the document.
    pub(super) fn unreadable(error: impl Display) -> Self {
        let error = error.to_string();
        let first = error.lines().next().filter(|line| !may_hold_a_secret(line));
        let message = first.unwrap_or("its format is not valid");
        let message = format_args!("can't be read: {message}");
        Self::new(SettingsErrorKind::Unreadable, "", message)
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
