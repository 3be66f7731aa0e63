//! How the layer learns a handler's policy.
//!
//! axum gives a layer an opaque route, before any request. The layer can clone it, which clones the handler inside. The handlers
//! that our attributes and combinators make announce their policy when they are cloned while a *probe* is open on the thread; at
//! any other time that costs one read of a thread-local flag.
//!
//! The layer keeps the clone that was made under the probe. Its handler then knows that a layer has seen it (its [`Seat`] is
//! taken). So an optional handler that gets a request without a mark can tell "the layer found no key" from "there is no layer",
//! and requests need no mark.
//!
//! The crate docs say what a clone can hide; [`handler`](crate::handler) and [`handshake`](crate::handshake) deal with it.

use std::cell::{Cell, RefCell};

use crate::policy::KeyPolicy;

thread_local! {
    static OPEN: Cell<bool> = const { Cell::new(false) };
    static FOUND: RefCell<Discovery> = const { RefCell::new(Discovery::Nothing) };
    static OUTSIDE: RefCell<Option<Outside>> = const { RefCell::new(None) };
}

/// The result of cloning a service under a probe.
#[derive(Debug)]
pub(crate) enum Discovery {
    /// No handler with a policy, or one that the clone does not reach.
    Nothing,
    /// One policy, of this handler or of several that agree.
    Policy(Announced),
    /// The route has an idempotency layer nearer to the handler.
    Layered,
    /// Handlers whose policies differ.
    Many,
}

/// A policy and the handler that announced it.
#[derive(Debug)]
pub(crate) struct Announced {
    pub(crate) policy: KeyPolicy,
    pub(crate) handler: &'static str,
}

impl Discovery {
    fn add(&mut self, news: Self) {
        let merged = match (std::mem::replace(self, Self::Nothing), news) {
            (Self::Nothing, news) => news,
            (Self::Policy(first), Self::Policy(second)) if first.policy == second.policy => {
                Self::Policy(first)
            }
            (Self::Layered, Self::Layered) => Self::Layered,
            _ => Self::Many,
        };
        *self = merged;
    }
}

/// Clones `service` with a probe open, and returns what its handlers announced.
///
/// If policies differ the layer can't know which handler will answer, so no seat may be taken: the original is returned instead
/// of the clone.
pub(crate) fn probe<S: Clone>(service: S) -> (S, Discovery) {
    let opened = Probe::open();
    let clone = service.clone();
    match opened.close() {
        Discovery::Many => (service, Discovery::Many),
        found => (clone, found),
    }
}

/// The handlers that were cloned outside of any layer.
#[derive(Default)]
struct Outside {
    handlers: Vec<Announced>,
    /// A layer was cloned just before: `Handler::layer` keeps one beside its handler, and makes the service for each request.
    has_layer: bool,
}

/// Calls `clone`, and returns the handlers that announced themselves outside of any layer, as far as a clone reaches.
pub(crate) fn outside_of_layers<S: Clone>(clone: impl FnOnce() -> S) -> Vec<Announced> {
    let probe = Probe::open();
    let outer = OUTSIDE.replace(Some(Outside::default()));
    let restore = Restore(outer);
    drop(clone());
    let outside = OUTSIDE.replace(None);
    drop(restore);
    let _ = probe.close();
    outside.map(|outside| outside.handlers).unwrap_or_default()
}

/// Restores the outer value, also when a `Clone` panics.
struct Restore(Option<Outside>);

impl Drop for Restore {
    fn drop(&mut self) {
        OUTSIDE.set(self.0.take());
    }
}

/// A layer was cloned; its handler may be cloned next.
pub(crate) fn announce_layer() {
    OUTSIDE.with_borrow_mut(|outside| {
        if let Some(outside) = outside {
            outside.has_layer = true;
        }
    });
}

/// Opens the thread's probe, and restores the outer one when dropped, also when a `Clone` panics. Probes nest.
struct Probe {
    was_open: bool,
    outer: Discovery,
}

impl Probe {
    fn open() -> Self {
        Self {
            was_open: OPEN.replace(true),
            outer: FOUND.replace(Discovery::Nothing),
        }
    }

    fn close(self) -> Discovery {
        FOUND.replace(Discovery::Nothing)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        OPEN.set(self.was_open);
        FOUND.set(std::mem::replace(&mut self.outer, Discovery::Nothing));
    }
}

/// Closes the probe while something is cloned that must not announce.
pub(crate) struct Suspended {
    was_open: bool,
}

