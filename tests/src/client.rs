//! A client that sends what it is told over a connection of its own.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};

use crate::incoming::{Connection, Incoming};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The version of HTTP that a call is made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1
    #[default]
    Http1,
    /// HTTP/2 without TLS, by prior knowledge
    Http2,
}

/// A request that is being put together.
#[derive(Clone, Debug)]
#[must_use]
pub struct Call {
    address: SocketAddr,
    protocol: Protocol,
    request: Request<Bytes>,
}

impl Call {
    /// A request without headers (but `Host`, which is `:authority` over HTTP/2) and body.
    ///
    /// # Panics
    ///
    /// Panics if `path` is not a path.
    pub fn new(address: SocketAddr, method: Method, path: &str) -> Self {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", address.to_string())
            .body(Bytes::new())
            .expect("a valid path");
        Self {
            address,
            protocol: Protocol::default(),
            request,
        }
    }

    /// Sends it over this version of HTTP. Default: HTTP/1.1.
    pub fn over(mut self, protocol: Protocol) -> Self {
        self.protocol = protocol;
        self
    }

    /// Adds a header line.
    ///
    /// # Panics
    ///
    /// Panics if it is not a header.
    pub fn header(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a header name");
        let value = HeaderValue::from_bytes(value.as_ref()).expect("a header value");
        self.request.headers_mut().append(name, value);
        self
    }

    /// Asks this host, in place of the server's address.
    ///
    /// # Panics
    ///
    /// Panics if it is not a header value.
    pub fn host(mut self, host: &str) -> Self {
        let host = HeaderValue::from_str(host).expect("a host");
        self.request.headers_mut().insert(header::HOST, host);
        self
    }

    /// Adds `Idempotency-Key`.
    pub fn key(self, key: impl AsRef<[u8]>) -> Self {
        self.header("idempotency-key", key)
    }

    /// Sets the body.
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        *self.request.body_mut() = body.into();
        self
    }

    /// Sets a JSON body with its `Content-Type`.
    pub fn json(self, body: impl Into<Bytes>) -> Self {
        self.header("content-type", "application/json").body(body)
    }

    /// Sends it and reads the whole answer.
    ///
    /// # Panics
    ///
    /// Panics if the connection breaks; see [`try_send`](Self::try_send).
    pub async fn send(self) -> Answer {
        self.try_send().await.expect("an answer")
    }

    /// Sends it from a task of its own, for calls that have to be under way together.
    pub fn start(self) -> JoinHandle<Answer> {
        tokio::spawn(self.send())
    }

    /// Sends it and reads the whole answer, or says how the connection broke.
    ///
    /// # Errors
    ///
    /// If the connection can't be made, or breaks before the end of the answer.
    pub async fn try_send(self) -> Result<Answer, BoxError> {
        self.try_open().await?.answer().await
    }

    /// Sends it and reads the head of the answer; its body is read as the test likes.
    ///
    /// # Panics
    ///
    /// Panics if the connection breaks; see [`try_open`](Self::try_open).
    pub async fn open(self) -> Incoming {
        self.try_open().await.expect("the head of an answer")
    }

    /// Sends it and reads the head of the answer, or says how the connection broke.
    ///
    /// # Errors
    ///
    /// If the connection can't be made, or breaks before the head is there.
    pub async fn try_open(self) -> Result<Incoming, BoxError> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let io = TokioIo::new(stream);
        match self.protocol {
            Protocol::Http1 => {
                let (mut sender, connection) = http1::handshake(io).await?;
                let task = tokio::spawn(async { drop(connection.with_upgrades().await) });
                let connection = Connection::http1(task);
                let response = sender.send_request(self.request.map(Full::new)).await?;
                Ok(Incoming::new(response, connection))
            }
            Protocol::Http2 => {
                let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
                let task = tokio::spawn(async { drop(connection.await) });
                let mut request = self.request.map(Full::new);
                if request.method() == Method::CONNECT {
                    // Without it there would be no path (RFC 8441).
                    let websocket = hyper::ext::Protocol::from_static("websocket");
                    request.extensions_mut().insert(websocket);
                }
                let host = request.headers_mut().remove(header::HOST);
                let mut uri = request.uri().clone().into_parts();
                uri.scheme = Some(http::uri::Scheme::HTTP);
                uri.authority = Some(host.ok_or("no host")?.to_str()?.parse()?);
                *request.uri_mut() = Uri::from_parts(uri)?;
                let response = sender.send_request(request).await?;
                Ok(Incoming::new(response, Connection::http2(task, sender)))
            }
        }
    }
}

/// Writes `request` to a connection as it is, also what is not HTTP, and reads all that comes back until the server closes the
/// connection: the request should ask for that. Does not decode a chunked answer.
///
/// # Panics
///
/// Panics if the connection breaks, or what comes back is not HTTP.
pub async fn send_raw(address: SocketAddr, request: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(request).await.expect("a request sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    Answer::parse(&answer).unwrap_or_else(|| panic!("not HTTP: {:?}", answer.escape_ascii()))
}

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
        let mut lines = std::str::from_utf8(&bytes[..end]).ok()?.split("\r\n");
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let mut headers = HeaderMap::new();
        for line in lines {
            let (name, value) = line.split_once(':')?;
            let name: HeaderName = name.parse().ok()?;
            headers.append(name, value.trim().parse().ok()?);
        }
        Some(Self {
            status,
            headers,
            body: Bytes::copy_from_slice(&bytes[end + 4..]),
        })
    }

    /// The status as a number.
    #[must_use]
    pub fn code(&self) -> u16 {
        self.status.as_u16()
    }

    /// The body as text.
    ///
    /// # Panics
    ///
    /// Panics if it is not UTF-8.
    #[must_use]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("a body in UTF-8")
    }

    /// The value of a header, if it is there.
    ///
    /// # Panics
    ///
    /// Panics if it is not text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let value = self.headers.get(name)?;
        Some(value.to_str().expect("a header in ASCII"))
    }

    /// Whether it carries the replay header of the default configuration.
    #[must_use]
    pub fn is_replay(&self) -> bool {
        self.header("idempotency-replayed") == Some("true")
    }

    /// The kind of problem, the last part of its type, if it is one.
    ///
    /// # Panics
    ///
    /// Panics if a problem has no type.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        if self.header("content-type") != Some("application/problem+json") {
            return None;
        }
        let problem: serde_json::Value = serde_json::from_slice(&self.body).expect("JSON");
        assert_eq!(problem["status"], self.code(), "the problem's own status");
        assert!(problem["title"].is_string() && problem["detail"].is_string());
        let kind = problem["type"].as_str().expect("a type");
        Some(
            kind.rsplit(['#', '/', ':'])
                .next()
                .unwrap_or(kind)
                .to_owned(),
        )
    }
}

/// The first answer, given again by the default configuration.
///
/// # Panics
///
/// Panics if it is another one.
#[track_caller]
pub fn assert_replays(answer: &Answer, text: &str) {
    assert_eq!(answer.code(), 409, "{answer:?}");
    assert!(answer.is_replay(), "{answer:?}");
    assert_eq!(answer.text(), text);
}
