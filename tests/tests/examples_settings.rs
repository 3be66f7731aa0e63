//! The example `settings`, as the process that a reader starts: its file, another file, and the environment over them.

#![allow(
    clippy::disallowed_methods,
    reason = "the examples are processes, which no `Env` drives"
)]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process,
};

use idempotency_tests::{
    Answer, Example,
    example::{command, refused},
    redis::Redis,
};
use tokio::process::Command;

fn with(variables: &[(&str, &str)]) -> Command {
    let mut command = command("settings");
    command.envs(variables.iter().copied());
    command
}

#[tokio::test]
async fn settings_prints_lines_that_do_what_they_say() {
    let example = Example::start("settings").await;
    let answers = example.try_lines().await;
    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [200, 200, 400, 200, 200]);
    example.says_those_codes(&codes);
    assert!(answers[1].is_replay());
    assert_eq!(answers[1].body, answers[0].body);

    // Each line once more: only what is exempt runs again.
    let again = example.try_lines().await;
    let bodies = |answers: &[Answer]| [0, 1, 3, 4].map(|line: usize| answers[line].body.clone());
    let same: Vec<_> = bodies(&answers)
        .iter()
        .zip(bodies(&again))
        .map(|(first, again)| *first == again)
        .collect();
    assert_eq!(same, [true, true, true, false]);
    assert!(again[3].is_replay());
}

#[tokio::test]
async fn the_environment_overrides_the_file() {
    let variables = [
        ("IDEMPOTENCY__CONFLICT_STATUS", "208"),
        ("IDEMPOTENCY__MODE", "exempt"),
    ];
    let example = Example::spawn(with(&variables)).await;
    for code in [200, 208] {
        let answer = example.post("/payments").key("a").send().await;
        assert_eq!(answer.code(), code);
    }
}

#[tokio::test]
async fn the_environment_moves_records_and_locks_to_redis() {
    let redis = Redis::start();
    let location = redis.url();
    let storage = [
        ("IDEMPOTENCY__STORAGE__CLASS", "redis"),
        ("IDEMPOTENCY__STORAGE__LOCATION", &location),
        ("IDEMPOTENCY__STORAGE__NAME", "shop"),
    ];
    let lock = [
        ("IDEMPOTENCY__LOCK__CLASS", "redis"),
        ("IDEMPOTENCY__LOCK__LOCATION", &location),
        ("IDEMPOTENCY__LOCK__NAME", "MyLock"),
    ];
    for (variables, name) in [
        (storage.to_vec(), "shop:"),
        ([storage, lock].concat(), "shop:cache:"),
    ] {
        let processes = [
            Example::spawn(with(&variables)).await,
            Example::spawn(with(&variables)).await,
        ];
        let key = format!("payment in {name}");
        let first = processes[0].post("/payments").key(&key).send().await;
        assert_eq!((first.code(), first.is_replay()), (200, false));
        let retry = processes[1].post("/payments").key(&key).send().await;
        assert!(retry.is_replay(), "{retry:?}");
        assert_eq!(retry.body, first.body);
        let names: Vec<String> = redis.ask(&["KEYS", "*"]).await;
        assert_eq!(names.len(), 1, "{names:?}");
        assert!(names[0].starts_with(name), "{names:?}");
        let _: String = redis.ask(&["FLUSHALL"]).await;
    }
}

#[tokio::test]
async fn another_file_can_be_named() {
    let file = File::new("header = \"x-key\"\nstorages = { mails = \"memory\" }");
    let example = Example::spawn(with(&[("SETTINGS", file.path())])).await;
    for code in [200, 409] {
        let answer = example.post("/mails").header("x-key", "a").send().await;
        assert_eq!(answer.code(), code);
    }
}

#[tokio::test]
async fn a_mistake_ends_it_with_the_field_and_what_it_can_be() {
    for (variables, begins, says) in [
        (
            [("IDEMPOTENCY__LOCK__TIMEOUT", "soon")],
            "error: `lock.timeout`: ",
            "expected a duration such as \"30s\"",
        ),
        (
            [("IDEMPOTENCY__LOCK__TIMEOT", "5s")],
            "error: `lock.timeot`: ",
            "there is no such field",
        ),
        (
            [("IDEMPOTENCY__LOCK__CLASS", "redis")],
            "error: `lock.location`: ",
            "host[:port]",
        ),
        (
            [("IDEMPOTENCY__STORAGE", "redis://:hunter2@cache")],
            "error: `storage`: ",
            "\"memory\"",
        ),
    ] {
        let error = refused(with(&variables)).await;
        assert!(error.starts_with(begins) && error.contains(says), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}

#[tokio::test]
async fn a_cache_that_the_file_lacks_is_named_with_those_that_there_are() {
    let file = File::new("[storages]\norders = \"memory\"");
    let error = refused(with(&[("SETTINGS", file.path())])).await;
    assert!(error.contains("\"mails\""), "{error}");
    assert!(error.contains("default, orders"), "{error}");
}

/// A settings file, for as long as the test runs.
struct File(PathBuf);

impl File {
    fn new(text: &str) -> Self {
        let name = format!("settings-{}-{:p}.toml", process::id(), text.as_ptr());
        let path = env::temp_dir().join(name);
        fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        Path::to_str(&self.0).unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
