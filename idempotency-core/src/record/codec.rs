//! The binary form of a [`Record`], for storages outside this process.
//!
//! The metadata is JSON, so that it can be read in `redis-cli` and can grow. The body stands behind
//! it as it is, so that decoding does not copy it. The checksum is there because a replay must be
//! the answer that was given, or none: storages get cut, overwritten and shared with strangers.

use std::borrow::Cow;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::{Buf, Bytes};
use http::{HeaderName, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::error::Category;

use crate::{
    BoxError,
    encoder::Fingerprint,
    key::parse_hex,
    record::{Outcome, Record, StoredResponse, TombstoneReason, put_line},
};

/// So many headers a `HeaderMap` can hold, whatever their names are.
const FEW: usize = 10_000;

// Raise it when an older reader would misread what a newer one writes. A member added to the
// metadata that older readers may ignore does not need it.
const VERSION: u8 = 1;

/// Version, length of the metadata, checksum.
const HEAD: usize = 1 + 4 + 4;

const LENGTH: std::ops::Range<usize> = 1..5;
const CHECKSUM: std::ops::Range<usize> = 5..9;

impl Record {
    /// The record as bytes, for [`decode`](Record::decode).
    ///
    /// | bytes | what |
    /// |---|---|
    /// | 1 | version: 1 |
    /// | 4 | length of the metadata, big-endian |
    /// | 4 | CRC-32 (ISO-HDLC) of all other bytes, big-endian |
    /// | … | metadata: JSON |
    /// | … | the body, as it is |
    ///
    /// The metadata is an object with `fingerprint` (hex; left out when there is none) and either
    /// `status` and `headers`, or `tombstone` ([`TombstoneReason::as_str`]). `headers` is a list of
    /// `[name, value]`, the value a string if it is visible ASCII, else `{"base64": …}`; it is left
    /// out when empty.
    ///
    /// ```
    /// use idempotency_core::{Outcome, Record, TombstoneReason};
    ///
    /// let outcome = Outcome::Tombstone(TombstoneReason::MaxHold);
    /// let bytes = Record { fingerprint: None, outcome }.encode();
    /// assert_eq!(bytes[0], 1);
    /// assert_eq!(&bytes[9..], br#"{"tombstone":"max-hold"}"#);
    /// ```
    #[must_use]
    pub fn encode(&self) -> Bytes {
        self.encode_after(&[]).into()
    }

    /// [`encode`](Self::encode), with `prefix` before it.
    pub(crate) fn encode_after(&self, prefix: &[u8]) -> Vec<u8> {
        let fingerprint = self.fingerprint.map(|print| print.to_string());
        let (metadata, body) = Metadata::of(&self.outcome, fingerprint.as_deref());
        let start = prefix.len();
        let mut bytes = Vec::with_capacity(start + HEAD + 64 + 2 * self.weight());
        bytes.extend_from_slice(prefix);
        bytes.extend_from_slice(&[VERSION, 0, 0, 0, 0, 0, 0, 0, 0]);
        // Neither can fail: there is no map with other than string keys, and no header block of
        // 4 GiB. Were they to, the bytes would decode to an error, which is the safe side.
        let _ = serde_json::to_writer(&mut bytes, &metadata);
        let len = u32::try_from(bytes.len() - start - HEAD).unwrap_or(u32::MAX);
        bytes.extend_from_slice(body);
        let record = &mut bytes[start..];
        record[LENGTH].copy_from_slice(&len.to_be_bytes());
        let checksum = checksum(record);
        record[CHECKSUM].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    /// The record that [`encode`](Record::encode) made these bytes of.
    ///
    /// Its body is a part of `bytes`, not a copy: it keeps all of them in memory.
    ///
    /// # Errors
    ///
    /// [`DecodeError`] when the bytes are not a whole and undamaged record of a known version. Any
    /// bytes are safe to pass.
    ///
    /// ```
    /// use bytes::Bytes;
    /// use idempotency_core::{DecodeErrorKind, Record};
    ///
    /// let error = Record::decode(Bytes::from_static(b"pickled")).unwrap_err();
    /// assert_eq!(error.kind(), DecodeErrorKind::UnknownVersion);
    /// ```
    pub fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        let cut = |_| DecodeError::truncated("it is cut off within its first bytes");
        let mut rest = &bytes[..];
        let version = rest.try_get_u8().map_err(cut)?;
        if version != VERSION {
            let what =
                format!("it begins with version {version}, and this library reads {VERSION}");
            return Err(DecodeError::new(DecodeErrorKind::UnknownVersion, what));
        }
        let len = rest.try_get_u32().map_err(cut)? as usize;
        let expected = rest.try_get_u32().map_err(cut)?;
        let Some(metadata) = rest.get(..len) else {
            return Err(DecodeError::truncated("it is cut off within its metadata"));
        };
        // Before the metadata is looked at: what the checksum passes was written by an encoder,
        // unless someone forged it, and then the parser bears that too.
        if checksum(&bytes) != expected {
            let what = "its checksum does not match, so it is damaged or cut";
            return Err(DecodeError::new(DecodeErrorKind::Checksum, what));
        }
        let metadata: Metadata<'_> = serde_json::from_slice(metadata).map_err(|error| {
            DecodeError::malformed("its metadata is not the JSON it should be")
                .because(JsonError(error.classify(), error.column()))
        })?;
        metadata.into_record(bytes.slice(HEAD + len..), len)
    }
}

