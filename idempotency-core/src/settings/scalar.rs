//! Values that stand alone: what each kind of them can be.

use std::{net::Ipv6Addr, ops::RangeInclusive, time::Duration};

use http::{HeaderName, HeaderValue, Method, StatusCode};

use super::{
    error::Result,
    field::Field,
    secret::{Location, may_hold_a_secret},
    units,
    value::{Value, plain},
};
use crate::{LockPolicy, config::link_value};

impl Field {
    /// `value`, or that another one was `expected`.
    pub(super) fn or_expected<T>(&self, value: Option<T>, expected: &str) -> Result<T> {
        value.ok_or_else(|| self.expected(expected))
    }

    /// What the word stands for. Errors list the first name of each. Case, `-` and `_` don't matter, and the name of a class may come
    /// with its module.
    pub(super) fn one_of<T: Clone>(&self, words: &[(&[&str], T)]) -> Result<T> {
        let text = self.value.text().unwrap_or_default();
        let word = match text.rsplit_once(['.', ':']) {
            Some((_, class)) if class.starts_with(|c: char| c.is_ascii_uppercase()) => class,
            _ => text,
        };
        let is_named = |names: &[&str]| names.iter().any(|name| plain(name) == plain(word));
        if let Some((_, value)) = words.iter().find(|(names, _)| is_named(names)) {
            return Ok(value.clone());
        }
        let listed = words.iter().filter_map(|(names, _)| names.first());
        let listed: Vec<_> = listed.map(|name| format!("{name:?}")).collect();
        let listed = listed.join(", ");
        let (others, last) = listed.rsplit_once(", ").unwrap_or_default();
        Err(self.expected(&format!("{others} or {last}")))
    }

    pub(super) fn flag(&self) -> Result<bool> {
        if let Value::Bool(flag) = self.value {
            return Ok(flag);
        }
        let word = self.value.text().map(str::to_ascii_lowercase);
        let flag = word.and_then(|word| word.parse().ok());
        self.or_expected(flag, "true or false")
    }

    pub(super) fn duration(&self) -> Result<Duration> {
        let duration = match &self.value {
            Value::Float(seconds) => Duration::try_from_secs_f64(*seconds).ok(),
            Value::Text(text) => units::duration(text),
            value => value.integer().map(Duration::from_secs),
        };
        let expected = "a duration such as \"30s\", \"100ms\" or \"1h30m\" (units: ms, s, m, h, d), or a number of seconds";
        let duration = self.or_expected(duration, expected)?;
        let short = (duration <= units::LONGEST).then_some(duration);
        self.or_expected(short, "a duration of at most 100 years (36500 days)")
    }

    pub(super) fn lease(&self) -> Result<Duration> {
        let (lease, shortest) = (self.duration()?, LockPolicy::MIN_TTL);
        if lease < shortest {
            return Err(self.invalid(format_args!(
                "a lease of {lease:?} would end before it is renewed; give at least {shortest:?}"
            )));
        }
        Ok(lease)
    }

    pub(super) fn count(&self) -> Result<usize> {
        self.or_expected(self.value.integer(), "a whole number, zero or more")
    }

    pub(super) fn bytes(&self) -> Result<usize> {
        let bytes = match &self.value {
            Value::Text(text) => units::bytes(text),
            value => value.integer(),
        };
        let expected = "a number of bytes, or one with a unit such as \"64KiB\" or \"1MiB\"";
        self.or_expected(bytes, expected)
    }

    fn status(&self, lowest: u16, expected: &str) -> Result<StatusCode> {
        let status = self.value.integer().filter(|status| *status >= lowest);
        let status = status.and_then(|status| StatusCode::from_u16(status).ok());
        self.or_expected(status, expected)
    }

    /// The status of a request that did not run. With a status below 400 its client would think that it did.
    pub(super) fn refusal_status(&self) -> Result<StatusCode> {
        self.status(400, "an HTTP status of an error (400 to 999)")
    }

    /// `None` is the status of the recorded answer. hyper can't send 1xx as an answer.
    pub(super) fn conflict_status(&self) -> Result<Option<StatusCode>> {
        let expected =
            "an HTTP status (200 to 999), or null or \"original\" for that of the recorded answer";
        let is_original = |text: &str| text.eq_ignore_ascii_case("original");
        match self.value.is_null() || self.value.text().is_some_and(is_original) {
            true => Ok(None),
            false => self.status(200, expected).map(Some),
        }
    }

