//! What the attributes refuse, one mistake in each file of `fail`.
//!
//! Here and not among the suites that cross the crates, because for such tests all dependencies of the package are built once more.

#[test]
fn what_is_refused_names_its_cure() {
    trybuild::TestCases::new().compile_fail("tests/fail/*.rs");
}
