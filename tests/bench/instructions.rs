//! Instructions of a request, counted by valgrind's callgrind. Unlike time they hardly change from run to run.

use std::{
    env,
    process::{Child, Command, Stdio},
};

use crate::{measure::Spread, report::Report};

/// Two runs of so many requests; the difference is without what a process does once.
const COUNTS: [u64; 2] = [500, 1500];

const CASES: [&str; 8] = [
    "bare, key",
    "pass-through",
    "exempt",
    "safe",
    "floor, first",
    "first",
    "replay",
    "mismatch",
];

pub fn run(report: &mut Report) {
    if Command::new("valgrind").arg("--version").output().is_err() {
        println!("\nvalgrind is not installed: instructions are not counted");
        return;
    }
    report.group("instructions");
    for case in CASES {
        let [few, many] = COUNTS.map(|count| count_in(case, count)).map(collected);
        let each = (many - few) / (COUNTS[1] - COUNTS[0]) as f64;
        report.row(case, "", Spread::once(each));
    }
}

fn count_in(case: &str, count: u64) -> Child {
    Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(env::current_exe().expect("a path"))
        .args(["--profile", case, &count.to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .expect("valgrind")
}

/// callgrind's last lines have the total: `==1== Collected : 123`.
fn collected(process: Child) -> f64 {
    let output = process.wait_with_output().expect("an end");
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find(|line| line.contains("Collected :"));
    let total = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    total.unwrap_or_else(|| panic!("callgrind counted nothing:\n{text}"))
}
