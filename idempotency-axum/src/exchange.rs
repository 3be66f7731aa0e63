//! One protected request, from its key to its answer.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
};

use axum::{body::Body, extract::Request, response::Response};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{StatusCode, request::Parts};
use idempotency_core::{
    BoxError, Claim, Config, Decision, Encoded, Event, Key, Outcome, Progress, Record, Refusal,
    Reservation, StoreOn, TombstoneReason,
};
use tower_service::Service;

use crate::{
    buffer::request::{Buffered, buffer},
    detach::Route,
    handshake::{Conflict, Decided, Protection, Receipt, WithoutKey},
    plan::Shared,
    policy::Terms,
    problem::Problem,
    recording::{record, store_none},
    request::encode,
    response::{self, DoNotRecord},
};

mod transaction;

/// The answer to a request that was refused before it had an encoded key.
pub(crate) fn refusal(shared: &Shared, problem: Problem) -> Response {
    shared.config().emit(&Event::Refused {
        key: None,
        refusal: problem.refusal(),
    });
    shared.respond(problem)
}

/// A key and whose it is.
pub(crate) struct Caller {
    key: Key,
    owner: Option<Vec<u8>>,
}

impl Caller {
    /// An error is the refusal of the request.
    pub(crate) fn of(
        key: Key,
        parts: &Parts,
        terms: &Terms,
        config: &Config,
        shared: &Shared,
    ) -> Result<Self, Problem> {
        let scope = terms.scope.as_ref().unwrap_or(&config.scope);
        let owner = scope.of(parts).map_err(|unknown| {
            shared.report_unknown_caller(&unknown, &parts.extensions);
            Problem::new(Refusal::ScopeRequired, config)
        })?;
        // Without credentials a request with a cookie was refused.
        if owner.is_some() && scope.overlooks_cookie(parts) {
            shared.warn_of_cookie(&parts.extensions);
        }
        Ok(Self { key, owner })
    }
}

/// A request whose body was read as far as key and encoder need it.
struct Encoding {
    /// `None` if an optional key was not found in the body.
    named: Option<(Key, Encoded)>,
    body: Body,
    reservation: Option<Reservation>,
}

/// One request that has a key, or may have one in its body: from reading the body to the answer.
pub(crate) struct Exchange {
    pub(crate) shared: Arc<Shared>,
    pub(crate) engine: crate::Engine,
    pub(crate) terms: Arc<Terms>,
    pub(crate) is_optional: bool,
    pub(crate) is_fixed: bool,
    /// Whether a route matched, as far as this layer can see.
    pub(crate) is_routed: bool,
    /// Checked if the request turns out to have no key.
    pub(crate) receipt: Option<Box<Receipt>>,
    pub(crate) progress: Progress,
    pub(crate) route: Route,
}

