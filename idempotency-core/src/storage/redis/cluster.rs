//! The nodes of a Cluster, with a connection to each.
//!
//! The driver's `ClusterConnection` is one task for all nodes. While it refreshes the slots it does nothing else, for seconds if one
//! node is silent. Here a silent node delays only its own commands. That is simple because each of our commands has one key.

use std::{
    collections::{HashMap, HashSet},
    future::ready,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use redis::{
    Arg, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue as _, RedisError,
    RedisResult, ServerErrorKind, Value, cluster::NodeAddress,
};

use super::{
    connector::gone,
    reconnecting::{Connection, Question, Reconnecting},
};
use crate::Env;

const SLOTS: usize = 16_384;

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
pub(super) struct Cluster {
    /// User, password and TLS of all nodes.
    settings: Arc<ConnectionInfo>,
    /// The nodes that `connect` was given.
    named: Arc<[NodeAddress]>,
    /// Time limit of connecting, and of asking one node for the slots.
    limit: Duration,
    env: Env,
    /// `std`'s lock, because sections are short and never await.
    state: Arc<Mutex<State>>,
    /// When the owners were refreshed. The caller that refreshes them has the lock, and the others wait for it.
    refreshed_at: Arc<tokio::sync::Mutex<Option<Duration>>>,
}

#[derive(Default)]
struct State {
    owners: Owners,
    nodes: HashMap<NodeAddress, Node>,
}

/// Which node owns which slot. Empty as long as no node has told.
type Owners = Vec<Option<NodeAddress>>;

type Node = Arc<Reconnecting>;

impl Cluster {
    /// The Cluster of these nodes. Other nodes get the settings of the first.
    pub(super) fn new(named: &[ConnectionInfo], limit: Duration, env: Env) -> RedisResult<Self> {
        let Some(settings) = named.first().cloned() else {
            return Err(gone("no node of the Cluster is named"));
        };
        // A node is reached by host and port, not by a unix socket.
        let named = named.iter().map(|info| NodeAddress::try_from(info.addr()));
        Ok(Self {
            settings: Arc::new(settings),
            named: named.collect::<RedisResult<_>>()?,
            limit,
            env,
            state: Arc::default(),
            refreshed_at: Arc::default(),
        })
    }

    /// The same Cluster with connections of its own, for another runtime.
    pub(super) fn apart(&self) -> Self {
        let state = State {
            owners: self.state().owners.clone(),
            nodes: HashMap::new(),
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            refreshed_at: Arc::default(),
            ..self.clone()
        }
    }

    /// The masters, after a refresh.
    pub(super) async fn masters(&self) -> RedisResult<Vec<Node>> {
        let owners = self.find_owners().await?;
        let masters = masters(&owners);
        self.replace(owners);
        masters.iter().map(|master| self.node(master)).collect()
    }

    /// Sends `command` to the node that owns the slot of its key, and follows redirections.
    async fn follow(&self, command: &Cmd, patience: Duration) -> RedisResult<Value> {
        let Some(key) = key_of(command) else {
            // `WAIT` says nothing without the connection of the claim.
            let what = "`wait_replicas` is for one server with replicas, not for a Cluster";
            return Err((ErrorKind::InvalidClientConfig, what).into());
        };
        let slot = slot_of(key);
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
            let answer = self.node(&to)?.answer(command, is_asking, patience).await;
            let Err(error) = answer else {
                return answer;
            };
            match error.kind() {
                ErrorKind::Server(kind @ (ServerErrorKind::Moved | ServerErrorKind::Ask)) => {
                    is_asking = kind == ServerErrorKind::Ask;
                }
                // The slot may have a new owner. The caller sends the command again.
                ErrorKind::Io | ErrorKind::Server(ServerErrorKind::ClusterDown) => {
                    self.refreshed().await;
                    return Err(error);
                }
                _ => return Err(error),
            }
            to = match redirection(&error, &to) {
                Some(other) => {
                    if !is_asking {
                        if let Some(owner) = self.state().owners.get_mut(slot) {
                            *owner = Some(other.clone());
                        }
                        self.refresh();
                    }
                    other
                }
                None => {
                    self.refreshed().await;
                    let owner = self.owner(slot).filter(|owner| !is_asking && *owner != to);
                    owner.ok_or(error)?
                }
            };
        }
        Err(gone("the slot of the key moves faster than it is followed"))
    }

    fn owner(&self, slot: usize) -> Option<NodeAddress> {
        self.state().owners.get(slot)?.clone()
    }

    /// Refreshes the owners of the slots, unless that was done just now.
    async fn refreshed(&self) {
        // The runtime of the caller that has the lock may stand still.
        let patience = self.limit.saturating_mul(3);
        let mut last = self.env.within(patience, self.refreshed_at.lock()).await;
        let since = last.as_ref().and_then(|last| **last);
        if since.is_some_and(|since| self.env.now().saturating_sub(since) < FRESH) {
            return;
        }
        if let Ok(owners) = self.find_owners().await {
            self.replace(owners);
        }
        if let Some(last) = &mut last {
            **last = Some(self.env.now());
        }
    }

    /// Refreshes the owners of the slots in a task.
    fn refresh(&self) {
        if let Some(spawner) = self.env.spawner() {
            let cluster = self.clone();
            spawner.spawn(async move { cluster.refreshed().await });
        }
    }

    async fn find_owners(&self) -> RedisResult<Owners> {
        // Whether connected to or not. Under the names that were given some may be there twice, and would have two votes.
        let known = masters(&self.state().owners);
        match self.owners_from(known).await {
            Ok(owners) => Ok(owners),
            Err(_) => self.owners_from(self.named.iter().cloned().collect()).await,
        }
    }

    /// Asks all these nodes at once. The majority of the first answers decides, because a node that is cut off from the others returns
    /// former owners.
    async fn owners_from(&self, nodes: HashSet<NodeAddress>) -> RedisResult<Owners> {
        let mut question = redis::cmd("CLUSTER");
        question.arg("SLOTS");
        let question = &question;
        let answers = nodes.into_iter().map(|address| async move {
            let node = self.node(&address)?;
            let asked = node.send(question, self.limit);
            let answer = self.env.within(self.limit, asked).await;
            let answer = answer.unwrap_or_else(|| Err(gone("a node of the Cluster is silent")))?;
            read_owners(answer, address.host())
                .ok_or_else(|| gone("a node of the Cluster knows of no slot"))
        });
        let mut answers: FuturesUnordered<_> = answers.collect();
        let mut failure = gone("no node of the Cluster is known");
        let first = loop {
            match answers.next().await {
                Some(Ok(owners)) => break owners,
                Some(Err(error)) => failure = error,
                None => return Err(failure),
            }
        };
        let mut told = vec![first];
        let others = answers.filter_map(|answer| ready(answer.ok()));
        let others = others.take(VOTES - 1).for_each(|owners| {
            told.push(owners);
            ready(())
        });
        // Those that are not heard by then have no vote.
        let _ = self.env.within(MOMENT, others).await;
        Ok(agreed(&told))
    }

    fn replace(&self, owners: Owners) {
        let masters = masters(&owners);
        let mut state = self.state();
        state.owners = owners;
        // The other nodes have left the Cluster.
        state
            .nodes
            .retain(|address, _| masters.contains(address) || self.named.contains(address));
    }

    fn node(&self, address: &NodeAddress) -> RedisResult<Node> {
        let mut state = self.state();
        if let Some(node) = state.nodes.get(address) {
            return Ok(node.clone());
        }
        let mut to = self.settings.addr().clone();
        if let ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } = &mut to
        {
            (*host, *port) = (address.host().to_owned(), address.port());
        }
        let client = Client::open((*self.settings).clone().set_addr(to))?;
        let node = Arc::new(Reconnecting::to(client, self.limit, self.env.clone()));
        state.nodes.insert(address.clone(), node.clone());
        Ok(node)
    }

    /// Nothing under this lock panics, so a poisoned one is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection for Cluster {
    fn send<'a>(
        &'a self,
        command: &'a Cmd,
        patience: Duration,
    ) -> BoxFuture<'a, RedisResult<Value>> {
        async move {
            // If the call is dropped, its node may be gone.
            let question = Question::new(|| self.refresh());
            let answer = self.follow(command, patience).await;
            question.answered();
            answer
        }
        .boxed()
    }
}

