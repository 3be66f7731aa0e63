//! What lies under a key: a claim or a record, each with the token of who put it there.
//!
//! | bytes | a claim | a record |
//! |---|---|---|
//! | 2 | `c1` | `r1` |
//! | 16 | the token that holds the key | the token that completed it |
//! | 4 | CRC-32 (ISO-HDLC) of all other bytes, big-endian | CRC-32 of the bytes before, big-endian |
//! | … | the fingerprint, 32 bytes, if there is one | [`Record::encode`], which has a checksum of its own |
//!
//! So a script tells from the first 18 bytes whose the key is, and never copies an answer to find out.

use bytes::Bytes;

use crate::{Entry, Fingerprint, NewClaim, Record, StorageError, Token};

pub(super) const CLAIM: [u8; 2] = *b"c1";
pub(super) const RECORD: [u8; 2] = *b"r1";

/// Kind and token.
const NAME: usize = 2 + 16;
/// Kind, token and checksum.
const HEAD: usize = NAME + 4;

/// What lies under a key.
pub(crate) struct Stored {
    /// Who claimed or completed it.
    pub(crate) token: Token,
    pub(crate) entry: Entry,
}

pub(super) fn claim(claim: &NewClaim) -> Vec<u8> {
    let fingerprint = claim.fingerprint.as_ref().map(Fingerprint::as_bytes);
    let fingerprint = fingerprint.map_or(&[][..], |print| &print[..]);
    [&head(CLAIM, claim.token, fingerprint)[..], fingerprint].concat()
}

pub(super) fn record(completed_by: Token, record: &Record) -> Vec<u8> {
    record.encode_after(&head(RECORD, completed_by, &[]))
}

/// Kind, token, and the checksum of both and `rest`.
fn head(kind: [u8; 2], token: Token, rest: &[u8]) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..2].copy_from_slice(&kind);
    head[2..NAME].copy_from_slice(token.as_bytes());
    let checksum = checksum(&head[..NAME], rest);
    head[NAME..].copy_from_slice(&checksum.to_be_bytes());
    head
}

/// What [`claim`] or [`record`] made; a record is a part of `bytes`, not a copy.
pub(super) fn read(bytes: Bytes) -> Result<Stored, StorageError> {
    let Some((&head, rest)) = bytes.split_first_chunk::<HEAD>() else {
        let cut = "it is cut off within its first bytes";
        return Err(StorageError::unreadable(cut));
    };
    let [k0, k1, token @ .., c0, c1, c2, c3] = head;
    let kind = [k0, k1];
    let covered = match kind {
        CLAIM => rest,
        RECORD => &[],
        _ => return Err(foreign()),
    };
    if checksum(&head[..NAME], covered) != u32::from_be_bytes([c0, c1, c2, c3]) {
        let damaged = "its checksum does not match, so it is damaged or cut";
        return Err(StorageError::unreadable(damaged));
    }
    let entry = if kind == RECORD {
        Entry::Completed(Record::decode(bytes.slice(HEAD..))?)
    } else {
        let fingerprint = match (rest.len(), rest.first_chunk()) {
            (0, _) => None,
            (32, Some(print)) => Some(Fingerprint::from_bytes(*print)),
            _ => return Err(StorageError::unreadable("it is a claim of a wrong length")),
        };
        Entry::Claimed {
            fingerprint,
            lease_left: None,
        }
    };
    Ok(Stored {
        token: Token::from_bytes(token),
        entry,
    })
}

pub(super) fn foreign() -> StorageError {
    StorageError::unreadable(
        "it is neither a claim nor a record of version 1: a newer version of this library or another program uses the prefix",
    )
}

fn checksum(name: &[u8], rest: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(name);
    hasher.update(rest);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use std::time::Duration;

    use super::*;
    use crate::{Outcome, StorageErrorKind, TombstoneReason};

    fn token() -> Token {
        Token::from_bytes(*b"0123456789abcdef")
    }

    fn claims() -> [NewClaim; 2] {
        [None, Some(Fingerprint::from_bytes([0x5a; 32]))].map(|fingerprint| NewClaim {
            token: token(),
            fingerprint,
            lease: Duration::from_secs(30),
        })
    }

    fn tombstone() -> Record {
        Record {
            fingerprint: None,
            outcome: Outcome::Tombstone(TombstoneReason::MaxHold),
        }
    }

    /// Changing it would make every Redis in use unreadable.
    #[test]
    fn golden() {
        let [plain, printed] = claims().map(|new| claim(&new));
        assert_eq!(plain[..18], *b"c10123456789abcdef");
        assert_eq!(plain[18..], [0x50, 0x7d, 0x01, 0xdd]);
        assert_eq!(printed[..18], plain[..18]);
        assert_eq!(printed[18..22], [0xf2, 0x74, 0xc0, 0x97]);
        assert_eq!(printed[22..], [0x5a; 32]);
        let stored = record(token(), &tombstone());
        assert_eq!(stored[..18], *b"r10123456789abcdef");
        assert_eq!(stored[18..22], [0x91, 0x8c, 0xeb, 0x24]);
        assert_eq!(stored[31..], *br#"{"tombstone":"max-hold"}"#);
    }

    #[test]
    fn what_was_written_is_read() {
        for new in claims() {
            let found = read(claim(&new).into()).unwrap();
            assert_eq!(found.token, token());
            let entry = Entry::Claimed {
                fingerprint: new.fingerprint,
                lease_left: None,
            };
            assert_eq!(found.entry, entry);
        }
        let found = read(record(token(), &tombstone()).into()).unwrap();
        assert_eq!(found.token, token());
        assert_eq!(found.entry, Entry::Completed(tombstone()));
    }

    #[test]
    fn what_is_not_whole_is_unreadable() {
        let [plain, printed] = claims().map(|new| claim(&new));
        for whole in [plain, printed, record(token(), &tombstone())] {
            let is_unreadable = |bytes: Vec<u8>| matches!(read(bytes.into()), Err(error) if error.kind() == StorageErrorKind::Unreadable);
            for len in 0..whole.len() {
                assert!(is_unreadable(whole[..len].to_vec()), "cut off at {len}");
            }
            for at in 0..whole.len() {
                for bit in 0..8 {
                    let mut damaged = whole.clone();
                    damaged[at] ^= 1 << bit;
                    assert!(is_unreadable(damaged), "byte {at} bit {bit}");
                }
            }
            assert!(is_unreadable([&whole[..], b"x"].concat()), "longer");
        }
    }
}
