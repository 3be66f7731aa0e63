//! An axum server on a free loopback port.

use std::{convert::Infallible, net::SocketAddr};

use axum::{Router, ServiceExt, extract::Request, response::Response, serve::ListenerExt};
use http::Method;
use tokio::{
    net::{TcpListener, TcpSocket},
    task::JoinHandle,
};
use tower::Service;

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
        Self::start_service(router).await
    }

    /// As [`start`](Self::start), for what stands around a router and sees a request before its paths are matched.
    ///
    /// # Panics
    ///
    /// Panics if no port can be had.
    pub async fn start_service<S>(service: S) -> Self
    where
        S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a free port on 127.0.0.1");
        Self::serve(listener, service)
    }

    /// As [`start`](Self::start), and sends into a small buffer, so that a client that does not read is soon noticed.
    ///
    /// # Panics
    ///
    /// Panics if no port can be had.
    #[must_use]
    pub fn start_without_slack(router: Router) -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        // Those that it accepts inherit this.
        socket
            .set_send_buffer_size(64 << 10)
            .expect("a small buffer");
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        socket.bind(any_port).expect("a free port on 127.0.0.1");
        Self::serve(socket.listen(64).expect("a listener"), router)
    }

    fn serve<S>(listener: TcpListener, service: S) -> Self
    where
        S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
        S::Future: Send,
    {
        let address = listener.local_addr().expect("a bound listener's address");
        let task = tokio::spawn(async move {
            // A frame of HTTP/2 is not to wait for the acknowledgement of the one before.
            let listener = listener.tap_io(|stream| {
                // The client may be gone already.
                let _ = stream.set_nodelay(true);
            });
            axum::serve(listener, ServiceExt::<Request>::into_make_service(service))
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
