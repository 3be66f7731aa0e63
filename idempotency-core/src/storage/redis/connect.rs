//! From a URL to a connection that was looked at: which version answers, and whether it keeps what it is given.

use std::{fmt, future::IntoFuture, pin::pin, time::Duration};

use futures_util::future::{BoxFuture, Either, select};
use redis::{
    Client, ConnectionInfo, IntoConnectionInfo as _, ProtocolVersion, RedisError,
    aio::MultiplexedConnection, cluster::ClusterClient, io::tcp::TcpSettings,
};

use self::about::check;
use super::{
    link::{Link, Managed, Shared, without_limits},
    scripts,
    server::Server,
};
use crate::{Env, StorageError};

mod about;
mod error;

pub use self::error::{RedisConnectError, RedisConnectErrorKind};

/// A connection to Redis in the making: `.await` it. See [`RedisStorage::connect`](crate::RedisStorage::connect).
#[must_use = "nothing is connected until it is awaited"]
pub struct RedisConnect<T> {
    location: String,
    require_noeviction: bool,
    limit: Duration,
    make: fn(Server) -> T,
}

impl<T> RedisConnect<T> {
    pub(crate) fn new(location: &str, make: fn(Server) -> T) -> Self {
        Self {
            location: location.to_owned(),
            require_noeviction: false,
            limit: Server::DEFAULT_LIMIT,
            make,
        }
    }

    /// Refuses a server that may evict records to make room (`maxmemory` with a policy other than `noeviction`), and one that
    /// does not tell. Default: both are warned of in the log.
    pub fn require_noeviction(mut self) -> Self {
        self.require_noeviction = true;
        self
    }

    /// How long a command may take, and each step of connecting. Default: 1 s.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
}

impl<T> fmt::Debug for RedisConnect<T> {
    /// Without the location, which may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConnect")
            .field("require_noeviction", &self.require_noeviction)
            .field("time_limit", &self.limit)
            .finish_non_exhaustive()
    }
}

impl<T: 'static> IntoFuture for RedisConnect<T> {
    type Output = Result<T, RedisConnectError>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let server = open(&self.location, self.require_noeviction, self.limit).await?;
            Ok((self.make)(server))
        })
    }
}

/// Opens what `location` names: one server, or the nodes of a Cluster with commas between.
async fn open(
    location: &str,
    require_noeviction: bool,
    limit: Duration,
) -> Result<Server, RedisConnectError> {
    let nodes = nodes(location)?;
    if Env::system().spawner().is_none() {
        let error = "there is no tokio runtime to connect on";
        return Err(RedisConnectError::unreachable(error));
    }
    #[cfg(feature = "redis-tls")]
    provide_cryptography();
    let (mut connection, node) = first_that_answers(&nodes, limit).await?;
    let checks = check(&mut connection, require_noeviction);
    let is_cluster = within(limit * 2, checks)
        .await
        .unwrap_or_else(|| Err(RedisConnectError::unreachable(StorageError::timeout())))?;

    let clients = nodes.iter().map(subscribing).collect::<Result<_, _>>()?;
    let link = if is_cluster {
        let client = ClusterClient::builder(nodes)
            .connection_timeout(limit)
            .response_timeout(limit)
            .retries(3)
            .min_retry_wait(10)
            .max_retry_wait(100)
            .tcp_settings(TcpSettings::default().set_nodelay(true))
            .build()
            .map_err(RedisConnectError::url)?;
        let connected = within(limit * 2, client.get_async_connection()).await;
        let connection = connected
            .ok_or_else(|| RedisConnectError::unreachable(StorageError::timeout()))?
            .map_err(RedisConnectError::unreachable)?;
        Link::new(Shared(connection), limit)
    } else {
        let managed = Managed::new(node, limit).map_err(RedisConnectError::url)?;
        Link::new(managed, limit)
    };
    link.load(&scripts::all()).await;
    Ok(Server::new(link, clients))
}

/// Where a program depends on several providers and has chosen none, rustls panics when it is first used.
#[cfg(feature = "redis-tls")]
fn provide_cryptography() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Somebody else may choose one at this moment, which will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

/// What `location` names, each with the settings that all connections have.
fn nodes(location: &str) -> Result<Vec<ConnectionInfo>, RedisConnectError> {
    let mut urls: Vec<String> = Vec::new();
    for part in location.split(',') {
        match urls.last_mut() {
            // The comma was part of a password.
            Some(last) if !part.contains("://") && last.contains("://") => {
                last.push(',');
                last.push_str(part);
            }
            _ => urls.push(part.trim().to_owned()),
        }
    }
    let infos = urls.iter().map(|url| {
        let url = match url.contains("://") {
            true => url.clone(),
            false => format!("redis://{url}"),
        };
        let info = url.into_connection_info()?;
        Ok(info.set_tcp_settings(TcpSettings::default().set_nodelay(true)))
    });
    infos
        .collect::<Result<_, RedisError>>()
        .map_err(RedisConnectError::url)
}

/// For the connection that is subscribed: it says nothing that is not needed, and speaks the older protocol.
fn subscribing(node: &ConnectionInfo) -> Result<Client, RedisConnectError> {
    let settings = node.redis_settings().clone();
    let settings = settings
        .set_skip_set_lib_name()
        .set_protocol(ProtocolVersion::RESP2)
        // Channels belong to no database, and a Cluster has only one.
        .set_db(0);
    Client::open(node.clone().set_redis_settings(settings)).map_err(RedisConnectError::url)
}

async fn first_that_answers(
    nodes: &[ConnectionInfo],
    limit: Duration,
) -> Result<(MultiplexedConnection, Client), RedisConnectError> {
    let (mut failure, config) = (None, without_limits());
    for node in nodes {
        let client = Client::open(node.clone()).map_err(RedisConnectError::url)?;
        let connected = within(
            limit,
            client.get_multiplexed_async_connection_with_config(&config),
        )
        .await;
        match connected {
            Some(Ok(connection)) => return Ok((connection, client)),
            Some(Err(error)) => failure = Some(RedisConnectError::unreachable(error)),
            None => failure = Some(RedisConnectError::unreachable(StorageError::timeout())),
        }
    }
    Err(failure.unwrap_or_else(|| RedisConnectError::unreachable("no server is named")))
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    match select(pin!(work), pin!(Env::system().sleep(limit))).await {
        Either::Left((result, _)) => Some(result),
        Either::Right(_) => None,
    }
}
