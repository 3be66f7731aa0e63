//! Which caller a key belongs to.

use std::{fmt, sync::Arc};

use http::{HeaderMap, HeaderName, header, request::Parts, uri::Authority};

use super::user_fn::UserFn;

/// Which part of a request identifies the caller. Keys belong to a caller: the same key from another caller is another operation,
/// so no caller is shown the answer of another.
///
/// The scope is hashed into the storage key. It is not authentication, which belongs outside the middleware.
///
/// # The default
///
/// [`Scope::default`] is every one of `Authorization`, `X-Api-Key`, `Api-Key` and `X-Auth-Token` that a request carries. Without
/// any of them the caller is anonymous, and all anonymous callers share their keys. A request with a `Cookie` and none of them is
/// refused: the cookie may be a session, and then its callers must not share their keys. A `Cookie` beside one of them is ignored,
/// and the middleware warns of that once per route. An explicit scope settles both:
///
/// | who calls | scope |
/// |---|---|
/// | the principal that authentication found | [`Scope::from_fn`] |
/// | whoever has the session cookie | [`Scope::cookie`] |
/// | whoever has the header; a cookie means nothing | [`Scope::authorization`], [`Scope::header`], or `Scope::default().or_anonymous()` |
/// | one and the same caller | [`Scope::none`] |
///
/// # A request without a caller
///
/// [`Scope::header`], [`Scope::cookie`] and [`Scope::from_fn`] refuse a request in which they find no caller. If they did not,
/// all such requests would count as one anonymous caller, and one client would get the answer of another. If authentication was put
/// inside the middleware by mistake, that would be every request. [`or_anonymous`](Self::or_anonymous) lets them share their keys
/// all the same; [`required`](Self::required) makes the other scopes refuse too.
///
/// ```
/// use http::Request;
/// use idempotency_core::Scope;
///
/// let (parts, ()) = Request::builder().header("cookie", "a=1; session=alice").body(())?.into_parts();
/// assert_eq!(Scope::cookie("session").of(&parts), Ok(Some(b"alice".to_vec())));
/// assert!(Scope::header("x-tenant").of(&parts).is_err());
/// assert_eq!(Scope::header("x-tenant").or_anonymous().of(&parts), Ok(None));
/// assert!(Scope::default().of(&parts).is_err());
/// # Ok::<_, http::Error>(())
/// ```
///
/// # A token that is refreshed
///
/// For every scope that reads a credential, a caller with a new or newly signed token is another caller, so a retry with the new
/// token runs again. The id of the principal stays the same. Let the authentication layer, outside of the middleware, put it into
/// the request's extensions:
///
/// ```
/// use http::{Request, request::Parts};
/// use idempotency_core::Scope;
///
/// /// What the authentication layer inserts, whatever token it found it in.
/// #[derive(Clone)]
/// struct Principal {
///     id: u64,
/// }
///
/// fn principal(request: &Parts) -> Option<Vec<u8>> {
///     let principal: &Principal = request.extensions.get()?;
///     Some(principal.id.to_be_bytes().to_vec())
/// }
///
/// let scope = Scope::from_fn(principal);
/// let request = |token| Request::builder().header("authorization", token).extension(Principal { id: 7 }).body(());
/// let (first, ()) = request("Bearer old")?.into_parts();
/// let (retry, ()) = request("Bearer new")?.into_parts();
/// assert_eq!(scope.of(&first), scope.of(&retry));
/// assert_ne!(Scope::default().of(&first), Scope::default().of(&retry));
/// # Ok::<_, http::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct Scope {
    source: Source,
    unknown: Unknown,
}

type ScopeFn = dyn Fn(&Parts) -> Option<Vec<u8>> + Send + Sync;

#[derive(Clone, PartialEq)]
enum Source {
    Credentials,
    Authorization,
    Cookie(Arc<str>),
    Header(HeaderName),
    /// The authority: `:authority`, an absolute target, or the header `Host`.
    Authority,
    None,
    Fn(UserFn<ScopeFn>),
}