/// CRC-32 of all but the checksum itself. `bytes` has a head.
fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[..CHECKSUM.start]);
    hasher.update(&bytes[CHECKSUM.end..]);
    hasher.finalize()
}

// Names and codes are never escaped in JSON, so they are borrowed as they are.
#[derive(Default, Serialize, Deserialize)]
struct Metadata<'a> {
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    fingerprint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    headers: Vec<(&'a str, Value<'a>)>,
    #[serde(borrow, skip_serializing_if = "Option::is_none")]
    tombstone: Option<&'a str>,
}

/// A header's value. JSON strings are UTF-8 and header values are bytes.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Value<'a> {
    Text(#[serde(borrow)] Cow<'a, str>),
    Opaque {
        #[serde(borrow)]
        base64: Cow<'a, str>,
    },
}

impl<'a> Metadata<'a> {
    fn of(outcome: &'a Outcome, fingerprint: Option<&'a str>) -> (Self, &'a [u8]) {
        let mut metadata = Self {
            fingerprint,
            ..Self::default()
        };
        match outcome {
            Outcome::Response(response) => {
                metadata.status = Some(response.status().as_u16());
                metadata.headers = response
                    .header_lines()
                    .map(|(name, value)| (name, Value::of(value)))
                    .collect();
                (metadata, response.body())
            }
            Outcome::Tombstone(reason) => {
                metadata.tombstone = Some(reason.as_str());
                (metadata, &[])
            }
        }
    }

    /// The headers, without the JSON around them, take up to `size` bytes.
    fn into_record(self, body: Bytes, size: usize) -> Result<Record, DecodeError> {
        let parse = |hex| match parse_hex(hex) {
            Some(bytes) => Ok(Fingerprint::from_bytes(bytes)),
            None => Err(DecodeError::malformed(
                "its fingerprint is not 64 hex digits",
            )),
        };
        let fingerprint = self.fingerprint.map(parse).transpose()?;
        let outcome = match (self.status, self.tombstone) {
            (Some(status), None) => {
                let status = StatusCode::from_u16(status).map_err(|error| {
                    DecodeError::malformed("its status is not one of HTTP").because(error)
                })?;
                let mut block = Vec::with_capacity(size);
                for (name, value) in &self.headers {
                    put_header(&mut block, name, value)?;
                }
                let response = StoredResponse::of_block(status, block, body);
                let lines = self.headers.len();
                if lines > FEW && response.headers().len() < lines {
                    return Err(DecodeError::malformed("it has too many headers"));
                }
                Outcome::Response(response)
            }
            (None, Some(code)) if body.is_empty() && self.headers.is_empty() => {
                // A reason is added by a newer version of this crate.
                Outcome::Tombstone(TombstoneReason::from_code(code).ok_or(DecodeError::new(
                    DecodeErrorKind::UnknownVersion,
                    "it is a tombstone with a reason that this library does not know",
                ))?)
            }
            _ => {
                let what = "it is neither a response nor a tombstone";
                return Err(DecodeError::malformed(what));
            }
        };
        Ok(Record {
            fingerprint,
            outcome,
        })
    }
}

impl<'a> Value<'a> {
    fn of(bytes: &'a [u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) if text.bytes().all(|byte| matches!(byte, b'\t' | 0x20..=0x7e)) => {
                Self::Text(Cow::Borrowed(text))
            }
            _ => Self::Opaque {
                base64: Cow::Owned(BASE64.encode(bytes)),
            },
        }
    }
}

