//! Whose key it is.

use std::{fmt, sync::Arc};

use http::{HeaderMap, HeaderName, header, request::Parts};

/// What in a request says whose key it is. The same key under another scope is another operation, so nobody is shown a
/// stranger's answer.
///
/// The scope enters the storage key hashed. It is not authentication: that belongs outside the middleware.
///
/// ```
/// use http::Request;
/// use idempotency_core::Scope;
///
/// let (parts, ()) = Request::builder().header("cookie", "a=1; session=alice").body(())?.into_parts();
/// assert_eq!(Scope::cookie("session").of(&parts).as_deref(), Some(&b"alice"[..]));
/// assert_eq!(Scope::authorization().of(&parts), None);
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone)]
#[must_use]
pub struct Scope {
    source: Source,
    required: bool,
}

type ScopeFn = dyn Fn(&Parts) -> Option<Vec<u8>> + Send + Sync;

#[derive(Clone)]
enum Source {
    Authorization,
    Cookie(Arc<str>),
    Header(HeaderName),
    None,
    Fn(Arc<ScopeFn>),
}

impl Scope {
    /// The `Authorization` header: the default. A caller who refreshes the token is another caller; `from_fn` with the
    /// principal's id cures that.
    pub fn authorization() -> Self {
        Self::new(Source::Authorization)
    }

    /// The value of the cookie `name`.
    pub fn cookie(name: impl AsRef<str>) -> Self {
        Self::new(Source::Cookie(name.as_ref().into()))
    }

    /// The value of the header `name`. Only for a header that clients can't set themselves, say one that a gateway sets.
    ///
    /// # Panics
    ///
    /// Panics if `name` is not a header name.
    pub fn header(name: impl AsRef<str>) -> Self {
        let name = name.as_ref();
        match HeaderName::from_bytes(name.as_bytes()) {
            Ok(name) => Self::new(Source::Header(name)),
            Err(_) => panic!("`Scope::header`: {name:?} is not a header name"),
        }
    }

    /// Nobody's: every caller shares the keys. For services with one caller.
    pub fn none() -> Self {
        Self::new(Source::None)
    }

    /// What `scope` takes from a request: the id of the principal that an authentication layer outside left in the request's
    /// extensions is the best scope there is.
    pub fn from_fn(scope: impl Fn(&Parts) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        Self::new(Source::Fn(Arc::new(scope)))
    }

    /// Refuses a request that has none with 403.
    pub fn required(mut self) -> Self {
        self.required = true;
        self
    }

    /// Whether a request without it is refused.
    #[must_use]
    pub fn is_required(&self) -> bool {
        self.required
    }

    /// The scope of a request; what is empty counts as absent.
    #[must_use]
    pub fn of(&self, request: &Parts) -> Option<Vec<u8>> {
        let scope = match &self.source {
            Source::Authorization => {
                joined(header_values(&request.headers, &header::AUTHORIZATION))
            }
            Source::Cookie(name) => joined(cookie_values(&request.headers, name)),
            Source::Header(name) => joined(header_values(&request.headers, name)),
            Source::None => None,
            Source::Fn(scope) => scope(request),
        };
        scope.filter(|scope| !scope.is_empty())
    }

    /// Whether `request` carries a session cookie that this scope does not look at, so that all sessions share their keys.
    #[must_use]
    pub fn overlooks_cookie(&self, request: &Parts) -> bool {
        matches!(self.source, Source::Authorization)
            && request.headers.contains_key(header::COOKIE)
            && !request.headers.contains_key(header::AUTHORIZATION)
    }

    fn new(source: Source) -> Self {
        Self {
            source,
            required: false,
        }
    }
}

fn header_values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    headers
        .get_all(name)
        .into_iter()
        .map(|value| value.as_bytes())
}

/// The values of the cookie `name`, RFC 6265 section 5.4.
fn cookie_values<'a>(headers: &'a HeaderMap, name: &str) -> impl Iterator<Item = &'a [u8]> {
    header_values(headers, &header::COOKIE)
        .flat_map(|line| line.split(|byte| *byte == b';'))
        .filter_map(move |pair| {
            let pair = pair.trim_ascii();
            pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")
        })
}

/// All the values, since a server behind us may look at any of them; a zero byte, which no header can hold, separates them.
fn joined<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> Option<Vec<u8>> {
    let mut joined = values.next()?.to_vec();
    for value in values {
        joined.push(0);
        joined.extend_from_slice(value);
    }
    Some(joined)
}

impl Default for Scope {
    fn default() -> Self {
        Self::authorization()
    }
}

/// Functions are equal only to themselves.
impl PartialEq for Scope {
    fn eq(&self, other: &Self) -> bool {
        let same_source = match (&self.source, &other.source) {
            (Source::Authorization, Source::Authorization) | (Source::None, Source::None) => true,
            (Source::Cookie(a), Source::Cookie(b)) => a == b,
            (Source::Header(a), Source::Header(b)) => a == b,
            (Source::Fn(a), Source::Fn(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        same_source && self.required == other.required
    }
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Authorization => f.write_str("authorization"),
            Source::Cookie(name) => write!(f, "cookie {name:?}"),
            Source::Header(name) => write!(f, "header {name:?}"),
            Source::None => f.write_str("none"),
            Source::Fn(_) => f.write_str("fn"),
        }?;
        if self.required {
            f.write_str(", required")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder();
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_cookie_is_found_by_its_whole_name() {
        let request = parts(&[("cookie", "xsession=eve; session=alice ; session2=bob")]);
        assert_eq!(Scope::cookie("session").of(&request).unwrap(), b"alice");
        assert_eq!(Scope::cookie("sess").of(&request), None);
    }

    #[test]
    fn two_values_are_another_scope_than_either() {
        let request = parts(&[("cookie", "session=alice"), ("cookie", "session=bob")]);
        assert_eq!(
            Scope::cookie("session").of(&request).unwrap(),
            b"alice\0bob"
        );
    }

    #[test]
    fn what_is_empty_is_absent() {
        let request = parts(&[("authorization", "")]);
        assert_eq!(Scope::authorization().of(&request), None);
    }
}
