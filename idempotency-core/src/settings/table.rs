//! Values with parts: lists and tables.
//!
//! Instead of a table a word or a list may be enough. It is then read as the field that is also called
//! [`BRIEF`](super::value::BRIEF) or [`BRIEF_LIST`](super::value::BRIEF_LIST).

use http::{Method, StatusCode};
use serde::Deserialize;

use super::{
    error::{
        SettingsError,
        SettingsErrorKind::{Conflict, Invalid},
    },
    scalar::{Cookie, Flag, Header, StatusLimit, Statuses, UnsafeMethod},
};
use crate::{Scope, StoreOn};

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(expecting = "a list of names of headers")]
pub(super) struct Headers(pub(super) Vec<Header>);

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(expecting = "a list of HTTP methods, such as [\"POST\", \"PATCH\"]")]
pub(super) struct Methods(pub(super) Vec<UnsafeMethod>);

impl From<Methods> for Option<Vec<Method>> {
    fn from(Methods(methods): Methods) -> Self {
        Some(methods.into_iter().map(Method::from).collect())
    }
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    expecting = "\"default\", \"authorization\", \"none\", \
    { \"cookie\": \"<name>\" } or { \"header\": \"<name>\" }"
)]
pub(super) struct ScopeSettings {
    #[serde(rename = "=")]
    word: Option<ScopeWord>,
    cookie: Option<Cookie>,
    header: Option<Header>,
    pub(super) required: Option<Flag>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ScopeWord {
    Default,
    Authorization,
    None,
}

impl ScopeSettings {
    /// `None` if only `required` is there.
    pub(super) fn scope(&self) -> Result<Option<Scope>, SettingsError> {
        match (self.word, &self.cookie, &self.header) {
            (Some(ScopeWord::Default), ..) => Ok(Some(Scope::default())),
            (Some(ScopeWord::Authorization), ..) => Ok(Some(Scope::authorization())),
            (Some(ScopeWord::None), ..) => Ok(Some(Scope::none())),
            (None, Some(Cookie(name)), None) => Ok(Some(Scope::cookie(name))),
            // The name was checked, so `Scope::header` can't panic.
            (None, None, Some(Header(name))) => Ok(Some(Scope::header(name))),
            (None, None, None) if self.required.is_some() => Ok(None),
            (None, None, None) => {
                let message = "is an empty table; give \"default\", \"authorization\", \"none\", or a cookie or a header by its name";
                Err(SettingsError::new(Invalid, "scope", message))
            }
            (None, Some(_), Some(_)) => {
                let message = "a scope is one thing; remove this or `scope.cookie`";
                Err(SettingsError::new(Conflict, "scope.header", message))
            }
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct StoreOnSettings {
    #[serde(alias = "=[]")]
    statuses: Option<StatusesOrWord>,
    below: Option<StatusLimit>,
    except: StatusList,
    except_rejections: Option<Flag>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(expecting = "a list of statuses")]
struct StatusList(Vec<Statuses>);

/// As text it may also be a word: `success` or `all`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(
    expecting = "\"success\", \"all\", a list of statuses, or a table of `statuses`, `below`, `except` and \
    `except_rejections`"
)]
struct StatusesOrWord(Vec<Statuses>);

impl StoreOnSettings {
    /// Checks what the field of this name makes of the `preset`.
    pub(super) fn check(&self, field: &str, preset: StoreOn) -> Result<(), SettingsError> {
        if self.statuses.is_some() && self.below.is_some() {
            let message = format_args!("contradicts `{field}.statuses`; keep one of them");
            return Err(SettingsError::new(
                Conflict,
                format_args!("{field}.below"),
                message,
            ));
        }
        let store_on = self.store_on(preset);
        if !codes(&Statuses(100..=999)).any(|status| store_on.stores(status)) {
            let message = "records no answer at all, so every retry would run again; name at least one status";
            return Err(SettingsError::new(Invalid, field, message));
        }
        Ok(())
    }

    pub(super) fn store_on(&self, preset: StoreOn) -> StoreOn {
        let listed = self.statuses.as_ref().map(|list| list.0.as_slice());
        let store_on = match (listed, &self.below) {
            (Some([Statuses(only)]), _) if *only == (200..=207) => StoreOn::success(),
            (Some([Statuses(only)]), _) if *only == (100..=999) => StoreOn::all(),
            (Some(listed), _) => StoreOn::statuses(listed.iter().flat_map(codes)),
            (None, Some(StatusLimit(limit))) => StoreOn::below(*limit),
            (None, None) => preset,
        };
        let store_on = store_on.except(self.except.0.iter().flat_map(codes));
        match self.except_rejections {
            Some(Flag(true)) => store_on.except_rejections(),
            _ => store_on,
        }
    }
}

fn codes(Statuses(range): &Statuses) -> impl Iterator<Item = StatusCode> + use<> {
    range
        .clone()
        .filter_map(|code| StatusCode::from_u16(code).ok())
}
