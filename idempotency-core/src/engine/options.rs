//! What the engine reads of a [`Config`].

use std::time::Duration;

use crate::{
    Budget, Config, Env, Event, LockPolicy, OnStorageError, OnUnreadable, event::Observers,
};

/// The part of a [`Config`] that the engine goes by. All else is for the middleware.
pub(super) struct Options {
    pub(super) env: Env,
    pub(super) lock: LockPolicy,
    pub(super) ttl: Duration,
    pub(super) storage_timeout: Duration,
    pub(super) on_storage_error: OnStorageError,
    pub(super) on_unreadable: OnUnreadable,
    pub(super) max_running: usize,
    pub(super) max_waiting: usize,
    pub(super) budget: Budget,
    observers: Observers,
}

impl Options {
    pub(super) fn of(config: &Config) -> Self {
        Self {
            env: config.env.clone(),
            lock: config.lock.clone(),
            ttl: config.ttl,
            storage_timeout: config.storage_timeout,
            on_storage_error: config.on_storage_error,
            on_unreadable: config.on_unreadable,
            max_running: config.max_running,
            max_waiting: config.max_waiting,
            budget: config.budget.clone(),
            observers: config.observers.clone(),
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.env.now()
    }

    pub(super) fn lease(&self) -> Duration {
        self.lock.lease()
    }

    pub(super) fn emit(&self, event: &Event<'_>) {
        self.observers.emit(event);
    }
}
