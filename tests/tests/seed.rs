//! The 131 test cases of django-idempotency-key 1.3.0, by behaviour, and the tests that show the same here.
//!
//! [`seed_table`] names every case of the seed once. Most behaviours stand there four times, for two middlewares (our two modes)
//! and for views and viewsets (our attributes and combinators). Nearly all are shown by suites of their own; what no other suite
//! shows is below. [`the_table_names_every_case_once_and_only_tests_that_exist`] keeps the table true.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{Method, StatusCode},
    routing::any,
};
use idempotency_axum::{
    Config, Encoded, EncodedKey, Entry, IdempotencyHandler, IdempotencyLayer, Key, KeyEncoder,
    KeyPolicy, LockPolicy, MemoryStorage, Operation, RequestView, Storage, StorageError,
    idempotency_key,
};
use idempotency_tests::{
    Answer, Hook, Hooked, Runs, Server, StorageCall, catalogue::assert_all_named,
};
use tower_http::trace::TraceLayer;

use crate::seed_table::{CASES, SEED};

mod seed_table;

#[test]
fn the_table_names_every_case_once_and_only_tests_that_exist() {
    let mut cases = BTreeSet::new();
    let mut counts = BTreeMap::new();
    for behaviour in SEED {
        behaviour.ours.check();
        for file in behaviour.files {
            for case in behaviour.cases {
                assert!(
                    cases.insert((file, case)),
                    "{file}::{case} stands there twice"
                );
                *counts.entry(*file).or_insert(0) += 1;
            }
        }
    }
    assert_eq!(counts, BTreeMap::from(CASES));
    assert_eq!(cases.len(), 131);
    let rows = SEED.iter().map(|behaviour| behaviour.ours);
    let but = "the_table_names_every_case_once_and_only_tests_that_exist";
    assert_all_named("seed", rows, &[but]);
}

// ---- handlers, as the seed's views and viewsets

const KEY: &str = "7495e32b-709b-4fae-bfd4-2497094bf3fd";

async fn order(State(runs): State<Runs>) -> (StatusCode, String) {
    (StatusCode::CREATED, format!("order {}", runs.next()))
}

/// With an attribute, as the seed's views.
#[idempotency_key]
async fn view(State(runs): State<Runs>) -> (StatusCode, String) {
    order(State(runs)).await
}

/// Both modes, each on a storage that `storage` returns.
fn modes<S: Storage>(storage: impl Fn() -> S) -> [IdempotencyLayer; 2] {
    [
        IdempotencyLayer::enforce(storage()),
        IdempotencyLayer::exempt(storage()),
    ]
}

/// A view at `/view`, and at `/viewset` the same with a combinator.
struct Site {
    server: Server,
    runs: Runs,
}

impl Site {
    async fn open(layer: IdempotencyLayer) -> Self {
        let router = Router::new().route("/view", any(view)).route(
            "/viewset",
            any(order.idempotency_key(KeyPolicy::required())),
        );
        Self::of(router.layer(layer)).await
    }

    async fn of(router: Router<Runs>) -> Self {
        let runs = Runs::new();
        let server = Server::start(router.with_state(runs.clone())).await;
        Self { server, runs }
    }

    async fn post(&self, path: &str, key: &str) -> Answer {
        self.server.post(path).key(key).send().await
    }
}

/// Every request is one operation, of this name.
struct Constant;

const CONSTANT: EncodedKey = EncodedKey::from_bytes([0; 32]);

impl KeyEncoder for Constant {
    fn encode(&self, _: &Key, _: &RequestView<'_>) -> Encoded {
        Encoded {
            key: CONSTANT,
            fingerprint: None,
        }
    }
}

#[tokio::test]
async fn an_encoder_of_ones_own_names_the_operation() {
    for layer in modes(MemoryStorage::new) {
        let layer = layer.config(Config::default().encoder(Constant));
        let engine = layer.engine().clone();
        let site = Site::open(layer).await;
        let first = site.post("/view", KEY).await;
        assert_eq!(first.code(), 201);
        assert!(matches!(
            engine.get(&CONSTANT).await.unwrap(),
            Some(Entry::Completed(_))
        ));
        // Nothing of the request counts, not even the key.
        let other = site.post("/viewset", "another").await;
        assert_eq!((other.code(), other.is_replay()), (409, true));
        assert_eq!(other.body, first.body);
    }
}

