//! A request's body, read into memory before its key is encoded, so before any claim.

use std::{
    error::Error,
    future::{poll_fn, ready},
    io, iter,
    pin::Pin,
    task::Poll,
};

use axum::body::Body;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{HeaderMap, StatusCode, header, request::Parts};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt, Full, LengthLimitError};
use idempotency_core::{BoxError, Config, Refusal, Reservation};
use tower_http::timeout::TimeoutError;

use super::{Buffer, Overflow};
use crate::problem::Problem;

/// A whole body.
#[derive(Debug)]
pub(crate) struct Buffered {
    pub(crate) bytes: Bytes,
    /// The same body for the handler, with its trailers.
    pub(crate) body: Body,
    /// Held for as long as the request.
    pub(crate) reservation: Reservation,
}

/// A body that could not be buffered.
#[derive(Debug)]
pub(crate) enum Unbuffered {
    TooLong,
    NoRoom,
    /// No bytes came for [`Config::body_timeout`].
    Silent,
    Broken(BoxError),
}

/// Reads the body of a request, of `limit` bytes at most.
pub(crate) async fn buffer(
    parts: &Parts,
    body: Body,
    limit: usize,
    config: &Config,
) -> Result<Buffered, Unbuffered> {
    if announced_length(parts).is_some_and(|length| length > limit as u64) {
        return Err(Unbuffered::TooLong);
    }
    let mut buffer = Buffer::reserved(limit, &config.budget).ok_or(Unbuffered::NoRoom)?;
    let mut arriving = Arriving::new(body, config);
    let mut trailers = None;
    while let Some(frame) = arriving.next().await? {
        match frame.into_data() {
            Ok(data) => buffer.push(&data)?,
            Err(frame) => add_trailers(&mut trailers, frame),
        }
    }
    buffer.detach();
    let (bytes, reservation) = buffer.into_parts();
    let full = Full::new(bytes.clone());
    Ok(Buffered {
        bytes,
        body: match trailers {
            None => Body::new(full),
            Some(trailers) => Body::new(full.with_trailers(ready(Some(Ok(trailers))))),
        },
        reservation,
    })
}

