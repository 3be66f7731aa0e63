//! How long claims are waited for, live and may be held.

use std::time::Duration;

/// How claims behave: how long a duplicate waits, how long a claim outlives its holder, how long it may be held.
///
/// ```
/// use std::time::Duration;
/// use idempotency_core::LockPolicy;
///
/// let policy = LockPolicy::default()
///     .timeout(Duration::from_secs(5))
///     .ttl(Duration::from_secs(60));
/// assert!(policy.is_enabled());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct LockPolicy {
    enabled: bool,
    timeout: Duration,
    ttl: Duration,
    max_hold: Duration,
}

impl LockPolicy {
    /// The shortest lease that can be configured: a shorter one would end between two renewals.
    pub const MIN_TTL: Duration = Duration::from_millis(10);

    /// No claims: only completed records are looked up, so concurrent duplicates may run. A claim that someone else made is
    /// never overwritten.
    pub fn disabled() -> Self {
        Self {
            enabled: false,
            ..Self::default()
        }
    }

    /// How long a duplicate waits for the running original before it is refused. Default: 100 ms.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The lease: how long a claim outlives a holder that died. It is renewed while the operation runs, so this bounds not
    /// the operation, but how long a key stays blocked after a crash. Default: 30 s. At least [`MIN_TTL`](Self::MIN_TTL).
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl.max(Self::MIN_TTL);
        self
    }

    /// After how long a running operation is given up. Its key gets a tombstone, which stays for as long as the operation runs and for
    /// the TTL after that, so it never runs twice. Its place among [`Config::max_running`](crate::Config::max_running) is free, and the
    /// middleware drops it if its client is gone. Default: 10 min. At least [`MIN_TTL`](Self::MIN_TTL).
    pub fn max_hold(mut self, max_hold: Duration) -> Self {
        self.max_hold = max_hold.max(Self::MIN_TTL);
        self
    }

    /// Whether claims are made at all.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    pub(crate) fn wait_timeout(&self) -> Duration {
        self.timeout
    }

    pub(crate) fn lease(&self) -> Duration {
        self.ttl
    }

    pub(crate) fn longest_hold(&self) -> Duration {
        self.max_hold
    }
}

impl Default for LockPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            timeout: Duration::from_millis(100),
            ttl: Duration::from_secs(30),
            max_hold: Duration::from_secs(600),
        }
    }
}
