//! Clients that mean no good, over raw sockets: no panic, no hang, no 500 of ours, no operation twice, and others are served
//! meanwhile.
//!
//! How long a head may take is the server's matter, not the middleware's: see `header_read_timeout` of hyper. What the
//! middleware answers for is that a request which is not whole yet holds no claim.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::BTreeMap,
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use axum::{Router, body::Bytes, extract::State, routing::post};
use futures_util::{
    StreamExt,
    future::{join_all, poll_immediate},
    stream,
};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use idempotency_axum::{
    Config, IdempotencyHandler, IdempotencyKey, IdempotencyLayer, KeyPolicy, LockPolicy,
    MemoryStorage,
};
use idempotency_tests::{Events, Gate, PATIENCE, Runs, Server};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

/// Knows how much the process has allocated. nextest gives each test a process of its own.
struct Measuring;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Measuring {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Measuring = Measuring;

const LIMIT: usize = 1000;

#[derive(Clone)]
struct Shop {
    runs: Runs,
    gate: Gate,
    events: Events,
    layer: IdempotencyLayer,
    memory: MemoryStorage,
}

impl Shop {
    async fn open(config: Config) -> (Self, Server) {
        let (events, memory) = (Events::new(), MemoryStorage::new());
        let config = config.max_request_body(LIMIT).observer(events.clone());
        let layer = IdempotencyLayer::enforce(memory.clone()).config(config);
        let shop = Self {
            runs: Runs::new(),
            gate: Gate::new(),
            events,
            layer: layer.clone(),
            memory,
        };
        let optional = order.idempotency_key(KeyPolicy::optional());
        let router = Router::new()
            .route("/orders", post(order))
            .route("/optional", post(optional))
            .route("/gated", post(gated))
            .layer(layer)
            .with_state(shop.clone());
        (shop, Server::start(router).await)
    }

