//! Values that stand alone: what each kind of them can be.

use std::{ops::RangeInclusive, time::Duration};

use http::{HeaderName, Method, StatusCode};
use serde::{
    Deserialize, Deserializer,
    de::{Error, Unexpected},
};

use super::{secret::may_hold_a_secret, storage::is_host_and_port, units, value::Value};
use crate::LockPolicy;

/// Why a value is refused.
enum Refused {
    /// It is not what is expected. The message shows it: fields of this kind hold no secret.
    Expected(&'static str),
    /// It is not what is expected. It may be a secret, so the message says only its type.
    Hidden(&'static str),
    Because(String),
}
use Refused::{Because, Expected, Hidden};

impl Refused {
    fn error<E: Error>(&self, value: &Value) -> E {
        match self {
            Expected(what) => E::invalid_value(Unexpected::Other(&value.to_string()), what),
            Hidden(what) => E::invalid_value(Unexpected::Other(value.kind()), what),
            Because(why) => E::custom(why),
        }
    }
}

macro_rules! scalars {
    ($($(#[$attribute:meta])* $name:ident($type:ty) = $read:expr;)*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Debug, PartialEq)]
        pub(super) struct $name(pub(super) $type);

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = Value::deserialize(deserializer)?;
                let read: fn(&Value) -> Result<$type, Refused> = $read;
                read(&value).map(Self).map_err(|refused| refused.error(&value))
            }
        }

        impl From<$name> for $type {
            fn from(set: $name) -> Self {
                set.0
            }
        }
    )*};
}

scalars! {
    Flag(bool) = |value| match value {
        Value::Bool(flag) => Ok(*flag),
        Value::Text(text) => text.trim().to_ascii_lowercase().parse().map_err(|_| Expected("true or false")),
        _ => Err(Expected("true or false")),
    };
    Period(Duration) = duration;
    Ttl(Duration) = |value| nonzero(duration(value)?, "zero would keep no record, so every retry would run again");
    StorageTimeout(Duration) = |value| nonzero(duration(value)?, "zero would leave the storage no time, so every request would be refused");
    BodyTimeout(Duration) = |value| nonzero(duration(value)?, "zero would refuse every request whose body is not there at once");
    MaxHold(Duration) = |value| nonzero(duration(value)?, "zero would give every operation up at once");
    Lease(Duration) = |value| match duration(value)? {
        lease if lease >= LockPolicy::MIN_TTL => Ok(lease),
        lease => Err(Because(format!(
            "a lease of {lease:?} would end before it is renewed; give at least {:?}", LockPolicy::MIN_TTL
        ))),
    };
    Count(usize) = count;
    MaxRunning(usize) = |value| nonzero(count(value)?, NO_REQUEST);
    Bytes(usize) = bytes;
    MaxBuffered(usize) = |value| nonzero(bytes(value)?, NO_REQUEST);
    /// How much a storage may hold.
    Room(usize) = |value| nonzero(bytes(value)?, "zero would keep no record, so every retry would run again; give more");
    /// The status of a request that did not run. With a status below 400 its client would think that it did.
    RefusalStatus(StatusCode) = |value| status(value, 400, "an HTTP status of an error (400 to 999)");
    /// hyper can't send 1xx as an answer.
    ConflictStatus(Option<StatusCode>) = |value| match value.text() {
        _ if value.is_null() => Ok(None),
        Some(text) if text.eq_ignore_ascii_case("original") => Ok(None),
        _ => status(value, 200, "an HTTP status (200 to 999), or null or \"original\" for that of the recorded answer").map(Some),
    };
    /// A status, or a range of them as text: `200-207`.
    Statuses(RangeInclusive<u16>) = statuses;
    StatusLimit(u16) = |value| {
        let limit = value.integer().filter(|limit| (101..=1000).contains(limit));
        limit.ok_or(Expected("a number from 101 to 1000, such as 500"))
    };
    Header(HeaderName) = header_name;
    ReplayHeader(Option<HeaderName>) = replay_header;
    UnsafeMethod(Method) = method;
    /// By RFC 6265 the name of a cookie is a token, as that of a header is.
    Cookie(String) = |value| match value.text() {
        Some(name) if HeaderName::from_bytes(name.as_bytes()).is_ok() => Ok(name.to_owned()),
        _ => Err(Expected("the name of a cookie")),
    };
    /// A name is shown, so it can't be a secret.
    Name(String) = |value| match value.text() {
        None => Err(Hidden("text that is not empty")),
        Some(name) if may_hold_a_secret(name) => Err(Hidden("a name, such as \"orders\"")),
        Some(name) => Ok(name.to_owned()),
    };
    #[derive(Eq, PartialOrd, Ord)]
    CacheName(String) = |value| match value {
        Value::Text(name) if !name.trim().is_empty() && !may_hold_a_secret(name) => Ok(name.clone()),
        _ => Err(Because("this can't be the name of a cache; choose one such as \"orders\"".to_owned())),
    };
    Documentation(Option<String>) = documentation;
}

fn duration(value: &Value) -> Result<Duration, Refused> {
    let duration = match value {
        Value::Integer(seconds) => u64::try_from(*seconds).ok().map(Duration::from_secs),
        Value::Float(seconds) => Duration::try_from_secs_f64(*seconds).ok(),
        Value::Text(text) => units::duration(text),
        _ => None,
    };
    match duration {
        Some(duration) if duration <= units::LONGEST => Ok(duration),
        Some(_) => Err(Expected("a duration of at most 100 years (36500 days)")),
        None => Err(Expected(
            "a duration such as \"30s\", \"100ms\" or \"1h30m\" (units: ms, s, m, h, d), or a number of seconds",
        )),
    }
}

const NO_REQUEST: &str = "zero would refuse every request; give a higher number";

fn nonzero<T: Default + PartialEq>(value: T, otherwise: &str) -> Result<T, Refused> {
    match value == T::default() {
        true => Err(Because(otherwise.to_owned())),
        false => Ok(value),
    }
}

fn count(value: &Value) -> Result<usize, Refused> {
    value
        .integer()
        .ok_or(Expected("a whole number, zero or more"))
}

fn bytes(value: &Value) -> Result<usize, Refused> {
    let bytes = match value {
        Value::Text(text) => units::bytes(text),
        _ => value.integer(),
    };
    bytes.ok_or(Expected(
        "a number of bytes, or one with a unit such as \"64KiB\" or \"1MiB\"",
    ))
}

fn status(value: &Value, lowest: u16, expected: &'static str) -> Result<StatusCode, Refused> {
    let status = value.integer().filter(|status| *status >= lowest);
    status
        .and_then(|status| StatusCode::from_u16(status).ok())
        .ok_or(Expected(expected))
}

fn statuses(value: &Value) -> Result<RangeInclusive<u16>, Refused> {
    let one =
        |value| status(value, 100, "an HTTP status (100 to 999)").map(|status| status.as_u16());
    let Some((first, last)) = value.text().and_then(|text| text.split_once('-')) else {
        let status = one(value)?;
        return Ok(status..=status);
    };
    match (
        one(&Value::Text(first.to_owned())),
        one(&Value::Text(last.to_owned())),
    ) {
        (Ok(first), Ok(last)) if first <= last => Ok(first..=last),
        _ => Err(Expected("a range of statuses, such as \"200-207\"")),
    }
}

fn header_name(value: &Value) -> Result<HeaderName, Refused> {
    let name = value
        .text()
        .and_then(|text| HeaderName::from_bytes(text.as_bytes()).ok());
    name.ok_or(Expected(
        "the name of an HTTP header (letters, digits and `-`)",
    ))
}

#[rustfmt::skip]
const FRAMING: [&str; 8] = [
    "connection", "content-encoding", "content-length", "content-type", "te", "trailer", "transfer-encoding", "upgrade",
];

/// The replay header has the value `true`, with which the headers of framing would break an answer.
fn replay_header(value: &Value) -> Result<Option<HeaderName>, Refused> {
    if value.is_null() {
        return Ok(None);
    }
    match header_name(value)? {
        name if FRAMING.contains(&name.as_str()) => Err(Because(format!(
            "{name} says how an answer is to be read; choose a name of your own"
        ))),
        name => Ok(Some(name)),
    }
}

fn method(value: &Value) -> Result<Method, Refused> {
    let name = value.text().unwrap_or_default().to_ascii_uppercase();
    match Method::from_bytes(name.as_bytes()) {
        Err(_) => Err(Expected("an HTTP method, such as \"POST\"")),
        Ok(method) if method.is_safe() => Err(Because(format!(
            "{method} is safe to repeat and never uses keys; remove it"
        ))),
        Ok(Method::CONNECT) => Err(Because(
            "CONNECT opens a tunnel and never uses keys; remove it".to_owned(),
        )),
        Ok(method) => Ok(method),
    }
}

/// Clients are sent the URL, so it must hold no password. A URL without a proper host may be one.
fn documentation(value: &Value) -> Result<Option<String>, Refused> {
    if value.is_null() {
        return Ok(None);
    }
    let url = value.text().ok_or(Hidden("text that is not empty"))?;
    let rest = url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"));
    let is_public = match rest {
        Some(rest) => is_host_and_port(rest.split(['/', '?', '#']).next().unwrap_or_default()),
        None => url.starts_with('/'),
    };
    if !is_public {
        return Err(Hidden(
            "an http or https URL without a user and a password, or a path that begins with `/`",
        ));
    }
    Ok(Some(url.to_owned()))
}
