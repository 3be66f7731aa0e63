//! Sends commands, each under a time limit.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt as _;
use redis::{Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value};

use super::{
    reconnecting::{Connection, is_of_a_replica},
    scripts::Script,
};
use crate::{Env, StorageError, StorageErrorKind};

/// The connections of a storage, and the time limit of a command; clones share them.
#[derive(Clone)]
pub(crate) struct Commands {
    connection: Arc<dyn Connection>,
    /// For calls on the background runtime, because the other connection stops with the runtime that made it. A clone if the
    /// user made the connection.
    background: Arc<dyn Connection>,
    pub(crate) limit: Duration,
    pub(crate) env: Env,
}

/// What may happen to a command that gets no answer.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    /// It may be sent again to a new connection: the second answer is the same as the first.
    Repeatable,
    /// It must not be sent again: the second answer may differ because the first attempt succeeded.
    Once,
    /// It only reads, on behalf of waiters, and may be repeated. The call is dropped when its waiter leaves, so it counts as
    /// unanswered only after half the time limit.
    ForWaiters,
}

impl Commands {
    pub(super) fn new(
        connection: impl Connection,
        background: impl Connection,
        limit: Duration,
    ) -> Self {
        Self {
            connection: Arc::new(connection),
            background: Arc::new(background),
            limit,
            env: Env::system(),
        }
    }

    /// The connection for calls from here.
    fn connection(&self) -> &dyn Connection {
        match Env::in_background() {
            true => &*self.background,
            false => &*self.connection,
        }
    }

    /// The answer to `command`, within the time limit.
    pub(crate) async fn ask(&self, command: &Cmd, mode: Mode) -> RedisResult<Value> {
        self.within_limit(self.send(command, mode)).await
    }

    /// The answer of `script`, within the time limit. If Redis has lost the script, it is loaded again.
    pub(super) async fn run(
        &self,
        script: &Script,
        key: &str,
        arguments: &[&[u8]],
        mode: Mode,
    ) -> Result<i64, StorageError> {
        let calls = async {
            let known = script_command("EVALSHA", &script.hash, key, arguments);
            match self.send(&known, mode).await {
                Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                    let whole = script_command("EVAL", &script.code, key, arguments);
                    Box::pin(self.send(&whole, mode)).await
                }
                answer => answer,
            }
        };
        match self.within_limit(calls).await.map_err(storage_error)? {
            Value::Int(answer) => Ok(answer),
            _ => Err(unexpected()),
        }
    }

    async fn send(&self, command: &Cmd, mode: Mode) -> RedisResult<Value> {
        let patience = match mode {
            Mode::ForWaiters => self.limit / 2,
            Mode::Repeatable | Mode::Once => Duration::ZERO,
        };
        let connection = self.connection();
        match connection.send(command, patience).await {
            // Of a refused connection nothing was sent.
            Err(error)
                if error.is_connection_refusal() || (mode != Mode::Once && error.is_io_error()) =>
            {
                // This call reconnects.
                connection.send(command, patience).await
            }
            answer => answer,
        }
    }

    fn within_limit(
        &self,
        work: impl Future<Output = RedisResult<Value>>,
    ) -> impl Future<Output = RedisResult<Value>> {
        let timeout = || Err(io::Error::from(io::ErrorKind::TimedOut).into());
        let answer = self.env.within(self.limit, work);
        answer.map(move |answer| answer.unwrap_or_else(timeout))
    }

    /// How often the connection that serves calls from here was made.
    pub(super) fn age(&self) -> u64 {
        self.connection().age()
    }
}

/// A command of so many words, the first of which is `name`. One allocation is enough for words of `bytes` in sum.
pub(super) fn command(name: &str, words: usize, bytes: usize) -> Cmd {
    let mut command = Cmd::with_capacity(words, name.len() + bytes);
    command.arg(name);
    command
}

fn script_command(name: &str, script: &str, key: &str, arguments: &[&[u8]]) -> Cmd {
    let bytes = arguments
        .iter()
        .map(|argument| argument.len())
        .sum::<usize>();
    let words = 4 + arguments.len();
    let mut command = command(name, words, script.len() + 1 + key.len() + bytes);
    command.arg(script).arg(1).arg(key).arg(arguments);
    command
}

/// Whether the server refuses writes but may still serve reads: it has no memory, no disk or too few replicas, or the user has no
/// right to write. A replica does not count, because its answers may be stale.
pub(super) fn refuses_writes(error: &RedisError) -> bool {
    let is_reply = matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension);
    is_reply && !is_of_a_replica(error)
}

pub(crate) fn storage_error(error: RedisError) -> StorageError {
    match error.code() {
        Some("WRONGTYPE") => StorageError::unreadable(error),
        Some("OOM") => StorageError::new(StorageErrorKind::Full, NoMemory(error)),
        _ if error.is_timeout() => StorageError::new(StorageErrorKind::Timeout, error),
        _ => StorageError::unavailable(error),
    }
}

/// `maxmemory` is reached, and nothing may be evicted.
#[derive(Debug, thiserror::Error)]
#[error("Redis has no memory left for it: raise `maxmemory` of Redis")]
struct NoMemory(#[source] RedisError);

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