fn masters(owners: &Owners) -> HashSet<NodeAddress> {
    let runs = owners.chunk_by(|owner, next| owner == next);
    runs.filter_map(|run| run.first()?.clone()).collect()
}

/// Reads the answer to `CLUSTER SLOTS`; `None` if it has no slot. An empty host means the node that was asked.
fn read_owners(answer: Value, asked: &str) -> Option<Owners> {
    let text = |value: &Value| String::from_redis_value_ref(value).ok();
    let mut owners = vec![None; SLOTS];
    for range in Vec::<Vec<Value>>::from_redis_value(answer).ok()? {
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
        let host = match text(host) {
            // A node whose name is not known tells its address, unless it does not know that either.
            Some(host) if host == NAMELESS => {
                let more = HashMap::<String, String>::from_redis_value_ref(master.get(3)?);
                more.ok()?.remove("ip")
            }
            host => host,
        };
        let host = host.filter(|host| !host.is_empty());
        let port = u16::try_from(*port).ok()?;
        let master = NodeAddress::new(host.as_deref().unwrap_or(asked), port);
        let [first, last] = [first, last].map(|slot| usize::try_from(*slot).ok());
        let slots = first?..=last?.min(SLOTS - 1);
        owners.get_mut(slots)?.fill(Some(master));
    }
    owners.iter().any(Option::is_some).then_some(owners)
}

