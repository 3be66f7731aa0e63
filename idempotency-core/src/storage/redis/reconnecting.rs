//! Connections for commands: the user's, or one of ours that reconnects.
//!
//! The driver's `ConnectionManager` reconnects too, to one server. But it keeps a connection to a master that has become a replica,
//! one that went silent, a login that was refused, and a connect whose runtime ended. [`Reconnecting`] gives all of these up, and
//! serves every kind of server.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use redis::{
    Client, Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value,
    aio::{ConnectionLike, MultiplexedConnection},
};
use tokio::sync::{Semaphore, oneshot};

use super::connector::{self, gone, outcome_of};
use crate::Env;

/// Time limit of a reconnect. A single attempt has shorter limits of its own.
const CONNECTING: Duration = Duration::from_secs(30);

/// The pauses after failed attempts to connect. The one after the last attempt keeps callers from retrying in a tight loop.
const PAUSES: [Duration; 3] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(100),
];

/// A connection to a replica is replaced at this age at the earliest: if there is no master, reconnecting more often is of no use.
const REPLICA: Duration = Duration::from_secs(1);

/// After so many commands in a row without an answer a connection is given up, and commands go through a new one: a network that
/// drops packets reports no error.
const UNANSWERED: u32 = 3;

/// How long a connection that was given up stays open for the commands that were sent through it. A large record may take longer
/// than a command's time limit; if it were cut off each time, it would never be stored.
const LAST_ANSWER: Duration = Duration::from_secs(30);

/// How many connections that were given up stay open; more are closed at once, because the network makes no progress.
const GIVEN_UP: usize = 3;

/// A connection that many callers share.
pub(super) trait Connection: Send + Sync + 'static {
    /// The answer to `command`. An error reply is an error. If the call is dropped after `patience` or later, the command counts as
    /// unanswered.
    fn send<'a>(
        &'a self,
        command: &'a Cmd,
        patience: Duration,
    ) -> BoxFuture<'a, RedisResult<Value>>;

    /// How often it was made.
    fn age(&self) -> u64 {
        0
    }
}

/// A connection of the user's, whose clones share it. It reconnects by itself, or not at all.
impl<C> Connection for C
where
    C: ConnectionLike + Clone + Send + Sync + 'static,
{
    fn send<'a>(&'a self, command: &'a Cmd, _: Duration) -> BoxFuture<'a, RedisResult<Value>> {
        let mut connection = self.clone();
        Box::pin(async move {
            let answer = connection.req_packed_command(command).await;
            answer.and_then(Value::extract_error)
        })
    }
}

/// A connection that is made for the first command, and again when it is lost. Clones of `C` share one connection.
pub(super) struct Reconnecting<C = MultiplexedConnection> {
    /// Opens a connection that leads to the same records as every other.
    connect: Arc<Connect<C>>,
    env: Env,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State<C>>,
    /// A permit for each connection that was given up and stays open until its commands are answered.
    given_up: Arc<Semaphore>,
}

type Connect<C> = dyn Fn() -> BoxFuture<'static, RedisResult<C>> + Send + Sync;

struct State<C> {
    /// How many attempts to connect there were.
    age: u64,
    /// When the last one began.
    since: Duration,
    outcome: Option<Outcome<C>>,
}

/// An attempt to connect, which all callers share. It goes on when the callers that began it have run out of time.
type Outcome<C> = Shared<BoxFuture<'static, RedisResult<Arc<Live<C>>>>>;

struct Live<C> {
    connection: C,
    age: u64,
    since: Duration,
    /// How many commands in a row got no answer.
    unanswered: AtomicU32,
    /// A task on the runtime that drives the connection waits for its drop. It is closed when that runtime has ended.
    end: oneshot::Sender<()>,
}

impl Reconnecting {
    /// A connection to one server. An attempt to connect may take as long as `limit`.
    pub(super) fn to(server: Client, limit: Duration, env: Env) -> Self {
        let connect = move || connector::connect(server.clone(), limit).boxed();
        Self::new(Arc::new(connect), env)
    }
}

