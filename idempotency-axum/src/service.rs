//! The service: what happens to each request.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use axum::{
    body::Body,
    extract::{MatchedPath, Request},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::StatusCode;
use idempotency_core::{BoxError, Progress};
use tower_service::Service;

use crate::{
    detach::{Detachable, Route},
    discovery::{self, Suspended},
    exchange::{Caller, Exchange, refusal},
    future::ResponseFuture,
    handshake::{Acknowledgement, Protection, Receipt, WithoutKey},
    plan::{Announcer, Applied, Plan, Shared},
    policy::{Requirement, can_use_keys},
    problem::Problem,
    request::matched_path,
};

/// Middleware that protects what it wraps with idempotency keys; made by
/// [`IdempotencyLayer`](crate::IdempotencyLayer).
#[must_use]
pub struct Idempotency<S> {
    inner: S,
    shared: Arc<Shared>,
    plan: Arc<Plan>,
}

impl<S> Idempotency<S> {
    pub(crate) fn new(inner: S, shared: Arc<Shared>, plan: Plan) -> Self {
        Self {
            inner,
            shared,
            plan: Arc::new(plan),
        }
    }
}

/// Announces to a probe that a layer is nearer to the handler, and hides the handlers inside: of two layers the inner one decides.
impl<S: Clone> Clone for Idempotency<S> {
    fn clone(&self) -> Self {
        discovery::announce_layered();
        let _suspended = Suspended::now();
        Self {
            inner: self.inner.clone(),
            shared: self.shared.clone(),
            plan: self.plan.clone(),
        }
    }
}

impl<S: fmt::Debug> fmt::Debug for Idempotency<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Idempotency")
            .field("inner", &self.inner)
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl<S, B, R> Service<http::Request<B>> for Idempotency<S>
where
    S: Service<Request, Response = http::Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = ResponseFuture<S>;

    /// Always ready. The inner service's readiness is checked only once the request goes there, after the key is claimed: a replay or
    /// a refusal must not wait for a concurrency permit.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let request = request.map(Body::new);
        let call = Call {
            inner: &mut self.inner,
            shared: &self.shared,
        };
        let applied = match &*self.plan {
            Plan::Layered => return call.pass(request),
            Plan::Misused(misuse) => {
                tracing::error!(target: "idempotency", "{misuse}; the request was refused");
                let refusal = StatusCode::INTERNAL_SERVER_ERROR.into_response();
                return ResponseFuture::refused(refusal);
            }
            Plan::Apply(applied) => applied,
        };
        if !can_use_keys(request.method()) {
            return call.pass(request);
        }
        match &applied.relies_on {
            None => call.apply(applied, request, None),
            Some(announcer) => call.apply_announced(announcer, applied, request),
        }
    }
}

/// The call of one request: the inner service and the layer's shared state.
struct Call<'a, S> {
    inner: &'a mut S,
    shared: &'a Arc<Shared>,
}

