//! Measures what requests cost with our layer and without, and prints the project's limits beside it. README.md says what each
//! figure is and how to read it.

use std::{
    env,
    process::{Command, exit},
    time::Instant,
};

use tokio::runtime::{self, Runtime};

mod apps;
mod crowd;
mod growth;
mod heap;
mod http;
mod in_process;
mod instructions;
mod measure;
#[cfg(feature = "peers")]
mod peers;
mod redis;
mod report;
#[cfg(feature = "sql")]
mod sql;
#[cfg(feature = "sql")]
mod statements;

use self::{
    measure::busy,
    report::{Machine, Report},
};

/// A part of the measure, by the name that the command line takes.
type Part = (&'static str, fn(&mut Report));

const PARTS: [Part; 7] = [
    // Before anything is dropped that moka frees later.
    ("memory", growth::memory_of_records),
    ("in-process", in_process::run),
    ("http", http::run),
    ("waiters", growth::waiters),
    ("cores", growth::cores),
    // After it the allocator is slower: it has had a million records.
    ("records", growth::records),
    ("instructions", instructions::run),
];

fn main() {
    // cargo adds `--bench`.
    let arguments: Vec<String> = (env::args().skip(1))
        .filter(|argument| argument != "--bench")
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => everything(),
        ["--profile", case] => in_process::repeat(case, 500_000),
        ["--profile", case, count] => in_process::repeat(case, count.parse().expect("a count")),
        ["--serve", app, size] => http::serve(app, size.parse().expect("a size")),
        ["redis"] => redis::run(),
        ["redis", "--profile", case] => redis::repeat(case, 240),
        ["redis", "--profile", case, rounds] => {
            redis::repeat(case, rounds.parse().expect("a count"))
        }
        [database @ ("postgres" | "sqlite")] => sql(database, None),
        [database @ ("postgres" | "sqlite"), "--profile", case] => sql(database, Some(case)),
        [name] => match PARTS.iter().find(|(part, _)| *part == name) {
            Some((_, run)) => {
                if matches!(name, "in-process" | "http") {
                    with_peers(&[name]);
                }
                let mut report = Report::default();
                run(&mut report);
                report.print_limits();
            }
            None => usage(),
        },
        _ => usage(),
    }
}

fn usage() {
    let parts: Vec<&str> = PARTS.iter().map(|(part, _)| *part).collect();
    eprintln!(
        "compare: nothing, one of {}, `redis`, `postgres`, `sqlite`, or `--profile CASE [COUNT]`",
        parts.join(", ")
    );
    exit(2);
}

/// The whole measure; what it finds is written to `results/`.
fn everything() {
    with_peers(&[]);
    let since = Instant::now();
    let mut report = Report::default();
    for (_, run) in PARTS {
        run(&mut report);
    }
    report.print_limits();
    println!("\n{:.0} s", since.elapsed().as_secs_f64());
    report.write(&Machine::of_this_run(busy()));
}

#[cfg(feature = "sql")]
fn sql(database: &str, profiled: Option<&str>) {
    match database {
        "postgres" => sql::postgres(profiled),
        _ => sql::sqlite(profiled),
    }
}

/// Builds this with the feature `sql`, and runs that.
#[cfg(not(feature = "sql"))]
fn sql(database: &str, profiled: Option<&str>) {
    let mut arguments = vec![database];
    arguments.extend(profiled.iter().flat_map(|case| ["--profile", case]));
    exit(run_again(&mut cargo(&["--features", "sql"]), &arguments));
}

/// Builds this with the feature `peers`, runs that, and ends; returns if it has the feature, or if it does not build. cargo has no
/// setting for `--ignore-rust-version`, so the command that people type could not have peers otherwise.
fn with_peers(arguments: &[&str]) {
    if cfg!(feature = "peers") {
        return;
    }
    let cargo = || cargo(&["--features", "peers", "--ignore-rust-version"]);
    match cargo().arg("--no-run").status() {
        Ok(status) if status.success() => {}
        _ => {
            eprintln!("compare: the other libraries do not build here; they are left out");
            return;
        }
    }
    exit(run_again(&mut cargo(), arguments));
}

/// `cargo bench` of this package.
fn cargo(options: &[&str]) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg("bench").arg("--manifest-path");
    cargo.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"));
    cargo.args(options);
    cargo
}

fn run_again(cargo: &mut Command, arguments: &[&str]) -> i32 {
    let status = cargo.arg("--").args(arguments).status();
    status.ok().and_then(|status| status.code()).unwrap_or(1)
}

/// Without threads that wake each other, times change little from round to round.
fn on_one_thread() -> Runtime {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime")
}

fn on_two_threads() -> Runtime {
    let mut builder = runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(2).enable_all().build();
    runtime.expect("a runtime")
}
