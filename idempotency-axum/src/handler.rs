//! Handlers that carry a policy: what the attributes expand to, and the combinators.

use std::{
    cell::Cell,
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    extract::{MatchedPath, OriginalUri, Request},
    handler::Handler,
    response::{IntoResponse, Response},
};
use http::{Extensions, StatusCode, Uri};
use pin_project_lite::pin_project;

use crate::{
    discovery::{Seat, Suspended},
    handshake::{Acknowledgement, Decided, Protection, WithoutKey},
    policy::{KeyPolicy, Requirement, can_use_keys},
};

/// Gives a handler a policy where an attribute can't: closures, generic functions, associated functions, handlers from other
/// crates.
///
/// The **outermost** policy wins, also over an attribute on the function itself. A combinator says all that an attribute can, and
/// takes the key from the body besides: [`key_from`](KeyPolicy::key_from).
///
/// It goes on the handler, inside of `post(…)`. What `post(…)` returns is no handler but a `MethodRouter`, and a policy around
/// that is no route any more: the compiler finds a `WithPolicy<MethodRouter>` where it expects a `MethodRouter`.
///
/// ```
/// use axum::{Router, routing::post};
/// use idempotency_axum::{IdempotencyHandler, KeyPolicy};
///
/// struct Orders;
///
/// impl Orders {
///     async fn create() -> &'static str {
///         "created"
///     }
/// }
///
/// let app: Router = Router::new()
///     .route("/orders", post(Orders::create.idempotency_key(KeyPolicy::required())))
///     .route("/search", post((async || "found").idempotency_exempt()));
/// # let _ = app;
/// ```
pub trait IdempotencyHandler: Sized {
    /// This handler with `policy`.
    fn idempotency_key(self, policy: KeyPolicy) -> WithPolicy<Self> {
        WithPolicy {
            handler: self,
            policy,
            seat: Seat::FREE,
        }
    }

    /// This handler, run every time, even for requests with a key.
    fn idempotency_exempt(self) -> WithPolicy<Self> {
        self.idempotency_key(KeyPolicy::exempt())
    }
}

// Without a bound on `Handler<T, S>`: `T` and `S` are not known where the combinator is called, only where the route is made.
impl<H: Clone + Send + Sync + 'static> IdempotencyHandler for H {}

/// A handler with a policy; see [`IdempotencyHandler`].
pub struct WithPolicy<H> {
    handler: H,
    policy: KeyPolicy,
    seat: Seat,
}

impl<H> WithPolicy<H> {
    fn name() -> &'static str {
        std::any::type_name::<H>()
    }
}

impl<H: Clone> Clone for WithPolicy<H> {
    fn clone(&self) -> Self {
        let seat = self.seat.announce(Self::name(), || self.policy.clone());
        // The outermost policy wins: what this one wraps must not announce its own.
        let _suspended = Suspended::now();
        Self {
            handler: self.handler.clone(),
            policy: self.policy.clone(),
            seat,
        }
    }
}

impl<H> fmt::Debug for WithPolicy<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WithPolicy")
            .field("handler", &Self::name())
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl<H, T, S> Handler<T, S> for WithPolicy<H>
where
    H: Handler<T, S>,
{
    type Future = HandlerFuture<H::Future>;

    fn call(self, request: Request, state: S) -> Self::Future {
        let Self {
            handler,
            policy,
            seat,
        } = self;
        admitted(
            &seat,
            Self::name(),
            &policy,
            request,
            |mut request, entry| {
                entry.call();
                request.extensions_mut().insert(Decided);
                handler.call(request, state)
            },
        )
    }
}

/// Runs a handler with an attribute, which marks the [`Entry`] once its extractors are done.
pub fn run<F>(
    seat: &Seat,
    name: &'static str,
    policy: &KeyPolicy,
    request: Request,
    handler: impl FnOnce(Request, Entry) -> F,
) -> HandlerFuture<F> {
    admitted(seat, name, policy, request, |request, entry| {
        entry.track();
        handler(request, entry)
    })
}

/// Runs `handler` if the request was treated as `policy` asks, and answers 500 otherwise.
///
/// A required key must never run unprotected because the layer is missing, or could not see the handler.
fn admitted<F>(
    seat: &Seat,
    name: &'static str,
    policy: &KeyPolicy,
    mut request: Request,
    handler: impl FnOnce(Request, Entry) -> F,
) -> HandlerFuture<F> {
    acknowledge(policy, &mut request);
    match admit(seat, policy, &request) {
        Ok(entry) => {
            let polled = Polled {
                name,
                is_optional: policy.requirement == Requirement::Optional,
            };
            HandlerFuture::running(polled, handler(request, entry))
        }
        Err(misplaced) => {
            if let Some(protection) = request.extensions().get::<Protection>() {
                protection.refuse();
            }
            tracing::error!(
                target: "idempotency",
                handler = name,
                path = route_path(request.extensions(), request.uri()),
                policy = ?policy,
                cure = misplaced.cure(),
                "{misplaced}; the request was refused"
            );
            HandlerFuture::refused(StatusCode::INTERNAL_SERVER_ERROR.into_response())
        }
    }
}

/// Tells the layer that relied on `policy` that a handler which has it answers.
fn acknowledge(policy: &KeyPolicy, request: &mut Request) {
    let Some(acknowledgement) = request.extensions().get::<Acknowledgement>() else {
        return;
    };
    let was_wronged = acknowledgement.give(policy, request.method(), request.extensions());
    if was_wronged && policy.requirement == Requirement::Exempt {
        // The layer has taken a key that this handler does not want. It runs all the same, and leaves no record.
        if let Some(protection) = request.extensions_mut().remove::<Protection>() {
            protection.refuse();
        }
    }
}

