//! A thread with a tokio runtime of its own, one for the process.
//!
//! A runtime that is blocked by a handler, is not driven any more or has ended runs no task, so what must go on whatever happens to
//! the program's own runtimes runs here: the renewal of claims, and the outcomes that are still to be stored.

use std::{cell::Cell, future::pending, io, sync::OnceLock, thread};

use tokio::runtime::{Builder, Runtime};

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
    let runtime = Builder::new_current_thread().enable_all().build()?;
    // It is for the whole process. If no thread can be started it is leaked, because a runtime must not be dropped inside another
    // one, where this is called.
    let runtime: &Runtime = Box::leak(Box::new(runtime));
    let thread = thread::Builder::new().name("idempotency".to_owned());
    thread.spawn(|| {
        IS_BACKGROUND.set(true);
        runtime.block_on(pending::<()>());
    })?;
    Ok(Spawner::tokio(runtime.handle().clone()))
}
