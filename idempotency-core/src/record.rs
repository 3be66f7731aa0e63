//! What is kept of a finished operation.

use std::fmt;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use memchr::memchr;

use crate::{codes::codes, encoder::Fingerprint};

mod codec;
pub(crate) mod envelope;
#[cfg(feature = "memory")]
mod packed;

pub use self::codec::{DecodeError, DecodeErrorKind};
#[cfg(feature = "memory")]
pub(crate) use self::packed::Packed;

/// What a storage keeps under a key once its operation is over.
///
/// ```
/// use http::{HeaderMap, StatusCode};
/// use idempotency_core::{Outcome, Record, StoredResponse};
///
/// let response = StoredResponse::new(StatusCode::CREATED, &HeaderMap::new(), "order 7");
/// let record = Record { fingerprint: None, outcome: Outcome::Response(response) };
/// assert_eq!(Record::decode(record.encode())?, record);
/// # Ok::<(), idempotency_core::DecodeError>(())
/// ```
// Not `non_exhaustive`: callers construct it, above all storages and their tests. What a record
// has besides, the codec versions.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// The fingerprint of the request that ran, if its encoder made one.
    pub fingerprint: Option<Fingerprint>,
    /// How it ended.
    pub outcome: Outcome,
}

impl Record {
    pub(crate) fn tombstone(fingerprint: Option<Fingerprint>, reason: TombstoneReason) -> Self {
        Self {
            fingerprint,
            outcome: Outcome::Tombstone(reason),
        }
    }

    /// What is kept of an operation for whose answer there is no room.
    pub(crate) fn without_answer(&self) -> Self {
        let reason = match self.outcome {
            Outcome::Response(_) => TombstoneReason::NoRoom,
            Outcome::Tombstone(reason) => reason,
        };
        Self::tombstone(self.fingerprint, reason)
    }

    /// About how many bytes of heap this record holds: body and headers. For the byte limits of
    /// caches, which add what their own entries cost.
    ///
    /// ```
    /// use http::{HeaderMap, StatusCode};
    /// use idempotency_core::{Outcome, Record, StoredResponse, TombstoneReason};
    ///
    /// let response = StoredResponse::new(StatusCode::OK, &HeaderMap::new(), vec![0; 1000]);
    /// let record = Record { fingerprint: None, outcome: Outcome::Response(response) };
    /// assert!(record.weight() >= 1000);
    ///
    /// let outcome = Outcome::Tombstone(TombstoneReason::ResponseTooLarge);
    /// assert_eq!(Record { fingerprint: None, outcome }.weight(), 0);
    /// ```
    #[must_use]
    pub fn weight(&self) -> usize {
        match &self.outcome {
            Outcome::Response(response) => response.body.len() + response.header_block.len(),
            Outcome::Tombstone(_) => 0,
        }
    }
}

/// How an operation ended.
// Exhaustive: a third ending would change what every storage and every replay has to do, so it
// should break their build.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// With an answer that retries get.
    Response(StoredResponse),
    /// Without one: retries get a conflict, and the handler does not run again.
    Tombstone(TombstoneReason),
}

codes! {
    /// Why a finished operation has no answer to replay.
    ///
    /// `Display` is a sentence for the client of a retry.
    ///
    /// ```
    /// use idempotency_core::TombstoneReason;
    ///
    /// let reason = TombstoneReason::ResponseTooLarge;
    /// assert_eq!(reason.as_str(), "response-too-large");
    /// assert_eq!(reason.to_string(), "the original response was too large to be stored");
    /// ```
    pub enum TombstoneReason {
        /// The answer's body went over the size limit.
        ResponseTooLarge = "response-too-large",
        /// The answer's body ended with an error.
        StreamBroken = "stream-broken",
        /// The answer is a `text/event-stream`, which has no end to wait for.
        EventStream = "event-stream",
        /// The answer has trailers, which are not recorded.
        Trailers = "trailers",
        /// The answer streams and can't be recorded.
        Streaming = "streaming",
        /// The operation held its claim longer than is allowed.
        MaxHold = "max-hold",
        /// The handler panicked, or the service around it failed.
        HandlerFailed = "handler-failed",
        /// There was no memory left for the answer, in this process or in the storage.
        NoRoom = "no-room",
        /// The storage refused the answer again and again, while it answered other calls for the key.
        Unstorable = "unstorable",
    }

    /// A short code for logs and metrics. Records keep it, so it never changes.
    pub fn as_str;
}

