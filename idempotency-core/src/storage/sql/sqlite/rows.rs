//! A row: what it says, and the checksum that tells a whole row from a damaged or a foreign one.

use std::time::Duration;

use bytes::Bytes;
use sqlx::{Row as _, sqlite::SqliteRow};

use crate::{EncodedKey, Entry, Fingerprint, Record, StorageError, Token};

pub(super) const CLAIMED: &str = "claimed";
pub(super) const COMPLETED: &str = "completed";

/// What was found under a key.
pub(super) struct Found {
    /// Who claimed or completed it.
    pub(super) token: Token,
    pub(super) entry: Entry,
}

/// The checksum of a claim's row. `value` is the fingerprint, or nothing.
pub(super) fn claim_checksum(key: &EncodedKey, token: Token, value: &[u8]) -> i64 {
    checksum(key, CLAIMED, token, value)
}

/// The checksum of a record's row. What was encoded has its own.
pub(super) fn record_checksum(key: &EncodedKey, token: Token) -> i64 {
    checksum(key, COMPLETED, token, &[])
}

fn checksum(key: &EncodedKey, state: &str, token: Token, value: &[u8]) -> i64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key.as_bytes());
    hasher.update(state.as_bytes());
    hasher.update(token.as_bytes());
    hasher.update(value);
    hasher.finalize().into()
}

/// Reads `state, token, value, checksum, left`; the last is what is left until the row expires, in milliseconds.
pub(super) fn read(key: &EncodedKey, row: &SqliteRow) -> Result<Found, StorageError> {
    let of_another_type = StorageError::unreadable;
    let state: &str = row.try_get(0).map_err(of_another_type)?;
    let token: &[u8] = row.try_get(1).map_err(of_another_type)?;
    let value: &[u8] = row.try_get(2).map_err(of_another_type)?;
    let checksum: i64 = row.try_get(3).map_err(of_another_type)?;
    let left: i64 = row.try_get(4).map_err(of_another_type)?;

    let Ok(token) = <[u8; 16]>::try_from(token).map(Token::from_bytes) else {
        return Err(unreadable("its token is not of 16 bytes"));
    };
    let expected = match state {
        CLAIMED => claim_checksum(key, token, value),
        COMPLETED => record_checksum(key, token),
        _ => {
            return Err(unreadable(
                "it is neither claimed nor completed: a newer version of this library or another program uses the table",
            ));
        }
    };
    if checksum != expected {
        return Err(unreadable(
            "its checksum does not match: it is damaged, or of another key",
        ));
    }
    let entry = match state {
        CLAIMED => Entry::Claimed {
            fingerprint: fingerprint(value)?,
            lease_left: Some(Duration::from_millis(left.max(0).unsigned_abs())),
        },
        _ => Entry::Completed(Record::decode(Bytes::copy_from_slice(value))?),
    };
    Ok(Found { token, entry })
}

fn fingerprint(value: &[u8]) -> Result<Option<Fingerprint>, StorageError> {
    if value.is_empty() {
        return Ok(None);
    }
    match <[u8; 32]>::try_from(value) {
        Ok(print) => Ok(Some(Fingerprint::from_bytes(print))),
        Err(_) => Err(unreadable("its fingerprint is not of 32 bytes")),
    }
}

fn unreadable(reason: &'static str) -> StorageError {
    StorageError::unreadable(reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changing it would make every file in use unreadable.
    #[test]
    fn golden() {
        let key = EncodedKey::from_bytes([7; 32]);
        let token = Token::from_bytes(*b"0123456789abcdef");
        assert_eq!(claim_checksum(&key, token, &[]), 2_395_624_501);
        assert_eq!(claim_checksum(&key, token, &[0x5a; 32]), 1_464_975_697);
        assert_eq!(record_checksum(&key, token), 3_030_806_700);
    }
}
