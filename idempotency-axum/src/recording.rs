//! Recording: an answer is stored for retries, and its first client always gets it in full.
//!
//! An answer that is complete at once is stored before its head goes out. One that streams is read by a recorder task, at the
//! producer's pace, onto a *tape*. The client reads from the tape, at its own pace, and gets the end once the record is stored. So
//! a client that is slow, or leaves, delays nothing, and a retry after the end finds the record.
//!
//! ```text
//! handler's body ──► recorder ──► tape ──► client
//!                        └─ at the end: stored; then the client's end
//!                        └─ over the limit, no room, broken, trailers, given up: tombstone; then the client reads the body itself
//! ```
//!
//! An answer that its head shows to be unrecordable (an event stream, announced trailers, a length over the limit) gets its
//! tombstone before its head goes out, and passes unchanged. After the tombstone the body is dropped when its client
//! leaves, as it would be without this layer.
//!
//! # Where an answer ends
//!
//! An answer ends where its body says so: [`is_end_stream`](http_body::Body::is_end_stream), or no more frames. Trailers may follow
//! the last byte, also where the length is known. A client that knows the length stops at the last byte, so the tape holds the last
//! byte back until the record is stored. Some bodies produce all announced bytes and are then
//! pending, without an end. For these:
//!
//! * the client gets the last byte at once, because the end may never come;
//! * the body is read further, until its end (the answer is recorded), until trailers (they are passed on, and the record is a
//!   tombstone), or until the run is given up;
//! * if the client has all bytes and drops the body, as an HTTP/1 server does at the announced length, that is the end, and the
//!   answer is recorded as that client got it.
//!
//! # What holds memory
//!
//! The bytes on a tape are reserved from [`Config::max_buffered`](crate::Config::max_buffered) until the client has them too. An
//! answer for which there is no room gets a tombstone, and passes on as one over the limit does. Bytes before the first pause are
//! in memory anyway: they are counted, and not refused.
//!
//! # A run that is given up
//!
//! After [`LockPolicy::max_hold`](crate::LockPolicy::max_hold) the engine has stored a tombstone. Recording stops: the client gets
//! the rest of the tape and then the body itself; without a client the body is dropped.

use std::{
    fmt,
    future::poll_fn,
    panic::{AssertUnwindSafe, resume_unwind},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
};

use axum::{body::Body, response::Response};
use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{Either, select},
};
use http::{HeaderMap, StatusCode, header};
use http_body::{Body as _, Frame};
use idempotency_core::{Claim, Config, Progress, StoredResponse, TombstoneReason};
use tracing::{Instrument, Span};

use self::tape::{Tail, Tape};
use crate::{
    Engine,
    buffer::{Buffer, Overflow},
    detach::Route,
    response,
};

mod tape;

/// A frame of a body, or its error.
type Next = Result<Frame<Bytes>, axum::Error>;

