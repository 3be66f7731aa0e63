//! PgBouncer before a server.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use super::{Postgres, server::User};
use crate::redis::{directory, free_port};

/// A PgBouncer that pools transactions. It listens on a free port of 127.0.0.1.
#[derive(Debug)]
pub struct Bouncer {
    directory: PathBuf,
    port: u16,
    process: Child,
}

impl Bouncer {
    /// Starts one before this server.
    ///
    /// # Panics
    ///
    /// Panics if it does not start.
    #[must_use]
    pub fn before(postgres: &Postgres) -> Self {
        let (directory, port, user) = (directory("pgb"), free_port(), User::find());
        user.owns(&directory);
        let configuration = format!(
            "[databases]\n\
             postgres = host={socket} dbname=postgres user=postgres\n\
             [pgbouncer]\n\
             listen_addr = 127.0.0.1\n\
             listen_port = {port}\n\
             unix_socket_dir =\n\
             auth_type = any\n\
             pool_mode = transaction\n\
             default_pool_size = 8\n\
             max_client_conn = 200\n",
            socket = postgres.directory().display()
        );
        let file = directory.join("pgbouncer.ini");
        fs::write(&file, configuration).expect("a file in its directory");
        user.owns(&file);
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("pgbouncer");
        command
            .arg(&file)
            // Debian has it there.
            .env("PATH", format!("{path}:/usr/sbin"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        user.becomes(&mut command);
        let mut process = command.spawn().expect(
            "pgbouncer is installed: `apt-get install pgbouncer`, or start the tests by tests/run",
        );
        let stderr = process.stderr.take().expect("a piped stderr");
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let mut said = Vec::new();
        let is_ready = lines.by_ref().any(|line| {
            said.push(line.clone());
            line.contains("process up")
        });
        assert!(is_ready, "pgbouncer did not start: {said:#?}");
        // What is not read would block it one day.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            directory,
            port,
            process,
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn url(&self) -> String {
        let port = self.port;
        format!(
            "postgres://postgres@127.0.0.1:{port}/postgres?application_name=shop&sslmode=disable"
        )
    }
}

impl Drop for Bouncer {
    fn drop(&mut self) {
        // It may be gone already, as may its files.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}
