//! `LockedStorage` and `NearCache` keep the rules, except where their docs say so.

#![cfg(all(feature = "memory", feature = "conformance"))]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use idempotency_core::{
    AnyStorage, Begin, Cache, EncodedKey, Entry, Env, Held, Lock, LockedStorage, MemoryStorage,
    MokaCache, NearCache, NewClaim, ProcessLock, Record, SimulatedClock, Storage, StorageError,
    Token, storage::conformance::Harness,
};

/// A storage by a clock that is moved, and what puts bytes into it that are no record.
struct Simulated<S> {
    make: fn(&Env) -> S,
    corrupt: fn(&S) -> Option<&MokaCache>,
    env: Env,
    clock: SimulatedClock,
}

impl<S> Simulated<S> {
    fn new(make: fn(&Env) -> S) -> Self {
        let (env, clock) = Env::simulated(1);
        Self {
            make,
            corrupt: |_| None,
            env,
            clock,
        }
    }
}

impl<S: Storage> Harness for Simulated<S> {
    type Storage = S;

    async fn storage(&self) -> S {
        (self.make)(&self.env)
    }

    async fn advance(&self, by: Duration) {
        self.clock.advance(by);
    }

    async fn corrupt(&self, storage: &S, key: &EncodedKey) -> bool {
        let Some(cache) = (self.corrupt)(storage) else {
            return false;
        };
        let hour = Duration::from_secs(3600);
        let bytes = Bytes::from_static(b"\x80\x05\x95 of another program, and long enough");
        cache.set(key, bytes, hour).await.unwrap();
        true
    }
}

fn moka(env: &Env) -> MokaCache {
    MokaCache::new().env(env.clone())
}

fn process_lock(env: &Env) -> ProcessLock {
    ProcessLock::new().env(env.clone())
}

fn memory(env: &Env) -> MemoryStorage {
    MemoryStorage::builder().env(env.clone()).build()
}

mod locked {
    use super::*;

    fn harness() -> Simulated<LockedStorage<MokaCache, ProcessLock>> {
        Simulated {
            corrupt: |storage| Some(storage.cache()),
            ..Simulated::new(|env| {
                LockedStorage::new(moka(env), process_lock(env)).env(env.clone())
            })
        }
    }

    idempotency_core::conformance_tests!(harness());
}

/// On tokio's clock, and as users hold it.
mod locked_in_real_time {
    use super::*;

    struct RealTime;

    impl Harness for RealTime {
        type Storage = AnyStorage;

        async fn storage(&self) -> AnyStorage {
            AnyStorage::new(LockedStorage::new(
                Arc::new(MokaCache::new()),
                Arc::new(ProcessLock::new()),
            ))
        }

        async fn advance(&self, by: Duration) {
            Env::system().sleep(by).await;
        }

        /// No rule may lose five of them, however busy the machine is.
        fn unit(&self) -> Duration {
            Duration::from_millis(200)
        }
    }

    idempotency_core::conformance_tests!(RealTime);
}

/// Three functions and three functions of a user's, that take some time to begin with.
mod locked_of_a_users {
    use super::*;

    async fn some_time() {
        tokio::task::yield_now().await;
    }

    struct Values {
        map: Mutex<HashMap<EncodedKey, (Duration, Bytes)>>,
        env: Env,
    }

    impl Cache for Values {
        async fn get(&self, key: &EncodedKey) -> Result<Option<Bytes>, StorageError> {
            some_time().await;
            let map = self.map.lock().unwrap();
            let value = map.get(key).filter(|(end, _)| *end > self.env.now());
            Ok(value.map(|(_, value)| value.clone()))
        }

        async fn set(
            &self,
            key: &EncodedKey,
            value: Bytes,
            ttl: Duration,
        ) -> Result<(), StorageError> {
            some_time().await;
            let end = self.env.now().saturating_add(ttl);
            self.map.lock().unwrap().insert(*key, (end, value));
            Ok(())
        }

        async fn remove(&self, key: &EncodedKey) -> Result<(), StorageError> {
            some_time().await;
            self.map.lock().unwrap().remove(key);
            Ok(())
        }
    }

    /// Without a `wait` of its own.
    struct Locks(ProcessLock);