/// Ends `claim` with this answer, now or once the body was read to its end. Returns the response for the client.
pub(crate) async fn record(
    claim: Claim,
    response: Response,
    engine: &Engine,
    progress: &Progress,
    route: &Route,
) -> Response {
    let (parts, body) = response.into_parts();
    let config = engine.config();
    let stored = |body| response::stored(parts.status, &parts.headers, body, config);
    if is_sent_without_body(parts.status) {
        store(claim, stored(Bytes::new())).await;
        return Response::from_parts(parts, Body::empty());
    }
    let mut source = Source::new(&parts.headers, body);
    let limit = config.max_response_body;
    if let Some(reason) = unrecordable(&parts.headers, &source, limit) {
        store_none(claim, reason).await;
        return Response::from_parts(parts, source.body);
    }

    let mut buffer = Buffer::counted(limit, &config.budget);
    let end = loop {
        let polled = poll_fn(|cx| Poll::Ready(source.poll_next(cx)));
        match AssertUnwindSafe(polled).catch_unwind().await {
            Ok(Poll::Ready(next)) => {
                if let Some(end) = take(&mut buffer, next, Buffer::hold) {
                    break source.judge(end);
                }
            }
            Ok(Poll::Pending) => match config.env.spawner() {
                Some(spawner) => {
                    let tape = Arc::new(Tape::new(buffer));
                    let reader = tape.clone().reader(&source);
                    let recorder = Recorder {
                        claim: Some(claim),
                        source: Some(source),
                        next: None,
                        tape,
                        status: parts.status,
                        headers: parts.headers.clone(),
                        engine: engine.clone(),
                        progress: progress.clone(),
                        route: route.clone(),
                    };
                    spawner.spawn(recorder.run().instrument(Span::current()));
                    return Response::from_parts(parts, Body::new(reader));
                }
                // Without a runtime there is no recorder task.
                None => break End::Unrecorded(TombstoneReason::Streaming, None),
            },
            // The panic is resumed once the run has ended.
            Err(panic) => {
                store_none(claim, TombstoneReason::StreamBroken).await;
                resume_unwind(panic);
            }
        }
    };
    let body = match end {
        End::Whole => {
            // Released once the record is stored.
            let (bytes, _reservation) = buffer.into_parts();
            store(claim, stored(bytes.clone())).await;
            Body::from(bytes)
        }
        End::Unrecorded(reason, next) => {
            store_none(claim, reason).await;
            Body::new(Tail::new(buffer, next, Some(source.body)))
        }
    };
    Response::from_parts(parts, body)
}

/// An answer that was read before it is recorded.
pub(crate) enum Gathered {
    /// All of it, and what is stored of it.
    Whole(StoredResponse, Response),
    /// It can't be recorded. Its body is read on by its client.
    Unrecordable(TombstoneReason, Response),
    /// Its body broke off.
    Broken(axum::Error),
}

/// Reads an answer to its end, or until it shows that it can't be recorded.
pub(crate) async fn gather(response: Response, config: &Config) -> Gathered {
    let (parts, body) = response.into_parts();
    let stored = |body| response::stored(parts.status, &parts.headers, body, config);
    if is_sent_without_body(parts.status) {
        let stored = stored(Bytes::new());
        return Gathered::Whole(stored, Response::from_parts(parts, Body::empty()));
    }
    let mut source = Source::new(&parts.headers, body);
    let limit = config.max_response_body;
    if let Some(reason) = unrecordable(&parts.headers, &source, limit) {
        return Gathered::Unrecordable(reason, Response::from_parts(parts, source.body));
    }
    let mut buffer = Buffer::counted(limit, &config.budget);
    let end = loop {
        let next = poll_fn(|cx| source.poll_next(cx)).await;
        if let Some(end) = take(&mut buffer, next, Buffer::push) {
            break source.judge(end);
        }
    };
    match end {
        End::Whole => {
            let (bytes, _) = buffer.into_parts();
            let stored = stored(bytes.clone());
            Gathered::Whole(stored, Response::from_parts(parts, Body::from(bytes)))
        }
        End::Unrecorded(_, Some(Err(error))) => Gathered::Broken(error),
        End::Unrecorded(reason, next) => {
            let body = Body::new(Tail::new(buffer, next, Some(source.body)));
            Gathered::Unrecordable(reason, Response::from_parts(parts, body))
        }
    }
}

/// Stores the answer for retries.
///
/// The engine reports to its observers whether the outcome was stored, and the client gets its answer in any case. So neither this nor
/// [`store_none`] returns anything.
///
/// No `async fn`, which would keep both arguments beside the future that they move into.
fn store(claim: Claim, response: StoredResponse) -> impl Future<Output = ()> {
    claim.complete(response).map(drop)
}

/// Stores a tombstone: the handler ran, and its answer can't be stored. Boxed, because it is rare, and a request's future is as large as
/// the largest future that it awaits.
pub(crate) async fn store_none(claim: Claim, reason: TombstoneReason) {
    let _ = Box::pin(claim.tombstone(reason)).await;
}

