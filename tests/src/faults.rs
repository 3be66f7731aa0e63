//! A storage that fails, hangs and forgets on command.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use idempotency_axum::{EncodedKey, Operation, Outcome, Storage, StorageError};
use tokio::sync::{Semaphore, watch};

use crate::{
    PATIENCE,
    hooked::{Hook, Hooked, StorageCall},
};

/// What an operation does instead of its work.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Fails before it has an effect.
    FailBefore,
    /// Has its effect, and fails to say so.
    FailAfter,
    /// Fails as if the record could not be read.
    Unreadable,
    /// Never answers.
    Hang,
    /// Has its effect, and never answers.
    HangAfter,
    /// Fails to complete a key with an answer; a tombstone is stored.
    RefuseAnswer,
    /// Waits for a permit of the gate, then works.
    Gate(Arc<Semaphore>),
    /// Lets the other tasks of this thread go first so many times, then works.
    Slow(usize),
}

/// By operation and key; `None` is every key.
type Faults = HashMap<(Operation, Option<EncodedKey>), Fault>;

/// Any storage, with faults. Clones share them.
pub type FaultyStorage<S> = Hooked<S, Faulty>;

/// The hook that makes them.
#[derive(Clone, Debug)]
pub struct Faulty {
    faults: Arc<Mutex<Faults>>,
    calls: Arc<watch::Sender<HashMap<Operation, usize>>>,
}

impl<S: Storage> FaultyStorage<S> {
    /// A storage without faults yet.
    pub fn new(inner: S) -> Self {
        Self::around(
            inner,
            Faulty {
                faults: Arc::default(),
                calls: Arc::new(watch::Sender::new(HashMap::new())),
            },
        )
    }

    /// From now on `operation` has this fault.
    pub fn set(&self, operation: Operation, fault: Fault) {
        self.hook()
            .faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((operation, None), fault);
    }

    /// From now on `operation` has this fault for `key`.
    pub fn set_for(&self, key: EncodedKey, operation: Operation, fault: Fault) {
        self.hook()
            .faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((operation, Some(key)), fault);
    }

    /// From now on `operation` works.
    pub fn heal(&self, operation: Operation) {
        self.hook()
            .faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(faulty, _), _| *faulty != operation);
    }

    /// How often `operation` was called.
    #[must_use]
    pub fn calls(&self, operation: Operation) -> usize {
        self.hook()
            .calls
            .borrow()
            .get(&operation)
            .copied()
            .unwrap_or(0)
    }

    /// Returns once `operation` was called so many times, whether it has answered or not.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`], naming what was called.
    pub async fn called(&self, operation: Operation, times: usize) {
        let mut calls = self.hook().calls.subscribe();
        let enough = calls.wait_for(|calls| calls.get(&operation).is_some_and(|is| *is >= times));
        if tokio::time::timeout(PATIENCE, enough).await.is_err() {
            panic!(
                "no {times} × {operation} in {:?}",
                self.hook().calls.borrow()
            );
        }
    }
}

impl Faulty {
    fn fault(&self, call: StorageCall<'_>) -> Option<Fault> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let of_key = faults.get(&(call.operation, Some(*call.key)));
        of_key
            .or_else(|| faults.get(&(call.operation, None)))
            .cloned()
    }
}

impl Hook for Faulty {
    async fn around<T: Send>(
        &self,
        call: StorageCall<'_>,
        work: impl Future<Output = Result<T, StorageError>> + Send,
    ) -> Result<T, StorageError> {
        self.calls
            .send_modify(|calls| *calls.entry(call.operation).or_default() += 1);
        let broken = || StorageError::unavailable(std::io::Error::other("injected"));
        match self.fault(call) {
            None => work.await,
            Some(Fault::RefuseAnswer) => match call.record.map(|record| &record.outcome) {
                Some(Outcome::Response(_)) => Err(StorageError::unavailable("too large")),
                _ => work.await,
            },
            Some(Fault::FailBefore) => Err(broken()),
            Some(Fault::FailAfter) => {
                work.await?;
                Err(broken())
            }
            Some(Fault::Unreadable) => {
                Err(StorageError::unreadable(std::io::Error::other("injected")))
            }
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::HangAfter) => {
                work.await?;
                std::future::pending().await
            }
            Some(Fault::Gate(gate)) => {
                let permit = gate.acquire().await.map_err(StorageError::unavailable)?;
                permit.forget();
                work.await
            }
            Some(Fault::Slow(turns)) => {
                for _ in 0..turns {
                    tokio::task::yield_now().await;
                }
                work.await
            }
        }
    }
}
