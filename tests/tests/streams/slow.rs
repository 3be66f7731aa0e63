//! A slow client, over many leases.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    routing::post,
};
use futures_util::{StreamExt, stream};
use idempotency_axum::{Config, Env, IdempotencyLayer, LockPolicy, MemoryStorage, Operation};
use idempotency_tests::{Events, FaultyStorage, Protocol, Runs, Server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};

use crate::{Play, assert_not_replayable, assert_replay};

const LEASE: Duration = Duration::from_millis(900);

/// More than the buffers between server and client hold, so that a client that reads slowly is waited for.
const ANSWER: usize = 768 << 10;

fn answer() -> Vec<u8> {
    (0..ANSWER).map(|byte| (byte % 251) as u8).collect()
}

/// A connection that takes in hardly more than is read.
async fn connect(server: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.connect(server).await.unwrap()
}

/// Reads a byte at a time, and takes its time: longer than three leases for the first bytes. Then the rest.
async fn read_slowly(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..12 {
        tokio::time::sleep(LEASE / 3).await;
        bytes.push(stream.read_u8().await.unwrap());
    }
    bytes
}

/// The body of an answer in chunks.
fn unchunked(answer: &[u8]) -> Vec<u8> {
    let end = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|is| is == what);
    let mut rest = &answer[end(answer, b"\r\n\r\n").unwrap() + 4..];
    let mut body = Vec::new();
    loop {
        let line = end(rest, b"\r\n").unwrap();
        let length = std::str::from_utf8(&rest[..line]).unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        rest = &rest[line + 2..];
        if length == 0 {
            assert_eq!(rest, b"\r\n");
            return body;
        }
        body.extend_from_slice(&rest[..length]);
        rest = rest[length..].strip_prefix(b"\r\n").unwrap();
    }
}

struct Slow {
    server: Server,
    layer: IdempotencyLayer,
    runs: Runs,
    events: Events,
}

impl Slow {
    fn open(limit: usize) -> Self {
        let (runs, events) = (Runs::new(), Events::new());
        let lock = LockPolicy::default().ttl(LEASE).timeout(Duration::ZERO);
        let config = Config::default()
            .lock(lock)
            .max_response_body(limit)
            .observer(events.clone());
        let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
        let handler = {
            let runs = runs.clone();
            async move || {
                runs.next();
                // After a pause, so that it is not there at once.
                let first = stream::once(async {
                    tokio::task::yield_now().await;
                    Bytes::new()
                });
                let frames: Vec<_> = answer()
                    .chunks(8 << 10)
                    .map(Bytes::copy_from_slice)
                    .collect();
                Body::from_stream(first.chain(stream::iter(frames)).map(Ok::<_, Infallible>))
            }
        };
        let router = Router::new().route("/slow", post(handler));
        Self {
            server: Server::start_without_slack(router.layer(layer.clone())),
            layer,
            runs,
            events,
        }
    }

    async fn ask_slowly(&self) -> TcpStream {
        let mut stream = connect(self.server.address()).await;
        let request = b"POST /slow HTTP/1.1\r\nHost: shop\r\nIdempotency-Key: abc\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.unwrap();
        stream
    }

    async fn retry(&self) -> idempotency_tests::Answer {
        self.server.post("/slow").key("abc").send().await
    }

    fn assert_undisturbed(&self) {
        assert_eq!(self.runs.count(), 1);
        assert_eq!(
            (self.events.count("lost"), self.events.count("reclaimed")),
            (0, 0)
        );
        assert_eq!(self.layer.engine().running(), 0);
    }
}

#[tokio::test]
async fn a_slow_client_does_not_hold_up_the_record() {
    let slow = Slow::open(1 << 20);
    let mut stream = slow.ask_slowly().await;
    slow.events.until("completed", 1).await;
    // The first client has not read a byte.
    assert_replay(&slow.retry().await, &answer());

    let mut all = read_slowly(&mut stream).await;
    assert_replay(&slow.retry().await, &answer());
    stream.read_to_end(&mut all).await.unwrap();
    assert!(unchunked(&all) == answer(), "every byte in its place");
    slow.assert_undisturbed();
}

#[tokio::test]
async fn a_slow_client_of_an_answer_over_the_limit() {
    let slow = Slow::open(64 << 10);
    let mut stream = slow.ask_slowly().await;
    slow.events.until("tombstoned", 1).await;
    assert_not_replayable(&slow.retry().await);

    let mut all = read_slowly(&mut stream).await;
    assert_not_replayable(&slow.retry().await);
    stream.read_to_end(&mut all).await.unwrap();
    assert!(unchunked(&all) == answer(), "every byte in its place");
    slow.assert_undisturbed();
}

/// The answer is made slowly: its claim is renewed for as long as that takes, whether anybody reads or not.
async fn a_slow_handler_keeps_its_claim(protocol: Protocol) {
    let (env, clock) = Env::simulated(1);
    let lease = Duration::from_secs(30);
    let memory = MemoryStorage::builder().env(env.clone()).build();
    let storage = FaultyStorage::new(memory);
    let lock = LockPolicy::default().ttl(lease).timeout(Duration::ZERO);
    let play = Play::new(Config::default().env(env.clone()).lock(lock.clone()));
    let stage = play.on(storage.clone()).await;
    // Another server with the same storage.
    let other = Play::new(Config::default().env(env).lock(lock));
    let other = other.on(storage.clone()).await;

    let mut first = stage.call(protocol).open().await;
    for renewal in 1..=10 {
        // A third of a lease at a time, as the keeper renews.
        while clock.sleeping() == 0 {
            tokio::task::yield_now().await;
        }
        clock.advance(lease / 3);
        storage.called(Operation::Renew, renewal).await;
        let elsewhere = other.call(protocol).send().await;
        assert_eq!(elsewhere.problem().as_deref(), Some("in-flight"));
    }
    stage.feed.data("done");
    assert_eq!(first.read(4).await, "done");
    stage.feed.end();
    assert_eq!(first.finish().await.whole(), "");
    stage.assert_replays(protocol, b"done").await;
    assert_replay(&other.call(protocol).send().await, b"done");
    assert_eq!((stage.runs.count(), other.runs.count()), (1, 0));
    assert_eq!(stage.events.count("reclaimed"), 0);
}

over_both!(a_slow_handler_keeps_its_claim);
