//! Compression makes a stream of every answer. Inside ours, what it made is recorded; outside, what the handler gave.

use idempotency_axum::Config;
use idempotency_tests::{Answer, Call, Protocol};
use tower_http::compression::CompressionLayer;

use crate::{Play, Stage, assert_replay, impatient};

over_both!(
    inside_what_it_made_is_replayed,
    inside_of_a_slow_answer,
    outside_the_plain_answer_is_recorded,
);

const GZIP: &[u8] = &[0x1f, 0x8b];
const LINE: &str = "one order, and one more order\n";

fn config() -> Config {
    Config::default().lock(impatient())
}

/// An answer that is worth it.
fn feed_all(stage: &Stage) -> String {
    for _ in 0..2000 {
        stage.feed.data(LINE);
    }
    stage.feed.end();
    LINE.repeat(2000)
}

fn accepting(stage: &Stage, protocol: Protocol, encoding: &str) -> Call {
    stage.call(protocol).header("accept-encoding", encoding)
}

#[track_caller]
fn assert_compressed(answer: &Answer, plain: &str) {
    assert_eq!(answer.header("content-encoding"), Some("gzip"));
    assert!(answer.body.starts_with(GZIP));
    assert!(answer.body.len() < plain.len() / 10);
    // A gzip file ends with the length of what is in it, RFC 1952 section 2.3.1.
    let length = u32::try_from(plain.len()).unwrap().to_le_bytes();
    assert!(answer.body.ends_with(&length), "it is whole");
}

fn inside() -> Play {
    Play {
        inside: |router| router.layer(CompressionLayer::new()),
        ..Play::new(config())
    }
}

async fn inside_what_it_made_is_replayed(protocol: Protocol) {
    let stage = inside().open().await;
    let plain = feed_all(&stage);
    let first = accepting(&stage, protocol, "gzip").send().await;
    assert_eq!((first.code(), first.is_replay()), (200, false));
    assert_compressed(&first, &plain);

    let retry = accepting(&stage, protocol, "gzip").send().await;
    assert_replay(&retry, &first.body);
    assert_eq!(retry.header("content-encoding"), Some("gzip"));
    assert_eq!(retry.header("vary"), first.header("vary"));
    assert_eq!(stage.runs.count(), 1);
}

/// The handler makes a pause, so the compressed answer has to be waited for.
async fn inside_of_a_slow_answer(protocol: Protocol) {
    let stage = inside().open().await;
    stage.feed.data(LINE);
    let first = accepting(&stage, protocol, "gzip").open().await;
    stage.feed.until_taken(1).await;
    stage.assert_in_flight(protocol).await;
    let plain = format!("{LINE}{}", feed_all(&stage));
    let first = first.answer().await.unwrap();
    assert_compressed(&first, &plain);
    let retry = accepting(&stage, protocol, "gzip").send().await;
    assert_replay(&retry, &first.body);
    assert_eq!(retry.header("content-encoding"), Some("gzip"));
}

async fn outside_the_plain_answer_is_recorded(protocol: Protocol) {
    let play = Play {
        around: |router| router.layer(CompressionLayer::new()),
        ..Play::new(config())
    };
    let stage = play.open().await;
    let first = accepting(&stage, protocol, "gzip").open().await;
    let plain = feed_all(&stage);
    let first = first.answer().await.unwrap();
    assert_eq!((first.code(), first.is_replay()), (200, false));
    assert_compressed(&first, &plain);

    let retry = accepting(&stage, protocol, "identity").send().await;
    assert_replay(&retry, plain.as_bytes());
    assert_eq!(retry.header("content-encoding"), None);
    let retry = accepting(&stage, protocol, "gzip").send().await;
    assert!(retry.is_replay());
    assert_compressed(&retry, &plain);
    assert_eq!(stage.runs.count(), 1);
}
