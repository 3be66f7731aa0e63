//! The transaction that a handler shares with its record. The layer puts it among the extensions of the request, see
//! [`handshake`](crate::handshake).

use std::{
    fmt,
    future::Future,
    ops::{Deref, DerefMut},
};

use axum::extract::{FromRequestParts, OptionalFromRequestParts};
use http::request::Parts;
use idempotency_core::{KeyTransaction, PhaseError, TransactionDatabase, TransactionSlot};

use super::NotProtected;
use crate::policy::{ExtractorNeeds, Needs};

/// A database transaction that commits what the handler writes together with the record of its answer: **exactly once**.
///
/// For the storages [`PostgresStorage`](crate::PostgresStorage) (`IdempotentTransaction<Postgres>`) and
/// [`SqliteStorage`](crate::SqliteStorage) (`IdempotentTransaction<Sqlite>`), and handlers whose tables are in the same database. It
/// derefs to the connection of sqlx; a `begin` on it makes a savepoint.
///
#[cfg_attr(feature = "sqlite", doc = "```")]
#[cfg_attr(not(feature = "sqlite"), doc = "```ignore")]
/// use axum::{Json, Router, body::Body, http::{Request, StatusCode}, response::IntoResponse, routing::post};
/// use idempotency_axum::{
///     IdempotencyLayer, IdempotentTransaction, SqliteStorage, idempotency_key,
///     sqlx::{self, Sqlite},
/// };
/// use tower::ServiceExt;
///
/// #[idempotency_key]
/// async fn create_order(mut tx: IdempotentTransaction<Sqlite>) -> Result<(StatusCode, Json<i64>), StatusCode> {
///     let id: i64 = sqlx::query_scalar("INSERT INTO orders DEFAULT VALUES RETURNING id")
///         .fetch_one(&mut *tx)
///         .await
///         .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
///     Ok((StatusCode::CREATED, Json(id)))
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let path = std::env::temp_dir().join(format!("idempotent-transaction-{}.db", std::process::id()));
/// let storage = SqliteStorage::open(&path).await?;
/// storage.migrate().await?;
/// sqlx::query("CREATE TABLE orders (id INTEGER PRIMARY KEY)").execute(storage.pool()).await?;
///
/// let layer = IdempotencyLayer::enforce(storage);
/// let app = layer.check(Router::new().route("/orders", post(create_order)).layer(layer.clone()))?;
/// for _ in 0..2 {
///     let request = Request::post("/orders").header("idempotency-key", "order-1").body(Body::empty())?;
///     let response = app.clone().oneshot(request).await?;
///     assert_eq!(axum::body::to_bytes(response.into_body(), 100).await?, "1");
/// }
/// # std::fs::remove_file(path)?;
/// # Ok(())
/// # }
/// ```
///
/// # What is committed
///
/// | the handler answers | its writes | its answer |
/// |---|---|---|
/// | 2xx or 3xx | committed | recorded, whatever [`store_on`](crate::Config::store_on) says |
/// | another status that is stored | undone | recorded |
/// | another status | undone | not recorded: a retry runs |
/// | any status, after [`keep_writes`](Self::keep_writes) | committed | recorded |
/// | with [`DoNotRecord`](crate::DoNotRecord) | undone | not recorded |
/// | a panic, or an error of the service | undone | a tombstone where 500 is stored, else nothing |
/// | 2xx, though a statement of PostgreSQL failed unnoticed | undone | replaced by a 500, not recorded |
///
/// The client gets its answer after the commit. One that streams is read to its end before, within
/// [`max_response_body`](crate::Config::max_response_body); beyond that, the writes are committed with a tombstone before the head goes
/// out. If the commit meets another transaction, or fails, the answer is a 503 with `Retry-After`, and nothing is kept.
///
/// # Time and connections
///
/// There is no lease: the open transaction is the claim. It is open from before the handler to the commit, at most
/// [`max_transaction`](crate::PostgresStorage::max_transaction); then the handler is dropped, the transaction rolled back, and the answer is a
/// 503. A duplicate waits in memory and holds no connection. Open transactions take at most half of the pool. SQLite has one writer, so
/// such a handler must be short there.
///
/// Such a handler never runs unprotected, also with [`OnStorageError::RunUnprotected`](crate::OnStorageError::RunUnprotected): where the
/// storage fails the answer is a 503.
///
/// # What not to do
///
/// | the handler | what happens |
/// |---|---|
/// | drops it early | nothing: the answer decides |
/// | takes it twice | the second extractor answers 500, and nothing is committed |
/// | sends `COMMIT` itself | a tombstone stays, the answer is a 500: retries get a conflict, and never a second order |
/// | sends `ROLLBACK` itself | the same; what it wrote after that is its own |
/// | leaks it, or moves it into a task | a 500; PostgreSQL ends the connection and rolls back; on SQLite others get 503 until it is given back |
pub struct IdempotentTransaction<DB: TransactionDatabase>(KeyTransaction<DB>);

