//! Policies: what a handler asks of the layer.

use std::{borrow::Cow, sync::Arc, time::Duration};

use http::{HeaderName, Method, request::Parts};
use idempotency_core::{Scope, StoreOn, TransactionDatabase};

use crate::key_source::{KeyFn, KeySource};

/// A handler's policy: whether a key is required, and where it differs from the layer's
/// [`Config`](crate::Config).
///
/// The attributes make one from their arguments; the combinators of [`IdempotencyHandler`](crate::IdempotencyHandler) take
/// one, for closures, generic and associated functions:
///
/// ```
/// use std::time::Duration;
/// use axum::{Router, routing::post};
/// use idempotency_axum::{IdempotencyHandler, KeyPolicy};
///
/// let policy = KeyPolicy::required().cache_name("orders").ttl(Duration::from_secs(3600));
/// let app: Router = Router::new()
///     .route("/orders", post((async || "created").idempotency_key(policy)))
///     .route("/ping", post((async || "pong").idempotency_exempt()));
/// # let _ = app;
/// ```
///
/// A policy around a handler with an attribute replaces the attribute's as a whole: set [`manual`](Self::manual) again if the
/// handler is manual.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct KeyPolicy {
    pub(crate) requirement: Requirement,
    /// Shared, because every protected request has them.
    pub(crate) terms: Arc<Terms>,
}

/// Whether a key is needed, the strictest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Requirement {
    Exempt,
    Optional,
    Required,
}

/// Whether requests of `method` can use keys at all. Safe ones are repeated anyway, and what CONNECT opens is a tunnel: its 200 is
/// no answer that could be replayed.
pub(crate) fn can_use_keys(method: &Method) -> bool {
    !method.is_safe() && method != Method::CONNECT
}

/// How a key protects, where it differs from the layer's configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Terms {
    pub(crate) key: KeySource,
    pub(crate) cache_name: Option<Cow<'static, str>>,
    pub(crate) ttl: Option<Duration>,
    pub(crate) manual: bool,
    /// The database of the transaction that the handler takes.
    pub(crate) transaction: Option<&'static str>,
    pub(crate) store_on: Option<StoreOn>,
    pub(crate) scope: Option<Scope>,
    pub(crate) max_request_body: Option<usize>,
}

impl KeyPolicy {
    /// A key is required: a request without one is refused with 400.
    pub fn required() -> Self {
        Self::new(Requirement::Required)
    }

    /// A request without a key runs unprotected; one with a key is protected.
    pub fn optional() -> Self {
        Self::new(Requirement::Optional)
    }

    /// Keys are ignored: every request runs.
    pub fn exempt() -> Self {
        Self::new(Requirement::Exempt)
    }

