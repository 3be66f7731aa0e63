//! Which answers can be recorded, and reading them without holding anything back.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{header, response::Parts};
use http_body::{Body as _, Frame, SizeHint};
use idempotency_core::TombstoneReason;

/// What became of an answer's body.
pub(crate) enum Read {
    /// All of it was there.
    Whole(Bytes),
    /// It can't be recorded; this is the whole body for the client all the same.
    Not(TombstoneReason, Body),
}

/// Reads a body that is complete at once: as long as there is something to read without waiting, up to `limit` bytes.
pub(crate) async fn read_at_once(parts: &Parts, mut body: Body, limit: usize) -> Read {
    if is_event_stream(parts) {
        return Read::Not(TombstoneReason::EventStream, body);
    }
    let mut frames = Frames::default();
    loop {
        let next = poll_fn(|cx| Poll::Ready(Pin::new(&mut body).poll_frame(cx))).await;
        let reason = match next {
            Poll::Ready(None) => return Read::Whole(frames.concat()),
            Poll::Ready(Some(Ok(frame))) => {
                let is_data = frame.is_data();
                frames.push(frame);
                if !is_data {
                    TombstoneReason::Trailers
                } else if frames.length > limit {
                    TombstoneReason::ResponseTooLarge
                } else {
                    continue;
                }
            }
            Poll::Ready(Some(Err(error))) => {
                frames.error = Some(error);
                TombstoneReason::StreamBroken
            }
            Poll::Pending => TombstoneReason::Streaming,
        };
        return Read::Not(
            reason,
            Body::new(Resumed {
                read: frames,
                rest: body,
            }),
        );
    }
}

fn is_event_stream(parts: &Parts) -> bool {
    parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|essence| essence.trim().eq_ignore_ascii_case("text/event-stream"))
}

/// What was read of a body so far.
#[derive(Default)]
struct Frames {
    frames: VecDeque<Frame<Bytes>>,
    /// Bytes of data in `frames`.
    length: usize,
    error: Option<axum::Error>,
}

impl Frames {
    fn push(&mut self, frame: Frame<Bytes>) {
        self.length += frame.data_ref().map_or(0, Bytes::len);
        self.frames.push_back(frame);
    }

    /// All the data, without a copy where it came in one frame.
    fn concat(self) -> Bytes {
        let mut data = self
            .frames
            .into_iter()
            .filter_map(|frame| frame.into_data().ok())
            .filter(|data| !data.is_empty());
        let first = data.next().unwrap_or_default();
        let Some(second) = data.next() else {
            return first;
        };
        let mut whole = BytesMut::with_capacity(self.length);
        whole.extend_from_slice(&first);
        whole.extend_from_slice(&second);
        data.for_each(|data| whole.extend_from_slice(&data));
        whole.freeze()
    }
}

/// A body that was read in part, from its beginning.
struct Resumed {
    read: Frames,
    rest: Body,
}

impl http_body::Body for Resumed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Some(frame) = self.read.frames.pop_front() {
            self.read.length -= frame.data_ref().map_or(0, Bytes::len);
            return Poll::Ready(Some(Ok(frame)));
        }
        if let Some(error) = self.read.error.take() {
            return Poll::Ready(Some(Err(error)));
        }
        Pin::new(&mut self.rest).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.read.frames.is_empty() && self.read.error.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.size_hint();
        let read = self.read.length as u64;
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(read));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(read));
        }
        hint
    }
}
