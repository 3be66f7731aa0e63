//! An order service as a process of its own, which can be stopped and killed.

use std::{collections::HashMap, net::SocketAddr, process::Stdio, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, Command},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

use super::server::send_signal;
use crate::{
    PATIENCE,
    client::{Call, assert_replays},
};

/// What a service is told when it starts.
#[derive(Clone, Debug)]
#[must_use]
pub struct Spec {
    binary: &'static str,
    variables: HashMap<&'static str, String>,
}

impl Spec {
    /// A service of this executable, which is the package's `service`, in front of the Redis at `url`.
    pub fn new(binary: &'static str, url: &str) -> Self {
        let variables = HashMap::from([("REDIS_URL", url.to_owned())]);
        Self { binary, variables }
    }

    /// The same in front of the PostgreSQL at `url`, whose table is there.
    pub fn postgres(binary: &'static str, url: &str) -> Self {
        let variables = HashMap::from([("POSTGRES_URL", url.to_owned())]);
        Self { binary, variables }
    }

    /// A service of this executable in front of the SQLite file at `url`.
    pub fn sqlite(binary: &'static str, url: &str) -> Self {
        let variables = HashMap::from([("SQLITE_URL", url.to_owned())]);
        Self { binary, variables }
    }

    /// How long its leases are. Default: 30 s.
    pub fn lease(self, lease: Duration) -> Self {
        self.variable("LEASE_MS", lease.as_millis().to_string())
    }

    /// How long its duplicates wait. Default: 100 ms.
    pub fn wait(self, wait: Duration) -> Self {
        self.variable("WAIT_MS", wait.as_millis().to_string())
    }

    /// Its handlers wait until they are [told to go on](Process::go_on).
    pub fn held(self) -> Self {
        self.variable("HOLD", "1".to_owned())
    }

    /// The shop commits each order together with its record.
    pub fn exactly_once(self) -> Self {
        self.variable("EXACTLY_ONCE", "1".to_owned())
    }

    /// Sets a variable of its environment.
    pub fn variable(mut self, name: &'static str, value: String) -> Self {
        self.variables.insert(name, value);
        self
    }

    /// Starts it, and returns once it listens.
    ///
    /// # Panics
    ///
    /// Panics if it does not get that far.
    pub async fn start(&self) -> Process {
        let mut command = Command::new(self.binary);
        command
            .envs(&self.variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().expect("the service starts");
        let stdin = child.stdin.take().expect("a piped stdin");
        let stdout = child.stdout.take().expect("a piped stdout");
        let said = Arc::new(watch::Sender::new(Vec::new()));
        let saying = said.clone();
        let listener = tokio::spawn(async move {
            let mut lines = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                saying.send_modify(|said| said.push(line));
            }
        });
        let line = until(&said, "listens ", 1).await;
        let address = line.trim_start_matches("listens ").parse();
        Process {
            child,
            stdin,
            said,
            listener,
            address: address.expect("an address"),
        }
    }
}

/// A running service. It is killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    stdin: ChildStdin,
    /// The lines that it has printed.
    said: Arc<watch::Sender<Vec<String>>>,
    /// Ends after the last of them.
    listener: JoinHandle<()>,
    address: SocketAddr,
}

/// Sends 2,000 requests over 50 keys to four services of `spec`: 50 run, all others get the answer of theirs.
///
/// # Panics
///
/// Panics if that is not so.
pub async fn assert_fifty_of_two_thousand_run(spec: &Spec) {
    assert_eq!(runs_of_two_thousand(spec, |_| false).await, 50);
}

/// The same, where clients send a request again that gets a status of which `is_retried` says so. Returns how often a handler ran.
///
/// # Panics
///
/// If a key has not one first answer, or a duplicate another one.
pub async fn runs_of_two_thousand(spec: &Spec, is_retried: fn(u16) -> bool) -> usize {
    let processes = join_all((0..4).map(|_| spec.start())).await;

    let requests = (0..2_000).map(|n| {
        let (process, key) = (&processes[n % 4], format!("key-{}", n / 4 % 50));
        async move {
            loop {
                let answer = process.post("/orders").key(&key).send().await;
                if !is_retried(answer.code()) {
                    return (key, answer);
                }
            }
        }
    });
    let mut firsts = HashMap::new();
    let mut replays = Vec::new();
    for (key, answer) in join_all(requests).await {
        match answer.code() {
            201 => assert!(
                firsts.insert(key, answer.text().to_owned()).is_none(),
                "{answer:?}"
            ),
            _ => replays.push((key, answer)),
        }
    }
    assert_eq!(firsts.len(), 50);
    assert_eq!(replays.len(), 1_950);
    for (key, answer) in &replays {
        assert_replays(answer, &firsts[key]);
    }
    processes.iter().map(|process| process.count("ran ")).sum()
}

impl Process {
    /// `POST path`.
    pub fn post(&self, path: &str) -> Call {
        Call::new(self.address, http::Method::POST, path)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many lines it has printed that begin with `words`: `ran KEY`, `event NAME`.
    #[must_use]
    pub fn count(&self, words: &str) -> usize {
        let said = self.said.borrow();
        said.iter().filter(|line| line.starts_with(words)).count()
    }

    /// Returns the last of `times` lines that begin with `words`, once it has printed them.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn until(&self, words: &str, times: usize) -> String {
        until(&self.said, words, times).await
    }

    /// Lets a handler that is held, or will be, go on.
    ///
    /// # Panics
    ///
    /// Panics if the service is gone.
    pub async fn go_on(&mut self) {
        let told = self.stdin.write_all(b"go\n").await;
        told.expect("a service that listens");
    }

    /// `kill -9`.
    ///
    /// # Panics
    ///
    /// Panics if it can't be killed.
    pub async fn kill(&mut self) {
        self.child.kill().await.expect("the service can be killed");
    }

    /// `kill -9`; returns all lines that it had printed.
    ///
    /// # Panics
    ///
    /// Panics if it can't be killed.
    pub async fn end(&mut self) -> Vec<String> {
        self.kill().await;
        let listened = (&mut self.listener).await;
        listened.expect("no panic");
        self.said.borrow().clone()
    }

    /// Stops it as it stands, for a while.
    ///
    /// # Panics
    ///
    /// Panics if it is gone.
    pub fn pause(&self) {
        send_signal("-STOP", self.child.id().expect("a running service"));
    }

    /// Lets it continue where it was stopped.
    ///
    /// # Panics
    ///
    /// Panics if it is gone.
    pub fn resume(&self) {
        send_signal("-CONT", self.child.id().expect("a running service"));
    }
}

async fn until(said: &watch::Sender<Vec<String>>, words: &str, times: usize) -> String {
    let mut heard = said.subscribe();
    let nth = |said: &Vec<String>| {
        let mut lines = said.iter().filter(|line| line.starts_with(words));
        lines.nth(times - 1).cloned()
    };
    let found = heard.wait_for(|said| nth(said).is_some());
    match timeout(PATIENCE, found).await {
        Ok(Ok(said)) => nth(&said).expect("it was there"),
        _ => panic!("no {times} × {words:?} in {:#?}", said.borrow()),
    }
}
