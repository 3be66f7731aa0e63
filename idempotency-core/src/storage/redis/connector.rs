//! How connections are opened: to one server, or to the master that sentinels name.

use std::{io, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, RedisError, RedisResult,
    aio::MultiplexedConnection,
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
    sentinel::SentinelClient,
};
use tokio::sync::oneshot;

use crate::{Env, Spawner};

/// How many commands wait for the task that writes them to a connection, before further senders have to wait.
const COMMANDS: usize = 1024;

/// Opens a connection to one server, within `limit`.
pub(super) async fn connect(server: Client, limit: Duration) -> RedisResult<MultiplexedConnection> {
    // `Commands` limits the time of a command.
    let config = AsyncConnectionConfig::new()
        .set_pipeline_buffer_size(COMMANDS)
        .set_connection_timeout(Some(limit))
        .set_response_timeout(None);
    server
        .get_multiplexed_async_connection_with_config(&config)
        .await
}

/// The master that sentinels name. Clones share the connections to the sentinels, and ask one at a time.
#[derive(Clone)]
pub(super) struct Sentinels(Arc<tokio::sync::Mutex<SentinelClient>>);

impl Sentinels {
    /// How long the master may take to accept a connection, before the sentinels are asked again.
    const PATIENCE: Duration = Duration::from_secs(1);

    pub(super) fn new(client: SentinelClient) -> Self {
        Self(Arc::new(tokio::sync::Mutex::new(client)))
    }

    /// Asks the sentinels for the master, in the background: all runtimes wait for the same lock, and one that stands still must
    /// not hold it. One that does not respond costs the driver a second.
    pub(super) async fn master(&self) -> RedisResult<Client> {
        let sentinels = self.0.clone();
        let asks = async move { sentinels.lock().await.async_get_client().await };
        let master = outcome_of(asks, Env::system().background()).await?;
        Client::open(with_tcp(master.get_connection_info()))
    }

    /// Opens a connection to the master.
    pub(super) async fn connect(self) -> RedisResult<MultiplexedConnection> {
        // The named master may be gone; the sentinels may soon name another.
        connect(self.master().await?, Self::PATIENCE).await
    }
}

/// Does `work` in a task, which goes on when the returned future, its outcome, is dropped.
pub(super) fn outcome_of<T: Send + 'static>(
    work: impl Future<Output = RedisResult<T>> + Send + 'static,
    spawner: Option<Spawner>,
) -> impl Future<Output = RedisResult<T>> + Send {
    let (tell, told) = oneshot::channel();
    if let Some(spawner) = spawner {
        // A runtime that shuts down drops the task at once.
        spawner.spawn(async move {
            // Perhaps nobody waits for it any more.
            let _ = tell.send(work.await);
        });
    }
    told.map(|told| {
        let no_runtime = || gone("there is no tokio runtime to connect on, or it has ended");
        told.unwrap_or_else(|_| Err(no_runtime()))
    })
}

/// The error of a command that was not sent.
pub(super) fn gone(what: &'static str) -> RedisError {
    io::Error::new(io::ErrorKind::ConnectionRefused, what).into()
}

/// TCP keepalive: idle time and interval, shorter than the idle timeouts of usual firewalls and load balancers.
const KEEPALIVE: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(10)];

/// Adds our defaults to `settings`. If the network drops packets silently, the kernel gives the connection up.
pub(super) fn tcp(settings: TcpSettings, limit: Duration) -> TcpSettings {
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE[0]);
    #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
    let (keepalive, settings) = {
        const SHORTEST: Duration = Duration::from_secs(1);
        const LONGEST: Duration = Duration::from_secs(3600);

        let ours = limit.saturating_mul(3).clamp(SHORTEST, LONGEST);
        let timeout = settings.user_timeout().unwrap_or(ours);
        let keepalive = keepalive.with_interval(KEEPALIVE[1]);
        (keepalive, settings.set_user_timeout(timeout))
    };
    #[cfg(not(any(target_os = "android", target_os = "fuchsia", target_os = "linux")))]
    let _ = limit;
    let keepalive = settings.keepalive().cloned().unwrap_or(keepalive);
    settings.set_keepalive(keepalive).set_nodelay(true)
}

/// The server of a user's client, with our TCP settings where the user has set none.
pub(super) fn with_tcp(server: &ConnectionInfo) -> ConnectionInfo {
    let settings = tcp(server.tcp_settings().clone(), Sentinels::PATIENCE);
    server.clone().set_tcp_settings(settings)
}
