//! The buffer that the recorder writes and the first client reads.

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use idempotency_core::TombstoneReason;

use super::{Buffer, Client, End, Next, Source, take};

/// Holds the bytes of a body until the client has read them too, and holds the end back until the recorder is done.
///
/// A `std` mutex guards it: every section is a copy of one frame at most, and none spans an await or runs code that is not ours.
pub(super) struct Tape {
    state: Mutex<State>,
}

struct State {
    /// `None` while it is joined, and once it has moved into the tail.
    buffer: Option<Buffer>,
    /// The rest for the client, once the recorder is done.
    tail: Option<Tail>,
    /// The client may have the last byte of a known length before the recorder is done.
    has_all: bool,
    client: Option<Waker>,
    client_is: Client,
    /// How many bytes the client had when it left.
    taken: usize,
    recorder: Option<Waker>,
}

impl Tape {
    pub(super) fn new(buffer: Buffer) -> Self {
        Self {
            state: Mutex::new(State {
                buffer: Some(buffer),
                tail: None,
                has_all: false,
                client: None,
                client_is: Client::Reads,
                taken: 0,
                recorder: None,
            }),
        }
    }

    /// The client's end.
    pub(super) fn reader(self: Arc<Self>, source: &Source) -> Reader {
        let hint = source.body.size_hint().exact();
        Reader {
            tape: self,
            given: 0,
            exact: hint.map(|left| left + source.read),
            length: source.length,
            tail: None,
        }
    }

    /// Writes the next frame of the body.
    pub(super) fn take(&self, next: Option<Next>) -> Option<End> {
        let mut state = self.lock();
        let end = match &mut state.buffer {
            Some(buffer) => take(buffer, next, Buffer::push),
            None => Some(End::Unrecorded(TombstoneReason::StreamBroken, next)),
        };
        let client = state.client.take_if(|_| end.is_none());
        drop(state);
        wake(client);
        end
    }

    /// Called when all announced bytes are written and the body has not ended: releases the last byte to the client. Ready once the
    /// client has all bytes and has left.
    pub(super) fn poll_taken(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.lock();
        let written = state.buffer.as_ref().map_or(0, Buffer::len);
        if state.client_is == Client::Gone && state.taken == written {
            return Poll::Ready(());
        }
        state.recorder = Some(cx.waker().clone());
        state.has_all = true;
        let client = state.client.take();
        drop(state);
        wake(client);
        Poll::Pending
    }

    /// All written bytes joined, if the recorder is not done.
    pub(super) fn recorded(&self) -> Option<Bytes> {
        let mut buffer = self.lock().buffer.take()?;
        // Outside of the lock, because the copy may be long.
        let bytes = buffer.join();
        let mut state = self.lock();
        state.buffer = Some(buffer);
        let client = state.client.take();
        drop(state);
        wake(client);
        Some(bytes)
    }

    /// Called when the recorder is done: the client, if it still reads, gets the tape, then `next`, then `rest`.
    pub(super) fn end(&self, next: Option<Next>, rest: Option<Body>) -> Client {
        let buffer = self.lock().buffer.take();
        let tail = buffer.map(|buffer| Tail::new(buffer, next, rest));
        let mut state = self.lock();
        let client_is = state.client_is;
        let unread = match client_is {
            Client::Gone => tail,
            Client::Reads => mem::replace(&mut state.tail, tail),
        };
        let client = state.client.take();
        drop(state);
        // Dropping a body runs the handler's code, so not under the lock.
        drop(unread);
        wake(client);
        client_is
    }

