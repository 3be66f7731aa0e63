//! The names of the Redis keys.

use std::{
    fmt::{self, Write as _},
    sync::{Arc, Once},
};

use crate::EncodedKey;

/// What all keys of a storage, a lock or a cache begin with.
#[derive(Clone)]
pub(crate) struct Prefix {
    text: Arc<str>,
    /// What follows in every key, before the encoded key.
    infix: &'static str,
    /// The method that chooses the prefix.
    setter: &'static str,
    /// The warning of the default, which clones share. `None` where the prefix was chosen.
    warning: Option<Arc<Once>>,
}

impl Prefix {
    /// The default, for keys with this infix. `setter` chooses another.
    pub(crate) fn new(infix: &'static str, setter: &'static str) -> Self {
        Self {
            text: "idempotency".into(),
            infix,
            setter,
            warning: Some(Arc::new(Once::new())),
        }
    }

    pub(crate) fn chosen(self, text: &str) -> Self {
        Self {
            text: text.into(),
            warning: None,
            ..self
        }
    }

    /// The name of `key`. The first call warns if this is the default.
    pub(super) fn name(&self, key: &EncodedKey) -> String {
        if let Some(warning) = &self.warning {
            warning.call_once(|| {
                tracing::warn!(
                    target: "idempotency",
                    prefix = &*self.text,
                    setter = self.setter,
                    "the keys in Redis begin with the default prefix: two services that share a Redis and keep it share their keys; choose one for each"
                );
            });
        }
        let Self { text, infix, .. } = self;
        let mut name = String::with_capacity(text.len() + infix.len() + 64);
        // A `String` takes it all.
        let _ = write!(name, "{text}{infix}{key}");
        name
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
