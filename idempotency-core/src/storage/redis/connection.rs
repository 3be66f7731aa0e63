//! Connections for commands: the user's, or one of ours that reconnects.
//!
//! The driver's `ConnectionManager` reconnects too, to one server. But it keeps a connection to a master that has become a replica,
//! one that went silent, a login that was refused, and a connect whose runtime ended. [`Reconnecting`] gives all of these up, and
//! serves every kind of server.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
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

/// The pauses after attempts to connect that failed. The last one keeps those who need a connection from trying without a pause.
const PAUSES: [Duration; 3] = [
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(100),
];

/// How old a connection to a replica is at least when it is given up: where only a replica is to be found, it is asked for no more
/// often than that.
const REPLICA: Duration = Duration::from_secs(1);

/// After so many commands in a row without an answer a connection is given up, and commands go through a new one: a network that
/// drops packets reports no error.
const UNANSWERED: u32 = 3;

/// How long a connection that was given up stays open for the commands that were sent through it. A large record may take longer
/// than a command's time limit; if it were cut off each time, it would never be stored.
const LAST_ANSWER: Duration = Duration::from_secs(30);

/// How many connections that were given up stay open. With as many, the network makes no progress; another one is closed at once.
const GIVEN_UP: usize = 3;

/// A connection that many callers share.
pub(super) trait Connection: Send + Sync + 'static {
    /// The answer to `command`. What the server refuses is an error. A call that is dropped when it has had `patience` is one
    /// that got no answer.
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
    state: Arc<Mutex<State<M::Connection>>>,
    /// A permit for each connection that was given up and is kept until what was sent through it is answered.
    given_up: Arc<Semaphore>,
}

struct State<C> {
    age: u64,
    live: Option<Live<C>>,
    making: Option<Making<C>>,
    /// How many attempts there were.
    attempts: u64,
}

struct Live<C> {
    connection: C,
    since: Duration,
    /// How many commands in a row got no answer.
    unanswered: u32,
    /// Closed when the runtime that drives the connection has ended.
    runtime: Weak<()>,
    /// Dropped when the connection is given up, which is what its runtime waits for.
    _end: oneshot::Sender<()>,
}

/// One attempt to connect, which all callers share. It goes on when the callers that began it have run out of time.
struct Making<C> {
    number: u64,
    since: Duration,
    outcome: Awaited<C>,
}

type Awaited<C> = Shared<BoxFuture<'static, RedisResult<(u64, C)>>>;

impl<M: Maker> Reconnecting<M> {
    pub(super) fn new(maker: M, env: Env) -> Self {
        Self {
            maker: Arc::new(maker),
            env,
            state: Arc::new(Mutex::new(State {
                age: 0,
                live: None,
                making: None,
                attempts: 0,
            })),
            given_up: Arc::new(Semaphore::new(GIVEN_UP)),
        }
    }

    /// The connection, and its age.
    pub(super) async fn connected(&self) -> RedisResult<(u64, M::Connection)> {
        let outcome = {
            let now = self.env.now();
            let mut state = lock(&self.state);
            if let Some(live) = &state.live {
                if live.runtime.strong_count() > 0 {
                    return Ok((state.age, live.connection.clone()));
                }
                state.live = None;
            }
            let under_way = state
                .making
                .as_ref()
                .filter(|making| making.is_under_way(now));
            match under_way.map(|making| making.outcome.clone()) {
                Some(outcome) => outcome,
                None => self.make(state, now)?,
            }
        };
        outcome.await
    }

    /// Begins to connect, in a task, so that it needs no caller to go on.
    fn make(
        &self,
        mut state: MutexGuard<'_, State<M::Connection>>,
        now: Duration,
    ) -> RedisResult<Awaited<M::Connection>> {
        let Some(spawner) = self.env.spawner() else {
            return Err(gone("there is no tokio runtime to connect on"));
        };
        let (tell, told) = oneshot::channel();
        let told = told.map(|told| told.unwrap_or_else(|_| Err(gone("the tokio runtime ended"))));
        let outcome = told.boxed().shared();
        state.attempts += 1;
        let number = state.attempts;
        state.making = Some(Making {
            number,
            since: now,
            outcome: outcome.clone(),
        });
        // A runtime that shuts down drops the task at once.
        drop(state);
        let (maker, env, state) = (self.maker.clone(), self.env.clone(), self.state.clone());
        let given_up = self.given_up.clone();
        spawner.spawn(async move {
            let made = env.within(MAKING, attempts(&*maker, &env)).await;
            let made = made.unwrap_or_else(|| Err(gone("it takes too long to connect")));
            drop(maker);
            let runtime = Arc::new(());
            let (end, ended) = oneshot::channel();
            let mut kept = made.as_ref().ok().cloned();
            let made = {
                let mut state = lock(&state);
                match state.making.take_if(|now| now.number == number) {
                    Some(_) => made.map(|connection| {
                        state.age += 1;
                        state.live = Some(Live {
                            connection: connection.clone(),
                            since: env.now(),
                            unanswered: 0,
                            runtime: Arc::downgrade(&runtime),
                            _end: end,
                        });
                        (state.age, connection)
                    }),
                    None => Err(gone("another attempt to connect took its place")),
                }
            };
            // It would keep alive what it waits for.
            drop(state);
            kept.take_if(|_| made.is_err());
            // Perhaps nobody waits for it any more.
            let _ = tell.send(made);
            if let Some(connection) = kept {
                // That it is dropped is what is waited for: the connection was given up, or the runtime ends.
                let _ = ended.await;
                last_answer(connection, &given_up, &env).await;
            }
            drop(runtime);
        });
        Ok(outcome)
    }

