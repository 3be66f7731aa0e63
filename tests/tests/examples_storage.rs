//! The example with a storage of its own, as the process that a reader starts.

#![allow(
    clippy::disallowed_methods,
    reason = "the examples are processes, which no `Env` drives"
)]

use std::path::PathBuf;

use idempotency_tests::{Answer, Example, example::command};

#[tokio::test]
async fn custom_storage_prints_lines_that_do_what_they_say_and_keeps_its_records() {
    let records = Directory::new();
    let start = async || {
        let mut command = command("custom_storage");
        command.env("RECORDS", &records.0);
        Example::spawn(command).await
    };
    let payments = start().await;
    let answers = payments.try_lines().await;
    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [200, 409, 200]);
    payments.says_those_codes(&codes);
    assert!(answers[1].is_replay());
    assert_eq!(answers[1].body, answers[0].body);
    assert_ne!(answers[2].body, answers[0].body);
    drop(payments);

    // Another process finds what the first one recorded.
    let again = start().await.try_lines().await;
    assert!(again.iter().all(Answer::is_replay));
    assert_eq!(again[0].body, answers[0].body);
    assert_eq!(again[2].body, answers[2].body);

    // One record that is damaged refuses its key, and no other.
    let mut files: Vec<_> = std::fs::read_dir(&records.0)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(files.len(), 2);
    files.sort();
    std::fs::write(&files[0], [u8::MAX; 100]).unwrap();
    let damaged = start().await.try_lines().await;
    let mut codes: Vec<_> = damaged[1..].iter().map(Answer::code).collect();
    codes.sort_unstable();
    assert_eq!(codes, [409, 503]);
}

/// A fresh directory, until it is dropped.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("records-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left lies in the target directory.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
