//! The client's key, and the storage key that an encoder makes of it.
//!
//! [`Key`] is parsed, not validated: whoever holds one holds a key that fits the grammar. It is a
//! secret of the client as far as logs are concerned, so it has no `Display` and its `Debug` shows
//! nothing but a length. [`EncodedKey`] is a hash and may be shown.

use std::{
    borrow::Cow,
    fmt,
    iter::{self, Copied, Peekable},
    slice,
    str::FromStr,
    sync::Arc,
};

use http::{HeaderMap, HeaderName, HeaderValue};

use self::hash::derive;

mod hash;

pub use self::hash::{EncodedKey, ParseEncodedKeyError};
pub(crate) use self::hash::{FieldHasher, HashKeys, parse_hex, shown_as_hex};

/// The most bytes a key may have after its quotes and escapes are removed.
const MAX_LEN: usize = 255;

/// Names the recipe of [`Key::derive`]; part of what is hashed.
const DERIVE_FROM_KEY: &str = "idempotency/derive-from-key/1";

/// An idempotency key as the client means it: without the quotes, escapes and parameters it may
/// have been sent with.
///
/// A header value is a key when, without spaces and tabs at its ends, it is one of
///
/// * a bare key: visible ASCII and inner spaces, without `"` and `,`;
/// * a String of [RFC 8941 §3.3.3], as the IETF draft asks for, with or without parameters. Those
///   must be well-formed and are ignored: `"8e03978e";attempt=2` is the key `8e03978e`.
///
/// Either way the key has 1 to 255 bytes and no space at its ends. `"abc"` and `abc` are the same
/// key, so a client that starts to quote its keys does not run an operation twice.
///
/// ```
/// use http::HeaderValue;
/// use idempotency_core::Key;
///
/// let bare = Key::parse(&HeaderValue::from_static("order-7"))?;
/// let quoted = Key::parse(&HeaderValue::from_static(r#""order-7""#))?;
/// assert_eq!(bare, quoted);
/// assert_eq!(bare.as_str(), "order-7");
/// assert_eq!(format!("{bare:?}"), "Key(7 bytes)"); // never the key itself
/// # Ok::<(), idempotency_core::InvalidKey>(())
/// ```
///
/// [RFC 8941 §3.3.3]: https://www.rfc-editor.org/rfc/rfc8941#section-3.3.3
// Shared, because a request carries its key in its extensions, which clone.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Key(Arc<str>);

