//! A request whose handler writes in the transaction of its record.

use std::{
    future::poll_fn,
    panic::{AssertUnwindSafe, resume_unwind},
    pin::pin,
};

use axum::{
    body::Body,
    extract::Request,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{Either, select},
};
use http::{StatusCode, request::Parts};
use idempotency_core::{
    BoxError, Decision, Encoded, Key, Outcome, Refusal, RolledBack, StorageError, TombstoneReason,
    TransactionClaim, TransactionEnd, Writes,
};
use tower_service::Service;

use super::Exchange;
use crate::{
    handshake::{Conflict, Protection},
    recording::{Gathered, gather},
    response::DoNotRecord,
};

/// An answer, before anything of it is committed.
enum Answer {
    /// Nothing is committed.
    Unrecorded(Response),
    Gathered(Gathered, Writes),
}

impl Exchange {
    /// Runs the handler in a transaction, unless its key is taken, and commits what it wrote together with its answer.
    pub(super) async fn run_in_transaction<S, R>(
        &self,
        inner: S,
        key: Key,
        encoded: Encoded,
        parts: Parts,
        body: Body,
    ) -> Result<Response, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        let ttl = self.terms.ttl;
        let decision = self
            .engine
            .begin_in_transaction(&encoded, &self.progress, ttl)
            .await;
        let claim = match decision {
            Decision::Execute(claim) => claim,
            Decision::Replay(replay) => return Ok(self.replay(&encoded, &replay.record)),
            Decision::Refuse(refused) => return Ok(self.problem(refused.refusal)),
            Decision::Unprotected => return Ok(self.problem(Refusal::StorageUnavailable)),
        };
        let protection = self.protection(key, &encoded, Conflict::default());
        let mut request = self.request(&protection, parts, body);
        request.extensions_mut().insert(claim.slot());

