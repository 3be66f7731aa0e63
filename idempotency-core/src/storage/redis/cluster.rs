//! The nodes of a Cluster, with a connection to each.
//!
//! The driver's `ClusterConnection` is one task for all nodes. While it refreshes the slots it does nothing else, for seconds if one
//! node is silent. Here a silent node delays only its own commands. That is simple because each of our commands has one key.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, Shared, join_all},
    stream::FuturesUnordered,
};
use redis::{
    Arg, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, RedisError, RedisResult,
    ServerErrorKind, Value, cluster_routing::Slot,
};
use tokio::sync::oneshot;

use super::{
    commands::{pairs, text},
    maker::One,
    reconnecting::{Connection, Reconnecting, gone},
};
use crate::Env;

/// Redis names this host if nodes are to be reached by name and the name is not known.
const NAMELESS: &str = "?";

/// How many redirections a command follows.
const REDIRECTIONS: usize = 5;

/// How long a refresh counts as fresh.
const FRESH: Duration = Duration::from_millis(100);

/// How many nodes have a vote when the owners are asked for, and how long after the first.
const VOTES: usize = 5;
const MOMENT: Duration = Duration::from_millis(50);

/// A connection to each node. Clones share the connections.
#[derive(Clone)]
pub(super) struct Cluster(Arc<Inner>);

struct Inner {
    /// User, password and TLS of all nodes.
    settings: ConnectionInfo,
    /// The nodes that `connect` was given.
    named: Vec<Address>,
    /// Time limit of connecting, and of asking one node for the slots.
    limit: Duration,
    env: Env,
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State>,
}

/// Host and port.
type Address = (String, u16);

type Node = Arc<Reconnecting<One>>;

#[derive(Default)]
struct State {
    owners: Owners,
    nodes: HashMap<Address, Node>,
    refresh: Option<Refresh>,
}

/// A refresh of the slots' owners, which all commands that need it share.
struct Refresh {
    since: Duration,
    done: Shared<BoxFuture<'static, ()>>,
}

/// Which node owns which slot.
#[derive(Clone, Default)]
struct Owners {
    addresses: Vec<Address>,
    /// For each slot with a known owner an index into `addresses`.
    slots: HashMap<Slot, usize>,
}