impl Key {
    /// Parses the value of one header line.
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] when the value does not fit the grammar given at [`Key`].
    ///
    /// ```
    /// use http::HeaderValue;
    /// use idempotency_core::{InvalidKeyKind, Key};
    ///
    /// let two = Key::parse(&HeaderValue::from_static("a, b")).unwrap_err();
    /// assert_eq!(two.kind(), InvalidKeyKind::Comma);
    /// ```
    pub fn parse(value: &HeaderValue) -> Result<Self, InvalidKey> {
        Self::from_field_value(value.as_bytes())
    }

    /// Finds and parses the key among a request's headers; `None` when there is no such header.
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] when the value does not fit the grammar given at [`Key`], or when the header
    /// was sent more than once: to guess which of two keys was meant could run an operation twice.
    ///
    /// ```
    /// use http::{HeaderMap, HeaderName, HeaderValue};
    /// use idempotency_core::Key;
    ///
    /// let name = HeaderName::from_static("idempotency-key");
    /// let mut headers = HeaderMap::new();
    /// assert_eq!(Key::from_headers(&headers, &name)?, None);
    ///
    /// headers.insert(&name, HeaderValue::from_static("order-7"));
    /// let key = Key::from_headers(&headers, &name)?;
    /// assert_eq!(key.as_ref().map(Key::as_str), Some("order-7"));
    /// # Ok::<(), idempotency_core::InvalidKey>(())
    /// ```
    pub fn from_headers(
        headers: &HeaderMap,
        name: &HeaderName,
    ) -> Result<Option<Self>, InvalidKey> {
        let mut lines = headers.get_all(name).iter();
        let Some(first) = lines.next() else {
            return Ok(None);
        };
        match lines.count() {
            0 => Self::parse(first).map(Some),
            more => Err(InvalidKey(Fault::Repeated { lines: more + 1 })),
        }
    }

    /// The key itself. It is the client's secret: do not log it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A key for a call that the handler makes to another service.
    ///
    /// The same key and label always give the same result, in every process and every version of
    /// this crate, so a repeated execution repeats its downstream calls under the same keys. Give
    /// each kind of call its own label. The result is a UUID of version 8 ([RFC 9562 §5.8]): 36
    /// characters, which fits the limits of the providers we know, and from which the client's key
    /// can't be read back.
    ///
    /// Only the client's key and the label enter. **Two tenants or two routes that send the same
    /// key derive the same result**, and so would share one downstream operation. Where keys are
    /// not unique across callers, use [`EncodedKey::derive`], which covers all that the encoder
    /// puts into the storage key, by default the caller.
    ///
    /// ```
    /// use http::HeaderValue;
    /// use idempotency_core::Key;
    ///
    /// let key = Key::parse(&HeaderValue::from_static("order-7"))?;
    /// let charge = key.derive("psp-charge");
    /// assert_eq!(charge.len(), 36);
    /// assert_eq!(charge, key.derive("psp-charge"));
    /// assert_ne!(charge, key.derive("confirmation-mail"));
    /// # Ok::<(), idempotency_core::InvalidKey>(())
    /// ```
    ///
    /// [RFC 9562 §5.8]: https://www.rfc-editor.org/rfc/rfc9562#section-5.8
    #[must_use]
    pub fn derive(&self, label: &str) -> String {
        derive(DERIVE_FROM_KEY, self.0.as_bytes(), label)
    }

    // Apart from `parse`, because a `HeaderValue` can't hold every byte and the grammar answers
    // for all of them.
    fn from_field_value(raw: &[u8]) -> Result<Self, InvalidKey> {
        let Some(start) = raw.iter().position(|byte| !is_ows(*byte)) else {
            return Err(InvalidKey(Fault::Empty));
        };
        let end = raw.iter().rposition(|byte| !is_ows(*byte)).unwrap_or(start) + 1;
        let value = &raw[start..end];
        let text = if value[0] == b'"' {
            let rest = value.iter().copied().peekable();
            Cow::Owned(Scanner { rest, end }.quoted_key()?)
        } else {
            bare_key(value, start)?
        };
        match text.len() {
            0 => Err(InvalidKey(Fault::Empty)),
            1..=MAX_LEN if text.starts_with(' ') || text.ends_with(' ') => {
                Err(InvalidKey(Fault::OuterSpace))
            }
            1..=MAX_LEN => Ok(Self(text.into())),
            len => Err(InvalidKey(Fault::TooLong { len })),
        }
    }
}

/// A key that was not in a header, by the same grammar as [`Key::parse`].
///
/// ```
/// use idempotency_core::{InvalidKeyKind, Key};
///
/// let key: Key = "evt_7".parse()?;
/// assert_eq!(key.as_str(), "evt_7");
/// assert_eq!("".parse::<Key>().unwrap_err().kind(), InvalidKeyKind::Empty);
/// # Ok::<(), idempotency_core::InvalidKey>(())
/// ```
impl FromStr for Key {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, InvalidKey> {
        Self::from_field_value(text.as_bytes())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} bytes)", self.0.len())
    }
}

/// A bare key is all of `value`, which begins at `start` of the field value.
fn bare_key(value: &[u8], start: usize) -> Result<Cow<'_, str>, InvalidKey> {
    for (offset, byte) in (start..).zip(value) {
        match byte {
            // `abc"` may be a cut `"abc"`, `a,b` two header lines that a proxy joined. Both
            // would be accepted as a key that the client never meant.
            b'"' => return Err(InvalidKey(Fault::UnbalancedQuote { offset })),
            b',' => return Err(InvalidKey(Fault::Comma { offset })),
            0x20..=0x7e => {}
            _ => return Err(InvalidKey(Fault::ForbiddenByte { offset })),
        }
    }
    Ok(String::from_utf8_lossy(value))
}

/// Reads a quoted key from left to right.
struct Scanner<'a> {
    rest: Peekable<Copied<slice::Iter<'a, u8>>>,
    /// Where `rest` ends. Offsets in faults count from the first byte of the field value.
    end: usize,
}

