//! The example `orders_redis`, and the script that shows it.

#![allow(
    clippy::disallowed_methods,
    reason = "the examples are processes, which no `Env` drives"
)]

use std::{path::Path, process::Stdio, time::Duration};

use idempotency_tests::{
    Answer, Example,
    example::{command, executable, refused, until},
    redis::Redis,
};
use tokio::{process::Command, time::timeout};

#[tokio::test]
async fn orders_redis_prints_lines_that_do_what_they_say() {
    let redis = Redis::start();
    let start = async || {
        let mut command = command("orders_redis");
        command.env("REDIS_URL", redis.url());
        Example::spawn(command).await
    };
    let examples = [start().await, start().await];
    let answers = examples[0].try_lines().await;
    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [201, 409]);
    examples[0].says_those_codes(&codes);
    // Also by the other process.
    for answer in answers[1..].iter().chain(&examples[1].try_lines().await) {
        assert!(answer.is_replay(), "{answer:?}");
        assert_eq!(answer.body, answers[0].body);
    }
}

#[tokio::test]
async fn without_a_redis_it_says_so() {
    let mut nowhere = command("orders_redis");
    nowhere.env("REDIS_URL", "redis://:hunter2@127.0.0.1:1");
    let error = refused(nowhere).await;
    assert!(
        error.starts_with("error: Redis can't be reached"),
        "{error}"
    );
    assert!(error.contains("because: "), "{error}");
    assert!(!error.contains("hunter2"), "{error}");
}

#[tokio::test]
async fn the_script_shows_one_execution_of_each_order() {
    let examples = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/examples"));
    let mut script = Command::new("bash");
    script
        .arg(examples.join("orders_redis/show.sh"))
        .env("ORDERS_REDIS", executable("orders_redis"))
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = timeout(Duration::from_secs(110), script.output()).await;
    let output = output.expect("an end").expect("bash runs");
    let shown = String::from_utf8(output.stdout).expect("UTF-8");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{shown}\n{said}");

    let answers: Vec<_> = shown
        .lines()
        .filter(|line| line.starts_with("at "))
        .collect();
    assert_eq!(answers.len(), 7, "{shown}\n{said}");
    let (first, second) = answers.split_at(4);
    let orders = |answers: &[&str]| {
        let orders = answers
            .iter()
            .map(|line| line.split_once(", ").expect("a body").1.to_owned());
        orders.collect::<std::collections::BTreeSet<_>>()
    };
    let made = |answers: &[&str]| {
        answers
            .iter()
            .filter(|line| line.contains(": 201, "))
            .count()
    };
    assert_eq!((made(first), orders(first).len()), (1, 1), "{shown}");
    assert_eq!(second[0], "at one: no answer", "{shown}");
    assert_eq!(
        (made(&second[1..]), orders(&second[1..]).len()),
        (1, 1),
        "{shown}"
    );
    assert!(second[1].starts_with("at two: 201, "), "{shown}");
}

// ---- production

async fn production(redis: &Redis) -> Example {
    let mut command = command("production");
    command.env("REDIS_URL", redis.url());
    Example::spawn(command).await
}

#[tokio::test]
async fn production_prints_lines_that_do_what_they_say() {
    let redis = Redis::start();
    let example = production(&redis).await;
    let answers = example.try_lines().await;
    let codes: Vec<_> = answers.iter().map(Answer::code).collect();
    assert_eq!(codes, [201, 201, 400, 401]);
    example.says_those_codes(&codes);
    assert!(answers[1].is_replay());
    assert_eq!(answers[1].body, answers[0].body);
}

#[tokio::test]
async fn production_loses_no_order_when_it_is_stopped() {
    let redis = Redis::start();
    let mut example = production(&redis).await;
    let order = |example: &Example, key: &str| {
        let call = example.post("/orders").key(key);
        call.header("authorization", "Bearer 42-monday")
    };
    // A client that leaves while its order is under way.
    let leaves = tokio::spawn(order(&example, "order-1").send());
    until(&mut example.stdout, |line| line == "an order begins").await;
    leaves.abort();
    let pid = example.child.id().expect("it runs").to_string();
    let kill = Command::new("kill").arg(&pid).status().await;
    assert!(kill.expect("kill runs").success());
    let status = timeout(Duration::from_secs(60), example.child.wait()).await;
    assert!(status.expect("it ends").expect("its status").success());

    let again = production(&redis).await;
    let retry = order(&again, "order-1").send().await;
    assert_eq!((retry.code(), retry.text()), (201, "order 1\n"));
    assert!(retry.is_replay(), "the order was recorded before the end");
}
