//! What is asked of the storage behind, and what may never be near.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

use std::{
    pin::{Pin, pin},
    sync::Mutex,
    task::{Context, Poll, Waker},
};

use futures_util::FutureExt as _;
use http::{HeaderMap, StatusCode};
use tokio::sync::Notify;

use super::*;
use crate::{MemoryStorage, SimulatedClock, StoredResponse, TombstoneReason};

const LEASE: Duration = Duration::from_secs(30);
const DAY: Duration = Duration::from_secs(24 * 3600);
const SECOND: Duration = Duration::from_secs(1);

/// Counts the calls, and lends transactions of no database. One that is `held` waits to go on: before it has its effect, or
/// after.
#[derive(Clone)]
struct Behind {
    memory: MemoryStorage,
    calls: Arc<Mutex<Vec<&'static str>>>,
    held: Arc<Mutex<Option<(&'static str, When)>>>,
    go_on: Arc<Notify>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum When {
    Before,
    After,
}

impl Behind {
    fn calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }

    /// The next call of this name waits.
    fn hold(&self, call: &'static str, when: When) {
        *self.held.lock().unwrap() = Some((call, when));
    }

    fn go_on(&self) {
        self.go_on.notify_one();
    }

    async fn run<T>(&self, call: &'static str, work: impl Future<Output = T>) -> T {
        self.calls.lock().unwrap().push(call);
        let held = self.held.lock().unwrap().take_if(|(name, _)| *name == call);
        if matches!(held, Some((_, When::Before))) {
            self.go_on.notified().await;
        }
        let done = work.await;
        if matches!(held, Some((_, When::After))) {
            self.go_on.notified().await;
        }
        done
    }
}

impl Storage for Behind {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        self.run("begin", self.memory.begin(key, claim)).await
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let work = self.memory.complete(key, token, record, ttl);
        self.run("complete", work).await
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        self.run("renew", self.memory.renew(key, token, lease))
            .await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        self.run("release", self.memory.release(key, token)).await
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        self.run("get", self.memory.get(key)).await
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        self.run("replace", self.memory.replace(key, record, ttl))
            .await
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        self.run("remove", self.memory.remove(key)).await
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        self.run("wait", self.memory.wait(key, timeout)).await
    }
}

impl fmt::Debug for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Behind")
    }
}

struct Nodes {
    behind: Behind,
    env: Env,
    clock: SimulatedClock,
}

impl Nodes {
    fn new() -> Self {
        let (env, clock) = Env::simulated(1);
        let behind = Behind {
            memory: MemoryStorage::builder().env(env.clone()).build(),
            calls: Arc::default(),
            held: Arc::default(),
            go_on: Arc::default(),
        };
        Self { behind, env, clock }
    }

    fn node(&self) -> NearCache<Behind> {
        NearCache::new(self.behind.clone()).env(self.env.clone())
    }
}

fn now<T>(call: impl Future<Output = Result<T, StorageError>>) -> T {
    call.now_or_never().expect("the call is over").unwrap()
}

fn poll<F: Future + ?Sized>(call: Pin<&mut F>) -> Poll<F::Output> {
    call.poll(&mut Context::from_waker(Waker::noop()))
}

fn key() -> EncodedKey {
    EncodedKey::from_bytes([1; 32])
}

fn token(number: u8) -> Token {
    Token::from_bytes([number; 16])
}

fn claim(number: u8) -> NewClaim {
    NewClaim {
        token: token(number),
        fingerprint: None,
        lease: LEASE,
    }
}

fn response(body: &str) -> Record {
    let body = body.to_owned();
    Record {
        fingerprint: None,
        outcome: Outcome::Response(StoredResponse::new(StatusCode::OK, &HeaderMap::new(), body)),
    }
}

fn begin<S: Storage>(storage: &S) -> Begin {
    now(storage.begin(&key(), &claim(9)))
}

fn complete<S: Storage>(storage: &S, number: u8, body: &str, ttl: Duration) -> Held {
    now(storage.complete(&key(), token(number), &response(body), ttl))
}

fn completed(body: &str) -> Begin {
    Begin::Completed(response(body))
}