impl Scanner<'_> {
    /// `sf-item` of RFC 8941 whose bare item is an `sf-string`.
    fn quoted_key(&mut self) -> Result<String, InvalidKey> {
        let text = self.string()?;
        self.parameters()?;
        let offset = self.offset();
        self.skip(is_ows);
        match self.rest.peek() {
            None => Ok(text),
            Some(b',') => Err(InvalidKey(Fault::Comma {
                offset: self.offset(),
            })),
            Some(_) => Err(InvalidKey(Fault::TrailingData { offset })),
        }
    }

    /// `sf-string`; stands on the opening quote.
    fn string(&mut self) -> Result<String, InvalidKey> {
        let open = self.offset();
        self.rest.next();
        let mut text = String::with_capacity(self.rest.len());
        loop {
            let offset = self.offset();
            match self.rest.next() {
                None => return Err(InvalidKey(Fault::UnbalancedQuote { offset: open })),
                Some(b'"') => return Ok(text),
                Some(b'\\') => match self.rest.next() {
                    None => return Err(InvalidKey(Fault::UnbalancedQuote { offset: open })),
                    Some(escaped @ (b'"' | b'\\')) => text.push(char::from(escaped)),
                    Some(_) => return Err(InvalidKey(Fault::Escape { offset })),
                },
                Some(byte @ 0x20..=0x7e) => text.push(char::from(byte)),
                Some(_) => return Err(InvalidKey(Fault::ForbiddenByte { offset })),
            }
        }
    }

    /// `parameters`: `*( ";" *SP key [ "=" bare-item ] )`.
    fn parameters(&mut self) -> Result<(), InvalidKey> {
        while self.eat(b';') {
            self.skip(|byte| byte == b' ');
            let offset = self.offset();
            let starts = matches!(self.rest.peek(), Some(b'a'..=b'z' | b'*'));
            self.skip(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'.' | b'*'));
            if !starts || (self.eat(b'=') && !self.bare_item()?) {
                return Err(InvalidKey(Fault::Parameter { offset }));
            }
        }
        Ok(())
    }

    /// `bare-item`; says whether there is a well-formed one.
    fn bare_item(&mut self) -> Result<bool, InvalidKey> {
        Ok(match self.rest.peek() {
            Some(b'"') => self.string().map(|_| true)?,
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b'?') => self.eat(b'?') && (self.eat(b'0') || self.eat(b'1')),
            Some(b':') => {
                self.eat(b':');
                self.skip(|byte| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte));
                self.eat(b':')
            }
            Some(b'*' | b'A'..=b'Z' | b'a'..=b'z') => {
                let rest = b"!#$%&'*+-.^_`|~:/";
                self.skip(|byte| byte.is_ascii_alphanumeric() || rest.contains(&byte)) > 0
            }
            _ => false,
        })
    }

    /// `sf-integer` of 15 digits at most, or `sf-decimal` of at most 12 and 3.
    fn number(&mut self) -> bool {
        self.eat(b'-');
        let whole = self.skip(|byte| byte.is_ascii_digit());
        if !self.eat(b'.') {
            return (1..=15).contains(&whole);
        }
        let fraction = self.skip(|byte| byte.is_ascii_digit());
        (1..=12).contains(&whole) && (1..=3).contains(&fraction)
    }

    fn offset(&self) -> usize {
        self.end - self.rest.len()
    }

    fn eat(&mut self, wanted: u8) -> bool {
        self.rest.next_if_eq(&wanted).is_some()
    }

    /// Passes over all that match and says how many there were.
    fn skip(&mut self, wanted: impl Fn(u8) -> bool) -> usize {
        iter::from_fn(|| self.rest.next_if(|byte| wanted(*byte))).count()
    }
}

/// Optional white space of HTTP: what may surround a field value.
fn is_ows(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t')
}

/// Why a header value is no [`Key`].
///
/// Its `Display` says what is wrong, where, and what to send instead. It never shows the key, so
/// it can go into an answer and into a log.
///
/// ```
/// use http::HeaderValue;
/// use idempotency_core::{InvalidKeyKind, Key};
///
/// let error = Key::parse(&HeaderValue::from_static(r#""order-7"#)).unwrap_err();
/// assert_eq!(error.kind(), InvalidKeyKind::UnbalancedQuote);
/// assert!(!error.to_string().contains("order-7"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidKey(Fault);

