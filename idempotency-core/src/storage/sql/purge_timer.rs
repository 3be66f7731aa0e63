//! Calls a storage's `purge_expired` at a regular pace.
//!
//! A database keeps a row after it has expired. To the storages an expired row is absent, so a purge only gives room back.

use std::{fmt, future::Future, pin::pin, time::Duration};

use futures_util::future::select;
use tokio::sync::oneshot;

use crate::{Env, StorageError};

/// A task that removes expired claims and records at a regular pace, until it is stopped or this handle is dropped.
///
/// ```no_run
/// # #[cfg(feature = "postgres")]
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use idempotency_core::PostgresStorage;
///
/// let storage = PostgresStorage::connect("postgres://localhost/shop").await?;
/// let purger = storage.purge_every(Duration::from_secs(600));
/// // … serve …
/// purger.stop().await;
/// # Ok(())
/// # }
/// ```
///
/// It runs on the [background thread](Env::background). Each pause is the period, give or take a fifth, and the first one is shorter
/// by chance, so that processes that start together don't purge together. An error is logged; the next turn tries again.
#[must_use = "the purger stops when this handle is dropped"]
pub struct Purger {
    /// Dropped to stop the task.
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
}

impl Purger {
    /// Calls `purge`, which removes what has expired and returns how many rows that were, about every `period`.
    pub(crate) fn start<F>(
        env: Env,
        period: Duration,
        purge: impl Fn() -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<u64, StorageError>> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel::<()>();
        let (end, ended) = oneshot::channel();
        let spawner = env.background();
        let turns = async move {
            let mut pause = period.mul_f64(random(&env));
            loop {
                env.sleep(pause).await;
                match purge().await {
                    Ok(rows) => {
                        tracing::debug!(target: "idempotency", rows, "expired rows are removed");
                    }
                    Err(error) => tracing::warn!(
                        target: "idempotency",
                        %error,
                        source = ?std::error::Error::source(&error),
                        "expired rows could not be removed; the next turn tries again"
                    ),
                }
                pause = period.mul_f64(0.8 + 0.4 * random(&env));
            }
        };
        let task = async move {
            let _end = end;
            let _ = select(pin!(turns), stopped).await;
        };
        match spawner {
            Some(spawner) => spawner.spawn(task),
            None => tracing::error!(
                target: "idempotency",
                "there is no tokio runtime to remove expired rows on"
            ),
        }
        Self { stop, ended }
    }

    /// Stops it, and returns when it has ended. What a batch under way would remove is removed, or is left to the next purger.
    pub async fn stop(self) {
        drop(self.stop);
        // It is dropped with the task, and says nothing.
        let _ = self.ended.await;
    }
}

impl fmt::Debug for Purger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Purger").finish_non_exhaustive()
    }
}

/// From 0 to 1.
fn random(env: &Env) -> f64 {
    let mut bytes = [0; 4];
    env.fill_random(&mut bytes);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn purges_until_it_is_stopped() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = calls.clone();
        let period = Duration::from_secs(60);
        let purger = Purger::start(Env::system(), period, move || {
            // It goes on after an error.
            let n = counted.fetch_add(1, Ordering::Relaxed);
            async move {
                match n {
                    0 => Err(StorageError::timeout()),
                    _ => Ok(1),
                }
            }
        });
        Env::system().sleep(10 * period).await;
        let made = calls.load(Ordering::Relaxed);
        assert!((8..=13).contains(&made), "{made} calls");
        purger.stop().await;
        Env::system().sleep(10 * period).await;
        assert_eq!(calls.load(Ordering::Relaxed), made);
    }
}
