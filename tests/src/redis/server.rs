//! One `redis-server`, in a directory of its own.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::{TcpListener, UdpSocket},
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use futures_util::{Stream, StreamExt as _};
use idempotency_axum::redis::{self, Client, FromRedisValue, IntoConnectionInfo as _, ToRedisArgs};
use tokio::time::timeout;

use crate::PATIENCE;

/// A `redis-server` on a unix socket, or also on a free port of 127.0.0.1. It writes every command to its file before it answers.
#[derive(Debug)]
pub struct Redis {
    directory: PathBuf,
    arguments: Vec<String>,
    port: Option<u16>,
    is_sentinel: bool,
    process: Option<Child>,
}

/// A server that is put together.
#[derive(Debug, Default)]
#[must_use]
pub struct RedisBuilder {
    arguments: Vec<String>,
    has_port: bool,
    files: Vec<(&'static str, String)>,
    is_sentinel: bool,
}

impl RedisBuilder {
    /// Adds a line of the server's configuration: `--name value …`.
    pub fn with(mut self, line: &[&str]) -> Self {
        self.arguments
            .extend(line.iter().map(|&word| word.to_owned()));
        self
    }

    /// Listens on a free port too.
    pub fn on_a_port(mut self) -> Self {
        self.has_port = true;
        self
    }

    /// Is a node of a Cluster. Without a port of its own the bus takes one that the system may have given to a connection.
    pub fn cluster_node(self) -> Self {
        self.with(&["--cluster-enabled", "yes"])
            .with(&["--cluster-port", &free_port().to_string()])
    }

    /// Is no Redis but a sentinel for the master `mymaster` at this port.
    pub fn sentinel_of(self, master: u16) -> Self {
        let configuration = format!(
            "sentinel monitor mymaster 127.0.0.1 {master} 1\n\
             sentinel down-after-milliseconds mymaster 500\n\
             sentinel failover-timeout mymaster 2000\n"
        );
        let mut builder = self.on_a_port().file("sentinel.conf", configuration);
        builder.is_sentinel = true;
        builder
    }

    /// Adds a file to its directory, to which its configuration can refer.
    pub fn file(mut self, name: &'static str, content: String) -> Self {
        self.files.push((name, content));
        self
    }

    /// Starts it.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    #[must_use]
    pub fn start(self) -> Redis {
        let directory = directory("redis");
        for (name, content) in self.files {
            fs::write(directory.join(name), content).expect("a file in its directory");
        }
        let mut redis = Redis {
            directory,
            arguments: self.arguments,
            port: self.has_port.then(free_port),
            is_sentinel: self.is_sentinel,
            process: None,
        };
        redis.start_again();
        redis
    }
}

impl Redis {
    /// A server as Debian configures it, but for the disk.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// A server that is put together.
    pub fn builder() -> RedisBuilder {
        RedisBuilder::default()
    }

    /// Where it listens.
    #[must_use]
    pub fn url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Its unix socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("redis.sock")
    }

