//! The storage that everybody writes first, and what the public suite says of it: one message for each guarantee it lacks.
//!
//! It looks, and then it writes: `GET` and `SET` on any key-value server. It keeps no token, so whoever comes may renew,
//! release and complete. Most of the time it works.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use idempotency_axum::{
    Begin, EncodedKey, Entry, Env, Fingerprint, Held, NewClaim, Record, SimulatedClock, Storage,
    StorageError, Token,
    storage::conformance::{Harness, check},
};

#[derive(Clone)]
struct Naive {
    rows: Arc<Mutex<HashMap<EncodedKey, Row>>>,
    env: Env,
}

/// A value, and when it is to be forgotten.
#[derive(Clone)]
struct Row {
    value: Value,
    until: Duration,
}

#[derive(Clone)]
enum Value {
    Claim(Option<Fingerprint>),
    Record(Record),
}

impl Naive {
    fn rows(&self) -> MutexGuard<'_, HashMap<EncodedKey, Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One round trip, after which others have had theirs.
    async fn look(&self, key: &EncodedKey) -> Option<Value> {
        let row = self.rows().get(key).cloned();
        tokio::task::yield_now().await;
        let row = row.filter(|row| self.env.now() < row.until);
        row.map(|row| row.value)
    }

    /// Another one.
    async fn write(&self, key: &EncodedKey, value: Value, ttl: Duration) {
        let until = self.env.now() + ttl;
        self.rows().insert(*key, Row { value, until });
        tokio::task::yield_now().await;
    }
}

impl Storage for Naive {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        Ok(match self.look(key).await {
            Some(Value::Record(record)) => Begin::Completed(record),
            Some(Value::Claim(fingerprint)) => Begin::InFlight {
                fingerprint,
                lease_left: None,
            },
            None => {
                let value = Value::Claim(claim.fingerprint);
                self.write(key, value, claim.lease).await;
                Begin::Acquired
            }
        })
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        _: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        self.write(key, Value::Record(record.clone()), ttl).await;
        Ok(Held::Yes)
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        _: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        match self.look(key).await {
            Some(value) => {
                self.write(key, value, lease).await;
                Ok(Held::Yes)
            }
            None => Ok(Held::Lost),
        }
    }

    async fn release(&self, key: &EncodedKey, _: Token) -> Result<Held, StorageError> {
        match self.rows().remove(key) {
            Some(_) => Ok(Held::Yes),
            None => Ok(Held::Lost),
        }
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        let value = self.look(key).await;
        Ok(value.map(|value| match value {
            Value::Record(record) => Entry::Completed(record),
            Value::Claim(fingerprint) => Entry::Claimed {
                fingerprint,
                lease_left: None,
            },
        }))
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        self.write(key, Value::Record(record.clone()), ttl).await;
        Ok(())
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        Ok(self.rows().remove(key).is_some())
    }
}

struct Suite {
    storage: Naive,
    clock: SimulatedClock,
}

impl Suite {
    fn new() -> Self {
        let (env, clock) = Env::simulated(1);
        let rows = Arc::default();
        let storage = Naive { rows, env };
        Self { storage, clock }
    }
}

impl Harness for Suite {
    type Storage = Naive;

    async fn storage(&self) -> Naive {
        self.storage.clone()
    }

    async fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }
}

/// What each of these rules says that refuses it. Some of the others would wait for what never comes.
async fn verdicts(rules: impl Iterator<Item = &'static str>) -> BTreeMap<&'static str, String> {
    let mut verdicts = BTreeMap::new();
    for rule in rules {
        let checked = tokio::spawn(async move { check(rule, &Suite::new()).await });
        let Err(refused) = checked.await else {
            continue;
        };
        let panic = refused.into_panic();
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        verdicts.insert(rule, text.expect("a rule that fails says why"));
    }
    verdicts
}

/// Rules that it breaks, and what each says of it.
const REFUSED: [(&str, &str); 10] = [
    ("begin_is_exclusive", "that many executions of one request"),
    (
        "begin_is_idempotent_by_token",
        "after a lost answer nobody runs the operation",
    ),
    (
        "renew_by_a_stranger_is_lost",
        "who lost the key never hears of it",
    ),
    (
        "release_by_a_stranger_is_lost",
        "a duplicate runs beside it",
    ),
    (
        "a_lost_claim_changes_nothing",
        "two executions of one key go on",
    ),
    (
        "complete_is_exclusive",
        "retries get the answer of only one of those executions",
    ),
    (
        "complete_keeps_the_first_record",
        "two clients get two answers",
    ),
    ("complete_lost_to_a_record", "two clients get two answers"),
    (
        "complete_lost_to_a_new_holder",
        "a late answer stands for what its successor does",
    ),
    (
        "replace_leaves_claims_and_free_keys",
        "its operation never runs",
    ),
];

/// Rules that it keeps.
const KEPT: [&str; 2] = ["lease_expires_and_not_before", "ttl_expires_and_not_before"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_refused_by_the_name_of_each_guarantee_that_it_lacks() {
    let refused = REFUSED.iter().map(|(rule, _)| *rule);
    let verdicts = verdicts(refused.chain(KEPT)).await;
    for (rule, guarantee) in REFUSED {
        let verdict = verdicts.get(rule).map_or("fine", String::as_str);
        assert!(verdict.contains(guarantee), "{rule}: {verdict}");
    }
    // What it does keep is not held against it.
    for rule in KEPT {
        assert_eq!(verdicts.get(rule), None, "{rule}");
    }
}
