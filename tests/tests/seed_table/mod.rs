//! The seed's cases, and the tests that show the same here: `tests/tests/<file>.py` and the function there, to our tests.

use idempotency_tests::catalogue::Ours::{self, NoMeaning, Tests};

/// Cases of the seed that show one behaviour: each of `cases` stands in each of `files`.
#[derive(Debug)]
pub struct Behaviour {
    pub files: &'static [&'static str],
    pub cases: &'static [&'static str],
    pub ours: Ours,
}

const ENFORCE: &str = "test_middleware";
const ENFORCE_VIEWSETS: &str = "test_middleware_viewsets";
const EXEMPT: &str = "test_middleware_exempt";
const EXEMPT_VIEWSETS: &str = "test_middleware_exempt_viewsets";
const MIDDLEWARES: &[&str] = &[ENFORCE, ENFORCE_VIEWSETS, EXEMPT, EXEMPT_VIEWSETS];
const VIEWSETS: &[&str] = &[ENFORCE_VIEWSETS, EXEMPT_VIEWSETS];
const UTILS: &[&str] = &["test_utils"];
const STORAGE: &[&str] = &["test_storage"];
const LOCKS: &[&str] = &["test_locks"];
const ENCODER: &[&str] = &["test_encoder"];

/// How many cases each file of the seed has.
pub const CASES: [(&str, usize); 10] = [
    ("test_django_debug_toolbar", 2),
    ("test_encoder", 3),
    ("test_locks", 5),
    (ENFORCE, 23),
    (EXEMPT, 20),
    (EXEMPT_VIEWSETS, 23),
    (ENFORCE_VIEWSETS, 24),
    ("test_storage", 7),
    ("test_storage_locking", 1),
    ("test_utils", 23),
];

const fn row(
    files: &'static [&'static str],
    cases: &'static [&'static str],
    ours: Ours,
) -> Behaviour {
    Behaviour { files, cases, ours }
}

