//! Notifications of the ends of claims: which servers to subscribe to, and how. The [scripts](super::scripts) publish them, and
//! [`waits`](crate::storage::waits) wakes the requests that wait.

use std::{pin::pin, sync::Arc, time::Duration};

use futures_util::{
    StreamExt as _,
    future::{BoxFuture, select},
};
use redis::{
    Client, ConnectionInfo, ErrorKind, ProtocolVersion, RedisResult, ServerErrorKind,
    aio::{PubSubSink, PubSubStream},
};

use super::{commands::Commands, connector::Sentinels, scripts};
use crate::storage::waits::{POLLED, Silence, Source, WaitTable, Waits, Whom};

/// The servers that notifications of ended claims come from.
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

    /// Waits that end with these notifications.
    pub(super) fn waits(&self, commands: &Commands) -> Arc<Waits> {
        let is_none = matches!(self, Self::Any(clients) if clients.is_empty());
        let subscriber = (!is_none).then(|| {
            Box::new(Subscriber {
                commands: commands.clone(),
                source: self.clone(),
            }) as _
        });
        Arc::new(Waits::new(commands.env.clone(), POLLED, subscriber))
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

/// Subscribes to keys, each of which has a channel of its name. All waits of a storage share one connection, which is closed with the last
/// wait.
struct Subscriber {
    commands: Commands,
    source: NotifySource,
}

impl Source for Subscriber {
    fn listen<'a>(&'a self, waits: &'a WaitTable) -> BoxFuture<'a, Silence> {
        Box::pin(async {
            let Some((sink, mut stream)) = self.source.open(&self.commands).await else {
                return Silence::Lost;
            };
            let hears = pin!(async {
                while let Some(message) = stream.next().await {
                    let whom = match message.get_payload_bytes() {
                        scripts::WAKE_ALL => Whom::All,
                        _ => Whom::One,
                    };
                    waits.notified(message.get_channel_name(), whom);
                }
                Silence::Lost
            });
            let follows = pin!(self.follow(waits, sink));
            select(hears, follows).await.factor_first().0
        })
    }
}

impl Subscriber {
    /// Subscribes to keys that get waiters, and unsubscribes from those that lose them.
    async fn follow(&self, waits: &WaitTable, mut sink: PubSubSink) -> Silence {
        let Commands { env, limit, .. } = &self.commands;
        while let Some((joined, left)) = waits.changes(Duration::ZERO).await {
            let follows = async {
                if !left.is_empty() {
                    sink.unsubscribe(left).await?;
                }
                if !joined.is_empty() {
                    sink.subscribe(&joined).await?;
                }
                RedisResult::Ok(())
            };
            match env.within(*limit, follows).await {
                Some(Ok(())) => waits.subscribed(&joined),
                Some(Err(error)) if error.kind() == ErrorKind::Server(ServerErrorKind::NoPerm) => {
                    tracing::warn!(
                        target: "idempotency",
                        %error,
                        "Redis allows no subscription, so duplicates poll; allow the channels that begin with the prefix"
                    );
                    return Silence::Refused;
                }
                Some(Err(_)) | None => return Silence::Lost,
            }
        }
        Silence::Deserted
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
