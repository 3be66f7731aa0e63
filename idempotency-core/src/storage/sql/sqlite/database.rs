//! The connections of a storage: one that writes, some that read, and one of the open [transaction](super::transaction).
//!
//! Tasks on the [background runtime](crate::Env::background) own the connections and take jobs from two queues. So no runtime of the
//! program that stands still or ends holds a connection, or a lock of the database. A job is one statement. A caller that
//! is dropped leaves nothing half done: its job is skipped, or runs to its end.
//!
//! Writes that wait together are committed together, with one `fsync` for all. For each batch the writer takes its [turn](super::turn).

use std::{
    borrow::Cow,
    fmt, mem,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::{BoxFuture, Either, pending, select};
use sqlx::{
    Connection as _, Sqlite, SqliteConnection,
    query::Query,
    sqlite::{SqliteArguments, SqliteConnectOptions, SqliteRow, SqliteSynchronous},
};
use tokio::sync::{
    mpsc::{self, UnboundedReceiver, UnboundedSender},
    oneshot,
};

use super::{
    error::{self, SqliteStorageError, SqliteStorageErrorKind},
    holds::Wake,
    turn::{Turn, Turns},
};
use crate::Env;

/// How many connections read. Each has a thread, and answers most reads from memory.
const READERS: usize = 4;

/// How many writes are committed together at most, so that the first of them does not wait for a crowd.
const BATCH: usize = 64;

/// How long SQLite waits for a lock by itself. Then the deadline is checked.
const SLICE: Duration = Duration::from_millis(50);

/// Between two tries where SQLite does not wait: when it opens the file, or recovers it.
const PAUSE: Duration = Duration::from_millis(5);

/// How long a statement is tried again that finds the file locked.
pub(super) struct Patience {
    since: Duration,
    limit: Duration,
    /// Counted too: where the clock is paused, no time passes while SQLite waits.
    tries: u128,
}

impl Patience {
    pub(super) fn new(since: Duration, limit: Duration) -> Self {
        let tries = limit.as_millis() / SLICE.as_millis();
        Self {
            since,
            limit,
            tries,
        }
    }

    pub(super) fn time_left(&self) -> Duration {
        let waited = Env::system().now().saturating_sub(self.since);
        self.limit.saturating_sub(waited)
    }

    /// Before the next try. Says whether there is to be one.
    pub(super) async fn pause(&mut self) -> bool {
        if self.tries == 0 || self.time_left().is_zero() {
            return false;
        }
        self.tries -= 1;
        Env::system().sleep(PAUSE).await;
        true
    }
}

/// Access to one file; clones share the connections.
#[derive(Clone)]
pub(super) struct Database {
    reads: Arc<Lane>,
    writes: Arc<Lane>,
    pub(super) turns: Turns,
    /// How long a statement may take.
    pub(super) limit: Duration,
}

impl Database {
    pub(super) fn new(options: SqliteConnectOptions, limit: Duration) -> Self {
        // A claim is a promise, so each is on the disk before it is made, whatever the user's connections do.
        let options = options
            .busy_timeout(SLICE)
            .synchronous(SqliteSynchronous::Full);
        let turns = Turns::new(options.clone());
        let (of_reads, of_writes, their_turns) = (options.clone(), options, turns.clone());
        Self {
            reads: Arc::new(Lane::new(move |jobs| serve_reads(&of_reads, jobs))),
            writes: Arc::new(Lane::new(move |jobs| {
                serve_writes(of_writes.clone(), their_turns.clone(), jobs)
            })),
            turns,
            limit,
        }
    }

    /// The rows of a statement that does not write.
    pub(super) async fn read(
        &self,
        statement: Statement,
    ) -> Result<Vec<SqliteRow>, SqliteStorageError> {
        self.run(&self.reads, statement, None).await
    }

    /// The rows of a statement that may write; it is committed.
    pub(super) async fn write(
        &self,
        statement: Statement,
    ) -> Result<Vec<SqliteRow>, SqliteStorageError> {
        self.run(&self.writes, statement, None).await
    }

    /// The same; if it returns a row, waiters are woken, also if this future is dropped.
    pub(super) async fn write_and_wake(
        &self,
        statement: Statement,
        wake: Wake,
    ) -> Result<Vec<SqliteRow>, SqliteStorageError> {
        self.run(&self.writes, statement, Some(wake)).await
    }

    /// Closes all connections, once nobody uses them.
    pub(super) async fn close(&self, limit: Duration) -> Result<(), SqliteStorageError> {
        let closed = Env::system().within(limit, self.turns.close()).await;
        closed.ok_or_else(|| SqliteStorageError::new(SqliteStorageErrorKind::Busy))?;
        self.reads.close().await;
        let written = match self.writes.is_open() {
            true => {
                // The last connection that is closed empties the log too, unless another process has the file open.
                let checkpoint = Statement::new("PRAGMA wal_checkpoint(TRUNCATE)");
                self.write(checkpoint).await
            }
            false => Ok(Vec::new()),
        };
        self.writes.close().await;
        written.map(drop)
    }

    async fn run(
        &self,
        lane: &Lane,
        statement: Statement,
        wake: Option<Wake>,
    ) -> Result<Vec<SqliteRow>, SqliteStorageError> {
        let (reply, answer) = oneshot::channel();
        lane.send(Job {
            statement,
            wake,
            since: Env::system().now(),
            limit: self.limit,
            reply,
        })?;
        match answer.await {
            Ok(answer) => answer,
            Err(_) => Err(no_runtime()),
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database")
            .field("limit", &self.limit)
            .finish_non_exhaustive()
    }
}

/// One statement with its values.
#[derive(Clone)]
pub(super) struct Statement {
    sql: Arc<str>,
    values: Vec<Value>,
}

#[derive(Clone)]
enum Value {
    Number(Option<i64>),
    Text(Cow<'static, str>),
    Bytes(Vec<u8>),
}

impl Statement {
    pub(super) fn new(sql: impl Into<Arc<str>>) -> Self {
        Self {
            sql: sql.into(),
            values: Vec::new(),
        }
    }

    #[must_use]
    pub(super) fn number(self, number: impl Into<Option<i64>>) -> Self {
        self.with(Value::Number(number.into()))
    }

    #[must_use]
    pub(super) fn text(self, text: impl Into<Cow<'static, str>>) -> Self {
        self.with(Value::Text(text.into()))
    }

    #[must_use]
    pub(super) fn bytes(self, bytes: impl Into<Vec<u8>>) -> Self {
        self.with(Value::Bytes(bytes.into()))
    }

    fn with(mut self, value: Value) -> Self {
        self.values.push(value);
        self
    }

    pub(super) fn query(&self) -> Query<'_, Sqlite, SqliteArguments<'_>> {
        let query = sqlx::query(&self.sql);
        self.values.iter().fold(query, |query, value| match value {
            Value::Number(number) => query.bind(*number),
            Value::Text(text) => query.bind(&**text),
            Value::Bytes(bytes) => query.bind(&bytes[..]),
        })
    }
}

/// A statement, and the caller that waits for its rows.
struct Job {
    statement: Statement,
    wake: Option<Wake>,
    since: Duration,
    limit: Duration,
    reply: oneshot::Sender<Result<Vec<SqliteRow>, SqliteStorageError>>,
}

impl Job {
    /// What is left of its time limit.
    fn time_left(&self) -> Duration {
        let waited = Env::system().now().saturating_sub(self.since);
        self.limit.saturating_sub(waited)
    }

    /// Whether its time limit is over.
    fn is_late(&self) -> bool {
        self.time_left().is_zero()
    }

    /// The job, if there is time left for it and its caller still waits.
    fn unless_late(self) -> Option<Self> {
        if self.reply.is_closed() {
            return None;
        }
        if self.is_late() {
            self.answer(Err(SqliteStorageError::new(SqliteStorageErrorKind::Busy)));
            return None;
        }
        Some(self)
    }

    fn answer(self, answer: Result<Vec<SqliteRow>, SqliteStorageError>) {
        if let (Ok(rows), Some(wake)) = (&answer, self.wake)
            && !rows.is_empty()
        {
            wake.wake();
        }
        // The caller may have been dropped.
        let _ = self.reply.send(answer);
    }
}

/// Makes the tasks that serve a queue.
type Serve = Box<dyn Fn(UnboundedReceiver<Job>) -> Vec<BoxFuture<'static, ()>> + Send + Sync>;

/// A queue of jobs, and the tasks that serve it.
struct Lane {
    serve: Serve,
    /// `std`'s lock, because no section awaits.
    queue: Mutex<Queue>,
}

enum Queue {
    /// Not used yet.
    Idle,
    Open {
        jobs: UnboundedSender<Job>,
        /// Ends when all tasks have.
        ended: mpsc::Receiver<()>,
    },
    Closed,
}

impl Lane {
    fn new(
        serve: impl Fn(UnboundedReceiver<Job>) -> Vec<BoxFuture<'static, ()>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            serve: Box::new(serve),
            queue: Mutex::new(Queue::Idle),
        }
    }

    /// Queues a job. Starts the tasks if they were not started, or their runtime has ended.
    fn send(&self, job: Job) -> Result<(), SqliteStorageError> {
        let mut queue = self.lock();
        let job = match &*queue {
            Queue::Idle => job,
            Queue::Open { jobs, .. } => match jobs.send(job) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::SendError(job)) => job,
            },
            Queue::Closed => return Err(closed()),
        };
        let Some(spawner) = Env::system().background() else {
            return Err(no_runtime());
        };
        let (sender, jobs) = mpsc::unbounded_channel();
        let (running, ended) = mpsc::channel(1);
        for task in (self.serve)(jobs) {
            let running = running.clone();
            spawner.spawn(Box::pin(async move {
                task.await;
                drop(running);
            }));
        }
        // The receiver is in the task.
        let _ = sender.send(job);
        *queue = Queue::Open {
            jobs: sender,
            ended,
        };
        Ok(())
    }

    /// Takes no more jobs. Returns when those that were queued are done, and the connections are closed.
    async fn close(&self) {
        let queue = mem::replace(&mut *self.lock(), Queue::Closed);
        if let Queue::Open { jobs, mut ended } = queue {
            drop(jobs);
            let _ = ended.recv().await;
        }
    }

    fn is_open(&self) -> bool {
        matches!(*self.lock(), Queue::Open { .. })
    }

    /// Nothing panics while it is locked.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn closed() -> SqliteStorageError {
    SqliteStorageError::other("the storage was closed: open another one")
}