impl<DB: TransactionDatabase> IdempotentTransaction<DB> {
    /// The last recovery point that this operation has reached, in this attempt or in one before; `None` if it is at its start.
    #[must_use]
    pub fn recovery_point(&self) -> Option<&str> {
        self.0.recovery_point()
    }

    /// Commits what was written so far, together with `point`, and opens the next phase.
    ///
    /// # Errors
    ///
    /// As [`between`](Self::between).
    pub async fn advance(&mut self, point: &str) -> Result<(), PhaseError> {
        self.0.advance(point).await
    }

    /// Commits what was written so far, together with `point`, waits for `work` outside of any transaction, and opens the next phase.
    ///
    /// For a call to another service, a payment provider say. Meanwhile the key has a claim with a lease, which is renewed, so nobody
    /// else runs it. If the process dies, a retry finds `point` by [`recovery_point`](Self::recovery_point) and makes the call again:
    /// give it a stable key, [`IdempotencyKey::derive`](crate::IdempotencyKey::derive).
    ///
    #[cfg_attr(feature = "sqlite", doc = "```no_run")]
    #[cfg_attr(not(feature = "sqlite"), doc = "```ignore")]
    /// use axum::http::StatusCode;
    /// use idempotency_axum::{
    ///     IdempotencyKey, IdempotentTransaction, idempotency_key,
    ///     sqlx::{self, Sqlite},
    /// };
    /// # async fn charge(key: String) -> Result<String, std::io::Error> { Ok(key) }
    /// # fn failed(_: impl std::error::Error) -> StatusCode { StatusCode::INTERNAL_SERVER_ERROR }
    ///
    /// #[idempotency_key]
    /// async fn pay(key: IdempotencyKey, mut tx: IdempotentTransaction<Sqlite>) -> Result<StatusCode, StatusCode> {
    ///     if tx.recovery_point().is_none() {
    ///         sqlx::query("INSERT INTO payments (state) VALUES ('pending')")
    ///             .execute(&mut *tx)
    ///             .await
    ///             .map_err(failed)?;
    ///     }
    ///     let charge = charge(key.derive("charge"));
    ///     let receipt = tx.between("created", charge).await.map_err(failed)?.map_err(failed)?;
    ///     sqlx::query("UPDATE payments SET state = 'paid', receipt = ?")
    ///         .bind(receipt)
    ///         .execute(&mut *tx)
    ///         .await
    ///         .map_err(failed)?;
    ///     Ok(StatusCode::CREATED)
    /// }
    /// # let _ = pay;
    /// ```
    ///
    /// # Errors
    ///
    /// If the database fails, or the claim was lost meanwhile. End the handler with an error then: nothing can be written through this
    /// any more.
    pub async fn between<T>(
        &mut self,
        point: &str,
        work: impl Future<Output = T>,
    ) -> Result<T, PhaseError> {
        self.0.between(point, work).await
    }

    /// Commits what this handler writes, and records its answer, whatever its status is.
    pub fn keep_writes(&mut self) {
        self.0.keep_writes();
    }
}

impl<DB: TransactionDatabase> Deref for IdempotentTransaction<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        &self.0
    }
}

impl<DB: TransactionDatabase> DerefMut for IdempotentTransaction<DB> {
    fn deref_mut(&mut self) -> &mut DB::Connection {
        &mut self.0
    }
}

impl<DB: TransactionDatabase> fmt::Debug for IdempotentTransaction<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IdempotentTransaction")
            .field(&self.0)
            .finish()
    }
}

impl<S: Sync, DB: TransactionDatabase> FromRequestParts<S> for IdempotentTransaction<DB> {
    type Rejection = NotProtected;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, NotProtected> {
        let transaction = take(parts)?;
        transaction.ok_or_else(|| NotProtected::new("IdempotentTransaction", parts))
    }
}

impl<S: Sync, DB: TransactionDatabase> OptionalFromRequestParts<S> for IdempotentTransaction<DB> {
    type Rejection = NotProtected;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Option<Self>, NotProtected> {
        take(parts)
    }
}

/// The transaction of this request; `None` if it has none.
fn take<DB: TransactionDatabase>(
    parts: &Parts,
) -> Result<Option<IdempotentTransaction<DB>>, NotProtected> {
    let Some(slot) = parts.extensions.get::<TransactionSlot>() else {
        return Ok(None);
    };
    match slot.take() {
        Ok(transaction) => Ok(Some(IdempotentTransaction(transaction))),
        Err(error) => Err(NotProtected {
            not_lent: Some(error),
            ..NotProtected::new("IdempotentTransaction", parts)
        }),
    }
}

impl<DB: TransactionDatabase> ExtractorNeeds for IdempotentTransaction<DB> {
    const NEEDS: Needs = Needs::transaction(DB::NAME);
}
