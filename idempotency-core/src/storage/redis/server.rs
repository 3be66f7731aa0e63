//! Redis as storage, lock and cache use it: commands on claims and records, and waiting for the end of a claim.

use std::{sync::Arc, time::Duration};

use redis::{Client, Cmd, Value, aio::ConnectionLike, sentinel::SentinelClient};

use super::{
    layout::{self, Found},
    link::{Failure, Link, Repeatable, bytes_of, milliseconds},
    maker::{Sentinels, with_tcp},
    reconnecting::{Own, Reconnecting},
    scripts::{self, Script},
    source::NotifySource,
    waits::Waits,
};
use crate::{Env, Held, NewClaim, StorageError, Token};

/// Access to Redis; clones share it.
#[derive(Clone)]
pub(crate) struct Server {
    link: Link,
    waits: Arc<Waits>,
}

impl Server {
    /// How long a command may take.
    pub(super) const DEFAULT_LIMIT: Duration = Duration::from_secs(1);

    /// Redis behind `link`, with notifications from `source`.
    pub(super) fn new(link: Link, source: NotifySource) -> Self {
        let waits = Arc::new(Waits::new(link.clone(), source));
        Self { link, waits }
    }

    /// Redis behind a connection of the user's, which has no notifications.
    pub(crate) fn through<C>(connection: C) -> Self
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        let link = Link::new(Own(connection), Self::DEFAULT_LIMIT);
        Self::new(link, NotifySource::none())
    }

    /// The master that sentinels name.
    pub(super) fn behind_sentinels(client: SentinelClient) -> Self {
        let sentinels = Sentinels::new(client);
        let connection = || Reconnecting::new(sentinels.clone(), Env::system());
        let link = Link::new(connection(), Self::DEFAULT_LIMIT).with_background(connection());
        Self::new(link, NotifySource::Master(sentinels))
    }

    /// The same, with notifications from `client`.
    pub(crate) fn told_by(self, client: Client) -> Self {
        // It was opened before, so it can be opened again.
        let client = Client::open(with_tcp(client.get_connection_info())).unwrap_or(client);
        Self::new(self.link, NotifySource::Any(vec![client]))
    }

    /// The same, with another limit for each command.
    pub(crate) fn limited(self, limit: Duration) -> Self {
        let mut link = self.link;
        link.limit = limit;
        Self::new(link, self.waits.source().clone())
    }

    /// How often the connection was made.
    pub(super) fn age(&self) -> u64 {
        self.link.age()
    }

    pub(crate) fn limit(&self) -> Duration {
        self.link.limit
    }

    pub(crate) fn env(&self) -> &Env {
        &self.link.env
    }

    /// The answer to a command that may be repeated.
    pub(crate) async fn ask(&self, command: &Cmd) -> Result<Value, StorageError> {
        self.link.ask(command, Repeatable::Yes).await
    }

    /// The answer to a command that must not be repeated.
    pub(super) async fn ask_once(&self, command: &Cmd) -> Result<Value, StorageError> {
        self.link.ask(command, Repeatable::No).await
    }

    pub(super) async fn run(
        &self,
        script: &Script,
        name: &str,
        arguments: &[&[u8]],
        repeatable: Repeatable,
    ) -> Result<i64, StorageError> {
        self.link.run(script, name, arguments, repeatable).await
    }

    /// Sets `name` to `claim` if it does not exist, and returns the existing value otherwise. One command, or two if Redis refuses
    /// to write.
    pub(crate) async fn claim(
        &self,
        name: &str,
        claim: &NewClaim,
    ) -> Result<Option<Found>, StorageError> {
        let mut set = redis::cmd("SET");
        set.arg(name).arg(layout::claim(claim)).arg("NX").arg("GET");
        set.arg("PX").arg(milliseconds(claim.lease));
        let answer = match self.link.try_ask(&set, Repeatable::Yes).await {
            // On OOM, MISCONF (its disk) and NOREPLICAS, `SET` fails before it checks existence.
            Err(refused) if refused.is_refusal() => {
                let mut get = redis::cmd("GET");
                get.arg(name);
                match Box::pin(self.ask(&get)).await? {
                    Value::Nil => return Err(refused.into_error()),
                    found => found,
                }
            }
            answer => answer.map_err(Failure::into_error)?,
        };
        match bytes_of(answer)? {
            Some(bytes) => layout::read(bytes).map(Some),
            None => Ok(None),
        }
    }

    pub(crate) async fn renew(
        &self,
        name: &str,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let lease = milliseconds(lease).to_string();
        let arguments = [&token.as_bytes()[..], lease.as_bytes()];
        let renewed = self.run(&scripts::RENEW, name, &arguments, Repeatable::Yes);
        Ok(held_if(renewed.await?))
    }

    pub(crate) async fn release(&self, name: &str, token: Token) -> Result<Held, StorageError> {
        let arguments = [&token.as_bytes()[..]];
        let released = self.run(&scripts::RELEASE, name, &arguments, Repeatable::No);
        Ok(held_if(released.await?))
    }

    /// Returns when `name` has no claim, or after `timeout`. A release wakes one waiter, and soon more if the key stays free.
    pub(crate) async fn wait(&self, name: &str, timeout: Duration) -> Result<(), StorageError> {
        self.waits.wait(name, timeout).await
    }
}

fn held_if(answer: i64) -> Held {
    match answer {
        scripts::DONE => Held::Yes,
        _ => Held::Lost,
    }
}
