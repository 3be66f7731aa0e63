//! From a URL to a checked connection: the server's version, its role, and whether it may evict records.

use std::{fmt, time::Duration};

use futures_util::future::{BoxFuture, join_all};
use redis::{Client, ConnectionInfo, IntoConnectionInfo as _, RedisError, io::tcp::TcpSettings};

use self::about::About;
use super::{
    DEFAULT_LIMIT,
    cluster::Cluster,
    commands::Commands,
    connector::tcp,
    prefix::Prefix,
    reconnecting::Reconnecting,
    scripts,
    source::{NotifySource, subscribing},
};
use crate::{Env, RedisCache, RedisLock, RedisStorage};

mod about;
mod error;

pub use self::error::{RedisConnectError, RedisConnectErrorKind};

/// Connects to Redis: `.await` it. See [`RedisStorage::connect`](crate::RedisStorage::connect).
#[must_use = "nothing is connected until it is awaited"]
pub struct RedisConnect<T> {
    location: String,
    require_noeviction: bool,
    limit: Duration,
    prefix: Prefix,
    replicas: Option<Replicas>,
    make: fn(RedisStorage) -> T,
}

/// How many replicas must have a claim, and how long that may take.
pub(crate) type Replicas = (u32, Duration);

impl<T> RedisConnect<T> {
    pub(crate) fn new(location: &str, prefix: Prefix, make: fn(RedisStorage) -> T) -> Self {
        Self {
            location: location.to_owned(),
            require_noeviction: false,
            limit: DEFAULT_LIMIT,
            prefix,
            replicas: None,
            make,
        }
    }

    /// Refuses a server that may evict records to make room (`maxmemory` with a policy other than `noeviction`), and one whose
    /// configuration can't be read. Default: both are warned of in the log.
    pub fn require_noeviction(mut self) -> Self {
        self.require_noeviction = true;
        self
    }

    /// How long a command may take. Default: 1 s. Each step of connecting may take as long, and a second in any case.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Opens what the location names: one server, or the nodes of a Cluster with commas between.
    async fn open(self) -> Result<T, RedisConnectError> {
        let patience = self.limit.max(DEFAULT_LIMIT);
        let env = Env::system();
        if env.spawner().is_none() {
            let error = "there is no tokio runtime to connect on";
            return Err(RedisConnectError::unreachable(error));
        }
        #[cfg(feature = "redis-tls")]
        provide_cryptography();
        let nodes = nodes(&self.location, self.limit)?;
        let clients = nodes.iter().map(subscribing).collect::<Result<_, _>>();
        let source = NotifySource::Any(clients.map_err(RedisConnectError::url)?);

        let (server, about) = first_that_answers(&nodes, patience).await?;
        let commands = if about.runs_as("cluster") {
            if self.replicas.is_some() {
                return Err(RedisConnectError::new(
                    RedisConnectErrorKind::Unsupported,
                    "`wait_replicas` is for one server with replicas, and this is a Cluster: leave it out, or use one server or sentinels",
                ));
            }
            let cluster = Cluster::new(&nodes, patience, env).map_err(RedisConnectError::url)?;
            self.check_masters(&cluster, patience).await?;
            let background = cluster.apart();
            Commands::new(cluster, background, self.limit)
        } else {
            about.check(self.require_noeviction)?;
            if nodes.len() > 1 {
                // Whichever answers first would have the records.
                return Err(RedisConnectError::new(
                    RedisConnectErrorKind::NotACluster,
                    "the servers that are named are no Cluster; name one of them, or use `RedisStorage::sentinel` to follow a master",
                ));
            }
            let background = server.apart();
            Commands::new(server, background, self.limit)
        };
        let mut storage = RedisStorage::over(commands, source).with_prefix(self.prefix);
        storage.replicas = self.replicas;
        Ok((self.make)(storage))
    }

