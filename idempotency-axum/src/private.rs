//! What the attributes expand to. Not public API: it changes without notice.

use std::marker::PhantomData;

pub use axum::{
    extract::{FromRequest, FromRequestParts, Request},
    handler::Handler,
    response::{IntoResponse, Response},
};

pub use http::HeaderName;
pub use idempotency_core::{Scope, StoreOn};

pub use crate::{
    discovery::Seat,
    handler::{Entry, HandlerFuture, run},
    policy::{ExtractorNeeds, KeyPolicy, Needs},
};

/// What axum's own impl for functions returns.
pub type BoxedFuture = std::pin::Pin<Box<dyn Future<Output = Response> + Send>>;

/// `policy` with what the extractors need.
pub fn policy_with(policy: KeyPolicy, needs: Needs) -> KeyPolicy {
    needs.apply(policy)
}

/// Finds a type's needs: `NeedsOf::<T>::NEEDS` is the inherent constant where `T` has needs, and the trait's, which must be in
/// scope, where it has none.
#[derive(Debug)]
pub struct NeedsOf<T>(PhantomData<T>);

impl<T: ExtractorNeeds> NeedsOf<T> {
    /// What `T` says.
    pub const NEEDS: Needs = T::NEEDS;
}

/// The fall-back of [`NeedsOf`].
pub trait NoNeeds {
    /// Nothing.
    const NEEDS: Needs = Needs::NONE;
}

impl<T> NoNeeds for NeedsOf<T> {}
