//! A thread that keeps tokio's timers going.
//!
//! Of a multi-threaded runtime's threads one sleeps on the network and the timers, the others on a condition variable. When the
//! first is woken by the network and then runs a task that blocks it, nobody looks at the timers until something wakes another
//! thread, and on an idle server nothing does. A task that is spawned from outside the runtime does.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError, Weak},
    time::Duration,
};

use tokio::runtime::Handle;

static WATCHED: Mutex<Vec<Watched>> = Mutex::new(Vec::new());
static CHANGED: Condvar = Condvar::new();

struct Watched {
    is_wanted: Weak<()>,
    runtime: Handle,
    every: Duration,
}

/// Wakes a thread of `runtime` `every` so often, until the result is dropped.
pub(super) fn watch(runtime: Handle, every: Duration) -> Arc<()> {
    let wanted = Arc::new(());
    let mut watched = lock();
    if watched.is_empty() && !start() {
        return wanted;
    }
    watched.push(Watched {
        is_wanted: Arc::downgrade(&wanted),
        runtime,
        every,
    });
    drop(watched);
    CHANGED.notify_one();
    wanted
}

/// One thread for the process. It ends when there is nothing to watch; its list is empty only then, so a list that is empty
/// has no thread.
#[must_use]
fn start() -> bool {
    let started = std::thread::Builder::new()
        .name("idempotency-watch".to_owned())
        .spawn(run);
    if let Err(error) = &started {
        tracing::error!(
            target: "idempotency",
            %error,
            "no thread to watch the runtime: a handler that blocks its thread on an idle server may lose its claim"
        );
    }
    started.is_ok()
}

fn run() {
    let mut watched = lock();
    loop {
        watched.retain(|watched| watched.is_wanted.strong_count() > 0);
        let Some(pause) = watched.iter().map(|watched| watched.every).min() else {
            return;
        };
        watched = CHANGED
            .wait_timeout(watched, pause)
            .unwrap_or_else(PoisonError::into_inner)
            .0;
        for watched in watched.iter() {
            // Nothing to do but to be woken.
            watched.runtime.spawn(std::future::ready(()));
        }
    }
}

/// The list stays whole whatever panics while it is locked, so a poisoned lock is taken as it is.
fn lock() -> std::sync::MutexGuard<'static, Vec<Watched>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}
