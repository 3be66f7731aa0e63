//! The name of the table.

use std::{fmt, sync::Arc};

use crate::StorageError;

/// The name of a table, perhaps with its schema. A name that breaks the rule is kept as an error, which every use reports.
#[derive(Clone)]
pub(crate) struct TableName(Result<Arc<str>, InvalidTableName>);

impl TableName {
    /// The table of a storage that names none.
    pub(crate) const DEFAULT: &str = "idempotency";

    /// The longest name, so that the database does not cut the names of its indexes: PostgreSQL has 63 bytes for a name.
    const LONGEST: usize = 48;

    pub(crate) fn new(name: &str) -> Self {
        let parts = || name.split('.');
        let is_valid = parts().count() <= 2 && parts().all(is_identifier);
        Self(match is_valid {
            true => Ok(name.into()),
            false => Err(InvalidTableName { name: name.into() }),
        })
    }

    /// The name as SQL has it: each part in double quotes, none of which needs escaping.
    pub(crate) fn quoted(&self) -> Result<String, InvalidTableName> {
        let name = self.0.clone()?;
        let parts: Vec<_> = name.split('.').map(|part| format!("\"{part}\"")).collect();
        Ok(parts.join("."))
    }

    /// The name without its schema, for the names of indexes.
    pub(crate) fn unqualified(&self) -> Result<String, InvalidTableName> {
        let name = self.0.clone()?;
        let last = name.rsplit('.').next().unwrap_or_default();
        Ok(last.to_owned())
    }
}

impl Default for TableName {
    fn default() -> Self {
        Self(Ok(Self::DEFAULT.into()))
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok(name) => f.write_str(name),
            Err(invalid) => f.write_str(&invalid.name),
        }
    }
}

fn is_identifier(part: &str) -> bool {
    let is_start = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    let mut bytes = part.bytes();
    bytes.next().is_some_and(is_start)
        && bytes.all(|byte| is_start(byte) || byte.is_ascii_digit())
        && part.len() <= TableName::LONGEST
}

/// The name of a table is not one that this library uses.
///
/// A name has 1 to 48 lower-case letters, digits and underscores, and begins with no digit. The name of a schema, of which the same is
/// true, and a dot may precede it.
///
/// ```
/// # #[cfg(feature = "postgres")]
/// # async fn example() {
/// use std::error::Error as _;
/// use idempotency_core::{InvalidTableName, PostgresStorage, sqlx::PgPool};
///
/// let pool = PgPool::connect_lazy("postgres://localhost/shop").unwrap();
/// let storage = PostgresStorage::new(pool).table("records; DROP TABLE orders");
/// let error = storage.migrate().await.unwrap_err();
/// assert!(error.source().unwrap().is::<InvalidTableName>());
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{name:?} is no name for a table: it takes 1 to {} lower-case letters, digits and underscores, no digit first, and perhaps a schema and a dot before",
    TableName::LONGEST
)]
pub struct InvalidTableName {
    name: Box<str>,
}

impl InvalidTableName {
    /// The name that is refused.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl From<InvalidTableName> for StorageError {
    fn from(error: InvalidTableName) -> Self {
        Self::unavailable(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted() {
        for (name, quoted, last) in [
            ("idempotency", r#""idempotency""#, "idempotency"),
            ("shop.records_2", r#""shop"."records_2""#, "records_2"),
            ("_", r#""_""#, "_"),
        ] {
            let table = TableName::new(name);
            assert_eq!(table.quoted().as_deref(), Ok(quoted));
            assert_eq!(table.unqualified().as_deref(), Ok(last));
            assert_eq!(table.to_string(), name);
        }
    }

    #[test]
    fn other_names_are_refused() {
        let long = "x".repeat(49);
        for name in [
            "", ".", "a.", ".a", "a.b.c", "1a", "A", "a b", "a\"b", "a;b", "a-b", "ä", "a\0", &long,
        ] {
            let refused = TableName::new(name).quoted();
            assert_eq!(refused.as_ref().map_err(InvalidTableName::name), Err(name));
        }
    }
}
