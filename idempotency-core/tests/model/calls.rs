//! Sequences of calls.

use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use idempotency_core::{
    EncodedKey, Fingerprint, NewClaim, Outcome, Record, StoredResponse, Token, TombstoneReason,
};
use proptest::prelude::*;

/// The `max_bytes` of the storages: room for a large record under each of the keys, and for none that is too large.
pub(crate) const ROOM: usize = 128 << 10;

const KEYS: u8 = 3;
const TOKENS: u8 = 3;

#[derive(Clone, Debug)]
pub(crate) enum Call {
    Begin {
        key: EncodedKey,
        claim: NewClaim,
    },
    Complete {
        key: EncodedKey,
        token: Token,
        content: Content,
        ttl: Duration,
    },
    Renew {
        key: EncodedKey,
        token: Token,
        lease: Duration,
    },
    Release {
        key: EncodedKey,
        token: Token,
        /// Of those who wait, this one leaves before it can learn of the release.
        leaves: Option<usize>,
    },
    Get {
        key: EncodedKey,
    },
    Replace {
        key: EncodedKey,
        content: Content,
        ttl: Duration,
    },
    Remove {
        key: EncodedKey,
    },
    Wait {
        key: EncodedKey,
        timeout: Duration,
    },
    /// One who waits gives up.
    Leave {
        who: Option<usize>,
    },
    Advance {
        by: Duration,
    },
}

/// What a record says. Not the record itself, so that a failure is short to read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content {
    Tombstone,
    Small(u8),
    /// Several fit.
    Large(u8),
    /// Larger than all the room there is.
    TooLarge,
}

impl Content {
    pub(crate) fn record(self) -> Record {
        let (fingerprint, body) = match self {
            Self::Tombstone => {
                return Record {
                    fingerprint: None,
                    outcome: Outcome::Tombstone(TombstoneReason::StreamBroken),
                };
            }
            Self::Small(number) => (None, vec![number; 3]),
            Self::Large(number) => (Some(print(number)), vec![number; 20 << 10]),
            Self::TooLarge => (Some(print(9)), vec![9; ROOM + 1]),
        };
        let mut headers = HeaderMap::new();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        Record {
            fingerprint,
            outcome: Outcome::Response(StoredResponse::new(StatusCode::CREATED, &headers, body)),
        }
    }

    pub(crate) fn is_too_large(self) -> bool {
        matches!(self, Self::TooLarge)
    }
}

impl Call {
    pub(crate) fn begin(
        key: u8,
        token: u8,
        fingerprint: Option<Fingerprint>,
        lease: Duration,
    ) -> Self {
        let claim = NewClaim {
            token: token_of(token),
            fingerprint,
            lease,
        };
        Self::Begin {
            key: key_of(key),
            claim,
        }
    }

    pub(crate) fn complete(key: u8, token: u8, content: Content, ttl: Duration) -> Self {
        Self::Complete {
            key: key_of(key),
            token: token_of(token),
            content,
            ttl,
        }
    }

    /// The key that the call is about.
    pub(crate) fn key(&self) -> Option<&EncodedKey> {
        match self {
            Self::Begin { key, .. }
            | Self::Complete { key, .. }
            | Self::Renew { key, .. }
            | Self::Release { key, .. }
            | Self::Get { key }
            | Self::Replace { key, .. }
            | Self::Remove { key }
            | Self::Wait { key, .. } => Some(key),
            Self::Leave { .. } | Self::Advance { .. } => None,
        }
    }
}

fn key_of(number: u8) -> EncodedKey {
    EncodedKey::from_bytes([number; 32])
}

fn token_of(number: u8) -> Token {
    Token::from_bytes([number; 16])
}

fn print(number: u8) -> Fingerprint {
    Fingerprint::from_bytes([number; 32])
}

pub(crate) fn key() -> impl Strategy<Value = EncodedKey> {
    (0..KEYS).prop_map(key_of)
}

fn token() -> impl Strategy<Value = Token> {
    (0..TOKENS).prop_map(token_of)
}

fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        1 => Just(Content::Tombstone),
        4 => (0..4_u8).prop_map(Content::Small),
        3 => (0..4_u8).prop_map(Content::Large),
        1 => Just(Content::TooLarge),
    ]
}

/// Leases, TTLs, timeouts, and steps of the clock. They are sums of few numbers, so that ends are often met exactly.
fn time() -> impl Strategy<Value = Duration> {
    let second = Duration::from_secs(1);
    let nanosecond = Duration::from_nanos(1);
    prop::sample::select(vec![
        second,
        2 * second,
        second - nanosecond,
        nanosecond,
        Duration::ZERO,
        30 * second,
        60 * second,
    ])
}

/// How long something lives: now and then for ever.
fn life() -> impl Strategy<Value = Duration> {
    prop_oneof![9 => time(), 1 => Just(Duration::MAX)]
}

/// One of those who wait, whoever is that far from the first.
fn waiter() -> impl Strategy<Value = usize> {
    0..4_usize
}

pub(crate) fn any() -> impl Strategy<Value = Vec<Call>> {
    let print = prop::option::of((0..2_u8).prop_map(print));
    let call = prop_oneof![
        6 => (key(), token(), print, life()).prop_map(|(key, token, fingerprint, lease)| {
            let claim = NewClaim { token, fingerprint, lease };
            Call::Begin { key, claim }
        }),
        4 => (key(), token(), content(), life()).prop_map(|(key, token, content, ttl)| {
            Call::Complete { key, token, content, ttl }
        }),
        2 => (key(), token(), life())
            .prop_map(|(key, token, lease)| Call::Renew { key, token, lease }),
        3 => (key(), token(), prop::option::weighted(0.2, waiter()))
            .prop_map(|(key, token, leaves)| Call::Release { key, token, leaves }),
        2 => key().prop_map(|key| Call::Get { key }),
        2 => (key(), content(), life())
            .prop_map(|(key, content, ttl)| Call::Replace { key, content, ttl }),
        1 => key().prop_map(|key| Call::Remove { key }),
        4 => (key(), life()).prop_map(|(key, timeout)| Call::Wait { key, timeout }),
        1 => waiter().prop_map(|who| Call::Leave { who: Some(who) }),
        4 => time().prop_map(|by| Call::Advance { by }),
    ];
    prop::collection::vec(call, 1..60)
}