    /// Checks all masters that can be asked.
    async fn check_masters(
        &self,
        cluster: &Cluster,
        patience: Duration,
    ) -> Result<(), RedisConnectError> {
        use RedisConnectErrorKind::Refused;

        let masters = within(patience.saturating_mul(2), cluster.masters()).await?;
        let masters = masters.map_err(RedisConnectError::connecting)?;
        let answers = masters.iter().map(|master| ask(master, patience));
        for answer in join_all(answers).await {
            match answer {
                Ok(about) => about.check(self.require_noeviction)?,
                Err(error) if self.require_noeviction || error.kind() == Refused => {
                    return Err(error);
                }
                Err(error) => tracing::warn!(
                    target: "idempotency",
                    error = ?std::error::Error::source(&error),
                    "not every master of the Cluster could be asked whether it evicts records"
                ),
            }
        }
        Ok(())
    }
}

impl RedisConnect<RedisStorage> {
    /// What the keys begin with: see [`RedisStorage::prefix`].
    pub fn prefix(mut self, prefix: impl AsRef<str>) -> Self {
        self.prefix = self.prefix.chosen(prefix.as_ref());
        self
    }

    /// Waits after every claim until `count` replicas have it, `timeout` at most: see [`RedisStorage::wait_replicas`]. A Cluster is
    /// refused then.
    pub fn wait_replicas(mut self, count: u32, timeout: Duration) -> Self {
        self.replicas = Some((count, timeout));
        self
    }
}

impl RedisConnect<RedisCache> {
    /// What the keys begin with: see [`RedisCache::prefix`].
    pub fn prefix(mut self, prefix: impl AsRef<str>) -> Self {
        self.prefix = self.prefix.chosen(prefix.as_ref());
        self
    }
}

impl RedisConnect<RedisLock> {
    /// What the keys begin with: see [`RedisLock::name`].
    pub fn name(mut self, name: impl AsRef<str>) -> Self {
        self.prefix = self.prefix.chosen(name.as_ref());
        self
    }
}

impl<T> fmt::Debug for RedisConnect<T> {
    /// Without the location, which may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisConnect")
            .field("require_noeviction", &self.require_noeviction)
            .field("time_limit", &self.limit)
            .field("prefix", &self.prefix)
            .field("wait_replicas", &self.replicas)
            .finish_non_exhaustive()
    }
}

impl<T: 'static> IntoFuture for RedisConnect<T> {
    type Output = Result<T, RedisConnectError>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.open())
    }
}

/// rustls panics on first use if a program depends on several providers and has installed none.
#[cfg(feature = "redis-tls")]
fn provide_cryptography() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // If another thread installs one at this moment, that one is used.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

/// The servers that `location` names, with our TCP settings.
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
        Ok(info.set_tcp_settings(tcp(TcpSettings::default(), limit)))
    });
    infos
        .collect::<Result<_, RedisError>>()
        .map_err(RedisConnectError::url)
}

async fn first_that_answers(
    nodes: &[ConnectionInfo],
    limit: Duration,
) -> Result<(Reconnecting, About), RedisConnectError> {
    let mut failure = RedisConnectError::unreachable("no server is named");
    for node in nodes {
        let client = Client::open(node.clone()).map_err(RedisConnectError::url)?;
        let server = Reconnecting::to(client, limit, Env::system());
        match ask(&server, limit).await {
            Ok(about) => return Ok((server, about)),
            // A refusal says more than a server that can't be reached.
            Err(_) if failure.kind() == RedisConnectErrorKind::Refused => {}
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Version and configuration of a server, which also gets the scripts.
async fn ask(server: &Reconnecting, limit: Duration) -> Result<About, RedisConnectError> {
    let connected = within(limit, server.connection()).await?;
    let mut connection = connected.map_err(RedisConnectError::connecting)?;
    let about = within(limit, About::server(&mut connection)).await??;
    // The first request is to take no longer than the others. A script that could not be loaded is loaded on first use.
    let _ = within(limit, scripts::load(&mut connection)).await;
    Ok(about)
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, RedisConnectError> {
    let done = Env::system().within(limit, work).await;
    done.ok_or_else(|| RedisConnectError::unreachable("it did not answer in time"))
}
