//! A handler survives its client, until `max_hold`. A client that leaves while its answer streams: see [`recording`](crate::recording).
//!
//! hyper drops a request's future when its connection closes. Once a claim may have been taken, a dropped future is adopted by a
//! task, so a disconnect during `begin` or `complete` leaves no orphaned claim. The common path spawns nothing.
//!
//! After [`LockPolicy::max_hold`](crate::LockPolicy::max_hold) the engine gives the claim up: its key has a tombstone. An operation
//! that still runs then without a client, or loses its client later, might run for ever. It is dropped, and [`Route`] logs it.

use std::{
    future::Future,
    pin::{Pin, pin},
    task::{Context, Poll},
};

use axum::extract::MatchedPath;
use futures_util::future::{BoxFuture, Either, select};
use http::{Method, request::Parts};
use idempotency_core::{Event, Progress, Spawner};
use tracing::{Instrument, Span};

use crate::Engine;

/// A future that continues in a task when it is dropped after `progress` is committed, until its claim is given up.
///
/// A drop caused by a panic in its own poll does not continue it; a claim that is still held then is released.
pub(crate) struct Detachable<T: 'static> {
    future: Option<BoxFuture<'static, T>>,
    progress: Progress,
    engine: Engine,
    route: Route,
    home: Option<Home>,
    in_poll: bool,
}

/// The runtime and span of the first poll: a drop may happen anywhere.
struct Home {
    spawner: Option<Spawner>,
    span: Span,
}

impl<T: 'static> Detachable<T> {
    pub(crate) fn new(
        future: BoxFuture<'static, T>,
        progress: Progress,
        engine: Engine,
        route: Route,
    ) -> Self {
        Self {
            future: Some(future),
            progress,
            engine,
            route,
            home: None,
            in_poll: false,
        }
    }
}

impl<T: 'static> Future for Detachable<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        let Some(future) = &mut this.future else {
            panic!("`ResponseFuture` was polled after completion");
        };
        if this.home.is_none() {
            this.home = Some(Home {
                spawner: this.engine.config().env.spawner(),
                span: Span::current(),
            });
        }
        this.in_poll = true;
        let poll = future.as_mut().poll(cx);
        this.in_poll = false;
        if poll.is_ready() {
            this.future = None;
        }
        poll
    }
}

impl<T: 'static> Drop for Detachable<T> {
    fn drop(&mut self) {
        if self.in_poll || !self.progress.is_committed() {
            return;
        }
        let (Some(future), Some(home)) = (self.future.take(), self.home.take()) else {
            return;
        };
        if self.progress.is_given_up() {
            return home.span.in_scope(|| {
                drop(future);
                self.route.report_dropped();
            });
        }
        match home.spawner {
            Some(spawner) => {
                self.engine.config().emit(&Event::Adopted);
                // In the request's span, so that the handler's log lines stay under it.
                let carried = carry(future, self.progress.clone(), self.route.clone());
                spawner.spawn(carried.instrument(home.span));
            }
            None => tracing::error!(
                target: "idempotency",
                "a request that holds a claim was dropped outside a tokio runtime: its operation is cancelled"
            ),
        }
    }
}

/// Runs a future to its end, or until its claim is given up. The output is dropped.
async fn carry<T>(future: BoxFuture<'static, T>, progress: Progress, route: Route) {
    let given_up = pin!(progress.given_up());
    if let Either::Right(((), future)) = select(future, given_up).await {
        drop(future);
        route.report_dropped();
    }
}

/// Method and route pattern of an operation, for the log. The pattern, not the path, keeps the number of names low.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    method: Method,
    path: Option<MatchedPath>,
}

impl Route {
    pub(crate) fn of(parts: &Parts) -> Self {
        Self {
            method: parts.method.clone(),
            path: parts.extensions.get().cloned(),
        }
    }

    /// The pattern that matched; empty if none did.
    pub(crate) fn path(&self) -> &str {
        self.path.as_ref().map_or("", MatchedPath::as_str)
    }

    /// Logs that the operation was dropped before its end: it has no client, and its claim was given up.
    pub(crate) fn report_dropped(&self) {
        tracing::error!(
            target: "idempotency",
            method = %self.method,
            path = self.path(),
            cure = "give what this route waits for a time limit of its own, or raise `LockPolicy::max_hold`",
            "an operation ran for longer than `max_hold` and its client is gone: it was dropped, and retries of its key get the \
             tombstone"
        );
    }
}

#[cfg(all(test, feature = "memory"))]
mod tests {
    use std::future::pending;

    use futures_util::FutureExt;
    use idempotency_core::{Claim, Config, Decision, Encoded, EncodedKey, MemoryStorage};
    use tokio::sync::oneshot::{self, error::TryRecvError};

    use super::*;

    /// An operation that holds a claim and never ends, under way; and what is told when it is dropped.
    async fn running() -> (Detachable<()>, Progress, oneshot::Receiver<()>) {
        let engine = Engine::new(MemoryStorage::new(), Config::default());
        let progress = Progress::new();
        let claim = claim(&engine, &progress).await;
        let (held, dropped) = oneshot::channel::<()>();
        let operation = async move {
            let _held = (claim, held);
            pending::<()>().await;
        };
        let route = Route {
            method: Method::POST,
            path: None,
        };
        let mut running = Detachable::new(operation.boxed(), progress.clone(), engine, route);
        assert_eq!((&mut running).now_or_never(), None);
        (running, progress, dropped)
    }

    async fn claim(engine: &Engine, progress: &Progress) -> Claim {
        let encoded = Encoded {
            key: EncodedKey::from_bytes([1; 32]),
            fingerprint: None,
        };
        match engine.begin_with(&encoded, progress).await {
            Decision::Execute(claim) => claim,
            decision => panic!("{decision:?}"),
        }
    }

    #[tokio::test]
    async fn an_adopted_operation_goes_on_until_it_is_given_up() {
        let (running, progress, mut dropped) = running().await;
        drop(running);
        rest().await;
        assert_eq!(dropped.try_recv(), Err(TryRecvError::Empty));
        progress.give_up();
        rest().await;
        assert_eq!(dropped.try_recv(), Err(TryRecvError::Closed));
    }

    /// All tasks run on this thread, so each comes as far as it can.
    async fn rest() {
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn an_operation_that_is_given_up_goes_on_for_its_client() {
        let (mut running, progress, mut dropped) = running().await;
        progress.give_up();
        assert_eq!((&mut running).now_or_never(), None);
        assert_eq!(dropped.try_recv(), Err(TryRecvError::Empty));
        // Its client leaves, and nobody adopts it.
        drop(running);
        assert_eq!(dropped.try_recv(), Err(TryRecvError::Closed));
    }
}
