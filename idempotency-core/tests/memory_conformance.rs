//! `MemoryStorage` keeps the rules, and the suite notices when a storage doesn't.

#![cfg(all(feature = "memory", feature = "conformance"))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{HashSet, VecDeque},
    future::pending,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::FutureExt as _;
use http::HeaderMap;
use idempotency_core::{
    AnyStorage, Begin, EncodedKey, Entry, Env, Held, MemoryStorage, NewClaim, Outcome, Record,
    SimulatedClock, Storage, StorageError, StoredResponse, Token, WhenFull,
    storage::conformance::{self, Harness},
};
use tokio::sync::oneshot;

struct Memory {
    env: Env,
    clock: SimulatedClock,
    when_full: WhenFull,
}

impl Memory {
    fn new(when_full: WhenFull) -> Self {
        let (env, clock) = Env::simulated(1);
        Self {
            env,
            clock,
            when_full,
        }
    }
}

impl Harness for Memory {
    type Storage = MemoryStorage;

    async fn storage(&self) -> MemoryStorage {
        MemoryStorage::builder()
            .env(self.env.clone())
            .when_full(self.when_full)
            .build()
    }

    async fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }
}

mod evicting {
    use super::*;

    idempotency_core::conformance_tests!(Memory::new(WhenFull::Evict));
}

mod refusing {
    use super::*;

    idempotency_core::conformance_tests!(Memory::new(WhenFull::Refuse));
}

/// As users hold it.
mod erased {
    use super::*;

    struct Erased(Memory);

    impl Harness for Erased {
        type Storage = AnyStorage;

        async fn storage(&self) -> AnyStorage {
            AnyStorage::new(Arc::new(self.0.storage().await))
        }

        async fn advance(&self, by: Duration) {
            self.0.advance(by).await;
        }
    }

    idempotency_core::conformance_tests!(Erased(Memory::new(WhenFull::Evict)));
}

/// On tokio's clock, and with real waiting.
mod real_time {
    use super::*;

    struct RealTime;

    impl Harness for RealTime {
        type Storage = MemoryStorage;

        async fn storage(&self) -> MemoryStorage {
            MemoryStorage::new()
        }

        async fn advance(&self, by: Duration) {
            Env::system().sleep(by).await;
        }

        /// No rule may lose five of them, however busy the machine is.
        fn unit(&self) -> Duration {
            Duration::from_millis(200)
        }
    }

    idempotency_core::conformance_tests!(RealTime, except: [records_come_back_unchanged]);

    /// Shares its name with the exempted rule: it would not compile if that had become a test.
    #[test]
    fn records_come_back_unchanged() {}
}

/// tokio's default for tests. The suite must not need a second thread.
#[tokio::test]
async fn all_rules_on_one_thread() {
    for rule in conformance::RULES {
        conformance::check(rule, &Memory::new(WhenFull::Evict)).await;
    }
}

/// A rule, and a mistake that it is there to find.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    BeginForgetsTokens,
    BeginLetsAllIn,
    ClaimsLoseFingerprints,
    CompleteNeedsAClaim,
    CompleteOverwrites,
    CompleteInTwoSteps,
    CompleteKeepsTheFirstTtl,
    GetEndsClaims,
    KeysCollide,
    LeaseTooLong,
    LeaseTooShort,
    RecordsLoseHeaders,
    ReleaseByAnyone,
    RemoveLeavesClaims,
    RenewClaims,
    RenewDoesNothing,
    ReplaceCompletes,
    ReplaceDoesNothing,
    ReplaceInTwoSteps,
    TtlTooLong,
    TtlTooShort,
    UnreadableIsAbsent,
    WaitDoesNot,
    WaitForgetsTheLease,
    WaitHandsOutTickets,
    WaitSleeps,
}

