//! How many bytes may be held at once.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// A limit on the bytes that are held at once; clones share it. See [`Config::max_buffered`](crate::Config::max_buffered).
///
/// ```
/// use idempotency_core::Budget;
///
/// let budget = Budget::new(1000);
/// let mut body = budget.reserve(600).expect("there is room for 600");
/// assert!(budget.reserve(600).is_none());
/// assert!(body.grow(400));
/// drop(body);
/// assert_eq!(budget.used(), 0);
/// ```
#[derive(Clone, Debug)]
pub struct Budget(Arc<State>);

#[derive(Debug)]
struct State {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    /// A budget of `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(State {
            limit,
            used: AtomicUsize::new(0),
        }))
    }

    /// The limit in bytes.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.0.limit
    }

    /// How many bytes are reserved. Bytes that had to be [counted](Self::count) can take it over the limit.
    #[must_use]
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    /// Reserves `bytes`, or `None` if they don't fit, or if nothing fits any more.
    #[must_use]
    pub fn reserve(&self, bytes: usize) -> Option<Reservation> {
        let mut reservation = self.count(0);
        let is_full = self.used() >= self.limit();
        (!is_full && reservation.grow(bytes)).then_some(reservation)
    }

    /// Reserves `bytes` that are held in any case, be there room or not.
    pub fn count(&self, bytes: usize) -> Reservation {
        self.0.used.fetch_add(bytes, Ordering::Relaxed);
        Reservation {
            budget: self.clone(),
            bytes,
        }
    }
}

/// Bytes of a [`Budget`], given back when it is dropped.
#[derive(Debug)]
#[must_use = "the bytes are given back when this is dropped"]
pub struct Reservation {
    budget: Budget,
    bytes: usize,
}

impl Reservation {
    /// How many bytes are reserved.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reserves `more` bytes. Says whether they fit; if not, nothing has changed.
    #[must_use]
    pub fn grow(&mut self, more: usize) -> bool {
        let state = &self.budget.0;
        let grown = state
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(more).filter(|sum| *sum <= state.limit)
            });
        if grown.is_ok() {
            self.bytes += more;
        }
        grown.is_ok()
    }

    /// Reserves `more` bytes that are held in any case, be there room or not.
    pub fn count(&mut self, more: usize) {
        self.budget.0.used.fetch_add(more, Ordering::Relaxed);
        self.bytes += more;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.0.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_reserved_once_the_budget_is_used_up() {
        let budget = Budget::new(10);
        let all = budget.reserve(10).unwrap();
        assert!(budget.reserve(0).is_none());
        drop(all);
        assert_eq!(budget.reserve(0).unwrap().bytes(), 0);
        assert!(budget.reserve(11).is_none());
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_is_counted_may_go_over_the_limit() {
        let budget = Budget::new(10);
        let mut counted = budget.count(8);
        counted.count(8);
        assert_eq!((budget.used(), counted.bytes()), (16, 16));
        assert!(!counted.grow(0) && budget.reserve(0).is_none());
        drop(counted);
        assert_eq!(budget.used(), 0);
    }
}