/// For each slot the owner that most answers name; in a tie the one named first.
fn agreed(told: &[Owners]) -> Owners {
    let agreed = (0..SLOTS).map(|slot| {
        let named = || told.iter().filter_map(|owners| owners[slot].as_ref());
        let votes = |owner: &NodeAddress| named().filter(|other| *other == owner).count();
        // In a tie `max_by_key` returns the last.
        named().rev().max_by_key(|owner| votes(owner)).cloned()
    });
    agreed.collect()
}

/// The node that a `MOVED` or `ASK` error names.
fn redirection(error: &RedisError, from: &NodeAddress) -> Option<NodeAddress> {
    let (to, _) = error.redirect_node()?;
    let (host, port) = to.rsplit_once(':')?;
    let host = match host {
        "" => from.host(),
        NAMELESS => return None,
        host => host,
    };
    Some(NodeAddress::new(host, port.parse().ok()?))
}

fn key_of(command: &Cmd) -> Option<&[u8]> {
    let word = |at| match command.args_iter().nth(at)? {
        Arg::Simple(word) => Some(word),
        _ => None,
    };
    match word(0)? {
        b"EVAL" | b"EVALSHA" => word(3),
        b"WAIT" => None,
        _ => word(1),
    }
}

/// CRC-16 (XMODEM) of the key, or of the text in its first braces:
/// <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#key-distribution-model>
fn slot_of(key: &[u8]) -> usize {
    let mut sum = 0_u16;
    for byte in tag_of(key).unwrap_or(key) {
        sum ^= u16::from(*byte) << 8;
        for _ in 0..8 {
            sum = match sum & 0x8000 {
                0 => sum << 1,
                _ => (sum << 1) ^ 0x1021,
            };
        }
    }
    usize::from(sum) % SLOTS
}

fn tag_of(key: &[u8]) -> Option<&[u8]> {
    let open = key.iter().position(|byte| *byte == b'{')?;
    let tail = key.get(open + 1..)?;
    let close = tail.iter().position(|byte| *byte == b'}')?;
    tail.get(..close).filter(|tag| !tag.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    #![allow(
        clippy::disallowed_methods,
        reason = "nodes are outside of what `Env` drives"
    )]

    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    use redis::cluster_routing::Slot;
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
        address: NodeAddress,
        asked: Arc<AtomicU32>,
    }

    impl Teller {
        async fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            Self {
                listener,
                address: NodeAddress::new("127.0.0.1", port),
                asked: Arc::default(),
            }
        }

        /// Says that `owner` has all slots, once `is_its_turn`. Says when it has said so.
        fn tell(
            self,
            owner: &NodeAddress,
            mut is_its_turn: watch::Receiver<bool>,
        ) -> Arc<AtomicU32> {
            let (host, port) = (owner.host(), owner.port());
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

    fn cluster(named: &[&NodeAddress], env: Env) -> Cluster {
        let named: Vec<ConnectionInfo> = named
            .iter()
            .map(|address| {
                let client = Client::open(format!("redis://{address}")).unwrap();
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
        cluster.refresh();
        while cluster.owner(0).is_none() {
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
        assert_eq!(cluster.owner(0), Some(new));
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
    fn slots_are_those_of_redis() {
        assert_eq!(slot_of(b"123456789"), 0x31c3);
        for key in [
            "",
            "idempotency:00",
            "{shop}:00",
            "a{shop}b{c}",
            "{}a",
            "a{b",
            "}{a}",
            "{{a}}",
        ] {
            let slot = u16::try_from(slot_of(key.as_bytes())).ok();
            assert_eq!(slot.and_then(Slot::new), Some(Slot::for_key(key)), "{key}");
        }
    }

    #[test]
    fn redirections_lead_to_hosts_of_all_kinds() {
        let asked = NodeAddress::new("asked", 1);
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
            let expected = host.map(|host| NodeAddress::new(host, 6380));
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
        let owners = read_owners(answer, "asked").unwrap_or_default();
        let [one, two] = [("n1", 1), ("asked", 2)].map(|(host, port)| NodeAddress::new(host, port));
        assert_eq!(
            [0, 1, 2, 3].map(|slot| owners[slot].as_ref()),
            [Some(&one), Some(&one), Some(&two), Some(&one)]
        );
        assert_eq!(owners[SLOTS - 1].as_ref(), Some(&one));
        assert_eq!(owners.get(SLOTS), None);
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
            let owners = read_owners(answer, "asked").unwrap();
            assert_eq!(owners[0], Some(NodeAddress::new(host, 1)));
        }
        for odd in [
            Value::Nil,
            Value::Array(vec![]),
            Value::Array(vec![Value::Int(0)]),
            Value::Array(vec![range(0, 1, node(Value::Nil, 70_000))]),
            Value::Array(vec![range(-1, 1, node(Value::Nil, 1))]),
        ] {
            assert!(read_owners(odd, "asked").is_none());
        }
    }
}