#[test]
fn a_replay_asks_nobody() {
    let nodes = Nodes::new();
    let node = nodes.node();
    assert_eq!(now(node.begin(&key(), &claim(1))), Begin::Acquired);
    assert!(matches!(begin(&node), Begin::InFlight { .. }));
    assert_eq!(now(node.renew(&key(), token(1), LEASE)), Held::Yes);
    assert_eq!(complete(&node, 1, "one", DAY), Held::Yes);
    assert_eq!(
        nodes.behind.calls(),
        ["begin", "begin", "renew", "complete"]
    );
    for _ in 0..10 {
        assert_eq!(begin(&node.clone()), completed("one"));
        assert_eq!(
            now(node.get(&key())),
            Some(Entry::Completed(response("one")))
        );
    }
    assert_eq!(nodes.behind.calls(), [""; 0]);
}

#[test]
fn what_was_found_is_near_too() {
    for find in ["begin", "get"] {
        let nodes = Nodes::new();
        assert_eq!(complete(&nodes.behind.memory, 1, "one", DAY), Held::Yes);
        let node = nodes.node();
        match find {
            "begin" => assert_eq!(begin(&node), completed("one")),
            _ => assert!(now(node.get(&key())).is_some()),
        }
        assert_eq!(nodes.behind.calls(), [find]);
        assert_eq!(begin(&node), completed("one"));
        assert_eq!(nodes.behind.calls(), [""; 0]);
    }
}

#[test]
fn claims_and_lost_records_are_never_near() {
    let nodes = Nodes::new();
    let node = nodes.node();
    assert_eq!(now(node.begin(&key(), &claim(1))), Begin::Acquired);
    for _ in 0..2 {
        assert!(matches!(begin(&node), Begin::InFlight { .. }));
        assert!(matches!(now(node.get(&key())), Some(Entry::Claimed { .. })));
    }
    assert_eq!(nodes.behind.calls().len(), 5);
    assert_eq!(complete(&node, 2, "two", DAY), Held::Lost);
    assert!(matches!(begin(&node), Begin::InFlight { .. }));
    assert_eq!(now(node.release(&key(), token(1))), Held::Yes);
    assert_eq!(begin(&node), Begin::Acquired);
}

#[test]
fn what_is_near_is_gone_after_a_minute_or_sooner() {
    let nodes = Nodes::new();
    for (set, ttl, near_for) in [
        (None, DAY, 60 * SECOND),
        (Some(DAY), DAY, 60 * SECOND),
        (Some(SECOND), DAY, SECOND),
        (None, 5 * SECOND, 5 * SECOND),
    ] {
        let node = match set {
            Some(ttl) => nodes.node().ttl(ttl),
            None => nodes.node(),
        };
        now(node.remove(&key()));
        assert_eq!(complete(&node, 1, "one", ttl), Held::Yes);
        nodes.behind.calls();
        nodes.clock.advance(near_for - Duration::from_nanos(1));
        assert_eq!(begin(&node), completed("one"));
        assert_eq!(nodes.behind.calls(), [""; 0], "{set:?} {ttl:?}");
        nodes.clock.advance(Duration::from_nanos(1));
        let again = begin(&node);
        assert_eq!(again == Begin::Acquired, ttl == near_for);
        assert_eq!(nodes.behind.calls(), ["begin"], "{set:?} {ttl:?}");
    }
}

/// A look at what is near does not keep it there.
#[test]
fn being_asked_for_prolongs_nothing() {
    let nodes = Nodes::new();
    let node = nodes.node();
    assert_eq!(complete(&node, 1, "one", DAY), Held::Yes);
    now(nodes.behind.memory.remove(&key()));
    for _ in 0..59 {
        nodes.clock.advance(SECOND);
        assert_eq!(begin(&node), completed("one"));
        assert_eq!(
            now(node.get(&key())),
            Some(Entry::Completed(response("one")))
        );
    }
    nodes.clock.advance(SECOND);
    assert_eq!(begin(&node), Begin::Acquired);
}

#[test]
fn nothing_is_near_where_there_is_no_time_or_room() {
    let nodes = Nodes::new();
    for node in [nodes.node().ttl(Duration::ZERO), nodes.node().max_bytes(0)] {
        now(node.remove(&key()));
        assert_eq!(complete(&node, 1, "one", DAY), Held::Yes);
        nodes.behind.calls();
        assert_eq!(begin(&node), completed("one"));
        assert_eq!(begin(&node), completed("one"));
        assert_eq!(nodes.behind.calls(), ["begin", "begin"]);
    }
}

