//! The plan for the requests of each route, and the state that all services of a layer share.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::response::{IntoResponse, Response};
use http::{Extensions, StatusCode};
use idempotency_core::{AnyStorage, Config, Engine, Mode, UnknownCaller};

use crate::{
    discovery::{Announced, Discovery},
    handshake::{Trust, TrustTable},
    misuse::{Misuse, MisuseKind, TransactionProblem},
    policy::KeyPolicy,
    problem::Problem,
    request::matched_path,
};

pub(crate) type ProblemResponse = dyn Fn(Problem) -> Response + Send + Sync;

/// The user's settings; the rest of [`Shared`] is derived from them.
#[derive(Clone)]
pub(crate) struct Choices {
    pub(crate) mode: Mode,
    pub(crate) storage: AnyStorage,
    /// A second name for `storage`, unless a cache of `caches` has that name.
    pub(crate) default_cache: Option<String>,
    pub(crate) caches: BTreeMap<String, AnyStorage>,
    pub(crate) config: Config,
    pub(crate) fixed: Option<KeyPolicy>,
    pub(crate) problem_response: Option<Arc<ProblemResponse>>,
}

/// All state of a layer. `layer()` runs per connection, or even per request, for routers without state.
pub(crate) struct Shared {
    pub(crate) choices: Choices,
    pub(crate) engine: Engine,
    pub(crate) engines: BTreeMap<String, Engine>,
    default_policy: KeyPolicy,
    has_layered: AtomicBool,
    misuses: Mutex<Vec<Misuse>>,
    trust: TrustTable,
    notices: Mutex<HashMap<Notice, HashSet<String>>>,
}

/// Messages that are logged once per route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Notice {
    UnknownCaller,
    OverlookedCookie,
    ReleasedRedirect,
    HiddenFailure,
}

/// How the requests of one route are handled.
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
    pub(crate) relies_on: Option<Announcer>,
    /// Set on the layer itself, so inner policies accept it.
    pub(crate) is_fixed: bool,
    /// The mode's own, so it asks for keys on the methods of the configuration only.
    pub(crate) is_default: bool,
}

/// A handler that announced a policy, and the first route on which it was found: a service has one route, as a rule, so it is not looked up again.
#[derive(Debug)]
pub(crate) struct Announcer {
    pub(crate) handler: &'static str,
    first_route: OnceLock<(Box<str>, Arc<Trust>)>,
}

impl Shared {
    pub(crate) fn new(choices: Choices) -> Self {
        let engine = |storage: &AnyStorage| Engine::new(storage.clone(), choices.config.clone());
        let default = engine(&choices.storage);
        // One engine under both names, so that limits and drain cover all its handlers.
        let alias = choices.default_cache.iter();
        let alias = alias.map(|name| (name.clone(), default.clone()));
        let caches = choices.caches.iter();
        let caches = caches.map(|(name, storage)| (name.clone(), engine(storage)));
        Self {
            engines: alias.chain(caches).collect(),
            engine: default,
            default_policy: match choices.mode {
                Mode::Enforce => KeyPolicy::required(),
                Mode::Exempt => KeyPolicy::exempt(),
                Mode::Optional => KeyPolicy::optional(),
            },
            choices,
            has_layered: AtomicBool::new(false),
            misuses: Mutex::default(),
            trust: TrustTable::default(),
            notices: Mutex::default(),
        }
    }

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

