//! `LISTEN` and `NOTIFY`: how a waiter hears of the end of a claim.
//!
//! A waiter leaves a mark in the row of its key, so that the statement that ends the claim notifies: see
//! [`statements`](super::statements). While somebody waits, and a little longer, the storage listens on a connection of its own. Whether
//! notifications arrive is tried: the storage notifies itself. Behind a proxy that pools transactions that notification does not arrive.

use std::{pin::pin, time::Duration};

use futures_util::future::{BoxFuture, select};
use sqlx::postgres::{PgListener, PgPoolOptions};

use super::{
    error::into_storage_error,
    link::{Link, Value},
    row::{column, milliseconds},
};
use crate::{
    EncodedKey, StorageError,
    storage::waits::{Seen, Silence, Source, WaitTable, Whom},
};

/// How long the connection outlives the last waiter: the next duplicate often comes soon.
const IDLE: Duration = Duration::from_secs(5);

/// How long it may take to connect, and the notification that the storage sends to itself.
const HELLO: Duration = Duration::from_secs(10);

/// What is under a key. If the end of its claim can be heard, the row is marked.
pub(super) async fn look(
    link: &Link,
    key: &EncodedKey,
    is_notified: bool,
) -> Result<Seen, StorageError> {
    let statements = link.statements()?;
    let statement = match is_notified {
        true => &statements.mark,
        false => &statements.look,
    };
    let rows = link.run(statement, &[Value::Bytes(key.as_bytes())]).await?;
    let Some(row) = rows.first() else {
        return Ok(Seen::Free);
    };
    if column(row, "is_completed")? {
        return Ok(Seen::Completed);
    }
    Ok(match column::<Option<i64>>(row, "lease_left")? {
        Some(left) if column(row, "is_marked")? => Seen::Claimed(milliseconds(left)),
        // The claim that was to be marked has just ended, or a transaction holds the key.
        _ => Seen::Unnotified,
    })
}

/// Listens to the notifications of a table.
pub(super) struct Notifications(pub(super) Link);

impl Source for Notifications {
    fn listen<'a>(&'a self, waits: &'a WaitTable) -> BoxFuture<'a, Silence> {
        Box::pin(async {
            self.pass_on(waits).await.unwrap_or_else(|error| {
                tracing::debug!(target: "idempotency", %error, source = ?std::error::Error::source(&error), "no connection to listen on");
                Silence::Lost
            })
        })
    }
}

impl Notifications {
    async fn pass_on(&self, waits: &WaitTable) -> Result<Silence, StorageError> {
        let Self(link) = self;
        let connected = link.env.within(HELLO, self.connect()).await;
        let mut listener = connected.ok_or_else(StorageError::timeout)??;
        let heard = link.env.within(HELLO, self.hear_itself(&mut listener));
        let Some(heard) = heard.await else {
            tracing::warn!(
                target: "idempotency",
                "PostgreSQL's notifications do not arrive, so duplicates look for the answer instead of being told; a proxy that pools transactions is the usual cause: call `.transaction_pooling()`, or connect without it"
            );
            return Ok(Silence::Refused);
        };
        heard?;
        let hears = pin!(async {
            while let Ok(Some(notification)) = listener.try_recv().await {
                match notification.payload().split_once(' ') {
                    Some(("all", name)) => waits.notified(name, Whom::All),
                    Some(("one", name)) => waits.notified(name, Whom::One),
                    _ => {}
                }
            }
            Silence::Lost
        });
        let follows = pin!(async {
            // One channel has the notifications of all keys.
            while let Some((joined, _)) = waits.changes(IDLE).await {
                waits.subscribed(&joined);
            }
            Silence::Deserted
        });
        Ok(select(hears, follows).await.factor_first().0)
    }

    /// A connection of its own: those of the pool are for statements.
    async fn connect(&self) -> Result<PgListener, StorageError> {
        let Self(link) = self;
        let rows = link.run(&link.statements()?.channel, &[]).await?;
        let channel = rows.first().map(|row| column::<String>(row, "?column?"));
        let channel = channel.ok_or_else(lost)??;
        let pool = PgPoolOptions::new()
            .max_connections(1)
            .max_lifetime(None)
            .idle_timeout(None)
            .acquire_timeout(HELLO)
            .connect_lazy_with(link.connect_options());
        let connects = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.eager_reconnect(false);
            listener.listen(&channel).await?;
            Ok(listener)
        };
        connects.await.map_err(into_storage_error)
    }

    /// Returns when a notification has arrived that the storage sent to itself.
    async fn hear_itself(&self, listener: &mut PgListener) -> Result<(), StorageError> {
        let Self(link) = self;
        let mut nonce = [0; 32];
        link.env.fill_random(&mut nonce);
        let hello = format!("hello {}", EncodedKey::from_bytes(nonce));
        link.run(&link.statements()?.hello, &[Value::Bytes(&nonce)])
            .await?;
        loop {
            let heard = listener.try_recv().await.map_err(into_storage_error)?;
            if heard.ok_or_else(lost)?.payload() == hello {
                return Ok(());
            }
        }
    }
}

fn lost() -> StorageError {
    StorageError::unavailable("the connection to listen on is lost")
}
