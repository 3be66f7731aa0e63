//! A storage outlives the runtime that opened it, and is not held up by one that is blocked.

use std::{sync::mpsc, thread, time::Duration};

use idempotency_axum::{Begin, Env, Held, SqliteStorage, Storage};
use idempotency_tests::{PATIENCE, sqlite::SqliteFile};
use tokio::runtime::{Builder, Runtime};

use super::{KEY, LONG, answer, claim, key, record_of};

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

/// Runs `work` on the background runtime.
fn in_background<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    let (sender, done) = mpsc::channel();
    let background = Env::system().background().expect("a background runtime");
    background.spawn(async move {
        assert!(Env::in_background());
        let _ = sender.send(work.await);
    });
    done.recv_timeout(PATIENCE).expect("it ends")
}

#[test]
fn a_claim_is_completed_after_its_runtime_has_ended() {
    let file = SqliteFile::new();
    let claim = claim();
    let token = claim.token;
    let storage = runtime().block_on(async {
        let storage = file.open().await;
        let begun = storage.begin(&KEY, &claim).await.unwrap();
        assert_eq!(begun, Begin::Acquired);
        storage
    });
    let ended = storage.clone();
    let held = in_background(async move {
        let renewed = ended.renew(&KEY, token, LONG).await.unwrap();
        assert_eq!(renewed, Held::Yes);
        ended.complete(&KEY, token, &answer("done"), LONG).await
    });
    assert_eq!(held.unwrap(), Held::Yes);
    let record = runtime().block_on(record_of(&storage, &KEY));
    assert_eq!(record, Some(answer("done")));
}

#[test]
fn a_blocked_runtime_holds_no_connection() {
    let file = SqliteFile::new();
    let claim = claim();
    let token = claim.token;
    let storage = runtime().block_on(file.open());
    let (blocked, is_blocked) = mpsc::channel();
    let (go_on, wait) = mpsc::channel::<()>();
    let shared = storage.clone();
    let thread = thread::spawn(move || {
        runtime().block_on(async {
            let begun = shared.begin(&KEY, &claim).await.unwrap();
            assert_eq!(begun, Begin::Acquired);
            // These are under way, and nobody polls them.
            for n in 100..120 {
                let shared = shared.clone();
                tokio::spawn(async move { shared.begin(&key(n), &super::claim()).await });
            }
            tokio::task::yield_now().await;
            blocked.send(()).unwrap();
            wait.recv().unwrap();
        });
    });
    is_blocked.recv_timeout(PATIENCE).unwrap();
    let held = in_background(async move { storage.renew(&KEY, token, LONG).await });
    assert_eq!(held.unwrap(), Held::Yes);
    go_on.send(()).unwrap();
    thread.join().unwrap();
}

/// `tokio::time::pause`: the test's own runtime then drives the connections.
#[tokio::test(start_paused = true)]
async fn a_paused_clock_does_no_harm() {
    let file = SqliteFile::new();
    let storage = SqliteStorage::open(file.path()).await.unwrap();
    storage.migrate().await.unwrap();
    let claim = claim();
    let begun = storage.begin(&KEY, &claim).await.unwrap();
    assert_eq!(begun, Begin::Acquired);
    storage.wait(&KEY, Duration::from_secs(60)).await.unwrap();
    let held = storage
        .complete(&KEY, claim.token, &answer("done"), LONG)
        .await;
    assert_eq!(held.unwrap(), Held::Yes);
}
