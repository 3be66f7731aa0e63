//! The way to the storage, on which everything goes wrong that can.
//!
//! The storage behind it is the real [`MemoryStorage`]. A message is on its own once it was sent: it arrives although its sender
//! gave up on it, perhaps twice, perhaps after what was sent later.

use std::{future::pending, pin::pin, time::Duration};

use futures_util::future::{BoxFuture, select};
use idempotency_axum::{
    Begin, EncodedKey, Entry, Held, MemoryStorage, NewClaim, Operation, Record, Storage,
    StorageError, Token,
};
use tokio::sync::oneshot;

use super::{
    Plan,
    judge::Judge,
    world::{Home, SERVER, World},
};

/// A node's connection to the server.
#[derive(Clone)]
pub(super) struct Link {
    pub(super) world: World,
    pub(super) home: Home,
    pub(super) server: MemoryStorage,
    pub(super) judge: Judge,
    pub(super) plan: Plan,
}

/// What becomes of a message and its answer.
#[derive(Clone, Copy, Debug, Default)]
struct Fate {
    there: Duration,
    back: Duration,
    request_lost: bool,
    answer_lost: bool,
    error_before: bool,
    error_after: bool,
    /// It arrives again, so much later.
    twice: Option<Duration>,
}

impl Link {
    fn fate(&self, operation: Operation, key: &EncodedKey) -> Fate {
        let rates = self.plan.rates();
        let fate = self.world.chance(|chance| {
            let mut fate = Fate {
                there: chance.millis(0, 10),
                back: chance.millis(0, 10),
                ..Fate::default()
            };
            if chance.permille(rates.delay) {
                fate.there += chance.millis(10, 5_000);
            }
            if chance.permille(rates.delay) {
                fate.back += chance.millis(10, 5_000);
            }
            fate.request_lost = chance.permille(rates.loss);
            fate.answer_lost = chance.permille(rates.loss);
            fate.error_before = chance.permille(rates.error);
            fate.error_after = chance.permille(rates.error);
            if chance.permille(rates.twice) {
                fate.twice = Some(chance.millis(1, 60_000));
            }
            fate
        });
        let late = Duration::from_millis(10);
        let happened = [
            ("delay", fate.there > late || fate.back > late),
            ("request lost", fate.request_lost),
            ("answer lost", fate.answer_lost),
            ("error before the effect", fate.error_before),
            ("error after the effect", fate.error_after),
            ("delivered twice", fate.twice.is_some()),
        ];
        for (what, happened) in happened {
            if happened {
                self.judge.count(&format!("fault: {what}"));
                self.judge.note(|| {
                    let to = operation.as_str();
                    format!("fault: {what}, of a {to} of node {}", self.home.node)
                });
                // A repetition hurts nobody who asked.
                if what != "delivered twice" {
                    self.judge.tamper(self.home.node);
                    if operation == Operation::Renew || operation == Operation::Begin {
                        self.judge.disturb(self.home.node);
                    }
                }
                if operation == Operation::Replace {
                    self.judge.replacement_is_late(key);
                }
            }
        }
        fate
    }

    /// Sends a message; `work` is what the server does with it.
    async fn send<T, F>(
        &self,
        operation: Operation,
        key: &EncodedKey,
        work: F,
    ) -> Result<T, StorageError>
    where
        T: Send + 'static,
        F: Fn(Link) -> BoxFuture<'static, Result<T, StorageError>> + Send + Sync + 'static,
    {
        self.judge.sent(self.home, operation, key);
        let fate = self.fate(operation, key);
        let (answer, answered) = oneshot::channel();
        let (link, key) = (self.clone(), *key);
        let delivery = async move {
            link.world.sleep(fate.there).await;
            if fate.request_lost || link.judge.is_cut_off(link.home.node) {
                return drop(answer);
            }
            if fate.error_before {
                let refused = StorageError::unavailable("the server is overloaded");
                return link.reply(answer, Err(refused), fate).await;
            }
            if link.judge.is_corrupt(&key) && operation != Operation::Remove {
                link.judge.count("fault: unreadable record");
                let unreadable = StorageError::unreadable("someone wrote over it");
                return link.reply(answer, Err(unreadable), fate).await;
            }
            let done = work(link.clone()).await;
            if let Some(later) = fate.twice {
                let again = link.clone();
                link.world.spawn(link.world.home(SERVER), async move {
                    again.world.sleep(later).await;
                    again.judge.count("fault: delivered out of order");
                    let _ = work(again).await;
                });
            }
            link.reply(answer, done, fate).await;
        };
        self.world.spawn(self.world.home(SERVER), delivery);
        match answered.await {
            Ok(answer) => answer,
            // There is none, and nothing says so.
            Err(_) => pending().await,
        }
    }

