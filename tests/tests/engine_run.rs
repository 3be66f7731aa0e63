//! `Engine::run`: claim, run and record in one call.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures_util::FutureExt;
use idempotency_axum::{
    LockPolicy, OnStorageError, Operation, Ran, StorageErrorKind, TombstoneReason,
};
use idempotency_tests::{
    Fault,
    node::{LEASE, Node, answer, claim_of, idle, operation, printed},
};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Parcel {
    number: usize,
}

type Shipped = Ran<Parcel, &'static str>;

/// Counts how often it runs.
#[derive(Default)]
struct Carrier(AtomicUsize);

impl Carrier {
    async fn ship(&self) -> Result<Parcel, &'static str> {
        let number = self.0.fetch_add(1, Ordering::SeqCst) + 1;
        Ok(Parcel { number })
    }
}

#[tokio::test(start_paused = true)]
async fn a_value_is_executed_once_and_replayed() {
    let (node, carrier) = (Node::new(), Carrier::default());
    let first = node.engine.run(&operation(1), || carrier.ship()).await;
    assert!(matches!(first, Ran::Executed(Parcel { number: 1 })));
    for engine in [&node.engine, &node.peer()] {
        let again = engine.run(&operation(1), || carrier.ship()).await;
        assert!(matches!(again, Ran::Replayed(Parcel { number: 1 })));
    }
    assert_eq!(carrier.0.load(Ordering::SeqCst), 1);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_error_releases_the_key() {
    let (node, carrier) = (Node::new(), Carrier::default());
    let failed: Shipped = node.engine.run(&operation(1), async || Err("no van")).await;
    assert!(matches!(failed, Ran::Failed("no van")));
    let next = node.engine.run(&operation(1), || carrier.ship()).await;
    assert!(matches!(next, Ran::Executed(_)));
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_duplicate_gets_the_value_of_the_running_call() {
    let (node, carrier) = (Node::new(), Carrier::default());
    let (finish, finished) = tokio::sync::oneshot::channel::<()>();
    let engine = node.engine.clone();
    let original: tokio::task::JoinHandle<Shipped> = tokio::spawn(async move {
        engine
            .run(&operation(1), async || {
                finished.await.map_err(|_| "cut off")?;
                Ok(Parcel { number: 7 })
            })
            .await
    });
    idle().await;
    let engine = node.engine.clone();
    let duplicate = tokio::spawn(async move { engine.run(&operation(1), || carrier.ship()).await });
    idle().await;
    finish.send(()).unwrap();
    assert!(matches!(
        original.await.unwrap(),
        Ran::Executed(Parcel { number: 7 })
    ));
    assert!(matches!(
        duplicate.await.unwrap(),
        Ran::Replayed(Parcel { number: 7 })
    ));
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn what_does_not_run_says_why() {
    let no_wait = LockPolicy::default().timeout(Duration::ZERO);
    let node = Node::with(|config| config.lock(no_wait).max_running(1));
    let carrier = Carrier::default();
    let running = claim_of(node.engine.begin(&printed(1, 1)).await);
    let in_flight = node.engine.run(&printed(1, 1), || carrier.ship()).await;
    assert!(matches!(in_flight, Ran::InFlight), "{in_flight:?}");
    let mismatch = node.engine.run(&printed(1, 2), || carrier.ship()).await;
    assert!(matches!(mismatch, Ran::Mismatch), "{mismatch:?}");
    let overloaded = node.engine.run(&operation(2), || carrier.ship()).await;
    assert!(matches!(overloaded, Ran::Overloaded), "{overloaded:?}");

    let _ = running.tombstone(TombstoneReason::HandlerFailed).await;
    let gone = node.engine.run(&printed(1, 1), || carrier.ship()).await;
    assert!(matches!(
        gone,
        Ran::NotReplayable(TombstoneReason::HandlerFailed)
    ));

    node.storage.set(Operation::Begin, Fault::FailBefore);
    let failed = node.engine.run(&operation(3), || carrier.ship()).await;
    assert!(
        matches!(&failed, Ran::StorageFailed(error) if error.kind() == StorageErrorKind::Unavailable),
        "{failed:?}"
    );
    assert_eq!(carrier.0.load(Ordering::SeqCst), 0);
    node.pass(LEASE).await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn an_unprotected_call_runs_where_that_is_configured() {
    let node = Node::with(|config| config.on_storage_error(OnStorageError::RunUnprotected));
    let carrier = Carrier::default();
    node.storage.set(Operation::Begin, Fault::FailBefore);
    for number in 1..=2 {
        let ran = node.engine.run(&operation(1), || carrier.ship()).await;
        assert!(matches!(ran, Ran::Executed(parcel) if parcel.number == number));
    }
    assert_eq!(node.events.count("unprotected"), 2);
    node.pass(LEASE).await;
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_record_of_another_type_is_not_run_over() {
    let (node, carrier) = (Node::new(), Carrier::default());
    let claim = claim_of(node.engine.begin(&operation(1)).await);
    let _ = claim.complete(answer("not json")).await;
    let ran = node.engine.run(&operation(1), || carrier.ship()).await;
    assert!(
        matches!(&ran, Ran::StorageFailed(error) if error.kind() == StorageErrorKind::Unreadable),
        "{ran:?}"
    );
    assert_eq!(carrier.0.load(Ordering::SeqCst), 0);
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_value_without_a_json_form_leaves_a_tombstone() {
    let node = Node::new();
    // JSON has no keys but strings.
    let odd = std::collections::BTreeMap::from([((1, 2), 3)]);
    let ran: Ran<_, &str> = node
        .engine
        .run(&operation(1), async || Ok(odd.clone()))
        .await;
    assert!(matches!(ran, Ran::Executed(_)));
    let again: Shipped = node.engine.run(&operation(1), async || Err("ran")).await;
    assert!(matches!(
        again,
        Ran::NotReplayable(TombstoneReason::Unstorable)
    ));
    node.assert_quiet().await;
}

#[tokio::test(start_paused = true)]
async fn a_call_that_panics_or_is_dropped_releases_the_key() {
    let (node, carrier) = (Node::new(), Carrier::default());
    let engine = node.engine.clone();
    let panics = tokio::spawn(async move {
        let _: Shipped = engine.run(&operation(1), async || panic!("no van")).await;
    });
    assert!(panics.await.unwrap_err().is_panic());
    let operation_1 = operation(1);
    let pending: std::pin::Pin<Box<dyn Future<Output = Shipped>>> =
        Box::pin(node.engine.run(&operation_1, std::future::pending));
    assert!(pending.now_or_never().is_none());
    idle().await;
    let ran = node.engine.run(&operation(1), || carrier.ship()).await;
    assert!(matches!(ran, Ran::Executed(Parcel { number: 1 })));
    node.assert_quiet().await;
}