impl InvalidKey {
    /// What is wrong, for programs.
    #[must_use]
    pub fn kind(&self) -> InvalidKeyKind {
        match self.0 {
            Fault::Empty => InvalidKeyKind::Empty,
            Fault::TooLong { .. } => InvalidKeyKind::TooLong,
            Fault::ForbiddenByte { .. } => InvalidKeyKind::ForbiddenByte,
            Fault::UnbalancedQuote { .. } => InvalidKeyKind::UnbalancedQuote,
            Fault::Escape { .. } => InvalidKeyKind::Escape,
            Fault::TrailingData { .. } => InvalidKeyKind::TrailingData,
            Fault::Comma { .. } => InvalidKeyKind::Comma,
            Fault::Parameter { .. } => InvalidKeyKind::Parameter,
            Fault::OuterSpace => InvalidKeyKind::OuterSpace,
            Fault::Repeated { .. } => InvalidKeyKind::Repeated,
            Fault::NotUuid | Fault::Refused => InvalidKeyKind::Format,
        }
    }
}

/// The kinds of [`InvalidKey`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InvalidKeyKind {
    /// No value, or nothing between the quotes.
    Empty,
    /// More than 255 bytes, counted without quotes and escapes.
    TooLong,
    /// A control byte, 0x7f, or a byte from 0x80 on.
    ForbiddenByte,
    /// A quote that opens and never closes, or a quote inside a bare key.
    UnbalancedQuote,
    /// A backslash in a quoted key before something other than `"` and `\`.
    Escape,
    /// Something other than parameters after the closing quote.
    TrailingData,
    /// A comma in a bare key, or after the closing quote: a list of keys.
    Comma,
    /// A parameter after the closing quote that RFC 8941 does not allow.
    Parameter,
    /// A space right after the opening or right before the closing quote.
    OuterSpace,
    /// More than one header line.
    Repeated,
    /// A valid key that the server's [`KeyFormat`] refuses.
    Format,
}

/// What [`InvalidKeyKind`] says, with the numbers for the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Fault {
    #[error(
        "the idempotency key is empty: send 1 to {MAX_LEN} visible ASCII characters, for example a fresh UUID"
    )]
    Empty,
    #[error(
        "the idempotency key has {len} bytes: send at most {MAX_LEN}, for example a fresh UUID"
    )]
    TooLong { len: usize },
    #[error(
        "the byte at offset {offset} of the idempotency key is a control or non-ASCII byte: send visible ASCII, for example a fresh UUID"
    )]
    ForbiddenByte { offset: usize },
    #[error(
        "the double quote at offset {offset} of the idempotency key has no partner: send the key without quotes, or all of it inside one pair"
    )]
    UnbalancedQuote { offset: usize },
    #[error(
        "the backslash at offset {offset} of the quoted idempotency key escapes neither a double quote nor a backslash: write two backslashes for one"
    )]
    Escape { offset: usize },
    #[error(
        "the quoted idempotency key is followed by something else at offset {offset}: end the value with the closing quote"
    )]
    TrailingData { offset: usize },
    #[error(
        "the idempotency key has a comma at offset {offset}: send one key, and put a key that contains a comma in double quotes"
    )]
    Comma { offset: usize },
    #[error(
        "the quoted idempotency key has a malformed parameter at offset {offset}: end the value with the closing quote, or write parameters as RFC 8941 does"
    )]
    Parameter { offset: usize },
    #[error("the idempotency key begins or ends with a space inside its quotes: send it without")]
    OuterSpace,
    #[error("the idempotency key header was sent {lines} times: send it once")]
    Repeated { lines: usize },
    #[error("the idempotency key is not a UUID: send 32 hex digits in the groups 8-4-4-4-12")]
    NotUuid,
    #[error(
        "the idempotency key does not have the format that this server asks for: see its documentation"
    )]
    Refused,
}

/// Which keys a server accepts, among those that [`Key::parse`] does. Default: [`KeyFormat::any`].
///
/// ```
/// use http::HeaderValue;
/// use idempotency_core::{InvalidKeyKind, Key, KeyFormat};
///
/// let short = Key::parse(&HeaderValue::from_static("1"))?;
/// assert!(KeyFormat::any().check(&short).is_ok());
///
/// let long_only = KeyFormat::from_fn(|key| key.len() >= 16);
/// let refused = long_only.check(&short).unwrap_err();
/// assert_eq!(refused.kind(), InvalidKeyKind::Format);
/// # Ok::<(), idempotency_core::InvalidKey>(())
/// ```
#[derive(Clone, Default)]
pub struct KeyFormat(Format);

