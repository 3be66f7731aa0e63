//! A SQLite file in a directory of its own, deleted when it is dropped.

use std::{
    fs,
    path::{Path, PathBuf},
};

use idempotency_axum::{
    SqliteStorage,
    sqlx::{
        self, Connection as _, SqliteConnection,
        sqlite::{SqliteConnectOptions, SqlitePool},
    },
};

use crate::{PATIENCE, redis::directory};

/// A file for a [`SqliteStorage`]. It does not exist before it is opened.
#[derive(Debug)]
pub struct SqliteFile(PathBuf);

impl SqliteFile {
    /// In a new directory.
    #[must_use]
    pub fn new() -> Self {
        Self(directory("sqlite"))
    }

    /// Its directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.0
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.0.join("orders.db")
    }

    /// The same as a URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("sqlite:{}", self.path().display())
    }

    /// A storage with its table, which waits as long as a busy machine needs.
    ///
    /// # Panics
    ///
    /// Panics if it can't be opened.
    pub async fn open(&self) -> SqliteStorage {
        let storage = SqliteStorage::open(self.path()).await.expect("a file");
        let storage = storage.time_limit(PATIENCE);
        storage.migrate().await.expect("a table");
        storage
    }

    /// Options for connections of the test's own.
    #[must_use]
    pub fn options(&self) -> SqliteConnectOptions {
        let options = SqliteConnectOptions::new().filename(self.path());
        options.busy_timeout(PATIENCE / 2)
    }

    /// A connection of the test's own.
    ///
    /// # Panics
    ///
    /// Panics if it can't be opened.
    pub async fn connection(&self) -> SqliteConnection {
        let connection = SqliteConnection::connect_with(&self.options()).await;
        connection.expect("a connection")
    }

    /// Runs statements, and returns how many rows they changed.
    ///
    /// # Panics
    ///
    /// Panics if they fail.
    pub async fn execute(&self, sql: &str) -> u64 {
        let pool = SqlitePool::connect_lazy_with(self.options());
        let done = sqlx::raw_sql(sql).execute(&pool).await;
        pool.close().await;
        done.expect("a statement").rows_affected()
    }

    /// The number that a query returns.
    ///
    /// # Panics
    ///
    /// Panics if it fails.
    pub async fn number(&self, sql: &str) -> i64 {
        let mut connection = self.connection().await;
        let number = sqlx::query_scalar(sql).fetch_one(&mut connection).await;
        number.expect("a number")
    }
}

impl Default for SqliteFile {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SqliteFile {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
