//! The table *Handler policies* of the behaviour document over real TCP: with combinators, and once more with the attributes.

use axum::{Router, handler::Handler, routing::any};
use idempotency_axum::{Config, Env, IdempotencyLayer, KeyPolicy, MemoryStorage, SimulatedClock};
use idempotency_tests::{Answer, Runs, Server};

mod answers;
mod attributes;
mod caches;
mod combinators;
mod extractors;
mod keys;
mod misuse;
mod rows;
mod terms;

/// Makes a layer of each mode, each time with a storage of its own.
fn modes() -> [fn() -> IdempotencyLayer; 2] {
    [enforce, exempt]
}

fn enforce() -> IdempotencyLayer {
    IdempotencyLayer::enforce(MemoryStorage::new())
}

fn exempt() -> IdempotencyLayer {
    IdempotencyLayer::exempt(MemoryStorage::new())
}

fn optional() -> KeyPolicy {
    KeyPolicy::optional()
}

/// Serves `handler` at `/orders`, for every method.
async fn serve<T: 'static>(layer: IdempotencyLayer, handler: impl Handler<T, Runs>) -> Served {
    let runs = Runs::new();
    let router = Router::new()
        .route("/orders", any(handler))
        .layer(layer)
        .with_state(runs.clone());
    Served {
        server: Server::start(router).await,
        runs,
    }
}

/// A handler and how often it ran, if it counts that in its state.
struct Served {
    server: Server,
    runs: Runs,
}

impl Served {
    async fn post(&self, key: Option<&str>) -> Answer {
        let call = self.server.post("/orders");
        match key {
            Some(key) => call.key(key).send().await,
            None => call.send().await,
        }
    }

    /// That it behaves as a handler that requires a key.
    async fn assert_required(&self) {
        let missing = self.post(None).await;
        assert_refused(&missing, 400, "missing-key");
        let invalid = self.post(Some("a,b")).await;
        assert_refused(&invalid, 400, "invalid-key");
        assert_eq!(self.runs.count(), 0);
        self.assert_protects(1).await;
    }

    /// That it behaves as a handler with an optional key.
    async fn assert_optional(&self) {
        for run in 1..=2 {
            assert_ran(&self.post(None).await, run);
        }
        // An invalid key is an error even here.
        let invalid = self.post(Some("a,b")).await;
        assert_refused(&invalid, 400, "invalid-key");
        self.assert_protects(3).await;
        assert_ran(&self.post(None).await, 4);
    }

    /// That it behaves as a handler that is exempt.
    async fn assert_exempt(&self) {
        let keys = [None, Some("abc"), Some("abc"), Some("a,b"), None];
        for (run, key) in (1..).zip(keys) {
            assert_ran(&self.post(key).await, run);
        }
    }

    /// That a request with a key is protected, and the next run has number `run`.
    async fn assert_protects(&self, run: usize) {
        assert_ran(&self.post(Some("abc")).await, run);
        for _ in 0..2 {
            let retry = self.post(Some("abc")).await;
            assert_replay(&retry, run);
        }
        assert_eq!(self.runs.count(), run);
    }
}

/// That `answer` is the handler's own, of its run number `run`.
#[track_caller]
fn assert_ran(answer: &Answer, run: usize) {
    let body = format!("order {run}");
    assert_eq!((answer.code(), answer.text()), (201, &*body));
    assert!(!answer.is_replay());
}

/// That `answer` is what `Config::default` replays of run number `run`.
#[track_caller]
fn assert_replay(answer: &Answer, run: usize) {
    let body = format!("order {run}");
    assert_eq!((answer.code(), answer.text()), (409, &*body));
    assert!(answer.is_replay());
}

#[track_caller]
fn assert_refused(answer: &Answer, status: u16, problem: &str) {
    let found = (answer.code(), answer.problem());
    assert_eq!(found, (status, Some(problem.to_owned())), "{answer:?}");
    assert!(!answer.is_replay());
}

/// `layer` of mode `enforce`, its configuration and a storage on a clock that the test moves.
fn simulated() -> (IdempotencyLayer, MemoryStorage, SimulatedClock) {
    let (env, clock) = Env::simulated(1);
    let storage = MemoryStorage::builder().env(env.clone()).build();
    let config = Config::default().env(env);
    let layer = IdempotencyLayer::enforce(storage.clone()).config(config);
    (layer, storage, clock)
}
