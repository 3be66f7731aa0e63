//! The examples, as the processes that a reader starts: what they print is true, and what they promise holds over TCP.

#![allow(
    clippy::disallowed_methods,
    reason = "the examples are processes, which no `Env` drives"
)]

use std::{collections::BTreeMap, process::Stdio};

use futures_util::future::join_all;
use http::Method;
use idempotency_tests::{
    Answer, Call, Example,
    example::{command, refused, until},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    process::Command,
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
    let answers = join_all((0..10).map(|_| order(&orders, ALICE, "ten").send())).await;

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

    let list = get(&orders, "/orders", ALICE).send().await;
    assert_eq!(parsed(&list), json!([parsed(executed)]));

    // What the page shows of the record is what a retry gets.
    let record = get(&orders, &format!("/records/{}", seen["key"]), ALICE);
    let record = parsed(&record.send().await);
    assert_eq!(record["status"], 201);
    assert_eq!(
        record["headers"],
        json!(["content-type: application/json", "location: /orders/1"])
    );
    assert_eq!(record["body"], executed.text());
    assert_eq!(record["kept_for_seconds"], 24 * 3600);
    let location = executed.header("location").unwrap();
    assert_eq!(
        get(&orders, location, ALICE).send().await.body,
        executed.body
    );
}

#[tokio::test]
async fn a_stranger_gets_no_replay_and_a_customer_only_his_own() {
    let orders = Example::start("orders").await;
    let first = order(&orders, ALICE, "shared").send().await;
    assert_eq!(first.code(), 201);

    let stranger = order(&orders, "Bearer guess", "shared").send().await;
    assert_eq!((stranger.code(), stranger.is_replay()), (401, false));
    assert_eq!(stranger.header("www-authenticate"), Some("Bearer"));
    let record = format!("/records/{}", timing(&first)["key"]);
    assert_eq!(
        get(&orders, &record, "Bearer guess").send().await.code(),
        401
    );

    let bob = order(&orders, BOB, "shared").send().await;
    assert_eq!((bob.code(), bob.is_replay()), (201, false));
    assert_eq!(parsed(&bob)["customer"], "bob");
}

#[tokio::test]
async fn the_page_needs_no_network() {
    let orders = Example::start("orders").await;
    let page = orders.call(Method::GET, "/").send().await;
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

    let mut client = TcpStream::connect(orders.address()).await.unwrap();
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
    for example in [
        "orders",
        "opt_in",
        "named_caches",
        "custom_encoder",
        "downstream",
        "manual",
        "streaming",
    ] {
        let output = refused(at_port(example, &port)).await;
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
        let output = refused(at_port("orders", port)).await;
        let says = format!("error: PORT is {port:?}, which is not a port: ");
        assert!(
            output.starts_with(&says) && output.contains("65535"),
            "{output}"
        );
    }
}

fn at_port(example: &str, port: &str) -> Command {
    let mut command = command(example);
    command.env("PORT", port);
    command
}

// ---- calls and answers

fn order(orders: &Example, authorization: &str, key: &str) -> Call {
    let call = orders.post("/orders").key(key).json(COFFEE);
    call.header("authorization", authorization)
}

fn get(orders: &Example, path: &str, authorization: &str) -> Call {
    let call = orders.call(Method::GET, path);
    call.header("authorization", authorization)
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