    /// The state stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// The first client's body.
pub(super) struct Reader {
    tape: Arc<Tape>,
    given: usize,
    /// The exact length by the body's size hint.
    exact: Option<u64>,
    /// The length that the client is told; it reads no further.
    length: Option<u64>,
    tail: Option<Tail>,
}

impl Reader {
    /// How many bytes the client may have before the recorder is done. With a known length the last byte is the end, so it is held
    /// back, unless the body `has_all` its bytes and has not ended.
    fn readable(&self, written: usize, has_all: bool) -> usize {
        match self.length {
            Some(length) if !has_all => {
                let before_end = length.saturating_sub(1).try_into().unwrap_or(usize::MAX);
                written.min(before_end)
            }
            _ => written,
        }
    }
}

impl http_body::Body for Reader {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Next>> {
        let this = self.get_mut();
        if let Some(tail) = &mut this.tail {
            return Pin::new(tail).poll_frame(cx);
        }
        let mut state = this.tape.lock();
        if let Some(mut tail) = state.tail.take() {
            drop(state);
            tail.skip(this.given);
            return Pin::new(this.tail.insert(tail)).poll_frame(cx);
        }
        if let Some(buffer) = &state.buffer {
            let readable = this.readable(buffer.len(), state.has_all);
            if this.given < readable {
                let chunk = buffer.chunk(this.given, readable);
                drop(state);
                this.given += chunk.len();
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
        }
        state.client = Some(cx.waker().clone());
        Poll::Pending
    }

    fn is_end_stream(&self) -> bool {
        self.tail.as_ref().is_some_and(Tail::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        match (&self.tail, self.exact) {
            (Some(tail), _) => tail.size_hint(),
            (None, Some(exact)) => SizeHint::with_exact(exact.saturating_sub(self.given as u64)),
            (None, None) => SizeHint::new(),
        }
    }
}

/// A client that leaves drops only the bytes that nobody else reads.
impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.tape.lock();
        state.client_is = Client::Gone;
        state.taken = self.given;
        let unread = (state.tail.take(), state.client.take());
        let recorder = state.recorder.take();
        drop(state);
        drop(unread);
        wake(recorder);
    }
}

/// A partly read body: the bytes read, the next frame or error, and the rest.
pub(super) struct Tail {
    /// `None` once the client has all of it.
    read: Option<Buffer>,
    /// How many bytes of `read` the client had before.
    given: usize,
    next: Option<Next>,
    rest: Option<Body>,
}

impl Tail {
    pub(super) fn new(read: Buffer, next: Option<Next>, rest: Option<Body>) -> Self {
        Self {
            read: Some(read).filter(|read| read.len() > 0),
            given: 0,
            // Nothing comes after an error.
            rest: rest.filter(|_| !matches!(next, Some(Err(_)))),
            next,
        }
    }

    /// Skips the first `given` bytes, which the client has.
    fn skip(&mut self, given: usize) {
        let has_all = self.read.take_if(|read| read.len() == given).is_some();
        self.given = if has_all { 0 } else { given };
    }

    fn pop(&mut self) -> Option<Bytes> {
        let read = self.read.as_mut()?;
        let mut bytes = read.pop()?;
        while self.given >= bytes.len() {
            self.given -= bytes.len();
            bytes = read.pop()?;
        }
        let bytes = bytes.split_off(mem::take(&mut self.given));
        // What was reserved is given back with the last byte.
        self.read.take_if(|read| read.len() == 0);
        Some(bytes)
    }
}

impl http_body::Body for Tail {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Next>> {
        if let Some(data) = self.pop() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        if let Some(next) = self.next.take() {
            return Poll::Ready(Some(next));
        }
        match &mut self.rest {
            Some(rest) => Pin::new(rest).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        let rest_is_over = self.rest.as_ref().is_none_or(Body::is_end_stream);
        self.read.is_none() && self.next.is_none() && rest_is_over
    }

    fn size_hint(&self) -> SizeHint {
        let read = self.read.as_ref().map_or(0, Buffer::len) - self.given;
        let next = match &self.next {
            Some(Ok(frame)) => frame.data_ref().map_or(0, Bytes::len),
            // What breaks off has no length, and whoever went by one would not see that it breaks.
            Some(Err(_)) => return SizeHint::new(),
            None => 0,
        };
        let here = (read + next) as u64;
        let rest = match &self.rest {
            Some(rest) => rest.size_hint(),
            None => SizeHint::with_exact(0),
        };
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(here));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(here));
        }
        hint
    }
}