impl TombstoneReason {
    pub(crate) fn from_code(code: &str) -> Option<Self> {
        Self::ALL
            .iter()
            .find(|reason| reason.as_str() == code)
            .copied()
    }
}

impl fmt::Display for TombstoneReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ResponseTooLarge => "the original response was too large to be stored",
            Self::StreamBroken => "the original response broke off before its end",
            Self::EventStream => "the original response was an event stream, which is not stored",
            Self::Trailers => "the original response had trailers, which are not stored",
            Self::Streaming => "the original response was a stream that could not be stored",
            Self::MaxHold => "the original request ran for too long, and its outcome is not known",
            Self::HandlerFailed => "the original request failed inside the server",
            Self::NoRoom => "there was no memory left to store the original response",
            Self::Unstorable => "the original response could not be stored",
        })
    }
}

/// An answer as it is kept: status, headers and body.
///
/// The headers lie in one block of bytes, not in a `HeaderMap`, which takes several times the
/// space and an allocation per value. Their order and repeated headers are kept; that a value was
/// marked sensitive is not.
///
/// `Debug` shows sizes and never contents.
///
/// ```
/// use http::{HeaderMap, HeaderValue, StatusCode, header::ETAG};
/// use idempotency_core::StoredResponse;
///
/// let mut headers = HeaderMap::new();
/// headers.insert(ETAG, HeaderValue::from_static("\"1\""));
/// let response = StoredResponse::new(StatusCode::CREATED, &headers, "order 7");
/// assert_eq!(response.status(), StatusCode::CREATED);
/// assert_eq!(response.headers(), headers);
/// assert_eq!(response.body(), "order 7");
/// ```
#[derive(Clone, PartialEq)]
pub struct StoredResponse {
    status: StatusCode,
    /// A line `name:value\n` for each header. No name has a colon, and neither has a line feed.
    header_block: Bytes,
    body: Bytes,
}

impl StoredResponse {
    /// Keeps an answer. Every header is kept: what must not be replayed has to be gone by now.
    #[must_use]
    pub fn new(status: StatusCode, headers: &HeaderMap, body: impl Into<Bytes>) -> Self {
        Self::of_kept(status, headers, |_| true, body)
    }

    /// [`new`](Self::new) with those headers only whose names are to be kept; for the middleware.
    #[doc(hidden)]
    #[must_use]
    pub fn of_kept(
        status: StatusCode,
        headers: &HeaderMap,
        is_kept: impl Fn(&HeaderName) -> bool,
        body: impl Into<Bytes>,
    ) -> Self {
        let kept = || headers.iter().filter(|(name, _)| is_kept(name));
        // At once: a block that grows is copied.
        let len = kept().map(|(name, value)| name.as_str().len() + value.len() + 2);
        let mut block = Vec::with_capacity(len.sum());
        for (name, value) in kept() {
            put_line(&mut block, name.as_str(), value.as_bytes());
        }
        Self::of_block(status, block, body.into())
    }

    /// The headers are lines in `block`, each written by [`put_line`].
    fn of_block(status: StatusCode, mut block: Vec<u8>, body: Bytes) -> Self {
        // A record lives for a day: the spare bytes go back now.
        block.shrink_to_fit();
        Self {
            status,
            header_block: block.into(),
            body,
        }
    }

    /// The status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers, built anew at every call.
    #[must_use]
    pub fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in self.header_lines() {
            // Every line comes out of a `HeaderMap`, so nothing here fails; were it to, a
            // replay with a header less is better than a panic.
            let (Ok(name), Ok(value)) = (
                HeaderName::from_bytes(name.as_bytes()),
                HeaderValue::from_maybe_shared(self.header_block.slice_ref(value)),
            ) else {
                continue;
            };
            let _ = headers.try_append(name, value);
        }
        headers
    }

    /// The body.
    #[must_use]
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// Name and value of every header line, in order.
    pub(crate) fn header_lines(&self) -> impl Iterator<Item = (&str, &[u8])> {
        header_lines(&self.header_block)
    }
}

impl fmt::Debug for StoredResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoredResponse")
            .field("status", &self.status.as_u16())
            .field("headers", &self.header_lines().count())
            .field("body_len", &self.body.len())
            .finish()
    }
}

fn put_line(block: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), b":", value, b"\n"] {
        block.extend_from_slice(part);
    }
}

