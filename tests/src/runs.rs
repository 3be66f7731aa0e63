//! What handlers share with their test: a count of runs, and a gate that holds them.

use std::{
    future::{Ready, ready},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::StatusCode;
use tokio::sync::{Semaphore, watch};

use crate::PATIENCE;

/// How often handlers ran. Clones share the count.
#[derive(Clone, Debug, Default)]
pub struct Runs(Arc<AtomicUsize>);

impl Runs {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts a run and returns its number; the first is 1.
    pub fn next(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// How many there were.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    /// A handler that counts its runs and answers 201 with `order 1`, `order 2`, ….
    pub fn handler(
        &self,
    ) -> impl FnOnce() -> Ready<(StatusCode, String)> + Clone + Send + Sync + use<> {
        let runs = self.clone();
        move || ready((StatusCode::CREATED, format!("order {}", runs.next())))
    }
}

/// Holds handlers until a test lets them go on. Clones are the same gate.
#[derive(Clone, Debug)]
pub struct Gate {
    arrived: Arc<watch::Sender<usize>>,
    passes: Arc<Semaphore>,
}

impl Gate {
    /// A closed gate.
    #[must_use]
    pub fn new() -> Self {
        Self {
            arrived: Arc::new(watch::Sender::new(0)),
            passes: Arc::new(Semaphore::new(0)),
        }
    }

    /// Arrives, and waits for a pass.
    ///
    /// # Panics
    ///
    /// Never: the semaphore is not closed.
    pub async fn enter(&self) {
        self.arrived.send_modify(|arrived| *arrived += 1);
        let pass = self.passes.acquire().await;
        pass.expect("the semaphore is never closed").forget();
    }

    /// Returns once this many have arrived, whether they have passed or not.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn arrived(&self, handlers: usize) {
        let mut arrived = self.arrived.subscribe();
        let enough = arrived.wait_for(|arrived| *arrived >= handlers);
        if tokio::time::timeout(PATIENCE, enough).await.is_err() {
            panic!("{} of {handlers} came to the gate", *self.arrived.borrow());
        }
    }

    /// Lets this many pass, now or when they come.
    pub fn open(&self, handlers: usize) {
        self.passes.add_permits(handlers);
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::new()
    }
}
