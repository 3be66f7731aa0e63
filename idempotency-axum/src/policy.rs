//! What a handler wants of the middleware.

use std::{borrow::Cow, time::Duration};

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

    /// How long records are kept. Default: [`Config::ttl`](crate::Config::ttl).
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

    /// Which answers are recorded. Default: [`Config::store_on`](crate::Config::store_on).
    pub fn store_on(mut self, store_on: StoreOn) -> Self {
        self.terms.store_on = Some(store_on);
        self
    }

    /// Whose key it is. Default: [`Config::scope`](crate::Config::scope).
    pub fn scope(mut self, scope: Scope) -> Self {
        self.terms.scope = Some(scope);
        self
    }

    /// The longest request body that is buffered, in bytes. Default:
    /// [`Config::max_request_body`](crate::Config::max_request_body).
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
