//! The layer: mode, storages and configuration.

use std::{collections::BTreeMap, fmt, sync::Arc};

use axum::{Router, response::Response};
use http::request::Parts;
use idempotency_core::{
    AnyStorage, Config, EncodedKey, Engine, InvalidKey, Mode, Storage, UnknownCaller,
};
use tower_layer::Layer;

use crate::{
    discovery::{self, Announced},
    misuse::{Misuse, MisuseKind},
    plan::{Choices, Plan, Shared},
    policy::{KeyPolicy, Requirement},
    problem::Problem,
    request::encode,
    service::Idempotency,
};

/// Protects the routes that it wraps with idempotency keys.
///
/// Put it on with [`Router::layer`] or [`Router::route_layer`] (with which unmatched paths stay 404). Authentication,
/// compression, CORS and timeouts belong outside it, see the [crate docs](crate#order-of-layers).
///
/// Clones share everything. What a setter returns is a layer of its own, with engines of its own: their storage keeps an
/// operation from running twice, but [`drain`](Self::drain) and [`engine`](Self::engine) know of their own only. So set a layer
/// up first, and clone it then.
///
/// ```
/// use axum::{Router, routing::post};
/// use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage, idempotency_exempt, idempotency_key};
///
/// #[idempotency_key(cache_name = "orders")]
/// async fn create_order() -> &'static str {
///     "order 1"
/// }
///
/// #[idempotency_exempt]
/// async fn search() -> &'static str {
///     "nothing found"
/// }
///
/// # fn main() -> Result<(), idempotency_axum::Misuse> {
/// let layer = IdempotencyLayer::enforce(MemoryStorage::new())
///     .config(Config::ietf())
///     .cache("orders", MemoryStorage::new());
/// let app = Router::new()
///     .route("/orders", post(create_order))
///     .route("/search", post(search))
///     .layer(layer.clone());
/// let app = layer.check(app)?;
/// # let _ = app;
/// # Ok(())
/// # }
/// ```
#[must_use = "a layer does nothing until it wraps a service"]
pub struct IdempotencyLayer {
    shared: Arc<Shared>,
}

impl IdempotencyLayer {
    /// A request needs a key on the methods of [`Config::methods`], unless its handler says otherwise: all unsafe ones by default, POST and
    /// PATCH with [`Config::ietf`], POST with [`Config::stripe`]. On other unsafe methods a key that is
    /// present is honoured.
    ///
    /// `storage` is the default cache.
    pub fn enforce(storage: impl Storage) -> Self {
        Self::new(Mode::Enforce, storage)
    }

    /// Keys are used only by handlers that opt in.
    ///
    /// `storage` is the default cache.
    pub fn exempt(storage: impl Storage) -> Self {
        Self::new(Mode::Exempt, storage)
    }

    /// A request with a key is protected, one without runs unprotected, unless the handler says otherwise.
    ///
    /// `storage` is the default cache.
    pub fn optional(storage: impl Storage) -> Self {
        Self::new(Mode::Optional, storage)
    }

    /// Replaces the configuration. Default: [`Config::default`].
    pub fn config(self, config: Config) -> Self {
        self.with(|choices| choices.config = config)
    }

