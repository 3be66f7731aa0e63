//! What was read of a body.

use bytes::Bytes;
use idempotency_core::TombstoneReason;

use super::Next;

/// The bytes that were read so far, `limit` at most.
///
/// A single frame is kept as it is. From the second on they are copied together: many small frames take much more memory than
/// their bytes, and one may be a part of something much larger.
pub(super) struct Data {
    bytes: Read,
    limit: usize,
}

enum Read {
    One(Bytes),
    Many(Vec<u8>),
}

/// How a body ended, as far as recording goes.
pub(super) enum End {
    /// All of it is here.
    Whole,
    /// It can't be recorded; and what it went on with.
    Unrecorded(TombstoneReason, Option<Next>),
}

impl Data {
    /// The most that one chunk for a slow client takes.
    const CHUNK: usize = 32 * 1024;

    pub(super) fn new(limit: usize) -> Self {
        Self {
            bytes: Read::One(Bytes::new()),
            limit,
        }
    }

    pub(super) fn len(&self) -> usize {
        match &self.bytes {
            Read::One(frame) => frame.len(),
            Read::Many(bytes) => bytes.len(),
        }
    }

    /// Takes what a body gave, its end included.
    pub(super) fn take(&mut self, next: Option<Next>) -> Option<End> {
        let frame = match next {
            None => return Some(End::Whole),
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                return Some(End::Unrecorded(
                    TombstoneReason::StreamBroken,
                    Some(Err(error)),
                ));
            }
        };
        let Some(bytes) = frame.data_ref() else {
            return Some(End::Unrecorded(TombstoneReason::Trailers, Some(Ok(frame))));
        };
        if bytes.len() > self.limit - self.len() {
            let reason = TombstoneReason::ResponseTooLarge;
            return Some(End::Unrecorded(reason, Some(Ok(frame))));
        }
        self.push(bytes);
        None
    }

    fn push(&mut self, frame: &Bytes) {
        let limit = self.limit;
        match &mut self.bytes {
            _ if frame.is_empty() => {}
            Read::One(one) if one.is_empty() => *one = frame.clone(),
            Read::One(one) => {
                let mut bytes = Vec::with_capacity(room(one.len(), frame.len(), limit));
                bytes.extend_from_slice(one);
                bytes.extend_from_slice(frame);
                self.bytes = Read::Many(bytes);
            }
            Read::Many(bytes) => extend(bytes, frame, limit),
        }
    }

    /// Some of the bytes between `from` and `to`.
    pub(super) fn chunk(&self, from: usize, to: usize) -> Bytes {
        match &self.bytes {
            Read::One(frame) => frame.slice(from..to),
            Read::Many(bytes) => Bytes::copy_from_slice(&bytes[from..to.min(from + Self::CHUNK)]),
        }
    }

    /// All of them, without a copy.
    pub(super) fn into_bytes(self) -> Bytes {
        match self.bytes {
            Read::One(frame) => frame,
            Read::Many(bytes) => bytes.into(),
        }
    }

    /// All of them, without a copy; they stay here too.
    pub(super) fn share(&mut self) -> Bytes {
        let limit = self.limit;
        let bytes = std::mem::replace(self, Self::new(limit)).into_bytes();
        self.bytes = Read::One(bytes.clone());
        bytes
    }
}

/// What has no room moves. What was left of the old place is given back first, so that both places and the frame take twice
/// the limit at most.
fn extend(bytes: &mut Vec<u8>, frame: &[u8], limit: usize) {
    if frame.len() > bytes.capacity() - bytes.len() {
        bytes.shrink_to_fit();
        bytes.reserve_exact(room(bytes.len(), frame.len(), limit) - bytes.len());
    }
    bytes.extend_from_slice(frame);
}

/// Doubles, but never goes beyond the limit, under which both together are.
fn room(len: usize, more: usize, limit: usize) -> usize {
    (len + more).max(len.saturating_mul(2).min(limit))
}

#[cfg(test)]
mod tests {
    use http_body::Frame;

    use super::*;

    fn data(frames: &[&'static str], limit: usize) -> (Data, Option<End>) {
        let mut data = Data::new(limit);
        for frame in frames {
            let end = data.take(Some(Ok(Frame::data(Bytes::from_static(frame.as_bytes())))));
            if end.is_some() {
                return (data, end);
            }
        }
        (data, None)
    }

    #[test]
    fn the_limit_is_inclusive() {
        for frames in [&["123", "45"][..], &["12345"], &["", "1", "", "2345", ""]] {
            let (data, end) = data(frames, 5);
            assert!(end.is_none());
            assert_eq!(data.into_bytes(), "12345");
        }
        for frames in [&["123", "456"][..], &["123456"]] {
            let (data, end) = data(frames, 5);
            let Some(End::Unrecorded(TombstoneReason::ResponseTooLarge, Some(Ok(next)))) = end
            else {
                panic!("it is over the limit");
            };
            let whole = [&data.into_bytes()[..], next.data_ref().unwrap()].concat();
            assert_eq!(whole, b"123456");
        }
    }

    #[test]
    fn it_never_holds_more_than_the_limit() {
        let mut data = Data::new(1000);
        while data
            .take(Some(Ok(Frame::data(Bytes::from_static(b"xyz")))))
            .is_none()
        {
            if let Read::Many(bytes) = &data.bytes {
                assert!(bytes.capacity() <= 1000);
            }
        }
        assert_eq!(data.len(), 999);
    }

    #[test]
    fn what_is_shared_stays() {
        let (mut data, _) = data(&["ab", "cd"], 10);
        assert_eq!(data.chunk(1, 3), "bc");
        assert_eq!(data.share(), "abcd");
        assert_eq!(data.chunk(1, 3), "bc");
        assert_eq!(data.len(), 4);
    }
}
