//! What others got wrong, and what their users ask for, and the tests that show that it can't happen here.
//!
//! [`DEFECTS`] has a line for each of them. Nearly all are shown by a suite of their own; what no other suite shows is below.
//! [`every_defect_has_a_test_that_exists`] keeps the table true.

use std::collections::BTreeSet;

use axum::{
    Router,
    routing::{any, post},
};
use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage};
use idempotency_tests::{
    Answer, Events, Runs, Server,
    catalogue::{
        Ours::{self, NoMeaning, Tests},
        assert_all_named,
    },
};

/// Whose defect, or wish; what it is; and what we have of it.
const DEFECTS: &[(&str, &str, Ours)] = &[
    (
        "idempotent",
        "the path is taken after `nest` stripped it: `/refunds/create` replays `/payments/create`",
        Tests(&["answers/conflicts::same_path_in_two_nests"]),
    ),
    (
        "idempotent",
        "a `no-store` answer is not recorded, so its retry runs again",
        Tests(&[
            "answers/headers::headers_of_a_replay",
            "streams/pace::the_head_is_replayed",
        ]),
    ),
    (
        "idempotent",
        "a streamed answer is not recorded, so its retry runs again",
        Tests(&["streams/end::a_retry_right_after_it_gets_the_replay"]),
    ),
    (
        "idempotent, autumn-web",
        "an answer over the limit is not recorded, so its retry runs again",
        Tests(&[
            "answers/recording::answer_over_the_size_limit",
            "answers/recording::answer_in_chunks_over_the_size_limit",
        ]),
    ),
    (
        "idempotent",
        "a panic blocks its key until the lease ends",
        Tests(&[
            "answers/recording::handler_panics_and_nobody_catches_it",
            "invariants::invariant_06_a_panic_counts_as_a_500",
        ]),
    ),
    (
        "idempotent",
        "`:` and `/` in keys are refused",
        Tests(&["peers::a_key_may_have_colons_and_slashes"]),
    ),
    (
        "idempotent, footing",
        "a quoted key is another key than the bare one, or is refused",
        Tests(&[
            "answers/keys::a_quoted_key_is_the_bare_key",
            "invariants::invariant_11_quoted_and_bare_are_one_key",
        ]),
    ),
    (
        "idempotent, users",
        "a 500 is pinned to its key for a day",
        Tests(&[
            "answers/recording::status_stored",
            "invariants::invariant_06_a_status_that_is_not_stored_frees_its_key",
        ]),
    ),
    (
        "idempotent",
        "Set-Cookie is replayed",
        Tests(&["answers/headers::headers_of_a_replay"]),
    ),
    (
        "idempotent, django-idempotency-key",
        "memory grows without a bound",
        Tests(&[
            "idempotency-core/tests/memory_limits.rs::a_million_records_stay_within_the_limit_and_spare_the_running_claim",
        ]),
    ),
    (
        "idempotent",
        "60 to 70 µs for each request",
        NoMeaning(
            "a number of a benchmark and not of a test; `allocations.rs` holds what an unprotected request may cost",
        ),
    ),
    (
        "idempotent",
        "a Lua script with two keys, which a Redis cluster refuses",
        Tests(&["redis/conformance::a_cluster_keeps_every_rule"]),
    ),
    (
        "axum-idempotent, django-idempotency-key",
        "nothing is claimed, or only during the look-up: concurrent duplicates both run",
        Tests(&[
            "answers/conflicts::many_duplicates_run_once",
            "invariants::invariant_01_one_execution_at_a_time_on_all_nodes",
        ]),
    ),
    (
        "axum-idempotent",
        "a key alone names the operation: path, method and body are ignored",
        Tests(&[
            "answers/conflicts::same_key_other_path",
            "answers/conflicts::same_key_other_method",
            "answers/conflicts::same_key_other_body",
        ]),
    ),
    (
        "axum-idempotent",
        "a GET replays a POST",
        Tests(&["peers::a_get_does_not_get_the_answer_of_a_post"]),
    ),
    (
        "axum-idempotent",
        "when the storage fails the handler runs unprotected, and nobody is told",
        Tests(&[
            "answers/refusals::storage_down",
            "answers/refusals::record_unreadable",
        ]),
    ),
    (
        "autumn-web, idemkit",
        "the lease is not renewed, so a slow handler runs twice",
        Tests(&[
            "invariants::invariant_03_a_slow_handler_keeps_its_claim_until_max_hold",
            "answers/conflicts::a_claim_is_renewed_while_the_handler_runs",
            "stress::a_handler_that_takes_three_leases_runs_once",
            "stress::a_handler_that_blocks_its_thread_for_three_leases_runs_once",
        ]),
    ),
    (
        "autumn-web",
        "an empty or non-ASCII key passes unprotected",
        Tests(&[
            "answers/keys::key_invalid",
            "invariants::invariant_11_an_invalid_key_is_an_error_where_it_is_optional_too",
        ]),
    ),
    (
        "autumn-web",
        "server-sent events are buffered",
        Tests(&["streams/events::event_by_event"]),
    ),
    (
        "autumn-web, users",
        "Redis keys without a hash tag: CROSSSLOT on a cluster",
        Tests(&["redis/conformance::a_cluster_keeps_every_rule"]),
    ),
    (
        "cratestack",
        "the lease is as long as the TTL, so what a dead process or a client that left had claimed is stuck for a day",
        Tests(&["seed::a_claim_of_a_dead_process_ends_with_its_lease"]),
    ),
    (
        "cratestack, footing",
        "a client that leaves wedges its key, or pins a 500 to it",
        Tests(&["invariants::invariant_04_a_client_that_leaves_cancels_nothing"]),
    ),
    (
        "cratestack",
        "a big answer becomes a 500 after its handler ran",
        Tests(&[
            "answers/recording::answer_over_the_size_limit",
            "answers/recording::answer_in_chunks_over_the_size_limit",
        ]),
    ),
    (
        "Powertools, users",
        "a live claim is taken over: double execution",
        Tests(&[
            "invariants::invariant_03_a_slow_handler_keeps_its_claim_until_max_hold",
            "answers/conflicts::a_claim_is_renewed_while_the_handler_runs",
            "engine::a_clock_that_jumps_over_the_lease_lets_nobody_here_run_twice",
        ]),
    ),
    (
        "django-idempotency-key",
        "one lock for all keys: one slow request holds up all others",
        Tests(&["answers/conflicts::other_key_while_the_first_runs"]),
    ),
    (
        "django-idempotency-key",
        "fields are concatenated without their lengths, so two requests are one",
        Tests(&[
            "invariants::invariant_12_what_moves_over_the_end_of_a_field_is_another_operation",
        ]),
    ),
    (
        "django-idempotency-key",
        "records are pickles, which run code when they are read",
        Tests(&["idempotency-core/src/record/codec.rs::garbage_is_an_error"]),
    ),
    (
        "django-idempotency-key",
        "a manual handler's conflict runs go on at once, and the last one to end wins",
        Tests(&[
            "manual/turns::two_conflicts_at_once",
            "manual/turns::fifty_conflicts_at_once",
        ]),
    ),
    (
        "users",
        "keys stuck after a crash",
        Tests(&["seed::a_claim_of_a_dead_process_ends_with_its_lease"]),
    ),
    (
        "users",
        "an answer is replayed to another user or tenant",
        Tests(&[
            "answers/conflicts::same_key_other_authorization",
            "answers/conflicts::same_key_other_scope",
        ]),
    ),
    (
        "users",
        "a duplicate should wait for the answer rather than get a 409",
        Tests(&["answers/conflicts::duplicate_that_waits_gets_the_answer"]),
    ),
    (
        "users",
        "the record should be committed together with the business database",
        Tests(&[
            "postgres/transactions::writes_and_record_are_committed_together",
            "postgres/transactions::an_error_leaves_nothing",
        ]),
    ),
    (
        "users",
        "Location and ETag must survive a replay",
        Tests(&["answers/headers::headers_of_a_replay"]),
    ),
    (
        "users",
        "a TTL for each route",
        Tests(&["policies/attributes::key_ttl", "policies/terms::ttl"]),
    ),
    (
        "users",
        "no secrets at rest",
        Tests(&["invariants::invariant_12_a_storage_sees_hashes_only"]),
    ),
    (
        "users",
        "answers that stream",
        Tests(&[
            "streams/pace::frame_by_frame",
            "streams/leaving::the_recording_goes_on",
            "streams/breaks::an_error_after_two_frames",
        ]),
    ),
    (
        "users",
        "metrics",
        Tests(&["peers::everything_that_happens_can_be_counted"]),
    ),
    (
        "users",
        "OpenAPI",
        // `macros/pass/utoipa.rs`.
        Tests(&["macros::what_works_runs"]),
    ),
];

