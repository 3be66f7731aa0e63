//! The prefix of all Redis keys of a storage.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

/// The prefix; clones share whether they have warned of the default.
#[derive(Clone)]
pub(crate) struct Prefix {
    text: Arc<str>,
    /// Whether the log has the warning. `None` where the prefix was chosen.
    is_warned_of: Option<Arc<AtomicBool>>,
}

impl Prefix {
    pub(crate) const DEFAULT: &str = "idempotency";

    pub(crate) fn chosen(text: &str) -> Self {
        Self {
            text: text.into(),
            is_warned_of: None,
        }
    }

    /// Warns, once, if this is the default, which `setter` changes. Called when the prefix can't change any more.
    pub(crate) fn warn_if_default(&self, setter: &'static str) {
        let is_new =
            |warned: &Arc<AtomicBool>| !warned.load(Relaxed) && !warned.swap(true, Relaxed);
        if self.is_warned_of.as_ref().is_some_and(is_new) {
            tracing::warn!(
                target: "idempotency",
                prefix = &*self.text,
                setter,
                "the keys in Redis begin with the default prefix: two services that share a Redis and keep it share their keys; choose one for each"
            );
        }
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self {
            is_warned_of: Some(Arc::default()),
            ..Self::chosen(Self::DEFAULT)
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
