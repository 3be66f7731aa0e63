//! A handler survives its client.
//!
//! hyper drops a request's future when its connection is gone. From the moment that a claim may have been taken the future is
//! then adopted by a task of its own, so neither a disconnect during the claim nor one before the record leaves an orphan. The
//! common path pays no spawn for it.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use idempotency_core::{Event, Progress, Spawner};
use tracing::{Instrument, Span};

use crate::Engine;

/// A future that goes on in a task when it is dropped after `progress` says that it is committed.
///
/// Not if the drop comes from a panic in its own poll: then what it holds is dropped, and its claim released.
pub(crate) struct Detachable<T: 'static> {
    future: Option<BoxFuture<'static, T>>,
    progress: Progress,
    engine: Engine,
    home: Option<Home>,
    in_poll: bool,
}

/// Where the future was first polled: a drop may come from anywhere.
struct Home {
    spawner: Option<Spawner>,
    span: Span,
}

impl<T: 'static> Detachable<T> {
    pub(crate) fn new(future: BoxFuture<'static, T>, progress: Progress, engine: Engine) -> Self {
        Self {
            future: Some(future),
            progress,
            engine,
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
        match home.spawner {
            Some(spawner) => {
                self.engine.config().emit(&Event::Adopted);
                // The span is the request's, so what the handler still logs can be found under it. The output has no reader.
                spawner.spawn(HandOver(future).instrument(home.span));
            }
            None => tracing::error!(
                target: "idempotency",
                "a request that holds a claim was dropped outside a tokio runtime: its operation is cancelled"
            ),
        }
    }
}

/// Runs a future and lets its output go.
struct HandOver<T>(BoxFuture<'static, T>);

impl<T> Future for HandOver<T> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.as_mut().poll(cx).map(drop)
    }
}
