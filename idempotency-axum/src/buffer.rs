//! Bodies in memory: how their bytes are joined, limited and counted.
//!
//! A [`Buffer`] holds the bytes read so far of a request's body ([`request`]) or of an answer that is being recorded. It takes at
//! most twice the size of the body, however small its frames, also while it grows and while it is joined. Its bytes are reserved
//! from [`Config::max_buffered`](crate::Config::max_buffered).

use std::{collections::VecDeque, mem};

use bytes::Bytes;
use idempotency_core::{Budget, Reservation};

pub(crate) mod request;

/// The bytes that were read so far, `limit` at most.
///
/// A single frame is kept as it is. From the second on frames are copied into chunks: many small frames take much more memory than
/// their bytes, and a frame may keep a much larger allocation alive. Each chunk is as large as all before it, so chunks are few,
/// and none is moved when the next one is needed.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Read,
    limit: usize,
    reservation: Reservation,
}

#[derive(Debug)]
enum Read {
    One(Bytes),
    Many {
        chunks: VecDeque<Vec<u8>>,
        len: usize,
    },
}

/// Why a frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Overflow {
    /// The body is longer than the limit.
    TooLong,
    /// All bodies together are larger than the budget.
    NoRoom,
}

impl Buffer {
    /// The most that [`chunk`](Self::chunk) copies.
    const COPIED: usize = 32 * 1024;

    /// A buffer of at most `limit` bytes. `None` if the budget is used up.
    pub(crate) fn reserved(limit: usize, budget: &Budget) -> Option<Self> {
        Some(Self::new(limit, budget.reserve(0)?))
    }

    /// A buffer of at most `limit` bytes for bytes that are already in memory: they are counted, and not refused.
    pub(crate) fn counted(limit: usize, budget: &Budget) -> Self {
        Self::new(limit, budget.count(0))
    }

    fn new(limit: usize, reservation: Reservation) -> Self {
        Self {
            bytes: Read::One(Bytes::new()),
            limit,
            reservation,
        }
    }

    pub(crate) fn len(&self) -> usize {
        match &self.bytes {
            Read::One(frame) => frame.len(),
            Read::Many { len, .. } => *len,
        }
    }

    /// Takes a frame if there is room for it. If not, nothing changes.
    pub(crate) fn push(&mut self, frame: &Bytes) -> Result<(), Overflow> {
        self.check_limit(frame)?;
        if !self.reservation.grow(frame.len()) {
            return Err(Overflow::NoRoom);
        }
        self.append(frame);
        Ok(())
    }

    /// Takes a frame that is already in memory, whether there is room or not.
    pub(crate) fn hold(&mut self, frame: &Bytes) -> Result<(), Overflow> {
        self.check_limit(frame)?;
        self.reservation.count(frame.len());
        self.append(frame);
        Ok(())
    }

    fn check_limit(&self, frame: &Bytes) -> Result<(), Overflow> {
        match frame.len() > self.limit - self.len() {
            true => Err(Overflow::TooLong),
            false => Ok(()),
        }
    }

    fn append(&mut self, frame: &Bytes) {
        match &mut self.bytes {
            _ if frame.is_empty() => {}
            Read::One(one) if one.is_empty() => *one = frame.clone(),
            Read::One(one) => {
                let first = one.to_vec();
                self.bytes = Read::Many {
                    len: first.len(),
                    chunks: [first].into(),
                };
                self.append(frame);
            }
            Read::Many { chunks, len } => {
                extend(chunks, *len, frame, self.limit);
                *len += frame.len();
            }
        }
    }

    /// A first contiguous part of the bytes from `from` to `to`; the range is not empty and within the buffer.
    pub(crate) fn chunk(&self, from: usize, to: usize) -> Bytes {
        let chunks = match &self.bytes {
            Read::One(frame) => return frame.slice(from..to),
            Read::Many { chunks, .. } => chunks,
        };
        let mut start = 0;
        for chunk in chunks {
            let end = start + chunk.len();
            if from < end {
                let to = to.min(end).min(from + Self::COPIED);
                return Bytes::copy_from_slice(&chunk[from - start..to - start]);
            }
            start = end;
        }
        Bytes::new()
    }

    /// Takes out the first contiguous bytes.
    pub(crate) fn pop(&mut self) -> Option<Bytes> {
        let bytes = match &mut self.bytes {
            Read::One(frame) => mem::take(frame),
            Read::Many { chunks, len } => {
                let chunk = chunks.pop_front().unwrap_or_default();
                *len -= chunk.len();
                chunk.into()
            }
        };
        (!bytes.is_empty()).then_some(bytes)
    }

    /// Copies a single frame, which may keep a larger allocation alive.
    pub(crate) fn detach(&mut self) {
        if let Read::One(frame) = &mut self.bytes {
            *frame = Bytes::copy_from_slice(frame);
        }
    }

    /// Joins the bytes. A second call copies nothing.
    pub(crate) fn join(&mut self) -> Bytes {
        let joined = mem::replace(&mut self.bytes, Read::One(Bytes::new())).joined();
        self.bytes = Read::One(joined.clone());
        joined
    }

    /// All the bytes joined, and their reservation.
    pub(crate) fn into_parts(self) -> (Bytes, Reservation) {
        (self.bytes.joined(), self.reservation)
    }
}

impl Read {
    fn joined(self) -> Bytes {
        match self {
            Self::One(frame) => frame,
            Self::Many { chunks, len } => joined(chunks, len),
        }
    }
}