        let answered = {
            let answer = self.answer(inner, request, &protection, &claim);
            let answer = pin!(AssertUnwindSafe(answer).catch_unwind());
            match select(answer, pin!(claim.expired())).await {
                Either::Left((answered, _)) => Some(answered),
                Either::Right(_) => None,
            }
        };
        let Some(answered) = answered else {
            return Ok(match self.roll_back(claim).await {
                Some(refusal) => refusal,
                None => self.expired(),
            });
        };
        match answered {
            Ok(Ok(Answer::Unrecorded(response))) => {
                let refusal = self.roll_back(claim).await;
                Ok(refusal.unwrap_or(response))
            }
            Ok(Ok(Answer::Gathered(gathered, writes))) => {
                Ok(self.commit(claim, gathered, writes).await)
            }
            Ok(Err(error)) => {
                self.fail(claim, &protection).await;
                Err(error)
            }
            Err(panic) => {
                self.fail(claim, &protection).await;
                resume_unwind(panic);
            }
        }
    }

    /// Ends the transaction of a handler that was not called, or failed: counts as a 500.
    async fn fail(&self, claim: TransactionClaim, protection: &Protection) {
        if self.stores(StatusCode::INTERNAL_SERVER_ERROR, protection) {
            let tombstone = Outcome::Tombstone(TombstoneReason::HandlerFailed);
            let end = claim.commit(tombstone, Writes::Undo).await;
            self.report(&end);
        } else {
            let _ = self.roll_back(claim).await;
        }
    }

    /// Calls the handler, and reads its answer if that is to be committed.
    async fn answer<S, R>(
        &self,
        mut inner: S,
        request: Request,
        protection: &Protection,
        claim: &TransactionClaim,
    ) -> Result<Answer, S::Error>
    where
        S: Service<Request, Response = http::Response<R>>,
        R: http_body::Body<Data = Bytes> + Send + 'static,
        R::Error: Into<BoxError>,
    {
        poll_fn(|cx| inner.poll_ready(cx)).await?;
        let response = inner.call(request).await?.map(Body::new);
        Ok(match self.writes(&response, protection, claim) {
            Some(writes) => Answer::Gathered(gather(response, self.config()).await, writes),
            None => Answer::Unrecorded(response),
        })
    }

    /// What becomes of the handler's writes; `None` if nothing is committed. Whatever commits writes commits a record.
    fn writes(
        &self,
        response: &Response,
        protection: &Protection,
        claim: &TransactionClaim,
    ) -> Option<Writes> {
        let status = response.status();
        let is_answered = protection.was_entered() || !self.is_of_the_router(status);
        if DoNotRecord::is_part_of(response) || protection.was_refused() || !is_answered {
            return None;
        }
        if status.is_success() || status.is_redirection() || claim.keeps_writes() {
            return Some(Writes::Keep);
        }
        self.stores(status, protection).then_some(Writes::Undo)
    }

    async fn commit(
        &self,
        claim: TransactionClaim,
        gathered: Gathered,
        writes: Writes,
    ) -> Response {
        let (outcome, response) = match gathered {
            Gathered::Whole(stored, response) => (Outcome::Response(stored), response),
            Gathered::Unrecordable(reason, response) => (Outcome::Tombstone(reason), response),
            Gathered::Broken(error) => {
                let _ = self.roll_back(claim).await;
                tracing::error!(
                    target: "idempotency",
                    path = self.route.path(),
                    %error,
                    "the answer of a handler broke off before its transaction was committed: it was rolled back"
                );
                return StatusCode::INTERNAL_SERVER_ERROR.into_response();
            }
        };
        let end = claim.commit(outcome, writes).await;
        self.report(&end);
        match end {
            TransactionEnd::Committed => response,
            TransactionEnd::RolledBack(_) => self.problem(Refusal::RolledBack),
            TransactionEnd::Unknown(_) => self.problem(Refusal::InDoubt),
            TransactionEnd::Failed(_)
            | TransactionEnd::EndedByHand
            | TransactionEnd::NotGivenBack => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        }
    }

    /// Rolls back. Returns the answer to the client where that could not be done.
    async fn roll_back(&self, claim: TransactionClaim) -> Option<Response> {
        match claim.roll_back().await {
            RolledBack::Yes => None,
            RolledBack::EndedByHand => {
                self.report(&TransactionEnd::EndedByHand);
                Some(StatusCode::INTERNAL_SERVER_ERROR.into_response())
            }
        }
    }

    /// Logs what the client is not told.
    fn report(&self, end: &TransactionEnd) {
        let path = self.route.path();
        match end {
            TransactionEnd::Failed(error) => tracing::error!(
                target: "idempotency",
                path,
                %error,
                source = source_of(error),
                cure = "return an error from the handler when a statement fails",
                "a statement of a handler had failed, so its transaction was rolled back and its answer replaced by a 500"
            ),
            TransactionEnd::EndedByHand => tracing::error!(
                target: "idempotency",
                path,
                cure = "leave COMMIT and ROLLBACK to the layer: the answer's status decides, or `keep_writes`",
                "a handler has ended its transaction itself: its key has a tombstone, and its answer was replaced by a 500"
            ),
            TransactionEnd::RolledBack(error) => tracing::warn!(
                target: "idempotency",
                path,
                %error,
                source = source_of(error),
                "a transaction could not be committed and was rolled back: a retry runs"
            ),
            TransactionEnd::Unknown(error) => tracing::warn!(
                target: "idempotency",
                path,
                %error,
                source = source_of(error),
                "the connection was lost during a commit: the retry reads what became of it"
            ),
            TransactionEnd::Committed | TransactionEnd::NotGivenBack => {}
        }
    }

    fn expired(&self) -> Response {
        tracing::error!(
            target: "idempotency",
            path = self.route.path(),
            cure = "make the handler shorter, call other services between two phases (`between`), or raise `max_transaction`",
            "a transaction was open for too long: its handler was dropped, and it was rolled back"
        );
        self.problem(Refusal::RolledBack)
    }
}

fn source_of(error: &StorageError) -> Option<tracing::field::DebugValue<String>> {
    let source = std::error::Error::source(error)?;
    Some(tracing::field::debug(source.to_string()))
}