/// `Content-Length`, so that a body over the limit is refused before it is read.
fn announced_length(parts: &Parts) -> Option<u64> {
    let length = parts.headers.get(header::CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

fn add_trailers(trailers: &mut Option<HeaderMap>, frame: Frame<Bytes>) {
    if let Ok(more) = frame.into_trailers() {
        match trailers {
            None => *trailers = Some(more),
            Some(trailers) => trailers.extend(more),
        }
    }
}

/// A body under a time limit on its silence.
struct Arriving<'a> {
    body: Body,
    config: &'a Config,
    /// `None` until the body is pending: a body that is ready needs no timer.
    silence: Option<BoxFuture<'static, ()>>,
}

impl<'a> Arriving<'a> {
    fn new(body: Body, config: &'a Config) -> Self {
        Self {
            body,
            config,
            silence: None,
        }
    }

    async fn next(&mut self) -> Result<Option<Frame<Bytes>>, Unbuffered> {
        let next = poll_fn(|cx| {
            if let Poll::Ready(next) = Pin::new(&mut self.body).poll_frame(cx) {
                return Poll::Ready(next.transpose().map_err(Unbuffered::from));
            }
            let Config {
                env, body_timeout, ..
            } = self.config;
            let silence = self
                .silence
                .get_or_insert_with(|| Box::pin(env.sleep(*body_timeout)));
            silence.as_mut().poll(cx).map(|()| Err(Unbuffered::Silent))
        })
        .await?;
        // An empty frame does not reset the timer, because it costs its sender nothing.
        let is_data = |frame: &Frame<Bytes>| frame.data_ref().is_some_and(|data| !data.is_empty());
        if next.as_ref().is_some_and(is_data) {
            self.silence = None;
        }
        Ok(next)
    }
}

impl From<Overflow> for Unbuffered {
    fn from(overflow: Overflow) -> Self {
        match overflow {
            Overflow::TooLong => Self::TooLong,
            Overflow::NoRoom => Self::NoRoom,
        }
    }
}

impl From<axum::Error> for Unbuffered {
    fn from(error: axum::Error) -> Self {
        Self::Broken(error.into_inner())
    }
}

impl Unbuffered {
    /// The refusal, for a limit of `limit` bytes.
    pub(crate) fn into_problem(self, limit: usize, config: &Config) -> Problem {
        match self {
            Self::TooLong => Problem::body_too_large(limit, config),
            Self::NoRoom => Problem::new(Refusal::Overloaded, config),
            Self::Silent => Problem::body_unreadable(StatusCode::REQUEST_TIMEOUT, config),
            Self::Broken(error) => {
                tracing::debug!(target: "idempotency", %error, "the request's body could not be read; nothing was run");
                match status_of(&*error) {
                    // A lower limit of an outer layer, whose value is unknown here.
                    StatusCode::PAYLOAD_TOO_LARGE => Problem::new(Refusal::BodyTooLarge, config),
                    status => Problem::body_unreadable(status, config),
                }
            }
        }
    }
}

/// The status that the cause of a broken body asks for.
fn status_of(error: &(dyn Error + 'static)) -> StatusCode {
    let status = iter::successors(Some(error), |error| cause(*error)).find_map(|error| {
        if error.is::<LengthLimitError>() {
            Some(StatusCode::PAYLOAD_TOO_LARGE)
        } else if is_timeout(error) {
            Some(StatusCode::REQUEST_TIMEOUT)
        } else {
            None
        }
    });
    status.unwrap_or(StatusCode::BAD_REQUEST)
}

fn is_timeout(error: &(dyn Error + 'static)) -> bool {
    error.is::<TimeoutError>()
        || error.is::<tokio::time::error::Elapsed>()
        || error
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::TimedOut)
}

/// The source of an error. An [`io::Error`] does not report the error that it wraps as its source.
fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    let inner = error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref);
    match inner {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    async fn read(body: Body, limit: usize) -> Result<Buffered, Unbuffered> {
        let parts = Request::new(()).into_parts().0;
        buffer(&parts, body, limit, &Config::default()).await
    }

    #[tokio::test]
    async fn the_limit_is_inclusive() {
        let buffered = read(Body::from("12345"), 5).await.unwrap();
        assert_eq!(buffered.bytes, "12345");
        assert_eq!(buffered.reservation.bytes(), 5);
        let again = buffered.body.collect().await.unwrap().to_bytes();
        assert_eq!(again, "12345");
        let error = read(Body::from("123456"), 5).await.unwrap_err();
        assert!(matches!(error, Unbuffered::TooLong));
    }

    /// A byte is not to keep a megabyte alive.
    #[tokio::test]
    async fn a_frame_that_is_part_of_something_larger_is_copied() {
        let part = Bytes::from(vec![1; 1 << 20]).slice(..1);
        let buffered = read(Body::from(part.clone()), 5).await.unwrap();
        assert_eq!(buffered.bytes, part);
        assert_ne!(buffered.bytes.as_ptr(), part.as_ptr());
    }

    #[tokio::test]
    async fn trailers_survive() {
        let mut trailers = HeaderMap::new();
        trailers.insert("x-checksum", http::HeaderValue::from_static("1"));
        let body = Full::new(Bytes::from("x")).with_trailers(ready(Some(Ok(trailers.clone()))));
        let again = read(Body::new(body), 5).await.unwrap().body;
        assert_eq!(again.collect().await.unwrap().trailers(), Some(&trailers));
    }

    #[test]
    fn a_broken_body_has_the_status_of_its_cause() {
        let timed_out = || io::Error::from(io::ErrorKind::TimedOut);
        for (error, status) in [
            (io::Error::other("corrupt"), 400),
            (timed_out(), 408),
            (io::Error::other(timed_out()), 408),
            (io::Error::other(axum::Error::new(timed_out())), 408),
        ] {
            assert_eq!(status_of(&error), status, "{error:?}");
            assert_eq!(status_of(&axum::Error::new(error)), status);
        }
    }
}
