//! The layer: mode, storages, configuration, and what it knows of the routes that it wraps.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Router,
    extract::MatchedPath,
    response::{IntoResponse, Response},
};
use http::Extensions;
use idempotency_core::{AnyStorage, Config, Engine, Mode, Storage};
use tower_layer::Layer;

use crate::{
    discovery::{self, Announced, Discovery},
    policy::KeyPolicy,
    problem::Problem,
    request::Acknowledgement,
    service::Idempotency,
};

/// Protects the routes that it wraps with idempotency keys.
///
/// Put it on with [`Router::layer`] or [`Router::route_layer`] (with which unmatched paths stay 404). Authentication,
/// compression, CORS and timeouts belong outside it, see the [crate docs](crate#order-of-layers). Clones share everything.
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
#[derive(Clone)]
#[must_use = "a layer does nothing until it wraps a service"]
pub struct IdempotencyLayer {
    shared: Arc<Shared>,
}

type ProblemResponse = dyn Fn(Problem) -> Response + Send + Sync;

/// What the user has set; the rest of [`Shared`] follows from it.
#[derive(Clone)]
struct Choices {
    mode: Mode,
    storage: AnyStorage,
    /// What handlers may call `storage`, unless a cache of `caches` is called so.
    default_cache: Option<String>,
    caches: BTreeMap<String, AnyStorage>,
    config: Config,
    fixed: Option<KeyPolicy>,
    problem_response: Option<Arc<ProblemResponse>>,
}

/// All state of a layer. `layer()` runs per connection, or even per request, for routers without state.
pub(crate) struct Shared {
    choices: Choices,
    engine: Engine,
    engines: BTreeMap<String, Engine>,
    default_policy: KeyPolicy,
    has_layered: AtomicBool,
    misuses: Mutex<Vec<Misuse>>,
    has_distrusted: AtomicBool,
    distrusted: Mutex<HashSet<RouteName>>,
    cookie_warnings: Mutex<HashSet<String>>,
    acknowledgements: Mutex<Vec<Acknowledgement>>,
}

/// Names a route for as long as the process lives: the handler that announced itself and the path it is matched by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RouteName {
    handler: &'static str,
    path: String,
}

/// What is done with the requests of one route.
#[derive(Debug)]
pub(crate) enum Plan {
    /// A layer nearer to the handler decides.
    Layered,
    /// The policy can't be kept.
    Misused(Misuse),
    Apply(Applied),
}

/// A policy, ready to be applied.
#[derive(Debug)]
pub(crate) struct Applied {
    pub(crate) policy: KeyPolicy,
    pub(crate) engine: Engine,
    /// The handler that announced the policy, if the layer relies on it being the one that answers.
    pub(crate) relies_on: Option<&'static str>,
    /// Set on the layer itself, so inner policies accept it.
    pub(crate) is_fixed: bool,
}

impl IdempotencyLayer {
    /// Every request with an unsafe method needs a key, unless its handler opts out.
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

