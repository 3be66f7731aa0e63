//! Functions in a configuration, which is compared and cloned.

use std::sync::Arc;

/// A function of the user's. It is equal only to itself.
pub(super) struct UserFn<F: ?Sized>(pub(super) Arc<F>);

impl<F: ?Sized> Clone for UserFn<F> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<F: ?Sized> PartialEq for UserFn<F> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