    impl Lock for Locks {
        async fn acquire(
            &self,
            key: &EncodedKey,
            ttl: Duration,
        ) -> Result<Option<Token>, StorageError> {
            some_time().await;
            self.0.acquire(key, ttl).await
        }

        async fn renew(
            &self,
            key: &EncodedKey,
            token: Token,
            ttl: Duration,
        ) -> Result<Held, StorageError> {
            some_time().await;
            self.0.renew(key, token, ttl).await
        }

        async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
            some_time().await;
            self.0.release(key, token).await
        }
    }

    fn storage(env: &Env) -> LockedStorage<Values, Locks> {
        let map = Mutex::default();
        let env = env.clone();
        let locks = Locks(process_lock(&env));
        let clock = env.clone();
        LockedStorage::new(Values { map, env }, locks).env(clock)
    }

    idempotency_core::conformance_tests!(Simulated::new(storage));
}

/// One cache and one lock that two processes share: a claim is in one of them, and who looks may be in the other.
mod locked_in_two_processes {
    use super::*;

    type Process = LockedStorage<MokaCache, ProcessLock>;

    struct Two([Process; 2]);

    impl Two {
        fn new(env: &Env) -> Self {
            let (cache, lock) = (moka(env), process_lock(env));
            let process = || LockedStorage::new(cache.clone(), lock.clone()).env(env.clone());
            Self([process(), process()])
        }

        /// Of each claim the one that made it.
        fn of(&self, token: Token) -> &Process {
            &self.0[usize::from(token.as_bytes()[0] % 2)]
        }

        fn any(&self) -> &Process {
            let mut byte = [0];
            Env::system().fill_random(&mut byte);
            &self.0[usize::from(byte[0] % 2)]
        }
    }

    impl Storage for Two {
        async fn begin(&self, key: &EncodedKey, claim: &NewClaim) -> Result<Begin, StorageError> {
            self.of(claim.token).begin(key, claim).await
        }

        async fn complete(
            &self,
            key: &EncodedKey,
            token: Token,
            record: &Record,
            ttl: Duration,
        ) -> Result<Held, StorageError> {
            self.of(token).complete(key, token, record, ttl).await
        }

        async fn renew(
            &self,
            key: &EncodedKey,
            token: Token,
            lease: Duration,
        ) -> Result<Held, StorageError> {
            self.of(token).renew(key, token, lease).await
        }

        async fn release(&self, key: &EncodedKey, token: Token) -> Result<Held, StorageError> {
            self.of(token).release(key, token).await
        }

        async fn get(&self, key: &EncodedKey) -> Result<Option<Entry>, StorageError> {
            self.any().get(key).await
        }

        async fn replace(
            &self,
            key: &EncodedKey,
            record: &Record,
            ttl: Duration,
        ) -> Result<(), StorageError> {
            self.any().replace(key, record, ttl).await
        }

        async fn remove(&self, key: &EncodedKey) -> Result<bool, StorageError> {
            self.any().remove(key).await
        }

        async fn wait(&self, key: &EncodedKey, timeout: Duration) -> Result<(), StorageError> {
            self.any().wait(key, timeout).await
        }
    }

    // Those that look at a claim of another process, or remove one. `LockedStorage` says so.
    idempotency_core::conformance_tests!(Simulated::new(Two::new), except: [
        begin_tells_of_the_running_claim,
        complete_when_absent,
        dropped_calls_are_safe,
        get_changes_nothing,
        keys_are_independent,
        remove_takes_records_and_claims,
        wait_sees_removal,
    ]);
}

/// With a near TTL that is over before any rule looks again, so that every rule meets it and none has to be excepted.
mod near {
    use super::*;

    fn storage(env: &Env) -> NearCache<MemoryStorage> {
        let unit = Duration::from_millis(50);
        NearCache::new(memory(env)).ttl(unit).env(env.clone())
    }

    idempotency_core::conformance_tests!(Simulated::new(storage));
}

mod near_for_60_seconds {
    use super::*;

    fn storage(env: &Env) -> NearCache<MemoryStorage> {
        NearCache::new(memory(env)).env(env.clone())
    }

    // A record that is found may be answered for the near TTL after its own is over. `NearCache` says so.
    idempotency_core::conformance_tests!(Simulated::new(storage), except: [
        replace_restarts_the_ttl,
    ]);
}
