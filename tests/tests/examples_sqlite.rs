//! The example `orders_sqlite`.

#![allow(
    clippy::disallowed_methods,
    reason = "the examples are processes, which no `Env` drives"
)]

use idempotency_tests::{
    Answer, Example,
    example::{command, refused},
    sqlite::SqliteFile,
};

async fn start(file: &SqliteFile) -> Example {
    let mut command = command("orders_sqlite");
    command.env("DATABASE_URL", file.url());
    Example::spawn(command).await
}

#[tokio::test]
async fn orders_sqlite_prints_lines_that_do_what_they_say() {
    let file = SqliteFile::new();
    let mut first = start(&file).await;
    let answers = first.try_lines().await;
    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [201, 409]);
    first.says_those_codes(&codes);
    // By another process, and by one that starts after all were killed.
    let other = start(&file).await.try_lines().await;
    first.child.kill().await.expect("it can be killed");
    let later = start(&file).await.try_lines().await;
    for answer in answers[1..].iter().chain(&other).chain(&later) {
        assert!(answer.is_replay(), "{answer:?}");
        assert_eq!(answer.body, answers[0].body);
    }
}

#[tokio::test]
async fn without_a_directory_it_says_so() {
    let mut nowhere = command("orders_sqlite");
    nowhere.env("DATABASE_URL", "sqlite:/no/such/directory/orders.db");
    let error = refused(nowhere).await;
    assert!(error.contains("create its directory"), "{error}");
    assert!(error.contains("because: "), "{error}");
}
