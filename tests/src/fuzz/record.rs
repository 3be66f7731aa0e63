//! What lies at a storage.

use bytes::Bytes;
use idempotency_axum::Record;

/// Bytes are a record that stays itself, or an error. They are tried as they are, and as metadata and a body behind a head
/// that fits them, past which no fuzzer would guess its way: the first byte tells how long the metadata is.
///
/// # Panics
///
/// Panics if that is not so.
pub fn record(bytes: &[u8]) {
    check(Bytes::copy_from_slice(bytes));
    if let Some((&length, rest)) = bytes.split_first() {
        check(framed(rest, usize::from(length).min(rest.len())));
        // All of it.
        check(framed(rest, rest.len()));
    }
}

fn check(bytes: Bytes) {
    match Record::decode(bytes) {
        Ok(record) => {
            let _ = (record.weight(), format!("{record:?}"));
            let again = Record::decode(record.encode());
            assert_eq!(again.ok().as_ref(), Some(&record));
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// Version, length of the metadata, checksum, the rest.
fn framed(rest: &[u8], metadata: usize) -> Bytes {
    let length = u32::try_from(metadata).expect("a length of a few bytes");
    let head = [&[1], &length.to_be_bytes()[..]].concat();
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&head);
    checksum.update(rest);
    [&head, &checksum.finalize().to_be_bytes()[..], rest]
        .concat()
        .into()
}
