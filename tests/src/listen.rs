//! Ears: the events of an engine, and the log.

use std::{
    fmt::{self, Write as _},
    sync::{Arc, Mutex, PoisonError},
};

use idempotency_axum::{Event, Observer};
use tokio::sync::watch;
use tracing::{
    Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt, registry::LookupSpan};

use crate::PATIENCE;

/// The names of all events so far, as an observer to give to a configuration.
#[derive(Clone, Debug)]
pub struct Events {
    names: Arc<watch::Sender<Vec<&'static str>>>,
}

impl Events {
    /// Nothing heard yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            names: Arc::new(watch::Sender::new(Vec::new())),
        }
    }

    /// How often an event of this name happened.
    #[must_use]
    pub fn count(&self, name: &str) -> usize {
        self.names
            .borrow()
            .iter()
            .filter(|event| **event == name)
            .count()
    }

    /// Returns once an event of this name has happened `times`.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`], naming what did happen.
    pub async fn until(&self, name: &str, times: usize) {
        let mut names = self.names.subscribe();
        let heard =
            names.wait_for(|names| names.iter().filter(|event| **event == name).count() >= times);
        if tokio::time::timeout(PATIENCE, heard).await.is_err() {
            panic!("no {times} × {name:?} in {:?}", self.names.borrow());
        }
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

impl Observer for Events {
    fn on_event(&self, event: &Event<'_>) {
        self.names.send_modify(|names| names.push(event.name()));
    }
}

/// What is logged under target `idempotency` while it is installed, one line an event: level, message, `field=value`s.
#[derive(Clone, Debug, Default)]
pub struct Logs(Arc<Mutex<Vec<String>>>);

impl Logs {
    /// Listens on this thread until the guard is dropped: use it in a `current_thread` test.
    #[must_use]
    pub fn install() -> (Self, tracing::subscriber::DefaultGuard) {
        let logs = Self::default();
        let subscriber = tracing_subscriber::registry().with(logs.clone());
        (logs, tracing::subscriber::set_default(subscriber))
    }

    /// The lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The lines that contain all of `parts`.
    #[must_use]
    pub fn with(&self, parts: &[&str]) -> Vec<String> {
        let mut lines = self.lines();
        lines.retain(|line| parts.iter().all(|part| line.contains(part)));
        lines
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Logs {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        if !metadata.target().starts_with("idempotency") {
            return;
        }
        let mut line = format!("{} ", metadata.level());
        event.record(&mut Line(&mut line));
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }
}

struct Line<'a>(&'a mut String);

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a `String` can't fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?} "),
            name => write!(self.0, "{name}={value:?} "),
        };
    }
}
