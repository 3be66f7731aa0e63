//! Where time, randomness and background tasks come from.
//!
//! The engine and [`MemoryStorage`](crate::MemoryStorage) ask an [`Env`] and nothing else, so a test can move the clock
//! instead of sleeping, and a simulation can replay a run from its seed.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use pin_project_lite::pin_project;

mod background;
#[cfg(any(test, feature = "conformance"))]
mod simulated;
mod system;

#[cfg(any(test, feature = "conformance"))]
pub use self::simulated::SimulatedClock;

/// Clock, sleep, randomness and spawning.
///
/// [`Env::system`], the default, is tokio's clock and runtime and a random generator
/// for each thread, which the operating system seeds. Cloning shares it.
///
/// ```
/// use idempotency_core::Env;
///
/// let env = Env::system();
/// let before = env.now();
/// assert!(env.now() >= before);
/// ```
#[derive(Clone)]
pub struct Env(Arc<dyn Environment>);

/// What an [`Env`] is made of. Implement it to run the engine on a clock of your own.
pub trait Environment: Send + Sync + 'static {
    /// Time since an arbitrary, fixed origin; never goes back.
    fn now(&self) -> Duration;

    /// Returns after `duration` of this environment's time.
    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()>;

    /// Fills `buffer` with random bytes.
    fn fill_random(&self, buffer: &mut [u8]);

    /// What spawns tasks from here on, or `None` where there is no runtime.
    fn spawner(&self) -> Option<Spawner>;

    /// What spawns tasks that must go on when the runtime of the caller is blocked, is not driven any more or has ended: the renewal
    /// of claims. Default: [`spawner`](Self::spawner).
    fn background(&self) -> Option<Spawner> {
        self.spawner()
    }

    /// Whether `now` passes at the pace of the wall clock. Storages then leave expiry to their backend's own clock.
    fn is_real_time(&self) -> bool {
        false
    }
}

impl Env {
    /// tokio's clock (so `tokio::time::pause` works) and runtime, and a random generator for each thread, which
    /// the operating system seeds.
    #[must_use]
    pub fn system() -> Self {
        Self(system::shared())
    }

    /// An environment of your own.
    #[must_use]
    pub fn new(environment: impl Environment) -> Self {
        Self(Arc::new(environment))
    }

    /// Time since an arbitrary, fixed origin; never goes back.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.0.now()
    }

    /// Returns after `duration`.
    ///
    /// # Panics
    ///
    /// [`Env::system`] panics outside a tokio runtime with its time driver enabled, as `tokio::time::sleep` does.
    pub fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + Send + use<> {
        self.0.sleep(duration)
    }

    /// What comes of `work`, or `None` if it takes longer than `limit`. What is done at once needs no timer.
    pub(crate) fn within<F: Future>(&self, limit: Duration, work: F) -> Within<'_, F> {
        Within {
            env: self,
            limit,
            work,
            timer: None,
        }
    }

    /// Fills `buffer` with random bytes.
    ///
    /// # Panics
    ///
    /// [`Env::system`] panics if the operating system has no source of randomness to seed it.
    pub fn fill_random(&self, buffer: &mut [u8]) {
        self.0.fill_random(buffer);
    }

    /// What spawns tasks from here on, also from places where no runtime is entered (a `Drop`); `None` outside a runtime.
    #[must_use]
    pub fn spawner(&self) -> Option<Spawner> {
        self.0.spawner()
    }

    /// What spawns tasks that must go on when the runtime of the caller is blocked, is not driven any more or has ended. Claims are
    /// renewed by such a task.
    ///
    /// [`Env::system`] has one thread for the process, with a tokio runtime of its own, which the first call starts. Where the
    /// caller's time is not the real one (`tokio::time::pause`) it spawns on the caller's runtime.
    #[must_use]
    pub fn background(&self) -> Option<Spawner> {
        self.0.background()
    }

    /// Whether the caller runs on the background thread of [`Env::system`]. A connection whose I/O is driven by another runtime may
    /// stand still with that runtime, so a storage can keep one of its own for these calls.
    #[must_use]
    pub fn in_background() -> bool {
        background::is_current()
    }

    /// Whether this environment's time is the wall clock's.
    #[must_use]
    pub fn is_real_time(&self) -> bool {
        self.0.is_real_time()
    }
}

pin_project! {
    /// Future of [`Env::within`]. An `async fn` would keep `work` twice: as its argument, and pinned.
    pub(crate) struct Within<'a, F> {
        env: &'a Env,
        limit: Duration,
        #[pin]
        work: F,
        timer: Option<BoxFuture<'static, ()>>,
    }
}

impl<F: Future> Future for Within<'_, F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(done) = this.work.poll(cx) {
            return Poll::Ready(Some(done));
        }
        let timer = this
            .timer
            .get_or_insert_with(|| this.env.0.sleep(*this.limit));
        timer.as_mut().poll(cx).map(|()| None)
    }
}

impl Default for Env {
    fn default() -> Self {
        Self::system()
    }
}

impl fmt::Debug for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Env")
            .field("is_real_time", &self.is_real_time())
            .finish_non_exhaustive()
    }
}

/// Spawns background tasks; captured where a runtime is entered, usable anywhere.
#[derive(Clone)]
pub struct Spawner(Arc<dyn Fn(BoxFuture<'static, ()>) + Send + Sync>);

impl Spawner {
    /// A spawner that hands each task to `spawn`.
    pub fn new(spawn: impl Fn(BoxFuture<'static, ()>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(spawn))
    }

    /// Runs `task` in the background.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        (self.0)(Box::pin(task));
    }
}

impl fmt::Debug for Spawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Spawner").finish_non_exhaustive()
    }
}
