//! How connections are made: to one server, to the master that sentinels name.

use std::{future::Future, sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, ConnectionInfo, RedisResult,
    aio::{ConnectionLike, MultiplexedConnection},
    io::tcp::{TcpSettings, socket2::TcpKeepalive},
    sentinel::SentinelClient,
};
use tokio::sync::oneshot;

use super::reconnecting::gone;
use crate::Env;

/// Makes connections that lead to the same records.
pub(super) trait Maker: Send + Sync + 'static {
    /// Its clones share one connection.
    type Connection: ConnectionLike + Clone + Send + Sync + 'static;

    /// A new connection.
    fn make(&self) -> impl Future<Output = RedisResult<Self::Connection>> + Send;
}

/// One server, and the time limit of connecting to it.
pub(super) struct One(pub(super) Client, pub(super) Duration);

impl Maker for One {
    type Connection = MultiplexedConnection;

    async fn make(&self) -> RedisResult<MultiplexedConnection> {
        connect(&self.0, self.1).await
    }
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
        let Some(spawner) = Env::system().background() else {
            return Err(gone("there is no tokio runtime to ask the sentinels on"));
        };
        let (tell, told) = oneshot::channel();
        let sentinels = self.0.clone();
        spawner.spawn(async move {
            let master = sentinels.lock().await.async_get_client().await;
            // Perhaps nobody waits for it any more.
            let _ = tell.send(master);
        });
        let master = told
            .await
            .unwrap_or_else(|_| Err(gone("the tokio runtime ended")))?;
        Client::open(with_tcp(master.get_connection_info()))
    }
}

impl Maker for Sentinels {
    type Connection = MultiplexedConnection;

    async fn make(&self) -> RedisResult<MultiplexedConnection> {
        // The named master may be gone; the sentinels may soon name another.
        connect(&self.master().await?, Self::PATIENCE).await
    }
}

/// How many commands wait for the task that writes them to a connection, before further senders have to wait.
const COMMANDS: usize = 1024;

pub(super) async fn connect(
    client: &Client,
    limit: Duration,
) -> RedisResult<MultiplexedConnection> {
    // `Commands` limits the time of a command.
    let config = AsyncConnectionConfig::new()
        .set_pipeline_buffer_size(COMMANDS)
        .set_connection_timeout(Some(limit))
        .set_response_timeout(None);
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
}

/// TCP keepalive: idle time and interval, shorter than the idle timeouts of usual firewalls and load balancers.
const KEEPALIVE: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(10)];

/// Adds our defaults to `settings`. If the network drops packets silently, the kernel gives the connection up.
pub(super) fn tcp(settings: TcpSettings, limit: Duration) -> TcpSettings {
    let settings = match settings.keepalive() {
        Some(_) => settings,
        None => {
            let keepalive = TcpKeepalive::new().with_time(KEEPALIVE[0]);
            #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
            let keepalive = keepalive.with_interval(KEEPALIVE[1]);
            settings.set_keepalive(keepalive)
        }
    };
    #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
    let settings = {
        const SHORTEST: Duration = Duration::from_secs(1);
        const LONGEST: Duration = Duration::from_secs(3600);

        let ours = limit.saturating_mul(3).clamp(SHORTEST, LONGEST);
        let timeout = settings.user_timeout().unwrap_or(ours);
        settings.set_user_timeout(timeout)
    };
    #[cfg(not(any(target_os = "android", target_os = "fuchsia", target_os = "linux")))]
    let _ = limit;
    settings.set_nodelay(true)
}

/// The server of a user's client, with our TCP settings where the user has set none.
pub(super) fn with_tcp(server: &ConnectionInfo) -> ConnectionInfo {
    let settings = tcp(server.tcp_settings().clone(), Sentinels::PATIENCE);
    server.clone().set_tcp_settings(settings)
}