/// The background runtime could not be started, and the one that stood in for it has ended.
fn no_runtime() -> SqliteStorageError {
    SqliteStorageError::other("there is no tokio runtime that drives the connection")
}

fn serve_reads(
    options: &SqliteConnectOptions,
    jobs: UnboundedReceiver<Job>,
) -> Vec<BoxFuture<'static, ()>> {
    // Whoever is idle waits for the next job with this lock.
    let jobs = Arc::new(tokio::sync::Mutex::new(jobs));
    let reader = || {
        let (jobs, mut link) = (jobs.clone(), Link::new(options.clone()));
        async move {
            loop {
                let next = jobs.lock().await.recv().await;
                let Some(job) = next else {
                    return link.close().await;
                };
                link.serve(job).await;
            }
        }
    };
    (0..READERS).map(|_| Box::pin(reader()) as _).collect()
}

fn serve_writes(
    options: SqliteConnectOptions,
    turns: Turns,
    mut jobs: UnboundedReceiver<Job>,
) -> Vec<BoxFuture<'static, ()>> {
    let mut link = Link::new(options);
    let writer = async move {
        let mut waiting = Vec::new();
        while !waiting.is_empty() || jobs.recv_many(&mut waiting, BATCH).await > 0 {
            let Some(_turn) = turn_for(&mut waiting, &mut jobs, &turns).await else {
                continue;
            };
            let first = waiting.drain(..waiting.len().min(BATCH));
            let mut batch: Vec<_> = first.filter_map(Job::unless_late).collect();
            if batch.len() > 1 {
                link.commit_together(&mut batch).await;
            }
            for job in batch.drain(..) {
                link.serve(job).await;
            }
        }
        link.close().await;
    };
    vec![Box::pin(writer)]
}

