//! An answer that is still under way.

use std::{
    pin::Pin,
    task::{Context, Poll, Waker},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use hyper::{
    client::conn::http2::SendRequest,
    upgrade::{OnUpgrade, Upgraded},
};
use tokio::task::JoinHandle;

use crate::{PATIENCE, client::Answer};

/// The head of an answer, and its body as it comes. Dropping it closes the connection.
#[derive(Debug)]
pub struct Incoming {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    body: hyper::body::Incoming,
    connection: Connection,
    upgrade: OnUpgrade,
    /// What came along with what was asked for.
    surplus: BytesMut,
}

/// What keeps a connection open. Dropping it closes the connection.
#[derive(Debug)]
pub struct Connection {
    task: JoinHandle<()>,
    /// HTTP/2 connections end by themselves when nobody can send a request any more.
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Connection {
    pub(crate) fn http1(task: JoinHandle<()>) -> Self {
        Self { task, sender: None }
    }

    pub(crate) fn http2(task: JoinHandle<()>, sender: SendRequest<Full<Bytes>>) -> Self {
        Self {
            task,
            sender: Some(sender),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How a body ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// What came before the end and was not read before.
    pub data: Bytes,
    /// Its trailers.
    pub trailers: Option<HeaderMap>,
    /// Whether it broke off.
    pub is_broken: bool,
}

impl Ending {
    /// The data of a body that came to its end, without trailers.
    ///
    /// # Panics
    ///
    /// Panics if it did not.
    #[must_use]
    #[track_caller]
    pub fn whole(self) -> Bytes {
        assert!(!self.is_broken, "broke off after {:?}", self.data);
        assert_eq!(self.trailers, None);
        self.data
    }
}

impl Incoming {
    pub(crate) fn new(
        mut response: Response<hyper::body::Incoming>,
        connection: Connection,
    ) -> Self {
        let upgrade = hyper::upgrade::on(&mut response);
        let (parts, body) = response.into_parts();
        Self {
            status: parts.status,
            headers: parts.headers,
            body,
            connection,
            upgrade,
            surplus: BytesMut::new(),
        }
    }

    /// The next `length` bytes of the body.
    ///
    /// # Panics
    ///
    /// Panics if the body ends before, or they do not come.
    pub async fn read(&mut self, length: usize) -> Bytes {
        while self.surplus.len() < length {
            let Ok(next) = tokio::time::timeout(PATIENCE, self.body.frame()).await else {
                panic!("{length} bytes do not come, only {:?}", self.surplus);
            };
            match next {
                Some(Ok(frame)) => self.take(&frame),
                end => panic!("{end:?} after {:?} instead of {length} bytes", self.surplus),
            }
        }
        self.surplus.split_to(length).freeze()
    }

    /// What has come by now and was not read before.
    ///
    /// # Panics
    ///
    /// Panics if the end has come too.
    pub fn read_ready(&mut self) -> Bytes {
        let mut context = Context::from_waker(Waker::noop());
        while let Poll::Ready(next) = Pin::new(&mut self.body).poll_frame(&mut context) {
            match next {
                Some(Ok(frame)) => self.take(&frame),
                end => panic!("the body has ended: {end:?} after {:?}", self.surplus),
            }
        }
        self.surplus.split().freeze()
    }

    /// Reads to the end.
    ///
    /// # Panics
    ///
    /// Panics if the body stands still.
    pub async fn finish(mut self) -> Ending {
        let mut trailers = None;
        let is_broken = loop {
            let Ok(next) = tokio::time::timeout(PATIENCE, self.body.frame()).await else {
                panic!("the end does not come after {:?}", self.surplus);
            };
            match next {
                Some(Ok(frame)) => {
                    self.take(&frame);
                    if let Ok(found) = frame.into_trailers() {
                        trailers = Some(found);
                    }
                }
                Some(Err(_)) => break true,
                None => break false,
            }
        };
        Ending {
            data: self.surplus.split().freeze(),
            trailers,
            is_broken,
        }
    }

    /// The whole answer.
    ///
    /// # Errors
    ///
    /// If it breaks off.
    pub async fn answer(self) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
        let Self {
            status,
            headers,
            body,
            connection,
            ..
        } = self;
        let body = body.collect().await?.to_bytes();
        drop(connection);
        Ok(Answer {
            status,
            headers,
            body,
        })
    }

    /// Does not want the rest: HTTP/1.1 closes the connection, HTTP/2 resets the stream, and the connection stays open until
    /// the result is dropped.
    #[must_use = "dropping it closes the connection"]
    pub fn leave(self) -> Option<Connection> {
        let Self {
            body, connection, ..
        } = self;
        drop(body);
        connection.sender.is_some().then_some(connection)
    }

    /// The connection, once the server has switched protocols.
    ///
    /// # Panics
    ///
    /// Panics if it has not.
    pub async fn upgraded(self) -> Upgraded {
        // The connection's task hands the socket over, so it may not be aborted before.
        let upgraded = self.upgrade.await;
        drop(self.connection);
        upgraded.expect("an upgraded connection")
    }

    fn take(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.surplus.extend_from_slice(data);
        }
    }
}
