//! Checks that the handler whose policy waived protection is the one that answers.
//!
//! The layer learns a policy by cloning a service, and a clone may show a handler that never answers: one that a closure or a
//! state holds. So a request that is let through because of such a policy carries an [`Acknowledgement`], which a handler with
//! that policy gives. What is known of a [`Route`] and a method:
//!
//! | acknowledged? | a success without acknowledgement |
//! |---|---|
//! | not yet | is taken for another handler's: the mode's default applies from then on, until an acknowledgement comes |
//! | once | is a middleware's, which stands in between: nothing changes, and nothing is asked any more |
//!
//! Before the first acknowledgement a middleware's answer can't be told from another handler's.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU8, Ordering},
    },
};

use axum::{extract::MatchedPath, response::Response};
use http::{Extensions, Method};

use crate::{
    plan::{Applied, Plan, matched_path},
    policy::KeyPolicy,
};

/// All routes of a layer that have a policy more lenient than the mode's default.
///
/// They are named by the handler that announced the policy and the pattern that they are matched by, so there are as many as the
/// program has, whatever clients send. So few names are compared sooner than hashed.
#[derive(Default)]
pub(crate) struct Routes(RwLock<BTreeMap<&'static str, Paths>>);

/// The routes of one handler.
#[derive(Default)]
struct Paths(BTreeMap<Box<str>, Arc<Route>>);

impl Routes {
    pub(crate) fn find(&self, handler: &'static str, path: &str) -> Arc<Route> {
        // A map stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
        let routes = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let known = routes.get(handler).and_then(|paths| paths.0.get(path));
        if let Some(route) = known {
            return route.clone();
        }
        drop(routes);
        let mut routes = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let paths = routes.entry(handler).or_default();
        paths.0.entry(path.into()).or_default().clone()
    }
}

/// What is known of one route, a bit for each method.
#[derive(Debug, Default)]
pub(crate) struct Route {
    // Relaxed everywhere: the answer orders its acknowledgement before the layer's look, and other requests may see it late.
    acknowledged: AtomicU8,
    distrusted: AtomicU8,
}

impl Route {
    pub(crate) fn is_acknowledged(&self, method: &Method) -> bool {
        self.acknowledged.load(Ordering::Relaxed) & bit(method) != 0
    }

    /// Whether a success came without acknowledgement, and no acknowledgement since.
    pub(crate) fn is_distrusted(&self, method: &Method) -> bool {
        self.distrusted.load(Ordering::Relaxed) & bit(method) != 0 && !self.is_acknowledged(method)
    }

    fn acknowledge(&self, method: &Method) {
        self.acknowledged.fetch_or(bit(method), Ordering::Relaxed);
    }

    /// Says whether it was trusted until now.
    fn distrust(&self, method: &Method) -> bool {
        self.distrusted.fetch_or(bit(method), Ordering::Relaxed) & bit(method) == 0
    }
}

/// axum can route these only; all others go to one handler.
fn bit(method: &Method) -> u8 {
    match *method {
        Method::POST => 1,
        Method::PUT => 1 << 1,
        Method::PATCH => 1 << 2,
        Method::DELETE => 1 << 3,
        _ => 1 << 4,
    }
}

/// Request extension: the layer relies on the policy that a handler announced, and waits for a handler with that policy to say
/// that it is the one that answers.
#[derive(Clone)]
pub(crate) struct Acknowledgement {
    route: Arc<Route>,
    plan: Arc<Plan>,
    path: Option<MatchedPath>,
    has_fallen_back: bool,
    /// That of a layer outside, which could not see this one.
    outer: Option<Box<Self>>,
}

impl Acknowledgement {
    pub(crate) fn new(route: Arc<Route>, plan: Arc<Plan>, extensions: &Extensions) -> Self {
        Self {
            route,
            plan,
            path: extensions.get().cloned(),
            has_fallen_back: false,
            outer: extensions.get().cloned().map(Box::new),
        }
    }

    /// For a request to which the mode's default is applied, because the route is distrusted.
    pub(crate) fn fallen_back(mut self) -> Self {
        self.has_fallen_back = true;
        self
    }

    /// A handler with `policy` answers this request. Says whether the layer was wrong to fall back to the mode's default.
    ///
    /// A handler that another router has matched speaks for a path that the layer did not see, and not for all others that lie
    /// behind that router.
    pub(crate) fn give(
        &self,
        policy: &KeyPolicy,
        method: &Method,
        extensions: &Extensions,
    ) -> bool {
        let outer = self.outer.as_ref();
        let was_outer_wrong = outer.is_some_and(|outer| outer.give(policy, method, extensions));
        let announced = self.plan.applied().map(|applied| &applied.policy);
        let is_announced = announced == Some(policy) && self.path() == matched_path(extensions);
        if is_announced {
            self.route.acknowledge(method);
        }
        was_outer_wrong || is_announced && self.has_fallen_back
    }

    fn path(&self) -> &str {
        self.path.as_ref().map_or("", MatchedPath::as_str)
    }

    fn handler(&self) -> &'static str {
        let relies_on = |applied: &Applied| applied.relies_on;
        self.plan.applied().and_then(relies_on).unwrap_or("")
    }
}

/// What to check when the answer to a request comes that was let through unprotected.
pub(crate) struct Receipt {
    acknowledgement: Acknowledgement,
    method: Method,
}

impl Receipt {
    pub(crate) fn new(acknowledgement: Acknowledgement, method: Method) -> Self {
        Self {
            acknowledgement,
            method,
        }
    }

    /// A refusal, an error or a redirect may come from a middleware between us and the handler, and a client may provoke it. A
    /// success without any acknowledgement is another handler's, which never said that it may run without a key.
    pub(crate) fn check(&self, response: &Response) {
        let Self {
            acknowledgement,
            method,
        } = self;
        let route = &acknowledgement.route;
        if !response.status().is_success() || route.is_acknowledged(method) {
            return;
        }
        if route.distrust(method) {
            tracing::error!(
                target: "idempotency",
                handler = acknowledgement.handler(),
                %method,
                path = acknowledgement.path(),
                cure = "put the layer on the routes inside this service, or fix its policy with `.policy(…)`; if a middleware \
                        answered in the handler's place, put it outside of the layer",
                "a request ran unprotected because of the policy of a handler that did not answer it; this route and method \
                 have the mode's default policy until that handler answers"
            );
        }
    }
}