/// The result of reading a body.
enum End {
    /// The whole body was read.
    Whole,
    /// The body can't be recorded; with the frame or error after the buffered part.
    Unrecorded(TombstoneReason, Option<Next>),
}

/// Puts the next frame of a body into `buffer`, by `push` or `hold`, unless it is the end.
fn take(
    buffer: &mut Buffer,
    next: Option<Next>,
    put: fn(&mut Buffer, &Bytes) -> Result<(), Overflow>,
) -> Option<End> {
    let frame = match next {
        None => return Some(End::Whole),
        Some(Ok(frame)) => frame,
        broken @ Some(Err(_)) => {
            return Some(End::Unrecorded(TombstoneReason::StreamBroken, broken));
        }
    };
    let reason = match frame.data_ref().map(|data| put(buffer, data)) {
        Some(Ok(())) => return None,
        Some(Err(Overflow::TooLong)) => TombstoneReason::ResponseTooLarge,
        Some(Err(Overflow::NoRoom)) => TombstoneReason::NoRoom,
        None => TombstoneReason::Trailers,
    };
    Some(End::Unrecorded(reason, Some(Ok(frame))))
}

/// HTTP sends no body with these, so a body is ignored.
fn is_sent_without_body(status: StatusCode) -> bool {
    matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// Why an answer can't be recorded, if its head shows it.
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

/// A handler's body, and its announced length.
struct Source {
    body: Body,
    /// The length that the client is told.
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
        if self.body.is_end_stream() {
            return Poll::Ready(None);
        }
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.read += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        polled
    }

    /// Whether all announced bytes were read.
    fn is_all_read(&self) -> bool {
        self.length == Some(self.read)
    }

    /// A body that ends at another length than announced is broken.
    fn judge(&self, end: End) -> End {
        match end {
            End::Whole if self.length.is_some() && !self.is_all_read() => {
                let error = axum::Error::new(Fault::WrongLength);
                End::Unrecorded(TombstoneReason::StreamBroken, Some(Err(error)))
            }
            end => end,
        }
    }
}

/// Reads a body to its end, and ends the run.
struct Recorder {
    claim: Option<Claim>,
    source: Option<Source>,
    /// The frame or error at which recording ended.
    next: Option<Next>,
    tape: Arc<Tape>,
    status: StatusCode,
    headers: HeaderMap,
    engine: Engine,
    progress: Progress,
    route: Route,
}

impl Recorder {
    async fn run(mut self) {
        let progress = self.progress.clone();
        let end = match select(pin!(self.read()), pin!(progress.given_up())).await {
            Either::Left((end, _)) => end,
            Either::Right(_) => End::Unrecorded(TombstoneReason::MaxHold, None),
        };
        let recorded = match end {
            End::Whole => {
                self.source = None;
                self.tape.recorded().ok_or(TombstoneReason::StreamBroken)
            }
            End::Unrecorded(reason, next) => {
                self.next = next;
                Err(reason)
            }
        };
        let Some(claim) = self.claim.take() else {
            return;
        };
        match recorded {
            Ok(body) => {
                let config = self.engine.config();
                let stored = response::stored(self.status, &self.headers, body, config);
                store(claim, stored).await;
            }
            Err(reason) => store_none(claim, reason).await,
        }
    }

    async fn read(&mut self) -> End {
        let Some(source) = &mut self.source else {
            return End::Whole;
        };
        loop {
            let polled = poll_fn(|cx| {
                let polled = source.poll_next(cx);
                // The client has all bytes and has left: nobody could get more.
                let is_over = polled.is_pending()
                    && source.is_all_read()
                    && self.tape.poll_taken(cx).is_ready();
                if is_over { Poll::Ready(None) } else { polled }
            });
            let next = AssertUnwindSafe(polled).catch_unwind().await;
            let next = next.unwrap_or_else(|_| Some(Err(axum::Error::new(Fault::Panicked))));
            if let Some(end) = self.tape.take(next) {
                return source.judge(end);
            }
        }
    }
}

