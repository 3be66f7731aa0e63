//! What the engine and the middleware do, and the presets.

use std::{fmt, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, Method, StatusCode, header};
use serde::Deserialize;

use crate::{
    BasicKeyEncoder, Budget, Env, Event, FingerprintKeyEncoder, KeyEncoder, KeyFormat,
    KeyOnlyEncoder, Observer, event::Observers,
};

mod lock_policy;
mod options;
mod scope;
mod store_on;
mod user_fn;

use self::options::options;
pub use self::{
    lock_policy::LockPolicy,
    scope::{Scope, UnknownCaller},
    store_on::StoreOn,
};

// An option that settings read is also in `fields!` of settings.rs and in the table of `Settings`; one that is set by a function of its
// own, at the end of this file, is also in the `Debug` of options.rs.
options! {
    /// All options of the engine and the middleware, with safe defaults.
    ///
    /// [`Config::default`] does what `django-idempotency-key` does; [`Config::ietf`] what the IETF draft asks for;
    /// [`Config::stripe`] what Stripe's API does. Setters consume and return the configuration:
    ///
    /// ```
    /// use std::time::Duration;
    /// use http::StatusCode;
    /// use idempotency_core::{Config, LockPolicy, StoreOn};
    ///
    /// let config = Config::ietf()
    ///     .ttl(Duration::from_secs(3600))
    ///     .store_on(StoreOn::below(500).except([StatusCode::NOT_FOUND]))
    ///     .lock(LockPolicy::default().timeout(Duration::from_secs(10)));
    /// # let _ = config;
    /// ```
    ///
    /// The fields are what the setters set; read them to write a middleware of your own on the engine.
    pub struct Config {
        /// The request header that carries the key. `HeaderName::from_static` accepts lower case only. Default: `Idempotency-Key`.
        header(header): HeaderName = HeaderName::from_static("idempotency-key"),
        /// What a key must look like, beyond being one. Default: [`KeyFormat::any`].
        key_format(format): KeyFormat = KeyFormat::any(),
        /// Whose key it is: the same key of another caller is another operation. Default: [`Scope::default`], which is
        /// `Authorization` and the usual headers of API keys, and refuses a request that has a cookie alone.
        scope(scope): Scope = Scope::default(),
        /// Status of a replayed answer; `None` is the original one. Default: 409.
        conflict_status(status): Option<StatusCode> = Some(StatusCode::CONFLICT),
        /// Status for a duplicate that gave up waiting for the running original. Default: 423.
        in_flight_status(status): StatusCode = StatusCode::LOCKED,
        /// Status for a key that was used for another request, if the encoder makes fingerprints. Default: 422.
        mismatch_status(status): StatusCode = StatusCode::UNPROCESSABLE_ENTITY,
        /// Which answers are recorded; after any other a retry runs again. Default: [`StoreOn::success`].
        ///
        /// The axum layer never records what a router answers in the place of a handler: a 405, and a 404 where no route matched.
        store_on(store_on): StoreOn = StoreOn::success(),
        /// How long a record is kept. Default: 24 hours.
        ///
        /// Zero keeps nothing: the operation still runs in one place at a time, but a retry after its answer runs it again. Settings
        /// and attributes refuse zero.
        ttl(ttl): Duration = Duration::from_secs(24 * 3600),
        /// How claims behave. Default: [`LockPolicy::default`].
        lock(policy): LockPolicy = LockPolicy::default(),
        /// What happens when the storage fails before the operation ran. Default: [`OnStorageError::Reject`].
        on_storage_error(reaction): OnStorageError = OnStorageError::default(),
        /// What happens when a record can't be read. Default: [`OnUnreadable::Reject`].
        on_unreadable(reaction): OnUnreadable = OnUnreadable::default(),
        /// Time limit of each storage operation. Default: 1 s.
        storage_timeout(limit): Duration = Duration::from_secs(1),
        /// The longest request body that is buffered for the encoder, in bytes; a longer one is refused with 413. Default: 2 MiB.
        max_request_body(bytes): usize = 2 << 20,
        /// The longest answer that is recorded, in bytes; a longer one reaches the first client in full, and its key gets a
        /// tombstone. Default: 1 MiB.
        max_response_body(bytes): usize = 1 << 20,
        /// How many operations may run at once in this process; one more is refused with 503. Default: 16,384.
        max_running(operations): usize = 16_384,
        /// How many duplicates may wait at once in this process; one more is refused with 503. Default: 16,384.
        max_waiting(duplicates): usize = 16_384,
        /// How long a request body may be silent while it is read for the encoder. After that the request is refused with 408, and its
        /// memory is freed. Default: 30 s.
        body_timeout(limit): Duration = Duration::from_secs(30),
        /// Clock, sleep, randomness and spawning of the engine. Default: [`Env::system`].
        env(env): Env = Env::system(),
    }
    and {
        /// See [`Config::methods`]; `None` is every unsafe method.
        pub methods: Option<Vec<Method>> = None,
        /// See [`Config::encoder`].
        pub encoder: Arc<dyn KeyEncoder> = Arc::new(BasicKeyEncoder),
        /// See [`Config::max_buffered`].
        pub budget: Budget = Budget::new(256 << 20),
        /// See [`Config::replay_header`].
        pub replay_header: Option<HeaderName> = Some(HeaderName::from_static("idempotency-replayed")),
        /// See [`Config::strip_header`].
        pub stripped_headers: Vec<HeaderName> = vec![header::DATE, header::SET_COOKIE],
        /// See [`Config::documentation`].
        pub documentation: Option<HeaderValue> = None,
        pub(crate) observers: Observers = Observers::default(),
    }
}

