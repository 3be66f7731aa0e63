//! The extractors: the key, on a conflict the stored answer, and the transaction of the record.

use std::{convert::Infallible, fmt};

use axum::{
    extract::{FromRequestParts, OptionalFromRequestParts},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, request::Parts};
use idempotency_core::{EncodedKey, Key, NotLent, Outcome, Record, StoredResponse};

use crate::{
    handler::{Polled, route_path},
    handshake::{Conflict, Protection},
    policy::{ExtractorNeeds, Needs},
};

pub use self::transaction::IdempotentTransaction;

mod transaction;

/// The key of the request that is being handled.
///
/// `Option<IdempotencyKey>` is `None` where the request is not protected: no key on an optional handler, a safe method, an
/// exempt handler.
///
/// ```
/// use axum::{Router, routing::post};
/// use idempotency_axum::{IdempotencyKey, IdempotencyLayer, MemoryStorage, idempotency_key};
///
/// #[idempotency_key]
/// async fn pay(key: IdempotencyKey) -> String {
///     // A provider that takes idempotency keys gets one that is stable for this operation.
///     let provider_key = key.derive("psp-charge");
///     format!("charged under {provider_key}")
/// }
///
/// let app: Router = Router::new()
///     .route("/payments", post(pay))
///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
/// # let _ = app;
/// ```
#[derive(Clone)]
pub struct IdempotencyKey {
    key: Key,
    encoded: EncodedKey,
}

impl IdempotencyKey {
    /// The extractor as the layer makes it, for a unit test that calls a handler by `.invoke(…)`.
    ///
    /// ```
    /// use axum::http::HeaderValue;
    /// use idempotency_axum::{EncodedKey, IdempotencyKey, Key, idempotency_key};
    ///
    /// #[idempotency_key]
    /// async fn pay(key: IdempotencyKey) -> String {
    ///     format!("charged under {}", key.as_str())
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), idempotency_axum::InvalidKey> {
    /// let key = Key::parse(&HeaderValue::from_static("payment-1"))?;
    /// let key = IdempotencyKey::new(key, EncodedKey::from_bytes([1; 32]));
    /// assert_eq!(pay.invoke(key).await, "charged under payment-1");
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn new(key: Key, encoded: EncodedKey) -> Self {
        Self { key, encoded }
    }

    /// The key as the client sent it, without quotes. It is the client's secret for as long as the record lives: don't log it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.key.as_str()
    }

    /// The operation's name in the storage, safe to log.
    #[must_use]
    pub fn encoded(&self) -> EncodedKey {
        self.encoded
    }

    /// A stable key for a call to another service, a different one for each `label`.
    ///
    /// Pass it to a payment provider as *its* idempotency key. When the provider has charged, and then this process dies before
    /// the answer is recorded, the retry runs the handler again; the provider gets the same key again, and charges once.
    ///
    /// It is made from the encoded key: the same in every attempt, process and deployment, another one for each caller. Under
    /// [`BasicKeyEncoder`](crate::BasicKeyEncoder) the body is a part of it, so a body that differs between attempts, say by a
    /// timestamp, derives another key and charges again. Leave such a field out with
    /// [`FingerprintKeyEncoder::fields`](crate::FingerprintKeyEncoder::fields).
    ///
    /// ```
    /// use axum::{Router, body::Body, http::{Request, StatusCode}, routing::post};
    /// use http_body_util::BodyExt;
    /// use idempotency_axum::{IdempotencyKey, IdempotencyLayer, MemoryStorage, idempotency_key};
    /// use tower::ServiceExt;
    ///
    /// /// The provider has charged, and then something of ours fails.
    /// #[idempotency_key]
    /// async fn pay(key: IdempotencyKey) -> (StatusCode, String) {
    ///     (StatusCode::INTERNAL_SERVER_ERROR, key.derive("psp-charge"))
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let app = Router::new()
    ///     .route("/payments", post(pay))
    ///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
    /// let mut provider_keys = Vec::new();
    /// for _ in 0..2 {
    ///     let request = Request::post("/payments").header("idempotency-key", "payment-1");
    ///     let answer = app.clone().oneshot(request.body(Body::from("450"))?).await?;
    ///     assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR); // not stored: the retry ran
    ///     provider_keys.push(answer.into_body().collect().await?.to_bytes());
    /// }
    /// assert_eq!(provider_keys[0], provider_keys[1]);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn derive(&self, label: &str) -> String {
        self.encoded.derive(label)
    }
}

impl fmt::Debug for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdempotencyKey")
            .field("encoded", &self.encoded)
            .finish_non_exhaustive()
    }
}

impl<S: Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = NotProtected;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, NotProtected> {
        let protection = parts.extensions.get::<Protection>();
        protection
            .map(Self::from)
            .ok_or_else(|| NotProtected::new("IdempotencyKey", parts))
    }
}