    /// A status, or a range of them as text: `200-207`.
    pub(super) fn statuses(&self) -> Result<RangeInclusive<u16>> {
        let ends = self.value.text().and_then(|text| text.split_once('-'));
        let Some((first, last)) = ends else {
            let status = self.status(100, "an HTTP status (100 to 999)")?.as_u16();
            return Ok(status..=status);
        };
        let code = |text: &str| text.trim().parse().ok();
        let range = code(first).zip(code(last));
        let range = range.filter(|(first, last)| 100 <= *first && first <= last && *last <= 999);
        let (first, last) = self.or_expected(range, "a range of statuses, such as \"200-207\"")?;
        Ok(first..=last)
    }

    fn token(&self) -> Option<HeaderName> {
        HeaderName::from_bytes(self.value.text()?.as_bytes()).ok()
    }

    pub(super) fn header_name(&self) -> Result<HeaderName> {
        let expected = "the name of an HTTP header (letters, digits and `-`)";
        self.or_expected(self.token(), expected)
    }

    pub(super) fn header_names(&self) -> Result<Vec<HeaderName>> {
        self.items("a list of names of headers", Self::header_name)
    }

    /// `None` is no header.
    pub(super) fn replay_header(&self) -> Result<Option<HeaderName>> {
        if self.value.is_null() {
            return Ok(None);
        }
        let name = self.header_name()?;
        if FRAMING.contains(&name.as_str()) {
            return Err(self.invalid(format_args!(
                "{name} says how an answer is to be read; choose a name of your own"
            )));
        }
        Ok(Some(name))
    }

    pub(super) fn methods(&self) -> Result<Vec<Method>> {
        let expected = "a list of HTTP methods, such as [\"POST\", \"PATCH\"]";
        let methods = self.items(expected, Self::unsafe_method)?;
        if methods.is_empty() {
            return Err(self.invalid(
                "is empty, so nothing would be protected; leave it out for all unsafe methods",
            ));
        }
        Ok(methods)
    }

    fn unsafe_method(&self) -> Result<Method> {
        let name = self.value.text().unwrap_or_default().to_ascii_uppercase();
        let method = Method::from_bytes(name.as_bytes()).ok();
        match self.or_expected(method, "an HTTP method, such as \"POST\"")? {
            Method::CONNECT => {
                Err(self.invalid("CONNECT opens a tunnel and never uses keys; remove it"))
            }
            method if method.is_safe() => Err(self.invalid(format_args!(
                "{method} is safe to repeat and never uses keys; remove it"
            ))),
            method => Ok(method),
        }
    }

    /// By RFC 6265 a token, as the name of a header is.
    pub(super) fn cookie(&self) -> Result<&str> {
        let name = self.token().and(self.value.text());
        self.or_expected(name, "the name of a cookie")
    }

    /// A name is shown, so it can't be a secret.
    pub(super) fn name(&self) -> Result<String> {
        match self.value.text() {
            None => Err(self.expected_hidden("text that is not empty")),
            Some(name) if may_hold_a_secret(name) => {
                Err(self.expected_hidden("a name, such as \"orders\""))
            }
            Some(name) => Ok(name.to_owned()),
        }
    }

    pub(super) fn location(&self) -> Result<Location> {
        match &self.value {
            Value::Text(text) => Ok(Location(text.trim().to_owned())),
            _ => Err(self.expected_hidden("text: host[:port] or a URL")),
        }
    }

    /// Clients are sent the URL, so it must hold no password. A URL without a proper host may be one.
    pub(super) fn documentation(&self) -> Result<Option<HeaderValue>> {
        if self.value.is_null() {
            return Ok(None);
        }
        match self.value.text() {
            None => Err(self.expected_hidden("text that is not empty")),
            Some(url) if is_public(url) => Ok(link_value(url)),
            Some(_) => Err(self.expected_hidden(
                "an http or https URL without a user and a password, or a path that begins with `/`",
            )),
        }
    }
}

/// Reads as `read` does, and refuses zero: `would` says what it would do.
pub(super) fn nonzero<T: Default + PartialEq>(
    read: fn(&Field) -> Result<T>,
    would: &str,
) -> impl Fn(&Field) -> Result<T> {
    move |field| match read(field)? {
        zero if zero == T::default() => Err(field.invalid(format_args!("zero {would}"))),
        value => Ok(value),
    }
}

/// The replay header has the value `true`, with which these headers would break an answer.
#[rustfmt::skip]
const FRAMING: [&str; 8] = [
    "connection", "content-encoding", "content-length", "content-type", "te", "trailer", "transfer-encoding", "upgrade",
];

fn is_public(url: &str) -> bool {
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"));
    match rest {
        Some(rest) => is_host_and_port(rest.split(['/', '?', '#']).next().unwrap_or_default()),
        None => url.starts_with('/'),
    }
}

/// `host`, `host:port`, `[::1]:port`.
pub(super) fn is_host_and_port(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (text, "0"),
    };
    let address = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let is_host_byte = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    let is_host = match address {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.bytes().all(is_host_byte),
    };
    is_host && port.parse::<u16>().is_ok()
}
