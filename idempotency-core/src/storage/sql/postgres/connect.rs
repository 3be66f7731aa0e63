//! From a URL to a server that was looked at: which version answers, and whether it keeps what it is given.

use std::{fmt, future::IntoFuture, str::FromStr as _, time::Duration};

use futures_util::{FutureExt as _, TryFutureExt as _, future::BoxFuture};
use sqlx::{
    ConnectOptions as _, Connection as _, Executor as _, Row as _,
    postgres::{PgConnectOptions, PgConnection, PgPoolOptions, PgRow},
};

use super::{PostgresStorage, error};
use crate::{BoxError, Env, StorageError, storage::sql::table::TableName};

/// The oldest version that does not copy a common table expression into the statement unless it is told to.
const OLDEST: i32 = 12;

/// A connection to PostgreSQL in the making: `.await` it. See [`PostgresStorage::connect`].
#[must_use = "nothing is connected until it is awaited"]
pub struct PostgresConnect {
    url: String,
    table: TableName,
    limit: Duration,
    connections: u32,
    pools_transactions: bool,
}

impl PostgresConnect {
    pub(super) fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            table: TableName::default(),
            limit: PostgresStorage::DEFAULT_LIMIT,
            connections: 10,
            pools_transactions: false,
        }
    }

    /// The table: see [`PostgresStorage::table`]. A name that breaks the rule is an error when this is awaited.
    pub fn table(mut self, name: impl AsRef<str>) -> Self {
        self.table = TableName::new(name.as_ref());
        self
    }

    /// How long a statement may take: see [`PostgresStorage::time_limit`]. Default: 5 s. Each step of connecting may take as long.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// How many connections the pool makes at most. Default: 10. Up to four more serve what is [called in the
    /// background](PostgresStorage#several-runtimes), and one listens while somebody waits.
    pub fn max_connections(mut self, count: u32) -> Self {
        self.connections = count.max(1);
        self
    }

    /// Works through a proxy that pools transactions: see [`PostgresStorage::transaction_pooling`].
    pub fn transaction_pooling(mut self) -> Self {
        self.pools_transactions = true;
        self
    }

    async fn connect(self) -> Result<PostgresStorage, PostgresConnectError> {
        if let Err(invalid) = self.table.quoted() {
            return Err(PostgresConnectError::with(Reason::Table, invalid));
        }
        let options = PgConnectOptions::from_str(&self.url)
            .map_err(|error| PostgresConnectError::with(Reason::Url, error))?
            // Proxies refuse it, and we read no such numbers.
            .extra_float_digits(None);
        let options = match self.pools_transactions {
            true => options.statement_cache_capacity(0),
            false => options,
        };
        let look = About::look(&options, self.limit, self.pools_transactions);
        // Five steps, each with its time.
        match Env::system()
            .within(self.limit.saturating_mul(5), look)
            .await
        {
            Some(about) => about?.check()?,
            None => return Err(PostgresConnectError::new(Reason::Unreachable)),
        }
        let pool = PgPoolOptions::new()
            .max_connections(self.connections)
            .acquire_timeout(self.limit)
            // A connection that was lost is noticed by the statement, which is then repeated.
            .test_before_acquire(false)
            .connect_lazy_with(options);
        let storage = PostgresStorage::with(pool, self.table, self.limit);
        Ok(match self.pools_transactions {
            true => storage.transaction_pooling(),
            false => storage,
        })
    }
}

impl IntoFuture for PostgresConnect {
    type Output = Result<PostgresStorage, PostgresConnectError>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.connect())
    }
}

/// Without the URL, which may hold a password.
impl fmt::Debug for PostgresConnect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresConnect")
            .field("table", &format_args!("{}", self.table))
            .field("time_limit", &self.limit)
            .field("max_connections", &self.connections)
            .field("transaction_pooling", &self.pools_transactions)
            .finish_non_exhaustive()
    }
}

/// What a server says of itself.
struct About {
    version: i32,
    is_read_only: bool,
    /// What it may forget in a crash.
    forgets: Option<&'static str>,
    /// Two connections at once had the same process of the server.
    shares_processes: bool,
}

const ABOUT: &str = "SELECT current_setting('server_version_num')::int4, \
    pg_is_in_recovery() OR current_setting('transaction_read_only')::bool, \
    current_setting('synchronous_commit') = 'off', NOT current_setting('fsync')::bool";

impl About {
    async fn look(
        options: &PgConnectOptions,
        limit: Duration,
        pools_transactions: bool,
    ) -> Result<Self, PostgresConnectError> {
        let mut first = connect(options, limit).await?;
        let row = one(&mut first, ABOUT).await?;
        let flag = |index: usize| row.try_get::<bool, _>(index).unwrap_or_default();
        let (version, is_read_only) = (row.try_get(0).unwrap_or_default(), flag(1));
        let forgets = match (flag(3), flag(2)) {
            (true, _) => Some("fsync is off: a crash of its machine can lose everything"),
            (false, true) => {
                Some("synchronous_commit is off: a crash loses the last claims and records")
            }
            (false, false) => None,
        };
        let mut about = Self {
            version,
            is_read_only,
            forgets,
            shares_processes: false,
        };
        if !pools_transactions {
            let process = process(&mut first).await?;
            let mut second = connect(options, limit).await?;
            // Until this transaction ends, the second connection keeps its process.
            run(&mut second, "BEGIN").await?;
            let others = self::process(&mut second).await?;
            let again = self::process(&mut first).await?;
            about.shares_processes = others == process || again != process;
            run(&mut second, "ROLLBACK").await?;
            let _ = second.close().await;
        }
        let _ = first.close().await;
        Ok(about)
    }