impl Cluster {
    /// The Cluster of these nodes, at least one. Other nodes get the settings of the first.
    pub(super) fn new(named: &[ConnectionInfo], limit: Duration, env: Env) -> RedisResult<Self> {
        let Some(settings) = named.first().cloned() else {
            return Err(invalid("no node of the Cluster is named"));
        };
        let named = named
            .iter()
            .filter_map(|info| match info.addr() {
                ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                    Some((host.clone(), *port))
                }
                _ => None,
            })
            .collect::<Vec<_>>();
        if named.is_empty() {
            return Err(invalid(
                "the nodes of a Cluster are reached by host and port, not by a unix socket",
            ));
        }
        Ok(Self(Arc::new(Inner {
            settings,
            named,
            limit,
            env,
            state: Mutex::default(),
        })))
    }

    /// The same Cluster with connections of its own, for another runtime.
    pub(super) fn apart(&self) -> Self {
        let inner = &*self.0;
        let state = State {
            owners: inner.state().owners.clone(),
            ..State::default()
        };
        Self(Arc::new(Inner {
            settings: inner.settings.clone(),
            named: inner.named.clone(),
            limit: inner.limit,
            env: inner.env.clone(),
            state: Mutex::new(state),
        }))
    }

    /// The masters, after a refresh.
    pub(super) async fn masters(&self) -> RedisResult<Vec<Client>> {
        let owners = self.find_owners().await?;
        let masters = owners.masters();
        self.0.state().replace(owners, &self.0.named);
        masters.iter().map(|master| self.0.client(master)).collect()
    }

    /// Sends `command` to the node that owns the slot of its key.
    async fn ask(&self, command: &Cmd, patience: Duration) -> RedisResult<Value> {
        let Some(key) = key_of(command) else {
            return self.ask_masters(command, patience).await;
        };
        let slot = Slot::for_key(key);
        // If the call is dropped, its node may be gone.
        let mut doubt = Doubt(Some(self));
        let mut to = match self.owner(slot) {
            Some(owner) => owner,
            None => {
                self.refreshed().await;
                self.owner(slot)
                    .ok_or_else(|| gone("no node of the Cluster has the slot of the key"))?
            }
        };
        let mut is_asking = false;
        for _ in 0..REDIRECTIONS {
            let node = self.0.node(&to)?;
            let answer = node.answer(command, is_asking, patience).await;
            let Err(error) = answer else {
                doubt.0 = None;
                return answer;
            };
            match error.kind() {
                ErrorKind::Server(kind @ (ServerErrorKind::Moved | ServerErrorKind::Ask)) => {
                    is_asking = kind == ServerErrorKind::Ask;
                    let Some(other) = redirection(&error, &to) else {
                        self.refreshed().await;
                        match self.owner(slot) {
                            Some(owner) if !is_asking && owner != to => to = owner,
                            _ => return Err(error),
                        }
                        continue;
                    };
                    if !is_asking {
                        self.0.state().owners.set(slot, &other);
                        self.refresh();
                    }
                    to = other;
                }
                // The slot may have a new owner. The caller sends the command again.
                ErrorKind::Io | ErrorKind::Server(ServerErrorKind::ClusterDown) => {
                    self.refreshed().await;
                    doubt.0 = None;
                    return Err(error);
                }
                _ => {
                    doubt.0 = None;
                    return Err(error);
                }
            }
        }
        Err(gone("the slot of the key moves faster than it is followed"))
    }

    /// Sends `command` to all masters, and fails if one of them fails.
    async fn ask_masters(&self, command: &Cmd, patience: Duration) -> RedisResult<Value> {
        if word(command, 0) != Some(b"SCRIPT") {
            // `WAIT` says nothing without the connection of the claim.
            return Err(invalid(
                "`wait_replicas` is for one server with replicas, not for a Cluster",
            ));
        }
        let masters = self.0.state().owners.masters();
        let answers = masters.iter().map(|master| async {
            let node = self.0.node(master)?;
            node.send(command, patience).await
        });
        let answers: RedisResult<Vec<Value>> = join_all(answers).await.into_iter().collect();
        Ok(answers?.pop().unwrap_or(Value::Nil))
    }

    fn owner(&self, slot: Slot) -> Option<Address> {
        self.0.state().owners.of(slot).cloned()
    }

    /// Begins to refresh the owners of the slots, unless a refresh is fresh or under way. Returns a future of its end.
    fn refresh(&self) -> Option<Shared<BoxFuture<'static, ()>>> {
        let inner = &*self.0;
        let now = inner.env.now();
        let mut state = inner.state();
        if let Some(refresh) = &state.refresh {
            let age = now.saturating_sub(refresh.since);
            // `peek` would not see an end that no caller has polled.
            let is_over = refresh.done.clone().now_or_never().is_some();
            // The runtime of a late one may stand still.
            let lasts = if is_over {
                FRESH
            } else {
                inner.limit.saturating_mul(3)
            };
            if age < lasts {
                return Some(refresh.done.clone());
            }
        }
        let spawner = inner.env.spawner()?;
        let (tell, told) = oneshot::channel::<()>();
        let done = told.map(drop).boxed().shared();
        state.refresh = Some(Refresh {
            since: now,
            done: done.clone(),
        });
        // A runtime that shuts down drops the task at once.
        drop(state);
        let cluster = Self(self.0.clone());
        spawner.spawn(async move {
            if let Ok(owners) = cluster.find_owners().await {
                cluster.0.state().replace(owners, &cluster.0.named);
            }
            // Perhaps nobody waits for it.
            let _ = tell.send(());
        });
        Some(done)
    }

    async fn refreshed(&self) {
        if let Some(done) = self.refresh() {
            done.await;
        }
    }

    async fn find_owners(&self) -> RedisResult<Owners> {
        // Whether connected to or not. Under the names that were given some may be there twice, and would have two votes.
        let known = self.0.state().owners.masters();
        match self.owners_from(known).await {
            Ok(owners) => Ok(owners),
            Err(_) => self.owners_from(self.0.named.clone()).await,
        }
    }

    /// Asks all these nodes at once. The majority of the first answers decides, because a node that is cut off from the others returns
    /// former owners.
    async fn owners_from(&self, nodes: Vec<Address>) -> RedisResult<Owners> {
        let inner = &*self.0;
        let mut question = redis::cmd("CLUSTER");
        question.arg("SLOTS");
        let question = &question;
        let answers = nodes.into_iter().map(|address| async move {
            let node = inner.node(&address)?;
            let asked = node.send(question, inner.limit);
            let answer = inner.env.within(inner.limit, asked).await;
            let answer = answer.unwrap_or_else(|| Err(gone("a node of the Cluster is silent")))?;
            Owners::read(answer, &address.0)
                .ok_or_else(|| gone("a node of the Cluster knows of no slot"))
        });
        let mut answers: FuturesUnordered<_> = answers.collect();
        let mut told = Vec::new();
        let mut failure = None;
        while told.is_empty() {
            match answers.next().await {
                Some(Ok(owners)) => told.push(owners),
                Some(Err(error)) => failure = Some(error),
                None => {
                    let nobody = || gone("no node of the Cluster is known");
                    return Err(failure.unwrap_or_else(nobody));
                }
            }
        }
        let others = async {
            while told.len() < VOTES
                && let Some(answer) = answers.next().await
            {
                told.extend(answer);
            }
        };
        // Those that are not heard by then have no vote.
        let _ = inner.env.within(MOMENT, others).await;
        Ok(Owners::agreed(told))
    }
}