impl Exchange {
    pub(crate) async fn run<S, R>(
        self,
        inner: S,
        caller: Option<Caller>,
        parts: Parts,
        body: Body,
    ) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        let Encoding {
            named,
            body,
            // Held for the whole exchange: a request that waits or runs holds its body.
            reservation: _reservation,
        } = match self.encode(caller, &parts, body).await {
            Ok(encoding) => encoding,
            Err(refusal) => return Ok(refusal),
        };
        let Some((key, encoded)) = named else {
            let request = self.request_without_key(parts, body);
            let response = Box::pin(call(inner, request)).await?;
            if let Some(receipt) = &self.receipt {
                receipt.check(&response);
            }
            return Ok(response);
        };
        if self.terms.transaction.is_some() {
            return Box::pin(self.run_in_transaction(inner, key, encoded, parts, body)).await;
        }
        let progress = &self.progress;
        let decision = match self.terms.manual {
            true => Box::pin(self.engine.begin_manual(&encoded, progress)).await,
            false => self.engine.begin_with(&encoded, progress).await,
        };
        let claim = match decision {
            Decision::Execute(claim) => claim,
            Decision::Replay(replay) => return Ok(self.replay(&encoded, &replay.record)),
            Decision::Refuse(refused) => return Ok(self.problem(refused.refusal)),
            Decision::Unprotected => {
                let protection = self.protection(key, &encoded, Conflict::default());
                let request = self.request(&protection, parts, body);
                return Box::pin(call(inner, request)).await;
            }
        };
        let claim = match self.terms.ttl {
            Some(ttl) => claim.ttl(ttl),
            None => claim,
        };
        let conflict = Conflict(claim.previous().cloned());
        let protection = self.protection(key, &encoded, conflict);
        let request = self.request(&protection, parts, body);
        self.execute(inner, claim, request, &protection).await
    }

    fn config(&self) -> &Config {
        self.engine.config()
    }

    fn problem(&self, refusal: Refusal) -> Response {
        self.shared.respond(Problem::new(refusal, self.config()))
    }

    fn store_on(&self) -> &StoreOn {
        let config = self.config();
        self.terms.store_on.as_ref().unwrap_or(&config.store_on)
    }

    /// Reads the body if the encoder needs it, and encodes. An error is the answer to the client.
    ///
    /// Without a `caller` the key is looked for in the body. If it is optional and missing, nothing is encoded.
    async fn encode(
        &self,
        caller: Option<Caller>,
        parts: &Parts,
        body: Body,
    ) -> Result<Encoding, Response> {
        let config = self.config();
        let reads_body = config.encoder.reads_body();
        let (bytes, body, reservation) = if reads_body || caller.is_none() {
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
        let caller = match caller {
            Some(caller) => Some(caller),
            None => self
                .find_caller(parts, &bytes)
                .map_err(|problem| refusal(&self.shared, problem))?,
        };
        let Some(Caller { key, owner }) = caller else {
            return Ok(Encoding {
                named: None,
                body,
                reservation,
            });
        };
        let encoded = encode(config, &key, parts, &bytes, owner.as_deref());
        Ok(Encoding {
            named: Some((key, encoded)),
            body,
            reservation,
        })
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

    fn protection(&self, key: Key, encoded: &Encoded, conflict: Conflict) -> Protection {
        Protection::new(key, encoded.key, self.terms.clone(), conflict)
    }

    /// The request for the handler, with its protection.
    fn request(&self, protection: &Protection, mut parts: Parts, body: Body) -> Request {
        parts.extensions.insert(protection.clone());
        if self.is_fixed {
            parts.extensions.insert(Decided);
        }
        Request::from_parts(parts, body)
    }

    /// The request for the handler, if an optional key was not found in the body.
    fn request_without_key(&self, mut parts: Parts, body: Body) -> Request {
        if self.is_fixed {
            parts.extensions.insert(WithoutKey);
        }
        Request::from_parts(parts, body)
    }

    /// Runs the handler and records its answer.
    async fn execute<S, R>(
        &self,
        mut inner: S,
        claim: Claim,
        request: Request,
        protection: &Protection,
    ) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        // A panic is resumed once the claim has ended.
        let ready = AssertUnwindSafe(poll_fn(|cx| inner.poll_ready(cx))).catch_unwind();
        match ready.await {
            Ok(Ok(())) => {}
            // The handler was not called.
            Ok(Err(error)) => {
                claim.release().await;
                return Err(error);
            }
            Err(panic) => {
                claim.release().await;
                resume_unwind(panic);
            }
        }
        // In an async block, so that a panic of `call` itself counts as one of the handler.
        let answered = AssertUnwindSafe(async { inner.call(request).await })
            .catch_unwind()
            .await;
        let (status, is_kept) = match &answered {
            Ok(Ok(response)) => (response.status(), !DoNotRecord::is_part_of(response)),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, true),
        };
        // A user's `StoreOn::from_fn` may panic. The handler has run then, and must not run again.
        let stores = catch_unwind(AssertUnwindSafe(|| {
            is_kept && self.stores(status, protection)
        }));
        let response = match answered {
            Ok(Ok(response)) => response.map(Body::new),
            failed => {
                match stores {
                    Ok(false) => claim.release().await,
                    Ok(true) | Err(_) => store_none(claim, TombstoneReason::HandlerFailed).await,
                }
                match failed {
                    Ok(result) => return result.map(|response| response.map(Body::new)),
                    Err(panic) => resume_unwind(panic),
                }
            }
        };
        match stores {
            Ok(true) => {
                let Self {
                    engine,
                    progress,
                    route,
                    ..
                } = self;
                Ok(record(claim, response, engine, progress, route).await)
            }
            Ok(false) => {
                claim.release().await;
                if is_kept && status.is_redirection() && status != StatusCode::NOT_MODIFIED {
                    self.shared.warn_of_redirect(self.route.path());
                }
                Ok(response)
            }
            Err(panic) => {
                store_none(claim, TombstoneReason::HandlerFailed).await;
                resume_unwind(panic);
            }
        }
    }

    fn replay(&self, encoded: &Encoded, record: &Record) -> Response {
        match &record.outcome {
            Outcome::Response(stored) => {
                let response = response::replayed(stored, self.config());
                if response.status().is_success() && !stored.status().is_success() {
                    self.shared
                        .warn_of_hidden_failure(self.route.path(), stored.status());
                }
                response
            }
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
            && (protection.was_entered() || !self.is_of_the_router(status))
            && store_on.stores(status)
            && (store_on.stores_rejections() || !protection.was_rejected())
    }

    /// Whether an answer of `status` may come from a router without a handler for the request. The next release may have one.
    fn is_of_the_router(&self, status: StatusCode) -> bool {
        match status {
            StatusCode::METHOD_NOT_ALLOWED => true,
            StatusCode::NOT_FOUND => !self.is_routed,
            _ => false,
        }
    }
}

/// Calls `inner` once it is ready, for an answer that is not recorded.
async fn call<S, R>(mut inner: S, request: Request) -> Result<Response, S::Error>
where
    S: Service<Request, Response = http::Response<R>>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    poll_fn(|cx| inner.poll_ready(cx)).await?;
    Ok(inner.call(request).await?.map(Body::new))
}
