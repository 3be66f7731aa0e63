//! The hash of a key: [`EncodedKey`], and the length-prefixed fields that hashes are made of. Which fields they are, the
//! [encoders](crate::KeyEncoder) say.

use std::{fmt, str::FromStr};

use sha2::{Digest, Sha256};

/// Names the recipe of [`EncodedKey::derive`]; part of what is hashed.
const DERIVE_FROM_ENCODED: &str = "idempotency/derive-from-encoded-key/1";

/// Names the recipe of [`EncodedKey::turn`]; part of what is hashed.
const TURN: &str = "idempotency/turn/1";

/// Hashes keys and tokens for tables in this process. Seeded for each table, because clients can search for keys that collide under a
/// seed that they know.
pub(crate) type HashKeys = ahash::RandomState;

/// The key under which a storage keeps a record: the SHA-256 that a
/// [`KeyEncoder`](crate::KeyEncoder) makes of the client's key and of what else identifies the
/// operation.
///
/// It is shown as 64 lower-case hex digits, and parsed from 64 of either case.
///
/// ```
/// use idempotency_core::EncodedKey;
///
/// let key = EncodedKey::from_bytes([0xab; 32]);
/// assert_eq!(key.to_string(), "ab".repeat(32));
/// assert_eq!(key.to_string().parse(), Ok(key));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EncodedKey([u8; 32]);

impl EncodedKey {
    /// Wraps 32 bytes. They should be a hash: what a client sends must not reach a storage as it
    /// is, and `Debug` and `Display` show them.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// A key for a call that the handler makes to another service, like [`Key::derive`](crate::Key::derive), but of
    /// everything that the encoder put into this storage key.
    ///
    /// With the encoders of this crate two callers (two scopes) never derive the same result.
    /// On the other hand the result changes when what the encoder covers does: under
    /// [`BasicKeyEncoder`](crate::BasicKeyEncoder) with every byte of the request's body.
    ///
    /// A timestamp in the body is then another charge at every attempt; see
    /// [`FingerprintKeyEncoder`](crate::FingerprintKeyEncoder), which leaves the body out.
    ///
    /// A handler that charges a card and then fails is run again by the retry. It must not charge
    /// again, and need not remember that it did: the provider does, under the derived key.
    ///
    /// ```
    /// use std::collections::HashMap;
    ///
    /// use idempotency_core::EncodedKey;
    ///
    /// /// A provider that takes idempotency keys.
    /// #[derive(Default)]
    /// struct Provider(HashMap<String, u32>);
    ///
    /// impl Provider {
    ///     /// Charges once for each key.
    ///     fn charge(&mut self, key: String, cents: u32) -> u32 {
    ///         *self.0.entry(key).or_insert(cents)
    ///     }
    /// }
    ///
    /// let mut provider = Provider::default();
    /// let mut attempt = |operation: EncodedKey| provider.charge(operation.derive("psp-charge"), 450);
    ///
    /// let alice = EncodedKey::from_bytes([1; 32]);
    /// attempt(alice); // charged, but the answer never reached the client
    /// attempt(alice); // the retry, perhaps in another process
    /// attempt(EncodedKey::from_bytes([2; 32])); // bob, who sent the same client's key
    /// assert_eq!(provider.0.len(), 2);
    ///
    /// // Each kind of call has its own label: a refund must not be taken for the charge.
    /// assert_ne!(alice.derive("psp-charge"), alice.derive("psp-refund"));
    /// ```
    #[must_use]
    pub fn derive(&self, label: &str) -> String {
        derive(DERIVE_FROM_ENCODED, &self.0, label)
    }

    /// What the runs of a manual handler on this key's conflicts claim, one at a time.
    pub(crate) fn turn(&self) -> Self {
        Self(FieldHasher::new(TURN).field(&self.0).finish())
    }
}

shown_as_hex!(EncodedKey);

impl FromStr for EncodedKey {
    type Err = ParseEncodedKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match parse_hex(text) {
            Some(bytes) => Ok(Self(bytes)),
            None => Err(ParseEncodedKeyError { len: text.len() }),
        }
    }
}

/// A text is not an [`EncodedKey`]: it does not consist of 64 hex digits.
///
/// ```
/// use idempotency_core::EncodedKey;
///
/// let error = "order-7".parse::<EncodedKey>().unwrap_err();
/// assert!(error.to_string().contains("7 bytes"));
/// ```
// It does not show the text: a caller who mixes the two up passes the client's key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a storage key has {}: pass what `EncodedKey` displays, not the client's key", match len {
    64 => "hex digits only, and this text has another character".to_owned(),
    _ => format!("64 hex digits, and this text has {len} bytes"),
})]
pub struct ParseEncodedKeyError {
    len: usize,
}

/// SHA-256 over fields, each behind its length, so that no two lists of fields hash the same bytes
/// (`["ab", "c"]` and `["a", "bc"]` would, one after the other).
pub(crate) struct FieldHasher(Sha256);

impl FieldHasher {
    /// `domain` names the recipe and its version. Hashes of different domains can't meet.
    pub(crate) fn new(domain: &str) -> Self {
        Self::new_with(domain, "")
    }

    /// The domain of this name with a suffix.
    pub(crate) fn new_with(domain: &str, suffix: &str) -> Self {
        let len = (domain.len() + suffix.len()) as u64;
        let hash = Sha256::new().chain_update(len.to_be_bytes());
        Self(hash.chain_update(domain).chain_update(suffix))
    }

    /// 8 bytes of length, big-endian, then the bytes.
    pub(crate) fn field(self, bytes: &[u8]) -> Self {
        let len = (bytes.len() as u64).to_be_bytes();
        Self(self.0.chain_update(len).chain_update(bytes))
    }

    /// A byte 0, or a byte 1 and the field: absent is not empty.
    pub(crate) fn optional(mut self, bytes: Option<&[u8]>) -> Self {
        self.0.update([u8::from(bytes.is_some())]);
        match bytes {
            None => self,
            Some(bytes) => self.field(bytes),
        }
    }

    pub(crate) fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// The first 16 bytes of the hash as a UUID of version 8, variant 10 (RFC 9562 §5.8).
pub(super) fn derive(domain: &str, secret: &[u8], label: &str) -> String {
    let hash = FieldHasher::new(domain)
        .field(secret)
        .field(label.as_bytes())
        .finish();
    let first = std::array::from_fn(|at| hash[at]);
    let uuid = uuid::Builder::from_custom_bytes(first).into_uuid();
    uuid.to_string()
}

/// Shows a type that wraps 32 bytes as 64 lower-case hex digits.
macro_rules! shown_as_hex {
    ($type:ty) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut digits = [0; 64];
                hex::encode_to_slice(self.0, &mut digits).map_err(|_| fmt::Error)?;
                f.pad(std::str::from_utf8(&digits).map_err(|_| fmt::Error)?)
            }
        }

        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}
pub(crate) use shown_as_hex;

/// Reads 64 hex digits of either case.
pub(crate) fn parse_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(text, &mut bytes).ok()?;
    Some(bytes)
}