/// Fills the last chunk, and puts the rest in a new one. The new chunk is no larger than all before it or than the rest, so buffer
/// and frame together take at most twice the body.
fn extend(chunks: &mut VecDeque<Vec<u8>>, len: usize, frame: &[u8], limit: usize) {
    /// The first chunks of small frames should not be smaller than their own bookkeeping.
    const SMALLEST: usize = 64;

    let mut rest = frame;
    if let Some(last) = chunks.back_mut() {
        let spare = last.capacity() - last.len();
        let (fits, more) = frame.split_at(spare.min(frame.len()));
        last.extend_from_slice(fits);
        rest = more;
    }
    if !rest.is_empty() {
        let len = len + frame.len() - rest.len();
        let size = len.max(SMALLEST).min(limit - len);
        let mut chunk = Vec::with_capacity(size.max(rest.len()));
        chunk.extend_from_slice(rest);
        chunks.push_back(chunk);
    }
}

fn joined(mut chunks: VecDeque<Vec<u8>>, len: usize) -> Bytes {
    if let Some(last) = chunks.back_mut() {
        // Not even for a moment is there more than the bytes twice.
        last.shrink_to_fit();
    }
    let mut joined = Vec::with_capacity(len);
    for chunk in chunks {
        joined.extend_from_slice(&chunk);
    }
    joined.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buffer(frames: &[&'static str], limit: usize) -> (Buffer, Result<(), Overflow>) {
        let mut buffer = Buffer::counted(limit, &Budget::new(1 << 20));
        let taken = frames
            .iter()
            .try_for_each(|frame| buffer.push(&Bytes::from_static(frame.as_bytes())));
        (buffer, taken)
    }

    #[test]
    fn the_limit_is_inclusive() {
        for frames in [&["123", "45"][..], &["12345"], &["", "1", "", "2345", ""]] {
            let (buffer, taken) = buffer(frames, 5);
            assert_eq!(taken, Ok(()));
            assert_eq!(buffer.into_parts().0, "12345");
        }
        for frames in [&["123", "456"][..], &["123456"]] {
            let (_, taken) = buffer(frames, 5);
            assert_eq!(taken, Err(Overflow::TooLong));
        }
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let budget = Budget::new(5);
        let mut buffer = Buffer::reserved(100, &budget).unwrap();
        buffer.push(&Bytes::from_static(b"123")).unwrap();
        let refused = buffer.push(&Bytes::from_static(b"456"));
        assert_eq!(refused, Err(Overflow::NoRoom));
        assert_eq!((buffer.len(), budget.used()), (3, 3));
        buffer.push(&Bytes::from_static(b"45")).unwrap();
        assert!(Buffer::reserved(100, &budget).is_none());
        let (bytes, reservation) = buffer.into_parts();
        assert_eq!((&*bytes, reservation.bytes()), (&b"12345"[..], 5));
        drop(reservation);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_is_held_in_any_case_is_counted() {
        let budget = Budget::new(5);
        let mut buffer = Buffer::counted(100, &budget);
        buffer.hold(&Bytes::from_static(b"123456")).unwrap();
        assert_eq!((buffer.len(), budget.used()), (6, 6));
        assert_eq!(
            buffer.push(&Bytes::from_static(b"7")),
            Err(Overflow::NoRoom)
        );
    }

    #[test]
    fn chunks_take_no_more_than_the_limit() {
        let (mut buffer, _) = buffer(&[], 1000);
        while buffer.push(&Bytes::from_static(b"xyz")).is_ok() {
            if let Read::Many { chunks, len } = &buffer.bytes {
                let capacity: usize = chunks.iter().map(Vec::capacity).sum();
                assert!(capacity <= 1000 && capacity <= 2 * len.max(&64), "{len}");
            }
        }
        assert_eq!(buffer.len(), 999);
    }

    #[test]
    fn every_range_can_be_read_back() {
        let whole: Vec<u8> = (0..=255).cycle().take(1000).collect();
        let mut buffer = Buffer::counted(1000, &Budget::new(1000));
        for frame in whole.chunks(7) {
            buffer.push(&Bytes::copy_from_slice(frame)).unwrap();
        }
        for to in [1, 7, 500, 1000] {
            let mut read = Vec::new();
            while read.len() < to {
                read.extend_from_slice(&buffer.chunk(read.len(), to));
            }
            assert_eq!(read, whole[..to]);
        }
        assert_eq!(buffer.join(), whole);
        assert_eq!(buffer.chunk(1, 3), whole[1..3]);
        assert_eq!(buffer.len(), 1000);
    }

    #[test]
    fn what_is_popped_is_all_in_its_order() {
        let (mut one, _) = buffer(&["abc"], 10);
        assert_eq!(one.pop().unwrap(), "abc");
        assert_eq!((one.pop(), one.len()), (None, 0));
        let frames = ["some bytes, and "; 20];
        let (mut many, _) = buffer(&frames, 1000);
        let mut popped = Vec::new();
        while let Some(bytes) = many.pop() {
            popped.extend_from_slice(&bytes);
            assert_eq!(popped.len() + many.len(), 320);
        }
        assert_eq!(popped, frames.concat().as_bytes());
    }

    #[test]
    fn a_single_frame_is_not_copied_unless_it_is_detached() {
        let frame = Bytes::from(vec![1; 100]).slice(10..20);
        let mut buffer = Buffer::counted(100, &Budget::new(100));
        buffer.push(&frame).unwrap();
        assert_eq!(buffer.join().as_ptr(), frame.as_ptr());
        buffer.detach();
        assert_ne!(buffer.join().as_ptr(), frame.as_ptr());
        assert_eq!(buffer.join(), frame);
    }
}
