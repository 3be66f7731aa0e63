//! Future of [`Idempotency`](crate::Idempotency).

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use idempotency_core::BoxError;
use pin_project_lite::pin_project;

use crate::{detach::Detachable, receipt::Receipt};

pin_project! {
    /// Response future of [`Idempotency`](crate::Idempotency).
    #[must_use = "futures do nothing unless polled"]
    pub struct ResponseFuture<F, E>
    where
        E: 'static,
    {
        #[pin]
        kind: Kind<F, E>,
    }
}

pin_project! {
    #[project = KindProj]
    enum Kind<F, E>
    where
        E: 'static,
    {
        Passed { #[pin] future: F, receipt: Option<Receipt> },
        Protected { #[pin] future: Detachable<Result<Response, E>> },
        Refused { response: Option<Response> },
    }
}

impl<F, E: 'static> ResponseFuture<F, E> {
    pub(crate) fn passed(future: F, receipt: Option<Receipt>) -> Self {
        Self {
            kind: Kind::Passed { future, receipt },
        }
    }

    pub(crate) fn protected(future: Detachable<Result<Response, E>>) -> Self {
        Self {
            kind: Kind::Protected { future },
        }
    }

    pub(crate) fn refused(response: Response) -> Self {
        Self {
            kind: Kind::Refused {
                response: Some(response),
            },
        }
    }
}

impl<F, B, E> Future for ResponseFuture<F, E>
where
    F: Future<Output = Result<http::Response<B>, E>>,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
    E: 'static,
{
    type Output = Result<Response, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().kind.project() {
            KindProj::Passed { future, receipt } => {
                let response = ready!(future.poll(cx))?.map(Body::new);
                if let Some(receipt) = receipt.take() {
                    receipt.check(&response);
                }
                Poll::Ready(Ok(response))
            }
            KindProj::Protected { future } => future.poll(cx),
            KindProj::Refused { response } => match response.take() {
                Some(response) => Poll::Ready(Ok(response)),
                None => panic!("`ResponseFuture` was polled after completion"),
            },
        }
    }
}

impl<F, E: 'static> fmt::Debug for ResponseFuture<F, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
