//! An axum server on a free loopback port.

use std::net::SocketAddr;

use axum::Router;
use http::Method;
use tokio::{net::TcpListener, task::JoinHandle};

use crate::client::{Answer, Call, send_raw};

/// Serves a router over real TCP until it is dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens on a free port of 127.0.0.1 and serves `router`.
    ///
    /// # Panics
    ///
    /// Panics if no port can be had.
    pub async fn start(router: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a free port on 127.0.0.1");
        let address = listener.local_addr().expect("a bound listener's address");
        let task = tokio::spawn(async move {
            axum::serve(listener, router)
                .await
                .expect("axum::serve never ends by itself");
        });
        Self { address, task }
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A call to be completed and sent.
    pub fn call(&self, method: Method, path: &str) -> Call {
        Call::new(self.address, method, path)
    }

    /// `POST path`.
    pub fn post(&self, path: &str) -> Call {
        self.call(Method::POST, path)
    }

    /// Sends bytes as they are; see [`send_raw`].
    pub async fn raw(&self, request: impl AsRef<[u8]>) -> Answer {
        send_raw(self.address, request.as_ref()).await
    }

    /// `GET path`.
    pub fn get(&self, path: &str) -> Call {
        self.call(Method::GET, path)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}
