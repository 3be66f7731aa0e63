//! tokio's clock and runtime, the operating system's randomness.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    time::Instant,
};

use super::{Environment, Spawner, Watch, watch};

/// One for the process: all its users then count from the same origin.
pub(super) fn shared() -> Arc<dyn Environment> {
    static SYSTEM: OnceLock<Arc<System>> = OnceLock::new();
    SYSTEM.get_or_init(|| Arc::new(System::new())).clone()
}

struct System {
    origin: Instant,
}

impl System {
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the clock"
    )]
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
    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that reads the clock"
    )]
    fn now(&self) -> Duration {
        Instant::now().saturating_duration_since(self.origin)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "this is the one place that sleeps"
    )]
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        Box::pin(tokio::time::sleep(duration))
    }

    #[expect(
        clippy::expect_used,
        reason = "no input reaches this; without randomness no token is safe, and `Env::fill_random` says so"
    )]
    fn fill_random(&self, buffer: &mut [u8]) {
        getrandom::fill(buffer).expect("the operating system has no source of randomness");
    }

    fn spawner(&self) -> Option<Spawner> {
        let handle = Handle::try_current().ok()?;
        Some(Spawner::new(move |task| drop(handle.spawn(task))))
    }

    fn watch(&self, every: Duration) -> Watch {
        match Handle::try_current() {
            Ok(handle) if handle.runtime_flavor() == RuntimeFlavor::MultiThread => {
                Watch(Some(watch::watch(handle, every)))
            }
            // A runtime of one thread that is blocked can't be helped.
            _ => Watch::default(),
        }
    }

    fn is_real_time(&self) -> bool {
        true
    }
}
