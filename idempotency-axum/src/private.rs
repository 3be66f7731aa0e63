//! The names that the attributes expand to. Not public API: they change without notice.

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

/// What is `T`, once the state `Self` is known.
pub trait WithState<T> {
    /// `T`.
    type Type;
}

impl<S, T> WithState<T> for S {
    type Type = T;
}

/// The answer that `handler` comes to.
///
/// The result is `Send` by its signature, whatever `F` is. So a bound that `F` does not meet is the one error: the compiler does not go
/// on to say that the function is no handler.
#[expect(
    clippy::manual_async_fn,
    reason = "an `async fn` is `Send` only as far as `F` is"
)]
pub fn respond<F>(handler: F) -> impl Future<Output = Response> + Send
where
    F: Future<Output: Answer> + Send,
{
    async move { handler.await.into_response() }
}

/// What a handler may return.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no answer: a handler returns what implements `IntoResponse`",
    label = "the return type of this handler does not implement `IntoResponse`",
    note = "return a type that axum knows, as in `(StatusCode, String)` or `Json<…>`, or implement `IntoResponse` for yours"
)]
pub trait Answer: IntoResponse {}

#[diagnostic::do_not_recommend]
impl<T: IntoResponse> Answer for T {}

/// What a handler with an attribute may be combined with by `or` of axum-extra: nothing. That takes functions, and would not run
/// what the attribute adds.
#[diagnostic::on_unimplemented(
    message = "`.or(…)` can't combine a handler that has an attribute",
    label = "a handler with `#[idempotency_key]` or `#[idempotency_exempt]` is left of `.or`",
    note = "remove the attributes of both and give the two one policy: `post(one.or(other).idempotency_key(KeyPolicy::required()))`"
)]
pub trait CombinedWithoutAttribute {}

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