#[test]
fn a_change_is_seen_here_at_once_and_elsewhere_within_a_minute() {
    let nodes = Nodes::new();
    let (here, there) = (nodes.node(), nodes.node());
    assert_eq!(complete(&here, 1, "one", DAY), Held::Yes);
    for node in [&here, &there] {
        assert_eq!(begin(node), completed("one"));
    }
    now(here.replace(&key(), &response("two"), DAY));
    assert_eq!(begin(&here.clone()), completed("two"));
    assert_eq!(begin(&there), completed("one"));
    nodes.clock.advance(60 * SECOND);
    assert_eq!(begin(&there), completed("two"));

    assert!(now(here.remove(&key())));
    assert_eq!(begin(&here), Begin::Acquired);
    assert_eq!(begin(&there), completed("two"));
    nodes.clock.advance(LEASE);
    assert_eq!(begin(&here), Begin::Acquired);
    nodes.clock.advance(LEASE);
    assert_eq!(begin(&there), Begin::Acquired);
}

/// Whoever read the old record, and however the steps fall: once a change is over, what it took away is not near.
#[test]
fn who_read_before_a_change_keeps_nothing_after_it() {
    for read in ["begin", "get"] {
        for change in ["remove", "replace"] {
            let nodes = Nodes::new();
            assert_eq!(complete(&nodes.behind.memory, 1, "old", DAY), Held::Yes);
            let node = nodes.node();
            let reader = node.clone();
            nodes.behind.hold(read, When::After);
            let key = key();
            let new_claim = claim(9);
            let mut reading = Box::pin(async {
                match read {
                    "begin" => reader.begin(&key, &new_claim).await.map(drop),
                    _ => reader.get(&key).await.map(drop),
                }
            });
            assert!(poll(reading.as_mut()).is_pending());
            match change {
                "remove" => drop(now(node.remove(&key))),
                _ => now(node.replace(&key, &response("new"), DAY)),
            }
            nodes.behind.go_on();
            assert!(poll(reading.as_mut()).is_ready());
            let after = match change {
                "remove" => Begin::Acquired,
                _ => completed("new"),
            };
            assert_eq!(begin(&node), after, "{read} beside {change}");
        }
    }
}

#[test]
fn who_reads_beside_a_change_keeps_nothing() {
    for when in [When::Before, When::After] {
        let nodes = Nodes::new();
        let node = nodes.node();
        assert_eq!(complete(&node, 1, "old", DAY), Held::Yes);
        nodes.behind.hold("remove", when);
        let key = key();
        let mut removal = Box::pin(node.remove(&key));
        assert!(poll(removal.as_mut()).is_pending());
        let beside = begin(&node);
        assert_eq!(beside == Begin::Acquired, when == When::After);
        if beside == Begin::Acquired {
            // A whole execution beside it.
            assert_eq!(complete(&node, 9, "new", DAY), Held::Yes);
        }
        nodes.behind.calls();
        let _ = begin(&node);
        assert_eq!(nodes.behind.calls(), ["begin"], "kept beside the change");

        nodes.behind.go_on();
        assert!(poll(removal.as_mut()).is_ready());
        let after = match when {
            When::Before => Begin::Acquired,
            When::After => completed("new"),
        };
        assert_eq!(begin(&node), after);
    }
}

#[test]
fn who_asks_beside_a_change_and_is_answered_after_it_keeps_nothing() {
    let nodes = Nodes::new();
    assert_eq!(complete(&nodes.behind.memory, 1, "old", DAY), Held::Yes);
    let node = nodes.node();
    let key = key();
    nodes.behind.hold("remove", When::Before);
    let mut removal = pin!(node.remove(&key));
    assert!(poll(removal.as_mut()).is_pending());
    nodes.behind.hold("get", When::After);
    let mut reading = pin!(node.get(&key));
    assert!(poll(reading.as_mut()).is_pending());
    // The first to wait is the first to go on.
    nodes.behind.go_on();
    assert!(matches!(poll(removal.as_mut()), Poll::Ready(Ok(true))));
    nodes.behind.go_on();
    assert!(matches!(
        poll(reading.as_mut()),
        Poll::Ready(Ok(Some(Entry::Completed(_))))
    ));
    assert_eq!(begin(&node), Begin::Acquired);
}

