//! The names of the Redis keys.

use std::{
    fmt::{self, Write as _},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use crate::EncodedKey;

/// What all keys of a storage, a lock or a cache begin with; clones share whether they have warned of the default.
#[derive(Clone)]
pub(crate) struct Prefix {
    text: Arc<str>,
    /// What follows in every key, before the encoded key.
    infix: &'static str,
    /// The method that chooses the prefix.
    setter: &'static str,
    /// Whether the log has the warning. `None` where the prefix was chosen.
    is_warned_of: Option<Arc<AtomicBool>>,
}

impl Prefix {
    pub(crate) const DEFAULT: &str = "idempotency";

    /// The default, for keys with this infix. `setter` chooses another.
    pub(crate) fn new(infix: &'static str, setter: &'static str) -> Self {
        Self {
            text: Self::DEFAULT.into(),
            infix,
            setter,
            is_warned_of: Some(Arc::default()),
        }
    }

    pub(crate) fn chosen(self, text: &str) -> Self {
        Self {
            text: text.into(),
            is_warned_of: None,
            ..self
        }
    }

    /// The name of `key`. The first call warns if this is the default.
    pub(super) fn name(&self, key: &EncodedKey) -> String {
        self.warn_if_default();
        let Self { text, infix, .. } = self;
        let mut name = String::with_capacity(text.len() + infix.len() + 64);
        // A `String` takes it all.
        let _ = write!(name, "{text}{infix}{key}");
        name
    }

    fn warn_if_default(&self) {
        let is_new =
            |warned: &Arc<AtomicBool>| !warned.load(Relaxed) && !warned.swap(true, Relaxed);
        if self.is_warned_of.as_ref().is_some_and(is_new) {
            tracing::warn!(
                target: "idempotency",
                prefix = &*self.text,
                setter = self.setter,
                "the keys in Redis begin with the default prefix: two services that share a Redis and keep it share their keys; choose one for each"
            );
        }
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
