//! A body that a test feeds, and sees being read.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use axum::body::Body;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::sync::{
    mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    watch,
};

use crate::PATIENCE;

/// A body whose frames come from the test, for one answer. Clones are the same body.
#[derive(Clone, Debug)]
pub struct Feed(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// `None` once the feed has ended.
    sender: Mutex<Option<UnboundedSender<Fed>>>,
    /// `None` once the body was made.
    receiver: Mutex<Option<UnboundedReceiver<Fed>>>,
    reading: watch::Sender<Reading>,
}

/// What is fed.
#[derive(Debug)]
pub enum Fed {
    /// A frame, of data or trailers.
    Frame(Frame<Bytes>),
    /// The body breaks.
    Error,
    /// Reading the body panics.
    Panic,
}

/// What a body says about its length beforehand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Nothing, so HTTP/1.1 sends it in chunks.
    Unknown,
    /// So many bytes, as its size hint, and nothing after them.
    Known(u64),
    /// So many bytes, as its size hint, and perhaps trailers: with the last byte it does not say that it is over.
    BeforeTrailers(u64),
}

#[derive(Clone, Copy, Debug, Default)]
struct Reading {
    /// Frames that were handed over.
    frames: usize,
    end: Option<End>,
}

/// How the reading of a [`Feed`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All of it was read.
    Read,
    /// Somebody let go of it before.
    Dropped,
}

impl Feed {
    /// Nothing fed yet.
    #[must_use]
    pub fn new() -> Self {
        let (sender, receiver) = unbounded_channel();
        Self(Arc::new(Shared {
            sender: Mutex::new(Some(sender)),
            receiver: Mutex::new(Some(receiver)),
            reading: watch::Sender::default(),
        }))
    }

    /// Feeds data.
    pub fn data(&self, data: impl Into<Bytes>) {
        self.feed(Fed::Frame(Frame::data(data.into())));
    }

    /// Feeds trailers.
    pub fn trailers(&self, trailers: HeaderMap) {
        self.feed(Fed::Frame(Frame::trailers(trailers)));
    }

    /// Lets the body break.
    pub fn fail(&self) {
        self.feed(Fed::Error);
    }

    /// Lets the reading of the body panic.
    pub fn panic(&self) {
        self.feed(Fed::Panic);
    }

    /// Ends the body.
    pub fn end(&self) {
        let mut sender = self.0.sender.lock().unwrap_or_else(PoisonError::into_inner);
        *sender = None;
    }

    /// The body.
    ///
    /// # Panics
    ///
    /// Panics the second time.
    pub fn body(&self, length: Length) -> Body {
        let receiver = &self.0.receiver;
        let receiver = receiver
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        Body::new(FeedBody {
            receiver: receiver.expect("a feed is one body"),
            left: match length {
                Length::Unknown => None,
                Length::Known(bytes) | Length::BeforeTrailers(bytes) => Some(bytes),
            },
            has_trailers: matches!(length, Length::BeforeTrailers(_)),
            feed: self.clone(),
        })
    }

    /// How many frames were read.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.0.reading.borrow().frames
    }

    /// Returns once so many frames were read.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn until_taken(&self, frames: usize) {
        self.wait_for(|reading| reading.frames >= frames).await;
    }

    /// Returns once nobody reads any more, and says why.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn ended(&self) -> End {
        let reading = self.wait_for(|reading| reading.end.is_some()).await;
        reading.end.expect("waited for")
    }

    async fn wait_for(&self, is: impl Fn(&Reading) -> bool) -> Reading {
        let mut reading = self.0.reading.subscribe();
        match tokio::time::timeout(PATIENCE, reading.wait_for(|reading| is(reading))).await {
            Ok(Ok(reading)) => *reading,
            _ => panic!(
                "the reading of the body got to {:?}",
                self.0.reading.borrow()
            ),
        }
    }

    fn feed(&self, fed: Fed) {
        let sender = self.0.sender.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever reads may be gone.
        let _ = sender
            .as_ref()
            .expect("a feed that has not ended")
            .send(fed);
    }

    /// The first end counts.
    fn note_end(&self, end: End) {
        self.0
            .reading
            .send_modify(|reading| reading.end = reading.end.or(Some(end)));
    }
}

impl Default for Feed {
    fn default() -> Self {
        Self::new()
    }
}

struct FeedBody {
    receiver: UnboundedReceiver<Fed>,
    /// Bytes that are still to come, if that was said beforehand.
    left: Option<u64>,
    /// Whether something may follow the last byte.
    has_trailers: bool,
    feed: Feed,
}

impl FeedBody {
    fn is_over(&self) -> bool {
        self.left == Some(0) && !self.has_trailers
    }
}

impl http_body::Body for FeedBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        Poll::Ready(match ready!(self.receiver.poll_recv(cx)) {
            Some(Fed::Frame(frame)) => {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                self.left = self.left.map(|left| left - length);
                self.feed
                    .0
                    .reading
                    .send_modify(|reading| reading.frames += 1);
                if self.is_over() {
                    self.feed.note_end(End::Read);
                }
                Some(Ok(frame))
            }
            Some(Fed::Error) => {
                self.feed.note_end(End::Read);
                Some(Err(std::io::Error::other("the source is gone")))
            }
            Some(Fed::Panic) => panic!("the body panics, as it should"),
            None => {
                self.feed.note_end(End::Read);
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.is_over()
    }

    fn size_hint(&self) -> SizeHint {
        self.left
            .map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for FeedBody {
    fn drop(&mut self) {
        self.feed.note_end(End::Dropped);
    }
}
