//! Helpers that the rules share: keys, claims, records, tasks and limits.

use std::{
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use futures_util::future::{Either, select};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::sync::oneshot;

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

    /// A task that waits for the end of the claim of `key`.
    pub(super) fn waiter(&self, key: EncodedKey, timeout: Duration) -> Task<()> {
        let storage = self.storage.clone();
        self.spawn(async move { fine(storage.wait(&key, timeout).await) })
    }

    /// Runs `work` in a task, in parallel where the runtime has several threads.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Task<T> {
        let (sender, result) = oneshot::channel();
        let Some(spawner) = Env::system().spawner() else {
            panic!("the conformance suite needs a tokio runtime");
        };
        spawner.spawn(async move {
            // If the rule failed elsewhere, nobody awaits this task any more.
            let _ = sender.send(work.await);
        });
        Task {
            result,
            patience: self.harness.patience(),
        }
    }

    /// Awaits `future`, which should end soon.
    pub(super) async fn soon<T>(&self, future: impl Future<Output = T>, otherwise: &str) -> T {
        within(self.harness.patience(), future, otherwise).await
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

/// A task under way.
pub(super) struct Task<T> {
    result: oneshot::Receiver<T>,
    patience: Duration,
}

impl<T> Task<T> {
    /// Awaits the task, which should end soon.
    pub(super) async fn soon(self, otherwise: &str) -> T {
        match within(self.patience, self.result, otherwise).await {
            Ok(result) => result,
            Err(_) => panic!("a task of the conformance suite panicked; its message is above"),
        }
    }
}

async fn within<T>(patience: Duration, future: impl Future<Output = T>, otherwise: &str) -> T {
    let limit = pin!(Env::system().sleep(patience));
    match select(pin!(future), limit).await {
        Either::Left((result, _)) => result,
        Either::Right(_) => panic!("{otherwise} (gave up after {patience:?})"),
    }
}

pub(super) fn fine<T>(result: Result<T, StorageError>) -> T {
    match result {
        Ok(result) => result,
        Err(error) => panic!("the storage under test failed: {error:?}"),
    }
}

/// Polls `future` once.
pub(super) async fn poll_once<F: Future>(mut future: Pin<&mut F>) -> Poll<F::Output> {
    poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
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
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    Record {
        fingerprint: None,
        outcome: Outcome::Response(StoredResponse::new(
            StatusCode::CREATED,
            &headers,
            text.to_owned(),
        )),
    }
}