/// Waits for the turn to write, unless all jobs are late before. Takes the jobs that come meanwhile, because they may be late first.
async fn turn_for(
    waiting: &mut Vec<Job>,
    jobs: &mut UnboundedReceiver<Job>,
    turns: &Turns,
) -> Option<Turn> {
    if let Some(turn) = turns.free() {
        return Some(turn);
    }
    let mut turn = pin!(turns.next());
    while let Some(left) = waiting.iter().map(Job::time_left).min() {
        let mut more = Vec::new();
        {
            let next = pin!(async {
                if jobs.recv_many(&mut more, BATCH).await == 0 {
                    // The storage is dropped; there will be no more.
                    pending::<()>().await;
                }
            });
            let change = select(next, Env::system().sleep(left));
            if let Either::Left((turn, _)) = select(turn.as_mut(), change).await {
                return Some(turn);
            }
        }
        waiting.append(&mut more);
        *waiting = waiting.drain(..).filter_map(Job::unless_late).collect();
    }
    None
}

/// One connection, made when it is needed and again after an error.
struct Link {
    options: SqliteConnectOptions,
    connection: Option<SqliteConnection>,
}

impl Link {
    fn new(options: SqliteConnectOptions) -> Self {
        Self {
            options,
            connection: None,
        }
    }