    /// Checks that it can keep records, and warns of what may lose them.
    fn check(self) -> Result<(), PostgresConnectError> {
        if self.version < OLDEST * 10_000 {
            return Err(PostgresConnectError::new(Reason::TooOld(self.version)));
        }
        if self.is_read_only {
            return Err(PostgresConnectError::new(Reason::ReadOnly));
        }
        if self.shares_processes {
            return Err(PostgresConnectError::new(Reason::PoolsTransactions));
        }
        if let Some(forgets) = self.forgets {
            tracing::warn!(
                target: "idempotency",
                forgets,
                "PostgreSQL does not keep all that it confirms, and what was answered may run again"
            );
        }
        Ok(())
    }
}

async fn connect(
    options: &PgConnectOptions,
    limit: Duration,
) -> Result<PgConnection, PostgresConnectError> {
    match Env::system().within(limit, options.connect()).await {
        Some(connection) => connection.map_err(PostgresConnectError::connecting),
        None => Err(PostgresConnectError::new(Reason::Unreachable)),
    }
}

// Boxed by hand: of an `async fn` with a borrowed connection the compiler can't tell that it is `Send`.
fn one<'a>(
    connection: &'a mut PgConnection,
    statement: &'a str,
) -> BoxFuture<'a, Result<PgRow, PostgresConnectError>> {
    let row = connection.fetch_one(statement);
    row.map_err(PostgresConnectError::connecting).boxed()
}

fn run<'a>(
    connection: &'a mut PgConnection,
    statement: &'a str,
) -> BoxFuture<'a, Result<(), PostgresConnectError>> {
    let done = connection.execute(statement).map_ok(drop);
    done.map_err(PostgresConnectError::connecting).boxed()
}

async fn process(connection: &mut PgConnection) -> Result<i32, PostgresConnectError> {
    let row = one(connection, "SELECT pg_backend_pid()").await?;
    row.try_get(0).map_err(PostgresConnectError::connecting)
}

/// PostgreSQL could not be connected to, or is not fit to keep records.
///
/// Neither it nor its sources show the password.
#[derive(Debug)]
pub struct PostgresConnectError {
    reason: Reason,
    source: Option<BoxError>,
}

/// Why; see [`PostgresConnectError::kind`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PostgresConnectErrorKind {
    /// The URL can't be read.
    Url,
    /// No server answers there.
    Unreachable,
    /// A server answers, and does not let this user in: the password is wrong, there is no such database, or a right is missing.
    Refused,
    /// The server is older than PostgreSQL 12.
    TooOld,
    /// The server takes no writes: it is a replica, or `default_transaction_read_only` is on.
    ReadOnly,
    /// A proxy pools transactions: it gives the statements of a connection to several processes of the server.
    PoolsTransactions,
    /// The name of the table breaks the rule; the source is an [`InvalidTableName`](crate::InvalidTableName).
    Table,
}

#[derive(Debug)]
enum Reason {
    Url,
    Unreachable,
    Refused,
    TooOld(i32),
    ReadOnly,
    PoolsTransactions,
    Table,
}

impl PostgresConnectError {
    fn new(reason: Reason) -> Self {
        Self {
            reason,
            source: None,
        }
    }

    fn with(reason: Reason, source: impl Into<BoxError>) -> Self {
        Self {
            reason,
            source: Some(source.into()),
        }
    }

    fn connecting(error: sqlx::Error) -> Self {
        let reason = match &*error::code(&error) {
            // invalid_authorization_specification, invalid_catalog_name, insufficient_privilege
            code if code.starts_with("28") || code == "3D000" || code == "42501" => Reason::Refused,
            // The second statement of a prepared pair went elsewhere.
            "26000" | "42P05" => Reason::PoolsTransactions,
            _ => Reason::Unreachable,
        };
        Self::with(reason, error)
    }

    /// Why it failed.
    #[must_use]
    pub fn kind(&self) -> PostgresConnectErrorKind {
        match self.reason {
            Reason::Url => PostgresConnectErrorKind::Url,
            Reason::Unreachable => PostgresConnectErrorKind::Unreachable,
            Reason::Refused => PostgresConnectErrorKind::Refused,
            Reason::TooOld(_) => PostgresConnectErrorKind::TooOld,
            Reason::ReadOnly => PostgresConnectErrorKind::ReadOnly,
            Reason::PoolsTransactions => PostgresConnectErrorKind::PoolsTransactions,
            Reason::Table => PostgresConnectErrorKind::Table,
        }
    }
}

impl fmt::Display for PostgresConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.reason {
            Reason::Url => f.write_str("the URL of PostgreSQL can't be used"),
            Reason::Unreachable => f.write_str("PostgreSQL can't be reached"),
            Reason::Refused => f.write_str(
                "PostgreSQL refuses this user: check the user, the password (in a URL its special characters are percent-encoded), the database and the rights of the user",
            ),
            Reason::TooOld(version) => write!(
                f,
                "PostgreSQL {} is too old: version {OLDEST} or newer is needed",
                version / 10_000
            ),
            Reason::ReadOnly => f.write_str(
                "PostgreSQL takes no writes there: it is a replica, or `default_transaction_read_only` is on; name the primary",
            ),
            Reason::PoolsTransactions => f.write_str(
                "a proxy in front of PostgreSQL pools transactions: call `.transaction_pooling()`, or connect to the server or to a port that pools sessions",
            ),
            Reason::Table => f.write_str("the name of the table can't be used"),
        }
    }
}

impl std::error::Error for PostgresConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl From<PostgresConnectError> for StorageError {
    fn from(error: PostgresConnectError) -> Self {
        Self::unavailable(error)
    }
}
