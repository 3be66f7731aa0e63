//! The layout of a cache entry: a record, and the token that completed its key.
//!
//! | bytes | what |
//! |---|---|
//! | 1 | version: 1 |
//! | 16 | the token |
//! | 4 | CRC-32 (ISO-HDLC) of the bytes before, big-endian |
//! | … | [`Record::encode`], which has a checksum of its own |

use bytes::{Buf, Bytes};

use crate::{Record, StorageError, Token};

const VERSION: u8 = 1;
const TOKEN_END: usize = 1 + 16;
const HEAD: usize = TOKEN_END + 4;

pub(crate) struct Envelope {
    pub(crate) completed_by: Token,
    pub(crate) record: Record,
}

pub(crate) fn seal(completed_by: Token, record: &Record) -> Bytes {
    let mut head = [VERSION; HEAD];
    head[1..TOKEN_END].copy_from_slice(completed_by.as_bytes());
    let checksum = crc32fast::hash(&head[..TOKEN_END]);
    head[TOKEN_END..].copy_from_slice(&checksum.to_be_bytes());
    record.encode_after(&head).into()
}

/// The record shares `bytes`; nothing is copied.
pub(crate) fn open(bytes: Bytes) -> Result<Envelope, StorageError> {
    let cut = |_| StorageError::unreadable("it is cut off within its first bytes");
    let mut rest = bytes.clone();
    let version = rest.try_get_u8().map_err(cut)?;
    let token = rest.try_get_u128().map_err(cut)?;
    let checksum = rest.try_get_u32().map_err(cut)?;
    if version != VERSION {
        return Err(StorageError::unreadable(
            "it begins with another version than 1: a newer version of this library or another program shares the cache",
        ));
    }
    if crc32fast::hash(&bytes[..TOKEN_END]) != checksum {
        return Err(StorageError::unreadable(
            "the checksum of its first bytes does not match, so it is damaged",
        ));
    }
    Ok(Envelope {
        completed_by: Token::from_bytes(token.to_be_bytes()),
        record: Record::decode(rest)?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::{Outcome, StorageErrorKind, TombstoneReason};

    fn sealed() -> (Token, Record, Bytes) {
        let token = Token::from_bytes(*b"0123456789abcdef");
        let record = Record {
            fingerprint: None,
            outcome: Outcome::Tombstone(TombstoneReason::MaxHold),
        };
        let bytes = seal(token, &record);
        (token, record, bytes)
    }

    /// Changing it would make every cache in use unreadable.
    #[test]
    fn golden() {
        let (_, _, bytes) = sealed();
        assert_eq!(&bytes[..17], b"\x010123456789abcdef");
        assert_eq!(bytes[17..21], [0xca, 0x36, 0x81, 0x98]);
        assert_eq!(&bytes[30..], br#"{"tombstone":"max-hold"}"#);
    }

    #[test]
    fn what_is_not_whole_is_unreadable() {
        let (token, record, bytes) = sealed();
        let opened = open(bytes.clone()).unwrap();
        assert_eq!((opened.completed_by, opened.record), (token, record));

        let is_unreadable = |bytes: Bytes| matches!(open(bytes), Err(error) if error.kind() == StorageErrorKind::Unreadable);
        for len in 0..bytes.len() {
            assert!(is_unreadable(bytes.slice(..len)), "cut off at {len}");
        }
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.to_vec();
                damaged[at] ^= 1 << bit;
                assert!(is_unreadable(damaged.into()), "byte {at} bit {bit}");
            }
        }
    }
}