    /// Keeps claims and records in the cache of this name, see
    /// [`IdempotencyLayer::cache`](crate::IdempotencyLayer::cache). Default: the storage that the layer was made with.
    pub fn cache_name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.terms_mut().cache_name = Some(name.into());
        self
    }

    /// How long records are kept. Zero keeps none: a retry after the answer runs again. Default:
    /// [`Config::ttl`](crate::Config::ttl).
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.terms_mut().ttl = Some(ttl);
        self
    }

    /// On a conflict the handler runs and answers itself, see [`ManualIdempotency`](crate::ManualIdempotency). A handler
    /// with an attribute and a `ManualIdempotency` parameter has this by itself.
    pub fn manual(mut self) -> Self {
        self.terms_mut().manual = true;
        self
    }

    /// Which answers are recorded; after any other the key is free, and a retry runs. Default:
    /// [`Config::store_on`](crate::Config::store_on).
    ///
    /// For a handler whose refusals are final too, or that answers a form with a redirect:
    ///
    /// ```
    /// use axum::{Router, body::Body, http::{Request, StatusCode, header::LOCATION}, routing::post};
    /// use idempotency_axum::{IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage, StoreOn};
    /// use tower::ServiceExt;
    ///
    /// async fn submit() -> (StatusCode, [(axum::http::HeaderName, &'static str); 1]) {
    ///     (StatusCode::SEE_OTHER, [(LOCATION, "/orders/1")])
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = KeyPolicy::required().store_on(StoreOn::below(400));
    /// let app = Router::new()
    ///     .route("/orders", post(submit.idempotency_key(policy)))
    ///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
    ///
    /// let request = || Request::post("/orders").header("idempotency-key", "form-7").body(Body::empty());
    /// let first = app.clone().oneshot(request()?).await?;
    /// let retry = app.oneshot(request()?).await?;
    /// assert_eq!(retry.headers()[LOCATION], first.headers()[LOCATION]);
    /// assert_eq!(retry.headers()["idempotency-replayed"], "true");
    /// # Ok(())
    /// # }
    /// ```
    pub fn store_on(mut self, store_on: StoreOn) -> Self {
        self.terms_mut().store_on = Some(store_on);
        self
    }

    /// Whose key it is. Default: [`Config::scope`](crate::Config::scope).
    ///
    /// For a route whose callers are identified in another way than those of the other routes, say a partner's webhook among the
    /// routes of users. A request in which a header is not found is refused with 403:
    ///
    /// ```
    /// use axum::{Router, body::Body, http::{Request, StatusCode}, routing::post};
    /// use idempotency_axum::{IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage, Scope};
    /// use tower::ServiceExt;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// // Set by the gateway, and by nobody else.
    /// let policy = KeyPolicy::required().scope(Scope::header("x-partner"));
    /// let app = Router::new()
    ///     .route("/webhooks", post((async || "taken").idempotency_key(policy)))
    ///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
    ///
    /// let from = |partner: Option<&str>| {
    ///     let mut request = Request::post("/webhooks").header("idempotency-key", "event-7");
    ///     if let Some(partner) = partner {
    ///         request = request.header("x-partner", partner);
    ///     }
    ///     request.body(Body::empty())
    /// };
    /// let status = async |request: Request<Body>| app.clone().oneshot(request).await.map(|answer| answer.status());
    /// assert_eq!(status(from(Some("one"))?).await?, StatusCode::OK);
    /// assert_eq!(status(from(Some("two"))?).await?, StatusCode::OK); // the same key, but another's
    /// assert_eq!(status(from(Some("one"))?).await?, StatusCode::CONFLICT); // the retry
    /// assert_eq!(status(from(None)?).await?, StatusCode::FORBIDDEN);
    /// # Ok(())
    /// # }
    /// ```
    pub fn scope(mut self, scope: Scope) -> Self {
        self.terms_mut().scope = Some(scope);
        self
    }

    /// The longest request body that is buffered, in bytes; a longer one is refused with 413 before anything is claimed.
    /// Default: [`Config::max_request_body`](crate::Config::max_request_body).
    ///
    /// For a route that takes uploads, so that the limit of the other routes can stay low. It applies only to requests with a key,
    /// and only if the encoder reads the body; with [`key_from`](Self::key_from) to all requests, because the key is in the body.
    /// axum's own `DefaultBodyLimit` applies as well.
    ///
    /// ```
    /// use axum::{Router, body::Body, http::{Request, StatusCode}, routing::post};
    /// use idempotency_axum::{IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage};
    /// use tower::ServiceExt;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = KeyPolicy::required().max_request_body(8);
    /// let app = Router::new()
    ///     .route("/notes", post((async |note: String| note).idempotency_key(policy)))
    ///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
    ///
    /// let note = |text| Request::post("/notes").header("idempotency-key", "note-7").body(Body::from(text));
    /// let short = app.clone().oneshot(note("12345678")?).await?;
    /// let long = app.oneshot(note("123456789")?).await?;
    /// assert_eq!(short.status(), StatusCode::OK);
    /// assert_eq!(long.status(), StatusCode::PAYLOAD_TOO_LARGE);
    /// # Ok(())
    /// # }
    /// ```
    pub fn max_request_body(mut self, bytes: usize) -> Self {
        self.terms_mut().max_request_body = Some(bytes);
        self
    }

    /// The request header that has the key, instead of [`Config::header`](crate::Config::header), which is ignored then. A
    /// request without this one is refused with 400, which names it.
    ///
    /// For webhooks, whose senders name their deliveries themselves:
    ///
    /// ```
    /// use axum::{Router, body::Body, http::{HeaderName, Request, StatusCode}, routing::post};
    /// use idempotency_axum::{IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage};
    /// use tower::ServiceExt;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let policy = KeyPolicy::required().header(HeaderName::from_static("x-github-delivery"));
    /// let app = Router::new()
    ///     .route("/webhooks", post((async || "taken").idempotency_key(policy)))
    ///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
    ///
    /// let delivery = || Request::post("/webhooks").header("x-github-delivery", "72d3162e").body(Body::empty());
    /// let first = app.clone().oneshot(delivery()?).await?;
    /// let again = app.oneshot(delivery()?).await?;
    /// assert_eq!(first.status(), StatusCode::OK);
    /// assert_eq!(again.headers()["idempotency-replayed"], "true");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// `HeaderName::from_static` takes lower case only. This and [`key_from`](Self::key_from) replace each other.
    pub fn header(mut self, header: HeaderName) -> Self {
        self.terms_mut().key = KeySource::Header(header);
        self
    }

    /// The key is what `find` takes from the head and the body of a request, instead of the value of a header.
    ///
    /// The body is buffered before the key is known, also with an encoder that does not read it; see
    /// [`max_request_body`](Self::max_request_body). `None` is a missing key, so a request that `find` can't read is one
    /// without a key. What is found counts as if it had been sent in the header: it must be a valid [`Key`](crate::Key) of
    /// the configuration's [`KeyFormat`](crate::KeyFormat), or the answer is 400.
    ///
    /// `find` runs for every request that may be protected, before authentication by the handler: it gets what the client
    /// sent.
    ///
    /// ```
    /// use axum::{Router, body::Body, http::{Request, StatusCode}, routing::post};
    /// use idempotency_axum::{IdempotencyHandler, IdempotencyLayer, KeyPolicy, MemoryStorage};
    /// use tower::ServiceExt;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// // The sender puts the event's id into the body.
    /// let policy = KeyPolicy::required().key_from(|_parts, body| {
    ///     let event: serde_json::Value = serde_json::from_slice(body).ok()?;
    ///     Some(event.get("id")?.as_str()?.to_owned())
    /// });
    /// let app = Router::new()
    ///     .route("/events", post((async || "taken").idempotency_key(policy)))
    ///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
    ///
    /// let event = |body| Request::post("/events").body(Body::from(body));
    /// let first = app.clone().oneshot(event(r#"{"id":"evt_7"}"#)?).await?;
    /// let again = app.clone().oneshot(event(r#"{"id":"evt_7"}"#)?).await?;
    /// let nameless = app.oneshot(event("{}")?).await?;
    /// assert_eq!(first.status(), StatusCode::OK);
    /// assert_eq!(again.headers()["idempotency-replayed"], "true");
    /// assert_eq!(nameless.status(), StatusCode::BAD_REQUEST);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Two policies with `key_from` are the same only if one is a clone of the other.
    pub fn key_from(
        mut self,
        find: impl Fn(&Parts, &[u8]) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        self.terms_mut().key = KeySource::Fn(KeyFn(Arc::new(find)));
        self
    }

    /// The handler takes an [`IdempotentTransaction`](crate::IdempotentTransaction): what it writes there is committed together with the
    /// record. An attribute finds that by itself. Default: no transaction.
    ///
    /// The cache of this policy must be in that database; [`check`](crate::IdempotencyLayer::check) returns an error if it is not. Not
    /// together with [`manual`](Self::manual).
    ///
    #[cfg_attr(feature = "sqlite", doc = "```")]
    #[cfg_attr(not(feature = "sqlite"), doc = "```ignore")]
    /// use axum::{Router, routing::post};
    /// use idempotency_axum::{IdempotencyHandler, IdempotentTransaction, KeyPolicy, sqlx::Sqlite};
    ///
    /// let policy = KeyPolicy::required().transaction::<Sqlite>();
    /// let create = async |_tx: IdempotentTransaction<Sqlite>| "created";
    /// let app: Router = Router::new().route("/orders", post(create.idempotency_key(policy)));
    /// # let _ = app;
    /// ```
    pub fn transaction<DB: TransactionDatabase>(mut self) -> Self {
        self.terms_mut().transaction = Some(DB::NAME);
        self
    }

    /// Whether this policy lets a request through that `other` would protect or refuse.
    pub(crate) fn is_more_lenient_than(&self, other: &Self) -> bool {
        self.requirement < other.requirement
    }

    fn terms_mut(&mut self) -> &mut Terms {
        Arc::make_mut(&mut self.terms)
    }

    fn new(requirement: Requirement) -> Self {
        Self {
            requirement,
            terms: Arc::default(),
        }
    }
}