impl Suspended {
    #[must_use]
    pub(crate) fn now() -> Self {
        Self {
            was_open: OPEN.replace(false),
        }
    }
}

impl Drop for Suspended {
    fn drop(&mut self) {
        OPEN.set(self.was_open);
    }
}

/// Announces to the open probe, if there is one, that a layer is nearer to the handler.
pub(crate) fn announce_layered() {
    if OPEN.get() {
        FOUND.with_borrow_mut(|found| found.add(Discovery::Layered));
    }
}

/// Part of every handler of ours: whether a layer has learnt its policy.
///
/// Not `Copy`, and cloned only by [`Seat::announce`], so that a handler can't be cloned without announcing itself.
#[derive(Debug)]
pub struct Seat {
    taken: bool,
}

impl Seat {
    /// The seat of a handler that no layer has seen.
    pub const FREE: Self = Self { taken: false };

    /// The seat of a clone: announces the handler to the probe, if one is open.
    #[must_use]
    pub fn announce(&self, handler: &'static str, policy: impl FnOnce() -> KeyPolicy) -> Self {
        let open = OPEN.get();
        if open {
            // The policy is made before the cell is borrowed: making it may run code that is not ours.
            let policy = policy();
            OUTSIDE.with_borrow_mut(|outside| {
                if let Some(outside) = outside
                    && !std::mem::take(&mut outside.has_layer)
                {
                    let policy = policy.clone();
                    outside.handlers.push(Announced { policy, handler });
                }
            });
            FOUND.with_borrow_mut(|found| {
                found.add(Discovery::Policy(Announced { policy, handler }));
            });
        }
        Self {
            taken: open || self.taken,
        }
    }

    /// Whether a layer that wraps this handler has learnt its policy.
    #[must_use]
    pub fn is_taken(&self) -> bool {
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Handler {
        policy: KeyPolicy,
        seat: Seat,
    }

    fn handler(policy: KeyPolicy) -> Handler {
        Handler {
            policy,
            seat: Seat::FREE,
        }
    }

    impl Clone for Handler {
        fn clone(&self) -> Self {
            Self {
                policy: self.policy.clone(),
                seat: self.seat.announce("handler", || self.policy.clone()),
            }
        }
    }

    #[test]
    fn a_clone_outside_a_probe_announces_nothing() {
        let clone = handler(KeyPolicy::required()).clone();
        assert!(!clone.seat.is_taken());
        assert!(matches!(probe(()).1, Discovery::Nothing));
    }

    #[test]
    fn a_probe_seats_the_clone_that_the_layer_keeps() {
        let (kept, found) = probe(handler(KeyPolicy::exempt()));
        assert!(kept.seat.is_taken());
        assert!(
            matches!(found, Discovery::Policy(announced) if announced.policy == KeyPolicy::exempt())
        );
        assert!(
            kept.clone().seat.is_taken(),
            "clones for requests stay seated"
        );
    }

    #[test]
    fn policies_that_differ_seat_nobody() {
        let two = (handler(KeyPolicy::exempt()), handler(KeyPolicy::required()));
        let (kept, found) = probe(two);
        assert!(matches!(found, Discovery::Many));
        assert!(!kept.0.seat.is_taken() && !kept.1.seat.is_taken());
    }

    #[test]
    fn policies_that_agree_are_one() {
        let two = (handler(KeyPolicy::exempt()), handler(KeyPolicy::exempt()));
        assert!(matches!(probe(two).1, Discovery::Policy(_)));
    }

    #[test]
    fn probes_nest_and_survive_a_panic() {
        #[derive(Debug)]
        struct Nested;
        impl Clone for Nested {
            fn clone(&self) -> Self {
                let (_, found) = probe(handler(KeyPolicy::exempt()));
                assert!(matches!(found, Discovery::Policy(_)));
                panic!("a Clone that panics");
            }
        }
        let result = std::panic::catch_unwind(|| probe((handler(KeyPolicy::required()), Nested)));
        assert!(result.is_err());
        assert!(!OPEN.get());
        assert!(matches!(probe(()).1, Discovery::Nothing));
    }

    #[test]
    fn a_suspended_probe_hears_nothing() {
        struct Quiet(Handler);
        impl Clone for Quiet {
            fn clone(&self) -> Self {
                announce_layered();
                let _suspended = Suspended::now();
                Self(self.0.clone())
            }
        }
        let (kept, found) = probe(Quiet(handler(KeyPolicy::required())));
        assert!(matches!(found, Discovery::Layered));
        assert!(!kept.0.seat.is_taken());
    }
}
