//! A clock that stands still until a test moves it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{runtime::Handle, sync::oneshot};

use super::{Env, Environment, Spawner};

impl Env {
    /// An environment whose clock moves only when the returned [`SimulatedClock`] is told to, and whose random bytes follow
    /// from `seed`. Tasks are spawned on the current tokio runtime. Needs the feature `conformance`.
    ///
    /// Give it to the configuration *and* to the storage: records expire by the clock of their storage.
    ///
    /// ```
    /// use std::time::Duration;
    /// use idempotency_core::Env;
    ///
    /// let (env, clock) = Env::simulated(7);
    /// let start = env.now();
    /// clock.advance(Duration::from_secs(3600));
    /// assert_eq!(env.now() - start, Duration::from_secs(3600));
    /// ```
    #[must_use]
    pub fn simulated(seed: u64) -> (Self, SimulatedClock) {
        let clock = SimulatedClock(Arc::new(Mutex::new(State {
            now: Duration::ZERO,
            random: seed,
            timers: BTreeMap::new(),
            next_timer: 0,
        })));
        (Self::new(clock.clone()), clock)
    }
}

/// Moves the clock of [`Env::simulated`].
#[derive(Clone, Debug)]
pub struct SimulatedClock(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    now: Duration,
    random: u64,
    timers: BTreeMap<(Duration, u64), oneshot::Sender<()>>,
    next_timer: u64,
}

impl SimulatedClock {
    /// Moves the clock forward by `step` and ends every sleep that is then over, the earliest first.
    pub fn advance(&self, step: Duration) {
        let due = {
            let mut state = self.lock();
            state.now = state.now.saturating_add(step);
            let after_now = (state.now, u64::MAX);
            let rest = state.timers.split_off(&after_now);
            std::mem::replace(&mut state.timers, rest)
        };
        for timer in due.into_values() {
            // A sleeper that was dropped needs no waking.
            let _ = timer.send(());
        }
    }

    /// How many sleeps are under way.
    #[must_use]
    pub fn sleeping(&self) -> usize {
        let mut state = self.lock();
        state.timers.retain(|_, timer| !timer.is_closed());
        state.timers.len()
    }

    /// The state stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Environment for SimulatedClock {
    fn now(&self) -> Duration {
        self.lock().now
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        if duration.is_zero() {
            return Box::pin(std::future::ready(()));
        }
        let (timer, over) = oneshot::channel();
        let mut state = self.lock();
        let key = (state.now.saturating_add(duration), state.next_timer);
        state.next_timer += 1;
        state.timers.insert(key, timer);
        Box::pin(async {
            // An error means that the clock is gone, and with it everything that could still happen.
            let _ = over.await;
        })
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    fn fill_random(&self, buffer: &mut [u8]) {
        let mut state = self.lock();
        for chunk in buffer.chunks_mut(8) {
            state.random = state.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state.random;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            chunk.copy_from_slice(&z.to_be_bytes()[..chunk.len()]);
        }
    }

    fn spawner(&self) -> Option<Spawner> {
        Handle::try_current().ok().map(Spawner::tokio)
    }
}