const FOUND: &[(Fault, &[&str])] = &[
    (
        Fault::BeginForgetsTokens,
        &["begin_is_idempotent_by_token", "dropped_calls_are_safe"],
    ),
    (
        Fault::BeginLetsAllIn,
        &[
            "begin_is_exclusive",
            "begin_tells_of_the_running_claim",
            "a_lost_claim_changes_nothing",
        ],
    ),
    (
        Fault::ClaimsLoseFingerprints,
        &["begin_tells_of_the_running_claim"],
    ),
    (
        Fault::CompleteNeedsAClaim,
        &[
            "complete_when_absent",
            "complete_after_expiry_if_untaken",
            "complete_is_idempotent_by_token",
            "complete_is_exclusive",
        ],
    ),
    (
        Fault::CompleteOverwrites,
        &[
            "complete_is_exclusive",
            "complete_keeps_the_first_record",
            "complete_lost_to_a_record",
            "complete_lost_to_a_new_holder",
        ],
    ),
    (Fault::CompleteInTwoSteps, &["dropped_calls_are_safe"]),
    (
        Fault::CompleteKeepsTheFirstTtl,
        &["complete_repeated_restarts_the_ttl"],
    ),
    (Fault::GetEndsClaims, &["get_changes_nothing"]),
    (Fault::KeysCollide, &["keys_are_independent"]),
    (
        Fault::LeaseTooLong,
        &[
            "lease_expires_and_not_before",
            "renew_extends",
            "wait_sees_the_lease_end",
        ],
    ),
    (
        Fault::LeaseTooShort,
        &["lease_expires_and_not_before", "renew_extends"],
    ),
    (Fault::RecordsLoseHeaders, &["records_come_back_unchanged"]),
    (
        Fault::ReleaseByAnyone,
        &[
            "release_by_a_stranger_is_lost",
            "release_without_a_claim_is_lost",
            "a_lost_claim_changes_nothing",
        ],
    ),
    (
        Fault::RemoveLeavesClaims,
        &["remove_takes_records_and_claims", "wait_sees_removal"],
    ),
    (
        Fault::RenewClaims,
        &[
            "renew_by_a_stranger_is_lost",
            "renew_without_a_claim_is_lost",
        ],
    ),
    (
        Fault::RenewDoesNothing,
        &["renew_extends", "wait_outlasts_renewals"],
    ),
    (
        Fault::ReplaceCompletes,
        &["replace_leaves_claims_and_free_keys"],
    ),
    (
        Fault::ReplaceDoesNothing,
        &["replace_changes_a_record", "replace_restarts_the_ttl"],
    ),
    (Fault::ReplaceInTwoSteps, &["dropped_calls_are_safe"]),
    (
        Fault::TtlTooLong,
        &["ttl_expires_and_not_before", "replace_restarts_the_ttl"],
    ),
    (
        Fault::TtlTooShort,
        &["ttl_expires_and_not_before", "replace_restarts_the_ttl"],
    ),
    (Fault::UnreadableIsAbsent, &["unreadable_is_an_error"]),
    (
        Fault::WaitDoesNot,
        &[
            "wait_times_out",
            "wait_sees_completion",
            "wait_sees_release",
            "wait_sees_removal",
        ],
    ),
    (Fault::WaitForgetsTheLease, &["wait_sees_the_lease_end"]),
    (
        Fault::WaitHandsOutTickets,
        &["cancelled_waiter_passes_its_wake_on"],
    ),
    (
        Fault::WaitSleeps,
        &[
            "wait_sees_completion",
            "wait_sees_release",
            "wait_sees_removal",
            "wait_misses_nothing",
            "release_wakes_waiters",
        ],
    ),
];

#[tokio::test]
async fn every_fault_is_found() {
    for (fault, rules) in FOUND {
        for rule in *rules {
            let harness = FaultyHarness::new(*fault);
            let verdict = AssertUnwindSafe(conformance::check(rule, &harness))
                .catch_unwind()
                .await;
            assert!(verdict.is_err(), "{rule} does not find {fault:?}");
        }
    }
}

/// Otherwise the test above might find nothing but the wrapper.
#[tokio::test]
async fn without_a_fault_all_rules_are_kept() {
    for rule in conformance::RULES {
        conformance::check(rule, &FaultyHarness::new(Fault::None)).await;
    }
}

struct FaultyHarness {
    memory: Memory,
    fault: Fault,
}

impl FaultyHarness {
    fn new(fault: Fault) -> Self {
        Self {
            memory: Memory::new(WhenFull::Evict),
            fault,
        }
    }
}

impl Harness for FaultyHarness {
    type Storage = Faulty;

    async fn storage(&self) -> Faulty {
        Faulty {
            memory: self.memory.storage().await,
            env: self.memory.env.clone(),
            fault: self.fault,
            corrupt: Mutex::default(),
            tickets: Mutex::default(),
        }
    }

    async fn advance(&self, by: Duration) {
        self.memory.advance(by).await;
    }

    fn patience(&self) -> Duration {
        if self.fault == Fault::None {
            Duration::from_secs(30)
        } else {
            Duration::from_millis(100)
        }
    }

    async fn corrupt(&self, storage: &Faulty, key: &EncodedKey) -> bool {
        storage.corrupt.lock().unwrap().insert(*key)
    }
}

struct Faulty {
    memory: MemoryStorage,
    env: Env,
    fault: Fault,
    corrupt: Mutex<HashSet<EncodedKey>>,
    tickets: Mutex<VecDeque<oneshot::Sender<()>>>,
}

impl Faulty {
    fn readable(&self, key: &EncodedKey) -> Result<(), StorageError> {
        if self.corrupt.lock().unwrap().contains(key) && self.fault != Fault::UnreadableIsAbsent {
            return Err(StorageError::unreadable("not a record"));
        }
        Ok(())
    }

    fn key(&self, key: &EncodedKey) -> EncodedKey {
        let mut bytes = *key.as_bytes();
        if self.fault == Fault::KeysCollide {
            bytes[31] = 0;
        }
        EncodedKey::from_bytes(bytes)
    }

    fn lease(&self, lease: Duration) -> Duration {
        match self.fault {
            Fault::LeaseTooLong => lease * 10,
            Fault::LeaseTooShort => lease / 4,
            _ => lease,
        }
    }

    fn ttl(&self, ttl: Duration) -> Duration {
        match self.fault {
            Fault::TtlTooLong => ttl * 10,
            Fault::TtlTooShort => ttl / 4,
            _ => ttl,
        }
    }
}

