//! The examples, as the processes that a reader starts.

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use http::Method;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use crate::{
    PATIENCE,
    client::{Answer, Call},
};

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
/// Panics if it can't be started, or does not end.
pub async fn output(mut command: Command) -> Output {
    command.stderr(Stdio::piped());
    let output = timeout(PATIENCE, command.output()).await;
    output.expect("an end").expect("the example starts")
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
/// Panics if it does not come.
pub async fn until<R>(lines: &mut Lines<BufReader<R>>, is_it: impl Fn(&str) -> bool) -> Vec<String>
where
    R: AsyncRead + Unpin,
{
    let mut read = Vec::new();
    loop {
        let line = match timeout(PATIENCE, lines.next_line()).await {
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

/// The executable of an example. A test does not build it: on a busy machine that takes longer than a test may.
///
/// # Panics
///
/// Panics if it is missing or older than its sources. The message says how to build it.
#[must_use]
pub fn executable(example: &str) -> PathBuf {
    let name = format!("{example}{}", env::consts::EXE_SUFFIX);
    let executable = artifacts().join("examples").join(name);
    if let Err(message) = check(&executable) {
        panic!("{message}");
    }
    executable
}

/// The directory of the finished executables. The executable of the test may lie in another one, `CARGO_BUILD_BUILD_DIR`.
fn artifacts() -> PathBuf {
    // Set by nextest, and by `cargo test` since Rust 1.94.
    let names = ["NEXTEST_BIN_EXE_service", "CARGO_BIN_EXE_service"];
    let service = names.into_iter().find_map(env::var_os).map(PathBuf::from);
    let directory = match service {
        Some(service) => service.parent().map(Path::to_owned),
        // In `deps` of it.
        None => env::current_exe()
            .ok()
            .and_then(|test| Some(test.parent()?.parent()?.to_owned())),
    };
    directory.expect("an executable lies in a directory")
}

/// Refuses an example that is not what a build would make now.
fn check(executable: &Path) -> Result<(), String> {
    compare_times(executable).map_err(|problem| {
        format!(
            "{}: {problem}. `tests/run` builds the examples before the tests start. To run a test by hand, build them first, \
             with the test's profile and target directory: `cargo build --workspace --all-features --examples`",
            executable.display()
        )
    })
}

/// Compares the executable with its sources, which cargo lists beside it as a rule of `make`.
fn compare_times(executable: &Path) -> Result<(), String> {
    let time_of = |path: &Path| path.metadata().and_then(|metadata| metadata.modified());
    let built = time_of(executable).map_err(|error| format!("the example is missing ({error})"))?;
    let list = executable.with_extension("d");
    let rule = fs::read_to_string(&list)
        .map_err(|error| format!("its list of sources is missing ({error})"))?;
    let (_, sources) = rule
        .split_once(": ")
        .ok_or_else(|| format!("{} lists no sources", list.display()))?;
    // A space inside a path has a backslash before it.
    for source in sources.trim_end().replace("\\ ", "\0").split(' ') {
        let source = PathBuf::from(source.replace('\0', " "));
        let changed = time_of(&source)
            .map_err(|error| format!("its source {} is gone ({error})", source.display()))?;
        if changed > built {
            return Err(format!("the example is older than {}", source.display()));
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// A directory with an example and two sources, the first of which has a space in its name.
    struct Built(PathBuf);

    impl Built {
        fn new(test: &str) -> Self {
            let built = Self(env::temp_dir().join(format!("{test} {}", std::process::id())));
            fs::create_dir_all(&built.0).unwrap();
            let sources = ["a source.rs", "b.rs"].map(|name| built.0.join(name));
            let [first, second] = sources
                .each_ref()
                .map(|path| path.display().to_string().replace(' ', "\\ "));
            for source in &sources {
                fs::write(source, "").unwrap();
            }
            fs::write(built.0.join("shop"), "").unwrap();
            let rule = format!("{}: {first} {second}\n", built.0.join("shop").display());
            fs::write(built.0.join("shop.d"), rule).unwrap();
            let now = SystemTime::now();
            for (name, time) in [
                ("a source.rs", now - 2 * MINUTE),
                ("b.rs", now - MINUTE),
                ("shop", now),
            ] {
                built.touch(name, time);
            }
            built
        }

        fn touch(&self, name: &str, time: SystemTime) {
            let file = fs::File::options().write(true).open(self.0.join(name));
            file.unwrap().set_modified(time).unwrap();
        }

        fn check(&self) -> Result<(), String> {
            check(&self.0.join("shop"))
        }
    }

    impl Drop for Built {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn an_example_newer_than_its_sources_is_run() {
        assert_eq!(Built::new("newer").check(), Ok(()));
    }

    #[test]
    fn an_example_older_than_a_source_is_refused() {
        for source in ["a source.rs", "b.rs"] {
            let built = Built::new("older");
            built.touch(source, SystemTime::now() + MINUTE);
            let message = built.check().unwrap_err();
            assert!(message.contains("the example is older than"), "{message}");
            assert!(message.contains(source), "{message}");
        }
    }

    #[test]
    fn an_example_that_is_missing_is_refused_with_the_command() {
        for gone in ["shop", "shop.d", "b.rs"] {
            let built = Built::new("missing");
            fs::remove_file(built.0.join(gone)).unwrap();
            let message = built.check().unwrap_err();
            assert!(message.contains("tests/run"), "{message}");
            let command = "cargo build --workspace --all-features --examples";
            assert!(message.contains(command), "{message}");
        }
    }
}