#[derive(Clone, Default)]
enum Format {
    #[default]
    Any,
    Uuid,
    Custom(Arc<dyn Fn(&str) -> bool + Send + Sync>),
}

impl KeyFormat {
    /// Every key that [`Key::parse`] accepts: 1 to 255 bytes, visible ASCII or a space inside.
    #[must_use]
    pub fn any() -> Self {
        Self(Format::Any)
    }

    /// UUIDs only: 32 hex digits of either case in the groups 8-4-4-4-12, of any version.
    ///
    /// Keys are compared as they were sent: the same UUID in upper and in lower case is two keys.
    ///
    /// ```
    /// use http::HeaderValue;
    /// use idempotency_core::{Key, KeyFormat};
    ///
    /// let uuid = HeaderValue::from_static("8e03978e-40d5-43dd-bc93-6894a57f9324");
    /// assert!(KeyFormat::uuid().check(&Key::parse(&uuid)?).is_ok());
    ///
    /// let other = HeaderValue::from_static("order-7");
    /// assert!(KeyFormat::uuid().check(&Key::parse(&other)?).is_err());
    /// # Ok::<(), idempotency_core::InvalidKey>(())
    /// ```
    #[must_use]
    pub fn uuid() -> Self {
        Self(Format::Uuid)
    }

    /// The keys for which `accepts` returns true. It runs on every request with a key, so it
    /// should be quick.
    #[must_use]
    pub fn from_fn(accepts: impl Fn(&str) -> bool + Send + Sync + 'static) -> Self {
        Self(Format::Custom(Arc::new(accepts)))
    }

    /// Checks a key.
    ///
    /// # Errors
    ///
    /// [`InvalidKey`] of kind [`InvalidKeyKind::Format`] when the key does not have this format.
    pub fn check(&self, key: &Key) -> Result<(), InvalidKey> {
        let (accepted, fault) = match &self.0 {
            Format::Any => (true, Fault::Refused),
            Format::Uuid => (is_uuid(key.as_str()), Fault::NotUuid),
            Format::Custom(accepts) => (accepts(key.as_str()), Fault::Refused),
        };
        accepted.then_some(()).ok_or(InvalidKey(fault))
    }
}

impl fmt::Debug for KeyFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Format::Any => "KeyFormat::any()",
            Format::Uuid => "KeyFormat::uuid()",
            Format::Custom(_) => "KeyFormat::from_fn(..)",
        })
    }
}

