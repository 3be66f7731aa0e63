//! Redis as a storage, a lock and a cache: real servers, started by the tests.

#![allow(
    clippy::disallowed_methods,
    reason = "tests are outside of what `Env` drives"
)]

mod conformance;
