//! A storage that fails, hangs and forgets on command.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use idempotency_axum::{
    Begin, EncodedKey, Entry, Held, NewClaim, Operation, Outcome, Record, Storage, StorageError,
    Token,
};
use tokio::sync::{Semaphore, watch};

use crate::PATIENCE;

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
#[derive(Clone, Debug)]
pub struct FaultyStorage<S> {
    inner: S,
    faults: Arc<Mutex<Faults>>,
    calls: Arc<watch::Sender<HashMap<Operation, usize>>>,
}

impl<S: Storage> FaultyStorage<S> {
    /// A storage without faults yet.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            faults: Arc::default(),
            calls: Arc::new(watch::Sender::new(HashMap::new())),
        }
    }

    /// From now on `operation` has this fault.
    pub fn set(&self, operation: Operation, fault: Fault) {
        self.faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((operation, None), fault);
    }

    /// From now on `operation` has this fault for `key`.
    pub fn set_for(&self, key: EncodedKey, operation: Operation, fault: Fault) {
        self.faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert((operation, Some(key)), fault);
    }

    /// From now on `operation` works.
    pub fn heal(&self, operation: Operation) {
        self.faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(faulty, _), _| *faulty != operation);
    }

    /// How often `operation` was called.
    #[must_use]
    pub fn calls(&self, operation: Operation) -> usize {
        self.calls.borrow().get(&operation).copied().unwrap_or(0)
    }

    /// Returns once `operation` was called so many times, whether it has answered or not.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`], naming what was called.
    pub async fn called(&self, operation: Operation, times: usize) {
        let mut calls = self.calls.subscribe();
        let enough = calls.wait_for(|calls| calls.get(&operation).is_some_and(|is| *is >= times));
        if tokio::time::timeout(PATIENCE, enough).await.is_err() {
            panic!("no {times} × {operation} in {:?}", self.calls.borrow());
        }
    }

    fn fault(&self, operation: Operation, key: &EncodedKey) -> Option<Fault> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        let of_key = faults.get(&(operation, Some(*key)));
        of_key.or_else(|| faults.get(&(operation, None))).cloned()
    }

    async fn run<T>(
        &self,
        operation: Operation,
        key: &EncodedKey,
        work: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        self.calls
            .send_modify(|calls| *calls.entry(operation).or_default() += 1);
        let fault = self.fault(operation, key);
        let broken = || StorageError::unavailable(std::io::Error::other("injected"));
        match fault {
            None | Some(Fault::RefuseAnswer) => work.await,
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

impl<S: Storage> Storage for FaultyStorage<S> {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        self.run(Operation::Begin, key, self.inner.begin(key, claim))
            .await
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let refuses = self.fault(Operation::Complete, key);
        if let (Some(Fault::RefuseAnswer), Outcome::Response(_)) = (refuses, &record.outcome) {
            let refused = std::future::ready(Err(StorageError::unavailable("too large")));
            return self.run(Operation::Complete, key, refused).await;
        }
        self.run(
            Operation::Complete,
            key,
            self.inner.complete(key, token, record, ttl),
        )
        .await
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        self.run(Operation::Renew, key, self.inner.renew(key, token, lease))
            .await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        self.run(Operation::Release, key, self.inner.release(key, token))
            .await
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        self.run(Operation::Get, key, self.inner.get(key)).await
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        self.run(
            Operation::Replace,
            key,
            self.inner.replace(key, record, ttl),
        )
        .await
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        self.run(Operation::Remove, key, self.inner.remove(key))
            .await
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        self.run(Operation::Wait, key, self.inner.wait(key, timeout))
            .await
    }
}
