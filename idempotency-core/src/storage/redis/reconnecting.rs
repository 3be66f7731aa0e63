//! Connections for commands: the user's, or one of ours that reconnects.
//!
//! The driver's `ConnectionManager` reconnects too, to one server. But it keeps a connection to a master that has become a replica,
//! one that went silent, a login that was refused, and a connect whose runtime ended. [`Reconnecting`] gives all of these up, and
//! serves every kind of server.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{BoxFuture, Shared},
};
use redis::{Cmd, ErrorKind, RedisError, RedisResult, ServerErrorKind, Value, aio::ConnectionLike};
use tokio::sync::{Semaphore, oneshot};

use super::maker::Maker;
use crate::Env;

/// Time limit of a reconnect. Its maker has shorter limits of its own.
const MAKING: Duration = Duration::from_secs(30);

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
pub(super) struct Own<C>(pub(super) C);

impl<C> Connection for Own<C>
where
    C: ConnectionLike + Clone + Send + Sync + 'static,
{
    fn send<'a>(&'a self, command: &'a Cmd, _: Duration) -> BoxFuture<'a, RedisResult<Value>> {
        let mut connection = self.0.clone();
        Box::pin(async move {
            let answer = connection.req_packed_command(command).await;
            answer.and_then(Value::extract_error)
        })
    }
}

/// A connection that is made for the first command, and again when it is lost.
pub(super) struct Reconnecting<M: Maker> {
    maker: Arc<M>,
    env: Env,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State<M::Connection>>,
    /// A permit for each connection that was given up and stays open until its commands are answered.
    given_up: Arc<Semaphore>,
}

struct State<C> {
    /// How many attempts to connect there were.
    age: u64,
    attempt: Option<Attempt<C>>,
}

/// One attempt to connect, which all callers share. It goes on when the callers that began it have run out of time.
struct Attempt<C> {
    since: Duration,
    outcome: Outcome<C>,
}

type Outcome<C> = Shared<BoxFuture<'static, RedisResult<Arc<Live<C>>>>>;

struct Live<C> {
    connection: C,
    age: u64,
    since: Duration,
    /// How many commands in a row got no answer.
    unanswered: AtomicU32,
    /// Closed when the runtime that drives the connection has ended.
    runtime: Weak<()>,
    /// Dropped when the connection is given up, which is what its task waits for.
    _end: oneshot::Sender<()>,
}

impl<M: Maker> Reconnecting<M> {
    pub(super) fn new(maker: M, env: Env) -> Self {
        Self {
            maker: Arc::new(maker),
            env,
            state: Mutex::new(State {
                age: 0,
                attempt: None,
            }),
            given_up: Arc::new(Semaphore::new(GIVEN_UP)),
        }
    }

    async fn connected(&self) -> RedisResult<Arc<Live<M::Connection>>> {
        let outcome = {
            let mut state = self.state();
            let outcome = state.attempt.as_ref().map(|attempt| &attempt.outcome);
            match outcome.and_then(Shared::peek) {
                Some(Ok(live)) if live.runtime.strong_count() > 0 => return Ok(live.clone()),
                Some(_) => state.attempt = None,
                None => {}
            }
            self.connect(&mut state)?
        };
        outcome.await
    }

    /// Joins the attempt that is under way, or begins one in a task, which goes on without callers.
    fn connect(&self, state: &mut State<M::Connection>) -> RedisResult<Outcome<M::Connection>> {
        let now = self.env.now();
        if let Some(attempt) = &state.attempt
            // Older ones don't count: their runtime may stand still.
            && now.saturating_sub(attempt.since) < MAKING
        {
            return Ok(attempt.outcome.clone());
        }
        let Some(spawner) = self.env.spawner() else {
            return Err(gone("there is no tokio runtime to connect on"));
        };
        let (tell, told) = oneshot::channel();
        let told = told.map(|told| told.unwrap_or_else(|_| Err(gone("the tokio runtime ended"))));
        let outcome = told.boxed().shared();
        state.age += 1;
        state.attempt = Some(Attempt {
            since: now,
            outcome: outcome.clone(),
        });
        let age = state.age;
        let (maker, env) = (self.maker.clone(), self.env.clone());
        let given_up = self.given_up.clone();
        // A runtime that shuts down drops the task at once.
        spawner.spawn(async move {
            let made = env.within(MAKING, attempts(&*maker, &env)).await;
            let made = made.unwrap_or_else(|| Err(gone("it takes too long to connect")));
            drop(maker);
            let kept = made.as_ref().ok().cloned();
            let runtime = Arc::new(());
            let (end, ended) = oneshot::channel();
            // Perhaps nobody waits for it any more.
            let _ = tell.send(made.map(|connection| {
                Arc::new(Live {
                    connection,
                    age,
                    since: env.now(),
                    unanswered: AtomicU32::new(0),
                    runtime: Arc::downgrade(&runtime),
                    _end: end,
                })
            }));
            if let Some(connection) = kept {
                let _ = ended.await;
                last_answer(connection, &given_up, &env).await;
            }
            drop(runtime);
        });
        Ok(outcome)
    }

