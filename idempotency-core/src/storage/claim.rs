//! What passes between the engine and a storage: tokens, claims and what became of them.

use std::{fmt, time::Duration};

use crate::{Env, Fingerprint, Record};

/// Names one claim, and so one execution. Random, so a holder whose claim was taken over can't pass for the new holder.
///
/// ```
/// use idempotency_core::Token;
///
/// let token = Token::random();
/// assert_eq!(Token::from_bytes(*token.as_bytes()), token);
/// assert_ne!(Token::random(), token);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token([u8; 16]);

impl Token {
    /// A fresh token from the randomness of [`Env::system`].
    ///
    /// # Panics
    ///
    /// Panics if the operating system has no source of randomness.
    #[must_use]
    pub fn random() -> Self {
        Self::random_from(&Env::system())
    }

    /// A fresh token from the randomness of `env`.
    #[must_use]
    pub fn random_from(env: &Env) -> Self {
        let mut bytes = [0; 16];
        env.fill_random(&mut bytes);
        Self(bytes)
    }

    /// The token with these bytes, as a storage kept them.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes for a storage to keep.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// 32 hex digits.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({self})")
    }
}

// Not `#[non_exhaustive]`: whoever drives a storage builds claims, and a storage must keep every field.
/// What [`Storage::begin`](crate::Storage::begin) is asked to store where no claim or record is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewClaim {
    /// Names the claim; later calls show it.
    pub token: Token,
    /// What the request was, if the encoder tells requests of one key apart.
    pub fingerprint: Option<Fingerprint>,
    /// How long the claim lives unless it is renewed.
    pub lease: Duration,
}

// Not `#[non_exhaustive]`: storages build it, and a caller that ignores a case runs an operation twice.
/// What [`Storage::begin`](crate::Storage::begin) found.
#[derive(Clone, Debug, PartialEq)]
#[must_use = "only `Acquired` allows the operation to run"]
pub enum Begin {
    /// The claim is stored: run the operation.
    Acquired,
    /// Another claim holds the key.
    InFlight {
        /// Fingerprint of the request that runs.
        fingerprint: Option<Fingerprint>,
        /// What is left of its lease, if the storage knows.
        lease_left: Option<Duration>,
    },
    /// The operation ran before; this is its outcome.
    Completed(Record),
}

// Not `#[non_exhaustive]`: there is no third answer to "is the claim still mine?".
/// Whether a claim was still its holder's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "`Lost` means that the call changed nothing"]
pub enum Held {
    /// It was, and the call took effect.
    Yes,
    /// Another holds or completed the key, or the claim is gone: the call changed nothing.
    Lost,
}

// Not `#[non_exhaustive]`: storages build it.
/// What lies under a key; see [`Storage::get`](crate::Storage::get).
#[derive(Clone, Debug, PartialEq)]
pub enum Entry {
    /// A claim: the operation runs.
    Claimed {
        /// Fingerprint of the request that runs.
        fingerprint: Option<Fingerprint>,
        /// What is left of its lease, if the storage knows.
        lease_left: Option<Duration>,
    },
    /// A record: the operation ran.
    Completed(Record),
}
