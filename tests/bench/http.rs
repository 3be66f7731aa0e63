//! Over HTTP/1.1 with keep-alive, on storages at their limit: each request of a new key evicts a record. Each server is a process
//! of its own, which tells its CPU time; the client's does not count.

use std::{
    env,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    thread,
    time::Instant,
};

use axum::Router;
use tokio::net::TcpListener;

#[cfg(feature = "peers")]
use crate::peers;
use crate::{
    apps::{Floor, bare, floored, memory, protected, weight},
    measure::{Rounds, WARM_UP, cpu},
    on_two_threads,
    report::{Limit, Report},
};

const RECORDS: usize = 10_000;
const ROUNDS: usize = 24;
const CONNECTIONS: usize = 8;
/// Of each connection in a round.
const REQUESTS: usize = 600;

/// The number of no fresh key.
const SAME_KEY: usize = 999_999_999;

/// The case, its server, and whether each request has a new key.
const CASES: [(&str, &str, bool); 6] = [
    ("bare", "bare", true),
    ("floor", "floor", true),
    ("first", "ours", true),
    ("replay", "ours", false),
    // It has no limit to be at.
    ("idempotent, first", "idempotent", true),
    ("idempotent, replay", "idempotent", false),
];

const APPS: &[&str] = if cfg!(feature = "peers") {
    &["bare", "floor", "ours", "idempotent"]
} else {
    &["bare", "floor", "ours"]
};

pub fn run(report: &mut Report) {
    for (group, size) in [("HTTP, 256 B", 256), ("HTTP, 4 KiB", 4 << 10)] {
        let servers = APPS.iter().map(|app| Server::start(app, size));
        let mut servers: Vec<Server> = servers.collect();
        for server in &mut servers {
            server.load(size, true, 2 * RECORDS / CONNECTIONS);
        }
        assert!(servers[1].is_full() && servers[2].is_full());
        let mut rounds = Rounds::default();
        for round in 0..WARM_UP + ROUNDS {
            for (name, app, fresh) in CASES {
                let Some(server) = servers.iter_mut().find(|server| server.app == app) else {
                    continue;
                };
                if !fresh {
                    // Its record may have been evicted.
                    Connection::open(server.port, size).send([SAME_KEY].into_iter());
                }
                let figures = server.load(size, fresh, REQUESTS);
                if round >= WARM_UP {
                    for (figure, value) in figures {
                        rounds.add(&format!("{name}: {figure}"), value);
                    }
                }
            }
        }
        report.group(group);
        for name in rounds.names() {
            let unit = if name.ends_with("requests") {
                "/s"
            } else {
                "µs"
            };
            report.row(name, unit, rounds.spread(name));
        }
        let added = |name: &str| rounds.each(|of| of(&format!("{name}: CPU")) - of("bare: CPU"));
        for (case, app, _) in &CASES[1..] {
            if APPS.contains(app) {
                report.row(&format!("CPU added by {case}"), "µs", added(case));
            }
        }
        for case in ["first", "replay"] {
            // The floor is a tenth of the server's time, less than what changes from round to round. So the medians are divided.
            let (ours, floor) = (added(case), added("floor").median);
            let limit = (size == 256 && case == "first").then_some(Limit::AtMost(2.0));
            let ratio = ours.scaled(1.0 / floor);
            report.limited(&format!("{case} / floor"), "×", ratio, limit);
            if APPS.contains(&"idempotent") {
                let theirs = added(&format!("idempotent, {case}"));
                let ratio = theirs.scaled(1.0 / ours.median);
                let limit = (size == 256).then_some(Limit::AtLeast(10.0));
                report.limited(&format!("idempotent, {case} / ours"), "×", ratio, limit);
            }
        }
    }
}

struct Server {
    app: &'static str,
    process: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    port: u16,
    next_key: usize,
}