    async fn reply<T>(
        &self,
        to: oneshot::Sender<Result<T, StorageError>>,
        answer: Result<T, StorageError>,
        fate: Fate,
    ) {
        self.world.sleep(fate.back).await;
        if fate.answer_lost || self.judge.is_cut_off(self.home.node) {
            return drop(to);
        }
        let answer = match fate.error_after {
            true => Err(StorageError::unavailable("the connection was reset")),
            false => answer,
        };
        // Its sender may have given up.
        let _ = to.send(answer);
    }
}

impl Storage for Link {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        let (asked, new) = (*key, claim.clone());
        let begun = self.send(Operation::Begin, key, move |link| {
            let new = new.clone();
            Box::pin(async move {
                let answer = link.server.begin(&asked, &new).await?;
                link.judge.began(link.home, &asked, &new, &answer);
                Ok(answer)
            })
        });
        let begun = begun.await?;
        if begun == Begin::Acquired {
            self.judge.told(self.home, key, claim.token);
        }
        Ok(begun)
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        let (asked, record) = (*key, record.clone());
        let work = move |link: Link| {
            let record = record.clone();
            let work = async move {
                let held = link.server.complete(&asked, token, &record, ttl).await?;
                link.judge.completed(&asked, token, &record, ttl, held);
                Ok(held)
            };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.send(Operation::Complete, key, work).await
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        let asked = *key;
        let work = move |link: Link| {
            let work = async move {
                let held = link.server.renew(&asked, token, lease).await?;
                link.judge.renewed(&asked, token, lease, held);
                Ok(held)
            };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.send(Operation::Renew, key, work).await
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        let asked = *key;
        let work = move |link: Link| {
            let work = async move {
                let held = link.server.release(&asked, token).await?;
                link.judge.released(&asked, held);
                Ok(held)
            };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.send(Operation::Release, key, work).await
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        let asked = *key;
        let work = move |link: Link| {
            let work = async move { link.server.get(&asked).await };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.send(Operation::Get, key, work).await
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        let (asked, record) = (*key, record.clone());
        let work = move |link: Link| {
            let record = record.clone();
            let work = async move {
                link.server.replace(&asked, &record, ttl).await?;
                link.judge.replaced(&asked, &record, ttl);
                Ok(())
            };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.send(Operation::Replace, key, work).await
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        let asked = *key;
        let work = move |link: Link| {
            let work = async move { link.server.remove(&asked).await };
            Box::pin(work) as BoxFuture<'static, _>
        };
        self.send(Operation::Remove, key, work).await
    }

    /// A subscription, not a message: it ends with whoever waits.
    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        let fate = self.fate(Operation::Wait, key);
        let (mut answer, answered) = oneshot::channel();
        let (link, key) = (self.clone(), *key);
        let delivery = async move {
            link.world.sleep(fate.there).await;
            if fate.request_lost || link.judge.is_cut_off(link.home.node) {
                return drop(answer);
            }
            let waited = {
                let wait = pin!(link.server.wait(&key, timeout));
                match select(wait, pin!(answer.closed())).await {
                    futures_util::future::Either::Left((waited, _)) => waited,
                    futures_util::future::Either::Right(_) => return,
                }
            };
            link.reply(answer, waited, fate).await;
        };
        self.world.spawn(self.world.home(SERVER), delivery);
        match answered.await {
            Ok(answer) => answer,
            Err(_) => pending().await,
        }
    }
}