    /// Replaces the configuration. Default: [`Config::default`].
    pub fn config(self, config: Config) -> Self {
        self.with(|choices| choices.config = config)
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
    /// The layer must be on the router already, by `Router::layer` or `route_layer`; one that `Handler::layer` put on is made
    /// for each request, so it can't be seen. The router that comes back has its layers made, so that serving it does not
    /// make them again for each connection.
    ///
    /// # Errors
    ///
    /// If a handler names a cache that this layer does not have.
    pub fn check(&self, router: Router) -> Result<Router, Misuse> {
        // Makes the services, and so runs `layer()` for each of them.
        let router = router.with_state(());
        if let Some(misuse) = self.shared.misuses().first() {
            return Err(misuse.clone());
        }
        if !self.shared.has_layered.load(Ordering::Relaxed) {
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

    /// The engine of the cache of this name.
    ///
    /// # Panics
    ///
    /// Panics if this layer has no such cache, and names those that it has.
    #[must_use]
    pub fn engine_of(&self, cache_name: &str) -> &Engine {
        match self.shared.engines.get(cache_name) {
            Some(engine) => engine,
            None => panic!(
                "this layer has no cache {cache_name:?}; it has: {}",
                self.shared.cache_names().join(", ")
            ),
        }
    }

    /// Waits until no operation of any cache runs; see [`Engine::drain`].
    pub async fn drain(&self) {
        self.shared.engine.drain().await;
        for engine in self.shared.engines.values() {
            engine.drain().await;
        }
    }

    /// Lets handlers call the default cache by this name too.
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
        let engine = |storage: &AnyStorage| Engine::new(storage.clone(), choices.config.clone());
        let default = engine(&choices.storage);
        // One engine under both names: what it knows of running operations holds for all its handlers.
        let alias = choices.default_cache.iter();
        let alias = alias.map(|name| (name.clone(), default.clone()));
        let caches = choices.caches.iter();
        let caches = caches.map(|(name, storage)| (name.clone(), engine(storage)));
        Self {
            shared: Arc::new(Shared {
                engines: alias.chain(caches).collect(),
                engine: default,
                default_policy: match choices.mode {
                    Mode::Enforce => KeyPolicy::required(),
                    Mode::Exempt => KeyPolicy::exempt(),
                },
                choices,
                has_layered: AtomicBool::new(false),
                misuses: Mutex::default(),
                has_distrusted: AtomicBool::new(false),
                distrusted: Mutex::default(),
                cookie_warnings: Mutex::default(),
                acknowledgements: Mutex::default(),
            }),
        }
    }
}

impl<S: Clone> Layer<S> for IdempotencyLayer {
    type Service = Idempotency<S>;

    fn layer(&self, inner: S) -> Self::Service {
        self.shared.has_layered.store(true, Ordering::Relaxed);
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

impl Shared {
    pub(crate) fn config(&self) -> &Config {
        &self.choices.config
    }

    /// The answer to a refused request, with the typed reason in its extensions.
    pub(crate) fn respond(&self, problem: Problem) -> Response {
        let Some(respond) = &self.choices.problem_response else {
            let mut response = problem.clone().into_response();
            response.extensions_mut().insert(problem);
            return response;
        };
        let mut response = respond(problem.clone());
        problem.complete_headers(response.headers_mut());
        response.extensions_mut().insert(problem);
        response
    }

    fn plan_for(&self, found: Discovery) -> Plan {
        match found {
            Discovery::Layered => Plan::Layered,
            Discovery::Nothing | Discovery::Many => self.plan(self.default_policy.clone(), None),
            Discovery::Policy(Announced { policy, handler }) => self.plan(policy, Some(handler)),
        }
    }

    fn plan(&self, policy: KeyPolicy, handler: Option<&'static str>) -> Plan {
        let engine = match &policy.terms.cache_name {
            None => &self.engine,
            Some(name) => match self.engines.get(&**name) {
                Some(engine) => engine,
                None => {
                    return Plan::Misused(Misuse {
                        kind: MisuseKind::UnknownCache {
                            handler: handler.map(str::to_owned),
                            cache: name.clone().into_owned(),
                            known: self.cache_names(),
                        },
                    });
                }
            },
        };
        Plan::Apply(Applied {
            engine: engine.clone(),
            relies_on: handler.filter(|_| policy.is_more_lenient_than(&self.default_policy)),
            is_fixed: self.choices.fixed.is_some(),
            policy,
        })
    }

    /// What is applied where a handler's announcement can't be relied on.
    pub(crate) fn default_applied(&self) -> Applied {
        Applied {
            policy: self.default_policy.clone(),
            engine: self.engine.clone(),
            relies_on: None,
            is_fixed: false,
        }
    }

    fn cache_names(&self) -> Vec<String> {
        self.engines.keys().cloned().collect()
    }

    fn report(&self, misuse: &Misuse) {
        let mut misuses = self.misuses();
        if !misuses.contains(misuse) {
            tracing::error!(target: "idempotency", "{misuse}; its routes answer 500");
            misuses.push(misuse.clone());
        }
    }

    fn misuses(&self) -> MutexGuard<'_, Vec<Misuse>> {
        lock(&self.misuses)
    }

    /// An answer came that `handler` did not give, though its policy let the request through unprotected.
    pub(crate) fn distrust(&self, handler: &'static str, path: String) {
        lock(&self.distrusted).insert(RouteName { handler, path });
        self.has_distrusted.store(true, Ordering::Release);
    }

    pub(crate) fn distrusts(&self, handler: &'static str, extensions: &Extensions) -> bool {
        self.has_distrusted.load(Ordering::Acquire)
            && lock(&self.distrusted).contains(&RouteName {
                handler,
                path: matched_path(extensions).to_owned(),
            })
    }

    /// Says once per route that the scope overlooks a cookie.
    pub(crate) fn warn_of_cookie(&self, extensions: &Extensions) {
        let path = matched_path(extensions);
        let mut warned = lock(&self.cookie_warnings);
        if !warned.contains(path) {
            warned.insert(path.to_owned());
            tracing::warn!(
                target: "idempotency",
                path,
                "a request has a cookie but no `Authorization`, so all cookie sessions share their keys: set \
                 `Scope::cookie(\"<session cookie>\")` or `Scope::from_fn`"
            );
        }
    }

    /// A fresh acknowledgement; used ones are used again, so that a request pays for its place in the extensions only.
    pub(crate) fn acknowledgement(&self) -> Acknowledgement {
        lock(&self.acknowledgements).pop().unwrap_or_default()
    }

    pub(crate) fn give_back(&self, acknowledgement: Acknowledgement) {
        const KEPT: usize = 1024;
        if let Some(acknowledgement) = acknowledgement.recycle() {
            let mut kept = lock(&self.acknowledgements);
            if kept.len() < KEPT {
                kept.push(acknowledgement);
            }
        }
    }
}

/// The route's own pattern, so that names built from it are as few as the routes.
pub(crate) fn matched_path(extensions: &Extensions) -> &str {
    extensions
        .get::<MatchedPath>()
        .map_or("", MatchedPath::as_str)
}

/// A list stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A layer that can't do what a handler asks; see [`IdempotencyLayer::check`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misuse {
    kind: MisuseKind,
}

/// What is wrong; see [`Misuse::kind`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MisuseKind {
    /// A policy names a cache that the layer does not have.
    #[non_exhaustive]
    UnknownCache {
        /// The handler; `None` if the policy was set on the layer.
        handler: Option<String>,
        /// The name.
        cache: String,
        /// The names that the layer has.
        known: Vec<String>,
    },
}

impl Misuse {
    /// What is wrong.
    #[must_use]
    pub fn kind(&self) -> &MisuseKind {
        &self.kind
    }
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            MisuseKind::UnknownCache {
                handler,
                cache,
                known,
            } => {
                match handler {
                    Some(handler) => write!(f, "handler `{handler}`")?,
                    None => f.write_str("the policy of the layer")?,
                }
                write!(
                    f,
                    " uses the cache {cache:?}, which the layer does not have ("
                )?;
                match known.is_empty() {
                    true => f.write_str("it has no named caches")?,
                    false => write!(f, "it has: {}", known.join(", "))?,
                }
                write!(f, "): add `.cache({cache:?}, storage)`")
            }
        }
    }
}

impl std::error::Error for Misuse {}
