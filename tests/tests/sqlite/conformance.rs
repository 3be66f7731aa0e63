//! The public suite, on a clock that is moved and on the machine's.

use std::time::Duration;

use idempotency_axum::{
    EncodedKey, Env, SimulatedClock, SqliteStorage, conformance_tests, sqlx,
    storage::conformance::Harness,
};
use idempotency_tests::sqlite::SqliteFile;

mod simulated_clock {
    use super::*;

    conformance_tests!(Moved::new());
}

struct Moved {
    file: SqliteFile,
    env: Env,
    clock: SimulatedClock,
}

impl Moved {
    fn new() -> Self {
        let (env, clock) = Env::simulated(7);
        let file = SqliteFile::new();
        Self { file, env, clock }
    }
}

impl Harness for Moved {
    type Storage = SqliteStorage;

    async fn storage(&self) -> SqliteStorage {
        self.file.open().await.env(self.env.clone())
    }

    async fn advance(&self, by: Duration) {
        // Calls that are under way go as far as they can first.
        tokio::time::sleep(Duration::from_millis(20)).await;
        self.clock.advance(by);
    }

    async fn corrupt(&self, storage: &SqliteStorage, key: &EncodedKey) -> bool {
        corrupt(storage, key).await
    }
}

mod the_machines_clock {
    use super::*;

    conformance_tests!(Real(SqliteFile::new()));
}

struct Real(SqliteFile);

impl Harness for Real {
    type Storage = SqliteStorage;

    async fn storage(&self) -> SqliteStorage {
        self.0.open().await
    }

    async fn advance(&self, by: Duration) {
        tokio::time::sleep(by).await;
    }

    /// No rule may lose five of them, however busy the machine is.
    fn unit(&self) -> Duration {
        Duration::from_millis(200)
    }

    async fn corrupt(&self, storage: &SqliteStorage, key: &EncodedKey) -> bool {
        corrupt(storage, key).await
    }
}

async fn corrupt(storage: &SqliteStorage, key: &EncodedKey) -> bool {
    let damaged =
        sqlx::query("UPDATE idempotency SET value = CAST('a session' AS BLOB) WHERE key = ?")
            .bind(&key.as_bytes()[..])
            .execute(storage.pool());
    damaged.await.unwrap().rows_affected() == 1
}
