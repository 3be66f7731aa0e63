//! What a row says, and whether it is whole.
//!
//! The checksum of a row covers its kind (`c1` a claim, `r1` a record), key, token and, of a claim, fingerprint. A record has a
//! checksum of its own, so `replace` can change it without knowing the token.

use std::time::Duration;

use bytes::Bytes;
use sqlx::{Row as _, postgres::PgRow};

use super::error;
use crate::{EncodedKey, Entry, Fingerprint, NewClaim, Record, StorageError, Token};

/// What was found under a key.
pub(super) fn read(key: &EncodedKey, row: &PgRow) -> Result<Entry, StorageError> {
    let token: Vec<u8> = column(row, "token")?;
    let fingerprint: Option<Vec<u8>> = column(row, "fingerprint")?;
    let record: Option<Vec<u8>> = column(row, "record")?;
    let checksum: i64 = column(row, "checksum")?;
    let Ok(token) = token.try_into().map(Token::from_bytes) else {
        return Err(damaged());
    };
    if let Some(record) = record {
        verify_record(key, token, checksum)?;
        return Ok(Entry::Completed(Record::decode(Bytes::from(record))?));
    }
    let fingerprint = match fingerprint.map(<[u8; 32]>::try_from) {
        None => None,
        Some(Ok(bytes)) => Some(Fingerprint::from_bytes(bytes)),
        Some(Err(_)) => return Err(damaged()),
    };
    if claim_checksum(key, token, fingerprint.as_ref()) != checksum {
        return Err(damaged());
    }
    Ok(Entry::Claimed {
        fingerprint,
        lease_left: Some(milliseconds(column(row, "lease_left")?)),
    })
}

/// Checks the row of a record.
pub(super) fn verify_record(
    key: &EncodedKey,
    token: Token,
    checksum: i64,
) -> Result<(), StorageError> {
    if record_checksum(key, token) == checksum {
        return Ok(());
    }
    Err(damaged())
}

/// The value of a column.
pub(super) fn column<'r, T>(row: &'r PgRow, name: &str) -> Result<T, StorageError>
where
    T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>,
{
    row.try_get(name).map_err(error::decoding)
}

pub(super) fn new_claim_checksum(key: &EncodedKey, claim: &NewClaim) -> i64 {
    claim_checksum(key, claim.token, claim.fingerprint.as_ref())
}

pub(super) fn claim_checksum(
    key: &EncodedKey,
    token: Token,
    fingerprint: Option<&Fingerprint>,
) -> i64 {
    let fingerprint = fingerprint.map_or(&[][..], |print| print.as_bytes());
    checksum([b"c1", key.as_bytes(), token.as_bytes(), fingerprint])
}

pub(super) fn record_checksum(key: &EncodedKey, token: Token) -> i64 {
    checksum([b"r1", key.as_bytes(), token.as_bytes(), &[]])
}

fn checksum(parts: [&[u8]; 4]) -> i64 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    i64::from(hasher.finalize())
}

pub(super) fn milliseconds(number: i64) -> Duration {
    Duration::from_millis(u64::try_from(number).unwrap_or(0))
}

fn damaged() -> StorageError {
    StorageError::unreadable(
        "the checksum of the row does not match: it is damaged, or of a newer version of this library",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Changing it would make every table in use unreadable.
    #[test]
    fn golden() {
        let key = EncodedKey::from_bytes([7; 32]);
        let token = Token::from_bytes(*b"0123456789abcdef");
        let print = Fingerprint::from_bytes([0x5a; 32]);
        let sums = [
            claim_checksum(&key, token, None),
            claim_checksum(&key, token, Some(&print)),
            record_checksum(&key, token),
        ];
        assert_eq!(sums, [3_639_976_154, 401_677_737, 1_927_809_910]);
    }
}
