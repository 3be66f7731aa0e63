//! The smaller examples, as the processes that a reader starts: what they print is true, and what they promise holds over TCP.

#![allow(
    clippy::disallowed_methods,
    reason = "the examples are processes, which no `Env` drives"
)]

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;
use http::Method;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use idempotency_tests::{
    Answer, Example,
    example::{command, output, refused},
};
use tokio::net::TcpStream;

fn codes(answers: &[Answer]) -> Vec<u16> {
    answers.iter().map(Answer::code).collect()
}

fn replays(answers: &[Answer]) -> Vec<bool> {
    answers.iter().map(Answer::is_replay).collect()
}

// ---- named_caches

#[tokio::test]
async fn named_caches_prints_lines_that_do_what_they_say() {
    let example = Example::start("named_caches").await;
    let answers = example.try_lines().await;
    assert_eq!(codes(&answers), [200, 409, 200, 409, 200]);
    example.says_those_codes(&codes(&answers));
    assert_eq!(replays(&answers), [false, true, false, true, false]);
    assert_eq!(answers[1].text(), "run 1: paid\n");
    assert_eq!(answers[3].text(), "run 2: mailed\n");
    let caches = "payments: 1 records, 0 forgotten\nmails: 1 records, 0 forgotten\n";
    assert_eq!(answers[4].text(), caches);
}

#[tokio::test]
async fn a_flood_of_mails_pushes_out_mails_and_no_payment() {
    let example = Example::start("named_caches").await;
    let pay = || example.post("/payments").key("payment-1").send();
    assert_eq!(pay().await.code(), 200);
    for mail in 0..100 {
        let mail = example.post("/mails").key(format!("mail-{mail}"));
        assert_eq!(mail.send().await.code(), 200);
    }
    let caches = example.call(Method::GET, "/caches").send().await;
    let lines: Vec<_> = caches.text().lines().collect();
    assert_eq!(lines[0], "payments: 1 records, 0 forgotten");
    let [kept, forgotten] = numbers(lines[1]);
    assert!(kept > 0 && kept < 50 && forgotten > 0, "{}", lines[1]);
    assert!(pay().await.is_replay());
}

/// The two numbers of a line like `mails: 9 records, 91 forgotten`.
fn numbers(line: &str) -> [u32; 2] {
    let numbers: Vec<_> = line
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    numbers.try_into().expect("two numbers")
}

#[tokio::test]
async fn a_misspelt_cache_is_an_error_before_the_server_listens() {
    let mut misspelt = command("named_caches");
    misspelt.arg("misspelt");
    let error = refused(misspelt).await;
    assert!(
        error.contains("misspelt` uses the cache \"mail\""),
        "{error}"
    );
    assert!(error.contains("it has: mails"), "{error}");
}

// ---- custom_encoder

#[tokio::test]
async fn custom_encoder_prints_lines_that_do_what_they_say() {
    let example = Example::start("custom_encoder").await;
    let answers = example.try_lines().await;
    assert_eq!(codes(&answers), [201, 201, 201, 422, 422, 201]);
    example.says_those_codes(&codes(&answers));
    assert_eq!(replays(&answers), [false, true, true, false, false, false]);
    assert_eq!(answers[2].text(), "order 1: lamp for 450\n");
    for reused in &answers[3..=4] {
        assert_eq!(reused.problem().as_deref(), Some("key-reused"));
    }
    assert_eq!(answers[5].text(), "order 2: lamp for 450\n");
}

/// What is not a JSON object is compared as it is, and so is what differs in more than the order of its members.
#[tokio::test]
async fn custom_encoder_leaves_out_nothing_but_the_stamp() {
    let example = Example::start("custom_encoder").await;
    let send = async |key: &'static str, body: &'static str| {
        example.post("/orders").key(key).json(body).send().await
    };
    for (key, body, same, other) in [
        ("array", "[1,2]", "[1,2]", "[2,1]"),
        ("broken", "{\"item\"", "{\"item\"", "{\"item\" "),
        (
            "nested",
            r#"{"item":"a","amount":1,"to":{"sent_at":1,"name":"x"}}"#,
            r#"{"to":{"name":"x","sent_at":1},"amount":1,"item":"a","sent_at":9}"#,
            r#"{"item":"a","amount":1,"to":{"sent_at":2,"name":"x"}}"#,
        ),
    ] {
        let first = send(key, body).await;
        assert!(!first.is_replay());
        let retry = send(key, same).await;
        assert!(retry.is_replay(), "{key}: {retry:?}");
        assert_eq!(retry.body, first.body);
        let other = send(key, other).await;
        assert_eq!(other.problem().as_deref(), Some("key-reused"), "{key}");
    }
}

// ---- downstream

#[tokio::test]
async fn downstream_prints_lines_that_do_what_they_say() {
    let example = Example::start("downstream").await;
    let answers = example.try_lines().await;
    assert_eq!(codes(&answers), [500, 200, 200, 200, 200, 200]);
    example.says_those_codes(&codes(&answers));
    assert_eq!(replays(&answers), [false, false, true, false, false, false]);
    assert_eq!(answers[1].text(), "paid with charge 1\n");
    assert_eq!(answers[2].text(), "paid with charge 1\n");
    assert_eq!(answers[3].text().lines().count(), 1, "it was charged once");
    assert_eq!(answers[4].text(), "paid with charge 2\n");
    let charges: BTreeSet<_> = answers[5].text().lines().collect();
    assert_eq!(charges.len(), 2, "two charges under two keys");
}

