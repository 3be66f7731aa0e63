//! What the engine and the middleware do, and the presets.

use std::{fmt, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, Method, StatusCode, header};

use crate::{
    BasicKeyEncoder, Budget, Env, Event, FingerprintKeyEncoder, KeyEncoder, KeyFormat,
    KeyOnlyEncoder, Observer, event::Observers,
};

mod lock_policy;
mod scope;
mod store_on;

pub use self::{
    lock_policy::LockPolicy,
    scope::{Scope, UnknownCaller},
    store_on::StoreOn,
};

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
#[derive(Clone)]
#[must_use]
#[non_exhaustive]
pub struct Config {
    /// See [`Config::header`].
    pub header: HeaderName,
    /// See [`Config::methods`]; `None` is every unsafe method.
    pub methods: Option<Vec<Method>>,
    /// See [`Config::key_format`].
    pub key_format: KeyFormat,
    /// See [`Config::encoder`].
    pub encoder: Arc<dyn KeyEncoder>,
    /// See [`Config::scope`].
    pub scope: Scope,
    /// See [`Config::conflict_status`].
    pub conflict_status: Option<StatusCode>,
    /// See [`Config::in_flight_status`].
    pub in_flight_status: StatusCode,
    /// See [`Config::mismatch_status`].
    pub mismatch_status: StatusCode,
    /// See [`Config::store_on`].
    pub store_on: StoreOn,
    /// See [`Config::ttl`].
    pub ttl: Duration,
    /// See [`Config::lock`].
    pub lock: LockPolicy,
    /// See [`Config::on_storage_error`].
    pub on_storage_error: OnStorageError,
    /// See [`Config::on_unreadable`].
    pub on_unreadable: OnUnreadable,
    /// See [`Config::storage_timeout`].
    pub storage_timeout: Duration,
    /// See [`Config::max_request_body`].
    pub max_request_body: usize,
    /// See [`Config::max_response_body`].
    pub max_response_body: usize,
    /// See [`Config::max_running`].
    pub max_running: usize,
    /// See [`Config::max_waiting`].
    pub max_waiting: usize,
    /// See [`Config::max_buffered`].
    pub budget: Budget,
    /// See [`Config::body_timeout`].
    pub body_timeout: Duration,
    /// See [`Config::replay_header`].
    pub replay_header: Option<HeaderName>,
    /// See [`Config::strip_header`].
    pub stripped_headers: Vec<HeaderName>,
    /// See [`Config::documentation`].
    pub documentation: Option<HeaderValue>,
    /// See [`Config::env`].
    pub env: Env,
    pub(crate) observers: Observers,
}

