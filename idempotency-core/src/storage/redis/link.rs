//! Sends commands, each under a time limit.

use std::{fmt, sync::Arc, time::Duration};

use bytes::Bytes;
use redis::{Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value};

use super::{reconnecting::Connection, scripts::Script};
use crate::{Env, StorageError, StorageErrorKind};

/// The connections of a storage, and the time limit of a command; clones share them.
#[derive(Clone)]
pub(super) struct Link {
    connection: Arc<dyn Connection>,
    /// For calls on the background runtime, because the other connection stops with the runtime that made it. `None` if the user
    /// made the connection.
    background: Option<Arc<dyn Connection>>,
    pub(super) limit: Duration,
    pub(super) env: Env,
}

/// Whether a command may be sent again to a connection that was lost before its answer came.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Repeatable {
    /// The second answer is the same as the first.
    Yes,
    /// The second answer may differ because the first attempt succeeded.
    No,
}

impl Link {
    /// Through one connection, wherever it is called.
    pub(super) fn new(connection: impl Connection, limit: Duration) -> Self {
        Self {
            connection: Arc::new(connection),
            background: None,
            limit,
            env: Env::system(),
        }
    }

    /// With a connection of its own for what is called in the background.
    pub(super) fn with_background(self, connection: impl Connection) -> Self {
        Self {
            background: Some(Arc::new(connection)),
            ..self
        }
    }

    /// The connection for calls from here.
    fn connection(&self) -> &dyn Connection {
        match &self.background {
            Some(background) if Env::in_background() => &**background,
            _ => &*self.connection,
        }
    }

    /// The answer to `command`, within the time limit.
    pub(super) async fn ask(
        &self,
        command: &Cmd,
        repeatable: Repeatable,
    ) -> Result<Value, StorageError> {
        let answer = self.try_ask(command, repeatable).await;
        answer.map_err(Failure::into_error)
    }

    /// The same, with a failure that says whether Redis refused to write.
    pub(super) async fn try_ask(
        &self,
        command: &Cmd,
        repeatable: Repeatable,
    ) -> Result<Value, Failure> {
        self.within_limit(self.send(command, repeatable, Duration::ZERO))
            .await
    }

    /// The answer of `script`, within the time limit. If Redis has lost the script, it is loaded again.
    pub(super) async fn run(
        &self,
        script: &Script,
        key: &str,
        arguments: &[&[u8]],
        repeatable: Repeatable,
    ) -> Result<i64, StorageError> {
        let calls = self.call(script, key, arguments, repeatable, Duration::ZERO);
        integer(self.within_limit(calls).await)
    }

    /// The same for a script that only reads, on behalf of waiters. Such a call is dropped when its waiter leaves, so it counts as
    /// unanswered only after half the time limit.
    pub(super) async fn look(&self, script: &Script, key: &str) -> Result<i64, StorageError> {
        let calls = self.call(script, key, &[], Repeatable::Yes, self.limit / 2);
        integer(self.within_limit(calls).await)
    }

    /// Loads the scripts before they are needed. If that fails they are loaded on first use.
    pub(super) async fn load(&self, scripts: &[&Script]) {
        for script in scripts {
            let mut command = redis::cmd("SCRIPT");
            command.arg("LOAD").arg(&script.code);
            if self.ask(&command, Repeatable::Yes).await.is_err() {
                return;
            }
        }
    }

    async fn call(
        &self,
        script: &Script,
        key: &str,
        arguments: &[&[u8]],
        repeatable: Repeatable,
        patience: Duration,
    ) -> RedisResult<Value> {
        let known = script_command("EVALSHA", &script.hash, key, arguments);
        match self.send(&known, repeatable, patience).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let whole = script_command("EVAL", &script.code, key, arguments);
                Box::pin(self.send(&whole, repeatable, patience)).await
            }
            answer => answer,
        }
    }

    async fn send(
        &self,
        command: &Cmd,
        repeatable: Repeatable,
        patience: Duration,
    ) -> RedisResult<Value> {
        let connection = self.connection();
        match connection.send(command, patience).await {
            Err(error) if may_be_repeated(&error, repeatable) => {
                // This call reconnects.
                connection.send(command, patience).await
            }
            answer => answer,
        }
    }

    async fn within_limit<T>(
        &self,
        work: impl Future<Output = RedisResult<T>>,
    ) -> Result<T, Failure> {
        match self.env.within(self.limit, work).await {
            Some(answer) => answer.map_err(Failure::Redis),
            None => Err(Failure::Timeout),
        }
    }

    /// How often the connection that serves calls from here was made.
    pub(super) fn age(&self) -> u64 {
        self.connection().age()
    }
}