/// How to treat a request without a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unknown {
    Refused,
    /// Refused if it has a cookie, else anonymous.
    RefusedWithCookie,
    Anonymous,
}

/// The headers that carry API keys, beside `Authorization`.
static API_KEYS: [HeaderName; 3] = [
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-auth-token"),
];

impl Scope {
    /// The caller is the value of the `Authorization` header. A request without it is anonymous, whatever else it carries.
    pub fn authorization() -> Self {
        Self::new(Source::Authorization, Unknown::Anonymous)
    }

    /// The caller is the value of the cookie `name`. A request without it is refused.
    pub fn cookie(name: impl AsRef<str>) -> Self {
        Self::new(Source::Cookie(name.as_ref().into()), Unknown::Refused)
    }

    /// The caller is the value of the header `name`. A request without it is refused. Use it only for a header that clients can't
    /// set themselves, for example one that a gateway sets. `name` is a string or a [`HeaderName`](http::HeaderName).
    ///
    /// `Host` is the authority of the request, also over HTTP/2, where that is `:authority`: in lower case, and without user
    /// information and the ports 80 and 443.
    ///
    /// # Panics
    ///
    /// Panics if `name` is not a header name.
    pub fn header(name: impl AsRef<str>) -> Self {
        let name = name.as_ref();
        let source = match HeaderName::from_bytes(name.as_bytes()) {
            Ok(header::HOST) => Source::Authority,
            Ok(name) => Source::Header(name),
            Err(_) => panic!("`Scope::header`: {name:?} is not a header name"),
        };
        Self::new(source, Unknown::Refused)
    }

    /// All callers share their keys. For services with one caller.
    pub fn none() -> Self {
        Self::new(Source::None, Unknown::Anonymous)
    }

    /// The caller is what `scope` returns. A request for which it returns `None` or no bytes is refused. The best scope is the id of
    /// the principal, which an authentication layer outside put into the request's extensions.
    pub fn from_fn(scope: impl Fn(&Parts) -> Option<Vec<u8>> + Send + Sync + 'static) -> Self {
        Self::new(Source::Fn(UserFn(Arc::new(scope))), Unknown::Refused)
    }

    /// Refuses a request without a caller, with 403. Of this and [`or_anonymous`](Self::or_anonymous) the last call counts.
    pub fn required(mut self) -> Self {
        self.unknown = Unknown::Refused;
        self
    }

    /// Treats all requests without a caller as those of one anonymous caller: they share their keys, and get each other's answers.
    /// For a public service, or one where all callers without a credential are the same. Of this and
    /// [`required`](Self::required) the last call counts.
    ///
    /// On the default scope it says that cookies do not identify the caller: a request with only a cookie is accepted, and the
    /// middleware does not warn of a cookie beside a credential.
    pub fn or_anonymous(mut self) -> Self {
        self.unknown = Unknown::Anonymous;
        self
    }

    /// The caller of a request, `None` if it is anonymous. An empty value counts as absent.
    ///
    /// # Errors
    ///
    /// If the request has no caller and must be refused.
    pub fn of(&self, request: &Parts) -> Result<Option<Vec<u8>>, UnknownCaller> {
        let headers = &request.headers;
        let found = match &self.source {
            Source::Credentials => Some(credentials(headers)),
            Source::Authorization => joined(header_values(headers, &header::AUTHORIZATION)),
            Source::Cookie(name) => joined(cookie_values(headers, name)),
            Source::Header(name) => joined(header_values(headers, name)),
            Source::Authority => authority(request),
            Source::None => None,
            Source::Fn(UserFn(scope)) => scope(request),
        };
        let found = found.filter(|scope| !scope.is_empty());
        let is_refused = found.is_none()
            && match self.unknown {
                Unknown::Refused => true,
                Unknown::RefusedWithCookie => has_cookie(headers),
                Unknown::Anonymous => false,
            };
        if is_refused {
            return Err(UnknownCaller {
                scope: self.clone(),
            });
        }
        Ok(found)
    }

