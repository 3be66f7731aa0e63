//! The service: what happens to each request.

use std::{
    fmt,
    future::poll_fn,
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
    Refusal, RequestView, StoreOn, TombstoneReason,
};
use tower_service::Service;

use crate::{
    detach::Detachable,
    discovery::{self, Suspended},
    future::ResponseFuture,
    plan::{Applied, Plan, Shared},
    policy::{Requirement, Terms},
    problem::Problem,
    receipt::Receipt,
    record::record,
    request::{
        Conflict, Decided, Protection, Unbuffered, WithoutKey, buffer, original_uri, path_and_query,
    },
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
        let receipt = self.waive(applied, &mut request);
        ResponseFuture::passed(self.inner.call(request), receipt)
    }

    /// Prepares a request that goes through without protection.
    fn waive(&self, applied: &Applied, request: &mut Request) -> Option<Receipt> {
        if applied.is_fixed && applied.policy.requirement == Requirement::Optional {
            request.extensions_mut().insert(WithoutKey);
        }
        applied.relies_on.map(|handler| {
            let acknowledgement = self.shared.acknowledgement();
            request.extensions_mut().insert(acknowledgement.clone());
            Receipt::new(acknowledgement, handler, request.extensions(), &self.shared)
        })
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
        let key = match policy.terms.key.in_headers(request.headers(), config) {
            Some(Ok(None)) if policy.requirement == Requirement::Optional => {
                return self.pass_unprotected(applied, request);
            }
            Some(Ok(None)) => {
                return self.refuse(Problem::missing_key(&policy.terms.key, config));
            }
            Some(Ok(Some(key))) => Some(key),
            Some(Err(error)) => return self.refuse(Problem::invalid_key(error, config)),
            None => None,
        };
        // In case that the key, which is in the body, turns out to be missing.
        let receipt = match key {
            None => self.waive(applied, &mut request),
            Some(_) => None,
        };
        let (parts, body) = request.into_parts();
        let caller =
            match key.map(|key| Caller::of(key, &parts, &policy.terms, config, &self.shared)) {
                None => None,
                Some(Ok(caller)) => Some(caller),
                Some(Err(problem)) => return self.refuse(problem),
            };

        // The service that is ready goes with the request; its clone waits for the next one.
        let clone = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, clone);
        let progress = Progress::new();
        let exchange = Exchange {
            shared: self.shared.clone(),
            engine: applied.engine.clone(),
            terms: policy.terms.clone(),
            is_optional: policy.requirement == Requirement::Optional,
            is_fixed: applied.is_fixed,
            receipt,
            progress: progress.clone(),
        };
        ResponseFuture::protected(Detachable::new(
            exchange.run(inner, caller, parts, body).boxed(),
            progress,
            applied.engine.clone(),
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

/// A key and whose it is.
struct Caller {
    key: Key,
    owner: Option<Vec<u8>>,
}

impl Caller {
    /// An error is why the request is refused.
    fn of(
        key: Key,
        parts: &Parts,
        terms: &Terms,
        config: &Config,
        shared: &Shared,
    ) -> Result<Self, Problem> {
        let scope = terms.scope.as_ref().unwrap_or(&config.scope);
        let owner = scope.of(parts);
        if owner.is_none() && scope.is_required() {
            return Err(Problem::new(Refusal::ScopeRequired, config));
        }
        if scope.overlooks_cookie(parts) {
            shared.warn_of_cookie(&parts.extensions);
        }
        Ok(Self { key, owner })
    }
}

/// One request that has a key, or may have one in its body, from its body to its answer.
struct Exchange {
    shared: Arc<Shared>,
    engine: crate::Engine,
    terms: Terms,
    is_optional: bool,
    is_fixed: bool,
    /// Of a request that may turn out to have no key.
    receipt: Option<Receipt>,
    progress: Progress,
}

impl Exchange {
    async fn run<S, R>(
        self,
        mut inner: S,
        caller: Option<Caller>,
        parts: Parts,
        body: Body,
    ) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        let (key, encoded, body) = match self.encode(caller, &parts, body).await {
            Ok((Some((key, encoded)), body)) => (key, encoded, body),
            Ok((None, body)) => return self.run_without_key(inner, parts, body).await,
            Err(refusal) => return Ok(refusal),
        };
        let (run, conflict) = match self.begin(&encoded).await {
            Begun::Run(run, conflict) => (run, conflict),
            Begun::Answered(response) => return Ok(response),
            Begun::Unprotected => {
                let request = self.request(key, &encoded, Conflict::default(), parts, body);
                let response = inner.call(request.into_inner()).await?;
                return Ok(response.map(Body::new));
            }
        };
        let request = self.request(key, &encoded, conflict, parts, body);
        self.execute(inner, run, request).await
    }

    /// Runs the handler for a request whose body has no key, as it may.
    async fn run_without_key<S, R>(
        self,
        mut inner: S,
        parts: Parts,
        body: Body,
    ) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        poll_fn(|cx| inner.poll_ready(cx)).await?;
        let response = inner.call(Request::from_parts(parts, body)).await?;
        let response = response.map(Body::new);
        if let Some(receipt) = self.receipt {
            receipt.check(&response);
        }
        Ok(response)
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
    ///
    /// Without a `caller` the key is looked for in the body. If it is missing, and may be, nothing is encoded.
    async fn encode(
        &self,
        caller: Option<Caller>,
        parts: &Parts,
        body: Body,
    ) -> Result<(Option<(Key, Encoded)>, Body), Response> {
        let config = self.config();
        let reads_body = config.encoder.reads_body();
        let (bytes, body) = if reads_body || caller.is_none() {
            let limit = self
                .terms
                .max_request_body
                .unwrap_or(config.max_request_body);
            match buffer(parts, body, limit).await {
                Ok(buffered) => buffered,
                Err(Unbuffered::TooLarge) => {
                    let problem = Problem::body_too_large(limit, config);
                    return Err(refusal(&self.shared, problem));
                }
                Err(Unbuffered::TooLargeOutside) => {
                    let problem = Problem::new(Refusal::BodyTooLarge, config);
                    return Err(refusal(&self.shared, problem));
                }
                Err(Unbuffered::Broken(error)) => {
                    tracing::debug!(target: "idempotency", %error, "the request's body broke off; nothing was run");
                    return Err(StatusCode::BAD_REQUEST.into_response());
                }
            }
        } else {
            (Bytes::new(), body)
        };
        let caller = match caller {
            Some(caller) => Some(caller),
            None => self
                .find_caller(parts, &bytes)
                .map_err(|problem| refusal(&self.shared, problem))?,
        };
        let Some(Caller { key, owner }) = caller else {
            return Ok((None, body));
        };
        let encoded = config.encoder.encode(
            &key,
            &RequestView {
                method: &parts.method,
                path_and_query: path_and_query(original_uri(parts)),
                headers: &parts.headers,
                body: if reads_body { &bytes } else { &[] },
                scope: owner.as_deref(),
            },
        );
        Ok((Some((key, encoded)), body))
    }

    /// Looks for the key in the body too.
    fn find_caller(&self, parts: &Parts, body: &[u8]) -> Result<Option<Caller>, Problem> {
        let config = self.config();
        match self.terms.key.find(parts, body, config) {
            Ok(Some(key)) => Caller::of(key, parts, &self.terms, config, &self.shared).map(Some),
            Ok(None) if self.is_optional => Ok(None),
            Ok(None) => Err(Problem::missing_key(&self.terms.key, config)),
            Err(error) => Err(Problem::invalid_key(error, config)),
        }
    }

    /// The request for the handler, with what protects it.
    fn request(
        &self,
        key: Key,
        encoded: &Encoded,
        conflict: Conflict,
        mut parts: Parts,
        body: Body,
    ) -> Protected {
        let protection = Protection::new(key, encoded.key, self.terms.clone(), conflict);
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
            Ok(true) => Ok(record(run, response, &self.engine).await),
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
