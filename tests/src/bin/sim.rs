//! `tests/run --sim SEED [STEPS]`: one world with its trace, or worlds from a seed on until so many steps are done.

use std::{env, process::ExitCode};

use idempotency_tests::sim;

fn main() -> ExitCode {
    let numbers: Vec<_> = env::args().skip(1).map(|it| it.parse::<u64>()).collect();
    let (counts, findings) = match numbers[..] {
        [Ok(seed)] => {
            let report = sim::run(seed, true);
            print!("{}", report.trace);
            println!("{} steps", report.steps);
            (report.counts, report.findings)
        }
        [Ok(seed), Ok(steps)] => {
            let explored = sim::explore(seed, steps);
            println!("{} steps in {} worlds", explored.steps, explored.worlds);
            let missing = explored.missing();
            if explored.findings.is_empty() && !missing.is_empty() {
                println!("never reached: {missing:?}");
                return ExitCode::FAILURE;
            }
            (explored.counts, explored.findings)
        }
        _ => {
            eprintln!("usage: tests/run --sim SEED [STEPS]");
            return ExitCode::from(2);
        }
    };
    for (what, count) in &counts {
        println!("{count:>10}  {what}");
    }
    for finding in &findings {
        println!("VIOLATION  {finding}");
    }
    match findings.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
