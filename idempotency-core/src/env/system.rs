//! tokio's clock and runtime, and a random generator for each thread.
#![expect(
    clippy::disallowed_methods,
    reason = "this is the one place that reads the clock and sleeps"
)]

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::future::BoxFuture;
use rand::Rng;
use tokio::{runtime::Handle, time::Instant};

use super::{Environment, Spawner, background};

/// One for the process: all its users then count from the same origin.
pub(super) fn shared() -> Arc<dyn Environment> {
    static SYSTEM: OnceLock<Arc<System>> = OnceLock::new();
    SYSTEM.get_or_init(|| Arc::new(System::new())).clone()
}

struct System {
    origin: Instant,
}

impl System {
    fn new() -> Self {
        let now = Instant::now();
        // A runtime that was paused before the first use stands at an earlier instant than `now`. An origin in the past
        // keeps its clock from being cut off at zero.
        Self {
            origin: now.checked_sub(Duration::from_secs(3600)).unwrap_or(now),
        }
    }
}

impl Environment for System {
    fn now(&self) -> Duration {
        Instant::now().saturating_duration_since(self.origin)
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }

    /// A generator for each thread, which the operating system seeds now and then: a system call for each token would cost more than
    /// all else that a claim needs.
    fn fill_random(&self, buffer: &mut [u8]) {
        rand::rng().fill_bytes(buffer);
    }

    fn spawner(&self) -> Option<Spawner> {
        Handle::try_current().ok().map(Spawner::tokio)
    }

    fn background(&self) -> Option<Spawner> {
        match is_real_time() {
            true => background::spawner().or_else(|| self.spawner()),
            false => self.spawner(),
        }
    }

    fn is_real_time(&self) -> bool {
        true
    }
}

/// Whether the time of this runtime passes as that of the machine does: it does not where `tokio::time::pause` was called, and
/// another runtime's sleeps would then be of another length.
fn is_real_time() -> bool {
    let before = std::time::Instant::now();
    let now = Instant::now().into_std();
    before <= now && now <= std::time::Instant::now()
}
