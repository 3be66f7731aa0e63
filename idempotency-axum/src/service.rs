//! The service: what happens to each request.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    body::Body,
    extract::Request,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{StatusCode, request::Parts};
use idempotency_core::{
    BoxError, Config, Decision, Encoded, Event, Key, ManualDecision, Outcome, Progress, Record,
    Refusal, RequestView, Reservation, StoreOn, TombstoneReason,
};
use tower_service::Service;

use crate::{
    buffer::request::{Buffered, buffer},
    detach::{Detachable, Route},
    discovery::{self, Suspended},
    future::ResponseFuture,
    plan::{Applied, Plan, Shared},
    policy::Requirement,
    problem::Problem,
    receipt::Receipt,
    record::record,
    request::{Conflict, Decided, Protection, WithoutKey, original_uri, path_and_query},
    response,
    run::Run,
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

/// Tells a probe that a layer is here already, and nothing of what is inside: of two layers the inner one decides.
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
    type Future = ResponseFuture<S::Future, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let request = request.map(Body::new);
        let plan = self.plan.clone();
        let applied = match &*plan {
            Plan::Layered => return self.pass(request),
            Plan::Misused(misuse) => {
                tracing::error!(target: "idempotency", "{misuse}; the request was refused");
                let refusal = StatusCode::INTERNAL_SERVER_ERROR.into_response();
                return ResponseFuture::refused(refusal);
            }
            Plan::Apply(applied) => applied,
        };
        if request.method().is_safe() {
            return self.pass(request);
        }
        match applied.relies_on {
            Some(handler) if self.shared.distrusts(handler, request.extensions()) => {
                self.apply(&self.shared.default_applied(), request)
            }
            _ => self.apply(applied, request),
        }
    }
}

impl<S, R> Idempotency<S>
where
    S: Service<Request, Response = http::Response<R>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    fn pass(&mut self, request: Request) -> ResponseFuture<S::Future, S::Error> {
        ResponseFuture::passed(self.inner.call(request), None)
    }

    /// Lets a request with an unsafe method through without protection.
    fn pass_unprotected(
        &mut self,
        applied: &Applied,
        mut request: Request,
    ) -> ResponseFuture<S::Future, S::Error> {
        if applied.is_fixed && applied.policy.requirement == Requirement::Optional {
            request.extensions_mut().insert(WithoutKey);
        }
        let receipt = applied.relies_on.map(|handler| {
            let acknowledgement = self.shared.acknowledgement();
            request.extensions_mut().insert(acknowledgement.clone());
            Receipt::new(acknowledgement, handler, request.extensions(), &self.shared)
        });
        ResponseFuture::passed(self.inner.call(request), receipt)
    }

    fn apply(
        &mut self,
        applied: &Applied,
        mut request: Request,
    ) -> ResponseFuture<S::Future, S::Error> {
        let config = applied.engine.config();
        let policy = &applied.policy;
        if policy.requirement == Requirement::Exempt {
            return self.pass_unprotected(applied, request);
        }
        // A layer outside could not see this one and has taken the key already.
        if request.extensions().get::<Protection>().is_some() {
            return self.pass(request);
        }
        if !config.checks(request.method()) {
            request.extensions_mut().insert(Decided);
            return self.pass(request);
        }
        let key = match Key::from_headers(request.headers(), &config.header) {
            Ok(None) if policy.requirement == Requirement::Optional => {
                return self.pass_unprotected(applied, request);
            }
            Ok(None) => return self.refuse(Problem::new(Refusal::MissingKey, config)),
            Ok(Some(key)) => config.key_format.check(&key).map(|()| key),
            Err(error) => Err(error),
        };
        let key = match key {
            Ok(key) => key,
            Err(error) => return self.refuse(Problem::invalid_key(error, config)),
        };
        let (parts, body) = request.into_parts();
        let scope = policy.terms.scope.as_ref().unwrap_or(&config.scope);
        let owner = scope.of(&parts);
        if owner.is_none() && scope.is_required() {
            return self.refuse(Problem::new(Refusal::ScopeRequired, config));
        }
        if scope.overlooks_cookie(&parts) {
            self.shared.warn_of_cookie(&parts.extensions);
        }

        // The service that is ready goes with the request; its clone waits for the next one.
        let clone = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, clone);
        let progress = Progress::new();
        let route = Route::of(&parts);
        let exchange = Exchange {
            shared: self.shared.clone(),
            engine: applied.engine.clone(),
            terms: applied.policy.terms.clone(),
            is_fixed: applied.is_fixed,
            key,
            owner,
            progress: progress.clone(),
            route: route.clone(),
        };
        ResponseFuture::protected(Detachable::new(
            exchange.run(inner, parts, body).boxed(),
            progress,
            applied.engine.clone(),
            route,
        ))
    }

    fn refuse(&self, problem: Problem) -> ResponseFuture<S::Future, S::Error> {
        ResponseFuture::refused(refusal(&self.shared, problem))
    }
}