    /// Nothing runs, waits or is claimed.
    fn assert_quiet(&self) {
        let engine = self.layer.engine();
        let left = (engine.running(), engine.waiting(), self.memory.claims());
        assert_eq!(left, (0, 0, 0));
    }
}

async fn order(
    State(shop): State<Shop>,
    _: Option<IdempotencyKey>,
    body: Bytes,
) -> (StatusCode, String) {
    let run = shop.runs.next();
    (StatusCode::CREATED, format!("{run}: {} bytes", body.len()))
}

async fn gated(State(shop): State<Shop>, _: IdempotencyKey) -> (StatusCode, String) {
    let run = shop.runs.next();
    shop.gate.enter().await;
    (StatusCode::CREATED, run.to_string())
}

/// All that the server says to these bytes. It closes the connection itself, or once we have.
async fn say(server: SocketAddr, bytes: &[u8], hang_up: bool) -> Vec<u8> {
    let mut stream = TcpStream::connect(server).await.unwrap();
    let mut said = Vec::new();
    let talk = async {
        // A server that has heard enough closes before it has read all.
        let _ = stream.write_all(bytes).await;
        if hang_up {
            let _ = stream.shutdown().await;
        }
        let _ = stream.read_to_end(&mut said).await;
    };
    assert!(
        timeout(PATIENCE, talk).await.is_ok(),
        "no end after {}",
        bytes.escape_ascii()
    );
    said
}

/// The statuses of the answers in what a server said.
fn statuses(said: &[u8]) -> Vec<u16> {
    let text = String::from_utf8_lossy(said);
    let heads = text.split("HTTP/1.1 ").skip(1);
    heads
        .map(|head| head[..3].parse().expect("a status"))
        .collect()
}

async fn assert_serves(server: &Server, key: &str) {
    let answer = server.post("/orders").key(key).body("hi").send().await;
    assert_eq!(answer.code(), 201, "{answer:?}");
}

/// Any byte at any place of any header that somebody reads: served, or refused with the reason, and never run twice.
#[tokio::test]
async fn any_byte_in_any_header() {
    const HEADERS: [(&str, &str); 14] = [
        ("Idempotency-Key", "key"),
        ("Idempotency-Key", "\"key\""),
        ("Idempotency-Key", "\"key\";a=1;b=\"c\""),
        ("Authorization", "Bearer abc"),
        ("Cookie", "session=abc"),
        ("Content-Length", "2"),
        ("Content-Type", "application/json"),
        ("Transfer-Encoding", "chunked"),
        ("Connection", "close"),
        ("Expect", "100-continue"),
        ("Accept", "application/json"),
        ("Trailer", "x-checksum"),
        ("Host", "shop"),
        ("X-Anything", "abc"),
    ];
    let (shop, server) = Shop::open(Config::default()).await;
    let requests = HEADERS.into_iter().flat_map(|(name, value)| {
        (0..=255).flat_map(move |byte| {
            [0, value.len() / 2, value.len()].map(|at| (name, value, byte, at))
        })
    });
    let address = server.address();
    let asked =
        stream::iter(requests.enumerate()).map(|(number, (name, value, byte, at))| async move {
            let (before, after) = value.as_bytes().split_at(at);
            let line = [name.as_bytes(), b": ", before, &[byte], after, b"\r\n"].concat();
            let mut request = b"POST /orders HTTP/1.1\r\n".to_vec();
            let others = [
                ("Host", "shop".to_owned()),
                ("Idempotency-Key", format!("key-{number}")),
                ("Connection", "close".to_owned()),
                ("Content-Length", "2".to_owned()),
            ];
            for (other, value) in others {
                let is_length = other == "Content-Length" && name == "Transfer-Encoding";
                if other != name && !is_length {
                    request.extend_from_slice(format!("{other}: {value}\r\n").as_bytes());
                }
            }
            request.extend_from_slice(&line);
            request.extend_from_slice(b"\r\nhi");
            // A length that is longer now, or a connection that stays, ends when we do.
            let said = say(address, &request, true).await;
            (request, statuses(&said))
        });
    let answers: Vec<_> = asked.buffer_unordered(64).collect().await;
    let mut seen = BTreeMap::<u16, usize>::new();
    for (request, statuses) in answers {
        let request = request.escape_ascii();
        // None where it hung up before it was whole.
        for status in statuses {
            let is_fine = matches!(status, 100 | 201 | 409) || (400..500).contains(&status);
            assert!(is_fine || status == 501, "{status}: {request}");
            *seen.entry(status).or_default() += 1;
        }
    }
    for status in [201, 400] {
        assert!(seen.contains_key(&status), "{seen:?}");
    }
    assert_serves(&server, "afterwards").await;
    shop.layer.drain().await;
    shop.assert_quiet();
}

/// Up to the limit it runs; from one byte over it, it does not, and says so.
#[tokio::test]
async fn bodies_around_the_limit() {
    let (shop, server) = Shop::open(Config::default()).await;
    for (length, expected) in [(LIMIT - 1, 201), (LIMIT, 201), (LIMIT + 1, 413)] {
        let body = "x".repeat(length);
        let head = format!(
            "POST /orders HTTP/1.1\r\nHost: shop\r\nConnection: close\r\nIdempotency-Key: {length}"
        );
        let announced = format!("{head}-a\r\nContent-Length: {length}\r\n\r\n{body}");
        let one_chunk = format!(
            "{head}-b\r\nTransfer-Encoding: chunked\r\n\r\n{length:x}\r\n{body}\r\n0\r\n\r\n"
        );
        let bytes = "1\r\nx\r\n".repeat(length);
        let byte_by_byte =
            format!("{head}-c\r\nTransfer-Encoding: chunked\r\n\r\n{bytes}0\r\n\r\n");
        let trailers = format!(
            "{head}-d\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\n\r\n{length:x}\r\n{body}\r\n0\r\nx-sum: 1\r\n\r\n"
        );
        for request in [announced, one_chunk, byte_by_byte, trailers] {
            let before = shop.runs.count();
            let said = say(server.address(), request.as_bytes(), false).await;
            assert_eq!(
                statuses(&said),
                [expected],
                "{length} in {}",
                &request[..120]
            );
            assert_eq!(shop.runs.count() - before, usize::from(expected == 201));
            if expected == 201 {
                let retry = say(server.address(), request.as_bytes(), false).await;
                assert_eq!(statuses(&retry), [409], "{length}");
            }
        }
    }
    assert_eq!(shop.events.count("storage_failed"), 0);
    shop.assert_quiet();
}

/// A length that is not true: what is no request is refused, and what is not whole does not run.
#[tokio::test]
async fn lengths_that_lie() {
    let (shop, server) = Shop::open(Config::default()).await;
    let head = "POST /orders HTTP/1.1\r\nHost: shop\r\nIdempotency-Key: abc\r\n";
    let cases: [(&str, &str, &[u16]); 8] = [
        ("Content-Length: -1", "hi", &[400]),
        ("Content-Length: +2", "hi", &[400]),
        ("Content-Length: 2, 3", "hi", &[400]),
        ("Content-Length: 2\r\nContent-Length: 3", "hi", &[400]),
        ("Content-Length: 18446744073709551616", "hi", &[400]),
        // Known to be too much before a byte of it is read.
        ("Content-Length: 1000000000000", "hi", &[413]),
        // Not whole when the client hangs up: nobody is there to be answered.
        ("Content-Length: 10", "hi", &[]),
        ("Transfer-Encoding: chunked", "ff\r\nhi", &[]),
    ];
    for (lie, body, expected) in cases {
        let request = format!("{head}{lie}\r\n\r\n{body}");
        let said = say(server.address(), request.as_bytes(), true).await;
        let statuses = statuses(&said);
        // To whom it may still answer it may say that the body is broken.
        let is_fine = statuses == expected || (expected.is_empty() && statuses == [400]);
        assert!(is_fine, "{lie}: {statuses:?}");
    }
    assert_eq!(shop.runs.count(), 0);
    shop.assert_quiet();

    // What is more than was announced is the beginning of another request, and none.
    let more = format!("{head}Content-Length: 2\r\n\r\nhi, and more\r\n\r\n");
    let said = say(server.address(), more.as_bytes(), false).await;
    assert_eq!(statuses(&said), [201, 400]);
    assert_eq!(shop.runs.count(), 1);
    shop.assert_quiet();
}

/// Requests that stop in their head or in their body hold no claim and little memory, whatever length they announce.
#[tokio::test]
async fn requests_that_never_end() {
    const EACH: usize = 300;
    let (shop, server) = Shop::open(Config::default()).await;
    assert_serves(&server, "warm").await;
    let before = LIVE.load(Relaxed);
    let mut open = Vec::new();
    for number in 0..EACH {
        let head =
            format!("POST /orders HTTP/1.1\r\nHost: shop\r\nIdempotency-Key: slow-{number}\r\n");
        let body = format!("{head}Content-Length: {LIMIT}\r\n\r\nx");
        let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n3e8\r\nx");
        for bytes in [head, body, chunked] {
            let mut stream = TcpStream::connect(server.address()).await.unwrap();
            // In two parts, so that the server reads in between.
            let (one, two) = bytes.as_bytes().split_at(30);
            stream.write_all(one).await.unwrap();
            stream.write_all(two).await.unwrap();
            open.push(stream);
        }
        if number % 30 == 0 {
            assert_serves(&server, &format!("meanwhile-{number}")).await;
        }
    }
    let each = LIVE.load(Relaxed).saturating_sub(before) / open.len();
    assert!(each < 64 << 10, "{each} bytes for each");
    assert_eq!(shop.runs.count(), 1 + EACH / 30);
    assert_eq!(shop.memory.claims(), 0);
    // The same keys are free.
    assert_serves(&server, "slow-7").await;
    drop(open);
    assert_serves(&server, "afterwards").await;
    shop.layer.drain().await;
    shop.assert_quiet();
}

/// Ten thousand duplicates at once while the original runs: as many wait as may, the rest is told to come back, and others are
/// served.
#[tokio::test]
async fn ten_thousand_open_requests() {
    const CONNECTIONS: usize = 100;
    const STREAMS: usize = 100;
    const MAY_WAIT: usize = 1_000;
    let lock = LockPolicy::default().timeout(10 * PATIENCE);
    let config = Config::default().lock(lock).max_waiting(MAY_WAIT);
    let (shop, server) = Shop::open(config).await;
    let original = {
        let call = server.post("/gated").key("abc");
        tokio::spawn(async move { call.send().await.code() })
    };
    shop.gate.arrived(1).await;
    let connections = join_all((0..CONNECTIONS).map(|_| connect(server.address()))).await;
    let crowd = connections.iter().flat_map(|connection| {
        (0..STREAMS).map(|_| tokio::spawn(ask(connection.clone(), server.address(), "abc")))
    });
    let crowd: Vec<_> = crowd.collect();
    let refused = shop
        .events
        .until("refused", CONNECTIONS * STREAMS - MAY_WAIT);
    assert!(timeout(PATIENCE, refused).await.is_ok());
    assert_serves(&server, "meanwhile").await;
    assert_eq!(shop.layer.engine().waiting(), MAY_WAIT);

    shop.gate.open(1);
    let mut seen = BTreeMap::<(u16, bool), usize>::new();
    for asked in crowd {
        let (status, tells_when) = asked.await.unwrap();
        *seen.entry((status, tells_when)).or_default() += 1;
    }
    let expected = [
        ((409, false), MAY_WAIT),
        ((503, true), CONNECTIONS * STREAMS - MAY_WAIT),
    ];
    assert_eq!(seen, BTreeMap::from(expected));
    assert_eq!(original.await.unwrap(), 201);
    assert_eq!(shop.runs.count(), 2);
    shop.layer.drain().await;
    shop.assert_quiet();
}

type Connection = http2::SendRequest<Full<Bytes>>;

async fn connect(server: SocketAddr) -> Connection {
    let stream = TcpStream::connect(server).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let io = TokioIo::new(stream);
    let (connection, driver) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(async { drop(driver.await) });
    connection
}

fn gated_request(server: SocketAddr, key: &str) -> Request<Full<Bytes>> {
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("http://{server}/gated"))
        .header("idempotency-key", key);
    request.body(Full::default()).unwrap()
}

