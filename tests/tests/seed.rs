//! The 131 test cases of django-idempotency-key 1.3.0, by behaviour, and the tests that show the same here.
//!
//! [`seed_table`] names every case of the seed once. Most behaviours stand there four times, for two middlewares (our two modes)
//! and for views and viewsets (our attributes and combinators); the tests below go through all four. What a case looks up in the
//! request's private attributes is looked up here in what the client gets.
//!
//! [`the_table_names_every_case_once_and_only_tests_that_exist`] keeps the table true.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, Method, StatusCode},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use idempotency_axum::{
    Begin, Config, Encoded, EncodedKey, Entry, Held, IdempotencyHandler, IdempotencyLayer, Key,
    KeyEncoder, KeyPolicy, LockPolicy, ManualIdempotency, MemoryStorage, NewClaim, Record,
    RequestView, Storage, StorageError, StoreOn, Token, idempotency_exempt, idempotency_key,
};
use idempotency_tests::{Answer, Gate, Runs, Server, catalogue::assert_all_named};
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

/// As the seed's tests do, a voucher.
const VOUCHER: &str = r#"{"id":1,"name":"myvoucher0","internal_name":"myvoucher0"}"#;
const KEY: &str = "7495e32b-709b-4fae-bfd4-2497094bf3fd";

async fn plain(State(runs): State<Runs>) -> (StatusCode, String) {
    (StatusCode::CREATED, format!("order {}", runs.next()))
}

/// With an attribute, as the seed's views.
mod views {
    use super::*;

    #[idempotency_key]
    pub(super) async fn create(State(runs): State<Runs>) -> (StatusCode, String) {
        plain(State(runs)).await
    }

    #[idempotency_key(optional)]
    pub(super) async fn optional(State(runs): State<Runs>) -> (StatusCode, String) {
        plain(State(runs)).await
    }

    #[idempotency_exempt]
    pub(super) async fn exempt(State(runs): State<Runs>) -> (StatusCode, String) {
        plain(State(runs)).await
    }

    #[idempotency_key]
    pub(super) async fn manual(State(runs): State<Runs>, manual: ManualIdempotency) -> Response {
        answer_manually(runs, manual)
    }

    #[idempotency_key(cache_name = "FiveMinuteCache")]
    pub(super) async fn in_my_cache(State(runs): State<Runs>) -> (StatusCode, String) {
        plain(State(runs)).await
    }
}

/// With a combinator, as the methods of the seed's viewsets.
struct ViewSet;

impl ViewSet {
    async fn create(State(runs): State<Runs>) -> (StatusCode, String) {
        plain(State(runs)).await
    }

    async fn manual(State(runs): State<Runs>, manual: ManualIdempotency) -> Response {
        answer_manually(runs, manual)
    }
}

/// 201 first, then 200 with what is stored.
fn answer_manually(runs: Runs, manual: ManualIdempotency) -> Response {
    let run = runs.next();
    match manual.response() {
        Some(last) => last.with_status(StatusCode::OK).into_response(),
        None => (StatusCode::CREATED, format!("order {run}")).into_response(),
    }
}

/// Both modes, each with a configuration and a storage of its own.
fn modes(config: &Config) -> [IdempotencyLayer; 2] {
    [
        IdempotencyLayer::enforce(MemoryStorage::new()).config(config.clone()),
        IdempotencyLayer::exempt(MemoryStorage::new()).config(config.clone()),
    ]
}

/// The views at `/views/…` and the viewset at `/viewsets/…`.
struct Site {
    server: Server,
    runs: Runs,
}

