//! What a handler wants of the middleware.

use std::{borrow::Cow, time::Duration};

use http::Method;
use idempotency_core::{Scope, StoreOn};

/// What a handler wants of the middleware: whether a key is required, and what differs from the layer's
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
/// Around a handler with an attribute a policy counts as a whole: nothing of the attribute's is left, so it has to be
/// [`manual`](Self::manual) again if that was.
#[derive(Clone, Debug, PartialEq)]
#[must_use]
pub struct KeyPolicy {
    pub(crate) requirement: Requirement,
    pub(crate) terms: Terms,
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
    pub(crate) cache_name: Option<Cow<'static, str>>,
    pub(crate) ttl: Option<Duration>,
    pub(crate) manual: bool,
    pub(crate) store_on: Option<StoreOn>,
    pub(crate) scope: Option<Scope>,
    pub(crate) max_request_body: Option<usize>,
}

impl KeyPolicy {
    /// A key is required: a request without one is refused with 400.
    pub fn required() -> Self {
        Self::new(Requirement::Required)
    }

    /// Keys are ignored: every request runs.
    pub fn exempt() -> Self {
        Self::new(Requirement::Exempt)
    }

    /// A request without a key runs unprotected; one with a key is protected.
    pub fn optional(mut self) -> Self {
        self.requirement = Requirement::Optional;
        self
    }

    /// Keeps claims and records in the cache of this name, see
    /// [`IdempotencyLayer::cache`](crate::IdempotencyLayer::cache). Default: the storage that the layer was made with.
    pub fn cache_name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.terms.cache_name = Some(name.into());
        self
    }

    /// How long records are kept. Zero keeps none: a retry after the answer runs again. Default:
    /// [`Config::ttl`](crate::Config::ttl).
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.terms.ttl = Some(ttl);
        self
    }

    /// On a conflict the handler runs and answers itself, see [`ManualIdempotency`](crate::ManualIdempotency). A handler
    /// with an attribute and a `ManualIdempotency` parameter has this by itself.
    pub fn manual(mut self) -> Self {
        self.terms.manual = true;
        self
    }

    /// Which answers are recorded; after any other the key is free, and a retry runs. Default:
    /// [`Config::store_on`](crate::Config::store_on).
    ///
    /// For the handler whose refusal is as final as its success, and for the one that answers a form with a redirect:
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
        self.terms.store_on = Some(store_on);
        self
    }

    /// Whose key it is. Default: [`Config::scope`](crate::Config::scope).
    ///
    /// For a route whose callers are known by something else than those of the others, say a webhook of a partner among the
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
        self.terms.scope = Some(scope);
        self
    }

    /// The longest request body that is buffered, in bytes; a longer one is refused with 413 before anything is claimed.
    /// Default: [`Config::max_request_body`](crate::Config::max_request_body).
    ///
    /// For the one route that takes uploads, so that the limit of all the others can stay low. It concerns only requests with a
    /// key, and only encoders that read the body. axum's own `DefaultBodyLimit` is asked besides.
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
        self.terms.max_request_body = Some(bytes);
        self
    }

    /// Whether this policy lets a request through that `other` would protect or refuse.
    pub(crate) fn is_more_lenient_than(&self, other: &Self) -> bool {
        self.requirement < other.requirement
    }

    fn new(requirement: Requirement) -> Self {
        Self {
            requirement,
            terms: Terms::default(),
        }
    }
}

/// What an extractor asks of the policy of the handler that takes it.
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
    const NEEDS: Needs = T::NEEDS;
}

impl<T: ExtractorNeeds, E> ExtractorNeeds for Result<T, E> {
    const NEEDS: Needs = T::NEEDS;
}

/// What extractors can need; see [`ExtractorNeeds`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Needs {
    manual: bool,
}

impl Needs {
    /// Nothing.
    pub const NONE: Self = Self { manual: false };

    /// The handler runs on conflicts too, as with [`KeyPolicy::manual`].
    pub const MANUAL: Self = Self { manual: true };

    /// What either needs.
    pub const fn and(self, other: Self) -> Self {
        Self {
            manual: self.manual || other.manual,
        }
    }

    /// Whether the handler runs on conflicts too.
    #[must_use]
    pub const fn is_manual(self) -> bool {
        self.manual
    }

    pub(crate) fn apply(self, policy: KeyPolicy) -> KeyPolicy {
        if self.manual { policy.manual() } else { policy }
    }
}