// Not `#[non_exhaustive]`: a middleware does one of these.
/// What happens to a request whose handler has no policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// It needs a key, if its method is one of [`Config::methods`].
    #[default]
    Enforce,
    /// It runs unprotected.
    Exempt,
    /// It is protected if it has a key, and runs unprotected if it has none.
    Optional,
}

/// What happens to a request when the storage fails before its operation ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OnStorageError {
    /// It is refused with 503 and its handler does not run.
    #[default]
    Reject,
    /// Its handler runs without protection, which is logged as an error and counted. A duplicate may run too.
    RunUnprotected,
}

/// What happens to a request whose key holds a record that can't be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OnUnreadable {
    /// As after any storage error, [`OnStorageError`] decides: with its default the request is refused with 503, since the operation may
    /// have run.
    #[default]
    Reject,
    /// The record is removed and the operation runs. It may have run before. Two processes that find the record at the same moment
    /// may both run it, because removing and claiming are two steps.
    TreatAsAbsent,
}

impl Config {
    /// What `django-idempotency-key` does: another name of [`Config::default`].
    ///
    /// A retry gets the stored body with 409, so that a client which knows nothing of idempotency keys does not take it for a second
    /// success. A new service most likely wants [`Config::ietf`].
    pub fn django() -> Self {
        Self::default()
    }

    /// `Idempotency-Key` as in [draft-ietf-httpapi-idempotency-key-header-07][draft]: the body is a fingerprint (422 when a
    /// key is reused for another one), the original status is replayed, 409 while the original runs, and every answer below
    /// 500 is stored except 401, 403, 408, 409, 423, 425 and 429.
    ///
    /// [draft]: https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/07/
    pub fn ietf() -> Self {
        Self::default()
            .methods([Method::POST, Method::PATCH])
            .encoder(FingerprintKeyEncoder)
            .conflict_status(None)
            .in_flight_status(StatusCode::CONFLICT)
            .store_on(
                StoreOn::below(500)
                    .except(TRY_AGAIN)
                    .except([StatusCode::CONFLICT, StatusCode::LOCKED]),
            )
    }

    /// Like Stripe's API: a key belongs to one request only (400 for another path, method or body), the original status is
    /// replayed with `idempotent-replayed: true`, and every outcome is stored, 500 too, except 401, 403, 408, 425, 429 and
    /// what extractors reject before a handler with an attribute is entered. Any other handler counts as entered, so what its
    /// extractors reject is stored too; see [`StoreOn::except_rejections`].
    pub fn stripe() -> Self {
        Self::ietf()
            .methods([Method::POST])
            .encoder(KeyOnlyEncoder)
            .mismatch_status(StatusCode::BAD_REQUEST)
            .replay_header(HeaderName::from_static("idempotent-replayed"))
            .store_on(StoreOn::all().except(TRY_AGAIN).except_rejections())
    }

    /// The methods on which a key is asked for, where the mode is `enforce` and the handler has no policy. Default: all except GET, HEAD,
    /// OPTIONS, TRACE and CONNECT, which never use keys, listed or not; POST and PATCH in [`Config::ietf`], POST in [`Config::stripe`].
    ///
    /// A policy on the handler asks whatever the method. On other unsafe methods a key that is present is honoured all the same, except
    /// in `exempt` mode.
    pub fn methods(mut self, methods: impl IntoIterator<Item = Method>) -> Self {
        self.methods = Some(methods.into_iter().collect());
        self
    }

    /// What makes two requests the same operation. Default: [`BasicKeyEncoder`].
    pub fn encoder(mut self, encoder: impl KeyEncoder) -> Self {
        self.encoder = Arc::new(encoder);
        self
    }

    /// How many bytes this process may hold at once: request bodies that are read, run or wait, answers that are being recorded, and
    /// outcomes that are not stored yet. A request above the limit is refused with 503, and a streamed answer for which there is no
    /// room gets a tombstone. Keep it well above [`max_request_body`](Self::max_request_body). Default: 256 MiB.
    ///
    /// Clones of this configuration share the limit, so all caches of a layer are under one.
    pub fn max_buffered(mut self, bytes: usize) -> Self {
        self.budget = Budget::new(bytes);
        self
    }

