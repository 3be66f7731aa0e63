//! The master that sentinels name.

use std::sync::{Mutex, MutexGuard, PoisonError};

use futures_util::future::BoxFuture;
use redis::{
    Cmd, ErrorKind, RedisResult, ServerErrorKind, Value,
    aio::{ConnectionLike as _, MultiplexedConnection},
    sentinel::SentinelClient,
};

use super::link::{Connection, UNANSWERED, without_limits};

/// A connection to the master, which is asked for anew when the connection is lost or leads to a replica.
pub(super) struct Master {
    /// Asked by one at a time, for all who need to know.
    sentinels: tokio::sync::Mutex<SentinelClient>,
    /// `std`'s lock, because sections are short and never await.
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    connection: Option<MultiplexedConnection>,
    unanswered: u32,
    age: u64,
}

impl Master {
    pub(super) fn new(client: SentinelClient) -> Self {
        Self {
            sentinels: tokio::sync::Mutex::new(client),
            current: Mutex::default(),
        }
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> Option<(u64, MultiplexedConnection)> {
        let current = self.current();
        let connection = current.connection.clone()?;
        Some((current.age, connection))
    }

    async fn connected(&self) -> RedisResult<(u64, MultiplexedConnection)> {
        if let Some(known) = self.known() {
            return Ok(known);
        }
        let mut sentinels = self.sentinels.lock().await;
        // Somebody else may have asked meanwhile.
        if let Some(known) = self.known() {
            return Ok(known);
        }
        let client = sentinels.async_get_client().await?;
        let connection = client
            .get_multiplexed_async_connection_with_config(&without_limits())
            .await?;
        let mut current = self.current();
        current.connection = Some(connection.clone());
        Ok((current.age, connection))
    }
}

impl Current {
    /// The connection of this `age` is of no use any more.
    fn forget(&mut self, age: u64) {
        if self.age == age {
            self.connection = None;
            self.unanswered = 0;
            self.age += 1;
        }
    }
}

impl Connection for Master {
    fn send<'a>(&'a self, command: &'a Cmd) -> BoxFuture<'a, RedisResult<Value>> {
        Box::pin(async move {
            let (age, mut connection) = self.connected().await?;
            let answer = connection.req_packed_command(command).await;
            let answer = answer.and_then(Value::extract_error);
            if let Err(error) = &answer
                && (error.is_unrecoverable_error()
                    || error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly))
            {
                self.current().forget(age);
            }
            answer
        })
    }

    fn age(&self) -> u64 {
        self.current().age
    }

    fn answered(&self) {
        self.current().unanswered = 0;
    }

    fn unanswered(&self, age: u64) {
        let mut current = self.current();
        if current.age == age {
            current.unanswered += 1;
            if current.unanswered >= UNANSWERED {
                current.forget(age);
            }
        }
    }
}