    /// Changes the configuration, for example the one that [settings](Self::from_settings) loaded.
    ///
    /// ```
    /// use idempotency_axum::{IdempotencyLayer, Scope, Settings};
    ///
    /// #[derive(Clone)]
    /// struct UserId(u64);
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let settings: Settings = serde_json::from_str(r#"{ "preset": "ietf" }"#)?;
    /// let layer = IdempotencyLayer::from_settings(settings).await?.map_config(|config| {
    ///     config.scope(Scope::from_fn(|parts| {
    ///         Some(parts.extensions.get::<UserId>()?.0.to_be_bytes().to_vec())
    ///     }))
    /// });
    /// # let _ = layer;
    /// # Ok(())
    /// # }
    /// ```
    pub fn map_config(self, change: impl FnOnce(Config) -> Config) -> Self {
        self.with(|choices| choices.config = change(choices.config.clone()))
    }

    /// Adds a cache of this name, for handlers with `cache_name = "…"`.
    pub fn cache(self, name: impl Into<String>, storage: impl Storage) -> Self {
        self.with(|choices| {
            choices.caches.insert(name.into(), AnyStorage::new(storage));
        })
    }

    /// Applies `policy` to everything that this layer wraps, and asks no handler. For services that a layer can't look into.
    pub fn policy(self, policy: KeyPolicy) -> Self {
        self.with(|choices| choices.fixed = Some(policy))
    }

    /// Makes refusals look as the rest of your API. Default: [`Problem`]'s own `application/problem+json`.
    ///
    /// ```
    /// use axum::{Json, response::IntoResponse};
    /// use idempotency_axum::{IdempotencyLayer, MemoryStorage};
    /// use serde_json::json;
    ///
    /// let layer = IdempotencyLayer::enforce(MemoryStorage::new()).problem_response(|problem| {
    ///     (problem.status(), Json(json!({ "error": problem.refusal().as_str() }))).into_response()
    /// });
    /// # let _ = layer;
    /// ```
    ///
    /// `Retry-After` and `Link` are added where the answer has none.
    pub fn problem_response(
        self,
        respond: impl Fn(Problem) -> Response + Send + Sync + 'static,
    ) -> Self {
        self.with(|choices| choices.problem_response = Some(Arc::new(respond)))
    }

    /// Says before the server listens whether every route's policy can be kept: gives `router` back, or one of the mistakes.
    ///
    /// Call it with each layer, once the router has its state: without it the compiler says that `FromRef<()>` is not satisfied. The layer must be on the router already, by `Router::layer` or
    /// `route_layer`; one that `Handler::layer` put on is made for each request, so it can't be seen. A layer that a setter made of
    /// another one is a layer of its own: where this one is not on the router, a warning in the log says so. The router that comes back
    /// has its layers made, so that serving it does not make them again for each connection.
    ///
    /// # Errors
    ///
    /// If a handler names a cache that this layer does not have, or one that uses keys stands on a route without a layer. What a clone
    /// can't show is not found: handlers behind `nest_service` or inside another service; they answer 500 if no layer is nearer.
    pub fn check(&self, router: Router) -> Result<Router, Misuse> {
        // Makes the services, and so runs `layer()` for each of them.
        let router = router.with_state(());
        if let Some(misuse) = self.shared.misuses().first() {
            return Err(misuse.clone());
        }
        // The routes are cloned only while they are shared, so a second handle makes `with_state` clone them, and with them the handlers.
        let outside = discovery::outside_of_layers(|| router.clone().with_state::<()>(()));
        let unprotected = outside
            .into_iter()
            .find(|announced| announced.policy.requirement != Requirement::Exempt);
        if let Some(Announced { policy, handler }) = unprotected {
            return Err(Misuse::new(MisuseKind::NoLayer {
                handler: handler.to_owned(),
                policy: Box::new(policy),
            }));
        }
        if !self.shared.has_layered() {
            tracing::warn!(
                target: "idempotency",
                "`check` saw no route with this idempotency layer: put it on the router before, with `.layer(layer.clone())`; it \
                 can't see one that was put on by `Handler::layer`, which makes it anew for each request"
            );
        }
        Ok(router)
    }

    /// The engine of the default cache.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// The engine of the cache of this name; `None` if this layer has no such cache.
    #[must_use]
    pub fn engine_of(&self, cache_name: &str) -> Option<&Engine> {
        self.shared.engines.get(cache_name)
    }

    /// Where the key of a request lies, for an operator who looks for a client's record, or removes it. For a handler whose policy has no
    /// scope and no header or body of its own from which it takes the key; [`encoded_key_for`](Self::encoded_key_for) is for the others.
    ///
    /// `parts` are what this layer sees: with what the layers outside put into the extensions, if the scope looks there, and with the
    /// original URI. `body` is the whole body; it makes no difference where the encoder keeps it out of the storage key, as that of
    /// [`Config::ietf`] does.
    ///
    /// ```
    /// use axum::http::Request;
    /// use idempotency_axum::{IdempotencyLayer, MemoryStorage};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    /// let (parts, body) = Request::post("/orders")
    ///     .header("idempotency-key", "abc")
    ///     .body("{}")?
    ///     .into_parts();
    /// let key = layer.encoded_key(&parts, body.as_bytes())?;
    /// assert!(!layer.engine().remove(&key).await?, "nothing was recorded");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`EncodedKeyError`], if the request has no key or no caller.
    pub fn encoded_key(&self, parts: &Parts, body: &[u8]) -> Result<EncodedKey, EncodedKeyError> {
        self.encoded_key_for(&KeyPolicy::required(), parts, body)
    }

    /// The same for a handler with a scope, a header or a key in the body of its own. A handler with an attribute gives its policy:
    /// `create_order.policy()`.
    ///
    /// # Errors
    ///
    /// As [`encoded_key`](Self::encoded_key).
    pub fn encoded_key_for(
        &self,
        policy: &KeyPolicy,
        parts: &Parts,
        body: &[u8],
    ) -> Result<EncodedKey, EncodedKeyError> {
        let config = self.shared.config();
        let terms = &policy.terms;
        let key = terms
            .key
            .find(parts, body, config)
            .map_err(EncodedKeyError::InvalidKey)?
            .ok_or(EncodedKeyError::MissingKey)?;
        let scope = terms.scope.as_ref().unwrap_or(&config.scope);
        let owner = scope.of(parts).map_err(EncodedKeyError::UnknownCaller)?;
        Ok(encode(config, &key, parts, body, owner.as_deref()).key)
    }

    /// Waits until no operation of any cache runs; see [`Engine::drain`].
    pub async fn drain(&self) {
        self.shared.engine.drain().await;
        for engine in self.shared.engines.values() {
            engine.drain().await;
        }
    }

    /// Lets handlers call the default cache by this name too.
    #[cfg(feature = "settings")]
    pub(crate) fn default_cache(self, name: String) -> Self {
        self.with(|choices| choices.default_cache = Some(name))
    }

    fn new(mode: Mode, storage: impl Storage) -> Self {
        Self::build(Choices {
            mode,
            storage: AnyStorage::new(storage),
            default_cache: None,
            caches: BTreeMap::new(),
            config: Config::default(),
            fixed: None,
            problem_response: None,
        })
    }

    fn with(self, change: impl FnOnce(&mut Choices)) -> Self {
        let mut choices = self.shared.choices.clone();
        change(&mut choices);
        Self::build(choices)
    }

    fn build(choices: Choices) -> Self {
        Self {
            shared: Arc::new(Shared::new(choices)),
        }
    }
}

/// Why a request names no key; see [`IdempotencyLayer::encoded_key`].
#[derive(Debug)]
#[non_exhaustive]
pub enum EncodedKeyError {
    /// It has none.
    MissingKey,
    /// It has one that is not valid.
    InvalidKey(InvalidKey),
    /// The scope finds no caller in it.
    UnknownCaller(UnknownCaller),
}

impl fmt::Display for EncodedKeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MissingKey => f.write_str(
                "the request has no idempotency key where this policy looks for one; `encoded_key_for` takes the policy of a handler with \
                 a header or a key in the body of its own",
            ),
            Self::InvalidKey(error) => write!(f, "{error}"),
            Self::UnknownCaller(unknown) => write!(f, "{unknown}"),
        }
    }
}