    /// Where its files are; they are deleted with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its port, if it has one.
    ///
    /// # Panics
    ///
    /// Panics if it has none.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port.expect("a server with a port")
    }

    /// `kill -9`.
    ///
    /// # Panics
    ///
    /// Panics if it can't be killed.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("redis-server can be killed");
            process.wait().expect("redis-server ends");
        }
    }

    /// Starts it after it was killed, with the data that it had.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    pub fn start_again(&mut self) {
        self.kill();
        let mut command = Command::new("redis-server");
        if self.is_sentinel {
            command.args(["sentinel.conf", "--sentinel"]);
        } else {
            // What a killed process has written is there. Only a power failure needs `fsync`, for which a busy disk takes seconds.
            command
                .args(["--save", ""])
                .args(["--appendonly", "yes", "--appendfsync", "no"]);
        }
        command
            .current_dir(&self.directory)
            .args(["--port", &self.port.unwrap_or(0).to_string()])
            .args(["--bind", "127.0.0.1"])
            .args(["--unixsocket", "redis.sock"])
            .args(["--dir", "."])
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut process = command.spawn().expect(
            "redis-server is installed: `apt-get install redis-server`, or start the tests by tests/run",
        );
        let stdout = process.stdout.take().expect("a piped stdout");
        let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let is_ready = lines.by_ref().any(|line| {
            said.push(line.clone());
            line.contains("eady to accept connections") || line.contains("+monitor master")
        });
        self.process = Some(process);
        assert!(is_ready, "redis-server did not start: {said:#?}");
        // What is not read would block it one day.
        std::thread::spawn(move || lines.for_each(drop));
    }

    /// Starts it after it was killed, without any data.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    pub fn start_empty(&mut self) {
        self.kill();
        fs::remove_dir_all(self.directory.join("appendonlydir")).expect("its files can be deleted");
        self.start_again();
    }

    /// Stops it as it stands: it accepts connections, and never answers.
    pub fn stall(&self) {
        self.signal("-STOP");
    }

    /// Lets it go on.
    pub fn go_on(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let process = self.process.as_ref().expect("a running server");
        send_signal(signal, process.id());
    }

    /// Sends a command over a connection of its own.
    ///
    /// # Panics
    ///
    /// Panics if it fails.
    pub async fn ask<T: FromRedisValue>(&self, words: &[impl ToRedisArgs]) -> T {
        ask(&self.url(), words).await
    }

    /// Listens to all commands from now on.
    ///
    /// # Panics
    ///
    /// Panics if it can't.
    pub async fn monitor(&self) -> Monitor {
        let client = Client::open(self.url()).expect("a URL");
        let monitor = client.get_async_monitor().await.expect("MONITOR");
        Monitor {
            lines: monitor.into_on_message::<String>().boxed(),
            url: self.url(),
        }
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may be gone already, as may its files.
            let _ = process.kill();
            let _ = process.wait();
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// What `MONITOR` shows.
pub struct Monitor {
    lines: Pin<Box<dyn Stream<Item = String> + Send>>,
    url: String,
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor")
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

impl Monitor {
    /// The commands that clients have sent since the last call, without what scripts call.
    ///
    /// # Panics
    ///
    /// Panics if the server is gone.
    pub async fn commands(&mut self) -> Vec<String> {
        // Redis shows commands in their order, so all that came before this one is there when it is.
        static MARK: AtomicU32 = AtomicU32::new(0);
        let mark = format!("mark-{}", MARK.fetch_add(1, Ordering::Relaxed));
        let _: String = ask(&self.url, &["PING", &mark]).await;
        let mut commands = Vec::new();
        loop {
            let line = timeout(PATIENCE, self.lines.next()).await;
            let line = line
                .expect("MONITOR shows the mark")
                .expect("MONITOR goes on");
            if line.contains(&mark) {
                return commands;
            }
            let (source, command) = line.split_once("] ").expect("a line of MONITOR");
            if !source.ends_with(" lua") {
                commands.push(command.to_owned());
            }
        }
    }
}

/// Sends a command to the server at `url`.
///
/// # Panics
///
/// Panics if it fails.
pub(super) async fn ask<T: FromRedisValue>(url: &str, words: &[impl ToRedisArgs]) -> T {
    // Nothing but the command: no HELLO, no CLIENT SETINFO.
    let info = url.into_connection_info().expect("a URL");
    let settings = info.redis_settings().clone().set_skip_set_lib_name();
    let client = Client::open(info.set_redis_settings(settings)).expect("a URL");
    let mut command = redis::Cmd::new();
    for word in words {
        command.arg(word);
    }
    let answer = timeout(PATIENCE, async {
        let mut connection = client.get_multiplexed_async_connection().await?;
        command.query_async(&mut connection).await
    });
    answer.await.expect("an answer").expect("success")
}

const PORTS: u32 = 20_000;

/// A port that is free, and stays free until its server takes it.
///
/// # Panics
///
/// Panics if there is none.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    static RESERVED: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());
    // The system itself gives away ports from 32,768 on, also to connections. Each process begins with another port.
    let first = std::process::id().wrapping_mul(16);
    for _ in 0..PORTS {
        let next = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS;
        let port = u16::try_from(10_000 + next).expect("below 32,768");
        // The UDP port of the same number, kept until this process ends, reserves it among the test processes.
        let Ok(reservation) = UdpSocket::bind(("127.0.0.1", port)) else {
            continue;
        };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            let mut reserved = RESERVED.lock().unwrap_or_else(PoisonError::into_inner);
            reserved.push(reservation);
            return port;
        }
    }
    panic!("no port is free");
}

/// An empty directory, whose name is short enough for a socket in it.
pub(crate) fn directory(name: &str) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let directory = std::env::temp_dir().join(format!("{name}-{}-{number}", std::process::id()));
    // Of a process that was killed and had the same number.
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).expect("a directory for temporary files");
    directory
}

/// `kill`: there is no other way to send a signal without unsafe code.
pub(super) fn send_signal(signal: &str, process: u32) {
    let mut kill = Command::new("kill");
    kill.arg(signal).arg(process.to_string());
    assert!(kill.status().expect("kill runs").success(), "kill {signal}");
}
