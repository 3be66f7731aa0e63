//! The simulated world: see `tests/README.md`.

use idempotency_tests::sim;

#[test]
fn nothing_contradicts_the_guarantees() {
    let explored = sim::explore(1, 1_000_000);
    assert!(
        explored.findings.is_empty(),
        "`tests/run --sim SEED` shows how it came about: {:#?}",
        explored.findings
    );
    assert_eq!(explored.missing(), [""; 0]);
}

#[test]
fn the_same_seed_is_the_same_world() {
    for seed in 0..20 {
        let (one, other) = (sim::run(seed, true), sim::run(seed, true));
        assert_eq!(one.trace, other.trace);
        assert_eq!(one.steps, other.steps);
    }
}