impl Site {
    async fn open(layer: IdempotencyLayer) -> Self {
        let required = KeyPolicy::required;
        let views = Router::new()
            .route("/get", get(plain))
            .route("/plain", any(plain))
            .route("/create", any(views::create))
            .route("/optional", any(views::optional))
            .route("/exempt", any(views::exempt))
            .route("/manual", any(views::manual));
        let view_set = Router::new()
            .route("/get", get(ViewSet::create.idempotency_key(required())))
            .route("/plain", any(ViewSet::create))
            .route("/create", any(ViewSet::create.idempotency_key(required())))
            .route(
                "/optional",
                any(ViewSet::create.idempotency_key(KeyPolicy::optional())),
            )
            .route("/exempt", any(ViewSet::create.idempotency_exempt()))
            .route(
                "/manual",
                any(ViewSet::manual.idempotency_key(required().manual())),
            );
        let runs = Runs::new();
        let router = Router::new()
            .nest("/views", views)
            .nest("/viewsets", view_set)
            .layer(layer)
            .with_state(runs.clone());
        Self {
            server: Server::start(router).await,
            runs,
        }
    }

    /// `POST /<group>/<name>` of the voucher.
    async fn post(&self, path: &str, key: Option<&str>) -> Answer {
        let call = self.server.post(path).json(VOUCHER);
        match key {
            Some(key) => call.key(key).send().await,
            None => call.send().await,
        }
    }

    /// Two requests with the same key, and how many of them ran.
    async fn post_twice(&self, path: &str) -> (Answer, Answer, usize) {
        let before = self.runs.count();
        let first = self.post(path, Some(KEY)).await;
        let second = self.post(path, Some(KEY)).await;
        (first, second, self.runs.count() - before)
    }
}

/// That the first of two requests was stored and given to the second with `status`.
#[track_caller]
fn assert_replayed((first, second, runs): (Answer, Answer, usize), status: u16) {
    assert_eq!((first.code(), first.is_replay()), (201, false));
    assert_eq!((second.code(), second.is_replay()), (status, true));
    assert_eq!(second.body, first.body);
    assert_eq!(runs, 1);
}

/// That both of two requests ran.
#[track_caller]
fn assert_both_ran((first, second, runs): (Answer, Answer, usize)) {
    for answer in [&first, &second] {
        assert_eq!((answer.code(), answer.is_replay()), (201, false));
    }
    assert_ne!(second.body, first.body);
    assert_eq!(runs, 2);
}

const GROUPS: [&str; 2] = ["/views", "/viewsets"];

// ---- who needs a key

#[tokio::test]
async fn a_get_runs_without_a_key() {
    for layer in modes(&Config::default()) {
        let site = Site::open(layer).await;
        for group in GROUPS {
            let answer = site.server.get(&format!("{group}/get")).send().await;
            assert_eq!((answer.code(), answer.is_replay()), (201, false));
        }
    }
}

#[tokio::test]
async fn an_exempt_post_runs_every_time() {
    for layer in modes(&Config::default()) {
        let site = Site::open(layer).await;
        for group in GROUPS {
            let path = format!("{group}/exempt");
            for _ in 0..2 {
                assert_eq!(site.post(&path, None).await.code(), 201);
            }
            assert_both_ran(site.post_twice(&path).await);
        }
    }
}

#[tokio::test]
async fn a_post_without_a_decorator_has_the_policy_of_the_mode() {
    let [enforce, exempt] = modes(&Config::default());
    let enforce = Site::open(enforce).await;
    let exempt = Site::open(exempt).await;
    for group in GROUPS {
        let path = format!("{group}/plain");
        assert_eq!(enforce.post(&path, None).await.code(), 400);
        assert_replayed(enforce.post_twice(&path).await, 409);
        assert_eq!(exempt.post(&path, None).await.code(), 201);
        assert_both_ran(exempt.post_twice(&path).await);
    }
}

#[tokio::test]
async fn an_optional_key_may_be_missing() {
    for layer in modes(&Config::default()) {
        let site = Site::open(layer).await;
        for group in GROUPS {
            let path = format!("{group}/optional");
            for _ in 0..2 {
                let answer = site.post(&path, None).await;
                assert_eq!((answer.code(), answer.is_replay()), (201, false));
            }
            assert_replayed(site.post_twice(&path).await, 409);
        }
    }
}