    /// Called when the layer wraps a service.
    pub(crate) fn set_layered(&self) {
        self.has_layered.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_layered(&self) -> bool {
        self.has_layered.load(Ordering::Relaxed)
    }

    pub(crate) fn plan_for(&self, found: Discovery) -> Plan {
        match found {
            Discovery::Layered => Plan::Layered,
            Discovery::Nothing | Discovery::Many => Plan::Apply(self.default_applied()),
            Discovery::Policy(Announced { policy, handler }) => self.plan(policy, Some(handler)),
        }
    }

    pub(crate) fn plan(&self, policy: KeyPolicy, handler: Option<&'static str>) -> Plan {
        let engine = match &policy.terms.cache_name {
            None => &self.engine,
            Some(name) => match self.engines.get(&**name) {
                Some(engine) => engine,
                None => {
                    return Plan::Misused(Misuse::new(MisuseKind::UnknownCache {
                        handler: handler.map(str::to_owned),
                        cache: name.clone().into_owned(),
                        known: self.cache_names(),
                    }));
                }
            },
        };
        if let Some(problem) = without_transaction(&policy, engine) {
            return Plan::Misused(Misuse::new(MisuseKind::NoTransaction {
                handler: handler.map(str::to_owned),
                problem,
            }));
        }
        Plan::Apply(Applied {
            engine: engine.clone(),
            relies_on: handler
                .filter(|_| policy.is_more_lenient_than(&self.default_policy))
                .map(|handler| Announcer {
                    handler,
                    first_route: OnceLock::new(),
                }),
            is_fixed: self.choices.fixed.is_some(),
            is_default: false,
            policy,
        })
    }

    /// The mode's default, for a handler whose announcement can't be relied on.
    pub(crate) fn default_applied(&self) -> Applied {
        Applied {
            policy: self.default_policy.clone(),
            engine: self.engine.clone(),
            relies_on: None,
            is_fixed: false,
            is_default: true,
        }
    }

    /// The trust in the route `path` of a handler that announced a policy.
    pub(crate) fn trust<'a>(&self, announcer: &'a Announcer, path: &str) -> Cow<'a, Arc<Trust>> {
        let find = || self.trust.find(announcer.handler, path);
        let (first, trust) = announcer.first_route.get_or_init(|| (path.into(), find()));
        if **first == *path {
            Cow::Borrowed(trust)
        } else {
            Cow::Owned(find())
        }
    }

    pub(crate) fn cache_names(&self) -> Vec<String> {
        self.engines.keys().cloned().collect()
    }

    pub(crate) fn report(&self, misuse: &Misuse) {
        let mut misuses = self.misuses();
        if !misuses.contains(misuse) {
            tracing::error!(target: "idempotency", "{misuse}; its routes answer 500");
            misuses.push(misuse.clone());
        }
    }

    pub(crate) fn misuses(&self) -> MutexGuard<'_, Vec<Misuse>> {
        lock(&self.misuses)
    }

    /// Logs once per route that a request was refused because its scope found no caller, and the cure.
    pub(crate) fn report_unknown_caller(&self, unknown: &UnknownCaller, extensions: &Extensions) {
        self.once(Notice::UnknownCaller, matched_path(extensions), |path| {
            tracing::error!(target: "idempotency", path, "{unknown}; such requests are answered with 403");
        });
    }

    /// Logs once per route that the default scope overlooks a cookie.
    pub(crate) fn warn_of_cookie(&self, extensions: &Extensions) {
        self.once(Notice::OverlookedCookie, matched_path(extensions), |path| {
            tracing::warn!(
                target: "idempotency",
                path,
                "a request has a cookie beside its `Authorization` or API key, and the default scope does not look at cookies: if \
                 the cookie says who calls, set `Scope::cookie(\"<session cookie>\")` or `Scope::from_fn`; if no cookie does, set \
                 `Scope::default().or_anonymous()`"
            );
        });
    }

    /// Logs once per route that a redirect was not recorded: a form that answers with one runs again on a retry.
    pub(crate) fn warn_of_redirect(&self, path: &str) {
        self.once(Notice::ReleasedRedirect, path, |path| {
            tracing::warn!(
                target: "idempotency",
                path,
                "a redirect was not recorded, so a retry runs the handler again: `Config::store_on(StoreOn::below(400))` records it"
            );
        });
    }

    /// Logs once per route that the conflict status gives a recorded failure the status of a success.
    pub(crate) fn warn_of_hidden_failure(&self, path: &str, status: StatusCode) {
        self.once(Notice::HiddenFailure, path, |path| {
            tracing::warn!(
                target: "idempotency",
                path,
                %status,
                "a recorded failure was replayed with a `conflict_status` of success, so its client takes it for done: set \
                 `Config::conflict_status(None)`, which replays the original status, or record successes alone with \
                 `Config::store_on(StoreOn::success())`"
            );
        });
    }

    fn once(&self, notice: Notice, path: &str, log: impl FnOnce(&str)) {
        {
            let mut notices = lock(&self.notices);
            let paths = notices.entry(notice).or_default();
            if paths.contains(path) {
                return;
            }
            paths.insert(path.to_owned());
        }
        log(path);
    }
}

/// Why the storage of `engine` can't lend the transaction that `policy` asks for.
fn without_transaction(policy: &KeyPolicy, engine: &Engine) -> Option<TransactionProblem> {
    let database = policy.terms.transaction?;
    if policy.terms.manual {
        return Some(TransactionProblem::Manual);
    }
    let Some(transactions) = engine.transactions() else {
        return Some(TransactionProblem::NoneLent { database });
    };
    if transactions.database() != database {
        return Some(TransactionProblem::OtherDatabase {
            database,
            storage: transactions.database(),
        });
    }
    if transactions.max_open() == 0 {
        return Some(TransactionProblem::PoolTooSmall);
    }
    let lease = engine.lease();
    let max_duration = transactions.max_duration();
    (transactions.delays_renewals() && max_duration >= lease / 3).then_some(
        TransactionProblem::TooLong {
            max_transaction: max_duration,
            lease,
        },
    )
}

/// A list stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