/// What an extractor needs from the policy of its handler.
///
/// The attributes collect the needs of all parameters by their types, so an alias or an `Option` is found too.
///
/// ```
/// use idempotency_axum::{ExtractorNeeds, Needs};
///
/// struct MyConflict(idempotency_axum::ManualIdempotency);
///
/// impl ExtractorNeeds for MyConflict {
///     const NEEDS: Needs = Needs::MANUAL;
/// }
/// ```
pub trait ExtractorNeeds {
    /// What this extractor needs.
    const NEEDS: Needs;
}

impl<T: ExtractorNeeds> ExtractorNeeds for Option<T> {
    const NEEDS: Needs = T::NEEDS.without_key();
}

impl<T: ExtractorNeeds, E> ExtractorNeeds for Result<T, E> {
    const NEEDS: Needs = T::NEEDS.without_key();
}

/// What extractors can need; see [`ExtractorNeeds`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Needs {
    manual: bool,
    key: bool,
    transaction: Option<&'static str>,
}

impl Needs {
    /// Nothing.
    pub const NONE: Self = Self {
        manual: false,
        key: false,
        transaction: None,
    };

    /// The handler runs on conflicts too, as with [`KeyPolicy::manual`].
    pub const MANUAL: Self = Self {
        manual: true,
        ..Self::NONE
    };

