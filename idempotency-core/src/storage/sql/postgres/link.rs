//! How a statement is sent: over which connection, in which protocol, how often, for how long.

use std::{
    borrow::Cow,
    fmt::Write as _,
    sync::{Arc, OnceLock},
    time::Duration,
};

use sqlx::{
    Executor as _, PgPool, Postgres,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgConnection, PgRow},
};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{
    super::table::InvalidTableName,
    error::{self, Cure},
    statements::Statements,
};
use crate::{Env, StorageError};

/// How often a statement is repeated that met another one, at stricter isolation levels than PostgreSQL's default.
const TRIES: u32 = 12;

/// The pause before the second try; each pause is twice the one before, more or less.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How many connections serve the calls on the background runtime.
const IN_BACKGROUND: u32 = 4;

/// Sends statements. Clones share the connections.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) pools: Arc<Pools>,
    pub(super) statements: Arc<Result<Statements, InvalidTableName>>,
    pub(super) env: Env,
    pub(super) limit: Duration,
    pub(super) protocol: Protocol,
}

/// A connection is driven by the runtime on which it was made, and stops with it. So the calls on the background runtime have
/// connections of their own, which are made there.
pub(super) struct Pools {
    main: PgPool,
    background: OnceLock<PgPool>,
    /// Open transactions take at most half of the connections, so that the other statements go on.
    transactions: Arc<Semaphore>,
    max_open: usize,
}

/// How values reach the server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Protocol {
    /// As parameters of named prepared statements, which the driver keeps for each connection.
    Prepared,
    /// As literals in the text of the statement. It is one message, so a proxy can give each statement to another server. All values
    /// are numbers or bytes in hexadecimal digits, so nothing needs escaping.
    Simple,
}

