//! The example `orders_postgres`.

#![allow(
    clippy::disallowed_methods,
    reason = "the examples are processes, which no `Env` drives"
)]

use idempotency_tests::{
    Answer, Example,
    example::{command, refused},
    postgres::Postgres,
};

async fn start(server: &Postgres) -> Example {
    let mut command = command("orders_postgres");
    command.env("DATABASE_URL", server.url());
    Example::spawn(command).await
}

#[tokio::test]
async fn orders_postgres_prints_lines_that_do_what_they_say() {
    let server = Postgres::start();
    let mut first = start(&server).await;
    let answers = first.try_lines().await;
    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [201, 409]);
    first.says_those_codes(&codes);
    // By another process, and by one that starts after all were killed.
    let other = start(&server).await.try_lines().await;
    first.child.kill().await.expect("it can be killed");
    let later = start(&server).await.try_lines().await;
    for answer in answers[1..].iter().chain(&other).chain(&later) {
        assert!(answer.is_replay(), "{answer:?}");
        assert_eq!(answer.body, answers[0].body);
    }
}

#[tokio::test]
async fn without_a_server_it_says_so() {
    let mut nowhere = command("orders_postgres");
    nowhere.env("DATABASE_URL", "postgres://shop:hunter2@127.0.0.1:1/shop");
    let error = refused(nowhere).await;
    assert!(
        error.starts_with("error: PostgreSQL can't be reached"),
        "{error}"
    );
    assert!(!error.contains("hunter2"), "{error}");
}
