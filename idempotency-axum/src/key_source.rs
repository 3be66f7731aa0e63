//! Where the key of a request is found: in a header, or by a function that looks at head and body.

use std::{fmt, sync::Arc};

use http::{HeaderMap, HeaderName, request::Parts};
use idempotency_core::{Config, InvalidKey, Key};

/// Where the key of a request is.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum KeySource {
    /// In the header that the configuration names.
    #[default]
    Configured,
    Header(HeaderName),
    Fn(KeyFn),
}

impl KeySource {
    /// The key, if headers have it: `None` if the body must be read first.
    pub(crate) fn in_headers(
        &self,
        headers: &HeaderMap,
        config: &Config,
    ) -> Option<Result<Option<Key>, InvalidKey>> {
        let header = match self {
            Self::Configured => &config.header,
            Self::Header(header) => header,
            Self::Fn(_) => return None,
        };
        let key = Key::from_headers(headers, header);
        Some(key.and_then(|key| checked(key, config)))
    }

    /// The key of a request whose body is read.
    pub(crate) fn find(
        &self,
        parts: &Parts,
        body: &[u8],
        config: &Config,
    ) -> Result<Option<Key>, InvalidKey> {
        if let Some(key) = self.in_headers(&parts.headers, config) {
            return key;
        }
        let key = match self {
            Self::Fn(KeyFn(find)) => find(parts, body),
            Self::Configured | Self::Header(_) => None,
        };
        let key = key.map(|key| key.parse()).transpose()?;
        checked(key, config)
    }
}

fn checked(key: Option<Key>, config: &Config) -> Result<Option<Key>, InvalidKey> {
    if let Some(key) = &key {
        config.key_format.check(key)?;
    }
    Ok(key)
}

/// Finds the key in a request's head and body.
#[derive(Clone)]
pub(crate) struct KeyFn(pub(crate) Arc<FindKey>);

pub(crate) type FindKey = dyn Fn(&Parts, &[u8]) -> Option<String> + Send + Sync;

/// Functions are equal only to themselves: to compare the addresses of `fn`s is not reliable.
impl PartialEq for KeyFn {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for KeyFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fn")
    }
}
