//! The statements that sqlx sends: it logs each of them.

use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span,
    subscriber::Interest,
};

/// Some while anybody listens.
static HEARD: Mutex<Option<Vec<String>>> = Mutex::new(None);

/// What is sent until `sending` is done, in its order.
pub async fn of(sending: impl AsyncFnOnce()) -> Vec<String> {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        tracing::subscriber::set_global_default(Listener).expect("there is no other one");
    });
    *heard() = Some(Vec::new());
    tracing::callsite::rebuild_interest_cache();
    sending().await;
    let statements = heard().take().unwrap_or_default();
    // From here on a statement that is not logged costs what it costs without a subscriber.
    tracing::callsite::rebuild_interest_cache();
    statements
}

fn heard() -> MutexGuard<'static, Option<Vec<String>>> {
    HEARD.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Listener;

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "sqlx::query" && heard().is_some()
    }

    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match self.enabled(metadata) {
            true => Interest::always(),
            false => Interest::never(),
        }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(match heard().is_some() {
            true => LevelFilter::TRACE,
            false => LevelFilter::OFF,
        })
    }

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Statement);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Keeps the text of a statement.
struct Statement;

impl Visit for Statement {
    fn record_str(&mut self, field: &Field, text: &str) {
        if field.name() == "db.statement"
            && let Some(heard) = heard().as_mut()
        {
            heard.push(text.trim().to_owned());
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}
