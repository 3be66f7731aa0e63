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
    BoxError, Claim, Config, Decision, Encoded, Event, Key, Outcome, Progress, Record, Refusal,
    RequestView, StoreOn, TombstoneReason,
};
use tower_service::Service;

use crate::{
    detach::Detachable,
    discovery::{self, Suspended},
    extract::Conflict,
    future::ResponseFuture,
    layer::{Applied, Plan, Shared},
    policy::Requirement,
    problem::Problem,
    record::{Read, read_at_once},
    request::{
        Acknowledgement, Decided, Protection, Unbuffered, WithoutKey, buffer, original_uri,
        path_and_query,
    },
    response,
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
            Receipt {
                acknowledgement,
                handler,
                path: request.extensions().get().cloned(),
                shared: self.shared.clone(),
            }
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
        let exchange = Exchange {
            shared: self.shared.clone(),
            engine: applied.engine.clone(),
            terms: applied.policy.terms.clone(),
            is_fixed: applied.is_fixed,
            key,
            owner,
            progress: progress.clone(),
        };
        ResponseFuture::protected(Detachable::new(
            exchange.run(inner, parts, body).boxed(),
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

/// Proof, to come, that the handler on whose word a request was let through is the one that answered.
pub(crate) struct Receipt {
    acknowledgement: Acknowledgement,
    handler: &'static str,
    path: Option<axum::extract::MatchedPath>,
    shared: Arc<Shared>,
}

impl Receipt {
    /// A refusal, an error or a redirect may come from a middleware between us and the handler, and a client may provoke it. A
    /// success without the handler's acknowledgement is another handler's, which never said that it may run without a key.
    pub(crate) fn check(self, response: &Response) {
        if self.acknowledgement.was_given() || !response.status().is_success() {
            self.shared.give_back(self.acknowledgement);
            return;
        }
        let path = self.path.as_ref().map_or("", |path| path.as_str());
        tracing::error!(
            target: "idempotency",
            handler = self.handler,
            path,
            cure = "put the layer on the routes inside this service, or fix its policy with `.policy(…)`",
            "a request ran unprotected because of the policy of a handler that did not answer it; this route now has the \
             mode's default policy"
        );
        self.shared.distrust(self.handler, path.to_owned());
    }
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
}

impl Exchange {
    async fn run<S, R>(self, mut inner: S, parts: Parts, body: Body) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        let (encoded, body) = match self.encode(&parts, body).await {
            Ok(encoded) => encoded,
            Err(refusal) => return Ok(refusal),
        };
        match self.engine.begin_with(&encoded, &self.progress).await {
            Decision::Execute(claim) => {
                let request = self.request(&encoded, Conflict::default(), parts, body);
                self.execute(inner, claim, request).await
            }
            Decision::Replay(replay) if self.terms.manual => {
                let conflict = Conflict(Some(replay.record));
                let request = self.request(&encoded, conflict, parts, body);
                self.resolve(inner, &encoded, request).await
            }
            Decision::Replay(replay) => Ok(self.replay(&encoded, &replay.record)),
            Decision::Refuse(refused) => Ok(self
                .shared
                .respond(Problem::new(refused.refusal, self.config()))),
            Decision::Unprotected => {
                let request = self.request(&encoded, Conflict::default(), parts, body);
                let response = inner.call(request.into_inner()).await?;
                Ok(response.map(Body::new))
            }
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
    async fn encode(&self, parts: &Parts, body: Body) -> Result<(Encoded, Body), Response> {
        let config = self.config();
        let (bytes, body) = if config.encoder.reads_body() {
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
                Err(Unbuffered::Broken(error)) => {
                    tracing::debug!(target: "idempotency", %error, "the request's body broke off; nothing was run");
                    return Err(StatusCode::BAD_REQUEST.into_response());
                }
            }
        } else {
            (Bytes::new(), body)
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
        Ok((encoded, body))
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

    /// Runs the handler under its claim and records what it answers.
    async fn execute<S, R>(
        self,
        mut inner: S,
        claim: Claim,
        request: Protected,
    ) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        let claim = match self.terms.ttl {
            Some(ttl) => claim.ttl(ttl),
            None => claim,
        };
        let protection = request.protection.clone();
        // A panic goes on to whoever catches it outside, once the claim is ended.
        let answered = AssertUnwindSafe(async { inner.call(request.into_inner()).await })
            .catch_unwind()
            .await;
        let response = match answered {
            Ok(Ok(response)) => response.map(Body::new),
            failed => {
                if self.stores(StatusCode::INTERNAL_SERVER_ERROR, &protection) {
                    let _ = claim.tombstone(TombstoneReason::HandlerFailed).await;
                } else {
                    claim.release().await;
                }
                match failed {
                    Ok(result) => return result.map(|response| response.map(Body::new)),
                    Err(panic) => resume_unwind(panic),
                }
            }
        };
        let (parts, body) = response.into_parts();
        // A user's function may say which statuses are stored, and panic.
        let stores = catch_unwind(AssertUnwindSafe(|| self.stores(parts.status, &protection)));
        match stores {
            Ok(true) => {}
            Ok(false) => {
                claim.release().await;
                return Ok(Response::from_parts(parts, body));
            }
            Err(panic) => {
                // The handler is done: what it did must not be done again.
                let _ = claim.tombstone(TombstoneReason::HandlerFailed).await;
                resume_unwind(panic);
            }
        }
        // Whatever becomes of the record, this client gets its answer, and the engine tells what became of it.
        let read = AssertUnwindSafe(read_at_once(&parts, body, self.config().max_response_body));
        let read = match read.catch_unwind().await {
            Ok(read) => read,
            Err(panic) => {
                let _ = claim.tombstone(TombstoneReason::StreamBroken).await;
                resume_unwind(panic);
            }
        };
        let body = match read {
            Read::Whole(bytes) => {
                let stored = response::stored(&parts, bytes.clone(), self.config());
                let _ = claim.complete(stored).await;
                Body::from(bytes)
            }
            Read::Not(reason, body) => {
                let _ = claim.tombstone(reason).await;
                body
            }
        };
        Ok(Response::from_parts(parts, body))
    }

    /// Runs a manual handler on a conflict; an answer that is stored replaces the record.
    async fn resolve<S, R>(
        self,
        mut inner: S,
        encoded: &Encoded,
        request: Protected,
    ) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        let protection = request.protection.clone();
        let response = inner.call(request.into_inner()).await?.map(Body::new);
        let (parts, body) = response.into_parts();
        if !self.stores(parts.status, &protection) {
            return Ok(Response::from_parts(parts, body));
        }
        let config = self.config();
        let body = match read_at_once(&parts, body, config.max_response_body).await {
            Read::Whole(bytes) => {
                let record = Record {
                    fingerprint: encoded.fingerprint,
                    outcome: Outcome::Response(response::stored(&parts, bytes.clone(), config)),
                };
                let ttl = self.terms.ttl.unwrap_or(config.ttl);
                if let Err(error) = self.engine.replace(&encoded.key, &record, ttl).await {
                    tracing::warn!(target: "idempotency", key = %encoded.key, %error, "the old record stays");
                }
                Body::from(bytes)
            }
            Read::Not(_, body) => body,
        };
        Ok(Response::from_parts(parts, body))
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