    /// Sends a command by `ask`, and notes whether the connection answered.
    async fn answer<'a>(
        &self,
        patience: Duration,
        ask: impl Fn(M::Connection) -> BoxFuture<'a, RedisResult<Value>>,
    ) -> RedisResult<Value> {
        let mut may_be_replica = true;
        loop {
            let (age, connection) = self.connected().await?;
            let mut question = Question {
                connection: self,
                age,
                since: self.env.now(),
                patience,
                is_answered: false,
            };
            let answer = ask(connection).await;
            question.is_answered = true;
            drop(question);
            let Err(error) = &answer else {
                self.answered(age);
                return answer;
            };
            if !error.is_io_error() {
                self.answered(age);
            }
            if may_be_replica && is_of_a_replica(error) && self.discard_replica(age) {
                // It did nothing, so the new master, if there is one to be found, may do it.
                may_be_replica = false;
                continue;
            }
            // The driver means to go on where the kernel gave a connection up (`TimedOut`, `HostUnreachable`).
            if error.is_io_error() || error.is_unrecoverable_error() {
                self.discard(age);
            }
            return answer;
        }
    }

    /// The answer to `command` from a node to which its slot is just being moved.
    pub(super) async fn send_asking(
        &self,
        command: &Cmd,
        patience: Duration,
    ) -> RedisResult<Value> {
        let mut both = redis::pipe();
        both.cmd("ASKING").ignore().add_command(command.clone());
        let both = &both;
        let ask = |mut connection: M::Connection| {
            async move {
                // What the driver makes of a pipeline's errors has neither code nor detail.
                let answers = connection.req_packed_commands(both, 0, 2).await?;
                let mut answers = answers.into_iter().map(Value::extract_error);
                let asked = answers.next().unwrap_or(Ok(Value::Nil));
                let answer = answers.next().unwrap_or(Ok(Value::Nil));
                // What was done counts, and otherwise what went wrong first.
                answer.or_else(|error| asked.and(Err(error)))
            }
            .boxed()
        };
        self.answer(patience, ask).await
    }

    /// The connection of this `age` has answered.
    fn answered(&self, age: u64) {
        let mut state = lock(&self.state);
        if state.age == age
            && let Some(live) = &mut state.live
        {
            live.unanswered = 0;
        }
    }

    /// The connection of this `age` has not answered.
    fn unanswered(&self, age: u64) {
        let mut state = lock(&self.state);
        if state.age != age {
            return;
        }
        state.live.take_if(|live| {
            live.unanswered += 1;
            live.unanswered >= UNANSWERED
        });
    }

    /// Gives up the connection of this `age`: the next command gets another one.
    fn discard(&self, age: u64) {
        let mut state = lock(&self.state);
        if state.age == age {
            state.live = None;
        }
    }

    /// Says whether the connection of this age led to a replica for long enough to be given up.
    fn discard_replica(&self, age: u64) -> bool {
        let now = self.env.now();
        let mut state = lock(&self.state);
        let is_old = state
            .live
            .as_ref()
            .is_none_or(|live| now.saturating_sub(live.since) >= REPLICA);
        if state.age == age && is_old {
            state.live = None;
        }
        state.age != age || is_old
    }
}

impl<M: Maker> Connection for Reconnecting<M> {
    fn send<'a>(
        &'a self,
        command: &'a Cmd,
        patience: Duration,
    ) -> BoxFuture<'a, RedisResult<Value>> {
        let ask = move |mut connection: M::Connection| {
            async move {
                let answer = connection.req_packed_command(command).await;
                answer.and_then(Value::extract_error)
            }
            .boxed()
        };
        self.answer(patience, ask).boxed()
    }

    fn age(&self) -> u64 {
        lock(&self.state).age
    }
}

/// A command that was sent over the connection of this age.
struct Question<'a, M: Maker> {
    connection: &'a Reconnecting<M>,
    age: u64,
    since: Duration,
    patience: Duration,
    is_answered: bool,
}

impl<M: Maker> Drop for Question<'_, M> {
    fn drop(&mut self) {
        if self.is_answered {
            return;
        }
        let waited = self.connection.env.now().saturating_sub(self.since);
        if waited >= self.patience {
            self.connection.unanswered(self.age);
        }
    }
}

impl<C: Clone> Making<C> {
    /// What has ended without a connection is not waited for again, nor what stands on a runtime that nobody runs.
    fn is_under_way(&self, now: Duration) -> bool {
        self.outcome.peek().is_none() && now.saturating_sub(self.since) < MAKING
    }
}

/// Keeps a connection that was given up until all that was sent through it has been answered.
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
            // A password that is refused, say: that does not change so soon.
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

/// Nothing under this lock panics, so a poisoned one is whole.
fn lock<C>(state: &Mutex<State<C>>) -> MutexGuard<'_, State<C>> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A master that has become a replica keeps its connections, and refuses what changes something.
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
    async fn what_the_kernel_gave_up_is_not_asked_again() {
        let connection = Reconnecting::new(Cut, Env::system());
        let ping = redis::cmd("PING");
        for age in 1..=2 {
            let sent = connection.send(&ping, Duration::ZERO).await;
            assert!(sent.is_err_and(|error| error.is_timeout()));
            assert_eq!(connection.age(), age);
        }
    }

    /// As calls that look on behalf of others are.
    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_dropped_early_says_nothing_of_its_connection() {
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