#[tokio::test]
async fn a_required_key_that_is_missing_is_400() {
    for layer in modes(&Config::default()) {
        let site = Site::open(layer).await;
        for group in GROUPS {
            let answer = site.post(&format!("{group}/create"), None).await;
            assert_eq!(answer.code(), 400);
            assert_eq!(answer.problem().as_deref(), Some("missing-key"));
        }
        assert_eq!(site.runs.count(), 0);
    }
}

#[tokio::test]
async fn a_nested_handler_has_the_policy_of_the_outermost() {
    async fn outer(State(runs): State<Runs>) -> (StatusCode, String) {
        ViewSet::create(State(runs)).await
    }
    for layer in modes(&Config::default()) {
        let runs = Runs::new();
        let inner = || views::create.idempotency_exempt();
        let router = Router::new()
            .route("/key", any(outer.idempotency_key(KeyPolicy::required())))
            .route("/exempt", any(outer.idempotency_exempt()))
            .route(
                "/key-around-exempt",
                any(inner().idempotency_key(KeyPolicy::required())),
            )
            .route("/exempt-around-key", any(inner()))
            .layer(layer)
            .with_state(runs.clone());
        let site = Site {
            server: Server::start(router).await,
            runs,
        };
        assert_replayed(site.post_twice("/key").await, 409);
        assert_both_ran(site.post_twice("/exempt").await);
        assert_replayed(site.post_twice("/key-around-exempt").await, 409);
        assert_both_ran(site.post_twice("/exempt-around-key").await);
    }
}

// ---- what a retry gets

/// That with `config` every handler with a key answers a retry with `status`.
async fn assert_retries_get(config: Config, status: u16) {
    for layer in modes(&config) {
        let site = Site::open(layer).await;
        for group in GROUPS {
            let both = site.post_twice(&format!("{group}/create")).await;
            assert_replayed(both, status);
        }
    }
}

#[tokio::test]
async fn a_retry_gets_the_stored_answer_with_409() {
    assert_retries_get(Config::default(), 409).await;
}

#[tokio::test]
async fn a_retry_may_get_the_original_status() {
    assert_retries_get(Config::default().conflict_status(None), 201).await;
}

#[tokio::test]
async fn a_retry_may_get_a_status_of_ones_own() {
    let config = Config::default().conflict_status(Some(StatusCode::OK));
    assert_retries_get(config, 200).await;
}

#[tokio::test]
async fn a_manual_handler_answers_a_retry_itself() {
    for layer in modes(&Config::default()) {
        let site = Site::open(layer).await;
        for group in GROUPS {
            let path = format!("{group}/manual");
            assert_eq!(site.post(&path, None).await.code(), 400);
            let (first, second, runs) = site.post_twice(&path).await;
            assert_eq!((first.code(), second.code()), (201, 200));
            assert_eq!(second.body, first.body);
            assert_eq!(runs, 2, "it runs on the retry too");
        }
    }
}

