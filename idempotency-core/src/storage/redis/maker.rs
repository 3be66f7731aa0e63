//! How connections are made: to one server, to the nodes of a Cluster, to the master that sentinels name.

use std::{future::Future, sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, RedisResult,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
    sentinel::SentinelClient,
};

/// Makes connections that lead to the same records.
pub(super) trait Maker: Send + Sync + 'static {
    /// Its clones share one connection.
    type Connection: ConnectionLike + Clone + Send + Sync + 'static;

    /// Whether its connections replace what they lose by themselves.
    const SEES_TO_ITSELF: bool = false;

    /// A new connection.
    fn make(&self) -> impl Future<Output = RedisResult<Self::Connection>> + Send;
}

/// One server.
pub(super) struct One {
    client: Client,
    limit: Duration,
}

impl One {
    /// Of which each connection may take `limit`.
    pub(super) fn new(client: Client, limit: Duration) -> Self {
        Self { client, limit }
    }
}

impl Maker for One {
    type Connection = MultiplexedConnection;

    async fn make(&self) -> RedisResult<MultiplexedConnection> {
        connect(&self.client, self.limit).await
    }
}

/// A Cluster.
pub(super) struct Nodes(pub(super) ClusterClient);

impl Maker for Nodes {
    type Connection = ClusterConnection;

    const SEES_TO_ITSELF: bool = true;

    async fn make(&self) -> RedisResult<ClusterConnection> {
        self.0.get_async_connection().await
    }
}

/// The master that sentinels name. Clones ask one at a time.
#[derive(Clone)]
pub(super) struct Sentinels(Arc<tokio::sync::Mutex<SentinelClient>>);

impl Sentinels {
    /// How long the master may take to let us in, before the sentinels are asked again.
    const PATIENCE: Duration = Duration::from_secs(1);

    pub(super) fn new(client: SentinelClient) -> Self {
        Self(Arc::new(tokio::sync::Mutex::new(client)))
    }

    /// Who is master. Sentinels that are silent take the driver a second.
    pub(super) async fn master(&self) -> RedisResult<Client> {
        self.0.lock().await.async_get_client().await
    }
}

impl Maker for Sentinels {
    type Connection = MultiplexedConnection;

    async fn make(&self) -> RedisResult<MultiplexedConnection> {
        // Who is called master may be gone, and the sentinels may know soon.
        connect(&self.master().await?, Self::PATIENCE).await
    }
}

pub(super) async fn connect(
    client: &Client,
    limit: Duration,
) -> RedisResult<MultiplexedConnection> {
    // How long a command may take is seen to by who sends it.
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(limit))
        .set_response_timeout(None);
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
}
