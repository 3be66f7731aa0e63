//! Helpers that the rules share: keys, claims, records, tasks and limits.

use std::{future::Future, sync::Arc, time::Duration};

use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::{sync::Barrier, task::JoinSet};

use super::Harness;
use crate::{
    Begin, EncodedKey, Entry, Env, Fingerprint, Held, NewClaim, Outcome, Record, Storage,
    StorageError, StoredResponse, Token,
};

/// `must!(call => outcome, "otherwise")`: awaits a call of a [`Subject`] and panics with the message if its outcome is another.
macro_rules! must {
    ($call:expr => $outcome:expr) => {
        must!($call => $outcome, "a step of the suite failed")
    };
    ($call:expr => $outcome:expr, $otherwise:literal) => {{
        let outcome = $call.await;
        assert_eq!(outcome, $outcome, $otherwise);
    }};
}
pub(super) use must;

/// Makes the calls of a storage that panic on an error.
macro_rules! calls {
    ($($call:ident($($argument:ident: $type:ty),*) -> $done:ty;)*) => {$(
        pub(super) async fn $call(&self, key: &EncodedKey, $($argument: $type),*) -> $done {
            fine(self.storage.$call(key, $($argument),*).await)
        }
    )*};
}

/// A lease or TTL that no rule outlasts.
pub(super) const LONG: Duration = Duration::from_secs(3600);

/// The storage under test, with calls that panic on an error, and a fresh key.
pub(super) struct Subject<'h, H: Harness> {
    pub(super) harness: &'h H,
    pub(super) storage: Arc<H::Storage>,
}

impl<'h, H: Harness> Subject<'h, H> {
    pub(super) async fn new(harness: &'h H) -> Self {
        let storage = Arc::new(harness.storage().await);
        Self { harness, storage }
    }

    /// `count` times the harness's unit.
    pub(super) fn units(&self, count: u32) -> Duration {
        self.harness.unit() * count
    }

    /// Lets `count` units pass.
    pub(super) async fn pass(&self, count: u32) {
        self.harness.advance(self.units(count)).await;
    }

    pub(super) async fn begin(&self, key: &EncodedKey, token: Token) -> Begin {
        fine(self.storage.begin(key, &claim(token, LONG)).await)
    }

    /// A fresh key with a claim.
    pub(super) async fn claimed(&self) -> (EncodedKey, Token) {
        self.claimed_for(LONG).await
    }

    /// A fresh key with a claim.
    pub(super) async fn claimed_for(&self, lease: Duration) -> (EncodedKey, Token) {
        let (key, token) = (fresh_key(), Token::random());
        let begin = fine(self.storage.begin(&key, &claim(token, lease)).await);
        assert_eq!(
            begin,
            Begin::Acquired,
            "a free key was not Acquired: no request with a key would ever run"
        );
        (key, token)
    }

    /// A fresh key with a record, and the token that completed it.
    pub(super) async fn completed(&self, record: &Record, ttl: Duration) -> (EncodedKey, Token) {
        let (key, token) = self.claimed().await;
        must!(self.complete(&key, token, record, ttl) => Held::Yes,
            "the holder's `complete` was Lost: its answer is not stored, and a retry gets a conflict or runs again");
        (key, token)
    }

    /// A fresh key that another took when the lease of its first holder was over, and the tokens of both.
    pub(super) async fn taken_over(&self) -> (EncodedKey, Token, Token) {
        let (key, late) = self.claimed_for(self.units(2)).await;
        self.pass(3).await;
        let holder = Token::random();
        must!(self.begin(&key, holder) => Begin::Acquired, "the lease was over, and the key not free");
        (key, late, holder)
    }

    calls! {
        complete(token: Token, record: &Record, ttl: Duration) -> Held;
        renew(token: Token, lease: Duration) -> Held;
        release(token: Token) -> Held;
        get() -> Option<Entry>;
        replace(record: &Record, ttl: Duration) -> ();
        remove() -> bool;
    }

    /// What `get`, and `begin` with a token of its own, find under `key`, which they leave as it was.
    pub(super) async fn find(&self, key: &EncodedKey) -> Found {
        let token = Token::random();
        match (self.get(key).await, self.begin(key, token).await) {
            (None, Begin::Acquired) => {
                must!(self.release(key, token) => Held::Yes, "a claim just taken could not be released");
                Found::Nothing
            }
            // A claim of another process may be hidden from `get`; what `get` says of claims has a rule of its own.
            (None | Some(Entry::Claimed { .. }), Begin::InFlight { .. }) => Found::Claim,
            (Some(Entry::Completed(a)), Begin::Completed(b)) if a == b => Found::Record(a),
            (get, begin) => Found::Contradiction { get, begin },
        }
    }

    /// Tasks that wait for the end of the claim of `key`.
    pub(super) fn waiters(&self, key: EncodedKey, count: usize) -> JoinSet<()> {
        let wait = |storage: Arc<H::Storage>| async move { fine(storage.wait(&key, LONG).await) };
        (0..count).map(|_| wait(self.storage.clone())).collect()
    }

    /// What `rivals` calls return that begin together, each in a task, in parallel where the runtime has several threads.
    pub(super) async fn race<F>(
        &self,
        rivals: usize,
        call: impl Fn(usize, Arc<H::Storage>) -> F,
        otherwise: &str,
    ) -> Vec<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let start = Arc::new(Barrier::new(rivals));
        let task = |rival| {
            let (start, call) = (start.clone(), call(rival, self.storage.clone()));
            async move {
                start.wait().await;
                call.await
            }
        };
        let tasks: JoinSet<_> = (0..rivals).map(task).collect();
        self.soon(tasks.join_all(), otherwise).await
    }

    /// Awaits `future`, which should end soon.
    pub(super) async fn soon<T>(&self, future: impl Future<Output = T>, otherwise: &str) -> T {
        let patience = self.harness.patience();
        match Env::system().within(patience, future).await {
            Some(result) => result,
            None => panic!("{otherwise} (gave up after {patience:?})"),
        }
    }
}

/// What is under a key.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    Nothing,
    Claim,
    Record(Record),
    /// `begin` and `get` say different things.
    Contradiction {
        get: Option<Entry>,
        begin: Begin,
    },
}

pub(super) fn fine<T>(result: Result<T, StorageError>) -> T {
    match result {
        Ok(result) => result,
        Err(error) => panic!("the storage under test failed: {error:?}"),
    }
}

/// Lets other tasks of the runtime run.
pub(super) async fn breathe() {
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
}

pub(super) fn fresh_key() -> EncodedKey {
    let mut bytes = [0; 32];
    Env::system().fill_random(&mut bytes);
    EncodedKey::from_bytes(bytes)
}

pub(super) fn claim(token: Token, lease: Duration) -> NewClaim {
    NewClaim {
        token,
        fingerprint: None,
        lease,
    }
}

pub(super) fn fingerprint(byte: u8) -> Fingerprint {
    Fingerprint::from_bytes([byte; 32])
}

/// An answer with `text` as its body.
pub(super) fn answer(text: &str) -> Record {
    let content_type = HeaderValue::from_static("text/plain");
    let headers = HeaderMap::from_iter([(header::CONTENT_TYPE, content_type)]);
    let response = StoredResponse::new(StatusCode::CREATED, &headers, text.to_owned());
    Record {
        fingerprint: None,
        outcome: Outcome::Response(response),
    }
}