#[tokio::test]
async fn a_manual_handler_is_told_whether_there_was_an_answer_and_which() {
    let tell = async |manual: Option<ManualIdempotency>| {
        let Some(manual) = manual else {
            return (StatusCode::OK, "not asked".to_owned());
        };
        let last = manual.response();
        let body = last.map(|last| String::from_utf8(last.body().to_vec()).unwrap());
        // Not stored, so that what is stored stays.
        let status = match manual.exists() {
            true => StatusCode::CONFLICT,
            false => StatusCode::CREATED,
        };
        (status, format!("{} {body:?}", manual.exists()))
    };
    let policy = KeyPolicy::optional().manual();
    let router = Router::new()
        .route("/optional", any(tell.idempotency_key(policy)))
        .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
    let server = Server::start(router).await;
    let without = server.post("/optional").send().await;
    assert_eq!(without.text(), "not asked");
    let call = || server.post("/optional").key(KEY).send();
    assert_eq!(call().await.text(), "false None");
    for _ in 0..2 {
        assert_eq!(call().await.text(), r#"true Some("false None")"#);
    }
}

// ---- which answers are stored

#[tokio::test]
async fn a_status_that_is_not_listed_is_not_stored() {
    let store_on = StoreOn::statuses([StatusCode::MULTI_STATUS]);
    for layer in modes(&Config::default().store_on(store_on)) {
        let site = Site::open(layer).await;
        for group in GROUPS {
            assert_both_ran(site.post_twice(&format!("{group}/create")).await);
        }
    }
}

#[tokio::test]
async fn a_status_that_is_listed_is_stored() {
    let store_on = StoreOn::statuses([StatusCode::CREATED]);
    assert_retries_get(Config::default().store_on(store_on), 409).await;
}

// ---- the key: header and encoder

#[tokio::test]
async fn the_key_is_taken_from_the_configured_header_alone() {
    const CUSTOM: &str = "my-custom-idempotency-key";
    let configs = [
        (Config::default(), "idempotency-key", CUSTOM),
        (
            Config::default().header(HeaderName::from_static(CUSTOM)),
            CUSTOM,
            "idempotency-key",
        ),
    ];
    for (config, right, wrong) in configs {
        for layer in modes(&config) {
            let site = Site::open(layer).await;
            let post = |header| site.server.post("/views/create").header(header, KEY).send();
            let refused = post(wrong).await;
            assert_eq!(refused.problem().as_deref(), Some("missing-key"));
            assert_eq!(post(right).await.code(), 201);
            assert!(post(right).await.is_replay());
        }
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
    for layer in modes(&Config::default().encoder(Constant)) {
        let engine = layer.engine().clone();
        let site = Site::open(layer).await;
        let first = site.post("/views/create", Some(KEY)).await;
        assert_eq!(first.code(), 201);
        assert!(matches!(
            engine.get(&CONSTANT).await.unwrap(),
            Some(Entry::Completed(_))
        ));
        // Nothing of the request counts, not even the key.
        let other = site.post("/viewsets/create", Some("another")).await;
        assert_eq!((other.code(), other.is_replay()), (409, true));
        assert_eq!(other.body, first.body);
    }
}

// ---- where records are

/// Claims everything and keeps nothing.
struct Forgetful;

impl Storage for Forgetful {
    async fn begin(&self, _: &EncodedKey, _: &NewClaim) -> Result<Begin, StorageError> {
        Ok(Begin::Acquired)
    }

    async fn complete(
        &self,
        _: &EncodedKey,
        _: Token,
        _: &Record,
        _: Duration,
    ) -> Result<Held, StorageError> {
        Ok(Held::Yes)
    }

    async fn renew(&self, _: &EncodedKey, _: Token, _: Duration) -> Result<Held, StorageError> {
        Ok(Held::Yes)
    }

    async fn release(&self, _: &EncodedKey, _: Token) -> Result<Held, StorageError> {
        Ok(Held::Yes)
    }

    async fn get(&self, _: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        Ok(None)
    }

    async fn replace(&self, _: &EncodedKey, _: &Record, _: Duration) -> Result<(), StorageError> {
        Ok(())
    }

    async fn remove(&self, _: &EncodedKey) -> Result<bool, StorageError> {
        Ok(false)
    }

    async fn wait(&self, _: &EncodedKey, _: Duration) -> Result<(), StorageError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_storage_that_keeps_nothing_lets_a_retry_run() {
    for layer in [
        IdempotencyLayer::enforce(Forgetful),
        IdempotencyLayer::exempt(Forgetful),
    ] {
        let site = Site::open(layer).await;
        for group in GROUPS {
            assert_both_ran(site.post_twice(&format!("{group}/create")).await);
        }
    }
}

#[tokio::test]
async fn a_storage_that_is_given_is_the_one_that_is_used() {
    let storage = MemoryStorage::new();
    for (n, layer) in [
        IdempotencyLayer::enforce(storage.clone()),
        IdempotencyLayer::exempt(storage.clone()),
    ]
    .into_iter()
    .enumerate()
    {
        let site = Site::open(layer).await;
        if n == 0 {
            assert_replayed(site.post_twice("/views/create").await, 409);
        }
        // The other mode finds what this one has stored.
        assert!(site.post("/views/create", Some(KEY)).await.is_replay());
        assert_eq!(storage.records(), 1);
    }
}

/// A layer of each mode with a default and a named cache, and a site whose `/mine` names it.
async fn sites_with_a_named_cache() -> Vec<(Site, MemoryStorage, MemoryStorage)> {
    let mut sites = Vec::new();
    for mode in [
        |storage: MemoryStorage| IdempotencyLayer::enforce(storage),
        |storage: MemoryStorage| IdempotencyLayer::exempt(storage),
    ] {
        let (default, named) = (MemoryStorage::new(), MemoryStorage::new());
        let layer = mode(default.clone()).cache("FiveMinuteCache", named.clone());
        let policy = KeyPolicy::required().cache_name("FiveMinuteCache");
        let runs = Runs::new();
        let router = Router::new()
            .route("/views/mine", any(views::in_my_cache))
            .route(
                "/viewsets/mine",
                any(ViewSet::create.idempotency_key(policy)),
            )
            .route("/views/create", any(views::create))
            .route(
                "/viewsets/create",
                any(ViewSet::create.idempotency_key(KeyPolicy::required())),
            )
            .layer(layer.clone())
            .with_state(runs.clone());
        let server = Server::start(layer.check(router).unwrap()).await;
        sites.push((Site { server, runs }, default, named));
    }
    sites
}

#[tokio::test]
async fn a_named_cache_wins_over_the_default_one() {
    for (site, default, named) in sites_with_a_named_cache().await {
        for (records, group) in (1..).zip(GROUPS) {
            assert_replayed(site.post_twice(&format!("{group}/mine")).await, 409);
            assert_eq!((default.records(), named.records()), (0, records));
        }
    }
}

#[tokio::test]
async fn a_handler_that_names_no_cache_is_in_the_default_one() {
    for (site, default, named) in sites_with_a_named_cache().await {
        for (records, group) in (1..).zip(GROUPS) {
            assert_replayed(site.post_twice(&format!("{group}/create")).await, 409);
            assert_eq!((default.records(), named.records()), (records, 0));
        }
    }
}

#[tokio::test]
async fn a_cache_that_nobody_configured_is_found_before_the_server_listens() {
    for layer in modes(&Config::default()) {
        let router = Router::new()
            .route("/mine", any(views::in_my_cache))
            .layer(layer.clone())
            .with_state(Runs::new());
        let misuse = layer.check(router.clone()).unwrap_err();
        assert!(misuse.to_string().contains("FiveMinuteCache"), "{misuse}");

        // Who does not check is told at the first request, and the handler does not run.
        let server = Server::start(router).await;
        assert_eq!(server.post("/mine").key(KEY).send().await.code(), 500);
    }
}

#[tokio::test]
async fn what_is_stored_is_found_under_its_key_alone() {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new())
        .config(Config::default().encoder(Constant))
        .cache("FiveMinuteCache", MemoryStorage::new());
    let engines = [
        layer.engine().clone(),
        layer.engine_of("FiveMinuteCache").unwrap().clone(),
    ];
    let site = Site::open(layer).await;
    for engine in &engines {
        assert!(engine.get(&CONSTANT).await.unwrap().is_none());
    }
    let answer = site.post("/views/create", Some(KEY)).await;
    let Some(Entry::Completed(record)) = engines[0].get(&CONSTANT).await.unwrap() else {
        panic!("no record")
    };
    let idempotency_axum::Outcome::Response(stored) = record.outcome else {
        panic!("no answer")
    };
    assert_eq!(stored.status(), answer.status);
    assert_eq!(stored.body(), &answer.body);
    let other = EncodedKey::from_bytes([1; 32]);
    assert!(engines[0].get(&other).await.unwrap().is_none());
    assert!(engines[1].get(&CONSTANT).await.unwrap().is_none());
}

// ---- locks

/// A handler at a gate, which answers 201, or 500 on its first run if it `fails`.
async fn gated(config: Config, fails: bool) -> (Server, Runs, Gate) {
    let (runs, gate) = (Runs::new(), Gate::new());
    let handler = {
        let (runs, gate) = (runs.clone(), gate.clone());
        async move || {
            gate.enter().await;
            match runs.next() {
                1 if fails => (StatusCode::INTERNAL_SERVER_ERROR, String::new()),
                run => (StatusCode::CREATED, format!("order {run}")),
            }
        }
    };
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
    let router = Router::new().route("/orders", any(handler)).layer(layer);
    (Server::start(router).await, runs, gate)
}

#[tokio::test]
async fn a_duplicate_beside_the_running_first_is_423_until_the_key_is_free() {
    let lock = LockPolicy::default().timeout(Duration::ZERO);
    let (server, runs, gate) = gated(Config::default().lock(lock), true).await;
    let call = || server.post("/orders").key(KEY);
    let first = call().start();
    gate.arrived(1).await;
    let duplicate = call().send().await;
    assert_eq!(duplicate.code(), 423);
    assert_eq!(duplicate.header("retry-after"), Some("1"));

    // The first fails, which leaves nothing: the next one runs.
    gate.open(2);
    assert_eq!(first.await.unwrap().code(), 500);
    assert_eq!(call().send().await.text(), "order 2");
    assert_eq!(runs.count(), 2);
}

#[tokio::test]
async fn a_duplicate_waits_for_as_long_as_configured() {
    let lock = LockPolicy::default().timeout(Duration::from_millis(1800));
    let (env, clock) = idempotency_axum::Env::simulated(1);
    let events = idempotency_tests::Events::new();
    let config = Config::default()
        .lock(lock)
        .env(env)
        .observer(events.clone());
    let (server, runs, gate) = gated(config, false).await;
    let call = || server.post("/orders").key(KEY);
    let first = call().start();
    gate.arrived(1).await;
    let gives_up = call().start();
    events.until("waiting", 1).await;
    clock.advance(Duration::from_millis(1799));
    let gets_it = call().start();
    events.until("waiting", 2).await;
    clock.advance(Duration::from_millis(1));
    assert_eq!(gives_up.await.unwrap().code(), 423);
    clock.advance(Duration::from_millis(1798));
    gate.open(1);
    assert_eq!(first.await.unwrap().code(), 201);
    assert!(gets_it.await.unwrap().is_replay());
    assert_eq!(runs.count(), 1);
}

#[tokio::test]
async fn without_locks_a_retry_still_gets_the_stored_answer() {
    assert_retries_get(Config::default().lock(LockPolicy::disabled()), 409).await;
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
        let post = || site.post("/views/create", Some(KEY));
        clock.advance(lease - Duration::from_millis(1));
        assert_eq!(post().await.code(), 423);
        clock.advance(Duration::from_millis(1));
        assert_eq!(post().await.code(), 201);
    }
}

// ---- other middleware

#[tokio::test]
async fn a_middleware_that_looks_on_may_stand_on_either_side() {
    for layer in modes(&Config::default()) {
        for is_outside in [true, false] {
            let runs = Runs::new();
            let router = Router::new().route("/views/create", any(views::create));
            let router = match is_outside {
                true => router
                    .layer(layer.clone())
                    .layer(TraceLayer::new_for_http()),
                false => router
                    .layer(TraceLayer::new_for_http())
                    .layer(layer.clone()),
            };
            let site = Site {
                server: Server::start(router.with_state(runs.clone())).await,
                runs,
            };
            assert_eq!(site.post("/views/create", None).await.code(), 400);
            let key = format!("{is_outside}");
            let first = site.post("/views/create", Some(&key)).await;
            assert_eq!(first.code(), 201);
            assert!(site.post("/views/create", Some(&key)).await.is_replay());
            let options = site.server.call(Method::OPTIONS, "/views/create");
            assert_eq!(options.send().await.code(), 201);
        }
    }
}