/// The answer to a request that was refused before it had an encoded key.
fn refusal(shared: &Shared, problem: Problem) -> Response {
    shared.config().emit(&Event::Refused {
        key: None,
        refusal: problem.refusal(),
    });
    shared.respond(problem)
}

/// One request that has a key, from its body to its answer.
struct Exchange {
    shared: Arc<Shared>,
    engine: crate::Engine,
    terms: crate::policy::Terms,
    is_fixed: bool,
    key: Key,
    owner: Option<Vec<u8>>,
    progress: Progress,
    route: Route,
}

impl Exchange {
    async fn run<S, R>(self, mut inner: S, parts: Parts, body: Body) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        // The reservation is for the whole exchange: whoever waits or runs holds the body.
        let (encoded, body, _reservation) = match self.encode(&parts, body).await {
            Ok(encoded) => encoded,
            Err(refusal) => return Ok(refusal),
        };
        let (run, conflict) = match self.begin(&encoded).await {
            Begun::Run(run, conflict) => (run, conflict),
            Begun::Answered(response) => return Ok(response),
            Begun::Unprotected => {
                let request = self.request(&encoded, Conflict::default(), parts, body);
                let response = inner.call(request.into_inner()).await?;
                return Ok(response.map(Body::new));
            }
        };
        let request = self.request(&encoded, conflict, parts, body);
        self.execute(inner, run, request).await
    }

    async fn begin(&self, encoded: &Encoded) -> Begun {
        let decision = if self.terms.manual {
            self.engine.begin_manual(encoded, &self.progress).await
        } else {
            match self.engine.begin_with(encoded, &self.progress).await {
                Decision::Execute(claim) => ManualDecision::Execute(claim),
                Decision::Replay(replay) => {
                    return Begun::Answered(self.replay(encoded, &replay.record));
                }
                Decision::Refuse(refused) => ManualDecision::Refuse(refused),
                Decision::Unprotected => ManualDecision::Unprotected,
            }
        };
        match decision {
            ManualDecision::Execute(claim) => {
                let claim = match self.terms.ttl {
                    Some(ttl) => claim.ttl(ttl),
                    None => claim,
                };
                Begun::Run(Run::First(claim), Conflict::default())
            }
            ManualDecision::Conflict(turn) => {
                let turn = match self.terms.ttl {
                    Some(ttl) => turn.ttl(ttl),
                    None => turn,
                };
                let conflict = Conflict(Some(turn.record().clone()));
                Begun::Run(Run::Conflict(turn), conflict)
            }
            ManualDecision::Refuse(refused) => {
                let problem = Problem::new(refused.refusal, self.config());
                Begun::Answered(self.shared.respond(problem))
            }
            ManualDecision::Unprotected => Begun::Unprotected,
        }
    }

    fn config(&self) -> &Config {
        self.engine.config()
    }

    fn store_on(&self) -> &StoreOn {
        let config = self.config();
        self.terms.store_on.as_ref().unwrap_or(&config.store_on)
    }

    /// Reads the body if the encoder wants it, and encodes. An error is the answer to the client.
    async fn encode(
        &self,
        parts: &Parts,
        body: Body,
    ) -> Result<(Encoded, Body, Option<Reservation>), Response> {
        let config = self.config();
        let (bytes, body, reservation) = if config.encoder.reads_body() {
            let limit = self
                .terms
                .max_request_body
                .unwrap_or(config.max_request_body);
            match buffer(parts, body, limit, config).await {
                Ok(Buffered {
                    bytes,
                    body,
                    reservation,
                }) => (bytes, body, Some(reservation)),
                Err(unbuffered) => {
                    let problem = unbuffered.into_problem(limit, config);
                    return Err(refusal(&self.shared, problem));
                }
            }
        } else {
            (Bytes::new(), body, None)
        };
        let encoded = config.encoder.encode(
            &self.key,
            &RequestView {
                method: &parts.method,
                path_and_query: path_and_query(original_uri(parts)),
                headers: &parts.headers,
                body: &bytes,
                scope: self.owner.as_deref(),
            },
        );
        Ok((encoded, body, reservation))
    }

    /// The request for the handler, with what protects it.
    fn request(
        &self,
        encoded: &Encoded,
        conflict: Conflict,
        mut parts: Parts,
        body: Body,
    ) -> Protected {
        let protection =
            Protection::new(self.key.clone(), encoded.key, self.terms.clone(), conflict);
        parts.extensions.insert(protection.clone());
        if self.is_fixed {
            parts.extensions.insert(Decided);
        }
        Protected {
            request: Request::from_parts(parts, body),
            protection,
        }
    }

    /// Runs the handler and records what it answers.
    async fn execute<S, R>(
        self,
        mut inner: S,
        run: Run,
        request: Protected,
    ) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        let protection = request.protection.clone();
        // A panic goes on to whoever catches it outside, once the run is ended.
        let answered = AssertUnwindSafe(async { inner.call(request.into_inner()).await })
            .catch_unwind()
            .await;
        let response = match answered {
            Ok(Ok(response)) => response.map(Body::new),
            failed => {
                if self.stores(StatusCode::INTERNAL_SERVER_ERROR, &protection) {
                    run.store_none(TombstoneReason::HandlerFailed).await;
                } else {
                    run.release().await;
                }
                match failed {
                    Ok(result) => return result.map(|response| response.map(Body::new)),
                    Err(panic) => resume_unwind(panic),
                }
            }
        };
        // A user's function may say which statuses are stored, and panic.
        let status = response.status();
        match catch_unwind(AssertUnwindSafe(|| self.stores(status, &protection))) {
            Ok(true) => {
                let Self {
                    engine,
                    progress,
                    route,
                    ..
                } = &self;
                Ok(record(run, response, engine, progress, route).await)
            }
            Ok(false) => {
                run.release().await;
                Ok(response)
            }
            Err(panic) => {
                // The handler is done: what it did must not be done again.
                run.store_none(TombstoneReason::HandlerFailed).await;
                resume_unwind(panic);
            }
        }
    }

    fn replay(&self, encoded: &Encoded, record: &Record) -> Response {
        match &record.outcome {
            Outcome::Response(stored) => response::replayed(stored, self.config()),
            Outcome::Tombstone(reason) => {
                self.config().emit(&Event::Refused {
                    key: Some(encoded.key),
                    refusal: Refusal::NotReplayable,
                });
                self.shared
                    .respond(Problem::not_replayable(*reason, self.config()))
            }
        }
    }

    /// Whether an answer of `status` is recorded.
    fn stores(&self, status: StatusCode, protection: &Protection) -> bool {
        let store_on = self.store_on();
        status != StatusCode::SWITCHING_PROTOCOLS
            && !protection.was_refused()
            && store_on.stores(status)
            && (store_on.stores_rejections() || !protection.was_rejected())
    }
}

/// What came of asking the engine.
#[expect(
    clippy::large_enum_variant,
    reason = "one a request, and the large one is the usual one"
)]
enum Begun {
    /// The handler is to run, on a conflict with what stands recorded.
    Run(Run, Conflict),
    Answered(Response),
    Unprotected,
}

/// A request with its protection.
struct Protected {
    request: Request,
    protection: Protection,
}

impl Protected {
    fn into_inner(self) -> Request {
        self.request
    }
}
