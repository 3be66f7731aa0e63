//! Claims whose operation is over, or never began, and which the storage still has to let go of.
//!
//! They hold no place, and while the storage does not answer, one of them at a time tries it: an outage that thousands of requests
//! run into costs a call now and then, not some for each.

use std::{collections::VecDeque, time::Duration};

use crate::{EncodedKey, Token};

/// How many are told to the storage at once, once it answers.
const CONCURRENCY: usize = 64;

/// The pause after a failed attempt. Each is four times as long as the one before, up to a third of the lease.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// A claim to be released.
#[derive(Clone, Copy, Debug)]
pub(super) struct Release {
    pub(super) key: EncodedKey,
    pub(super) token: Token,
    pub(super) claimed: Claimed,
    /// When its lease is over, and with it the claim.
    pub(super) lease_end: Duration,
}

/// What is known of a claim at the storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claimed {
    Yes,
    /// The storage never answered.
    Perhaps,
    No,
}

/// The queue of them.
#[derive(Debug, Default)]
pub(super) struct Releases {
    queue: VecDeque<Release>,
    under_way: usize,
    /// After a failure: how many there were in a row, and when the next attempt is due.
    failures: u32,
    retry_at: Duration,
}

impl Releases {
    pub(super) fn push(&mut self, release: Release) {
        self.queue.push_back(release);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty() && self.under_way == 0
    }

    /// When the keeper must look at them next.
    pub(super) fn due(&self) -> Duration {
        match self.queue.front() {
            Some(first) if self.has_room() => self.retry_at.min(first.lease_end),
            Some(first) => first.lease_end,
            None => Duration::MAX,
        }
    }

    /// The next one that is to be told to the storage.
    pub(super) fn take(&mut self, now: Duration) -> Option<Release> {
        if self.retry_at > now || !self.has_room() {
            return None;
        }
        let release = self.queue.pop_front()?;
        self.under_way += 1;
        Some(release)
    }

    fn has_room(&self) -> bool {
        let limit = if self.failures > 0 { 1 } else { CONCURRENCY };
        self.under_way < limit
    }

    /// The storage answered one that was taken.
    pub(super) fn answered(&mut self) {
        self.under_way -= 1;
        self.failures = 0;
        self.retry_at = Duration::ZERO;
    }

    /// The storage did not answer one.
    pub(super) fn pause(&mut self, now: Duration, lease: Duration) {
        // Several may fail together, which is one failure.
        if self.retry_at > now {
            return;
        }
        let pause = FIRST_PAUSE * 4_u32.pow(self.failures.min(10));
        self.retry_at = now.saturating_add(pause.min(lease / 3));
        self.failures = self.failures.saturating_add(1);
    }

    /// The storage did not answer one that was taken, which is tried again once the others were: that may be about its key alone.
    pub(super) fn failed(&mut self, release: Release) {
        self.under_way -= 1;
        // It may have been released, only nobody said so.
        self.queue.push_back(Release {
            claimed: Claimed::Perhaps,
            ..release
        });
    }

    /// Drops those whose lease is over, and gives them.
    pub(super) fn drop_ended(&mut self, now: Duration) -> Vec<Release> {
        // They come in the order of their leases, or nearly so: what is left for later is left for not much longer.
        let ended = self
            .queue
            .iter()
            .take_while(|release| release.lease_end <= now)
            .count();
        self.queue.drain(..ended).collect()
    }

    /// The keeper was dropped with those that it had taken, which are left to their leases.
    pub(super) fn start_over(&mut self) {
        self.under_way = 0;
    }
}
