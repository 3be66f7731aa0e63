//! What passes between the layer and the handler, as extensions of the request; only a handler's transaction is an extension of its own,
//! the `TransactionSlot` of the core, put there by `exchange/transaction.rs` and taken by `extract/transaction.rs`.
//!
//! From the layer to the handler: that the request is protected and how ([`Protection`]), that a policy was decided on
//! ([`Decided`]), or that there is no key ([`WithoutKey`]). From the handler to the layer: that it was entered, or that the layer
//! applied another policy than its own (both in the [`Protection`]).
//!
//! # The handler that waived protection must be the one that answers
//!
//! The layer learns a policy by cloning a service ([`discovery`](crate::discovery)), and a clone may show a handler that never answers: one that a closure or a
//! state holds. So a request that is let through because of such a policy carries an [`Acknowledgement`], which a handler with
//! that policy gives. What follows for a route and a method ([`Trust`]):
//!
//! | acknowledged? | a success without acknowledgement |
//! |---|---|
//! | not yet | another handler answered: the mode's default applies from then on, until an acknowledgement comes |
//! | once | a middleware between layer and handler answered: nothing changes, and nothing is asked any more |
//!
//! Before the first acknowledgement a middleware's answer can't be told from another handler's.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU8, Ordering},
    },
};

use axum::{extract::MatchedPath, response::Response};
use http::{Extensions, Method};
use idempotency_core::{EncodedKey, Key, Record};

use crate::{
    policy::{KeyPolicy, Requirement, Terms},
    request::matched_path,
};

/// Request extension: this request is protected, and how.
#[derive(Clone)]
pub(crate) struct Protection(Arc<Protected>);

struct Protected {
    key: Key,
    encoded: EncodedKey,
    terms: Arc<Terms>,
    conflict: Conflict,
    entry: AtomicU8,
}

/// The recorded outcome on a conflict, for a manual handler.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conflict(pub(crate) Option<Record>);

/// No handler with a policy was called, so it is unknown whether one was entered.
const ENTRY_UNKNOWN: u8 = 0;
/// A handler with a combinator was called. It can't report when its extractors are done, so it counts as entered.
const CALLED: u8 = 1;
const ENTRY_EXPECTED: u8 = 2;
const ENTERED: u8 = 3;
/// Nothing may be recorded: the layer applied another policy than the handler's own.
const REFUSED: u8 = 4;

impl Protection {
    pub(crate) fn new(
        key: Key,
        encoded: EncodedKey,
        terms: Arc<Terms>,
        conflict: Conflict,
    ) -> Self {
        Self(Arc::new(Protected {
            key,
            encoded,
            terms,
            conflict,
            entry: AtomicU8::new(ENTRY_UNKNOWN),
        }))
    }

    pub(crate) fn key(&self) -> &Key {
        &self.0.key
    }

    pub(crate) fn encoded(&self) -> EncodedKey {
        self.0.encoded
    }

    pub(crate) fn conflict(&self) -> Option<&Conflict> {
        self.0.terms.manual.then_some(&self.0.conflict)
    }

    /// Whether the layer applied the terms of `policy`. A key that is present protects alike, required or optional.
    pub(crate) fn is_on_terms_of(&self, policy: &KeyPolicy) -> bool {
        policy.requirement != Requirement::Exempt && self.0.terms == policy.terms
    }

    pub(crate) fn call(&self) {
        self.0.entry.fetch_max(CALLED, Ordering::Relaxed);
    }

    pub(crate) fn expect_entry(&self) {
        self.0.entry.fetch_max(ENTRY_EXPECTED, Ordering::Relaxed);
    }

    pub(crate) fn enter(&self) {
        self.0.entry.store(ENTERED, Ordering::Relaxed);
    }

    pub(crate) fn refuse(&self) {
        self.0.entry.store(REFUSED, Ordering::Relaxed);
    }

    /// Whether nothing may be recorded: the answer is the 500 of this library, or that of an exempt handler.
    pub(crate) fn was_refused(&self) -> bool {
        self.0.entry.load(Ordering::Relaxed) == REFUSED
    }

    /// Whether a handler with a policy was entered, as far as it reports.
    pub(crate) fn was_entered(&self) -> bool {
        matches!(self.0.entry.load(Ordering::Relaxed), CALLED | ENTERED)
    }

    /// Whether an extractor's rejection is the answer. The answer itself orders this read after `enter`.
    pub(crate) fn was_rejected(&self) -> bool {
        self.0.entry.load(Ordering::Relaxed) == ENTRY_EXPECTED
    }
}

impl fmt::Debug for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protection")
            .field("encoded", &self.0.encoded)
            .field("terms", &self.0.terms)
            .finish_non_exhaustive()
    }
}

/// Request extension: an outer policy or a layer with a fixed policy has decided, and inner policies accept it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Decided;