impl<C: ConnectionLike + Clone + Send + Sync + 'static> Reconnecting<C> {
    /// A connection that `connect` opens.
    pub(super) fn new(connect: Arc<Connect<C>>, env: Env) -> Self {
        Self {
            connect,
            env,
            state: Mutex::new(State {
                age: 0,
                since: Duration::ZERO,
                outcome: None,
            }),
            given_up: Arc::new(Semaphore::new(GIVEN_UP)),
        }
    }

    /// Another connection to the same server, for another runtime.
    pub(super) fn apart(&self) -> Self {
        Self::new(self.connect.clone(), self.env.clone())
    }

    /// The connection itself, which may be given up later.
    pub(super) async fn connection(&self) -> RedisResult<C> {
        Ok(self.connected().await?.connection.clone())
    }

    async fn connected(&self) -> RedisResult<Arc<Live<C>>> {
        let outcome = {
            let mut state = self.state();
            match state.outcome.as_ref().and_then(Shared::peek) {
                Some(Ok(live)) if !live.end.is_closed() => return Ok(live.clone()),
                Some(_) => state.outcome = None,
                None => {}
            }
            self.connect(&mut state)
        };
        outcome.await
    }

    /// Joins the attempt that is under way, or begins one in a task, which goes on without callers.
    fn connect(&self, state: &mut State<C>) -> Outcome<C> {
        let now = self.env.now();
        if let Some(outcome) = &state.outcome
            // Older ones don't count: their runtime may stand still.
            && now.saturating_sub(state.since) < CONNECTING
        {
            return outcome.clone();
        }
        let (connect, env) = (self.connect.clone(), self.env.clone());
        let given_up = self.given_up.clone();
        let age = state.age + 1;
        let connects = async move {
            let connected = env.within(CONNECTING, attempts(&*connect, &env)).await;
            let connection = connected.ok_or_else(|| gone("it takes too long to connect"))??;
            let (end, ended) = oneshot::channel();
            let live = Live {
                connection: connection.clone(),
                age,
                since: env.now(),
                unanswered: AtomicU32::new(0),
                end,
            };
            if let Some(spawner) = env.spawner() {
                spawner.spawn(async move {
                    let _ = ended.await;
                    last_answer(connection, &given_up, &env).await;
                });
            }
            Ok(Arc::new(live))
        };
        let outcome = outcome_of(connects, self.env.spawner()).boxed().shared();
        *state = State {
            age,
            since: now,
            outcome: Some(outcome.clone()),
        };
        outcome
    }

    /// The answer to `command`, with `ASKING` before it from a node to which its slot is just being moved.
    pub(super) async fn answer(
        &self,
        command: &Cmd,
        is_asking: bool,
        patience: Duration,
    ) -> RedisResult<Value> {
        loop {
            let live = self.connected().await?;
            let counts_from = match patience {
                // Most calls have no patience, and need no clock.
                Duration::ZERO => Duration::ZERO,
                patience => self.env.now().saturating_add(patience),
            };
            let question = Question::new(|| {
                if self.env.now() >= counts_from
                    && live.unanswered.fetch_add(1, Relaxed) + 1 >= UNANSWERED
                {
                    self.discard(&live, Duration::ZERO);
                }
            });
            let mut connection = live.connection.clone();
            let answer = match is_asking {
                false => connection.req_packed_command(command).await,
                true => Box::pin(ask(connection, command)).await,
            };
            let answer = answer.and_then(Value::extract_error);
            question.answered();
            if let Err(error) = &answer
                // The driver keeps a connection that the kernel has given up (`TimedOut`, `HostUnreachable`).
                && (error.is_io_error() || error.is_unrecoverable_error())
            {
                self.discard(&live, Duration::ZERO);
                return answer;
            }
            // Mostly it is zero, and reading shares its cache line.
            if live.unanswered.load(Relaxed) > 0 {
                live.unanswered.store(0, Relaxed);
            }
            match answer {
                // The replica refused the command, so it can be sent to the new master. If that one refuses it too, its connection
                // is younger.
                Err(error) if is_of_a_replica(&error) && self.discard(&live, REPLICA) => {}
                answer => return answer,
            }
        }
    }

    /// Gives up a connection of at least this age. Returns whether the next command gets another one.
    fn discard(&self, live: &Live<C>, age: Duration) -> bool {
        let mut state = self.state();
        let is_current = state.age == live.age;
        if is_current && self.env.now().saturating_sub(live.since) >= age {
            state.outcome = None;
        }
        !is_current || state.outcome.is_none()
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn state(&self) -> MutexGuard<'_, State<C>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C: ConnectionLike + Clone + Send + Sync + 'static> Connection for Reconnecting<C> {
    fn send<'a>(
        &'a self,
        command: &'a Cmd,
        patience: Duration,
    ) -> BoxFuture<'a, RedisResult<Value>> {
        Box::pin(self.answer(command, false, patience))
    }

    fn age(&self) -> u64 {
        self.state().age
    }
}

/// A command that was sent. If it is dropped without an answer, it calls a function.
pub(super) struct Question<F: Fn()>(Option<F>);

impl<F: Fn()> Question<F> {
    pub(super) fn new(unanswered: F) -> Self {
        Self(Some(unanswered))
    }

    pub(super) fn answered(mut self) {
        self.0 = None;
    }
}

impl<F: Fn()> Drop for Question<F> {
    fn drop(&mut self) {
        if let Some(unanswered) = &self.0 {
            unanswered();
        }
    }
}

/// The answer to `command` after `ASKING`.
async fn ask(mut connection: impl ConnectionLike, command: &Cmd) -> RedisResult<Value> {
    let mut both = redis::pipe();
    both.cmd("ASKING").ignore().add_command(command.clone());
    // The driver's error of a pipeline has neither code nor detail.
    let answers = connection.req_packed_commands(&both, 0, 2).await?;
    let mut answers = answers.into_iter().map(Value::extract_error);
    let asked = answers.next().unwrap_or(Ok(Value::Nil));
    let answer = answers.next().unwrap_or(Ok(Value::Nil));
    // The command may have succeeded all the same; otherwise the first error counts.
    answer.or_else(|error| asked.and(Err(error)))
}