fn admit(seat: &Seat, policy: &KeyPolicy, request: &Request) -> Result<Entry, Misplaced> {
    let extensions = request.extensions();
    let is_decided = || extensions.get::<Decided>().is_some();
    if let Some(protection) = extensions.get::<Protection>() {
        if !protection.is_on_terms_of(policy) && !is_decided() {
            return Err(Misplaced::OtherPolicy);
        }
        return Ok(Entry(Some(protection.clone())));
    }
    let is_admitted = match policy.requirement {
        Requirement::Exempt => true,
        _ if !can_use_keys(request.method()) => true,
        Requirement::Optional => {
            seat.is_taken() || extensions.get::<WithoutKey>().is_some() || is_decided()
        }
        Requirement::Required => is_decided(),
    };
    if is_admitted {
        Ok(Entry(None))
    } else {
        Err(Misplaced::NoLayer)
    }
}

/// A handler whose policy no layer has kept.
#[derive(Clone, Copy, Debug)]
enum Misplaced {
    NoLayer,
    OtherPolicy,
}

impl Misplaced {
    fn cure(self) -> &'static str {
        match self {
            Self::NoLayer => {
                "put `IdempotencyLayer` around this route with `Router::layer`, `Router::route_layer` or `Handler::layer`; around a \
                 `nest_service` or a whole service it can't see handlers: give it `.policy(…)` there, or move it inside"
            }
            Self::OtherPolicy => {
                "the layer can't see this handler where it stands (a `nest_service`, a `route_service`, a layer around a whole \
                 service or a buffer): move it onto the routes, or give it this policy with `.policy(…)`"
            }
        }
    }
}

impl fmt::Display for Misplaced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoLayer => {
                "a handler that uses idempotency keys was reached without an idempotency layer"
            }
            Self::OtherPolicy => {
                "a handler was reached through an idempotency layer that applied another policy"
            }
        })
    }
}

/// Tells the layer that a handler was entered: what an extractor rejects before is not the handler's answer.
#[derive(Clone, Debug)]
pub struct Entry(Option<Protection>);

impl Entry {
    /// A handler is called that does not say when it is entered.
    fn call(&self) {
        if let Some(protection) = &self.0 {
            protection.call();
        }
    }

    /// From here on it counts whether the handler is entered.
    fn track(&self) {
        if let Some(protection) = &self.0 {
            protection.expect_entry();
        }
    }

    /// The extractors are done: the handler is entered.
    pub fn mark(&self) {
        if let Some(protection) = &self.0 {
            protection.enter();
        }
    }
}

/// The path of the route, for the log: its pattern, so that nothing of the client's is in it, or the path as it was sent where no
/// route matched.
pub(crate) fn route_path<'a>(extensions: &'a Extensions, uri: &'a Uri) -> &'a str {
    if let Some(matched) = extensions.get::<MatchedPath>() {
        return matched.as_str();
    }
    let original = extensions.get::<OriginalUri>();
    original.map_or(uri, |OriginalUri(uri)| uri).path()
}

thread_local! {
    static POLLED: Cell<Option<Polled>> = const { Cell::new(None) };
}

/// The handler with a policy that this thread polls, so that its extractors know of it, and no request pays for that.
#[derive(Clone, Copy)]
pub(crate) struct Polled {
    pub(crate) name: &'static str,
    /// A request without a key reaches it too.
    pub(crate) is_optional: bool,
}

impl Polled {
    pub(crate) fn now() -> Option<Self> {
        POLLED.get()
    }

    /// A policy around this one decides, so it is enough that one of the two is optional.
    fn enter(self) -> Polling {
        let outer = POLLED.get();
        let is_optional = self.is_optional || outer.is_some_and(|outer| outer.is_optional);
        POLLED.set(Some(Self {
            is_optional,
            ..self
        }));
        Polling { outer }
    }
}

/// Puts back what was there before, also when a poll panics.
struct Polling {
    outer: Option<Polled>,
}

impl Drop for Polling {
    fn drop(&mut self) {
        POLLED.set(self.outer);
    }
}

pin_project! {
    /// Future of a handler that carries a policy.
    pub struct HandlerFuture<F> {
        #[pin]
        kind: Kind<F>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<F> {
        Running { #[pin] future: F, polled: Polled },
        Refused { response: Option<Response> },
    }
}

impl<F> HandlerFuture<F> {
    fn running(polled: Polled, future: F) -> Self {
        Self {
            kind: Kind::Running { future, polled },
        }
    }

    fn refused(response: Response) -> Self {
        Self {
            kind: Kind::Refused {
                response: Some(response),
            },
        }
    }
}

impl<F: Future<Output = Response>> Future for HandlerFuture<F> {
    type Output = Response;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Response> {
        match self.project().kind.project() {
            KindProj::Running { future, polled } => {
                let _polling = polled.enter();
                future.poll(cx)
            }
            KindProj::Refused { response } => match response.take() {
                Some(response) => Poll::Ready(response),
                None => panic!("`HandlerFuture` was polled after completion"),
            },
        }
    }
}

impl<F> fmt::Debug for HandlerFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerFuture").finish_non_exhaustive()
    }
}