impl std::error::Error for EncodedKeyError {}

/// Shares everything. A clone beside a handler, as `Handler::layer` makes it, tells [`IdempotencyLayer::check`] that the handler has a
/// layer.
impl Clone for IdempotencyLayer {
    fn clone(&self) -> Self {
        discovery::announce_layer();
        Self {
            shared: self.shared.clone(),
        }
    }
}

impl<S: Clone> Layer<S> for IdempotencyLayer {
    type Service = Idempotency<S>;

    fn layer(&self, inner: S) -> Self::Service {
        self.shared.set_layered();
        let (inner, plan) = match &self.shared.choices.fixed {
            Some(policy) => (inner, self.shared.plan(policy.clone(), None)),
            None => {
                let (inner, found) = discovery::probe(inner);
                (inner, self.shared.plan_for(found))
            }
        };
        if let Plan::Misused(misuse) = &plan {
            self.shared.report(misuse);
        }
        Idempotency::new(inner, self.shared.clone(), plan)
    }
}

impl fmt::Debug for IdempotencyLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let choices = &self.shared.choices;
        f.debug_struct("IdempotencyLayer")
            .field("mode", &choices.mode)
            .field("storage", &choices.storage)
            .field("caches", &choices.caches)
            .field("config", &choices.config)
            .field("policy", &choices.fixed)
            .finish_non_exhaustive()
    }
}
