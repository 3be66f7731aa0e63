//! The examples, as the processes that a reader starts.

use std::{
    net::SocketAddr,
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};

use http::Method;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::client::{Answer, Call};

/// An example that serves, until it is dropped.
#[derive(Debug)]
pub struct Example {
    /// The process.
    pub child: Child,
    /// What it prints from now on.
    pub stdout: Lines<BufReader<ChildStdout>>,
    address: SocketAddr,
    /// All that it has printed before it served.
    printed: Vec<String>,
}

impl Example {
    /// Starts it on a free port and returns once it says where.
    ///
    /// # Panics
    ///
    /// Panics if it does not get that far.
    pub async fn start(name: &str) -> Self {
        Self::spawn(command(name)).await
    }

    /// The same with a command that is changed.
    ///
    /// # Panics
    ///
    /// Panics if it does not get that far.
    pub async fn spawn(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the example starts");
        let stdout = child.stdout.take().expect("a piped stdout");
        let mut stdout = BufReader::new(stdout).lines();
        let printed = until(&mut stdout, |line| line.starts_with("Ctrl-c stops.")).await;
        let (_, address) = printed[0]
            .split_once("http://")
            .expect("the address comes first");
        Self {
            child,
            stdout,
            address: address.parse().expect("an address"),
            printed,
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A call to be completed and sent.
    pub fn call(&self, method: Method, path: &str) -> Call {
        Call::new(self.address, method, path)
    }

    /// `POST path`.
    pub fn post(&self, path: &str) -> Call {
        self.call(Method::POST, path)
    }

    /// Sends what its `curl` lines would send, in their order.
    ///
    /// # Panics
    ///
    /// Panics if a line is not one that curl and this harness understand.
    pub async fn try_lines(&self) -> Vec<Answer> {
        let mut answers = Vec::new();
        for line in self.printed.iter().filter(|line| is_curl(line)) {
            answers.push(curl(line, self.address).send().await);
        }
        answers
    }

    /// That the remark above each line names the status, if it names one, as all but one have to.
    ///
    /// # Panics
    ///
    /// Panics if a remark says something else.
    pub fn says_those_codes(&self, codes: &[u16]) {
        let lines = self
            .printed
            .split(|line| line.is_empty())
            .filter_map(|paragraph| {
                let (line, remarks) = paragraph.split_last()?;
                is_curl(line).then(|| remarks.join(" "))
            });
        let mut said = 0;
        for (remark, code) in lines.zip(codes) {
            let named = remark
                .split(|c: char| !c.is_ascii_digit())
                .find(|word| word.len() == 3);
            if let Some(named) = named {
                assert_eq!(named, code.to_string(), "{remark}");
                said += 1;
            }
        }
        assert!(
            said + 1 >= codes.len(),
            "only {said} of {} lines name a status",
            codes.len()
        );
    }
}

/// The example on a free port.
#[must_use]
pub fn command(example: &str) -> Command {
    let mut command = Command::new(executable(example));
    command
        .env("PORT", "0")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// What a command prints until it ends by itself.
///
/// # Panics
///
/// Panics if it can't be started, or has not ended after 30 s.
pub async fn output(mut command: Command) -> Output {
    command.stderr(Stdio::piped());
    let limit = Duration::from_secs(30);
    let output = timeout(limit, command.output()).await;
    output
        .expect("an end within 30 s")
        .expect("the example starts")
}

/// What an example that can't start prints to stderr before it ends.
///
/// # Panics
///
/// Panics if it ends well, or prints lines to try though nobody listens.
pub async fn refused(command: Command) -> String {
    let output = output(command).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(
        output.stdout.is_empty(),
        "it prints lines to try though nobody listens"
    );
    String::from_utf8(output.stderr).expect("UTF-8")
}

/// Reads lines up to the one that is waited for, and returns them all.
///
/// # Panics
///
/// Panics if it does not come within 30 s, or never will.
pub async fn until<R>(lines: &mut Lines<BufReader<R>>, is_it: impl Fn(&str) -> bool) -> Vec<String>
where
    R: AsyncRead + Unpin,
{
    let mut read = Vec::new();
    loop {
        let line = match timeout(Duration::from_secs(30), lines.next_line()).await {
            Ok(line) => line.expect("lines of UTF-8"),
            Err(_) => panic!("the line did not come; until now: {read:#?}"),
        };
        let Some(line) = line else {
            panic!("the process has ended; it said: {read:#?}");
        };
        let found = is_it(&line);
        read.push(line);
        if found {
            return read;
        }
    }
}

/// Asks cargo for the example, so that it is there and up to date whichever way the tests were started. Where the whole
/// workspace was built for the tests, as `tests/run` does, it is there already.
fn executable(example: &str) -> PathBuf {
    let mut cargo = std::process::Command::new(env!("CARGO"));
    cargo
        .args([
            "build",
            "--workspace",
            "--all-features",
            "--examples",
            "--message-format=json",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::inherit());
    as_a_reader(&mut cargo);
    let output = cargo.output().expect("cargo runs");
    assert!(output.status.success(), "the examples do not build");
    let messages = String::from_utf8(output.stdout).expect("cargo's messages are JSON");
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| {
            message["target"]["name"] == example && message["target"]["kind"] == json!(["example"])
        })
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .expect("cargo names the example's executable")
}

/// Takes away what cargo tells a test of its package. Build scripts that ask for it (that of `ring` does) would take all for changed
/// that was built without.
pub fn as_a_reader(command: &mut std::process::Command) {
    for (name, _) in std::env::vars_os() {
        let is_of_the_test = [
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
            "CARGO_CRATE_",
            "CARGO_BIN_",
        ]
        .iter()
        .any(|prefix| name.to_string_lossy().starts_with(prefix));
        if is_of_the_test {
            command.env_remove(name);
        }
    }
}

fn is_curl(line: &str) -> bool {
    line.starts_with("curl ")
}

/// A `curl` line as a call; knows the options that the examples use.
///
/// # Panics
///
/// Panics if it is something else.
pub fn curl(line: &str, address: SocketAddr) -> Call {
    // The arguments are separated by spaces, those with a space in single quotes.
    let words = line
        .split('\'')
        .enumerate()
        .flat_map(|(n, part)| match n % 2 {
            0 => part.split_whitespace().collect(),
            _ => vec![part],
        });
    let (mut method, mut path) = (Method::GET, None);
    let (mut headers, mut body) = (Vec::new(), "");
    let mut words = words.skip(1);
    while let Some(word) = words.next() {
        let mut argument = || words.next().expect("the argument of an option");
        match word {
            "-i" | "-iN" => {}
            "-X" => method = argument().parse().expect("a method"),
            "-H" => headers.push(argument().split_once(": ").expect("a header")),
            "-d" => (method, body) = (Method::POST, argument()),
            url => path = url.strip_prefix(&format!("http://{address}")),
        }
    }
    let path = path.unwrap_or_else(|| panic!("no URL at {address}: {line}"));
    let call = Call::new(address, method, path).body(body.to_owned());
    headers
        .into_iter()
        .fold(call, |call, (name, value)| call.header(name, value))
}