/// Name and value of the lines that [`put_line`] appended, up to the end or an empty line.
fn header_lines(block: &[u8]) -> impl Iterator<Item = (&str, &[u8])> {
    let mut rest = block;
    std::iter::from_fn(move || {
        let end = memchr(b'\n', rest)?;
        let (line, after) = (&rest[..end], &rest[end + 1..]);
        let colon = memchr(b':', line)?;
        rest = after;
        Some((
            std::str::from_utf8(&line[..colon]).ok()?,
            &line[colon + 1..],
        ))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn headers(lines: &[(&'static str, &[u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(*name, HeaderValue::from_bytes(value).unwrap());
        }
        headers
    }

    #[test]
    fn headers_come_back_in_order_with_repeats_and_opaque_bytes() {
        let given = headers(&[
            ("x-b", b"1"),
            ("x-a", b""),
            ("x-b", b"2"),
            ("x-opaque", b"\x80\xff\t"),
            ("x-b", b"1"),
        ]);
        let response = StoredResponse::new(StatusCode::OK, &given, "");
        let back = response.headers();
        assert_eq!(back, given);
        assert!(back.iter().eq(given.iter()));
        let repeated: Vec<_> = back.get_all("x-b").iter().collect();
        assert_eq!(repeated, ["1", "2", "1"]);
    }

    #[test]
    fn values_of_every_length() {
        for len in [0, 1, 126, 127, 128, 129, 16_383, 16_384, 16_385, 70_000] {
            let value = vec![b'v'; len];
            let given = headers(&[("a", &value), ("b", b"end")]);
            let response = StoredResponse::new(StatusCode::OK, &given, "");
            assert_eq!(response.headers(), given, "{len}");

            // No spare bytes: a record lives for a day.
            let block = Vec::from(response.header_block);
            assert_eq!(block.len(), len + 3 + "b:end\n".len(), "{len}");
            assert_eq!(block.capacity(), block.len(), "{len}");
        }
        let name = "n".repeat(300);
        let mut given = HeaderMap::new();
        given.insert(
            HeaderName::from_bytes(name.as_bytes()).unwrap(),
            HeaderValue::from_static("1"),
        );
        assert_eq!(
            StoredResponse::new(StatusCode::OK, &given, "").headers(),
            given
        );
    }

    #[test]
    fn a_damaged_block_ends_and_does_not_panic() {
        for (block, lines) in [
            (&b"a:b"[..], 0),
            (b"a:b\nc:", 1),
            (b"a:b\nc\nd:e\n", 1),
            (b"a:b\n\nd:e\n", 1),
            (b"a:b\n\xff:c\nd:e\n", 1),
            (b":\n:\n", 2),
            (b"\n", 0),
            (b"", 0),
        ] {
            assert_eq!(header_lines(block).count(), lines, "{block:?}");
        }
    }

    #[test]
    fn weight_counts_body_and_headers() {
        let given = headers(&[("x-a", b"12345")]);
        let response = StoredResponse::new(StatusCode::OK, &given, vec![0; 100]);
        let record = Record {
            fingerprint: None,
            outcome: Outcome::Response(response),
        };
        assert_eq!(record.weight(), 100 + 1 + 3 + 1 + 5);
        let outcome = Outcome::Tombstone(TombstoneReason::MaxHold);
        assert_eq!(
            Record {
                fingerprint: None,
                outcome
            }
            .weight(),
            0
        );
    }

    #[test]
    fn debug_shows_sizes_only() {
        let given = headers(&[("x-sesame", b"sesame"), ("x-sesame", b"sesame")]);
        let response = StoredResponse::new(StatusCode::CREATED, &given, "sesame");
        let record = Record {
            fingerprint: None,
            outcome: Outcome::Response(response),
        };
        let shown = format!("{record:?}");
        assert!(
            shown.contains("status: 201, headers: 2, body_len: 6"),
            "{shown}"
        );
        assert!(!shown.contains("sesame"), "{shown}");
    }

    #[test]
    fn codes_are_distinct_and_found_again() {
        for (at, reason) in TombstoneReason::ALL.iter().copied().enumerate() {
            assert_eq!(TombstoneReason::from_code(reason.as_str()), Some(reason));
            assert!(
                reason
                    .as_str()
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
            );
            assert!(!reason.to_string().is_empty());
            // A variant that is missing in `ALL` shifts the rest.
            assert_eq!(reason as usize, at);
        }
        assert_eq!(
            TombstoneReason::ALL.len(),
            TombstoneReason::Unstorable as usize + 1
        );
        assert_eq!(TombstoneReason::from_code("no-such-reason"), None);
    }
}
