//! The engine without HTTP: the consumer of a queue that delivers at least once.
//!
//! Such a queue delivers a message again when it heard no acknowledgement in time: because the consumer died after its work, or
//! was slow, or the acknowledgement got lost. So a consumer sees messages twice, even at the same moment in two workers, and must
//! not ship a parcel twice. [`Engine::run`] claims, runs and records in one call:
//!
//! | outcome | what the worker does |
//! |---|---|
//! | [`Ran::Executed`] | acknowledges: the work is done, and recorded |
//! | [`Ran::Replayed`] | acknowledges: it was done before |
//! | [`Ran::Failed`], [`Ran::InFlight`], [`Ran::Overloaded`], [`Ran::StorageFailed`] | nothing; without an acknowledgement the queue delivers again |
//! | [`Ran::NotReplayable`], [`Ran::Mismatch`] | asks a person: how it ended is not known, or the id was used for other work |
//!
//! A message that fails releases its key, so the next delivery is worked on. With a storage that other machines share, the same lines
//! hold for workers on all of them.
//!
//! # Run
//!
//! ```console
//! $ cargo run -p idempotency-examples --example engine_only
//! ```
//!
//! It needs no port and ends by itself; `RUST_LOG=idempotency=debug` shows each step.

use std::{
    collections::VecDeque,
    process::ExitCode,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use idempotency_core::{Config, Encoded, EncodedKey, Engine, LockPolicy, MemoryStorage, Ran};
use sha2::{Digest, Sha256};

/// The queue's own id of a message, which is as good a key as a client's.
type MessageId = &'static str;

/// One of the workers: takes deliveries until there are none left.
async fn work(name: &str, queue: &Queue, engine: &Engine, parcels: &Parcels) {
    while let Some(id) = queue.take() {
        match engine.run(&operation(id), || parcels.ship(id)).await {
            Ran::Executed(parcel) => println!("{name}: {id} shipped as {parcel}"),
            Ran::Replayed(parcel) => println!("{name}: {id} was shipped as {parcel} already"),
            Ran::Failed(error) => {
                println!("{name}: {id} failed: {error}");
                queue.deliver_again(id);
            }
            Ran::NotReplayable(reason) => println!("{name}: {id} needs a person: {reason}"),
            Ran::Mismatch => println!("{name}: {id} needs a person: the id was used before"),
            later @ (Ran::InFlight | Ran::Overloaded | Ran::StorageFailed(_)) => {
                println!("{name}: {id} later: {later:?}");
                queue.deliver_again(id);
            }
        }
    }
}

/// Names the work on a message. What comes from outside is hashed, so it may be of any length and no storage sees it.
///
/// The name of the queue stands before the id, because the ids of two queues may be equal.
fn operation(id: &str) -> Encoded {
    let hash = Sha256::new()
        .chain_update("queue:parcels/")
        .chain_update(id);
    Encoded {
        key: EncodedKey::from_bytes(hash.finalize().into()),
        fingerprint: None,
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    idempotency_examples::log();
    // Longer than a parcel takes, so a delivery beside a running one learns how that ended.
    let lock = LockPolicy::default().timeout(Duration::from_secs(10));
    let engine = Engine::new(MemoryStorage::new(), Config::default().lock(lock));
    let (queue, parcels) = (Queue::filled(), Parcels::default());

    tokio::join!(
        work("worker 1", &queue, &engine, &parcels),
        work("worker 2", &queue, &engine, &parcels),
    );
    // Nothing is left that only this process knows.
    engine.drain().await;

    let shipped = parcels.shipped.load(Ordering::Relaxed);
    println!(
        "{} deliveries, {shipped} parcels",
        queue.deliveries.load(Ordering::Relaxed)
    );
    ExitCode::SUCCESS
}

// ---- what stands in for the world

/// A queue that delivers every message twice, and again what was not acknowledged.
struct Queue {
    waiting: Mutex<VecDeque<MessageId>>,
    deliveries: AtomicU32,
}

impl Queue {
    fn filled() -> Self {
        // Each twice in a row, so that both workers have it at once.
        let messages = ["m-1", "m-1", "m-2", "m-2", "m-3", "m-3"];
        Self {
            waiting: Mutex::new(messages.into()),
            deliveries: AtomicU32::new(0),
        }
    }

    fn take(&self) -> Option<MessageId> {
        let id = self.lock().pop_front()?;
        self.deliveries.fetch_add(1, Ordering::Relaxed);
        Some(id)
    }

    fn deliver_again(&self, id: MessageId) {
        self.lock().push_back(id);
    }

    // Every change is one push or pop, so what a panic leaves is whole.
    fn lock(&self) -> MutexGuard<'_, VecDeque<MessageId>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The carrier, which does not answer the first time it is asked to take `m-2`.
#[derive(Default)]
struct Parcels {
    has_failed: AtomicBool,
    shipped: AtomicU32,
}

impl Parcels {
    async fn ship(&self, id: MessageId) -> Result<String, &'static str> {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if id == "m-2" && !self.has_failed.swap(true, Ordering::Relaxed) {
            return Err("the carrier does not answer");
        }
        let number = self.shipped.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(format!("parcel {number}"))
    }
}
