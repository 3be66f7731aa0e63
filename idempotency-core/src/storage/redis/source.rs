//! Which servers to subscribe to.

use redis::{
    Client, ConnectionInfo, ProtocolVersion, RedisResult,
    aio::{PubSubSink, PubSubStream},
};

use super::{commands::Commands, connector::Sentinels};

/// Where notifications of ended claims come from.
#[derive(Clone)]
pub(super) enum NotifySource {
    /// Any of these servers, the first that accepts the connection: every server of a Cluster gets the messages of all channels. May be
    /// empty.
    Any(Vec<Client>),
    /// The master that sentinels name.
    Master(Sentinels),
}

impl NotifySource {
    /// None: waiters poll.
    pub(super) fn none() -> Self {
        Self::Any(Vec::new())
    }

    pub(super) fn is_none(&self) -> bool {
        matches!(self, Self::Any(clients) if clients.is_empty())
    }

    /// A connection for subscriptions, to a server that accepts it within the time limit of a command.
    pub(super) async fn open(&self, commands: &Commands) -> Option<(PubSubSink, PubSubStream)> {
        let clients = match self {
            Self::Any(clients) => clients,
            Self::Master(sentinels) => {
                // How long the sentinels may take is for the driver to say.
                let master = sentinels.master().await.ok()?;
                &vec![subscribing(master.get_connection_info()).ok()?]
            }
        };
        for client in clients {
            let open = commands
                .env
                .within(commands.limit, client.get_async_pubsub());
            if let Some(Ok(open)) = open.await {
                return Some(open.split());
            }
        }
        None
    }
}

/// Settings of the subscribed connection: no `CLIENT SETINFO`, and RESP2.
pub(super) fn subscribing(server: &ConnectionInfo) -> RedisResult<Client> {
    let settings = server.redis_settings().clone();
    let settings = settings
        .set_skip_set_lib_name()
        .set_protocol(ProtocolVersion::RESP2)
        // Channels belong to no database, and a Cluster has only one.
        .set_db(0);
    Client::open(server.clone().set_redis_settings(settings))
}
