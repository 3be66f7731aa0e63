//! One PostgreSQL, in a directory of its own.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::{
        fs::{MetadataExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use idempotency_axum::{
    PostgresStorage,
    sqlx::{
        ConnectOptions as _, Executor as _, PgConnection, PgPool, Row as _,
        postgres::{PgConnectOptions, PgPoolOptions},
    },
};
use tokio::time::timeout;

use crate::{
    PATIENCE,
    redis::{directory, send_signal},
};

/// A PostgreSQL on a unix socket, with its defaults but for the time it takes to start. It logs every statement.
#[derive(Debug)]
pub struct Postgres {
    directory: PathBuf,
    settings: Vec<String>,
    process: Option<Child>,
    log: Arc<Mutex<Vec<String>>>,
}

/// A place in the log.
#[derive(Clone, Copy, Debug)]
pub struct Mark(usize);

impl Postgres {
    /// Starts one with an empty database.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::with(&[])
    }

    /// Starts one with settings of its configuration: `name=value`.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    #[must_use]
    pub fn with(settings: &[&str]) -> Self {
        let directory = directory("pg");
        let user = User::find();
        user.owns(&directory);
        user.run(
            Command::new("cp")
                .arg("-R")
                .arg(template())
                .arg(directory.join("data")),
        );
        let mut postgres = Self {
            directory,
            settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
            process: None,
            log: Arc::default(),
        };
        postgres.start_again();
        postgres
    }

    /// Starts it after it was stopped, with its data.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    pub fn start_again(&mut self) {
        self.crash();
        let mut command = Command::new(binaries().join("postgres"));
        command
            .arg("-D")
            .arg(self.directory.join("data"))
            .arg("-k")
            .arg(&self.directory)
            .args(["-c", "listen_addresses="])
            // What a killed process has written is there. Only a power failure needs `fsync`, for which a busy disk takes seconds.
            .args(["-c", "synchronous_commit=on", "-c", "fsync=off"])
            .args(["-c", "log_statement=all", "-c", "log_line_prefix=%a|"])
            .args(["-c", "max_connections=200"]);
        for setting in &self.settings {
            command.args(["-c", setting]);
        }
        command
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        User::find().becomes(&mut command);
        let mut process = command.spawn().expect("postgres starts");
        let stderr = process.stderr.take().expect("a piped stderr");
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let is_ready = lines.by_ref().any(|line| {
            let is_ready = line.contains("ready to accept connections");
            self.log().push(line);
            is_ready
        });
        self.process = Some(process);
        assert!(is_ready, "postgres did not start: {:#?}", self.log());
        let log = self.log.clone();
        std::thread::spawn(move || lines.for_each(|line| lock(&log).push(line)));
    }

    /// Stops it at once, without a word to anybody, as a crash does.
    ///
    /// # Panics
    ///
    /// Panics if it can't be stopped.
    pub fn crash(&mut self) {
        if let Some(mut process) = self.process.take() {
            // `kill -9` would leave its processes behind for a moment.
            send_signal("-QUIT", process.id());
            process.wait().expect("postgres ends");
        }
    }

    /// Where it listens, for a client of this name.
    #[must_use]
    pub fn url_of(&self, client: &str) -> String {
        let socket = self.directory.display();
        format!("postgres://postgres@localhost/postgres?host={socket}&application_name={client}")
    }

    /// Where it listens.
    #[must_use]
    pub fn url(&self) -> String {
        self.url_of("shop")
    }

    /// Where its files and its socket are; they are deleted with it.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A storage on it, with its table.
    ///
    /// # Panics
    ///
    /// Panics if it can't connect.
    pub async fn storage(&self) -> PostgresStorage {
        let storage = PostgresStorage::connect(self.url()).time_limit(PATIENCE);
        let storage = storage.await.expect("a connection");
        storage.migrate().await.expect("a table");
        storage
    }

    /// A pool of which each connection runs `setup` first.
    ///
    /// # Panics
    ///
    /// Panics if the URL is wrong.
    #[must_use]
    pub fn pool(&self, setup: &'static str) -> PgPool {
        let options: PgConnectOptions = self.url().parse().expect("a URL");
        PgPoolOptions::new()
            .after_connect(move |connection, _| {
                Box::pin(async move { connection.execute(setup).await.map(drop) })
            })
            .connect_lazy_with(options)
    }

    /// A connection that is no storage's.
    ///
    /// # Panics
    ///
    /// Panics if it can't connect.
    pub async fn connection(&self) -> PgConnection {
        let options: PgConnectOptions = self.url_of("harness").parse().expect("a URL");
        let connection = timeout(PATIENCE, options.connect()).await;
        connection.expect("an answer").expect("a connection")
    }

    /// Runs statements over a connection of its own.
    ///
    /// # Panics
    ///
    /// Panics if one fails.
    pub async fn execute(&self, statements: &str) {
        let mut connection = self.connection().await;
        let done = timeout(PATIENCE, connection.execute(statements)).await;
        done.expect("an answer").expect("success");
    }

    /// The number that a query returns.
    ///
    /// # Panics
    ///
    /// Panics if it fails.
    pub async fn number(&self, query: &str) -> i64 {
        let mut connection = self.connection().await;
        let row = timeout(PATIENCE, connection.fetch_one(query)).await;
        row.expect("an answer").expect("success").get(0)
    }

    /// Returns once a query returns a number that is not 0.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn until(&self, query: &str) {
        let seen = timeout(PATIENCE, async {
            while self.number(query).await == 0 {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        });
        seen.await.unwrap_or_else(|_| panic!("never: {query}"));
    }

    /// Marks a place in the log: all that was run before is before it.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn mark(&self) -> Mark {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mark = format!("mark {}", NUMBER.fetch_add(1, Ordering::Relaxed));
        self.execute(&format!("SELECT '{mark}'")).await;
        let written = timeout(PATIENCE, async {
            loop {
                let place = self.log().iter().rposition(|line| line.contains(&mark));
                match place {
                    Some(place) => return Mark(place),
                    None => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
                }
            }
        });
        written.await.expect("the log shows the mark")
    }

    /// The statements of the client `shop` since a mark.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn statements_since(&self, mark: Mark) -> Vec<String> {
        let end = self.mark().await;
        let log = self.log();
        let of_the_shop = log[mark.0..end.0].iter().filter_map(|line| {
            let line = line.strip_prefix("shop|LOG:  ")?;
            let is_statement = line.starts_with("execute ") || line.starts_with("statement: ");
            is_statement.then(|| line.to_owned())
        });
        of_the_shop.collect()
    }

    fn log(&self) -> MutexGuard<'_, Vec<String>> {
        lock(&self.log)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // It may be gone already, as may its files.
            let _ = Command::new("kill")
                .args(["-QUIT", &process.id().to_string()])
                .stderr(Stdio::null())
                .status();
            let _ = process.wait();
        }
        if std::thread::panicking() {
            let log = self.log();
            let last = log.len().saturating_sub(60);
            eprintln!("the end of PostgreSQL's log:\n{}", log[last..].join("\n"));
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn lock(log: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who runs a server: PostgreSQL and PgBouncer refuse to be root.
pub(super) struct User(Option<(u32, u32)>);

impl User {
    pub(super) fn find() -> Self {
        let me = fs::metadata("/proc/self").expect("who we are").uid();
        if me != 0 {
            return Self(None);
        }
        let users = fs::read_to_string("/etc/passwd").expect("the users");
        let ids = |name: &str| {
            let line = users
                .lines()
                .find(|line| line.starts_with(&format!("{name}:")))?;
            let mut fields = line.split(':').skip(2);
            Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
        };
        Self(Some(
            ids("postgres")
                .or_else(|| ids("nobody"))
                .expect("a user `postgres` or `nobody`"),
        ))
    }

    pub(super) fn becomes(&self, command: &mut Command) {
        if let Some((user, group)) = self.0 {
            command.uid(user).gid(group);
        }
    }

    pub(super) fn owns(&self, path: &Path) {
        if let Some((user, group)) = self.0 {
            chown(path, Some(user), Some(group)).expect("root may do so");
        }
    }

    fn run(&self, command: &mut Command) {
        self.becomes(command);
        let output = command.output();
        let output = output.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(
            output.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// Where Debian has the newest version, or `$PG_BIN`.
fn binaries() -> PathBuf {
    if let Some(chosen) = std::env::var_os("PG_BIN") {
        return chosen.into();
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut found: Vec<_> = versions
        .filter_map(|version| {
            let path = version.ok()?.path();
            let number: u32 = path.file_name()?.to_str()?.parse().ok()?;
            let bin = path.join("bin");
            bin.join("postgres").exists().then_some((number, bin))
        })
        .collect();
    found.sort();
    let newest = found.pop().expect(
        "PostgreSQL is installed: `apt-get install postgresql`, or start the tests by tests/run; elsewhere PG_BIN names the directory of `postgres`",
    );
    newest.1
}

/// The files of a new server, made once for each version: `initdb` takes seconds.
fn template() -> PathBuf {
    let (user, bin) = (User::find(), binaries());
    let owner = user.0.map_or_else(
        || fs::metadata("/proc/self").expect("who we are").uid(),
        |(user, _)| user,
    );
    let version = Command::new(bin.join("postgres")).arg("--version").output();
    let version = version.expect("postgres tells its version").stdout;
    let version: String = String::from_utf8_lossy(&version)
        .chars()
        .map(|letter| {
            if letter.is_ascii_alphanumeric() {
                letter
            } else {
                '-'
            }
        })
        .collect();
    let template =
        std::env::temp_dir().join(format!("idempotency-{owner}-{}", version.trim_matches('-')));
    if template.exists() {
        return template;
    }
    let making = directory("pg-new");
    user.owns(&making);
    let data = making.join("data");
    user.run(
        Command::new(bin.join("initdb"))
            .args([
                "--no-sync",
                "--wal-segsize=1",
                "-A",
                "trust",
                "-U",
                "postgres",
            ])
            .args(["-E", "UTF8", "--locale=C", "-D"])
            .arg(&data),
    );
    // Another process may have been faster; then its directory is not empty, and stays.
    let _ = fs::rename(&data, &template);
    let _ = fs::remove_dir_all(&making);
    template
}
