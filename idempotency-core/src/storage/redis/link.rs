//! One connection, used by all, with a time limit for every command.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use redis::{Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value};

use super::{connection::Connection, scripts::Script};
use crate::{Env, StorageError, StorageErrorKind};

/// After so many commands in a row that got no answer the connection is taken for dead, and replaced: a network that swallows
/// what is sent tells nobody.
const UNANSWERED: u32 = 3;

/// A connection and the time limit of what is asked through it; clones share the connection.
#[derive(Clone)]
pub(super) struct Link {
    connection: Arc<dyn Connection>,
    /// `std`'s lock, because sections are short and never await.
    silence: Arc<Mutex<Silence>>,
    pub(super) limit: Duration,
    pub(super) env: Env,
}

/// How many commands in a row got no answer from the connection of this age.
#[derive(Default)]
struct Silence {
    age: u64,
    unanswered: u32,
}

/// Whether a command may be sent again to a connection that was lost before its answer came.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Repeatable {
    /// The second answer says what the first would have said.
    Yes,
    /// The second answer could be about what the first did.
    No,
}

impl Link {
    pub(super) fn new(connection: impl Connection, limit: Duration) -> Self {
        Self {
            connection: Arc::new(connection),
            silence: Arc::default(),
            limit,
            env: Env::system(),
        }
    }

    /// The answer to `command`, within the time limit.
    pub(super) async fn ask(
        &self,
        command: &Cmd,
        repeatable: Repeatable,
    ) -> Result<Value, StorageError> {
        self.within_limit(self.send(command, repeatable), Dropped::Unanswered)
            .await
            .map_err(|failure| failure.into_error())
    }

    /// The answer of `script`, within the time limit. Redis may have forgotten it, and is then told again.
    pub(super) async fn run(
        &self,
        script: &Script,
        key: &str,
        arguments: &[&[u8]],
        repeatable: Repeatable,
    ) -> Result<i64, StorageError> {
        let calls = self.call(script, key, arguments, repeatable);
        integer(self.within_limit(calls, Dropped::Unanswered).await)
    }

    /// The same for a script that only looks, on behalf of many. Such calls are dropped together, which says nothing of Redis.
    pub(super) async fn look(&self, script: &Script, key: &str) -> Result<i64, StorageError> {
        let calls = self.call(script, key, &[], Repeatable::Yes);
        integer(self.within_limit(calls, Dropped::Unasked).await)
    }

    /// Tells Redis of the scripts before they are needed. Where that fails it is told when they are.
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
    ) -> RedisResult<Value> {
        let known = script_command("EVALSHA", &script.hash, key, arguments);
        match self.send(&known, repeatable).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let whole = script_command("EVAL", &script.code, key, arguments);
                self.send(&whole, repeatable).await
            }
            answer => answer,
        }
    }

    async fn send(&self, command: &Cmd, repeatable: Repeatable) -> RedisResult<Value> {
        match self.connection.send(command).await {
            Err(error) if may_be_repeated(&error, repeatable) => {
                // The connection is made anew meanwhile.
                self.connection.send(command).await
            }
            answer => answer,
        }
    }

    async fn within_limit<T>(
        &self,
        work: impl Future<Output = RedisResult<T>>,
        dropped: Dropped,
    ) -> Result<T, Failure> {
        let mut question = Question {
            link: self,
            age: self.connection.age(),
            is_unanswered: dropped == Dropped::Unanswered,
        };
        let Some(answer) = self.env.within(self.limit, work).await else {
            question.is_unanswered = true;
            return Err(Failure::Timeout);
        };
        question.is_unanswered = false;
        if answer.as_ref().map_or_else(|e| !e.is_io_error(), |_| true) {
            self.silence().unanswered = 0;
        }
        answer.map_err(Failure::Redis)
    }

    /// How often the connection was made that commands are sent through now.
    pub(super) fn age(&self) -> u64 {
        self.connection.age()
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn silence(&self) -> MutexGuard<'_, Silence> {
        self.silence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What it means that a call is dropped before it has come to an end.
#[derive(Clone, Copy, PartialEq)]
enum Dropped {
    /// Somebody's limit, shorter than ours, was over.
    Unanswered,
    /// Nothing.
    Unasked,
}

/// A command that was sent when the connection was of this age.
struct Question<'a> {
    link: &'a Link,
    age: u64,
    is_unanswered: bool,
}

impl Drop for Question<'_> {
    fn drop(&mut self) {
        if !self.is_unanswered {
            return;
        }
        let mut silence = self.link.silence();
        if self.age < silence.age {
            return;
        }
        if self.age > silence.age {
            let age = self.age;
            *silence = Silence { age, unanswered: 0 };
        }
        silence.unanswered += 1;
        if silence.unanswered >= UNANSWERED {
            self.link.connection.discard(self.age);
        }
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

enum Failure {
    Timeout,
    Redis(RedisError),
}

impl Failure {
    fn into_error(self) -> StorageError {
        match self {
            Self::Timeout => StorageError::timeout(),
            Self::Redis(error) => error_of(error),
        }
    }
}

pub(super) fn error_of(error: RedisError) -> StorageError {
    let kind = match error.code() {
        Some("WRONGTYPE") => StorageErrorKind::Unreadable,
        Some("OOM") => StorageErrorKind::Full,
        _ if error.is_timeout() => StorageErrorKind::Timeout,
        _ => StorageErrorKind::Unavailable,
    };
    StorageError::new(kind, error)
}

pub(super) fn unexpected() -> StorageError {
    StorageError::unavailable("the server's answer is not of the kind that Redis gives")
}

/// The bytes of an answer, if it has any.
pub(crate) fn bytes_of(answer: Value) -> Result<Option<Bytes>, StorageError> {
    match answer {
        Value::Nil => Ok(None),
        Value::BulkString(bytes) => Ok(Some(bytes.into())),
        // What a proxy between may make of it.
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
