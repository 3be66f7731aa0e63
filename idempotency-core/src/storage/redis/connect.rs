//! From a URL to a connection that was looked at: which version answers, and whether it keeps what it is given.

use std::{fmt, future::IntoFuture, time::Duration};

use futures_util::future::BoxFuture;
use redis::{
    Client, ConnectionInfo, IntoConnectionInfo as _, RedisError, aio::MultiplexedConnection,
    cluster::ClusterClient, io::tcp::TcpSettings,
};

use self::{about::About, error::Reason};
use super::{
    connection::Remade,
    link::Link,
    maker::{self, Nodes, One},
    scripts,
    server::Server,
    subscriber::{Tellers, subscribing},
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

    /// How long a command may take. Default: 1 s. Each step of connecting may take as long, and a second in any case.
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
    let nodes = nodes(location, limit)?;
    let patience = limit.max(Server::DEFAULT_LIMIT);
    let env = Env::system();
    if env.spawner().is_none() {
        let error = "there is no tokio runtime to connect on";
        return Err(RedisConnectError::unreachable(error));
    }
    #[cfg(feature = "redis-tls")]
    provide_cryptography();
    let tellers = nodes.iter().map(subscribing).collect::<Result<_, _>>();
    let tellers = Tellers::Any(tellers.map_err(RedisConnectError::url)?);

    let (mut connection, client) = first_that_answers(&nodes, patience).await?;
    let about = within(patience, About::server(&mut connection)).await?;
    let link = if about.is_cluster() {
        let nodes = Remade::new(Nodes(cluster(nodes, limit)?), env);
        let connected = within(patience.saturating_mul(2), nodes.connected()).await?;
        let (_, mut masters) = connected.map_err(RedisConnectError::unreachable)?;
        match within(patience, about.masters(&mut masters)).await? {
            Ok(masters) => {
                for about in masters {
                    about.check(require_noeviction)?;
                }
            }
            Err(error) if require_noeviction => return Err(RedisConnectError::unreachable(error)),
            Err(error) => tracing::warn!(
                target: "idempotency",
                %error,
                "not every master of the Cluster could be asked whether it evicts records"
            ),
        }
        Link::new(nodes, limit)
    } else {
        about.check(require_noeviction)?;
        if nodes.len() > 1 {
            // Whichever answers first would have the records.
            return Err(RedisConnectError::new(Reason::NotACluster));
        }
        Link::new(Remade::new(One::new(client, patience), env), limit)
    };
    link.load(&scripts::all()).await;
    Ok(Server::new(link, tellers))
}

fn cluster(
    nodes: Vec<ConnectionInfo>,
    limit: Duration,
) -> Result<ClusterClient, RedisConnectError> {
    ClusterClient::builder(nodes)
        .connection_timeout(limit.max(Server::DEFAULT_LIMIT))
        .response_timeout(limit)
        .retries(3)
        .min_retry_wait(10)
        .max_retry_wait(100)
        .tcp_settings(tcp(limit))
        .build()
        .map_err(RedisConnectError::url)
}

/// The settings of every connection. Where the network swallows what is sent, the kernel gives it up, which is the only way in
/// which the driver's own connections to the nodes of a Cluster hear of it.
fn tcp(limit: Duration) -> TcpSettings {
    let settings = TcpSettings::default().set_nodelay(true);
    #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
    let settings = {
        const SHORTEST: Duration = Duration::from_secs(1);
        const LONGEST: Duration = Duration::from_secs(3600);

        settings.set_user_timeout(limit.saturating_mul(3).clamp(SHORTEST, LONGEST))
    };
    #[cfg(not(any(target_os = "android", target_os = "fuchsia", target_os = "linux")))]
    let _ = limit;
    settings
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
fn nodes(location: &str, limit: Duration) -> Result<Vec<ConnectionInfo>, RedisConnectError> {
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
        Ok(info.set_tcp_settings(tcp(limit)))
    });
    infos
        .collect::<Result<_, RedisError>>()
        .map_err(RedisConnectError::url)
}

async fn first_that_answers(
    nodes: &[ConnectionInfo],
    limit: Duration,
) -> Result<(MultiplexedConnection, Client), RedisConnectError> {
    let mut failure = None;
    for node in nodes {
        let client = Client::open(node.clone()).map_err(RedisConnectError::url)?;
        match maker::connect(&client, limit).await {
            Ok(connection) => return Ok((connection, client)),
            Err(error) => failure = Some(RedisConnectError::unreachable(error)),
        }
    }
    Err(failure.unwrap_or_else(|| RedisConnectError::unreachable("no server is named")))
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, RedisConnectError> {
    let done = Env::system().within(limit, work).await;
    done.ok_or_else(|| RedisConnectError::unreachable(StorageError::timeout()))
}
