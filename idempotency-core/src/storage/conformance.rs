//! What every storage must do, as tests: run them against yours.
//!
//! Each rule of [`Storage`] is a function here, or several, that panics where the rule is broken, with a message that says
//! what a client would suffer. A [`Harness`] tells the suite how to get at your storage, and
//! [`conformance_tests!`](crate::conformance_tests) makes a test of each rule. In a file of your crate's `tests` directory
//! (with `tokio` among the dev-dependencies, with its features `macros` and `rt-multi-thread`):
//!
//! ```
//! # #[cfg(feature = "memory")]
//! # mod tests {
//! use std::time::Duration;
//! use idempotency_core::{Env, MemoryStorage, SimulatedClock, storage::conformance::Harness};
//!
//! struct Memory {
//!     env: Env,
//!     clock: SimulatedClock,
//! }
//!
//! impl Memory {
//!     fn new() -> Self {
//!         let (env, clock) = Env::simulated(1);
//!         Self { env, clock }
//!     }
//! }
//!
//! impl Harness for Memory {
//!     type Storage = MemoryStorage;
//!
//!     async fn storage(&self) -> MemoryStorage {
//!         MemoryStorage::builder().env(self.env.clone()).build()
//!     }
//!
//!     async fn advance(&self, by: Duration) {
//!         self.clock.advance(by); // A database's clock can't be moved: sleep here.
//!     }
//! }
//!
//! idempotency_core::conformance_tests!(Memory::new());
//! # }
//! ```
//!
//! A storage that can't keep a rule, and says so in its docs, leaves it out:
//! `conformance_tests!(Memory::new(), except: [release_wakes_waiters])`.
//!
//! Rules are independent of each other, use fresh random keys, and may run at the same time on one backend. Outside tests,
//! run them by hand: each is a plain async fn, and [`check`] runs one by its name out of [`RULES`]. They spawn tasks, so they
//! need a tokio runtime; one with several threads lets calls really race.

use std::{future::Future, time::Duration};

use crate::{EncodedKey, Storage};

mod claims;
mod harness;
mod records;
mod waiting;

pub use self::{claims::*, records::*, waiting::*};

/// Gives the suite access to a storage.
pub trait Harness: Send + Sync {
    /// The storage under test.
    type Storage: Storage;

    /// A handle to the storage. All handles of a harness share a clock, and may share claims and records.
    fn storage(&self) -> impl Future<Output = Self::Storage> + Send;

    /// Lets `by` pass on the storage's clock: moves it where that is possible, or sleeps.
    ///
    /// It may take longer, but by less than one [`unit`](Self::unit): some rules look shortly before a lease or TTL ends.
    fn advance(&self, by: Duration) -> impl Future<Output = ()> + Send;

    /// Leases, TTLs and timeouts of the suite are multiples of this. Default: 50 ms.
    ///
    /// A storage that counts in whole seconds needs a second here; one on a slow machine, or behind a slow network, more than
    /// a call takes.
    fn unit(&self) -> Duration {
        Duration::from_millis(50)
    }

    /// Wall-clock limit for what should happen at once.
    /// Default: 30 s.
    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }

    /// Stores bytes under `key` that are no record, as a newer version or another program might. Returns `false`, the default, if
    /// the storage can't hold such bytes; [`unreadable_is_an_error`] then has nothing to check.
    fn corrupt(
        &self,
        storage: &Self::Storage,
        key: &EncodedKey,
    ) -> impl Future<Output = bool> + Send {
        let _ = (storage, key);
        async { false }
    }
}

/// Passes the names of all rules to a macro: the one list of them.
#[doc(hidden)]
#[macro_export]
macro_rules! __conformance_rules {
    ($pass_to:ident) => {
        $pass_to! {
            begin_is_exclusive,
            begin_is_idempotent_by_token,
            begin_tells_of_the_running_claim,
            keys_are_independent,
            lease_expires_and_not_before,
            renew_extends,
            renew_by_a_stranger_is_lost,
            renew_without_a_claim_is_lost,
            release_frees_the_key,
            release_by_a_stranger_is_lost,
            release_without_a_claim_is_lost,
            a_lost_claim_changes_nothing,
            complete_is_exclusive,
            complete_is_idempotent_by_token,
            complete_keeps_the_first_record,
            complete_repeated_restarts_the_ttl,
            complete_when_absent,
            complete_after_expiry_if_untaken,
            complete_lost_to_a_new_holder,
            complete_lost_to_a_record,
            completed_for_every_token,
            ttl_expires_and_not_before,
            replace_changes_a_record,
            replace_leaves_claims_and_free_keys,
            replace_restarts_the_ttl,
            remove_takes_records_and_claims,
            get_changes_nothing,
            records_come_back_unchanged,
            unreadable_is_an_error,
            dropped_calls_are_safe,
            wait_returns_at_once_without_a_claim,
            wait_times_out,
            wait_sees_completion,
            wait_sees_release,
            wait_sees_removal,
            wait_sees_the_lease_end,
            wait_outlasts_renewals,
            wait_misses_nothing,
            release_wakes_waiters,
            cancelled_waiter_passes_its_wake_on,
        }
    };
}

macro_rules! by_name {
    ($($rule:ident),+ $(,)?) => {
        /// The names of all rules.
        pub const RULES: &[&str] = &[$(stringify!($rule)),+];

        /// Runs the rule of this name.
        ///
        /// # Panics
        ///
        /// If the storage breaks the rule, or there is none of this name.
        pub async fn check<H: Harness>(rule: &str, harness: &H) {
            match rule {
                $(stringify!($rule) => $rule(harness).await,)+
                _ => panic!("no rule is named {rule:?}; `RULES` has all names"),
            }
        }
    };
}
__conformance_rules!(by_name);

/// Makes a `#[tokio::test]` of every rule of [`storage::conformance`](crate::storage::conformance).
///
/// The first argument is an expression that makes a [`Harness`](crate::storage::conformance::Harness); it is evaluated in each
/// test, and may `await`. `except: [..]` leaves out rules by name. To test several storages in one file, put each into a module.
/// The crate needs `tokio` with its features `macros` and `rt-multi-thread`.
///
/// See [`storage::conformance`](crate::storage::conformance) for an example.
#[macro_export]
macro_rules! conformance_tests {
    ($harness:expr $(,)?) => {
        $crate::conformance_tests!($harness, except: []);
    };
    ($harness:expr, except: [$($except:ident),* $(,)?] $(,)?) => {
        $crate::conformance_tests!(@tests ($) $harness, [$($except),*]);
    };
    (@tests ($dollar:tt) $harness:expr, [$($except:ident),*]) => {
        // A misspelt exemption does not compile.
        $(#[allow(unused_imports)]
        use $crate::storage::conformance::$except as _;)*

        #[allow(unused_macros, unused_macro_rules)]
        macro_rules! __idempotency_conformance_test {
            $((@one $except) => {};)*
            (@one $dollar rule:ident) => {
                #[::tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $dollar rule() {
                    let harness = $harness;
                    $crate::storage::conformance::$dollar rule(&harness).await;
                }
            };
            ($dollar ($dollar rule:ident),+ $dollar (,)?) => {
                $dollar (__idempotency_conformance_test! { @one $dollar rule })+
            };
        }
        $crate::__conformance_rules!(__idempotency_conformance_test);
    };
}