/// A value in a statement.
#[derive(Clone, Copy)]
pub(super) enum Value<'a> {
    Bytes(&'a [u8]),
    NullableBytes(Option<&'a [u8]>),
    Number(i64),
    Interval(Duration),
}

impl Link {
    pub(super) fn new(
        main: PgPool,
        statements: Result<Statements, InvalidTableName>,
        limit: Duration,
    ) -> Self {
        let connections = main.options().get_max_connections();
        let max_open = usize::try_from(connections / 2).unwrap_or(usize::MAX);
        let max_open = max_open.min(Semaphore::MAX_PERMITS);
        Self {
            pools: Arc::new(Pools {
                main,
                background: OnceLock::new(),
                transactions: Arc::new(Semaphore::new(max_open)),
                max_open,
            }),
            statements: Arc::new(statements),
            env: Env::system(),
            limit,
            protocol: Protocol::Prepared,
        }
    }

    pub(super) fn statements(&self) -> Result<&Statements, StorageError> {
        match &*self.statements {
            Ok(statements) => Ok(statements),
            Err(invalid) => Err(invalid.clone().into()),
        }
    }

    pub(super) fn main_pool(&self) -> &PgPool {
        &self.pools.main
    }

    /// What leads to the same server and database.
    pub(super) fn connect_options(&self) -> PgConnectOptions {
        (*self.pools.main.connect_options()).clone()
    }

    /// Sends a statement, and returns its rows.
    pub(super) async fn run(
        &self,
        statement: &str,
        values: &[Value<'_>],
    ) -> Result<Vec<PgRow>, StorageError> {
        self.run_within(self.limit, statement, values).await
    }

    pub(super) async fn run_within(
        &self,
        limit: Duration,
        statement: &str,
        values: &[Value<'_>],
    ) -> Result<Vec<PgRow>, StorageError> {
        let text = match self.protocol {
            Protocol::Prepared => Cow::Borrowed(statement),
            Protocol::Simple => Cow::Owned(with_literals(statement, values)),
        };
        match self.env.within(limit, self.send(&text, values)).await {
            Some(Ok(rows)) => Ok(rows),
            Some(Err(error)) => Err(error::into_storage_error(error)),
            None => Err(StorageError::timeout()),
        }
    }

    /// Sends a text of several statements, which are one transaction.
    pub(super) async fn run_script(&self, limit: Duration, text: &str) -> Result<(), StorageError> {
        let link = Self {
            protocol: Protocol::Simple,
            ..self.clone()
        };
        match link.env.within(limit, link.send(text, &[])).await {
            Some(Ok(_)) => Ok(()),
            Some(Err(error)) => Err(error::into_storage_error(error)),
            None => Err(StorageError::timeout()),
        }
    }

    /// Every statement of ours may be repeated: what it did before it lost its connection, it finds done.
    async fn send(&self, text: &str, values: &[Value<'_>]) -> Result<Vec<PgRow>, sqlx::Error> {
        let (mut lost, mut tries) = (0, 1);
        let most_lost = self.most_lost();
        loop {
            let mut lent = self.lend().await?;
            let error = match lent.send(self.protocol, text, values).await {
                Ok(rows) => {
                    lent.give_back();
                    return Ok(rows);
                }
                Err(error) => error,
            };
            match error::cure(&error) {
                Cure::AnotherConnection if lost < most_lost => lost += 1,
                Cure::AnotherTry if tries < TRIES => {
                    lent.give_back();
                    self.env.sleep(self.pause(tries)).await;
                    tries += 1;
                }
                Cure::AnotherTry | Cure::Keep => {
                    lent.give_back();
                    return Err(error);
                }
                Cure::AnotherConnection | Cure::Close => return Err(error),
            }
        }
    }

    /// A connection of the pool.
    pub(super) async fn lend(&self) -> Result<Lent, sqlx::Error> {
        let pool = self.pool();
        Ok(Lent {
            connection: Some(pool.acquire().await?),
            is_replaced: pool.options().get_min_connections() > 0,
        })
    }

    /// How many transactions are lent at once.
    pub(super) fn max_open(&self) -> usize {
        self.pools.max_open
    }

    /// A place among the open transactions.
    pub(super) async fn transaction_place(&self) -> Result<OwnedSemaphorePermit, StorageError> {
        if self.pools.max_open == 0 {
            return Err(StorageError::unavailable(
                "a pool of one connection can't lend a transaction: raise `max_connections`",
            ));
        }
        let place = self.pools.transactions.clone().acquire_owned().await;
        // It is never closed.
        place.map_err(StorageError::unavailable)
    }

    /// How many connections a call may find lost: after a restart of the server all of the pool are.
    pub(super) fn most_lost(&self) -> u32 {
        self.pool().options().get_max_connections()
    }

    fn pool(&self) -> &PgPool {
        if !Env::in_background() {
            return &self.pools.main;
        }
        self.pools.background.get_or_init(|| {
            // The hooks of the main pool set up these connections too.
            let options = self.pools.main.options().clone();
            options
                .min_connections(0)
                .max_connections(IN_BACKGROUND)
                .connect_lazy_with(self.connect_options())
        })
    }

    /// A pause by chance, so that two that met do not meet again.
    pub(super) fn pause(&self, tries: u32) -> Duration {
        let pause = FIRST_PAUSE.saturating_mul(1 << tries.min(10));
        jittered(&self.env, pause.min(LONGEST_PAUSE))
    }
}

/// `pause`, give or take a half.
pub(super) fn jittered(env: &Env, pause: Duration) -> Duration {
    let mut random = [0];
    env.fill_random(&mut random);
    pause / 2 + pause * u32::from(random[0]) / 255
}

/// A connection that is closed when it is dropped in the middle of a statement, so that no other statement waits for that one.
pub(super) struct Lent {
    /// There is one until it is given back.
    connection: Option<PoolConnection<Postgres>>,
    /// Whether the pool starts a task for each connection that it loses.
    is_replaced: bool,
}

impl Lent {
    async fn send(
        &mut self,
        protocol: Protocol,
        text: &str,
        values: &[Value<'_>],
    ) -> Result<Vec<PgRow>, sqlx::Error> {
        let connection = self.connection()?;
        // To the end: an error may follow the rows, when their transaction is committed.
        match protocol {
            Protocol::Simple => connection.fetch_all(text).await,
            Protocol::Prepared => {
                let mut query = sqlx::query(text);
                for value in values {
                    query = match *value {
                        Value::Bytes(bytes) => query.bind(bytes),
                        Value::NullableBytes(bytes) => query.bind(bytes),
                        Value::Number(number) => query.bind(number),
                        Value::Interval(duration) => query.bind(seconds(duration)),
                    };
                }
                connection.fetch_all(query).await
            }
        }
    }

    pub(super) fn connection(&mut self) -> Result<&mut PgConnection, sqlx::Error> {
        let connection = self.connection.as_deref_mut();
        connection.ok_or(sqlx::Error::PoolClosed)
    }

    #[expect(
        clippy::expect_used,
        reason = "a transaction gives it back when it ends, by value"
    )]
    pub(super) fn shared(&self) -> &PgConnection {
        self.connection
            .as_ref()
            .expect("a connection until it is given back")
    }

    #[expect(
        clippy::expect_used,
        reason = "a transaction gives it back when it ends, by value"
    )]
    pub(super) fn exclusive(&mut self) -> &mut PgConnection {
        self.connection
            .as_mut()
            .expect("a connection until it is given back")
    }

    pub(super) fn give_back(&mut self) {
        self.connection = None;
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(connection) = self.connection.take() else {
            return;
        };
        if self.is_replaced && Handle::try_current().is_err() {
            // The driver would panic: there is no runtime for its task.
            std::mem::forget(connection);
            return;
        }
        drop(connection.detach());
    }
}

/// At most a hundred years, so that no sum with the time of day is too large.
fn seconds(duration: Duration) -> f64 {
    const LONGEST: Duration = Duration::from_secs(100 * 366 * 24 * 3600);
    duration.min(LONGEST).as_secs_f64()
}

/// The statement with values in place of `$1` and so on.
pub(super) fn with_literals(statement: &str, values: &[Value<'_>]) -> String {
    let mut parts = statement.split('$');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let value = part.bytes().next().and_then(|digit| {
            let number = usize::from(digit.wrapping_sub(b'1'));
            values.get(number)
        });
        match value {
            Some(value) => {
                value.write(&mut text);
                text.push_str(&part[1..]);
            }
            // No statement of ours has one.
            None => {
                text.push('$');
                text.push_str(part);
            }
        }
    }
    text
}

impl Value<'_> {
    fn write(self, text: &mut String) {
        // Writing to a `String` never fails.
        let _ = match self {
            Self::NullableBytes(None) => text.write_str("NULL"),
            Self::Bytes(bytes) | Self::NullableBytes(Some(bytes)) => {
                text.push_str("decode('");
                text.reserve(2 * bytes.len() + 64);
                for byte in bytes {
                    for digit in [byte >> 4, byte & 15] {
                        text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
                    }
                }
                text.write_str("', 'hex')")
            }
            Self::Number(number) => write!(text, "({number})"),
            Self::Interval(duration) => write!(text, "({:.9})", seconds(duration)),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_stand_for_parameters() {
        let values = [
            Value::Bytes(b"\x00'\\\xff"),
            Value::NullableBytes(None),
            Value::Number(-7),
            Value::Interval(Duration::from_micros(1_500_001)),
        ];
        assert_eq!(
            with_literals("a $1::bytea b $2::bytea, $3::bigint + $4::float8", &values),
            "a decode('00275cff', 'hex')::bytea b NULL::bytea, (-7)::bigint + (1.500001000)::float8"
        );
    }
}
