//! Placeholder docs, replaced below.
#![forbid(unsafe_code)]

mod codec;
mod config;
mod encoder;
mod engine;
mod env;
mod error;
mod event;
mod key;
mod lock;
mod record;
pub mod storage;

pub use self::{
    codec::{DecodeError, DecodeErrorKind},
    config::{Config, OnStorageError, OnUnreadable, Scope, StoreOn},
    encoder::{
        BasicKeyEncoder, Encoded, Fingerprint, FingerprintFieldsEncoder, FingerprintKeyEncoder,
        KeyEncoder, KeyOnlyEncoder, RequestView,
    },
    engine::{Claim, Completion, Decision, Engine, Progress, Refused, Replay},
    env::{Env, Environment, Spawner},
    error::{BoxError, StorageError, StorageErrorKind},
    event::{Event, Observer, Operation, Refusal, TracingObserver},
    key::{EncodedKey, InvalidKey, InvalidKeyKind, Key, KeyFormat, ParseEncodedKeyError},
    lock::LockPolicy,
    record::{Outcome, Record, StoredResponse, TombstoneReason},
    storage::{AnyStorage, Begin, Entry, Held, NewClaim, Storage, Token, Transaction, Transactional},
};

#[cfg(feature = "conformance")]
pub use self::env::SimulatedClock;
#[cfg(feature = "memory")]
pub use self::storage::memory::{MemoryStorage, MemoryStorageBuilder, WhenFull};