/// With hyphens: the other ways to write a UUID have other lengths.
fn is_uuid(text: &str) -> bool {
    text.len() == 36 && uuid::Uuid::try_parse(text).is_ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use proptest::prelude::*;

    use super::*;

    fn parse(raw: impl AsRef<[u8]>) -> Result<String, InvalidKeyKind> {
        match Key::from_field_value(raw.as_ref()) {
            Ok(key) => Ok(key.as_str().to_owned()),
            Err(error) => Err(error.kind()),
        }
    }

    fn key(raw: &str) -> Key {
        Key::from_field_value(raw.as_bytes()).unwrap()
    }

    #[test]
    fn valid_keys() {
        for (raw, wanted) in [
            ("abc", "abc"),
            (" \t abc\t ", "abc"),
            ("a b", "a b"),
            ("a\\b;c=1", "a\\b;c=1"),
            (
                "8e03978e-40d5-43dd-bc93-6894a57f9324",
                "8e03978e-40d5-43dd-bc93-6894a57f9324",
            ),
            (r#""abc""#, "abc"),
            ("\t\"abc\" ", "abc"),
            (r#""a,b""#, "a,b"),
            (r#""a b""#, "a b"),
            (r#""a\"b\\c""#, r#"a"b\c"#),
            (r#""\"""#, r#"""#),
            (r#""abc";a;b=1;c="x""#, "abc"),
            (r#""abc"; a;  b=?0;c=?1"#, "abc"),
            (r#""abc";*=*;a_-.*0=tok:en/1"#, "abc"),
            (
                r#""abc";a=-1;b=1.5;c=999999999999999;d=999999999999.999"#,
                "abc",
            ),
            (r#""abc";a=:aGk=:;b=::;c="a\"b\\""#, "abc"),
        ] {
            assert_eq!(parse(raw).as_deref(), Ok(wanted), "{raw}");
        }
    }

    #[test]
    fn invalid_keys() {
        use InvalidKeyKind::*;
        for (raw, wanted) in [
            ("", Empty),
            (" \t ", Empty),
            (r#""""#, Empty),
            (r#"""#, UnbalancedQuote),
            (r#""abc"#, UnbalancedQuote),
            (r#"abc""#, UnbalancedQuote),
            (r#"a"b"c"#, UnbalancedQuote),
            (r#""abc\"#, UnbalancedQuote),
            (r#""abc\""#, UnbalancedQuote),
            (r#""a\bc""#, Escape),
            (r#""abc"def"#, TrailingData),
            (r#""abc" def"#, TrailingData),
            (r#""abc""def""#, TrailingData),
            (r#""abc" ;a"#, TrailingData),
            (r#""abc";a b"#, TrailingData),
            ("a,b", Comma),
            (",", Comma),
            (r#""a", "b""#, Comma),
            (r#""a" ,"b""#, Comma),
            (r#""a";x,"b""#, Comma),
            (r#""abc";"#, Parameter),
            (r#""abc";A"#, Parameter),
            (r#""abc";1"#, Parameter),
            (r#""abc";a="#, Parameter),
            (r#""abc";a=-"#, Parameter),
            (r#""abc";a=1."#, Parameter),
            (r#""abc";a=1.2345"#, Parameter),
            (r#""abc";a=1234567890123456"#, Parameter),
            (r#""abc";a=1234567890123.1"#, Parameter),
            (r#""abc";a=?2"#, Parameter),
            (r#""abc";a=:aGk="#, Parameter),
            (r#""abc";a=;b"#, Parameter),
            (r#""abc";;"#, Parameter),
            (r#""abc";a="b"#, UnbalancedQuote),
            (r#"" abc""#, OuterSpace),
            (r#""abc ""#, OuterSpace),
            (r#"" ""#, OuterSpace),
            ("a\tb", ForbiddenByte),
            ("\"a\tb\"", ForbiddenByte),
            ("é", ForbiddenByte),
        ] {
            assert_eq!(parse(raw), Err(wanted), "{raw}");
        }
    }

    #[test]
    fn every_byte_everywhere() {
        for byte in 0..=u8::MAX {
            let visible = (0x21..=0x7e).contains(&byte);
            let refused = Err(match byte {
                b'"' => InvalidKeyKind::UnbalancedQuote,
                b',' => InvalidKeyKind::Comma,
                _ => InvalidKeyKind::ForbiddenByte,
            });
            let of = |bytes: &[u8]| Ok(String::from_utf8(bytes.to_vec()).unwrap());
            let ows = matches!(byte, b' ' | b'\t');

            let alone = parse([byte]);
            let begin = parse([byte, b'b', b'c']);
            let middle = parse([b'a', byte, b'c']);
            let end = parse([b'a', b'b', byte]);
            match byte {
                b'"' => {
                    assert_eq!(alone, refused);
                    assert_eq!(begin, refused);
                    assert_eq!(middle, refused);
                    assert_eq!(end, refused);
                }
                _ if visible && byte != b',' => {
                    assert_eq!(alone, of(&[byte]));
                    assert_eq!(begin, of(&[byte, b'b', b'c']));
                    assert_eq!(middle, of(&[b'a', byte, b'c']));
                    assert_eq!(end, of(&[b'a', b'b', byte]));
                }
                _ if ows => {
                    assert_eq!(alone, Err(InvalidKeyKind::Empty));
                    assert_eq!(begin, of(b"bc"));
                    assert_eq!(end, of(b"ab"));
                    assert_eq!(middle, if byte == b' ' { of(b"a c") } else { refused });
                }
                _ => {
                    assert_eq!(alone, refused);
                    assert_eq!(begin, refused);
                    assert_eq!(middle, refused);
                    assert_eq!(end, refused);
                }
            }

            let quoted = |inner: &[u8]| parse([b"\"", inner, b"\""].concat());
            for inner in [[byte, b'b', b'c'], [b'a', byte, b'c'], [b'a', b'b', byte]] {
                let outer_space = inner[0] == b' ' || inner[2] == b' ';
                let wanted = match byte {
                    b' ' if outer_space => Err(InvalidKeyKind::OuterSpace),
                    b'"' => Err(InvalidKeyKind::TrailingData),
                    b'\\' if inner[2] == b'\\' => Err(InvalidKeyKind::UnbalancedQuote),
                    b'\\' => Err(InvalidKeyKind::Escape),
                    0x20..=0x7e => of(&inner),
                    _ => Err(InvalidKeyKind::ForbiddenByte),
                };
                assert_eq!(quoted(&inner), wanted, "{inner:?}");
            }
        }
    }

    #[test]
    fn every_length() {
        for len in 0..=300_usize {
            let text = "k".repeat(len);
            let wanted = match len {
                0 => Err(InvalidKeyKind::Empty),
                1..=255 => Ok(text.clone()),
                _ => Err(InvalidKeyKind::TooLong),
            };
            assert_eq!(parse(&text), wanted, "{len}");
            assert_eq!(parse(format!("\"{text}\"")), wanted, "{len} quoted");
            assert_eq!(
                parse(format!("\"{text}\";p=1")),
                wanted,
                "{len} with parameter"
            );

            // The limit is on the key, not on how it was written.
            let escaped = format!("\"{}\"", "\\\\".repeat(len));
            assert_eq!(
                parse(escaped),
                wanted.map(|_| "\\".repeat(len)),
                "{len} escaped"
            );
        }
    }

    #[test]
    fn from_headers_wants_one_line() {
        let name = HeaderName::from_static("idempotency-key");
        let mut headers = HeaderMap::new();
        assert_eq!(Key::from_headers(&headers, &name), Ok(None));

        headers.append(&name, HeaderValue::from_static("abc"));
        assert_eq!(Key::from_headers(&headers, &name), Ok(Some(key("abc"))));

        // Also when both lines say the same.
        headers.append(&name, HeaderValue::from_static("abc"));
        let error = Key::from_headers(&headers, &name).unwrap_err();
        assert_eq!(error.kind(), InvalidKeyKind::Repeated);
        assert!(error.to_string().contains("2 times"));

        headers.insert(&name, HeaderValue::from_static(""));
        let error = Key::from_headers(&headers, &name).unwrap_err();
        assert_eq!(error.kind(), InvalidKeyKind::Empty);
    }

    #[test]
    fn nothing_shows_the_key() {
        assert_eq!(format!("{:?}", key("sesame-7")), "Key(8 bytes)");
        let long = "sesame".repeat(100);
        for raw in [
            "sesame\"",
            "\"sesame",
            "\"sesame\" sesame",
            "\"sesame\", \"sesame\"",
            "\"sesame\";SESAME",
            "\"sesame\\n\"",
            "\" sesame\"",
            "sesame\u{7f}",
            &long,
        ] {
            let error = Key::from_field_value(raw.as_bytes()).unwrap_err();
            let shown = format!("{error} {error:?}").to_lowercase();
            assert!(!shown.contains("sesame"), "{shown}");
        }
        let error = KeyFormat::uuid().check(&key("sesame")).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("sesame"));
    }

    #[test]
    fn offsets_count_from_the_first_byte() {
        let error = Key::from_field_value(b"  ab\x01").unwrap_err();
        assert!(error.to_string().contains("offset 4"), "{error}");
    }

    #[test]
    fn formats() {
        let any = KeyFormat::default();
        let uuid = KeyFormat::uuid();
        assert!(any.check(&key("x")).is_ok());
        assert!(
            uuid.check(&key("8e03978e-40d5-43dd-bc93-6894a57f9324"))
                .is_ok()
        );
        assert!(
            uuid.check(&key("8E03978E-40D5-43DD-BC93-6894A57F9324"))
                .is_ok()
        );
        for other in [
            "x",
            "8e03978e40d543ddbc936894a57f9324",
            "8e03978e-40d5-43dd-bc93-6894a57f932",
            "8e03978e-40d5-43dd-bc93-6894a57f93244",
            "8e03978e-40d5-43dd-bc9-36894a57f9324",
            "8e03978e-40d5-43dd-bc93-6894a57f932g",
            "8e03978e-40d5-43dd-bc93-6894a57f932-",
        ] {
            let error = uuid.check(&key(other)).unwrap_err();
            assert_eq!(error.kind(), InvalidKeyKind::Format, "{other}");
        }
        let custom = KeyFormat::from_fn(|key| key.starts_with("k-")).clone();
        assert!(custom.check(&key("k-1")).is_ok());
        assert_eq!(
            custom.check(&key("1")).unwrap_err().kind(),
            InvalidKeyKind::Format
        );
        assert_eq!(
            format!("{any:?} {uuid:?}"),
            "KeyFormat::any() KeyFormat::uuid()"
        );
        assert_eq!(format!("{custom:?}"), "KeyFormat::from_fn(..)");
    }

    /// Nodes of two versions take turns under one key.
    #[test]
    fn a_turn_is_a_golden_hash_of_its_key() {
        let encoded = EncodedKey::from_bytes(std::array::from_fn(|byte| byte as u8));
        assert_eq!(
            encoded.turn().to_string(),
            "41b7f4be8bca7d95d8eed0d05aafd24741ffcaf105c92071cd4a1c93ddc6bcf2"
        );
    }

    #[test]
    fn derived_keys_are_uuids_that_differ() {
        let a = key("a");
        let encoded = EncodedKey::from_bytes([7; 32]);
        let all = [
            a.derive("x"),
            a.derive("y"),
            a.derive(""),
            key("ax").derive(""),
            key("b").derive("x"),
            encoded.derive("x"),
            encoded.derive("y"),
            EncodedKey::from_bytes([8; 32]).derive("x"),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(is_uuid(one), "{one}");
            assert_eq!(&one[14..15], "8", "version");
            assert!("89ab".contains(&one[19..20]), "variant");
            assert_eq!(*one, one.to_lowercase());
            assert!(!all[..at].contains(one), "{one}");
        }
        assert_eq!(key("\"a\"").derive("x"), a.derive("x"));
    }

    #[test]
    fn the_domain_separates_a_key_from_an_encoded_key_of_the_same_bytes() {
        let encoded = EncodedKey::from_bytes([b'k'; 32]);
        assert_ne!(key(&"k".repeat(32)).derive("x"), encoded.derive("x"));
    }

    #[test]
    fn encoded_key_text() {
        let key = EncodedKey::from_bytes(std::array::from_fn(|at| at as u8 * 8));
        let text = key.to_string();
        assert!(text.starts_with("00081018"));
        assert_eq!(format!("{key:?}"), text);
        assert_eq!(text.parse(), Ok(key));
        assert_eq!(text.to_uppercase().parse(), Ok(key));
        for other in [
            "",
            &text[1..],
            &format!("{text}0"),
            &text.replace('0', "g"),
            &"é".repeat(32),
        ] {
            let error = other.parse::<EncodedKey>().unwrap_err();
            assert!(!error.to_string().is_empty());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_key_of_the_grammar_or_an_error(
            raw in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            if let Ok(text) = parse(&raw) {
                prop_assert!((1..=255).contains(&text.len()));
                prop_assert!(text.bytes().all(|byte| (0x20..=0x7e).contains(&byte)));
                prop_assert!(!text.starts_with(' ') && !text.ends_with(' '));
            }
        }

        #[test]
        fn near_misses_do_not_panic(raw in r#"["\\;=, a-c1.?:*\t-]{0,24}"#) {
            let _ = parse(&raw);
            let _ = parse(format!("\"a\"{raw}"));
        }

        #[test]
        fn every_text_can_be_quoted_and_quoted_equals_bare(text in "[!-~]([ -~]{0,60}[!-~])?") {
            let quoted = format!("\"{}\"", text.replace('\\', r"\\").replace('"', "\\\""));
            prop_assert_eq!(parse(quoted), Ok(text.clone()));
            if !text.contains(['"', ',']) {
                prop_assert_eq!(parse(&text), Ok(text));
            }
        }

        #[test]
        fn encoded_keys_survive_their_text(bytes: [u8; 32]) {
            let key = EncodedKey::from_bytes(bytes);
            prop_assert_eq!(key.to_string().parse(), Ok(key));
            prop_assert_eq!(key.as_bytes(), &bytes);
        }
    }
}