    async fn close(self) {
        if let Some(connection) = self.connection {
            let _ = connection.close().await;
        }
    }

    /// Runs a statement by itself, and answers.
    async fn serve(&mut self, job: Job) {
        if let Some(job) = job.unless_late() {
            let answer = self.run(&job).await;
            job.answer(answer);
        }
    }

    async fn run(&mut self, job: &Job) -> Result<Vec<SqliteRow>, SqliteStorageError> {
        let mut patience = Patience::new(job.since, job.limit);
        loop {
            match self.execute(&job.statement).await {
                Ok(rows) => return Ok(rows),
                Err(busy) if error::is_busy(&busy) => {
                    if !patience.pause().await {
                        return Err(SqliteStorageError::new(SqliteStorageErrorKind::Busy));
                    }
                }
                Err(error) => {
                    self.connection = None;
                    return Err(SqliteStorageError::of(error));
                }
            }
        }
    }

    /// Runs statements in one transaction, and answers them all; or none, if one fails: each is then to run by itself.
    async fn commit_together(&mut self, batch: &mut Vec<Job>) {
        if self
            .execute(&Statement::new("BEGIN IMMEDIATE"))
            .await
            .is_err()
        {
            return;
        }
        match self.execute_all(batch).await {
            Ok(answers) => {
                for (job, rows) in batch.drain(..).zip(answers) {
                    job.answer(Ok(rows));
                }
            }
            Err(_) => {
                // SQLite may have rolled back by itself; it then refuses this. A new connection has no transaction either way.
                if self.execute(&Statement::new("ROLLBACK")).await.is_err() {
                    self.connection = None;
                }
            }
        }
    }

    async fn execute_all(&mut self, batch: &[Job]) -> Result<Vec<Vec<SqliteRow>>, sqlx::Error> {
        let mut answers = Vec::with_capacity(batch.len());
        for job in batch {
            answers.push(self.execute(&job.statement).await?);
        }
        self.execute(&Statement::new("COMMIT")).await?;
        Ok(answers)
    }

    /// Runs a statement to its end. (`fetch_one` would stop at the first row, and hide an error of the commit that follows.)
    async fn execute(&mut self, statement: &Statement) -> Result<Vec<SqliteRow>, sqlx::Error> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(SqliteConnection::connect_with(&self.options).await?),
        };
        statement.query().fetch_all(connection).await
    }
}
