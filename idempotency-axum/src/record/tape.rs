//! What a recorder writes and the first client reads.

use std::{
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use axum::body::Body;
use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};

use super::{Data, End, Next, Source};

/// Holds what was read of a body until the client has read it too, and its end back until the recorder is done.
///
/// A `std` mutex guards it: every section is a copy of one frame at most, and none spans an await or runs code that is not ours.
pub(super) struct Tape {
    state: Mutex<State>,
}

struct State {
    data: Data,
    /// What comes after `data`, once the recorder is done.
    tail: Option<Tail>,
    client: Option<Waker>,
    client_is_gone: bool,
}

impl Tape {
    pub(super) fn new(data: Data) -> Self {
        Self {
            state: Mutex::new(State {
                data,
                tail: None,
                client: None,
                client_is_gone: false,
            }),
        }
    }

    /// What the client reads.
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

    /// Writes what the body gave.
    pub(super) fn take(&self, next: Option<Next>) -> Option<End> {
        let mut state = self.lock();
        let end = state.data.take(next);
        let client = state.client.take_if(|_| end.is_none());
        drop(state);
        if let Some(client) = client {
            client.wake();
        }
        end
    }

    /// All that was written.
    pub(super) fn recorded(&self) -> Bytes {
        self.lock().data.share()
    }

    /// The recorder is done: the client gets what is on the tape, then `next`, then `rest`.
    pub(super) fn end(&self, next: Option<Next>, rest: Option<Body>) {
        let mut state = self.lock();
        let tail = Tail::new(state.data.share(), next, rest);
        let unread = match state.client_is_gone {
            true => Some(tail),
            false => state.tail.replace(tail),
        };
        let client = state.client.take();
        drop(state);
        // A body is the handler's code, which is not run under the lock.
        drop(unread);
        if let Some(client) = client {
            client.wake();
        }
    }

    /// The state stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The first client's body.
pub(super) struct Reader {
    tape: Arc<Tape>,
    given: usize,
    /// How long the body says that it is.
    exact: Option<u64>,
    /// How long the client is told that it is, after which it reads no further.
    length: Option<u64>,
    tail: Option<Tail>,
}

impl Reader {
    /// How much may be given before the recorder is done. Of a known length the last byte is the end.
    fn readable(&self, written: usize) -> usize {
        match self.length {
            None => written,
            Some(length) => {
                let before_end = length.saturating_sub(1).try_into().unwrap_or(usize::MAX);
                written.min(before_end)
            }
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
            drop(tail.data.split_to(this.given));
            return Pin::new(this.tail.insert(tail)).poll_frame(cx);
        }
        let readable = this.readable(state.data.len());
        if this.given < readable {
            let chunk = state.data.chunk(this.given, readable);
            drop(state);
            this.given += chunk.len();
            return Poll::Ready(Some(Ok(Frame::data(chunk))));
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

/// A client that leaves takes nothing with it but what only it would have read.
impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.tape.lock();
        state.client_is_gone = true;
        let unread = (state.tail.take(), state.client.take());
        drop(state);
        drop(unread);
    }
}

/// A body that was read in part: what was read, what it went on with, and the rest.
pub(super) struct Tail {
    data: Bytes,
    next: Option<Next>,
    rest: Option<Body>,
}

impl Tail {
    pub(super) fn new(data: Bytes, next: Option<Next>, rest: Option<Body>) -> Self {
        // Nothing comes after an error.
        let rest = rest.filter(|_| !matches!(next, Some(Err(_))));
        Self { data, next, rest }
    }
}

impl http_body::Body for Tail {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Next>> {
        if !self.data.is_empty() {
            let data = mem::take(&mut self.data);
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
        self.data.is_empty() && self.next.is_none() && rest_is_over
    }

    fn size_hint(&self) -> SizeHint {
        let next = match &self.next {
            Some(Ok(frame)) => frame.data_ref().map_or(0, Bytes::len),
            // What breaks off has no length, and whoever went by one would not see that it breaks.
            Some(Err(_)) => return SizeHint::new(),
            None => 0,
        };
        let here = (self.data.len() + next) as u64;
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