    /// Whether an accepted `request` carries a cookie that the default scope ignores. If the cookie is a session, sessions with the
    /// same credential share their keys. Always false for an explicit scope.
    #[must_use]
    pub fn overlooks_cookie(&self, request: &Parts) -> bool {
        matches!(self.source, Source::Credentials)
            && self.unknown != Unknown::Anonymous
            && has_cookie(&request.headers)
    }

    fn new(source: Source, unknown: Unknown) -> Self {
        Self { source, unknown }
    }
}

/// All credentials of a request, encoded without collisions: a zero byte separates values and a line feed separates headers, and no
/// header can hold either. `Authorization` alone gives the same bytes as [`Scope::authorization`].
fn credentials(headers: &HeaderMap) -> Vec<u8> {
    let mut all = joined(header_values(headers, &header::AUTHORIZATION)).unwrap_or_default();
    for name in &API_KEYS {
        if let Some(values) = joined(header_values(headers, name)) {
            all.push(b'\n');
            all.extend_from_slice(name.as_str().as_bytes());
            all.push(b':');
            all.extend_from_slice(&values);
        }
    }
    all
}

/// The authority of a request by RFC 9112 section 3.2.2 and RFC 9113 section 8.3.1: that of the target, or `Host` if the target has
/// none. `None` also if it can't be parsed or there are several.
fn authority(request: &Parts) -> Option<Vec<u8>> {
    let from_host;
    let authority = match request.uri.authority() {
        Some(authority) => authority,
        None => {
            let mut hosts = header_values(&request.headers, &header::HOST);
            let (host, None) = (hosts.next()?, hosts.next()) else {
                return None;
            };
            from_host = Authority::try_from(host).ok()?;
            &from_host
        }
    };
    let text = authority.as_str();
    let host_and_port = text.rsplit_once('@').map_or(text, |(_, rest)| rest);
    let host = authority.host();
    let port = match host_and_port.strip_prefix(host)? {
        "" | ":" => None,
        port => Some(port.strip_prefix(':')?.parse::<u16>().ok()?),
    };
    let host = host.to_ascii_lowercase();
    match port {
        _ if host.is_empty() => None,
        None | Some(80 | 443) => Some(host.into_bytes()),
        Some(port) => Some(format!("{host}:{port}").into_bytes()),
    }
}

fn has_cookie(headers: &HeaderMap) -> bool {
    header_values(headers, &header::COOKIE).any(|value| !value.trim_ascii().is_empty())
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

/// All the values, because a server behind us may read any of them. A zero byte, which no header can hold, separates them. `None`
/// if there are none, or all are empty.
fn joined<'a>(mut values: impl Iterator<Item = &'a [u8]>) -> Option<Vec<u8>> {
    let mut joined = values.next()?.to_vec();
    for value in values {
        joined.push(0);
        joined.extend_from_slice(value);
    }
    joined.iter().any(|byte| *byte != 0).then_some(joined)
}

impl Default for Scope {
    /// The credentials of a request, see [`Scope`](Scope#the-default).
    fn default() -> Self {
        Self::new(Source::Credentials, Unknown::RefusedWithCookie)
    }
}

impl fmt::Debug for Source {
    /// As it is written in Rust.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Credentials => f.write_str("Scope::default()"),
            Self::Authorization => f.write_str("Scope::authorization()"),
            Self::Cookie(name) => write!(f, "Scope::cookie({name:?})"),
            Self::Header(name) => write!(f, "Scope::header({:?})", name.as_str()),
            Self::Authority => f.write_str("Scope::header(\"host\")"),
            Self::None => f.write_str("Scope::none()"),
            Self::Fn(_) => f.write_str("Scope::from_fn(…)"),
        }
    }
}