/// Keeps a connection that was given up until all its commands are answered.
async fn last_answer(mut connection: impl ConnectionLike, given_up: &Semaphore, env: &Env) {
    let Ok(_permit) = given_up.try_acquire() else {
        return;
    };
    // Answers come in the order of the commands, whatever the answer to the last one is.
    let ping = redis::cmd("PING");
    let _ = env
        .within(LAST_ANSWER, connection.req_packed_command(&ping))
        .await;
}

async fn attempts<C>(connect: &Connect<C>, env: &Env) -> RedisResult<C> {
    let mut failure = gone("there was no attempt to connect");
    for pause in PAUSES {
        match connect().await {
            Ok(connection) => return Ok(connection),
            // A refused password, for example: another attempt would not help.
            Err(error) if !error.is_io_error() => {
                env.sleep(PAUSES[2]).await;
                return Err(error);
            }
            Err(error) => failure = error,
        }
        env.sleep(pause).await;
    }
    Err(failure)
}

/// A master that has become a replica keeps its connections and refuses writes.
pub(super) fn is_of_a_replica(error: &RedisError) -> bool {
    use ServerErrorKind::{MasterDown, ReadOnly};

    matches!(error.kind(), ErrorKind::Server(MasterDown | ReadOnly))
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use redis::{Pipeline, RedisFuture};

    use super::*;

    /// Every connection is a clone of `connection`.
    fn over<C>(connection: C, env: Env) -> Reconnecting<C>
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        let connect = move || ready(Ok(connection.clone())).boxed();
        Reconnecting::new(Arc::new(connect), env)
    }

    /// Connections that never answer, which count those that are open: each has a clone.
    #[derive(Clone)]
    struct Silent(#[expect(dead_code, reason = "its clones are counted")] Arc<()>);

    impl ConnectionLike for Silent {
        fn req_packed_command<'a>(&'a mut self, _: &'a Cmd) -> RedisFuture<'a, Value> {
            pending().boxed()
        }

        fn req_packed_commands<'a>(
            &'a mut self,
            _: &'a Pipeline,
            _: usize,
            _: usize,
        ) -> RedisFuture<'a, Vec<Value>> {
            pending().boxed()
        }

        fn get_db(&self) -> i64 {
            0
        }
    }

    #[tokio::test(start_paused = true)]
    async fn few_connections_that_were_given_up_stay_open_and_not_for_long() {
        let open = Arc::new(());
        let env = Env::system();
        let connection = over(Silent(open.clone()), env.clone());
        // Without the one that is cloned and this one.
        let count = || Arc::strong_count(&open) - 2;
        let ping = redis::cmd("PING");
        let given_up = async |times: u32| {
            for _ in 0..times * UNANSWERED {
                let sent = connection.send(&ping, Duration::ZERO);
                assert!(env.within(Duration::from_millis(1), sent).await.is_none());
            }
        };
        given_up(1).await;
        // The next command has a new one.
        given_up(1).await;
        assert_eq!(connection.age(), 2);
        assert_eq!(count(), 2);
        given_up(10).await;
        // Their tasks have their turn.
        env.sleep(Duration::from_millis(1)).await;
        assert_eq!(connection.age(), 12);
        assert_eq!(count(), GIVEN_UP);

        env.sleep(2 * LAST_ANSWER).await;
        assert_eq!(count(), 0);
    }

    /// Connections that the kernel gives up when something is sent.
    #[derive(Clone)]
    struct Cut;

    impl ConnectionLike for Cut {
        fn req_packed_command<'a>(&'a mut self, _: &'a Cmd) -> RedisFuture<'a, Value> {
            async { Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()) }.boxed()
        }

        fn req_packed_commands<'a>(
            &'a mut self,
            _: &'a Pipeline,
            _: usize,
            _: usize,
        ) -> RedisFuture<'a, Vec<Value>> {
            pending().boxed()
        }

        fn get_db(&self) -> i64 {
            0
        }
    }

    #[tokio::test]
    async fn a_connection_that_the_kernel_gave_up_is_replaced() {
        let connection = over(Cut, Env::system());
        let ping = redis::cmd("PING");
        for age in 1..=2 {
            let sent = connection.send(&ping, Duration::ZERO).await;
            assert!(sent.is_err_and(|error| error.is_timeout()));
            assert_eq!(connection.age(), age);
        }
    }

    /// A poll is dropped when its waiter leaves.
    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_dropped_early_is_not_unanswered() {
        let env = Env::system();
        let connection = over(Silent(Arc::default()), env.clone());
        let ping = redis::cmd("PING");
        for _ in 0..10 {
            let sent = connection.send(&ping, Duration::from_secs(1));
            assert!(env.within(Duration::from_millis(999), sent).await.is_none());
        }
        assert_eq!(connection.age(), 1);
        for _ in 0..UNANSWERED {
            let sent = connection.send(&ping, Duration::from_secs(1));
            assert!(env.within(Duration::from_secs(1), sent).await.is_none());
        }
        let sent = connection.send(&ping, Duration::from_secs(1));
        assert!(env.within(Duration::from_millis(1), sent).await.is_none());
        assert_eq!(connection.age(), 2);
    }
}