/// The status, and whether there is a `Retry-After`.
async fn ask(mut connection: Connection, server: SocketAddr, key: &str) -> (u16, bool) {
    let answer = connection
        .send_request(gated_request(server, key))
        .await
        .unwrap();
    let (parts, body) = answer.into_parts();
    body.collect().await.unwrap();
    (
        parts.status.as_u16(),
        parts.headers.contains_key("retry-after"),
    )
}

/// Many requests in one segment, duplicates among them: answered in their order, each operation once.
#[tokio::test]
async fn pipelined_requests() {
    let (shop, server) = Shop::open(Config::default()).await;
    let mut segment = Vec::new();
    let mut expected = Vec::new();
    for number in 0..50 {
        for status in [201, 409, 409] {
            let request = format!(
                "POST /orders HTTP/1.1\r\nHost: shop\r\nIdempotency-Key: {number}\r\nContent-Length: 2\r\n\r\nhi"
            );
            segment.extend_from_slice(request.as_bytes());
            expected.push(status);
        }
    }
    segment
        .extend_from_slice(b"POST /optional HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n");
    expected.push(201);
    let said = say(server.address(), &segment, false).await;
    assert_eq!(statuses(&said), expected);
    assert_eq!(shop.runs.count(), 51);
    shop.assert_quiet();
}

