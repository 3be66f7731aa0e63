//! Recording: an answer is kept for retries, and its first client gets it in full, always.
//!
//! An answer that is complete at once is stored before its head goes out. One that streams is read by a recorder task, at the
//! pace of what produces it, onto a *tape*; its client reads from the tape, at its own pace, and gets the end once the record
//! is stored. So a client that is slow, or leaves, holds nothing up, and a retry that follows the end finds the record.
//!
//! ```text
//! handler's body ──► recorder ──► tape ──► client
//!                        └─ at the end: stored; then the client's end
//!                        └─ over the limit, broken, trailers: tombstone; then the client reads the body itself
//! ```
//!
//! What can't be recorded whatever its body says (an event stream, announced trailers or length) has its tombstone before its
//! head goes out, and is not touched.

use std::{
    fmt,
    future::poll_fn,
    panic::{AssertUnwindSafe, resume_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, StatusCode, header};
use http_body::{Body as _, Frame};
use idempotency_core::TombstoneReason;
use tracing::{Instrument, Span};

use self::{
    data::{Data, End},
    tape::{Tail, Tape},
};
use crate::{Engine, response, run::Run};

mod data;
mod tape;

/// A frame of a body, or what it broke with.
type Next = Result<Frame<Bytes>, axum::Error>;

/// Ends `run` with this answer, now or when it has been read to its end, and gives the client what it is to get.
pub(crate) async fn record(run: Run, response: Response, engine: &Engine) -> Response {
    let (parts, body) = response.into_parts();
    let config = engine.config();
    let stored = |body| response::stored(parts.status, &parts.headers, body, config);
    if is_sent_without_body(parts.status) {
        run.store(stored(Bytes::new())).await;
        return Response::from_parts(parts, Body::empty());
    }
    let mut source = Source::new(&parts.headers, body);
    let limit = config.max_response_body;
    if let Some(reason) = unrecordable(&parts.headers, &source, limit) {
        run.store_none(reason).await;
        return Response::from_parts(parts, source.body);
    }

    let mut data = Data::new(limit);
    let end = loop {
        let polled = poll_fn(|cx| Poll::Ready(source.poll_next(cx)));
        match AssertUnwindSafe(polled).catch_unwind().await {
            Ok(Poll::Ready(next)) => {
                if let Some(end) = data.take(next) {
                    break source.judge(end);
                }
            }
            Ok(Poll::Pending) => match config.env.spawner() {
                Some(spawner) => {
                    let tape = Arc::new(Tape::new(data));
                    let reader = tape.clone().reader(&source);
                    let recorder = Recorder {
                        run: Some(run),
                        source: Some(source),
                        next: None,
                        tape,
                        status: parts.status,
                        headers: parts.headers.clone(),
                        engine: engine.clone(),
                    };
                    spawner.spawn(recorder.run().instrument(Span::current()));
                    return Response::from_parts(parts, Body::new(reader));
                }
                // Nobody could read on.
                None => break End::Unrecorded(TombstoneReason::Streaming, None),
            },
            // It goes on to whoever catches it outside.
            Err(panic) => {
                run.store_none(TombstoneReason::StreamBroken).await;
                resume_unwind(panic);
            }
        }
    };
    let body = match end {
        End::Whole => {
            let bytes = data.into_bytes();
            run.store(stored(bytes.clone())).await;
            Body::from(bytes)
        }
        End::Unrecorded(reason, next) => {
            run.store_none(reason).await;
            Body::new(Tail::new(data.into_bytes(), next, Some(source.body)))
        }
    };
    Response::from_parts(parts, body)
}

/// HTTP has no body with these, so whatever one there is will not be read.
fn is_sent_without_body(status: StatusCode) -> bool {
    matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// Why an answer can't be recorded, as far as its head tells.
fn unrecordable(headers: &HeaderMap, source: &Source, limit: usize) -> Option<TombstoneReason> {
    let at_least = source.body.size_hint().lower();
    if is_event_stream(headers) {
        Some(TombstoneReason::EventStream)
    } else if headers.contains_key(header::TRAILER) {
        Some(TombstoneReason::Trailers)
    } else if source.length.unwrap_or(at_least) > limit as u64 {
        Some(TombstoneReason::ResponseTooLarge)
    } else {
        None
    }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|essence| essence.trim().eq_ignore_ascii_case("text/event-stream"))
}

/// A handler's body, and how long it was announced to be.
struct Source {
    body: Body,
    /// As the client will be told.
    length: Option<u64>,
    read: u64,
}

impl Source {
    fn new(headers: &HeaderMap, body: Body) -> Self {
        let announced = headers
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        Self {
            length: announced.or(body.size_hint().exact()),
            body,
            read: 0,
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Next>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.read += frame.data_ref().map_or(0, |data| data.len() as u64);
            }
            // Nobody reads further than the announced length: what produces the body need not end it.
            Poll::Pending if self.length == Some(self.read) => return Poll::Ready(None),
            Poll::Pending | Poll::Ready(None | Some(Err(_))) => {}
        }
        polled
    }

    /// An end at another place than was announced is none: the body broke off.
    fn judge(&self, end: End) -> End {
        match end {
            End::Whole if self.length.is_some_and(|length| length != self.read) => {
                let error = axum::Error::new(Fault::WrongLength);
                End::Unrecorded(TombstoneReason::StreamBroken, Some(Err(error)))
            }
            end => end,
        }
    }
}

/// Reads a body to its end, and ends the run.
struct Recorder {
    run: Option<Run>,
    source: Option<Source>,
    /// What the body went on with when recording ended before it.
    next: Option<Next>,
    tape: Arc<Tape>,
    status: StatusCode,
    headers: HeaderMap,
    engine: Engine,
}

impl Recorder {
    async fn run(mut self) {
        let end = self.read().await;
        let Some(run) = self.run.take() else {
            return;
        };
        match end {
            End::Whole => {
                self.source = None;
                let body = self.tape.recorded();
                let config = self.engine.config();
                let stored = response::stored(self.status, &self.headers, body, config);
                run.store(stored).await;
            }
            End::Unrecorded(reason, next) => {
                self.next = next;
                run.store_none(reason).await;
            }
        }
    }

    async fn read(&mut self) -> End {
        let Some(source) = &mut self.source else {
            return End::Whole;
        };
        loop {
            let polled = poll_fn(|cx| source.poll_next(cx));
            let next = AssertUnwindSafe(polled).catch_unwind().await;
            let next = next.unwrap_or_else(|_| Some(Err(axum::Error::new(Fault::Panicked))));
            if let Some(end) = self.tape.take(next) {
                return source.judge(end);
            }
        }
    }
}

/// Lets the client have the rest, also where the recorder is dropped before its end because its runtime is.
impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            // An outcome that is handed over will be stored, whatever becomes of this future.
            let _ = run.store_none(TombstoneReason::StreamBroken).now_or_never();
        }
        let rest = self.source.take().map(|source| source.body);
        self.tape.end(self.next.take(), rest);
    }
}

/// What is wrong with a body that gave no error of its own.
#[derive(Debug)]
enum Fault {
    /// Which was logged where it did.
    Panicked,
    WrongLength,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Panicked => "the answer's body panicked",
            Self::WrongLength => "the answer's body is not as long as was announced",
        })
    }
}

impl std::error::Error for Fault {}