fn integer(answer: Result<Value, Failure>) -> Result<i64, StorageError> {
    match answer {
        Ok(Value::Int(answer)) => Ok(answer),
        Ok(_) => Err(unexpected()),
        Err(failure) => Err(failure.into_error()),
    }
}

fn script_command(name: &str, script: &str, key: &str, arguments: &[&[u8]]) -> Cmd {
    let mut command = redis::cmd(name);
    command.arg(script).arg(1).arg(key);
    for argument in arguments {
        command.arg(*argument);
    }
    command
}

fn may_be_repeated(error: &RedisError, repeatable: Repeatable) -> bool {
    // Nothing was sent.
    error.is_connection_refusal() || (repeatable == Repeatable::Yes && error.is_io_error())
}

/// Why there is no answer.
pub(super) enum Failure {
    Timeout,
    Redis(RedisError),
}

impl Failure {
    /// Whether the server refuses writes but may still serve reads: it has no memory, no disk or too few replicas, or the user has no
    /// right to write. A replica does not count, because its answers may be stale.
    pub(super) fn is_refusal(&self) -> bool {
        use ServerErrorKind::{MasterDown, ReadOnly};

        match self {
            Self::Redis(error) => match error.kind() {
                ErrorKind::Server(kind) => ![ReadOnly, MasterDown].contains(&kind),
                ErrorKind::Extension => true,
                _ => false,
            },
            Self::Timeout => false,
        }
    }

    pub(super) fn into_error(self) -> StorageError {
        match self {
            Self::Timeout => StorageError::timeout(),
            Self::Redis(error) => match error.code() {
                Some("WRONGTYPE") => StorageError::unreadable(error),
                Some("OOM") => StorageError::new(StorageErrorKind::Full, NoMemory(error)),
                _ if error.is_timeout() => StorageError::new(StorageErrorKind::Timeout, error),
                _ => StorageError::unavailable(error),
            },
        }
    }
}

/// `maxmemory` is reached, and nothing may be evicted.
#[derive(Debug)]
struct NoMemory(RedisError);

impl fmt::Display for NoMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Redis has no memory left for it: raise `maxmemory` of Redis")
    }
}

impl std::error::Error for NoMemory {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0)
    }
}

pub(super) fn unexpected() -> StorageError {
    StorageError::unavailable("the server's answer is of a type that Redis does not return here")
}

/// The bytes of an answer, if it has any.
pub(crate) fn bytes_of(answer: Value) -> Result<Option<Bytes>, StorageError> {
    match answer {
        Value::Nil => Ok(None),
        Value::BulkString(bytes) => Ok(Some(bytes.into())),
        // A proxy may convert it.
        Value::VerbatimString { text, .. } | Value::SimpleString(text) => {
            Ok(Some(text.into_bytes().into()))
        }
        _ => Err(unexpected()),
    }
}

/// A duration as Redis counts: whole milliseconds, at least one, at most a hundred years, so that no sum of it and the time of
/// day is too large.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    const LONGEST: u128 = 100 * 366 * 24 * 3600 * 1000;
    let rounded_up = duration.as_nanos().div_ceil(1_000_000);
    u64::try_from(rounded_up.clamp(1, LONGEST)).unwrap_or(u64::MAX)
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_rounded_up_and_bounded() {
        for (duration, expected) in [
            (Duration::ZERO, 1),
            (Duration::from_nanos(1), 1),
            (Duration::from_micros(1_001), 2),
            (Duration::from_secs(30), 30_000),
            (Duration::MAX, 3_162_240_000_000),
        ] {
            assert_eq!(milliseconds(duration), expected, "{duration:?}");
        }
    }
}
