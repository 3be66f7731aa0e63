//! Values that stand alone: what each kind of them can be.

use std::{ops::RangeInclusive, time::Duration};

use http::{HeaderName, Method, StatusCode};
use serde::{Deserialize, Deserializer, de::Error};

use super::{secret::may_hold_a_secret, storage::is_host_and_port, units, value::Value};
use crate::LockPolicy;

/// The value, or the message that says why it is refused.
type Read<T> = Result<T, String>;

/// The message quotes the value, so this is only for fields that hold no secret.
fn expect<T>(read: Option<T>, expected: &str, value: &Value) -> Read<T> {
    read.ok_or_else(|| format!("expected {expected}, found {value}"))
}

/// As [`expect`], for a value that may be a secret.
fn expect_hidden<T>(read: Option<T>, expected: &str, value: &Value) -> Read<T> {
    read.ok_or_else(|| format!("expected {expected}, found {}", value.kind()))
}

fn nonzero<T: Default + PartialEq>(value: T, otherwise: &str) -> Read<T> {
    Some(value)
        .filter(|value| *value != T::default())
        .ok_or_else(|| format!("zero {otherwise}"))
}

macro_rules! scalars {
    ($($(#[$attribute:meta])* $name:ident($type:ty) = $read:expr;)*) => {$(
        $(#[$attribute])*
        #[derive(Clone, Debug, PartialEq)]
        pub(super) struct $name(pub(super) $type);

        impl $name {
            fn read(value: &Value) -> Read<$type> {
                let read: fn(&Value) -> Read<$type> = $read;
                read(value)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = Value::deserialize(deserializer)?;
                Self::read(&value).map(Self).map_err(D::Error::custom)
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
    Flag(bool) = |value| expect(flag(value), "true or false", value);
    Period(Duration) = duration;
    Ttl(Duration) = |value| nonzero(duration(value)?, "would keep no record, so every retry would run again");
    StorageTimeout(Duration) = |value| nonzero(duration(value)?, "would leave the storage no time, so every request would be refused");
    BodyTimeout(Duration) = |value| nonzero(duration(value)?, "would refuse every request whose body is not there at once");
    PurgePeriod(Duration) = |value| nonzero(duration(value)?, "would purge without a pause; give a duration such as \"10m\"");
    TransactionLimit(Duration) = |value| nonzero(duration(value)?, "would roll every transaction back at once; give a duration such as \"10s\"");
    MaxHold(Duration) = |value| nonzero(duration(value)?, "would give every operation up at once");
    Lease(Duration) = |value| match (duration(value)?, LockPolicy::MIN_TTL) {
        (lease, shortest) if lease < shortest => {
            Err(format!("a lease of {lease:?} would end before it is renewed; give at least {shortest:?}"))
        }
        (lease, _) => Ok(lease),
    };
    Count(usize) = |value| expect(value.integer(), "a whole number, zero or more", value);
    MaxRunning(usize) = |value| nonzero(Count::read(value)?, "would refuse every request; give a higher number");
    Bytes(usize) = |value| expect(bytes(value), "a number of bytes, or one with a unit such as \"64KiB\" or \"1MiB\"", value);
    MaxBuffered(usize) = |value| nonzero(Bytes::read(value)?, "would refuse every request; give a higher number");
    /// How much a storage may hold.
    Room(usize) = |value| nonzero(Bytes::read(value)?, "would keep no record, so every retry would run again; give more");
    /// The status of a request that did not run. With a status below 400 its client would think that it did.
    RefusalStatus(StatusCode) = |value| expect(status(value, 400), "an HTTP status of an error (400 to 999)", value);
    /// hyper can't send 1xx as an answer.
    ConflictStatus(Option<StatusCode>) = |value| match value.text() {
        _ if value.is_null() => Ok(None),
        Some(text) if text.eq_ignore_ascii_case("original") => Ok(None),
        _ => expect(
            status(value, 200).map(Some),
            "an HTTP status (200 to 999), or null or \"original\" for that of the recorded answer",
            value,
        ),
    };
    /// A status, or a range of them as text: `200-207`.
    Statuses(RangeInclusive<u16>) = |value| match value.text().and_then(|text| text.split_once('-')) {
        Some(ends) => expect(range(ends), "a range of statuses, such as \"200-207\"", value),
        None => {
            let one = status(value, 100).map(|status| status.as_u16());
            expect(one.map(|status| status..=status), "an HTTP status (100 to 999)", value)
        }
    };
    StatusLimit(u16) = |value| {
        let limit = value.integer().filter(|limit| (101..=1000).contains(limit));
        expect(limit, "a number from 101 to 1000, such as 500", value)
    };
    Header(HeaderName) = |value| expect(header_name(value), "the name of an HTTP header (letters, digits and `-`)", value);
    ReplayHeader(Option<HeaderName>) = |value| match value.is_null() {
        true => Ok(None),
        false => match Header::read(value)? {
            name if FRAMING.contains(&name.as_str()) => {
                Err(format!("{name} says how an answer is to be read; choose a name of your own"))
            }
            name => Ok(Some(name)),
        },
    };
    UnsafeMethod(Method) = method;
    /// By RFC 6265 the name of a cookie is a token, as that of a header is.
    Cookie(String) = |value| {
        let name = header_name(value).and(value.text());
        expect(name.map(str::to_owned), "the name of a cookie", value)
    };
    /// A name is shown, so it can't be a secret.
    Name(String) = |value| {
        let name = expect_hidden(value.text(), "text that is not empty", value)?;
        let name = Some(name.to_owned()).filter(|name| !may_hold_a_secret(name));
        expect_hidden(name, "a name, such as \"orders\"", value)
    };
    #[derive(Eq, PartialOrd, Ord)]
    CacheName(String) = |value| match value {
        Value::Text(name) if !name.trim().is_empty() && !may_hold_a_secret(name) => Ok(name.clone()),
        _ => Err("this can't be the name of a cache; choose one such as \"orders\"".to_owned()),
    };
    /// Clients are sent the URL, so it must hold no password. A URL without a proper host may be one.
    Documentation(Option<String>) = |value| match value.is_null() {
        true => Ok(None),
        false => {
            let url = expect_hidden(value.text(), "text that is not empty", value)?;
            let url = Some(url.to_owned()).filter(|url| is_public(url));
            expect_hidden(url, "an http or https URL without a user and a password, or a path that begins with `/`", value).map(Some)
        }
    };
}

/// The replay header has the value `true`, with which these headers would break an answer.
#[rustfmt::skip]
const FRAMING: [&str; 8] = [
    "connection", "content-encoding", "content-length", "content-type", "te", "trailer", "transfer-encoding", "upgrade",
];

fn flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        _ => value.text()?.to_ascii_lowercase().parse().ok(),
    }
}

fn duration(value: &Value) -> Read<Duration> {
    const EXPECTED: &str = "a duration such as \"30s\", \"100ms\" or \"1h30m\" (units: ms, s, m, h, d), or a number of \
                            seconds";

    let duration = match value {
        Value::Float(seconds) => Duration::try_from_secs_f64(*seconds).ok(),
        Value::Text(text) => units::duration(text),
        _ => value.integer().map(Duration::from_secs),
    };
    let duration = expect(duration, EXPECTED, value)?;
    let short = Some(duration).filter(|duration| *duration <= units::LONGEST);
    expect(short, "a duration of at most 100 years (36500 days)", value)
}

fn bytes(value: &Value) -> Option<usize> {
    match value {
        Value::Text(text) => units::bytes(text),
        _ => value.integer(),
    }
}

fn status(value: &Value, lowest: u16) -> Option<StatusCode> {
    let status = value.integer().filter(|status| *status >= lowest)?;
    StatusCode::from_u16(status).ok()
}

fn range((first, last): (&str, &str)) -> Option<RangeInclusive<u16>> {
    let status = |text: &str| status(&Value::Text(text.to_owned()), 100);
    let (first, last) = (status(first)?, status(last)?);
    (first <= last).then_some(first.as_u16()..=last.as_u16())
}

fn header_name(value: &Value) -> Option<HeaderName> {
    HeaderName::from_bytes(value.text()?.as_bytes()).ok()
}

fn method(value: &Value) -> Read<Method> {
    let name = value.text().unwrap_or_default().to_ascii_uppercase();
    let method = Method::from_bytes(name.as_bytes()).ok();
    match expect(method, "an HTTP method, such as \"POST\"", value)? {
        Method::CONNECT => Err("CONNECT opens a tunnel and never uses keys; remove it".to_owned()),
        method if method.is_safe() => Err(format!(
            "{method} is safe to repeat and never uses keys; remove it"
        )),
        method => Ok(method),
    }
}

fn is_public(url: &str) -> bool {
    match url
        .strip_prefix("https://")
        .or_else(|| url.strip_prefix("http://"))
    {
        Some(rest) => is_host_and_port(rest.split(['/', '?', '#']).next().unwrap_or_default()),
        None => url.starts_with('/'),
    }
}
