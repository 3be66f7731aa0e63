//! The examples, as the processes that a reader starts: what they print is true, and what they promise holds over TCP.

#![allow(
    clippy::disallowed_methods,
    reason = "the examples are processes, which no `Env` drives"
)]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};

use futures_util::future::join_all;
use http::Method;
use idempotency_tests::{Answer, Call};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    net::{TcpListener, TcpStream},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

const ALICE: &str = "Bearer alice-token";
const BOB: &str = "Bearer bob-token";
const COFFEE: &str = r#"{"item":"coffee","amount":450}"#;

// ---- orders

#[tokio::test]
async fn orders_prints_lines_that_do_what_they_say() {
    let orders = Example::start("orders").await;
    let answers = orders.try_lines().await;

    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [201, 201, 422, 400, 200, 200]);
    orders.says_those_codes(&codes);
    let replays: Vec<_> = answers.iter().map(Answer::is_replay).collect();
    assert_eq!(replays, [false, true, false, false, false, false]);
    assert_eq!(answers[1].body, answers[0].body);
    assert_eq!(answers[2].problem().as_deref(), Some("key-reused"));
    assert_eq!(answers[3].problem().as_deref(), Some("missing-key"));
    assert_eq!(parsed(&answers[5]).as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn ten_concurrent_duplicates_are_one_order_and_each_is_told_what_it_got() {
    let orders = Example::start("orders").await;
    let answers = join_all((0..10).map(|_| orders.order(ALICE, "ten").send())).await;

    assert!(answers.iter().all(|answer| answer.code() == 201));
    assert!(answers.iter().all(|answer| answer.body == answers[0].body));
    let (executed, others): (Vec<_>, Vec<_>) = answers
        .iter()
        .map(|answer| (answer, timing(answer)))
        .partition(|(_, seen)| seen.contains_key("executing"));
    let [(executed, seen)] = &executed[..] else {
        panic!("{} of ten were executed", executed.len());
    };
    assert!(!executed.is_replay());
    assert!(seen["completed"].parse::<f64>().unwrap() >= 400.0);
    for (other, seen) in others {
        assert!(other.is_replay());
        assert!(seen.contains_key("replayed"), "{seen:?}");
    }

    let list = orders.get("/orders", ALICE).send().await;
    assert_eq!(parsed(&list), json!([parsed(executed)]));

    // What the page shows of the record is what a retry gets.
    let record = orders.get(&format!("/records/{}", seen["key"]), ALICE);
    let record = parsed(&record.send().await);
    assert_eq!(record["status"], 201);
    assert_eq!(
        record["headers"],
        json!(["content-type: application/json", "location: /orders/1"])
    );
    assert_eq!(record["body"], executed.text());
    assert_eq!(record["kept_for_seconds"], 24 * 3600);
    let location = executed.header("location").unwrap();
    assert_eq!(orders.get(location, ALICE).send().await.body, executed.body);
}

#[tokio::test]
async fn a_stranger_gets_no_replay_and_a_customer_only_his_own() {
    let orders = Example::start("orders").await;
    let first = orders.order(ALICE, "shared").send().await;
    assert_eq!(first.code(), 201);

    let stranger = orders.order("Bearer guess", "shared").send().await;
    assert_eq!((stranger.code(), stranger.is_replay()), (401, false));
    assert_eq!(stranger.header("www-authenticate"), Some("Bearer"));
    let record = format!("/records/{}", timing(&first)["key"]);
    assert_eq!(orders.get(&record, "Bearer guess").send().await.code(), 401);

    let bob = orders.order(BOB, "shared").send().await;
    assert_eq!((bob.code(), bob.is_replay()), (201, false));
    assert_eq!(parsed(&bob)["customer"], "bob");
}

#[tokio::test]
async fn the_page_needs_no_network() {
    let orders = Example::start("orders").await;
    let page = Call::new(orders.address, Method::GET, "/").send().await;
    assert_eq!(page.code(), 200);
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    // The name of a vocabulary, which nothing loads.
    let page = page.text().replace("http://www.w3.org/2000/svg", "");
    for elsewhere in ["http:", "https:", "src=", "@import", "url("] {
        assert!(!page.contains(elsewhere), "the page contains {elsewhere:?}");
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_stop_waits_for_the_order_of_a_client_that_has_left() {
    let mut command = command("orders");
    command
        .env("RUST_LOG", "idempotency=debug")
        .stderr(Stdio::piped());
    let mut orders = Example::spawn(command).await;
    let log = orders.child.stderr.take().unwrap();
    let mut log = BufReader::new(log).lines();

    let mut client = TcpStream::connect(orders.address).await.unwrap();
    let request = format!(
        "POST /orders HTTP/1.1\r\nhost: orders\r\nauthorization: {ALICE}\r\nidempotency-key: left\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{COFFEE}",
        COFFEE.len(),
    );
    client.write_all(request.as_bytes()).await.unwrap();
    until(&mut log, |line| line.contains("executing")).await;
    drop(client);
    // On a machine that is slow enough the order was made before the client had left.
    until(&mut log, |line| {
        line.contains("adopted") || line.contains("completed")
    })
    .await;
    let kill = format!("kill -INT {}", orders.child.id().unwrap());
    assert!(
        Command::new("sh")
            .args(["-c", &kill])
            .status()
            .await
            .unwrap()
            .success()
    );

    let last = until(&mut orders.stdout, |line| line.starts_with("Stopped")).await;
    assert_eq!(last.last().unwrap(), "Stopped. Orders made: 1");
    assert!(orders.child.wait().await.unwrap().success());
}

// ---- opt_in

#[tokio::test]
async fn opt_in_prints_lines_that_do_what_they_say() {
    let opt_in = Example::start("opt_in").await;
    let answers = opt_in.try_lines().await;
    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [200, 409, 400, 200, 200, 200, 200]);
    opt_in.says_those_codes(&codes);
    assert!(answers[1].is_replay());
    assert_eq!(answers[1].body, answers[0].body);
    assert_eq!(answers[2].problem().as_deref(), Some("missing-key"));

    // Each line once more.
    let again = opt_in.try_lines().await;
    let codes: Vec<_> = again.iter().map(Answer::code).collect();
    assert_eq!(codes, [409, 409, 400, 200, 409, 409, 200]);
    let ran_again: Vec<_> = answers
        .iter()
        .zip(&again)
        .map(|(first, again)| first.body != again.body)
        .collect();
    assert_eq!(ran_again, [false, false, false, true, false, false, true]);
}

// ---- ports

#[tokio::test]
async fn a_port_that_is_taken_is_an_error_that_names_the_cure() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for example in ["orders", "opt_in"] {
        let output = refused(example, &port).await;
        let says = format!("error: port {port} is taken: ");
        assert!(
            output.starts_with(&says) && output.contains("PORT=0"),
            "{output}"
        );
    }
}

#[tokio::test]
async fn a_bad_port_is_an_error_that_names_the_cure() {
    for port in ["http", "", "70000", "-1"] {
        let output = refused("orders", port).await;
        let says = format!("error: PORT is {port:?}, which is not a port: ");
        assert!(
            output.starts_with(&says) && output.contains("65535"),
            "{output}"
        );
    }
}

/// What an example that can't listen prints before it ends.
async fn refused(example: &str, port: &str) -> String {
    let mut command = command(example);
    command.env("PORT", port).stderr(Stdio::piped());
    let Output {
        status,
        stdout,
        stderr,
    } = soon(command.output()).await.unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(
        stdout.is_empty(),
        "it prints lines to try though nobody listens"
    );
    String::from_utf8(stderr).unwrap()
}

// ---- processes

/// An example that runs, until it is dropped.
struct Example {
    child: Child,
    stdout: Lines<BufReader<ChildStdout>>,
    /// All that it has printed before it served.
    printed: Vec<String>,
    address: SocketAddr,
}

impl Example {
    async fn start(name: &str) -> Self {
        Self::spawn(command(name)).await
    }

    async fn spawn(mut command: Command) -> Self {
        let mut child = command.spawn().expect("the example starts");
        let stdout = child.stdout.take().expect("a piped stdout");
        let mut stdout = BufReader::new(stdout).lines();
        let printed = until(&mut stdout, |line| line == "Ctrl-c stops.").await;
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

    /// Sends what its `curl` lines would send, in their order.
    async fn try_lines(&self) -> Vec<Answer> {
        let mut answers = Vec::new();
        for line in self.printed.iter().filter(|line| line.starts_with("curl ")) {
            answers.push(curl(line, self.address).send().await);
        }
        answers
    }

    /// The remark above each line names the status, if it names one.
    fn says_those_codes(&self, codes: &[u16]) {
        let lines = self
            .printed
            .split(|line| line.is_empty())
            .filter_map(|paragraph| {
                let (line, remarks) = paragraph.split_last()?;
                line.starts_with("curl ").then(|| remarks.join(" "))
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

    fn order(&self, authorization: &str, key: &str) -> Call {
        Call::new(self.address, Method::POST, "/orders")
            .header("authorization", authorization)
            .key(key)
            .json(COFFEE)
    }

    fn get(&self, path: &str, authorization: &str) -> Call {
        Call::new(self.address, Method::GET, path).header("authorization", authorization)
    }
}

/// The example on a free port.
fn command(example: &str) -> Command {
    let mut command = Command::new(executable(example));
    command
        .env("PORT", "0")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Asks cargo for the example, so that it is there and up to date whichever way the tests were started. Where the whole
/// workspace was built for the tests, as `tests/run` does, it is there already.
fn executable(example: &str) -> PathBuf {
    let output = std::process::Command::new(env!("CARGO"))
        .args([
            "build",
            "--workspace",
            "--all-features",
            "--examples",
            "--message-format=json",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::inherit())
        .output()
        .expect("cargo runs");
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

/// A printed `curl` line as a call; knows the options that the examples use.
fn curl(line: &str, address: SocketAddr) -> Call {
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
        match word {
            "-i" => {}
            "-X" => method = words.next().unwrap().parse().unwrap(),
            "-H" => headers.push(words.next().unwrap().split_once(": ").unwrap()),
            "-d" => (method, body) = (Method::POST, words.next().unwrap()),
            url => path = url.strip_prefix(&format!("http://{address}")),
        }
    }
    let path = path.unwrap_or_else(|| panic!("no URL at {address}: {line}"));
    let call = Call::new(address, method, path).body(body.to_owned());
    headers
        .into_iter()
        .fold(call, |call, (name, value)| call.header(name, value))
}

/// Reads lines up to the one that is waited for, and returns them all.
async fn until<R>(lines: &mut Lines<BufReader<R>>, is_it: impl Fn(&str) -> bool) -> Vec<String>
where
    R: AsyncRead + AsyncReadExt + Unpin,
{
    let mut read = Vec::new();
    loop {
        let line = match timeout(Duration::from_secs(30), lines.next_line()).await {
            Ok(line) => line.unwrap(),
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

async fn soon<T>(future: impl Future<Output = T>) -> T {
    let limit = Duration::from_secs(30);
    timeout(limit, future).await.expect("an end within 30 s")
}

fn parsed(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).expect("JSON")
}

/// What the observer saw, by event, with its duration or its description.
fn timing(answer: &Answer) -> BTreeMap<String, String> {
    let header = answer.header("server-timing").expect("Server-Timing");
    let entries = header.split(", ").map(|entry| {
        let (name, parameter) = entry.split_once(';').unwrap_or((entry, ""));
        let (_, value) = parameter.split_once('=').unwrap_or_default();
        (name.to_owned(), value.trim_matches('"').to_owned())
    });
    entries.collect()
}