    /// Each request has a key: the extractor rejects one without. On a handler that is optional or exempt an attribute makes
    /// this a compile error. An `Option` or a `Result` of the extractor does not need it.
    pub const KEY: Self = Self {
        key: true,
        ..Self::NONE
    };

    /// Each request has a key, and a transaction of this [database](crate::TransactionDatabase::NAME), as with
    /// [`KeyPolicy::transaction`].
    pub const fn transaction(database: &'static str) -> Self {
        Self {
            transaction: Some(database),
            ..Self::KEY
        }
    }

    /// What either needs.
    pub const fn and(self, other: Self) -> Self {
        Self {
            manual: self.manual || other.manual,
            key: self.key || other.key,
            transaction: match self.transaction {
                Some(database) => Some(database),
                None => other.transaction,
            },
        }
    }

    /// Whether a handler may have all of it: one that answers conflicts itself has no transaction of its record.
    #[doc(hidden)]
    #[must_use]
    pub const fn can_be_met(self) -> bool {
        !self.manual || self.transaction.is_none()
    }

    /// What is left for an extractor that may fail.
    const fn without_key(self) -> Self {
        Self { key: false, ..self }
    }

    /// Whether the handler runs on conflicts too.
    #[must_use]
    pub const fn is_manual(self) -> bool {
        self.manual
    }

    /// Whether each request must have a key.
    #[must_use]
    pub const fn is_key(self) -> bool {
        self.key
    }

    pub(crate) fn apply(self, policy: KeyPolicy) -> KeyPolicy {
        let mut policy = if self.manual { policy.manual() } else { policy };
        if let Some(database) = self.transaction {
            policy.terms_mut().transaction = Some(database);
        }
        policy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_equal_to_its_clones() {
        let of = |policy: KeyPolicy| (policy.clone(), policy);
        let (policy, clone) = of(KeyPolicy::required().key_from(|_, _| None));
        assert_eq!(policy, clone);
        assert_ne!(policy, KeyPolicy::required().key_from(|_, _| None));
        assert_ne!(policy, KeyPolicy::required());

        let named = |name| KeyPolicy::required().header(HeaderName::from_static(name));
        assert_eq!(named("x-delivery"), named("x-delivery"));
        assert_ne!(named("x-delivery"), named("x-event"));
        assert_ne!(named("idempotency-key"), KeyPolicy::required());
    }

    #[test]
    fn an_extractor_that_may_fail_needs_no_key() {
        struct Both;
        impl ExtractorNeeds for Both {
            const NEEDS: Needs = Needs::KEY.and(Needs::MANUAL);
        }
        assert_eq!(<Option<Both>>::NEEDS, Needs::MANUAL);
        assert_eq!(<Result<Both, ()>>::NEEDS, Needs::MANUAL);
        assert!(Both::NEEDS.is_key() && Both::NEEDS.is_manual());
    }
}