/// Keeps no record.
struct Forgets(MemoryStorage);

impl Hook for Forgets {
    async fn around<T: Send>(
        &self,
        call: StorageCall<'_>,
        work: impl Future<Output = Result<T, StorageError>> + Send,
    ) -> Result<T, StorageError> {
        let done = work.await;
        if call.operation == Operation::Complete {
            self.0.remove(call.key).await?;
        }
        done
    }
}

#[tokio::test]
async fn a_storage_that_keeps_nothing_lets_a_retry_run() {
    let memory = MemoryStorage::new();
    for layer in modes(|| Hooked::around(memory.clone(), Forgets(memory.clone()))) {
        let site = Site::open(layer).await;
        for (path, runs) in [("/view", 2), ("/viewset", 4)] {
            for _ in 0..2 {
                let answer = site.post(path, KEY).await;
                assert_eq!((answer.code(), answer.is_replay()), (201, false));
            }
            assert_eq!(site.runs.count(), runs);
        }
    }
}

#[tokio::test]
async fn a_storage_that_is_given_is_the_one_that_is_used() {
    let storage = MemoryStorage::new();
    let [enforce, exempt] = modes(|| storage.clone());
    let first = Site::open(enforce).await.post("/view", KEY).await;
    assert_eq!((first.code(), first.is_replay()), (201, false));
    // The other mode finds what this one has stored.
    let retry = Site::open(exempt).await.post("/view", KEY).await;
    assert_eq!((retry.code(), retry.is_replay()), (409, true));
    assert_eq!(retry.body, first.body);
    assert_eq!(storage.records(), 1);
}

#[tokio::test]
async fn a_claim_of_a_dead_process_ends_with_its_lease() {
    let lease = Duration::from_secs(1);
    let own = LockPolicy::default().ttl(lease);
    for (lock, lease) in [(LockPolicy::default(), 30 * lease), (own, lease)] {
        let (env, clock) = idempotency_axum::Env::simulated(1);
        let storage = MemoryStorage::builder().env(env.clone()).build();
        let config = Config::default().encoder(Constant).env(env);
        let config = config.lock(lock.timeout(Duration::ZERO));
        // The engine of a process that takes a claim and is gone with its runtime: nobody renews or releases it.
        let gone = std::thread::spawn({
            let dead = idempotency_axum::Engine::new(storage.clone(), config.clone());
            move || {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .build()
                    .unwrap();
                let operation = Encoded {
                    key: CONSTANT,
                    fingerprint: None,
                };
                let decision = runtime.block_on(async { dead.begin(&operation).await });
                drop(runtime);
                drop(decision);
            }
        });
        gone.join().unwrap();
        let site = Site::open(IdempotencyLayer::enforce(storage).config(config)).await;
        let post = || site.post("/view", KEY);
        clock.advance(lease - Duration::from_millis(1));
        assert_eq!(post().await.code(), 423);
        clock.advance(Duration::from_millis(1));
        assert_eq!(post().await.code(), 201);
    }
}

#[tokio::test]
async fn a_middleware_that_looks_on_may_stand_on_either_side() {
    for layer in modes(MemoryStorage::new) {
        for is_outside in [true, false] {
            let router = Router::new().route("/view", any(view));
            let trace = TraceLayer::new_for_http();
            let router = match is_outside {
                true => router.layer(layer.clone()).layer(trace),
                false => router.layer(trace).layer(layer.clone()),
            };
            let site = Site::of(router).await;
            assert_eq!(site.server.post("/view").send().await.code(), 400);
            let key = format!("{is_outside}");
            let first = site.post("/view", &key).await;
            assert_eq!(first.code(), 201);
            assert!(site.post("/view", &key).await.is_replay());
            let options = site.server.call(Method::OPTIONS, "/view");
            assert_eq!(options.send().await.code(), 201);
        }
    }
}