/// The request has no caller that its [`Scope`] accepts, and must be refused. Displays the scope and the cure, for the log.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{}", match scope.unknown {
    Unknown::RefusedWithCookie => UNKNOWN_WITH_COOKIE.to_owned(),
    Unknown::Refused | Unknown::Anonymous => format!("`{:?}` {UNKNOWN}", scope.source),
})]
pub struct UnknownCaller {
    scope: Scope,
}

const UNKNOWN_WITH_COOKIE: &str = "a request has a cookie, and no credential that the default scope looks at (`Authorization`, `X-Api-Key`, `Api-Key`, \
     `X-Auth-Token`): if the cookie says who calls, set `Scope::cookie(\"<session cookie>\")`, or `Scope::from_fn` with the principal \
     that authentication found; if no cookie does, set `Scope::default().or_anonymous()`";

const UNKNOWN: &str = "finds no caller in a request: what says who calls, such as authentication, must stand outside of the idempotency layer; if all \
     callers that are not found may share their keys and answers, add `.or_anonymous()` to the scope";

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn parts(headers: &[(&str, &str)]) -> Parts {
        asked("/", headers)
    }

    fn asked(uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[track_caller]
    fn found(scope: &Scope, request: &Parts) -> Vec<u8> {
        scope.of(request).unwrap().unwrap()
    }

    #[test]
    fn a_cookie_is_found_by_its_whole_name() {
        let request = parts(&[("cookie", "xsession=eve; session=alice ; session2=bob")]);
        assert_eq!(found(&Scope::cookie("session"), &request), b"alice");
        assert!(Scope::cookie("sess").of(&request).is_err());
    }

    #[test]
    fn two_values_are_another_scope_than_either() {
        let request = parts(&[("cookie", "session=alice"), ("cookie", "session=bob")]);
        assert_eq!(found(&Scope::cookie("session"), &request), b"alice\0bob");
    }

    #[test]
    fn what_is_empty_is_absent() {
        let request = parts(&[("authorization", ""), ("x-api-key", ""), ("cookie", " ")]);
        assert_eq!(Scope::authorization().of(&request), Ok(None));
        assert_eq!(Scope::default().of(&request), Ok(None));
        assert!(Scope::header("x-api-key").of(&request).is_err());
        assert!(Scope::from_fn(|_| Some(Vec::new())).of(&request).is_err());
    }

    #[test]
    fn the_last_of_required_and_or_anonymous_counts() {
        let nobody = parts(&[]);
        for scope in [
            Scope::default(),
            Scope::authorization(),
            Scope::cookie("session"),
            Scope::header("x-tenant"),
            Scope::header("host"),
            Scope::none(),
            Scope::from_fn(|_| None),
        ] {
            let required = scope.clone().or_anonymous().required();
            assert!(required.of(&nobody).is_err(), "{required:?}");
            assert_eq!(required, scope.clone().required());
            let anonymous = scope.clone().required().or_anonymous();
            assert_eq!(anonymous.of(&nobody), Ok(None), "{anonymous:?}");
            assert_eq!(anonymous, scope.or_anonymous());
        }
    }

    #[test]
    fn the_default_tells_all_sets_of_credentials_apart() {
        let mut scopes = Vec::new();
        let requests: [&[(&str, &str)]; 14] = [
            &[("authorization", "a")],
            &[("x-api-key", "a")],
            &[("api-key", "a")],
            &[("x-auth-token", "a")],
            &[("authorization", "a"), ("x-api-key", "b")],
            &[("authorization", "b"), ("x-api-key", "a")],
            &[("authorization", "a"), ("api-key", "b")],
            &[("x-api-key", "a"), ("api-key", "b")],
            &[("x-api-key", "a"), ("x-auth-token", "b")],
            &[("x-api-key", "a"), ("x-api-key", "b")],
            &[("authorization", "a"), ("authorization", "b")],
            &[("authorization", "ax-api-key:b")],
            &[("authorization", "x-api-key:a")],
            &[("x-api-key", "aapi-key:b")],
        ];
        for request in requests {
            scopes.push(found(&Scope::default(), &parts(request)));
        }
        let all = scopes.len();
        scopes.sort();
        scopes.dedup();
        assert_eq!(scopes.len(), all);
    }

    #[test]
    fn the_default_takes_no_cookie_for_a_caller() {
        let alone = parts(&[("cookie", "session=alice")]);
        assert!(Scope::default().of(&alone).is_err());
        assert_eq!(Scope::default().or_anonymous().of(&alone), Ok(None));
        assert_eq!(Scope::authorization().of(&alone), Ok(None));
        let beside = parts(&[("cookie", "session=alice"), ("api-key", "a")]);
        assert!(Scope::default().overlooks_cookie(&beside));
        assert!(Scope::default().required().overlooks_cookie(&beside));
        assert!(!Scope::default().or_anonymous().overlooks_cookie(&beside));
        assert!(!Scope::header("api-key").overlooks_cookie(&beside));
        assert!(!Scope::authorization().overlooks_cookie(&beside));
        let without = parts(&[("api-key", "a")]);
        assert!(!Scope::default().overlooks_cookie(&without));
    }

    #[test]
    fn the_authority_is_the_target_or_the_host() {
        let scope = Scope::header("Host");
        for (uri, hosts, authority) in [
            ("/", &["shop.example"][..], "shop.example"),
            ("/", &["SHOP.example:443"], "shop.example"),
            ("/", &["shop.example:80"], "shop.example"),
            ("/", &["shop.example:"], "shop.example"),
            ("/", &["shop.example:8080"], "shop.example:8080"),
            ("/", &["[::1]:8080"], "[::1]:8080"),
            ("/", &["[2001:DB8::1]"], "[2001:db8::1]"),
            ("https://shop.example/", &[], "shop.example"),
            ("https://Shop.Example:443/", &[], "shop.example"),
            ("http://user:80@shop.example/", &[], "shop.example"),
            ("http://user:pass@shop.example:81/", &[], "shop.example:81"),
            ("http://shop.example/", &["other.example"], "shop.example"),
            ("http://shop.example/", &["a", "b"], "shop.example"),
        ] {
            let hosts: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            let request = asked(uri, &hosts);
            let found = String::from_utf8(found(&scope, &request)).unwrap();
            assert_eq!(found, authority, "{uri} {hosts:?}");
        }
        for hosts in [
            &[][..],
            &[""],
            &[":80"],
            &[":8080"],
            &["x:x"],
            &["a", "a"],
            &["a b"],
            &["a/b"],
            &["a:x"],
            &["a:99999"],
            &["caf\u{e9}"],
        ] {
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            assert!(scope.of(&parts(&headers)).is_err(), "{hosts:?}");
        }
    }

    #[test]
    fn an_unknown_caller_is_told_the_scope_and_the_cure() {
        let nobody = parts(&[]);
        for (scope, says) in [
            (Scope::cookie("session"), "`Scope::cookie(\"session\")`"),
            (Scope::header("X-Tenant"), "`Scope::header(\"x-tenant\")`"),
            (Scope::header("host"), "`Scope::header(\"host\")`"),
            (Scope::from_fn(|_| None), "`Scope::from_fn(…)`"),
            (Scope::default().required(), "`Scope::default()`"),
            (
                Scope::authorization().required(),
                "`Scope::authorization()`",
            ),
        ] {
            let error = scope.of(&nobody).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
            assert!(error.contains("outside"), "{error}");
            assert!(error.contains("`.or_anonymous()`"), "{error}");
        }
        let cookie = parts(&[("cookie", "session=sesame")]);
        let error = Scope::default().of(&cookie).unwrap_err().to_string();
        assert!(error.contains("Scope::cookie"), "{error}");
        assert!(error.contains("Scope::default().or_anonymous()"), "{error}");
        assert!(!error.contains("sesame"), "{error}");
    }
}
