//! Future of [`Idempotency`](crate::Idempotency).

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::{body::Body, extract::Request, response::Response};
use bytes::Bytes;
use idempotency_core::BoxError;
use pin_project_lite::pin_project;
use tower_service::Service;

use crate::{detach::Detachable, handshake::Receipt};

pin_project! {
    /// Response future of [`Idempotency`](crate::Idempotency) around `S`.
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<S>
    where
        S: Service<Request>,
        S::Error: 'static,
    {
        #[pin]
        kind: Kind<S>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<S>
    where
        S: Service<Request>,
        S::Error: 'static,
    {
        Waiting { waiting: Box<Waiting<S>> },
        Called { #[pin] future: S::Future, receipt: Option<Box<Receipt>> },
        Protected { #[pin] future: Detachable<Result<Response, S::Error>> },
        Decided { result: Option<Result<Response, S::Error>> },
    }
}

/// A request whose inner service was not ready. Boxed, because it is rare and larger than the rest.
struct Waiting<S> {
    inner: S,
    request: Option<Request>,
    receipt: Option<Box<Receipt>>,
}

impl<S> ResponseFuture<S>
where
    S: Service<Request>,
    S::Error: 'static,
{
    /// Calls `inner` once it is ready.
    pub(crate) fn waiting(inner: S, request: Request, receipt: Option<Box<Receipt>>) -> Self {
        let waiting = Box::new(Waiting {
            inner,
            request: Some(request),
            receipt,
        });
        Self::new(Kind::Waiting { waiting })
    }

    pub(crate) fn called(future: S::Future, receipt: Option<Box<Receipt>>) -> Self {
        Self::new(Kind::Called { future, receipt })
    }

    pub(crate) fn protected(future: Detachable<Result<Response, S::Error>>) -> Self {
        Self::new(Kind::Protected { future })
    }

    pub(crate) fn failed(error: S::Error) -> Self {
        Self::new(Kind::Decided {
            result: Some(Err(error)),
        })
    }

    pub(crate) fn refused(response: Response) -> Self {
        Self::new(Kind::Decided {
            result: Some(Ok(response)),
        })
    }

    fn new(kind: Kind<S>) -> Self {
        Self { kind }
    }
}

impl<S, R> Future for ResponseFuture<S>
where
    S: Service<Request, Response = http::Response<R>>,
    S::Error: 'static,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<BoxError>,
{
    type Output = Result<Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        const OVER: &str = "`ResponseFuture` was polled after completion";
        let mut kind = self.project().kind;
        loop {
            match kind.as_mut().project() {
                KindProj::Waiting { waiting } => {
                    ready!(waiting.inner.poll_ready(cx))?;
                    let Some(request) = waiting.request.take() else {
                        panic!("{OVER}");
                    };
                    let future = waiting.inner.call(request);
                    let receipt = waiting.receipt.take();
                    kind.set(Kind::Called { future, receipt });
                }
                KindProj::Called { future, receipt } => {
                    let response = ready!(future.poll(cx))?.map(Body::new);
                    if let Some(receipt) = receipt.take() {
                        receipt.check(&response);
                    }
                    return Poll::Ready(Ok(response));
                }
                KindProj::Protected { future } => return future.poll(cx),
                KindProj::Decided { result } => match result.take() {
                    Some(result) => return Poll::Ready(result),
                    None => panic!("{OVER}"),
                },
            }
        }
    }
}

impl<S> fmt::Debug for ResponseFuture<S>
where
    S: Service<Request>,
    S::Error: 'static,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