/// Appends a header, if a `HeaderMap` may have it.
fn put_header(block: &mut Vec<u8>, name: &str, value: &Value<'_>) -> Result<(), DecodeError> {
    let name = HeaderName::from_bytes(name.as_bytes())
        .map_err(|error| DecodeError::malformed("it has an invalid header name").because(error))?;
    let value = match value {
        Value::Text(text) => Cow::Borrowed(text.as_bytes()),
        // Without its source, which shows a byte of the value.
        Value::Opaque { base64 } => Cow::Owned(
            BASE64
                .decode(&**base64)
                .map_err(|_| DecodeError::malformed("it has a header value that is not base64"))?,
        ),
    };
    let is_valid = |byte: &u8| matches!(byte, b'\t' | 0x20..=0x7e | 0x80..);
    if !value.iter().all(is_valid) {
        return Err(DecodeError::malformed("it has an invalid header value"));
    }
    put_line(block, name.as_str(), &value);
    Ok(())
}

/// Bytes from a storage are not a [`Record`] that this version can read.
///
/// `Display` says what is wrong with them and what to do; neither it nor a source shows contents.
#[derive(Debug, thiserror::Error)]
#[error("the stored record can't be read: {what}; {}", match kind {
    DecodeErrorKind::UnknownVersion => {
        "if a newer version of this library shares the storage, upgrade this one; if another program does, give each its own prefix; \
         else remove the key"
    }
    _ => "remove the key, or wait until it expires",
})]
pub struct DecodeError {
    kind: DecodeErrorKind,
    what: Cow<'static, str>,
    source: Option<BoxError>,
}

impl DecodeError {
    fn new(kind: DecodeErrorKind, what: impl Into<Cow<'static, str>>) -> Self {
        Self {
            kind,
            what: what.into(),
            source: None,
        }
    }

    fn truncated(what: &'static str) -> Self {
        Self::new(DecodeErrorKind::Truncated, what)
    }

    fn malformed(what: &'static str) -> Self {
        Self::new(DecodeErrorKind::Malformed, what)
    }

    fn because(mut self, source: impl Into<BoxError>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What is wrong, for programs.
    #[must_use]
    pub fn kind(&self) -> DecodeErrorKind {
        self.kind
    }
}

/// The kinds of [`DecodeError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DecodeErrorKind {
    /// The bytes end within their head or their metadata. (A body that is cut shows in the
    /// checksum.)
    Truncated,
    /// Written by a newer version of this crate, or by something else.
    UnknownVersion,
    /// Damaged: the checksum does not match.
    Checksum,
    /// The checksum matches, and the contents are not a record all the same.
    Malformed,
}

