//! Recording: an answer is kept for retries, and its first client gets it in full, always.
//!
//! An answer that is complete at once is stored before its head goes out. One that streams is read by a recorder task, at the
//! pace of what produces it, onto a *tape*; its client reads from the tape, at its own pace, and gets the end once the record
//! is stored. So a client that is slow, or leaves, holds nothing up, and a retry that follows the end finds the record.
//!
//! ```text
//! handler's body ──► recorder ──► tape ──► client
//!                        └─ at the end: stored; then the client's end
//!                        └─ over the limit, no room, broken, trailers, given up: tombstone; then the client reads the body itself
//! ```
//!
//! What can't be recorded whatever its body says (an event stream, announced trailers or length) has its tombstone before its
//! head goes out, and is not touched. Past the tombstone an answer ends with its client, as it would without us.
//!
//! # Where an answer ends
//!
//! At what its body says is the end: [`is_end_stream`](http_body::Body::is_end_stream), or no more frames. Trailers may follow
//! the last byte, also where the length is known. But a client that was told a length reads no further, so it has its end with
//! the last byte, which is why the tape keeps that back until the record is stored. The two meet in a body that has given all
//! its bytes, has not ended, and has nothing more yet. Then
//!
//! * the client gets the last byte at once: it is not held back for an end that may never come;
//! * the body is read on, until its end (the answer is recorded), until trailers (they are passed on, and are a tombstone), or
//!   until the run is given up;
//! * a client that has taken all bytes and lets go of the body, as a server of HTTP/1 does at the announced length, can't be
//!   given more: this is the end, and the answer is recorded as that client got it.
//!
//! # What holds memory
//!
//! What is on a tape is reserved from [`Config::max_buffered`](crate::Config::max_buffered) until the client has it too. An answer
//! for which there is no room gets a tombstone, and goes on as one over the limit does. What comes before the first pause is in
//! memory anyway: it is counted, and not refused.
//!
//! # A run that is given up
//!
//! After [`LockPolicy::max_hold`](crate::LockPolicy::max_hold) the engine has put a tombstone in the place of the record to come.
//! Recording stops: the client gets what is on the tape and then the body itself; if it is gone, the body is dropped.

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
use idempotency_core::{Claim, Progress, StoredResponse, TombstoneReason};
use tracing::{Instrument, Span};

use self::tape::{Tail, Tape};
use crate::{
    Engine,
    buffer::{Buffer, Overflow},
    detach::Route,
    response,
};

mod tape;

/// A frame of a body, or what it broke with.
type Next = Result<Frame<Bytes>, axum::Error>;

/// Ends `claim` with this answer, now or when it has been read to its end, and gives the client what it is to get.
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
                // Nobody could read on.
                None => break End::Unrecorded(TombstoneReason::Streaming, None),
            },
            // It goes on to whoever catches it outside.
            Err(panic) => {
                store_none(claim, TombstoneReason::StreamBroken).await;
                resume_unwind(panic);
            }
        }
    };
    let body = match end {
        End::Whole => {
            // Given back once it is stored.
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

/// Keeps the answer for retries.
///
/// The engine tells its observers what became of the outcome, and the client gets its answer in any case; so neither this nor
/// [`store_none`] returns anything.
async fn store(claim: Claim, response: StoredResponse) {
    let _ = claim.complete(response).await;
}

/// The handler is done, and left no answer that could be kept: it must not run again. Rare, so it is boxed: the future of a request is as
/// large as the largest thing that it awaits.
pub(crate) async fn store_none(claim: Claim, reason: TombstoneReason) {
    let _ = Box::pin(claim.tombstone(reason)).await;
}

/// How a body ended, as far as recording goes.
enum End {
    /// All of it is here.
    Whole,
    /// It can't be recorded; and what it went on with.
    Unrecorded(TombstoneReason, Option<Next>),
}

/// Puts what a body gave into `buffer`, by `push` or `hold`, if it is not the end.
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
        if self.body.is_end_stream() {
            return Poll::Ready(None);
        }
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.read += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        polled
    }

    /// Whether all the bytes that were announced are here.
    fn is_all_read(&self) -> bool {
        self.length == Some(self.read)
    }

    /// An end at another place than was announced is none: the body broke off.
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
    /// What the body went on with when recording ended before it.
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
                // What still comes, nobody could take.
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

/// Lets the client have the rest, also where the recorder is dropped before its end because its runtime is.
impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(claim) = self.claim.take() {
            // An outcome that is handed over will be stored, whatever becomes of this future.
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

#[cfg(all(test, feature = "memory"))]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use http::Request;
    use http_body_util::BodyExt;
    use idempotency_core::{
        Config, Decision, Encoded, EncodedKey, MemoryStorage, Outcome, TombstoneReason,
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