/// Another process, as after a crash or a deployment, asks the provider under the same key.
#[tokio::test]
async fn downstream_derives_the_same_key_in_every_process_and_another_for_every_caller() {
    let mut keys = Vec::new();
    for _ in 0..2 {
        let example = Example::start("downstream").await;
        for caller in ["alice", "bob"] {
            let pay = example.post("/payments").key("payment-1").body("450");
            pay.header("authorization", caller).send().await;
        }
        let charges = example.call(Method::GET, "/charges").send().await;
        keys.push(charges.text().to_owned());
    }
    assert_eq!(keys[0], keys[1]);
    let of_callers: BTreeSet<_> = keys[0].lines().collect();
    assert_eq!(of_callers.len(), 2, "{}", keys[0]);
    assert!(
        !keys[0].contains("payment-1"),
        "the client's key stays here"
    );
}

// ---- engine_only

#[tokio::test]
async fn engine_only_ships_every_parcel_once() {
    let output = output(command("engine_only")).await;
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}");
    assert!(output.stderr.is_empty(), "it logs {:?}", output.stderr);
    let lines: Vec<_> = stdout.lines().collect();
    let (last, deliveries) = lines.split_last().unwrap();
    assert_eq!(*last, "7 deliveries, 3 parcels");

    // Which worker had what is chance.
    let mut parcels = BTreeMap::new();
    let mut told = BTreeMap::<_, Vec<_>>::new();
    for line in deliveries {
        let (_, delivery) = line.split_once(": ").unwrap();
        let (message, what) = delivery.split_once(' ').unwrap();
        let (what, parcel) = what.split_once(" as ").unwrap_or((what, ""));
        told.entry(message).or_default().push(what);
        if !parcel.is_empty() {
            let parcel = parcel.trim_end_matches(" already");
            assert_eq!(parcels.entry(message).or_insert(parcel), &parcel, "{line}");
        }
    }
    assert_eq!(told["m-1"], ["shipped", "was shipped"]);
    assert_eq!(
        told["m-2"],
        [
            "failed: the carrier does not answer",
            "shipped",
            "was shipped"
        ]
    );
    assert_eq!(told["m-3"], ["shipped", "was shipped"]);
    let parcels: BTreeSet<_> = parcels.into_values().collect();
    assert_eq!(parcels.len(), 3, "each has a parcel of its own");
}

// ---- manual

#[tokio::test]
async fn manual_prints_lines_that_do_what_they_say() {
    let example = Example::start("manual").await;
    let answers = example.try_lines().await;
    assert_eq!(codes(&answers), [201, 200, 201, 303, 200, 200]);
    example.says_those_codes(&codes(&answers));
    let [order, again, form, redirect, call_1, call_2] = &answers[..] else {
        panic!("{} answers", answers.len());
    };
    assert_eq!(again.body, order.body);
    assert_eq!(again.header("location"), order.header("location"));
    assert_eq!(order.header("x-ordered-before"), None);
    assert_eq!(again.header("x-ordered-before"), Some("true"));
    assert_eq!(redirect.header("location"), form.header("location"));
    assert_eq!(redirect.text(), "");
    assert_eq!((call_1.text(), call_2.text()), ("call 1\n", "call 2\n"));

    // Each line once more: what was replaced by an answer that is stored, and what was not.
    let answers = example.try_lines().await;
    assert_eq!(codes(&answers), [200, 200, 303, 303, 200, 200]);
    assert_eq!(answers[0].body, order.body);
    assert_eq!(answers[2].header("location"), form.header("location"));
    let calls: Vec<_> = answers[4..].iter().map(Answer::text).collect();
    assert_eq!(calls, ["call 3\n", "call 4\n"]);
}

#[tokio::test]
async fn manual_conflict_runs_come_one_after_another() {
    const RETRIES: usize = 20;
    let example = Example::start("manual").await;
    let call = || example.post("/progress").key("upload").send();
    assert_eq!(call().await.text(), "call 1\n");
    let answers = join_all((0..RETRIES).map(|_| call())).await;
    let calls: BTreeSet<_> = answers.iter().map(Answer::text).collect();
    assert_eq!(calls.len(), RETRIES, "{calls:?}");
    assert_eq!(call().await.text(), format!("call {}\n", RETRIES + 2));
}

// ---- streaming

#[tokio::test]
async fn streaming_prints_lines_that_do_what_they_say() {
    let example = Example::start("streaming").await;
    let answers = example.try_lines().await;
    assert_eq!(codes(&answers), [200, 200, 200, 409]);
    example.says_those_codes(&codes(&answers));
    assert_eq!(replays(&answers), [false, true, false, false]);
    assert_eq!(answers[0].text().lines().count(), 5);
    assert_eq!(answers[1].body, answers[0].body);
    assert_eq!(
        answers[1].header("content-type"),
        Some("application/x-ndjson")
    );
    assert_eq!(answers[2].text().lines().count(), 100);
    assert_eq!(answers[3].problem().as_deref(), Some("not-replayable"));
}

/// A frame is a chunk on the wire: the rows were sent when they were made and not all together.
#[tokio::test]
async fn streaming_sends_a_frame_for_each_row() {
    let example = Example::start("streaming").await;
    let stream = TcpStream::connect(example.address()).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = http::Request::post("/exports/5")
        .header("host", "streaming")
        .header("idempotency-key", "export")
        .body(Empty::<bytes::Bytes>::new())
        .unwrap();
    let mut body = sender.send_request(request).await.unwrap().into_body();
    let mut frames = Vec::new();
    while let Some(frame) = body.frame().await {
        frames.push(frame.unwrap().into_data().unwrap());
    }
    connection.abort();
    assert_eq!(frames.len(), 5);
    assert!(frames.iter().all(|frame| frame.ends_with(b"}\n")));

    let retry = example.post("/exports/5").key("export").send().await;
    assert_eq!((retry.code(), retry.is_replay()), (200, true));
    assert_eq!(retry.body, frames.concat());
}