impl Storage for Faulty {
    async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
        self.readable(key)?;
        let mut claim = claim.clone();
        claim.lease = self.lease(claim.lease);
        if self.fault == Fault::BeginForgetsTokens {
            claim.token = Token::random();
        }
        if self.fault == Fault::ClaimsLoseFingerprints {
            claim.fingerprint = None;
        }
        if self.corrupt.lock().unwrap().contains(key) {
            return Ok(Begin::Acquired);
        }
        let begin = self.memory.begin(&self.key(key), &claim).await?;
        if self.fault == Fault::BeginLetsAllIn && matches!(begin, Begin::InFlight { .. }) {
            return Ok(Begin::Acquired);
        }
        Ok(begin)
    }

    async fn complete(
        &self,
        key: &EncodedKey,
        token: Token,
        record: &Record,
        ttl: Duration,
    ) -> Result<Held, StorageError> {
        self.readable(key)?;
        let mut record = record.clone();
        match self.fault {
            Fault::CompleteNeedsAClaim => {
                let Some(Entry::Claimed { .. }) = self.memory.get(key).await? else {
                    return Ok(Held::Lost);
                };
            }
            Fault::CompleteOverwrites => {
                self.memory.remove(key).await?;
            }
            Fault::CompleteKeepsTheFirstTtl => {
                if let Some(Entry::Completed(_)) = self.memory.get(key).await? {
                    return Ok(Held::Yes);
                }
            }
            Fault::CompleteInTwoSteps => {
                let _ = self.memory.release(key, token).await?;
                tokio::task::yield_now().await;
            }
            Fault::RecordsLoseHeaders => {
                if let Outcome::Response(response) = &mut record.outcome {
                    *response = StoredResponse::new(
                        response.status(),
                        &HeaderMap::new(),
                        response.body().clone(),
                    );
                }
            }
            _ => {}
        }
        self.memory
            .complete(&self.key(key), token, &record, self.ttl(ttl))
            .await
    }

    async fn renew(
        &self,
        key: &EncodedKey,
        token: Token,
        lease: Duration,
    ) -> Result<Held, StorageError> {
        match self.fault {
            Fault::RenewClaims => {
                self.memory.remove(key).await?;
                let claim = NewClaim {
                    token,
                    fingerprint: None,
                    lease,
                };
                let _ = self.memory.begin(key, &claim).await?;
                Ok(Held::Yes)
            }
            Fault::RenewDoesNothing => Ok(Held::Yes),
            _ => {
                self.memory
                    .renew(&self.key(key), token, self.lease(lease))
                    .await
            }
        }
    }

    async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
        self.readable(key)?;
        let held = if self.fault == Fault::ReleaseByAnyone && self.memory.remove(key).await? {
            Held::Yes
        } else {
            self.memory.release(&self.key(key), token).await?
        };
        if let Some(ticket) = self.tickets.lock().unwrap().pop_front() {
            let _ = ticket.send(());
        }
        Ok(held)
    }

    async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
        self.readable(key)?;
        let entry = self.memory.get(&self.key(key)).await?;
        if self.fault == Fault::GetEndsClaims && matches!(entry, Some(Entry::Claimed { .. })) {
            self.memory.remove(key).await?;
        }
        Ok(entry)
    }

    async fn replace(
        &self,
        key: &EncodedKey,
        record: &Record,
        ttl: Duration,
    ) -> Result<(), StorageError> {
        match self.fault {
            Fault::ReplaceCompletes => {
                let held = self
                    .memory
                    .complete(key, Token::random(), record, ttl)
                    .await?;
                if held == Held::Yes {
                    return Ok(());
                }
            }
            Fault::ReplaceDoesNothing => return Ok(()),
            Fault::ReplaceInTwoSteps => {
                self.memory.remove(key).await?;
                tokio::task::yield_now().await;
                let token = Token::random();
                let _ = self.memory.complete(key, token, record, ttl).await?;
            }
            _ => {}
        }
        self.memory
            .replace(&self.key(key), record, self.ttl(ttl))
            .await
    }

    async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
        self.corrupt.lock().unwrap().remove(key);
        if self.fault == Fault::RemoveLeavesClaims
            && let Some(Entry::Claimed { .. }) = self.memory.get(key).await?
        {
            return Ok(false);
        }
        self.memory.remove(&self.key(key)).await
    }

    async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
        match self.fault {
            Fault::WaitDoesNot => Ok(()),
            Fault::WaitSleeps => {
                if let Some(Entry::Claimed { .. }) = self.memory.get(key).await? {
                    self.env.sleep(timeout).await;
                }
                Ok(())
            }
            Fault::WaitForgetsTheLease => match self.memory.get(key).await? {
                Some(Entry::Claimed { .. }) => pending().await,
                _ => Ok(()),
            },
            Fault::WaitHandsOutTickets => {
                let (ticket, called) = oneshot::channel();
                self.tickets.lock().unwrap().push_back(ticket);
                let _ = called.await;
                Ok(())
            }
            _ => self.memory.wait(&self.key(key), timeout).await,
        }
    }
}
