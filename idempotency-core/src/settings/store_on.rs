//! The statuses that are stored: a word, a list of statuses, or a table.

use std::ops::RangeInclusive;

use http::StatusCode;

use super::{
    error::{Result, SettingsErrorKind::Conflict},
    field::{Field, Table},
    value::plain,
};
use crate::StoreOn;

const EXPECTED: &str = "\"success\", \"all\", a list of statuses, or a table of `statuses`, `below`, `except` and `except_rejections`";

/// What the field makes of the `preset`.
pub(super) fn read(field: &Field, preset: StoreOn) -> Result<StoreOn> {
    let store_on = match field.is_table() {
        true => field.table(EXPECTED, |table| read_table(table, preset))?,
        false => StoreOn::ranges(statuses(field)?),
    };
    if !codes(vec![100..=999]).any(|status| store_on.stores(status)) {
        return Err(field.invalid(
            "records no answer at all, so every retry would run again; name at least one status",
        ));
    }
    Ok(store_on)
}

fn read_table(table: &mut Table<'_>, preset: StoreOn) -> Result<StoreOn> {
    let store_on = match (table.take(&["statuses"])?, table.take(&["below"])?) {
        (Some(listed), None) => StoreOn::ranges(statuses(&listed)?),
        (None, Some(below)) => {
            let limit = below.value.integer();
            let limit = limit.filter(|limit| (101..=1000).contains(limit));
            StoreOn::below(below.or_expected(limit, "a number from 101 to 1000, such as 500")?)
        }
        (None, None) => preset,
        (Some(Field { path, .. }), Some(below)) => {
            let message = format_args!("contradicts `{path}`; keep one of them");
            return Err(below.error(Conflict, message));
        }
    };
    let list = |field: &Field| field.items("a list of statuses", Field::statuses);
    let except = table.read(&["except"], list)?;
    let store_on = store_on.except(codes(except.unwrap_or_default()));
    match table.read(&["except_rejections"], Field::flag)? {
        Some(true) => Ok(store_on.except_rejections()),
        _ => Ok(store_on),
    }
}

fn statuses(field: &Field) -> Result<Vec<RangeInclusive<u16>>> {
    match field.value.text().map(plain).as_deref() {
        Some("success") => Ok(vec![200..=207]),
        Some("all") => Ok(vec![100..=999]),
        _ => field.items(EXPECTED, Field::statuses),
    }
}

fn codes(ranges: Vec<RangeInclusive<u16>>) -> impl Iterator<Item = StatusCode> {
    let codes = ranges.into_iter().flatten();
    codes.filter_map(|code| StatusCode::from_u16(code).ok())
}