impl Server {
    fn start(app: &'static str, size: usize) -> Self {
        let mut process = Command::new(env::current_exe().expect("a path"))
            .args(["--serve", app, &size.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a second process");
        let ask = process.stdin.take().expect("a pipe");
        let answers = process.stdout.take().expect("a pipe");
        let mut server = Self {
            app,
            process,
            ask,
            answers: BufReader::new(answers),
            port: 0,
            next_key: 0,
        };
        server.port = server.line() as u16;
        server
    }

    fn line(&mut self) -> f64 {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("an answer");
        line.trim().parse().expect("a number")
    }

    fn ask(&mut self, what: &str) -> f64 {
        writeln!(self.ask, "{what}").expect("a server that listens");
        self.line()
    }

    fn is_full(&mut self) -> bool {
        let records = self.ask("records");
        // Evictions may come a little late.
        (0.9..1.1).contains(&(records / RECORDS as f64))
    }

    /// Sends requests over all connections.
    fn load(&mut self, size: usize, fresh: bool, each: usize) -> [(&'static str, f64); 5] {
        let (port, first_key) = (self.port, self.next_key);
        self.next_key += CONNECTIONS * each;
        let connections: Vec<Connection> = (0..CONNECTIONS)
            .map(|_| Connection::open(port, size))
            .collect();
        let (since, cpu_before) = (Instant::now(), self.ask("cpu"));
        let mut times: Vec<f64> = thread::scope(|scope| {
            let threads = connections
                .into_iter()
                .enumerate()
                .map(|(nth, connection)| {
                    let keys = (0..each).map(move |n| match fresh {
                        true => first_key + nth * each + n,
                        // The number of no fresh key.
                        false => 999_999_999,
                    });
                    scope.spawn(move || connection.send(keys))
                });
            let threads: Vec<_> = threads.collect();
            let times = threads.into_iter();
            times
                .flat_map(|thread| thread.join().expect("answers"))
                .collect()
        });
        let (cpu, took) = (self.ask("cpu") - cpu_before, since.elapsed());
        times.sort_by(f64::total_cmp);
        let count = times.len() as f64;
        let at = |part: f64| times[(count * part) as usize] / 1e3;
        [
            ("CPU", cpu / count / 1e3),
            ("requests", count / took.as_secs_f64()),
            ("p50", at(0.5)),
            ("p99", at(0.99)),
            ("p99.9", at(0.999)),
        ]
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

struct Connection {
    stream: BufReader<TcpStream>,
    head: String,
    body: Vec<u8>,
}

impl Connection {
    fn open(port: u16, size: usize) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        stream.set_nodelay(true).expect("an option of TCP");
        Self {
            stream: BufReader::new(stream),
            head: format!("POST /orders HTTP/1.1\r\nhost: localhost\r\ncontent-length: {size}\r\n"),
            body: vec![b'x'; size],
        }
    }

    /// How long each answer took, in nanoseconds.
    fn send(mut self, keys: impl Iterator<Item = usize>) -> Vec<f64> {
        let mut request = Vec::new();
        let mut answer = vec![0; self.body.len()];
        let mut line = String::new();
        let times = keys.map(|key| {
            request.clear();
            request.extend_from_slice(self.head.as_bytes());
            write!(request, "idempotency-key: {key:09}\r\n\r\n").expect("memory");
            request.extend_from_slice(&self.body);
            let since = Instant::now();
            self.stream.get_mut().write_all(&request).expect("a server");
            for nth in 0.. {
                line.clear();
                self.stream.read_line(&mut line).expect("an answer");
                assert!(nth > 0 || line.starts_with("HTTP/1.1 200"), "{line}");
                if line == "\r\n" {
                    break;
                }
            }
            self.stream.read_exact(&mut answer).expect("a whole answer");
            since.elapsed().as_nanos() as f64
        });
        times.collect()
    }
}

/// The server process. It says its port, and answers the questions on its standard input until that ends.
pub fn serve(app: &str, size: usize) {
    let runtime = on_two_threads();
    let weight = weight(size);
    let max_bytes = RECORDS * weight;
    let (app, records): (Router, Box<dyn Fn() -> u64>) = match app {
        "bare" => (bare().with_state(()), Box::new(|| 0)),
        "floor" => {
            let floor = Floor::new(max_bytes, weight);
            (floored(floor.clone()), Box::new(move || floor.records()))
        }
        "ours" => {
            let storage = memory(max_bytes);
            (
                protected(storage.clone()),
                Box::new(move || storage.records()),
            )
        }
        #[cfg(feature = "peers")]
        "idempotent" => (peers::idempotent(&runtime), Box::new(|| 0)),
        other => panic!("no app is named {other}"),
    };
    let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0)));
    let listener = listener.expect("a free port");
    println!("{}", listener.local_addr().expect("an address").port());
    runtime.spawn(async { axum::serve(listener, app).await });
    for line in io::stdin().lines() {
        match line.expect("a line").as_str() {
            "cpu" => println!("{}", cpu()),
            "records" => println!("{}", records()),
            other => panic!("no question is {other}"),
        }
    }
}