/// Hands the rest to the client, also if the recorder is dropped early with its runtime.
impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            // The first poll hands the outcome to the engine, which stores it even if this future is dropped.
            let _ = store_none(claim, TombstoneReason::StreamBroken).now_or_never();
        }
        let rest = self.source.take().map(|source| source.body);
        let is_cut_short = rest.is_some() && self.progress.is_given_up();
        let client = self.tape.end(self.next.take(), rest);
        if is_cut_short && client == Client::Gone {
            self.route.report_dropped();
        }
    }
}

/// Whether an answer still has a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Client {
    Reads,
    Gone,
}

/// The error of a body that returned none itself.
#[derive(Debug)]
enum Fault {
    /// Logged by the panic hook.
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

#[cfg(all(test, feature = "memory"))]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use http::Request;
    use http_body_util::BodyExt;
    use idempotency_core::{
        Decision, Encoded, EncodedKey, MemoryStorage, Outcome, TombstoneReason,
    };
    use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

    use super::*;

    /// An answer that streams what is sent, and is being recorded.
    struct Streaming {
        engine: Engine,
        progress: Progress,
        sender: UnboundedSender<&'static str>,
        client: Body,
    }

    const ENCODED: Encoded = Encoded {
        key: EncodedKey::from_bytes([1; 32]),
        fingerprint: None,
    };

    async fn streaming() -> Streaming {
        let engine = Engine::new(MemoryStorage::new(), Config::default());
        let progress = Progress::new();
        let Decision::Execute(claim) = engine.begin_with(&ENCODED, &progress).await else {
            panic!("the key is new");
        };
        let (sender, mut receiver) = unbounded_channel();
        let frames = stream::poll_fn(move |cx| receiver.poll_recv(cx));
        let body = Body::from_stream(futures_util::StreamExt::map(frames, Ok::<_, Infallible>));
        let route = Route::of(&Request::new(()).into_parts().0);
        let response = record(claim, Response::new(body), &engine, &progress, &route).await;
        Streaming {
            client: response.into_body(),
            engine,
            progress,
            sender,
        }
    }

    impl Streaming {
        async fn read(&mut self) -> Bytes {
            match self.client.frame().await {
                Some(Ok(frame)) => frame
                    .into_data()
                    .unwrap_or_else(|frame| panic!("{frame:?}")),
                end => panic!("{end:?}"),
            }
        }

        async fn has_tombstone(&self) -> bool {
            let tombstone = Outcome::Tombstone(TombstoneReason::MaxHold);
            let again = self.engine.begin(&ENCODED).await;
            matches!(again, Decision::Replay(replay) if replay.record.outcome == tombstone)
        }
    }

    #[tokio::test]
    async fn a_recording_that_is_given_up_goes_on_for_its_client() {
        let mut streaming = streaming().await;
        streaming.sender.send("one").unwrap();
        assert_eq!(streaming.read().await, "one");
        streaming.progress.give_up();
        rest().await;
        assert!(streaming.has_tombstone().await);
        streaming.sender.send("two").unwrap();
        assert_eq!(streaming.read().await, "two");
        assert!(!streaming.sender.is_closed());
        // From here on it ends with its client.
        drop(streaming.client);
        assert!(streaming.sender.is_closed());
    }

    #[tokio::test]
    async fn a_recording_without_a_client_is_dropped_when_it_is_given_up() {
        let mut streaming = streaming().await;
        drop(std::mem::take(&mut streaming.client));
        streaming.sender.send("one").unwrap();
        rest().await;
        assert!(!streaming.sender.is_closed(), "it is read on");
        streaming.progress.give_up();
        rest().await;
        assert!(streaming.sender.is_closed());
        assert!(streaming.has_tombstone().await);
    }

    /// All tasks run on this thread, so each comes as far as it can.
    async fn rest() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }
}
