//! A thread with a tokio runtime of its own, one for the process.
//!
//! A runtime that is blocked by a handler, is not driven any more or has ended runs no task, so what must go on whatever happens to
//! the program's own runtimes runs here: the renewal of claims, and the outcomes that are still to be stored.

use std::{
    cell::Cell,
    future::pending,
    io,
    sync::{OnceLock, mpsc},
    thread,
};

use tokio::runtime::Builder;

use super::Spawner;

thread_local! {
    static IS_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is the one of the background runtime.
pub(super) fn is_current() -> bool {
    IS_BACKGROUND.get()
}

/// Spawns on the background runtime, which the first call starts. `None` if it can't be started.
pub(super) fn spawner() -> Option<Spawner> {
    static BACKGROUND: OnceLock<Option<Spawner>> = OnceLock::new();
    BACKGROUND
        .get_or_init(|| {
            let started = start();
            if let Err(error) = &started {
                tracing::error!(
                    target: "idempotency",
                    %error,
                    "no thread to renew claims on: they are renewed on the runtime of the first request, and lost when it is blocked"
                );
            }
            started.ok()
        })
        .clone()
}

fn start() -> io::Result<Spawner> {
    let (started, handle) = mpsc::channel();
    thread::Builder::new()
        .name("idempotency".to_owned())
        .spawn(move || {
            IS_BACKGROUND.set(true);
            // Made and dropped here: a runtime must not be dropped inside another one, where the thread is started.
            let runtime = Builder::new_current_thread().enable_all().build();
            let handle = runtime.as_ref().map(|runtime| runtime.handle().clone());
            if started.send(handle.map_err(|error| error.kind())).is_ok()
                && let Ok(runtime) = runtime
            {
                runtime.block_on(pending::<()>());
            }
        })?;
    let handle = handle.recv().map_err(io::Error::other)??;
    Ok(Spawner::new(move |task| drop(handle.spawn(task))))
}