pub const SEED: &[Behaviour] = &[
    // ---- who needs a key
    row(
        MIDDLEWARES,
        &["test_get_exempt"],
        Tests(&[
            "modes::safe_methods_are_exempt_in_enforce",
            "modes::safe_methods_are_exempt_in_exempt",
            "modes::safe_methods_are_exempt_where_a_key_is_required",
        ]),
    ),
    row(
        MIDDLEWARES,
        &["test_post_exempt"],
        Tests(&[
            "policies/rows::idempotency_exempt",
            "policies/attributes::exempt",
        ]),
    ),
    row(
        MIDDLEWARES,
        &["test_post_no_decorators"],
        Tests(&[
            "modes::enforce_requires_a_key",
            "modes::enforce_protects",
            "modes::exempt_runs_unprotected",
        ]),
    ),
    row(
        &[ENFORCE_VIEWSETS],
        &["test_post_optional"],
        Tests(&[
            "policies/rows::idempotency_key_optional",
            "policies/attributes::key_optional",
        ]),
    ),
    row(
        MIDDLEWARES,
        &["test_bad_request_no_key_specified"],
        Tests(&[
            "policies/rows::idempotency_key",
            "policies/attributes::key",
            "answers/keys::key_missing_required",
        ]),
    ),
    row(
        MIDDLEWARES,
        &[
            "test_idempotency_key_exempt_mutually_exclusive_1",
            "test_idempotency_key_exempt_mutually_exclusive_2",
            "test_manual_exempt_mutually_exclusive_1",
            "test_manual_exempt_mutually_exclusive_2",
        ],
        // There an exception for each request, here the handler does not compile: `both_*` and `exempt_manual*`.
        Tests(&["idempotency-macros/tests/refusals.rs::what_is_refused_names_its_cure"]),
    ),
    row(
        VIEWSETS,
        &["test_nested_decorator", "test_nested_decorator_exempt"],
        // A method that calls the one it overrides.
        Tests(&[
            "policies/combinators::outermost_required_over_exempt",
            "policies/combinators::outermost_exempt_over_required",
            "policies/combinators::on_an_associated_function",
            "policies/combinators::over_an_attribute",
        ]),
    ),
    // ---- what a retry gets
    row(
        MIDDLEWARES,
        &[
            "test_middleware_duplicate_request",
            "test_idempotency_key_decorator",
        ],
        Tests(&[
            "policies/rows::idempotency_key",
            "policies/attributes::key",
            "answers/conflicts::retry_after_completion",
        ]),
    ),
    row(
        MIDDLEWARES,
        &["test_middleware_duplicate_request_use_original_status_code"],
        Tests(&["answers/conflicts::conflict_status_none_is_the_original_status"]),
    ),
    row(
        MIDDLEWARES,
        &["test_middleware_duplicate_request_use_different_status_code"],
        Tests(&["answers/conflicts::conflict_status_of_ones_own"]),
    ),
    row(
        MIDDLEWARES,
        &["test_middleware_duplicate_request_manual_override"],
        Tests(&[
            "policies/rows::manual_idempotency_answers_with_what_is_stored",
            "policies/attributes::manual_idempotency",
        ]),
    ),
    row(
        UTILS,
        &[
            "test_idempotency_key_exists_none",
            "test_idempotency_key_exists_false",
            "test_idempotency_key_exists_true",
            "test_idempotency_key_response_none",
            "test_idempotency_key_response_object",
        ],
        Tests(&[
            "policies/rows::manual_idempotency",
            "policies/rows::manual_idempotency_with_an_optional_key",
        ]),
    ),
    // ---- which answers are stored
    row(
        MIDDLEWARES,
        &["test_store_on_statuses_does_not_store"],
        Tests(&["answers/recording::store_on_statuses"]),
    ),
    row(
        MIDDLEWARES,
        &["test_store_on_statuses_does_store"],
        Tests(&["answers/recording::store_on_statuses"]),
    ),
    row(
        UTILS,
        &["test_get_store_on_statuses_default"],
        Tests(&[
            "answers/recording::store_on_statuses",
            "settings/effects::store_on",
        ]),
    ),
    row(
        UTILS,
        &["test_get_store_on_statuses_not_specified"],
        // Every status from 200 to 599.
        Tests(&["answers/recording::status_stored"]),
    ),
    // ---- the key: header and encoder
    row(
        &[ENFORCE],
        &[
            "test_post_custom_header_pass",
            "test_post_custom_header_fail",
        ],
        Tests(&[
            "answers/keys::custom_header_name",
            "answers/keys::key_missing_required",
        ]),
    ),
    row(
        UTILS,
        &[
            "test_get_default_header_name",
            "test_get_custom_header_name_with_header",
        ],
        Tests(&[
            "answers/keys::custom_header_name",
            "answers/keys::key_missing_required",
            "settings/effects::header",
        ]),
    ),
    row(
        MIDDLEWARES,
        &["test_middleware_custom_encoder"],
        Tests(&["seed::an_encoder_of_ones_own_names_the_operation"]),
    ),
    row(
        ENCODER,
        &["test_basic_encoding"],
        // Another hash on purpose: ours knows where a field ends, and has the query in it.
        Tests(&["idempotency-core/tests/golden.rs::basic_key_encoder"]),
    ),
    row(
        ENCODER,
        &["test_basic_encoder_null_key"],
        NoMeaning(
            "an encoder is given a `Key`, which is parsed and can't be null; a missing one is 400 before",
        ),
    ),
    row(
        ENCODER,
        &["test_basic_encoder_uses_authorization_header"],
        Tests(&["answers/conflicts::same_key_other_authorization"]),
    ),
    // ---- where records are
    row(
        MIDDLEWARES,
        &["test_middleware_custom_storage"],
        Tests(&["seed::a_storage_that_keeps_nothing_lets_a_retry_run"]),
    ),
    row(
        MIDDLEWARES,
        &["test_middleware_cache_storage"],
        Tests(&["seed::a_storage_that_is_given_is_the_one_that_is_used"]),
    ),
    row(
        MIDDLEWARES,
        &["test_middleware_cache_storage_using_custom_cache_name_on_decorator"],
        Tests(&[
            "policies/caches::a_named_cache_protects",
            "policies/caches::records_lie_in_the_named_cache_alone",
            "policies/attributes::key_cache_name",
        ]),
    ),
    row(
        MIDDLEWARES,
        &["test_middleware_storage_cache_name_provides_default_name"],
        Tests(&[
            "policies/caches::records_lie_in_the_named_cache_alone",
            "settings/effects::storage_cache_name_is_what_handlers_may_call_the_default_cache",
        ]),
    ),
    row(
        VIEWSETS,
        &["test_middleware_invalid_cache_name"],
        Tests(&[
            "policies/caches::check_finds_an_unknown_name",
            "policies/caches::without_check_the_route_of_an_unknown_name_answers_500",
            "policies/attributes::key_unknown_cache_name",
        ]),
    ),
    row(
        STORAGE,
        &["test_memory_storage_store", "test_memory_storage_retrieve"],
        Tests(&[
            "policies/caches::records_lie_in_the_named_cache_alone",
            "policies/answers::an_operator_finds_and_removes_a_record",
            "idempotency-core/tests/memory_conformance.rs::records_come_back_unchanged",
        ]),
    ),
    row(
        STORAGE,
        &[
            "test_memory_storage_cache_name_not_present",
            "test_memory_storage_retrieve_no_key",
        ],
        Tests(&[
            "policies/caches::records_lie_in_the_named_cache_alone",
            "policies/answers::an_operator_finds_and_removes_a_record",
        ]),
    ),
    row(
        STORAGE,
        &[
            "test_cache_storage_store_default_cache",
            "test_cache_storage_store_named_cache",
        ],
        // The seed's bytes are a pickle, which runs code when it is read. Ours are checked before they are believed.
        Tests(&[
            "policies/caches::records_lie_in_the_named_cache_alone",
            "idempotency-core/src/record/codec.rs::samples_come_back",
            "idempotency-core/src/record/codec.rs::garbage_is_an_error",
        ]),
    ),
    row(
        STORAGE,
        &["test_cache_storage_validation_failure"],
        Tests(&[
            "policies/caches::check_finds_an_unknown_name",
            "policies/caches::without_check_the_route_of_an_unknown_name_answers_500",
        ]),
    ),
    // ---- locks
    row(
        &["test_storage_locking"],
        &["test_storage_when_locked_returns_423"],
        // There only the look-up is locked; here the key, until the answer is stored.
        Tests(&[
            "answers/conflicts::duplicate_while_the_first_runs",
            "answers/conflicts::duplicate_runs_when_the_first_is_not_stored",
        ]),
    ),
    row(
        LOCKS,
        &["test_single_thread_lock"],
        Tests(&[
            "answers/conflicts::duplicate_while_the_first_runs",
            "answers/conflicts::duplicate_runs_when_the_first_is_not_stored",
            "engine::a_released_key_is_free_at_once",
        ]),
    ),
    row(
        LOCKS,
        &[
            "test_multi_process_lock_only_host",
            "test_multi_process_lock_host_and_port",
        ],
        Tests(&[
            "redis/settings::a_lock_that_processes_share",
            "redis/connect::locations_of_one_server",
        ]),
    ),
    row(
        LOCKS,
        &[
            "test_multi_process_lock_empty_string_must_be_set",
            "test_multi_process_lock_null_must_be_set",
        ],
        Tests(&["settings/refusals::a_redis_lock_needs_a_location"]),
    ),
    row(
        UTILS,
        &["test_get_lock_class_default"],
        // Claims within the process.
        Tests(&[
            "answers/conflicts::duplicate_while_the_first_runs",
            "settings/effects::lock_class_storage_is_the_default",
        ]),
    ),
    row(
        UTILS,
        &[
            "test_get_lock_class_default_memory_storage",
            "test_get_lock_class_default_cache_storage",
        ],
        NoMeaning(
            "they load a storage's class by its path as if it were a lock; here both are typed values",
        ),
    ),
    row(
        UTILS,
        &["test_get_lock_timeout_default"],
        Tests(&[
            "answers/conflicts::duplicate_waits_for_a_tenth_of_a_second",
            "answers/conflicts::duplicate_gives_up_after_a_tenth_of_a_second",
        ]),
    ),
    row(
        UTILS,
        &["test_get_lock_timeout_default_with_lock"],
        Tests(&[
            "engine::a_duplicate_is_refused_when_its_time_is_over",
            "settings/effects::lock_timeout_is_how_long_a_duplicate_waits",
        ]),
    ),
    row(
        UTILS,
        &["test_get_lock_enable_default"],
        Tests(&[
            "answers/conflicts::duplicate_while_the_first_runs",
            "answers/conflicts::duplicate_runs_when_the_first_is_not_stored",
        ]),
    ),
    row(
        UTILS,
        &["test_get_lock_enable_default_with_lock"],
        Tests(&[
            "answers/conflicts::without_claims_a_duplicate_runs_and_a_retry_does_not",
            "settings/effects::lock_enable",
        ]),
    ),
    row(
        &[ENFORCE],
        &["test_no_locking_on_store"],
        Tests(&["answers/conflicts::without_claims_a_duplicate_runs_and_a_retry_does_not"]),
    ),
    row(
        UTILS,
        &[
            "test_get_lock_ttl_default",
            "test_get_lock_ttl_default_with_lock",
        ],
        // A lease that is renewed while the handler runs: 30 s by default, not 300.
        Tests(&[
            "seed::a_claim_of_a_dead_process_ends_with_its_lease",
            "settings/effects::lock_ttl_is_the_lease",
        ]),
    ),
    row(
        UTILS,
        &[
            "test_get_lock_name_default",
            "test_get_lock_name_default_with_lock",
        ],
        Tests(&[
            "redis/settings::a_lock_that_processes_share",
            "redis/settings::the_prefix_of_a_lock_has_a_default",
        ]),
    ),
    row(
        UTILS,
        &[
            "test_get_lock_location_default",
            "test_get_lock_location_only_host",
            "test_get_lock_location_host_and_port",
        ],
        // The seed's default is a Redis on localhost; here a Redis lock without a location is an error.
        Tests(&[
            "settings/refusals::a_location_has_a_form",
            "settings/refusals::a_redis_lock_needs_a_location",
        ]),
    ),
    // ---- other middleware
    row(
        &["test_django_debug_toolbar"],
        &["test_post", "test_post_2"],
        // The toolbar is Django's; what it stands for is a middleware that sees every request, before ours or after.
        Tests(&["seed::a_middleware_that_looks_on_may_stand_on_either_side"]),
    ),
];