/// Request extension: a layer with a fixed policy found no key, which optional handlers accept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WithoutKey;

/// Request extension: the layer relies on the policy that a handler announced, until a handler with that policy confirms that it
/// answers.
#[derive(Clone)]
pub(crate) struct Acknowledgement {
    trust: Arc<Trust>,
    handler: &'static str,
    policy: KeyPolicy,
    path: Option<MatchedPath>,
    has_fallen_back: bool,
    /// The acknowledgement of an outer layer that could not see this one.
    outer: Option<Box<Self>>,
}

impl Acknowledgement {
    pub(crate) fn new(
        trust: Arc<Trust>,
        handler: &'static str,
        policy: KeyPolicy,
        extensions: &Extensions,
    ) -> Self {
        Self {
            trust,
            handler,
            policy,
            path: extensions.get().cloned(),
            has_fallen_back: false,
            outer: extensions.get().cloned().map(Box::new),
        }
    }

    /// For a request with the mode's default policy, because the route is distrusted.
    pub(crate) fn fallen_back(mut self) -> Self {
        self.has_fallen_back = true;
        self
    }

    /// Called when a handler with `policy` answers this request. Returns whether the layer was wrong to fall back to the mode's
    /// default.
    ///
    /// A handler behind another router confirms only the path that the layer saw, not the other paths behind that router.
    pub(crate) fn give(
        &self,
        policy: &KeyPolicy,
        method: &Method,
        extensions: &Extensions,
    ) -> bool {
        let outer = self.outer.as_ref();
        let was_outer_wrong = outer.is_some_and(|outer| outer.give(policy, method, extensions));
        let is_announced = self.policy == *policy && self.path() == matched_path(extensions);
        if is_announced {
            self.trust.acknowledge(method);
        }
        was_outer_wrong || is_announced && self.has_fallen_back
    }

    fn path(&self) -> &str {
        self.path.as_ref().map_or("", MatchedPath::as_str)
    }
}

/// The check of the answer to a request that passed unprotected.
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

    /// A refusal, an error or a redirect may come from a middleware between layer and handler, and a client may provoke it. A success
    /// without an acknowledgement came from another handler, whose policy did not allow a run without a key.
    pub(crate) fn check(&self, response: &Response) {
        let Self {
            acknowledgement,
            method,
        } = self;
        let trust = &acknowledgement.trust;
        if !response.status().is_success() || trust.is_acknowledged(method) {
            return;
        }
        if trust.distrust(method) {
            tracing::error!(
                target: "idempotency",
                handler = acknowledgement.handler,
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

/// What is known of those routes of a layer whose policy is more lenient than the mode's default.
///
/// A route is named by its handler and its pattern, so there are as many as the program has, whatever clients send. So few names
/// are compared faster than hashed.
#[derive(Default)]
pub(crate) struct TrustTable(RwLock<BTreeMap<&'static str, Paths>>);

/// The routes of one handler.
#[derive(Default)]
struct Paths(BTreeMap<Box<str>, Arc<Trust>>);

impl TrustTable {
    pub(crate) fn find(&self, handler: &'static str, path: &str) -> Arc<Trust> {
        // A map stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
        let handlers = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let known = handlers.get(handler).and_then(|paths| paths.0.get(path));
        if let Some(trust) = known {
            return trust.clone();
        }
        drop(handlers);
        let mut handlers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let paths = handlers.entry(handler).or_default();
        paths.0.entry(path.into()).or_default().clone()
    }
}

/// What is known of one route, with a bit for each method.
#[derive(Debug, Default)]
pub(crate) struct Trust {
    // Relaxed everywhere: the answer orders its acknowledgement before the layer's read, and other requests may see it late.
    acknowledged: AtomicU8,
    distrusted: AtomicU8,
}

impl Trust {
    pub(crate) fn is_acknowledged(&self, method: &Method) -> bool {
        self.acknowledged.load(Ordering::Relaxed) & bit(method) != 0
    }

    /// Whether a success came without an acknowledgement, and none came since.
    pub(crate) fn is_distrusted(&self, method: &Method) -> bool {
        self.distrusted.load(Ordering::Relaxed) & bit(method) != 0 && !self.is_acknowledged(method)
    }

    fn acknowledge(&self, method: &Method) {
        self.acknowledged.fetch_or(bit(method), Ordering::Relaxed);
    }

    /// Returns whether it was trusted until now.
    fn distrust(&self, method: &Method) -> bool {
        self.distrusted.fetch_or(bit(method), Ordering::Relaxed) & bit(method) == 0
    }
}

/// axum routes only these methods; all others share a handler.
fn bit(method: &Method) -> u8 {
    match *method {
        Method::POST => 1,
        Method::PUT => 1 << 1,
        Method::PATCH => 1 << 2,
        Method::DELETE => 1 << 3,
        _ => 1 << 4,
    }
}