impl<S: Sync> OptionalFromRequestParts<S> for IdempotencyKey {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
        Ok(parts.extensions.get::<Protection>().map(Self::from))
    }
}

impl From<&Protection> for IdempotencyKey {
    fn from(protection: &Protection) -> Self {
        Self::new(protection.key().clone(), protection.encoded())
    }
}

impl ExtractorNeeds for IdempotencyKey {
    const NEEDS: Needs = Needs::KEY;
}

/// The recorded outcome, for a handler that answers conflicts itself.
///
/// A handler with an attribute and this parameter, `Option` or alias or not, is *manual*: it runs on a retry too, and its answer
/// is what the client gets, as it is, without the conflict status or the replay header.
///
/// * [`exists`](Self::exists) says that the operation ran before. **Doing it once is then the handler's job.**
/// * [`response`](Self::response) is the answer of the *last* run. A tombstone has none.
/// * An answer whose status is stored, in full within the limit, **replaces** the record and restarts its TTL. Any other, an
///   error or a panic leaves it as it is.
/// * The runs on conflicts of one key come one after another, on all processes that share the storage. Each waits for the one
///   before it, [`LockPolicy::max_hold`](crate::LockPolicy::max_hold) at most, and sees what that left. (Not with
///   [`LockPolicy::disabled`](crate::LockPolicy::disabled).)
/// * A client that leaves cancels nothing, and [`drain`](crate::IdempotencyLayer::drain) waits for these runs too.
/// * On an optional handler a request without a key runs as a first one does, and nothing is recorded.
///   `Option<ManualIdempotency>` is `None` then.
///
/// ```
/// use axum::{Router, body::Body, http::{Request, StatusCode}, response::{IntoResponse, Response}, routing::post};
/// use idempotency_axum::{IdempotencyLayer, ManualIdempotency, MemoryStorage, idempotency_key};
/// use tower::ServiceExt;
///
/// #[idempotency_key]
/// async fn create_order(manual: ManualIdempotency) -> Response {
///     match (manual.exists(), manual.response()) {
///         (false, _) => (StatusCode::CREATED, "order 1").into_response(),
///         (true, Some(last)) => last.with_status(StatusCode::OK).into_response(),
///         // It ran, but its answer was not kept: look it up, don't do it again.
///         (true, None) => StatusCode::CONFLICT.into_response(),
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let app: Router = Router::new()
///     .route("/orders", post(create_order))
///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
/// for expected in [StatusCode::CREATED, StatusCode::OK, StatusCode::OK] {
///     let request = Request::post("/orders").header("idempotency-key", "abc").body(Body::empty());
///     let response = app.clone().oneshot(request.unwrap()).await.unwrap();
///     assert_eq!(response.status(), expected);
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ManualIdempotency {
    conflict: Conflict,
}

impl ManualIdempotency {
    /// The extractor as the layer makes it, for a unit test that calls a handler by `.invoke(…)`. `outcome` is what the last run
    /// left, or `None` if the operation did not run before.
    ///
    /// ```
    /// use axum::http::{HeaderMap, StatusCode};
    /// use idempotency_axum::{ManualIdempotency, Outcome, StoredResponse, idempotency_key};
    ///
    /// #[idempotency_key]
    /// async fn create_order(manual: ManualIdempotency) -> StatusCode {
    ///     manual.response().map_or(StatusCode::CREATED, |last| last.status())
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() {
    /// let last = StoredResponse::new(StatusCode::ACCEPTED, &HeaderMap::new(), "order 1");
    /// let retry = ManualIdempotency::new(Some(Outcome::Response(last)));
    /// assert_eq!(create_order.invoke(retry).await, StatusCode::ACCEPTED);
    /// assert_eq!(create_order.invoke(ManualIdempotency::new(None)).await, StatusCode::CREATED);
    /// # }
    /// ```
    #[must_use]
    pub fn new(outcome: Option<Outcome>) -> Self {
        let record = outcome.map(|outcome| Record {
            fingerprint: None,
            outcome,
        });
        Self {
            conflict: Conflict(record),
        }
    }

    /// Whether the operation ran before.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.conflict.0.is_some()
    }

    /// The stored answer. `None` if the operation did not run before, or ran without leaving one (a tombstone).
    #[must_use]
    pub fn response(&self) -> Option<ReplayedResponse> {
        match &self.conflict.0.as_ref()?.outcome {
            Outcome::Response(stored) => Some(ReplayedResponse {
                status: stored.status(),
                stored: stored.clone(),
            }),
            Outcome::Tombstone(_) => None,
        }
    }
}

