//! A record in as little memory as possible, for the storages of this process.

use bytes::Bytes;
use http::StatusCode;

use super::{Outcome, Record, StoredResponse, TombstoneReason, header_lines};
use crate::encoder::Fingerprint;

/// A copy of a record that holds on to no memory but its own: headers and body lie in one block.
///
/// `Bytes` doesn't tell whether it is a part of something larger (`Bytes::is_unique` tells who shares it, not how large it is),
/// and a body often is: of the buffer that it was read into. So everything is copied.
#[derive(Clone)]
pub(crate) struct Packed {
    fingerprint: Option<Fingerprint>,
    ending: Ending,
    /// The header block, an empty line, the body. Empty for a tombstone.
    block: Bytes,
}

#[derive(Clone, Copy)]
enum Ending {
    Response(StatusCode),
    Tombstone(TombstoneReason),
}

impl Packed {
    pub(crate) fn of(record: &Record) -> Self {
        let (ending, block) = match &record.outcome {
            Outcome::Response(response) => {
                let parts = [&response.header_block[..], b"\n", &response.body];
                (Ending::Response(response.status), parts.concat().into())
            }
            Outcome::Tombstone(reason) => (Ending::Tombstone(*reason), Bytes::new()),
        };
        Self {
            fingerprint: record.fingerprint,
            ending,
            block,
        }
    }

    /// The record. Its headers and its body share the memory of this one.
    pub(crate) fn record(&self) -> Record {
        let outcome = match self.ending {
            Ending::Response(status) => {
                let lines = header_lines(&self.block);
                let len: usize = lines
                    .map(|(name, value)| name.len() + value.len() + 2)
                    .sum();
                Outcome::Response(StoredResponse {
                    status,
                    header_block: self.block.slice(..len),
                    body: self.block.slice(len + 1..),
                })
            }
            Ending::Tombstone(reason) => Outcome::Tombstone(reason),
        };
        Record {
            fingerprint: self.fingerprint,
            outcome,
        }
    }

    /// [`Record::weight`].
    pub(crate) fn weight(&self) -> usize {
        // Without the empty line.
        self.block.len().saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderValue};

    use super::*;

    #[test]
    fn a_packed_record_is_the_same_record() {
        let mut headers = HeaderMap::new();
        let answer = |headers: &HeaderMap, body: &'static [u8]| {
            Outcome::Response(StoredResponse::new(StatusCode::CREATED, headers, body))
        };
        let mut outcomes = vec![
            Outcome::Tombstone(TombstoneReason::NoRoom),
            answer(&headers, b""),
            answer(&headers, b"\x05body"),
        ];
        for len in [1, 130, 20_000] {
            headers.append("x-a", HeaderValue::from_static("1"));
            headers.append("x-b", HeaderValue::from_bytes(&vec![b'v'; len]).unwrap());
            outcomes.extend([answer(&headers, b""), answer(&headers, b"body")]);
        }
        for outcome in outcomes {
            for fingerprint in [None, Some(Fingerprint::from_bytes([7; 32]))] {
                let outcome = outcome.clone();
                let record = Record {
                    fingerprint,
                    outcome,
                };
                let packed = Packed::of(&record);
                assert_eq!(packed.record(), record);
                assert_eq!(packed.weight(), record.weight());
            }
        }
    }
}