impl<S, R> Call<'_, S>
where
    S: Service<Request, Response = http::Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    /// Passes a request on unchanged.
    fn pass(self, request: Request) -> ResponseFuture<S> {
        self.call_when_ready(request, None)
    }

    /// Calls the inner service, at once if it is ready.
    ///
    /// Most services are always ready, so readiness is checked here with a waker that does nothing, and a ready service is called
    /// without a clone: cloning a route allocates. A service that is not ready moves into the future, with its place in a queue, and
    /// is polled there; a clone stays for the next request.
    fn call_when_ready(self, request: Request, receipt: Option<Box<Receipt>>) -> ResponseFuture<S> {
        let asked = self
            .inner
            .poll_ready(&mut Context::from_waker(Waker::noop()));
        if let Poll::Ready(Ok(())) = asked {
            return ResponseFuture::called(self.inner.call(request), receipt);
        }
        let clone = self.inner.clone();
        let inner = std::mem::replace(self.inner, clone);
        match asked {
            Poll::Ready(Err(error)) => ResponseFuture::failed(error),
            _ => ResponseFuture::waiting(inner, request, receipt),
        }
    }

    /// Applies a policy that is more lenient than the mode's default because a handler announced it: see
    /// [`handshake`](crate::handshake).
    fn apply_announced(
        self,
        announcer: &Announcer,
        applied: &Applied,
        mut request: Request,
    ) -> ResponseFuture<S> {
        let path = matched_path(request.extensions());
        let trust = self.shared.trust(announcer, path);
        let method = request.method();
        if trust.is_acknowledged(method) {
            return self.apply(applied, request, None);
        }
        let method = method.clone();
        let is_distrusted = trust.is_distrusted(&method);
        let acknowledgement = Acknowledgement::new(
            trust.into_owned(),
            announcer.handler,
            applied.policy.clone(),
            request.extensions(),
        );
        if is_distrusted {
            let acknowledgement = acknowledgement.fallen_back();
            request.extensions_mut().insert(acknowledgement);
            let default = self.shared.default_applied();
            return self.apply(&default, request, None);
        }
        request.extensions_mut().insert(acknowledgement.clone());
        let receipt = Box::new(Receipt::new(acknowledgement, method));
        self.apply(applied, request, Some(receipt))
    }

    /// Passes a request with an unsafe method on without protection.
    fn pass_unprotected(
        self,
        applied: &Applied,
        mut request: Request,
        receipt: Option<Box<Receipt>>,
    ) -> ResponseFuture<S> {
        if applied.is_fixed && applied.policy.requirement == Requirement::Optional {
            request.extensions_mut().insert(WithoutKey);
        }
        self.call_when_ready(request, receipt)
    }

    /// Applies a policy. `receipt` is checked if the request passes unprotected.
    fn apply(
        self,
        applied: &Applied,
        request: Request,
        receipt: Option<Box<Receipt>>,
    ) -> ResponseFuture<S> {
        let config = applied.engine.config();
        if applied.policy.requirement == Requirement::Exempt {
            return self.pass_unprotected(applied, request, receipt);
        }
        // An outer layer that could not see this one has already claimed the key.
        if request.extensions().get::<Protection>().is_some() {
            return self.pass(request);
        }
        let terms = &applied.policy.terms;
        let is_asked = applied.policy.requirement == Requirement::Required
            && (!applied.is_default || config.asks(request.method()));
        let key = match terms.key.in_headers(request.headers(), config) {
            Some(Ok(None)) if !is_asked => {
                return self.pass_unprotected(applied, request, receipt);
            }
            Some(Ok(None)) => {
                return self.refuse(Problem::missing_key(&terms.key, config));
            }
            Some(Ok(Some(key))) => Some(key),
            Some(Err(error)) => return self.refuse(Problem::invalid_key(error, config)),
            None => None,
        };
        let (parts, body) = request.into_parts();
        let caller = match key.map(|key| Caller::of(key, &parts, terms, config, self.shared)) {
            None => None,
            Some(Ok(caller)) => Some(caller),
            Some(Err(problem)) => return self.refuse(problem),
        };

        let progress = Progress::new();
        let route = Route::of(&parts);
        let exchange = Exchange {
            shared: self.shared.clone(),
            engine: applied.engine.clone(),
            terms: terms.clone(),
            is_optional: !is_asked,
            is_fixed: applied.is_fixed,
            is_routed: parts.extensions.get::<MatchedPath>().is_some(),
            receipt,
            progress: progress.clone(),
            route: route.clone(),
        };
        ResponseFuture::protected(Detachable::new(
            exchange
                .run(self.inner.clone(), caller, parts, body)
                .boxed(),
            progress,
            applied.engine.clone(),
            route,
        ))
    }

    fn refuse(&self, problem: Problem) -> ResponseFuture<S> {
        ResponseFuture::refused(refusal(self.shared, problem))
    }
}