// Not `#[non_exhaustive]`: a middleware does one of these.
/// What happens to a request whose handler has no policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "settings",
    derive(serde::Deserialize),
    serde(rename_all = "snake_case")
)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "settings",
    derive(serde::Deserialize),
    serde(rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum OnStorageError {
    /// It is refused with 503 and its handler does not run.
    #[default]
    Reject,
    /// Its handler runs without protection, which is logged as an error and counted. A duplicate may run too.
    RunUnprotected,
}

/// What happens to a request whose key holds a record that can't be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(
    feature = "settings",
    derive(serde::Deserialize),
    serde(rename_all = "snake_case")
)]
#[non_exhaustive]
pub enum OnUnreadable {
    /// It is treated as any storage error.
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
            .store_on(StoreOn::below(500).except([
                StatusCode::UNAUTHORIZED,
                StatusCode::FORBIDDEN,
                StatusCode::REQUEST_TIMEOUT,
                StatusCode::CONFLICT,
                StatusCode::LOCKED,
                StatusCode::TOO_EARLY,
                StatusCode::TOO_MANY_REQUESTS,
            ]))
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
            .store_on(
                StoreOn::all()
                    .except([
                        StatusCode::UNAUTHORIZED,
                        StatusCode::FORBIDDEN,
                        StatusCode::REQUEST_TIMEOUT,
                        StatusCode::TOO_EARLY,
                        StatusCode::TOO_MANY_REQUESTS,
                    ])
                    .except_rejections(),
            )
    }

    /// The request header that carries the key. `HeaderName::from_static` accepts lower case only. Default: `Idempotency-Key`.
    pub fn header(mut self, header: HeaderName) -> Self {
        self.header = header;
        self
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

    /// What a key must look like, beyond being one. Default: [`KeyFormat::any`].
    pub fn key_format(mut self, format: KeyFormat) -> Self {
        self.key_format = format;
        self
    }

    /// What makes two requests the same operation. Default: [`BasicKeyEncoder`].
    pub fn encoder(mut self, encoder: impl KeyEncoder) -> Self {
        self.encoder = Arc::new(encoder);
        self
    }

    /// Whose key it is: the same key of another caller is another operation. Default: [`Scope::default`], which is
    /// `Authorization` and the usual headers of API keys, and refuses a request that has a cookie alone.
    pub fn scope(mut self, scope: Scope) -> Self {
        self.scope = scope;
        self
    }

    /// Status of a replayed answer; `None` is the original one. Default: 409.
    pub fn conflict_status(mut self, status: Option<StatusCode>) -> Self {
        self.conflict_status = status;
        self
    }

    /// Status for a duplicate that gave up waiting for the running original. Default: 423.
    pub fn in_flight_status(mut self, status: StatusCode) -> Self {
        self.in_flight_status = status;
        self
    }

    /// Status for a key that was used for another request, if the encoder makes fingerprints. Default: 422.
    pub fn mismatch_status(mut self, status: StatusCode) -> Self {
        self.mismatch_status = status;
        self
    }

    /// Which answers are recorded; after any other a retry runs again. Default: [`StoreOn::success`].
    ///
    /// The axum layer never records what a router answers in the place of a handler: a 405, and a 404 where no route matched.
    pub fn store_on(mut self, store_on: StoreOn) -> Self {
        self.store_on = store_on;
        self
    }

    /// How long a record is kept. Default: 24 hours.
    ///
    /// Zero keeps nothing: the operation still runs in one place at a time, but a retry after its answer runs it again. Settings
    /// and attributes refuse zero.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// How claims behave. Default: [`LockPolicy::default`].
    pub fn lock(mut self, policy: LockPolicy) -> Self {
        self.lock = policy;
        self
    }

    /// What happens when the storage fails before the operation ran. Default: [`OnStorageError::Reject`].
    pub fn on_storage_error(mut self, reaction: OnStorageError) -> Self {
        self.on_storage_error = reaction;
        self
    }

    /// What happens when a record can't be read. Default: [`OnUnreadable::Reject`].
    pub fn on_unreadable(mut self, reaction: OnUnreadable) -> Self {
        self.on_unreadable = reaction;
        self
    }

    /// Time limit of each storage operation. Default: 1 s.
    pub fn storage_timeout(mut self, limit: Duration) -> Self {
        self.storage_timeout = limit;
        self
    }

    /// The longest request body that is buffered for the encoder, in bytes; a longer one is refused with 413. Default: 2 MiB.
    pub fn max_request_body(mut self, bytes: usize) -> Self {
        self.max_request_body = bytes;
        self
    }

    /// The longest answer that is recorded, in bytes; a longer one reaches the first client in full, and its key gets a
    /// tombstone. Default: 1 MiB.
    pub fn max_response_body(mut self, bytes: usize) -> Self {
        self.max_response_body = bytes;
        self
    }

    /// How many operations may run at once in this process; one more is refused with 503. Default: 16,384.
    pub fn max_running(mut self, operations: usize) -> Self {
        self.max_running = operations;
        self
    }

    /// How many duplicates may wait at once in this process; one more is refused with 503. Default: 16,384.
    pub fn max_waiting(mut self, duplicates: usize) -> Self {
        self.max_waiting = duplicates;
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

    /// How long a request body may be silent while it is read for the encoder. After that the request is refused with 408, and its
    /// memory is freed. Default: 30 s.
    pub fn body_timeout(mut self, limit: Duration) -> Self {
        self.body_timeout = limit;
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

    /// Clock, sleep, randomness and spawning of the engine. Default: [`Env::system`].
    pub fn env(mut self, env: Env) -> Self {
        self.env = env;
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

/// `<url>; rel="describedby"`, with every byte that a URL can't hold percent-encoded.
fn link_value(url: &str) -> Option<HeaderValue> {
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

impl Default for Config {
    fn default() -> Self {
        Self {
            header: HeaderName::from_static("idempotency-key"),
            methods: None,
            key_format: KeyFormat::any(),
            encoder: Arc::new(BasicKeyEncoder),
            scope: Scope::default(),
            conflict_status: Some(StatusCode::CONFLICT),
            in_flight_status: StatusCode::LOCKED,
            mismatch_status: StatusCode::UNPROCESSABLE_ENTITY,
            store_on: StoreOn::success(),
            ttl: Duration::from_secs(24 * 3600),
            lock: LockPolicy::default(),
            on_storage_error: OnStorageError::default(),
            on_unreadable: OnUnreadable::default(),
            storage_timeout: Duration::from_secs(1),
            max_request_body: 2 << 20,
            max_response_body: 1 << 20,
            max_running: 16_384,
            max_waiting: 16_384,
            budget: Budget::new(256 << 20),
            body_timeout: Duration::from_secs(30),
            replay_header: Some(HeaderName::from_static("idempotency-replayed")),
            stripped_headers: vec![header::DATE, header::SET_COOKIE],
            documentation: None,
            env: Env::system(),
            observers: Observers::default(),
        }
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("header", &self.header)
            .field("methods", &self.methods)
            .field("key_format", &self.key_format)
            .field("scope", &self.scope)
            .field("conflict_status", &self.conflict_status)
            .field("in_flight_status", &self.in_flight_status)
            .field("mismatch_status", &self.mismatch_status)
            .field("store_on", &self.store_on)
            .field("ttl", &self.ttl)
            .field("lock", &self.lock)
            .field("on_storage_error", &self.on_storage_error)
            .field("on_unreadable", &self.on_unreadable)
            .field("storage_timeout", &self.storage_timeout)
            .field("max_request_body", &self.max_request_body)
            .field("max_response_body", &self.max_response_body)
            .field("max_running", &self.max_running)
            .field("max_waiting", &self.max_waiting)
            .field("max_buffered", &self.budget.limit())
            .field("body_timeout", &self.body_timeout)
            .field("replay_header", &self.replay_header)
            .field("stripped_headers", &self.stripped_headers)
            .field("documentation", &self.documentation)
            .field("env", &self.env)
            .field("observers", &self.observers.len())
            .finish_non_exhaustive()
    }
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
