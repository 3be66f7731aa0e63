//! What must hold for any bytes: the bodies of the fuzz targets, and the corpus that they have gathered.
//!
//! The fuzzer calls these with bytes of its own making, `tests/tests/corpus.rs` with those that are checked in.

mod key;
mod record;
mod request;
mod settings;

pub use self::{key::key, record::record, request::request, settings::settings};

/// What must hold for any bytes.
pub type Target = fn(&[u8]);

/// Each target by the name of its corpus.
pub const TARGETS: [(&str, Target); 4] = [
    ("key", key),
    ("record", record),
    ("request", request),
    ("settings", settings),
];