/// Streams that are reset while their handlers run go on and are recorded; a flood of resets closes at most its connection.
#[tokio::test]
async fn streams_that_are_reset() {
    const STREAMS: usize = 100;
    let (shop, server) = Shop::open(Config::default()).await;
    let mut connection = connect(server.address()).await;
    let asked: Vec<_> = (0..STREAMS)
        .map(|number| {
            let request = gated_request(server.address(), &format!("reset-{number}"));
            Box::pin(connection.send_request(request))
        })
        .collect();
    shop.gate.arrived(STREAMS).await;
    drop(asked);
    assert!(
        timeout(PATIENCE, shop.events.until("adopted", STREAMS))
            .await
            .is_ok()
    );
    shop.gate.open(STREAMS);
    shop.layer.drain().await;
    assert_eq!(shop.runs.count(), STREAMS);
    for number in 0..STREAMS {
        let retry = server
            .post("/gated")
            .key(format!("reset-{number}"))
            .send()
            .await;
        assert!(retry.is_replay(), "{retry:?}");
    }

    // Asked and reset at once, as fast as can be.
    let mut flood = connect(server.address()).await;
    for number in 0..2_000 {
        let request = gated_request(server.address(), &format!("flood-{}", number % 100));
        let mut asked = Box::pin(flood.send_request(request));
        let _ = poll_immediate(&mut asked).await;
        // Written, and perhaps read, before it is reset.
        tokio::task::yield_now().await;
    }
    drop(flood);
    shop.gate.open(100);
    assert_serves(&server, "afterwards").await;
    shop.layer.drain().await;
    assert!(shop.runs.count() <= STREAMS + 100 + 1);
    shop.assert_quiet();
}