impl Connection for Cluster {
    fn send<'a>(
        &'a self,
        command: &'a Cmd,
        patience: Duration,
    ) -> BoxFuture<'a, RedisResult<Value>> {
        self.ask(command, patience).boxed()
    }
}

impl Inner {
    /// Nothing under this lock panics, so a poisoned one is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn client(&self, (host, port): &Address) -> RedisResult<Client> {
        let mut address = self.settings.addr().clone();
        if let ConnectionAddr::Tcp(h, p)
        | ConnectionAddr::TcpTls {
            host: h, port: p, ..
        } = &mut address
        {
            (*h, *p) = (host.clone(), *port);
        }
        Client::open(self.settings.clone().set_addr(address))
    }

    fn node(&self, address: &Address) -> RedisResult<Node> {
        let mut state = self.state();
        if let Some(node) = state.nodes.get(address) {
            return Ok(node.clone());
        }
        let one = One(self.client(address)?, self.limit);
        let node = Arc::new(Reconnecting::new(one, self.env.clone()));
        state.nodes.insert(address.clone(), node.clone());
        Ok(node)
    }
}

impl State {
    fn replace(&mut self, owners: Owners, named: &[Address]) {
        self.owners = owners;
        // The other nodes have left the Cluster.
        let owners = &self.owners.addresses;
        self.nodes
            .retain(|address, _| owners.contains(address) || named.contains(address));
    }
}

impl Owners {
    /// Reads the answer to `CLUSTER SLOTS`; `None` if it has no slot. An empty host means the node that was asked.
    fn read(answer: Value, asked: &str) -> Option<Self> {
        let mut owners = Self::default();
        let Value::Array(ranges) = answer else {
            return None;
        };
        for range in ranges {
            let Value::Array(range) = range else {
                return None;
            };
            let [
                Value::Int(first),
                Value::Int(last),
                Value::Array(master),
                ..,
            ] = &range[..]
            else {
                return None;
            };
            let [host, Value::Int(port), ..] = &master[..] else {
                return None;
            };
            // A node whose name is not known tells its address, unless it does not know that either.
            let ip = || pairs(master.get(3)?).remove("ip");
            let host = match text(host) {
                Some(NAMELESS) => ip(),
                host => host.map(str::to_owned),
            };
            let host = host.filter(|host| !host.is_empty());
            let host = host.unwrap_or_else(|| asked.to_owned());
            let master = (host, u16::try_from(*port).ok()?);
            let [first, last] = [first, last].map(|slot| u16::try_from(*slot).ok());
            for slot in (first?..=last?).map_while(Slot::new) {
                owners.set(slot, &master);
            }
        }
        (!owners.addresses.is_empty()).then_some(owners)
    }

    /// For each slot the owner that most answers name; in a tie the one named first.
    fn agreed(mut told: Vec<Self>) -> Self {
        if told.len() == 1 {
            return told.remove(0);
        }
        let mut agreed = Self::default();
        for slot in (0..).map_while(Slot::new) {
            let named = || told.iter().filter_map(|owners| owners.of(slot));
            let votes = |owner: &Address| named().filter(|other| *other == owner).count();
            // In a tie `max_by_key` returns the last.
            if let Some(owner) = named().rev().max_by_key(|owner| votes(owner)) {
                agreed.set(slot, owner);
            }
        }
        agreed
    }

    fn of(&self, slot: Slot) -> Option<&Address> {
        self.addresses.get(*self.slots.get(&slot)?)
    }

    fn set(&mut self, slot: Slot, owner: &Address) {
        let known = self.addresses.iter().position(|address| address == owner);
        let place = known.unwrap_or_else(|| {
            self.addresses.push(owner.clone());
            self.addresses.len() - 1
        });
        self.slots.insert(slot, place);
    }

