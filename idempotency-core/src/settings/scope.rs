//! The scope: a word, or a table that names a cookie or a header.

use super::{
    error::{Result, SettingsErrorKind::Conflict},
    field::{Field, Table, either},
};
use crate::Scope;

/// The scope by the fields `scope` and `scope_required`. The second may also be a field of the first.
pub(super) fn read(scope: Option<Field>, required: Option<Field>) -> Result<Option<Scope>> {
    let scope = scope.as_ref().map(word_or_table).transpose()?;
    let (scope, nested) = scope.unwrap_or_default();
    let Some(required) = either(required, nested)? else {
        return Ok(scope);
    };
    let scope = scope.unwrap_or_default();
    match required.flag()? {
        false => Ok(Some(scope.or_anonymous())),
        true if scope == Scope::none() => Err(required.error(
            Conflict,
            "nobody has the scope \"none\", so every request would be refused; choose another scope, or false here",
        )),
        true => Ok(Some(scope.required())),
    }
}

/// The scope, `None` if the table has only `required`, and that field.
fn word_or_table(field: &Field) -> Result<(Option<Scope>, Option<Field>)> {
    const EXPECTED: &str = "\"default\", \"authorization\", \"none\", { \"cookie\": \"<name>\" } or { \"header\": \"<name>\" }";
    const EMPTY: &str = "is an empty table; give \"default\", \"authorization\", \"none\", or a cookie or a header by its name";

    if !field.is_table() {
        let scope = field.one_of(&[
            (&["default"], Scope::default()),
            (&["authorization"], Scope::authorization()),
            (&["none"], Scope::none()),
        ]);
        let scope = scope.map_err(|_| field.expected(EXPECTED))?;
        return Ok((Some(scope), None));
    }
    let read = |table: &mut Table<'_>| {
        Ok((
            table.take(&["cookie"])?,
            table.take(&["header"])?,
            table.take(&["required"])?,
        ))
    };
    let (cookie, header, required) = field.table(EXPECTED, read)?;
    let scope = match (cookie, header) {
        (Some(cookie), None) => Some(Scope::cookie(cookie.cookie()?)),
        // The name was checked, so `Scope::header` can't panic.
        (None, Some(header)) => Some(Scope::header(header.header_name()?)),
        (Some(_), Some(header)) => {
            let message = "a scope is one thing; remove this or `scope.cookie`";
            return Err(header.error(Conflict, message));
        }
        (None, None) if required.is_some() => None,
        (None, None) => return Err(field.invalid(EMPTY)),
    };
    Ok((scope, required))
}