    /// The answer to `command`, with `ASKING` before it from a node to which its slot is just being moved.
    pub(super) async fn answer(
        &self,
        command: &Cmd,
        is_asking: bool,
        patience: Duration,
    ) -> RedisResult<Value> {
        let mut may_be_replica = true;
        loop {
            let live = self.connected().await?;
            let mut question = Question {
                connection: self,
                live: &live,
                // Most calls have no patience, and need no clock.
                until: (!patience.is_zero()).then(|| self.env.now().saturating_add(patience)),
                is_answered: false,
            };
            let mut connection = live.connection.clone();
            let answer = match is_asking {
                false => connection.req_packed_command(command).await,
                true => Box::pin(ask(connection, command)).await,
            };
            let answer = answer.and_then(Value::extract_error);
            question.is_answered = true;
            let error = match answer {
                Err(error) => error,
                answer => {
                    live.answered();
                    return answer;
                }
            };
            if !error.is_io_error() {
                live.answered();
            }
            if may_be_replica && is_of_a_replica(&error) && self.discard_replica(&live) {
                // The replica refused the command, so it can be sent to the new master.
                may_be_replica = false;
                continue;
            }
            // The driver keeps a connection that the kernel has given up (`TimedOut`, `HostUnreachable`).
            if error.is_io_error() || error.is_unrecoverable_error() {
                self.discard(&live);
            }
            return Err(error);
        }
    }

    /// Gives up a connection: the next command gets another one.
    fn discard(&self, live: &Live<M::Connection>) {
        let mut state = self.state();
        if state.age == live.age {
            state.attempt = None;
        }
    }

    /// Gives up a connection to a replica if it is old enough. Returns whether the next command gets another one.
    fn discard_replica(&self, live: &Live<M::Connection>) -> bool {
        if self.env.now().saturating_sub(live.since) >= REPLICA {
            self.discard(live);
        }
        let state = self.state();
        state.age != live.age || state.attempt.is_none()
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn state(&self) -> MutexGuard<'_, State<M::Connection>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C> Live<C> {
    fn answered(&self) {
        // Mostly it is zero, and reading shares its cache line.
        if self.unanswered.load(Relaxed) > 0 {
            self.unanswered.store(0, Relaxed);
        }
    }
}

impl<M: Maker> Connection for Reconnecting<M> {
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

/// A command that was sent. Dropped without an answer, it counts as unanswered.
struct Question<'a, M: Maker> {
    connection: &'a Reconnecting<M>,
    live: &'a Live<M::Connection>,
    /// A command that is dropped earlier does not count.
    until: Option<Duration>,
    is_answered: bool,
}

impl<M: Maker> Drop for Question<'_, M> {
    fn drop(&mut self) {
        let Self {
            connection, live, ..
        } = self;
        if self.is_answered || self.until.is_some_and(|until| connection.env.now() < until) {
            return;
        }
        if live.unanswered.fetch_add(1, Relaxed) + 1 >= UNANSWERED {
            connection.discard(live);
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

async fn attempts<M: Maker>(maker: &M, env: &Env) -> RedisResult<M::Connection> {
    let mut failure = None;
    for pause in PAUSES {
        match maker.make().await {
            Ok(connection) => return Ok(connection),
            // A refused password, for example: another attempt would not help.
            Err(error) if !error.is_io_error() => {
                env.sleep(PAUSES[2]).await;
                return Err(error);
            }
            Err(error) => failure = Some(error),
        }
        env.sleep(pause).await;
    }
    Err(failure.unwrap_or_else(|| gone("there was no attempt to connect")))
}

/// A master that has become a replica keeps its connections and refuses writes.
fn is_of_a_replica(error: &RedisError) -> bool {
    use ServerErrorKind::{MasterDown, ReadOnly};

    [ReadOnly, MasterDown]
        .map(ErrorKind::Server)
        .contains(&error.kind())
}

/// The error of a command that was not sent.
pub(super) fn gone(what: &'static str) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::ConnectionRefused, what).into()
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use redis::{Pipeline, RedisFuture};

    use super::*;

    /// Makes connections that never answer, and counts those that are open: each has a clone.
    #[derive(Clone)]
    struct Silent(#[expect(dead_code, reason = "its clones are counted")] Arc<()>);

    impl Maker for Silent {
        type Connection = Self;

        async fn make(&self) -> RedisResult<Self> {
            Ok(self.clone())
        }
    }

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
        let connection = Reconnecting::new(Silent(open.clone()), env.clone());
        // Without the maker's and this one.
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

    /// Makes connections that the kernel gives up when something is sent.
    #[derive(Clone)]
    struct Cut;

    impl Maker for Cut {
        type Connection = Self;

        async fn make(&self) -> RedisResult<Self> {
            Ok(Self)
        }
    }

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
        let connection = Reconnecting::new(Cut, Env::system());
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
        let connection = Reconnecting::new(Silent(Arc::default()), env.clone());
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
