//! Redis as storage, lock and cache use it: commands on claims and records, and waiting for the end of a claim.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use redis::{Client, Cmd, aio::ConnectionLike, sentinel::SentinelClient};

use super::{
    commands::{Commands, Mode, bytes_of, command, milliseconds, unexpected},
    layout::{self, Stored},
    maker::{Sentinels, with_tcp},
    prefix::Prefix,
    reconnecting::{Own, Reconnecting},
    scripts::{self, Script},
    source::{NotifySource, Subscriber},
};
use crate::{
    EncodedKey, Env, Held, NewClaim, StorageError, Token,
    storage::waits::{POLLED, Seen, Waits},
};

/// Access to the keys of a prefix; clones share the connections.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) commands: Commands,
    source: NotifySource,
    waits: Arc<Waits>,
    pub(crate) prefix: Prefix,
}

impl Server {
    /// How long a command may take.
    pub(super) const DEFAULT_LIMIT: Duration = Duration::from_secs(1);

    /// Redis behind `commands`, with notifications from `source`.
    pub(super) fn new(commands: Commands, source: NotifySource, prefix: Prefix) -> Self {
        let subscriber = Subscriber {
            commands: commands.clone(),
            source: source.clone(),
        };
        let subscriber = (!source.is_none()).then(|| Box::new(subscriber) as _);
        Self {
            waits: Arc::new(Waits::new(commands.env.clone(), POLLED, subscriber)),
            commands,
            source,
            prefix,
        }
    }

    /// Redis behind a connection of the user's, which has no notifications.
    pub(crate) fn through<C>(connection: C, prefix: Prefix) -> Self
    where
        C: ConnectionLike + Clone + Send + Sync + 'static,
    {
        let commands = Commands::new(Own(connection), Self::DEFAULT_LIMIT);
        Self::new(commands, NotifySource::none(), prefix)
    }

    /// The master that sentinels name.
    pub(super) fn behind_sentinels(client: SentinelClient, prefix: Prefix) -> Self {
        let sentinels = Sentinels::new(client);
        let connection = || Reconnecting::new(sentinels.clone(), Env::system());
        let commands = Commands::new(connection(), Self::DEFAULT_LIMIT);
        let commands = commands.with_background(connection());
        Self::new(commands, NotifySource::Master(sentinels), prefix)
    }

    /// The same, with notifications from `client`.
    pub(super) fn told_by(self, client: Client) -> Self {
        // It was opened before, so it can be opened again.
        let client = Client::open(with_tcp(client.get_connection_info())).unwrap_or(client);
        let source = NotifySource::Any(vec![client]);
        Self::new(self.commands, source, self.prefix)
    }

    /// The same, with another limit for each command.
    pub(crate) fn limited(self, limit: Duration) -> Self {
        let mut commands = self.commands;
        commands.limit = limit;
        Self::new(commands, self.source, self.prefix)
    }

    /// The same, with keys of another prefix.
    pub(crate) fn prefixed(self, text: &str) -> Self {
        Self {
            prefix: self.prefix.chosen(text),
            ..self
        }
    }

    /// A command on `key`, with room for what else it is about.
    pub(crate) fn command(&self, name: &str, key: &EncodedKey, bytes: usize) -> Cmd {
        let key = self.prefix.name(key);
        let mut command = command(name, 8, key.len() + bytes);
        command.arg(key);
        command
    }

    /// The bytes that a command returns, if there are any.
    pub(crate) async fn bytes(&self, command: &Cmd) -> Result<Option<Bytes>, StorageError> {
        bytes_of(self.commands.ask(command, Mode::Repeatable).await?)
    }

    pub(super) async fn run(
        &self,
        script: &Script,
        key: &EncodedKey,
        arguments: &[&[u8]],
        mode: Mode,
    ) -> Result<i64, StorageError> {
        let key = self.prefix.name(key);
        self.commands.run(script, &key, arguments, mode).await
    }

    /// Runs a script that returns whether the token held the key.
    pub(super) async fn held(
        &self,
        script: &Script,
        key: &EncodedKey,
        arguments: &[&[u8]],
        mode: Mode,
    ) -> Result<Held, StorageError> {
        match self.run(script, key, arguments, mode).await? {
            scripts::DONE => Ok(Held::Yes),
            scripts::NOT_HELD => Ok(Held::Lost),
            scripts::FOREIGN => Err(layout::foreign()),
            _ => Err(unexpected()),
        }
    }

    /// Sets `key` to `claim` if it does not exist, and returns the existing value otherwise. One command, or two if Redis refuses
    /// to write.
    pub(crate) async fn claim(
        &self,
        key: &EncodedKey,
        claim: &NewClaim,
    ) -> Result<Option<Stored>, StorageError> {
        let mut set = self.command("SET", key, 96);
        set.arg(layout::claim(claim)).arg("NX").arg("GET");
        set.arg("PX").arg(milliseconds(claim.lease));
        let found = match self.commands.ask(&set, Mode::Repeatable).await {
            // On OOM, MISCONF (its disk) and NOREPLICAS, `SET` fails before it checks existence.
            Err(refused) if refused.is_refusal() => {
                let get = self.command("GET", key, 0);
                match Box::pin(self.bytes(&get)).await? {
                    None => return Err(refused.into()),
                    found => found,
                }
            }
            answer => bytes_of(answer?)?,
        };
        found.map(layout::read).transpose()
    }

    pub(crate) async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let lease = milliseconds(lease).to_string();
        let arguments = [&token.as_bytes()[..], lease.as_bytes()];
        self.held(&scripts::RENEW, key, &arguments, Mode::Repeatable)
            .await
    }

    pub(crate) async fn release(
        &self,
        key: &EncodedKey,
        token: Token,
    ) -> Result<Held, StorageError> {
        let arguments = [&token.as_bytes()[..]];
        self.held(&scripts::RELEASE, key, &arguments, Mode::Once)
            .await
    }

    /// Returns when `key` has no claim, or after `timeout`. A release wakes one waiter, and soon more if the key stays free.
    pub(crate) async fn wait(
        &self,
        key: &EncodedKey,
        timeout: Duration,
    ) -> Result<(), StorageError> {
        let name = &self.prefix.name(key);
        let look = async |_| {
            let look = &scripts::LEASE_LEFT;
            let left = self.commands.run(look, name, &[], Mode::ForWaiters);
            Ok(match left.await? {
                left @ 0.. => Seen::Claimed(Duration::from_millis(left.unsigned_abs())),
                scripts::FREE => Seen::Free,
                _ => Seen::Completed,
            })
        };
        self.waits.wait(name, timeout, look).await
    }
}