/// What may be shown of a `serde_json::Error`: its own text quotes the value it stumbled over,
/// which can be a cookie.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} error at column {1}")]
struct JsonError(Category, usize);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::error::Error;

    use http::{HeaderMap, HeaderValue};
    use proptest::prelude::*;

    use super::*;

    fn response(status: u16, headers: &[(&str, &[u8])], body: &'static [u8]) -> Outcome {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(
                HeaderName::from_bytes(name.as_bytes()).unwrap(),
                HeaderValue::from_bytes(value).unwrap(),
            );
        }
        let status = StatusCode::from_u16(status).unwrap();
        Outcome::Response(StoredResponse::new(status, &map, body))
    }

    fn samples() -> Vec<Record> {
        let print = Some(Fingerprint::from_bytes([0x5a; 32]));
        let lines: &[(&str, &[u8])] = &[
            ("content-type", b"application/json"),
            ("x-twice", b"1"),
            ("etag", b"\"a\\b\""),
            ("x-twice", b"2"),
            ("x-opaque", b"\x80\xffz\t"),
            ("x-empty", b""),
        ];
        vec![
            Record {
                fingerprint: None,
                outcome: response(200, &[], b""),
            },
            Record {
                fingerprint: print,
                outcome: response(201, lines, b"{\"id\":7}\0\xff"),
            },
            Record {
                fingerprint: print,
                outcome: Outcome::Tombstone(TombstoneReason::ResponseTooLarge),
            },
        ]
    }

    /// Bytes with a right head around any metadata and body.
    fn forge(metadata: &str, body: &[u8]) -> Bytes {
        let len = u32::try_from(metadata.len()).unwrap();
        let mut bytes = vec![VERSION];
        bytes.extend(len.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(metadata.as_bytes());
        bytes.extend(body);
        let sum = checksum(&bytes);
        bytes[CHECKSUM].copy_from_slice(&sum.to_be_bytes());
        bytes.into()
    }

    fn kind_of(bytes: impl Into<Bytes>) -> DecodeErrorKind {
        Record::decode(bytes.into()).unwrap_err().kind()
    }

    #[test]
    fn samples_come_back() {
        for record in samples() {
            assert_eq!(Record::decode(record.encode()).unwrap(), record);
        }
    }

    #[test]
    fn every_tombstone_reason_comes_back() {
        for code in [
            "response-too-large",
            "stream-broken",
            "event-stream",
            "trailers",
            "streaming",
        ]
        .into_iter()
        .chain(["max-hold", "handler-failed"])
        {
            let outcome = Outcome::Tombstone(TombstoneReason::from_code(code).unwrap());
            let record = Record {
                fingerprint: None,
                outcome,
            };
            assert_eq!(Record::decode(record.encode()).unwrap(), record);
        }
    }

    #[test]
    fn the_body_is_not_copied() {
        let bytes = samples()[1].encode();
        let Outcome::Response(response) = Record::decode(bytes.clone()).unwrap().outcome else {
            panic!("a response went in");
        };
        assert!(bytes.as_ptr_range().contains(&response.body().as_ptr()));
    }

    #[test]
    fn every_truncation_and_extension_is_an_error() {
        for record in samples() {
            let bytes = record.encode();
            for len in 0..bytes.len() {
                let kind = kind_of(bytes.slice(..len));
                let truncated = kind == DecodeErrorKind::Truncated;
                assert!(
                    truncated || kind == DecodeErrorKind::Checksum,
                    "{len}: {kind:?}"
                );
                assert!(truncated || len >= HEAD, "{len}: {kind:?}");
            }
            for byte in 0..=u8::MAX {
                let longer = [&bytes[..], &[byte]].concat();
                assert_eq!(kind_of(longer), DecodeErrorKind::Checksum);
            }
        }
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        for record in samples() {
            let bytes = record.encode();
            for at in 0..bytes.len() {
                for bit in 0..8 {
                    let mut damaged = bytes.to_vec();
                    damaged[at] ^= 1 << bit;
                    let wanted: &[DecodeErrorKind] = match at {
                        0 => &[DecodeErrorKind::UnknownVersion],
                        1..5 => &[DecodeErrorKind::Truncated, DecodeErrorKind::Checksum],
                        _ => &[DecodeErrorKind::Checksum],
                    };
                    let kind = kind_of(damaged);
                    assert!(wanted.contains(&kind), "byte {at} bit {bit}: {kind:?}");
                }
            }
        }
    }

    #[test]
    fn a_length_beyond_the_input_allocates_nothing() {
        let bytes = [&[VERSION][..], &[0xff; 4], &[0; 4], b"{}"].concat();
        assert_eq!(kind_of(bytes), DecodeErrorKind::Truncated);
    }

    #[test]
    fn forged_metadata() {
        let hex = "ab".repeat(32);
        for good in [
            r#"{"status":200}"#.to_owned(),
            r#"{"tombstone":"max-hold"}"#.to_owned(),
            format!(r#"{{"fingerprint":"{hex}","status":200,"headers":[["a","b"]]}}"#),
            r#"{"fingerprint":null,"status":200,"headers":[["a",{"base64":"Yg=="}]]}"#.to_owned(),
            r#"{"status":200,"of_a_later_version":[1]}"#.to_owned(),
        ] {
            assert!(Record::decode(forge(&good, b"")).is_ok(), "{good}");
        }
        for bad in [
            "",
            "null",
            "[]",
            "{}",
            "{",
            "{\"status\":200",
            r#"{"status":200}x"#,
            r#"{"status":200,"tombstone":"max-hold"}"#,
            r#"{"status":200,"status":200}"#,
            r#"{"status":99}"#,
            r#"{"status":1000}"#,
            r#"{"status":65536}"#,
            r#"{"status":-1}"#,
            r#"{"status":"200"}"#,
            r#"{"status":200,"fingerprint":"ab"}"#,
            r#"{"status":200,"headers":[["a"]]}"#,
            r#"{"status":200,"headers":[["","b"]]}"#,
            r#"{"status":200,"headers":[["a b","c"]]}"#,
            r#"{"status":200,"headers":[["a","b\n"]]}"#,
            r#"{"status":200,"headers":[["a",{"base64":"!!"}]]}"#,
            r#"{"status":200,"headers":[["a",{"base64":"Cg=="}]]}"#,
            r#"{"status":200,"headers":[["a",{"hex":"62"}]]}"#,
            r#"{"status":200,"headers":[["a",1]]}"#,
            r#"{"headers":[],"tombstone":1}"#,
            r#"{"headers":[["a","b"]],"tombstone":"max-hold"}"#,
        ] {
            assert_eq!(
                kind_of(forge(bad, b"")),
                DecodeErrorKind::Malformed,
                "{bad}"
            );
        }
        let with_body = forge(r#"{"tombstone":"max-hold"}"#, b"x");
        assert_eq!(kind_of(with_body), DecodeErrorKind::Malformed);
        let newer = forge(r#"{"tombstone":"of-a-later-version"}"#, b"");
        assert_eq!(kind_of(newer), DecodeErrorKind::UnknownVersion);
    }

    #[test]
    fn deep_and_long_metadata_is_an_error() {
        let deep = format!("{{\"x\":{}", "[".repeat(100_000));
        assert_eq!(kind_of(forge(&deep, b"")), DecodeErrorKind::Malformed);

        // More names than a `HeaderMap` can hold.
        let names: Vec<_> = (0..40_000).map(|at| format!("[\"h{at}\",\"\"]")).collect();
        let long = format!("{{\"status\":200,\"headers\":[{}]}}", names.join(","));
        assert_eq!(kind_of(forge(&long, b"")), DecodeErrorKind::Malformed);
    }

    #[test]
    fn errors_show_no_contents_and_keep_their_source() {
        for metadata in [
            r#"{"status":"sesame"}"#,
            r#"{"tombstone":"sesame"}"#,
            r#"{"status":200,"fingerprint":"sesame"}"#,
            r#"{"status":200,"headers":[["sesame sesame","b"]]}"#,
            r#"{"status":200,"headers":[["a","sesame\n"]]}"#,
            r#"{"status":200,"headers":[["a",{"base64":"sesame!"}]]}"#,
            r#"{"sesame""#,
        ] {
            let error = Record::decode(forge(metadata, b"sesame")).unwrap_err();
            let mut shown = format!("{error} {error:?}");
            if let Some(source) = error.source() {
                shown += &format!(" {source}");
            }
            assert!(!shown.contains("sesame"), "{shown}");
        }
        let error = Record::decode(forge(r#"{"status":"200"}"#, b"")).unwrap_err();
        assert!(
            error.source().unwrap().to_string().contains("column"),
            "{error:?}"
        );
        assert!(error.to_string().contains("remove the key"), "{error}");
        let error = Record::decode(Bytes::from_static(b"\x02")).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
        assert!(error.to_string().contains("upgrade"), "{error}");
    }

    fn header_value() -> impl Strategy<Value = HeaderValue> {
        let byte = prop_oneof![
            3 => 0x20..=0x7e_u8,
            1 => 0x80..=0xff_u8,
            1 => Just(b'\t'),
        ];
        prop_oneof![
            "[ -~]{0,40}".prop_map(String::into_bytes),
            prop::collection::vec(byte, 0..40)
        ]
        .prop_map(|bytes| HeaderValue::from_bytes(&bytes).unwrap())
    }

    fn record() -> impl Strategy<Value = Record> {
        let lines =
            prop::collection::vec(("[a-c]{1,2}|[a-z][a-z0-9-]{0,20}", header_value()), 0..12);
        let body = prop::collection::vec(any::<u8>(), 0..200);
        let response = (100..=999_u16, lines, body).prop_map(|(status, lines, body)| {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), value);
            }
            let status = StatusCode::from_u16(status).unwrap();
            Outcome::Response(StoredResponse::new(status, &headers, body))
        });
        let tombstone = prop::sample::select(vec![
            Outcome::Tombstone(TombstoneReason::MaxHold),
            Outcome::Tombstone(TombstoneReason::HandlerFailed),
        ]);
        (
            any::<Option<[u8; 32]>>(),
            prop_oneof![4 => response, 1 => tombstone],
        )
            .prop_map(|(print, outcome)| Record {
                fingerprint: print.map(Fingerprint::from_bytes),
                outcome,
            })
    }

    proptest! {
        #[test]
        fn any_record_comes_back(record in record()) {
            let back = Record::decode(record.encode()).unwrap();
            prop_assert_eq!(&back, &record);
            prop_assert_eq!(back.encode(), record.encode());
            if let (Outcome::Response(back), Outcome::Response(given)) =
                (&back.outcome, &record.outcome)
            {
                prop_assert_eq!(back.headers(), given.headers());
            }
        }

        #[test]
        fn garbage_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Record::decode(bytes.into()).is_err());
        }

        #[test]
        fn garbage_behind_a_right_head_does_not_panic(
            metadata in r#"[{}\[\]",:a-z0-9\\ ]{0,60}"#,
            body in prop::collection::vec(any::<u8>(), 0..20),
        ) {
            let _ = Record::decode(forge(&metadata, &body));
        }

        #[test]
        fn a_damaged_record_is_an_error(
            record in record(),
            at in any::<prop::sample::Index>(),
            damage in 1..=u8::MAX,
        ) {
            let mut bytes = record.encode().to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= damage;
            prop_assert!(Record::decode(bytes.into()).is_err());
        }
    }
}