#[test]
fn a_change_that_is_dropped_leaves_nothing_stale() {
    for when in [When::Before, When::After] {
        let nodes = Nodes::new();
        let node = nodes.node();
        assert_eq!(complete(&node, 1, "old", DAY), Held::Yes);
        nodes.behind.hold("replace", when);
        let (key, new) = (key(), response("new"));
        let mut replacing = Box::pin(node.replace(&key, &new, DAY));
        assert!(poll(replacing.as_mut()).is_pending());
        let _ = begin(&node);
        drop(replacing);
        let behind = now(nodes.behind.memory.begin(&key, &claim(9)));
        assert_eq!(begin(&node), behind);
        assert_eq!(begin(&node), behind);
        // And it is near again.
        nodes.behind.calls();
        let _ = begin(&node);
        assert_eq!(nodes.behind.calls(), [""; 0]);
    }
}

#[test]
fn a_complete_that_is_overtaken_by_a_removal_keeps_nothing() {
    let nodes = Nodes::new();
    let node = nodes.node();
    nodes.behind.hold("complete", When::After);
    let (key, record) = (key(), response("one"));
    let mut completing = pin!(node.complete(&key, token(1), &record, DAY));
    assert!(poll(completing.as_mut()).is_pending());
    assert!(now(node.remove(&key)));
    nodes.behind.go_on();
    assert!(matches!(
        poll(completing.as_mut()),
        Poll::Ready(Ok(Held::Yes))
    ));
    assert_eq!(begin(&node), Begin::Acquired);
}

#[test]
fn a_repeated_complete_keeps_the_first_record() {
    let nodes = Nodes::new();
    let node = nodes.node();
    assert_eq!(complete(&node, 1, "first", 5 * SECOND), Held::Yes);
    assert_eq!(complete(&node, 1, "second", DAY), Held::Yes);
    assert_eq!(begin(&node), completed("first"));
}

#[test]
fn a_repeated_complete_restarts_the_near_ttl_too() {
    for (first, second) in [(5 * SECOND, 20 * SECOND), (20 * SECOND, 5 * SECOND)] {
        let nodes = Nodes::new();
        let node = nodes.node();
        assert_eq!(complete(&node, 1, "one", first), Held::Yes);
        assert_eq!(complete(&node, 1, "one", second), Held::Yes);
        nodes.clock.advance(second - Duration::from_nanos(1));
        assert_eq!(begin(&node), completed("one"));
        nodes.clock.advance(Duration::from_nanos(1));
        assert_eq!(begin(&node), Begin::Acquired, "{first:?} {second:?}");
    }
    // What was done to it elsewhere is seen after a minute all the same.
    let nodes = Nodes::new();
    let node = nodes.node();
    assert_eq!(complete(&node, 1, "one", DAY), Held::Yes);
    now(nodes.behind.memory.replace(&key(), &response("two"), DAY));
    for _ in 0..60 {
        assert_eq!(begin(&node), completed("one"));
        assert_eq!(complete(&node, 1, "one", DAY), Held::Yes);
        nodes.clock.advance(SECOND);
    }
    assert_eq!(begin(&node), completed("two"));
}

/// The first call stored the answer and failed, so a tombstone was sent. The storage kept the answer.
#[test]
fn a_tombstone_is_near_once_it_is_found() {
    let nodes = Nodes::new();
    let node = nodes.node();
    assert_eq!(complete(&nodes.behind.memory, 1, "one", DAY), Held::Yes);
    let tombstone = Record {
        fingerprint: None,
        outcome: Outcome::Tombstone(TombstoneReason::Unstorable),
    };
    assert_eq!(
        now(node.complete(&key(), token(1), &tombstone, DAY)),
        Held::Yes
    );
    assert_eq!(begin(&node), completed("one"));

    let other = EncodedKey::from_bytes([2; 32]);
    assert_eq!(
        now(node.complete(&other, token(1), &tombstone, DAY)),
        Held::Yes
    );
    nodes.behind.calls();
    for _ in 0..2 {
        let found = now(node.begin(&other, &claim(9)));
        assert_eq!(found, Begin::Completed(tombstone.clone()));
    }
    assert_eq!(nodes.behind.calls(), ["begin"]);
}

#[test]
fn debug_counts() {
    let nodes = Nodes::new();
    let node = nodes.node();
    assert_eq!(complete(&node, 0xab, "sesame", DAY), Held::Yes);
    let shown = format!("{node:?}");
    assert!(
        shown.contains("ttl: 60s") && shown.contains("records: 1"),
        "{shown}"
    );
    assert!(
        !shown.contains("sesame") && !shown.contains("abab"),
        "{shown}"
    );
}