#[test]
fn every_defect_has_a_test_that_exists() {
    let mut seen = BTreeSet::new();
    for (peer, defect, ours) in DEFECTS {
        assert!(!peer.is_empty() && seen.insert(defect), "{defect}");
        ours.check();
    }
    let rows = DEFECTS.iter().map(|(_, _, ours)| *ours);
    assert_all_named("peers", rows, &["every_defect_has_a_test_that_exists"]);
}

const KEY: &str = "the-key";

fn enforce(config: Config) -> IdempotencyLayer {
    IdempotencyLayer::enforce(MemoryStorage::new()).config(config)
}

#[track_caller]
fn assert_ran(answer: &Answer, run: usize) {
    let body = format!("order {run}");
    assert_eq!((answer.code(), answer.text()), (201, &*body));
    assert!(!answer.is_replay());
}

/// That it is a replay, under `Config::ietf`, of run number `run`.
#[track_caller]
fn assert_replay(answer: &Answer, run: usize) {
    let body = format!("order {run}");
    assert_eq!((answer.code(), answer.text()), (201, &*body));
    assert!(answer.is_replay());
}

#[tokio::test]
async fn a_get_does_not_get_the_answer_of_a_post() {
    for config in [Config::default(), Config::ietf(), Config::stripe()] {
        let runs = Runs::new();
        let router = Router::new()
            .route("/orders", any(runs.handler()))
            .layer(enforce(config));
        let server = Server::start(router).await;
        assert_ran(&server.post("/orders").key(KEY).send().await, 1);
        for run in 2..=3 {
            assert_ran(&server.get("/orders").key(KEY).send().await, run);
        }
    }
}

#[tokio::test]
async fn a_key_may_have_colons_and_slashes() {
    let runs = Runs::new();
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(enforce(Config::ietf()));
    let server = Server::start(router).await;
    let keys = ["shop:7/order:8", "shop:7/order", "a=b;c?d#e", "{tag}"];
    for (run, key) in (1..).zip(keys) {
        assert_ran(&server.post("/orders").key(key).send().await, run);
        assert_replay(&server.post("/orders").key(key).send().await, run);
    }
}

#[tokio::test]
async fn everything_that_happens_can_be_counted() {
    let (runs, events) = (Runs::new(), Events::new());
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(enforce(Config::ietf().observer(events.clone())));
    let server = Server::start(router).await;
    let call = |body: &'static str| server.post("/orders").key(KEY).body(body).send();
    assert_ran(&call("one").await, 1);
    assert_replay(&call("one").await, 1);
    assert_eq!(call("two").await.problem().as_deref(), Some("key-reused"));
    let counts = ["executing", "completed", "replayed", "refused"].map(|name| events.count(name));
    assert_eq!(counts, [1, 1, 1, 1]);
}
