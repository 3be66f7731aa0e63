//! The master that sentinels name.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use redis::{
    Cmd, ErrorKind, RedisResult, ServerErrorKind, Value,
    aio::{ConnectionLike as _, MultiplexedConnection},
    sentinel::SentinelClient,
};

use super::link::{Connection, without_limits};

/// How long the master may take to let us in, before the sentinels are asked again.
const PATIENCE: Duration = Duration::from_secs(1);

/// A connection to the master, which is asked for anew when the connection is lost or leads to a replica.
pub(super) struct Master {
    sentinels: Arc<tokio::sync::Mutex<SentinelClient>>,
    /// `std`'s lock, because sections are short and never await.
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    connection: Option<MultiplexedConnection>,
    /// Goes on with the next command where the one that began it has run out of time: a sentinel that is silent takes the driver
    /// as long before it asks the next.
    search: Option<Shared<BoxFuture<'static, RedisResult<MultiplexedConnection>>>>,
    age: u64,
}

impl Master {
    pub(super) fn new(client: SentinelClient) -> Self {
        Self {
            sentinels: Arc::new(tokio::sync::Mutex::new(client)),
            current: Mutex::default(),
        }
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn connected(&self) -> RedisResult<(u64, MultiplexedConnection)> {
        let (age, search) = {
            let mut current = self.current();
            if let Some(connection) = &current.connection {
                return Ok((current.age, connection.clone()));
            }
            let search = current.search.get_or_insert_with(|| {
                let search = search(self.sentinels.clone());
                search.boxed().shared()
            });
            let search = search.clone();
            (current.age, search)
        };
        let found = search.clone().await;
        let mut current = self.current();
        if current
            .search
            .as_ref()
            .is_some_and(|now| now.ptr_eq(&search))
        {
            current.search = None;
            current.connection = found.as_ref().ok().cloned();
        }
        Ok((age, found?))
    }
}

async fn search(
    sentinels: Arc<tokio::sync::Mutex<SentinelClient>>,
) -> RedisResult<MultiplexedConnection> {
    let client = sentinels.lock().await.async_get_client().await?;
    // Who is called master may be gone, and the sentinels may know soon.
    let config = without_limits().set_connection_timeout(Some(PATIENCE));
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
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
                self.discard(age);
            }
            answer
        })
    }

    fn age(&self) -> u64 {
        self.current().age
    }

    fn discard(&self, age: u64) {
        let mut current = self.current();
        if current.age == age {
            current.connection = None;
            current.age += 1;
        }
    }
}