    /// The header that a replayed answer carries with the value `true`; `None` is no header. Default:
    /// `idempotency-replayed`.
    pub fn replay_header(mut self, header: impl Into<Option<HeaderName>>) -> Self {
        self.replay_header = header.into();
        self
    }

    /// Keeps `header` out of recorded answers, as `Date` and `Set-Cookie` are by default. Hop-by-hop headers are always kept
    /// out, and `Content-Length` is computed anew.
    pub fn strip_header(mut self, header: HeaderName) -> Self {
        if !self.stripped_headers.contains(&header) {
            self.stripped_headers.push(header);
        }
        self
    }

    /// Records `header` although it is left out by default, for example `Set-Cookie`. A retry with the key then gets the cookie too.
    pub fn keep_header(mut self, header: HeaderName) -> Self {
        self.stripped_headers.retain(|stripped| stripped != header);
        self
    }

    /// Where clients find the documentation: refusals carry it as `Link: <url>; rel="describedby"`. Default: none.
    ///
    /// Bytes that a URL can't hold are percent-encoded.
    pub fn documentation(mut self, url: impl AsRef<str>) -> Self {
        self.documentation = link_value(url.as_ref());
        self
    }

    /// Adds an observer of everything that happens.
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observers.add(observer);
        self
    }

    /// Whether a request of `method` needs a key where its handler has no policy and the mode is `enforce`.
    #[must_use]
    pub fn asks(&self, method: &Method) -> bool {
        // CONNECT opens a tunnel, also a WebSocket over HTTP/2. Its 200 is not an answer that can be replayed.
        if method.is_safe() || method == Method::CONNECT {
            return false;
        }
        self.methods
            .as_ref()
            .is_none_or(|methods| methods.contains(method))
    }

    /// Calls every observer with `event`.
    ///
    /// If an observer panics, that is logged, and the operation goes on.
    pub fn emit(&self, event: &Event<'_>) {
        self.observers.emit(event);
    }
}

/// The same request may well succeed later, with another credential or at another time.
const TRY_AGAIN: [StatusCode; 5] = [
    StatusCode::UNAUTHORIZED,
    StatusCode::FORBIDDEN,
    StatusCode::REQUEST_TIMEOUT,
    StatusCode::TOO_EARLY,
    StatusCode::TOO_MANY_REQUESTS,
];

/// `<url>; rel="describedby"`, with every byte that a URL can't hold percent-encoded.
pub(crate) fn link_value(url: &str) -> Option<HeaderValue> {
    use fmt::Write as _;

    let mut link = String::with_capacity(url.len() + 24);
    link.push('<');
    for byte in url.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'<' | b'>' | b'"') {
            link.push(char::from(byte));
        } else {
            // Writing to a `String` can't fail.
            let _ = write!(link, "%{byte:02X}");
        }
    }
    link.push_str(">; rel=\"describedby\"");
    HeaderValue::try_from(link).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn safe_methods_and_connect_are_never_checked() {
        let config = Config::default().methods([Method::GET, Method::CONNECT, Method::POST]);
        assert!(!config.asks(&Method::GET));
        assert!(!config.asks(&Method::CONNECT));
        assert!(!Config::default().asks(&Method::CONNECT));
        assert!(config.asks(&Method::POST));
        assert!(!config.asks(&Method::PUT));
    }

    #[test]
    fn a_documentation_url_can_hold_anything() {
        let config = Config::default().documentation("https://a.example/x y>\r\nSet-Cookie: a=b");
        assert_eq!(
            config.documentation.unwrap(),
            "<https://a.example/x%20y%3E%0D%0ASet-Cookie:%20a=b>; rel=\"describedby\""
        );
    }

    #[test]
    fn presets_store_what_they_say() {
        let stores = |config: Config, status: u16| {
            config
                .store_on
                .stores(StatusCode::from_u16(status).unwrap())
        };
        for status in 200..=207 {
            assert!(stores(Config::default(), status), "{status}");
        }
        for status in [199, 208, 303, 400, 500] {
            assert!(!stores(Config::default(), status), "{status}");
        }
        for status in [200, 303, 400, 404, 422] {
            assert!(stores(Config::ietf(), status), "{status}");
        }
        for status in [401, 403, 408, 409, 423, 425, 429, 500, 503] {
            assert!(!stores(Config::ietf(), status), "{status}");
        }
        for status in [200, 400, 409, 423, 500, 503] {
            assert!(stores(Config::stripe(), status), "{status}");
        }
        for status in [401, 403, 408, 425, 429] {
            assert!(!stores(Config::stripe(), status), "{status}");
        }
        assert!(!Config::stripe().store_on.stores_rejections());
        assert!(Config::ietf().store_on.stores_rejections());
    }
}