    fn masters(&self) -> Vec<Address> {
        self.addresses.clone()
    }
}

/// A command without an answer yet. If it is dropped, the owners are refreshed.
struct Doubt<'a>(Option<&'a Cluster>);

impl Drop for Doubt<'_> {
    fn drop(&mut self) {
        if let Some(cluster) = self.0.take() {
            cluster.refresh();
        }
    }
}

/// The node that a `MOVED` or `ASK` error names.
fn redirection(error: &RedisError, from: &Address) -> Option<Address> {
    let (to, _) = error.redirect_node()?;
    let (host, port) = to.rsplit_once(':')?;
    let host = match host {
        "" => &from.0,
        NAMELESS => return None,
        host => host,
    };
    Some((host.to_owned(), port.parse().ok()?))
}

fn key_of(command: &Cmd) -> Option<&[u8]> {
    let at = match word(command, 0)? {
        b"EVAL" | b"EVALSHA" => 3,
        b"SCRIPT" | b"WAIT" => return None,
        _ => 1,
    };
    word(command, at)
}

fn word(command: &Cmd, at: usize) -> Option<&[u8]> {
    match command.args_iter().nth(at)? {
        Arg::Simple(word) => Some(word),
        _ => None,
    }
}

fn invalid(what: &'static str) -> RedisError {
    (ErrorKind::InvalidClientConfig, what).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    #![allow(
        clippy::disallowed_methods,
        reason = "nodes are outside of what `Env` drives"
    )]

    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use tokio::{
        io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
        net::TcpListener,
        sync::watch,
        task::yield_now,
    };

    use super::*;

    /// A node that tells of owners, and of nothing else.
    struct Teller {
        listener: TcpListener,
        address: Address,
        asked: Arc<AtomicU32>,
    }

    impl Teller {
        async fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            Self {
                listener,
                address: ("127.0.0.1".to_owned(), port),
                asked: Arc::default(),
            }
        }

        /// Says that `owner` has all slots, once `is_its_turn`. Says when it has said so.
        fn tell(self, owner: &Address, mut is_its_turn: watch::Receiver<bool>) -> Arc<AtomicU32> {
            let (host, port) = owner;
            let len = host.len();
            let owners =
                format!("*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n${len}\r\n{host}\r\n:{port}\r\n");
            let asked = self.asked.clone();
            tokio::spawn(async move {
                let (mut stream, _) = self.listener.accept().await.unwrap();
                let (from, mut to) = stream.split();
                let mut lines = BufReader::new(from).lines();
                while let Ok(Some(line)) = lines.next_line().await {
                    let answer = match line.as_str() {
                        "SETINFO" => "+OK\r\n",
                        "SLOTS" => {
                            let _ = is_its_turn.wait_for(|turn| *turn).await;
                            self.asked.fetch_add(1, SeqCst);
                            &owners
                        }
                        _ => continue,
                    };
                    to.write_all(answer.as_bytes()).await.unwrap();
                }
            });
            asked
        }
    }

    fn slot(number: u16) -> Slot {
        Slot::new(number).unwrap()
    }

    fn cluster(named: &[&Address], env: Env) -> Cluster {
        let named: Vec<ConnectionInfo> = named
            .iter()
            .map(|(host, port)| {
                let client = Client::open(format!("redis://{host}:{port}")).unwrap();
                client.get_connection_info().clone()
            })
            .collect();
        Cluster::new(&named, Duration::from_secs(1), env).unwrap()
    }

    fn at_once() -> watch::Receiver<bool> {
        watch::Sender::new(true).subscribe()
    }

    /// Who began it may not have waited for its end.
    #[tokio::test]
    async fn a_question_that_is_answered_keeps_nobody_from_the_next() {
        let (env, clock) = Env::simulated(7);
        let node = Teller::new().await;
        let address = node.address.clone();
        let asked = node.tell(&address, at_once());
        let cluster = cluster(&[&address], env);
        drop(cluster.refresh());
        while cluster.owner(slot(0)).is_none() {
            yield_now().await;
        }
        clock.advance(FRESH);
        cluster.refreshed().await;
        assert_eq!(asked.load(SeqCst), 2);
    }

    /// A node that is cut off from the others, and not from us, still names itself.
    #[tokio::test]
    async fn a_node_that_knows_no_better_is_outvoted() {
        let (env, _clock) = Env::simulated(7);
        let [old, one, two] = [
            Teller::new().await,
            Teller::new().await,
            Teller::new().await,
        ];
        let [former, new, third] = [&old, &one, &two].map(|node| node.address.clone());
        let cluster = cluster(&[&former, &new, &third], env);
        // It is the first to answer.
        let turn = watch::Sender::new(false);
        one.tell(&new, turn.subscribe());
        two.tell(&new, turn.subscribe());
        let asked = old.tell(&former, at_once());
        let refreshed = cluster.refreshed();
        let turns = async {
            while asked.load(SeqCst) == 0 {
                yield_now().await;
            }
            turn.send_replace(true);
        };
        tokio::join!(refreshed, turns);
        assert_eq!(cluster.owner(slot(0)), Some(new));
    }

    /// The nodes that were named may have been replaced long ago.
    #[tokio::test]
    async fn owners_are_asked_that_were_not_connected_to_yet() {
        let (env, clock) = Env::simulated(7);
        let [named, owner] = [Teller::new().await, Teller::new().await];
        let [first, second] = [&named, &owner].map(|node| node.address.clone());
        let cluster = cluster(&[&first], env);
        named.tell(&second, at_once());
        cluster.refreshed().await;
        let asked = owner.tell(&second, at_once());
        let apart = cluster.apart();
        // The one that was named lets nobody in any more.
        let patience = async {
            loop {
                clock.advance(FRESH);
                yield_now().await;
            }
        };
        tokio::select! {
            () = apart.refreshed() => {}
            () = patience => {}
        }
        assert_eq!(asked.load(SeqCst), 1);
    }

    #[test]
    fn redirections_lead_to_hosts_of_all_kinds() {
        let asked = ("asked".to_owned(), 1);
        for (told, host) in [
            ("MOVED 7 n1:6380", Some("n1")),
            ("ASK 7 10.0.0.1:6380", Some("10.0.0.1")),
            ("MOVED 7 ::1:6380", Some("::1")),
            ("MOVED 7 :6380", Some("asked")),
            ("MOVED 7 ?:6380", None),
            ("MOVED 7 n1", None),
            ("MOVED 7 n1:66000", None),
            ("MOVED", None),
            ("ERR 7 n1:6380", None),
        ] {
            let answer = redis::parse_redis_value(format!("-{told}\r\n").as_bytes());
            let error = answer.and_then(Value::extract_error).unwrap_err();
            let expected = host.map(|host| (host.to_owned(), 6380));
            assert_eq!(redirection(&error, &asked), expected, "{told}");
        }
    }

    #[test]
    fn owners_are_read_from_what_nodes_tell() {
        let node = |host: Value, port| Value::Array(vec![host, Value::Int(port)]);
        let range =
            |first, last, node| Value::Array(vec![Value::Int(first), Value::Int(last), node]);
        let answer = Value::Array(vec![
            range(0, 1, node(Value::BulkString(b"n1".to_vec()), 1)),
            range(2, 2, node(Value::Nil, 2)),
            range(3, 20_000, node(Value::BulkString(b"n1".to_vec()), 1)),
        ]);
        let owners = Owners::read(answer, "asked").unwrap_or_default();
        let [one, two] = [("n1".to_owned(), 1), ("asked".to_owned(), 2)];
        assert_eq!(
            [0, 1, 2, 3].map(|number| owners.of(slot(number))),
            [Some(&one), Some(&one), Some(&two), Some(&one)]
        );
        assert_eq!(owners.of(slot(16_383)), Some(&one));
        // That of which the name is not known tells its address.
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let pair = || [text("ip"), text("::1")];
        for (told, host) in [
            (Value::Array(pair().to_vec()), "::1"),
            (Value::Map(vec![pair().into()]), "::1"),
            (Value::Array(vec![text("ip"), text("")]), "asked"),
            (Value::Nil, "asked"),
        ] {
            let node = vec![text("?"), Value::Int(1), text("id"), told];
            let answer = Value::Array(vec![range(0, 1, Value::Array(node))]);
            let owners = Owners::read(answer, "asked").unwrap();
            assert_eq!(owners.of(slot(0)), Some(&(host.to_owned(), 1)));
        }
        for odd in [
            Value::Nil,
            Value::Array(vec![]),
            Value::Array(vec![Value::Int(0)]),
            Value::Array(vec![range(0, 1, node(Value::Nil, 70_000))]),
            Value::Array(vec![range(-1, 1, node(Value::Nil, 1))]),
        ] {
            assert!(Owners::read(odd, "asked").is_none());
        }
    }
}
