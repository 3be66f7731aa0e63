//! From a URL to a connection that was looked at: which version answers, and whether it keeps what it is given.

use std::{error::Error, fmt, future::IntoFuture, pin::pin, time::Duration};

use futures_util::future::{BoxFuture, Either, select};
use redis::{
    Client, ConnectionInfo, IntoConnectionInfo as _, ProtocolVersion, RedisError, Value,
    aio::MultiplexedConnection, cluster::ClusterClient, io::tcp::TcpSettings,
};

use super::{
    link::{Link, Managed, Shared},
    scripts,
    server::Server,
};
use crate::{BoxError, Env, StorageError};

/// The oldest version that has `SET … NX GET` and flags of scripts.
const OLDEST: u32 = 7;

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
    let mut failure = None;
    for node in nodes {
        let client = Client::open(node.clone()).map_err(RedisConnectError::url)?;
        let connected = within(limit, client.get_multiplexed_async_connection()).await;
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

/// Checks version and memory. Says whether the server is part of a Cluster.
async fn check(
    connection: &mut MultiplexedConnection,
    require_noeviction: bool,
) -> Result<bool, RedisConnectError> {
    let about = About::ask(connection).await;
    match &about.version {
        Some(version) => {
            let major = version
                .split('.')
                .next()
                .and_then(|major| major.parse().ok());
            // Who says something else is no Redis, and may well do what a new one does.
            if major.is_some_and(|major: u32| major < OLDEST) {
                return Err(RedisConnectError::new(Reason::TooOld(version.clone())));
            }
        }
        None => tracing::warn!(
            target: "idempotency",
            "Redis does not tell its version: the user may not call HELLO, nor INFO"
        ),
    }
    let advice = "set `maxmemory-policy noeviction`, so that it refuses new keys instead of forgetting payments";
    match about.evicts {
        Some(None) => {}
        Some(Some(policy)) if require_noeviction => {
            return Err(RedisConnectError::new(Reason::Evicts(policy)));
        }
        Some(Some(policy)) => tracing::warn!(
            target: "idempotency", policy, advice,
            "Redis evicts records when its memory is full, and what they answered for runs again"
        ),
        None if require_noeviction => {
            return Err(RedisConnectError::new(Reason::EvictionUnknown));
        }
        None => tracing::warn!(
            target: "idempotency", advice,
            "Redis does not tell whether it evicts records: the user may call neither INFO nor CONFIG GET"
        ),
    }
    Ok(about.is_cluster)
}

/// What a server tells of itself, as far as its user may ask.
struct About {
    version: Option<String>,
    is_cluster: bool,
    /// The policy by which it evicts, if it does.
    evicts: Option<Option<String>>,
}

impl About {
    async fn ask(connection: &mut MultiplexedConnection) -> Self {
        // Everybody may say hello. What INFO and CONFIG tell is often not for every user.
        let hello = pairs(redis::cmd("HELLO").query_async(connection).await);
        let info = lines(redis::cmd("INFO").query_async(connection).await);
        let find = |pairs: &[(String, String)], name: &str| {
            let mut found = pairs.iter().filter(|(key, _)| key == name);
            found.next().map(|(_, value)| value.clone())
        };
        let version = find(&hello, "version").or_else(|| find(&info, "redis_version"));
        let mode = find(&hello, "mode").or_else(|| find(&info, "redis_mode"));

        let mut memory = info;
        if find(&memory, "maxmemory_policy").is_none() {
            let mut config = redis::cmd("CONFIG");
            config.arg("GET").arg("maxmemory*");
            memory = pairs(config.query_async(connection).await);
            for (name, _) in &mut memory {
                *name = name.replace('-', "_");
            }
        }
        let limit = find(&memory, "maxmemory");
        let evicts = find(&memory, "maxmemory_policy").map(|policy| {
            let is_bounded = limit.is_none_or(|limit| limit != "0");
            (is_bounded && policy != "noeviction").then_some(policy)
        });
        Self {
            version,
            is_cluster: mode.as_deref() == Some("cluster"),
            evicts,
        }
    }
}

/// A map as either protocol gives it.
fn pairs(answer: Result<Value, RedisError>) -> Vec<(String, String)> {
    let flat = match answer {
        Ok(Value::Map(pairs)) => pairs.into_iter().flat_map(|(k, v)| [k, v]).collect(),
        Ok(Value::Array(flat)) => flat,
        _ => Vec::new(),
    };
    let mut flat = flat.into_iter();
    let mut pairs = Vec::new();
    while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
        if let (Some(name), Some(value)) = (text(name), text(value)) {
            pairs.push((name, value));
        }
    }
    pairs
}

fn lines(answer: Result<Value, RedisError>) -> Vec<(String, String)> {
    let text = answer.ok().and_then(text).unwrap_or_default();
    let pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Some(text),
        _ => None,
    }
}

/// Redis could not be connected to, or is not fit to keep records.
///
/// Neither it nor its sources show the URL, which may hold a password.
#[derive(Debug)]
pub struct RedisConnectError {
    reason: Reason,
    source: Option<BoxError>,
}

/// Why; see [`RedisConnectError::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RedisConnectErrorKind {
    /// The URL can't be read, or asks for what this build does not have.
    Url,
    /// No server answers there, or it does not let this user in.
    Unreachable,
    /// The server is older than Redis 7.
    TooOld,
    /// The server evicts records, or does not tell, and
    /// [`require_noeviction`](RedisConnect::require_noeviction) is set.
    Evicts,
}

#[derive(Debug)]
enum Reason {
    Url,
    Unreachable,
    TooOld(String),
    Evicts(String),
    EvictionUnknown,
}

impl RedisConnectError {
    fn new(reason: Reason) -> Self {
        Self {
            reason,
            source: None,
        }
    }

    fn url(error: RedisError) -> Self {
        Self {
            reason: Reason::Url,
            source: Some(error.into()),
        }
    }

    fn unreachable(source: impl Into<BoxError>) -> Self {
        Self {
            reason: Reason::Unreachable,
            source: Some(source.into()),
        }
    }

    /// Why it failed.
    #[must_use]
    pub fn kind(&self) -> RedisConnectErrorKind {
        match self.reason {
            Reason::Url => RedisConnectErrorKind::Url,
            Reason::Unreachable => RedisConnectErrorKind::Unreachable,
            Reason::TooOld(_) => RedisConnectErrorKind::TooOld,
            Reason::Evicts(_) | Reason::EvictionUnknown => RedisConnectErrorKind::Evicts,
        }
    }
}

impl fmt::Display for RedisConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::Url => f.write_str("the URL of Redis can't be used"),
            Reason::Unreachable => f.write_str("Redis can't be reached"),
            Reason::TooOld(version) => write!(
                f,
                "Redis {version} is too old: version {OLDEST} or newer is needed, or Valkey"
            ),
            Reason::Evicts(policy) => write!(
                f,
                "Redis evicts records by the policy {policy} when its memory is full; set `maxmemory-policy noeviction`"
            ),
            Reason::EvictionUnknown => f.write_str(
                "Redis does not tell whether it evicts records; allow its user INFO or CONFIG GET",
            ),
        }
    }
}

impl Error for RedisConnectError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<RedisConnectError> for StorageError {
    fn from(error: RedisConnectError) -> Self {
        Self::unavailable(error)
    }
}