impl<S: Sync> FromRequestParts<S> for ManualIdempotency {
    type Rejection = NotProtected;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, NotProtected> {
        let protection = parts.extensions.get::<Protection>();
        if let Some(conflict) = protection.and_then(Protection::conflict) {
            return Ok(Self::from(conflict));
        }
        // Nothing is recorded for a request without a key.
        let is_optional = Polled::now().is_some_and(|handler| handler.is_optional);
        if protection.is_none() && is_optional {
            return Ok(Self::new(None));
        }
        Err(NotProtected::new("ManualIdempotency", parts))
    }
}

impl<S: Sync> OptionalFromRequestParts<S> for ManualIdempotency {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, Infallible> {
        let protection = parts.extensions.get::<Protection>();
        Ok(protection.and_then(Protection::conflict).map(Self::from))
    }
}

impl From<&Conflict> for ManualIdempotency {
    fn from(conflict: &Conflict) -> Self {
        Self {
            conflict: conflict.clone(),
        }
    }
}

impl ExtractorNeeds for ManualIdempotency {
    const NEEDS: Needs = Needs::MANUAL;
}

/// A stored answer that can be looked at and sent; see [`ManualIdempotency::response`].
#[derive(Clone, Debug)]
pub struct ReplayedResponse {
    status: StatusCode,
    stored: StoredResponse,
}

impl ReplayedResponse {
    /// Its status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// Its headers, without those that belong to one connection and those that are not recorded.
    #[must_use]
    pub fn headers(&self) -> HeaderMap {
        self.stored.headers()
    }

    /// Its body.
    #[must_use]
    pub fn body(&self) -> &Bytes {
        self.stored.body()
    }

    /// The same answer with another status.
    #[must_use]
    pub fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
    }
}

impl IntoResponse for ReplayedResponse {
    fn into_response(self) -> Response {
        let mut response = Response::new(self.stored.body().clone().into());
        *response.status_mut() = self.status;
        *response.headers_mut() = self.stored.headers();
        response
    }
}

/// An extractor was used where the request is not protected, or not as the extractor needs it. 500: the client can't mend it.
///
/// The answer reveals no internals, and is never recorded. The log names the handler, if it has a policy, the route's path, and the
/// cure.
#[derive(Clone, Debug)]
pub struct NotProtected {
    extractor: &'static str,
    handler: Option<&'static str>,
    path: String,
    /// The request is protected, but not as the extractor needs it.
    protection: Option<Protection>,
    /// There is a transaction, and not for this extractor.
    not_lent: Option<NotLent>,
}

impl NotProtected {
    fn new(extractor: &'static str, parts: &Parts) -> Self {
        Self {
            extractor,
            handler: Polled::now().map(|handler| handler.name),
            path: route_path(&parts.extensions, &parts.uri).to_owned(),
            protection: parts.extensions.get().cloned(),
            not_lent: None,
        }
    }

    /// The status of the answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        StatusCode::INTERNAL_SERVER_ERROR
    }

    fn cure(&self) -> String {
        let extractor = self.extractor;
        match (extractor, &self.protection) {
            ("IdempotentTransaction", _) if self.not_lent == Some(NotLent::Taken) => {
                "take it once, and pass it on as a parameter".to_owned()
            }
            ("IdempotentTransaction", Some(_)) => {
                "the layer must know that the handler takes a transaction: give it the attribute, or say so in its policy, as in \
                 `.idempotency_key(KeyPolicy::required().transaction::<Postgres>())`"
                    .to_owned()
            }
            ("ManualIdempotency", Some(_)) => {
                "the layer can't see what a handler without a policy takes: give it one that is manual, as in \
                 `.idempotency_key(KeyPolicy::required().manual())`"
                    .to_owned()
            }
            ("ManualIdempotency", None) => {
                "put an `IdempotencyLayer` around this route and give the handler a manual policy, as in \
                 `.idempotency_key(KeyPolicy::required().manual())`"
                    .to_owned()
            }
            _ => format!(
                "put an `IdempotencyLayer` around this route and require a key, or take `Option<{extractor}>`"
            ),
        }
    }
}

impl fmt::Display for NotProtected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extractor = self.extractor;
        match self.protection {
            Some(_) if extractor == "IdempotentTransaction" => match self.not_lent {
                Some(error) => write!(f, "`{extractor}`: {error}"),
                None => write!(f, "`{extractor}` found a policy without a transaction"),
            },
            Some(_) => write!(f, "`{extractor}` found a policy that is not manual"),
            None => write!(f, "`{extractor}` found no protected request"),
        }
    }
}

impl std::error::Error for NotProtected {}

impl IntoResponse for NotProtected {
    fn into_response(self) -> Response {
        if let Some(protection) = &self.protection {
            protection.refuse();
        }
        tracing::error!(
            target: "idempotency",
            handler = self.handler,
            path = self.path,
            cure = self.cure(),
            "{self}; the request was refused"
        );
        self.status().into_response()
    }
}
