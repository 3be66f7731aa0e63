//! How long a claim is held and how long a duplicate waits for it.

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
    wait_timeout: Duration,
    lease: Duration,
    hold_limit: Duration,
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
        self.wait_timeout = timeout;
        self
    }

    /// The lease: how long a claim outlives a holder that died. It is renewed while the operation runs, so this bounds not
    /// the operation, but how long a key stays blocked after a crash. Default: 30 s. At least [`MIN_TTL`](Self::MIN_TTL).
    pub fn ttl(mut self, lease: Duration) -> Self {
        self.lease = lease.max(Self::MIN_TTL);
        self
    }

    /// After how long a running operation is given up: its key gets a tombstone, so it is never run again. Default: 10 min.
    pub fn max_hold(mut self, limit: Duration) -> Self {
        self.hold_limit = limit;
        self
    }

    /// Whether claims are made at all.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    pub(crate) fn wait_timeout(&self) -> Duration {
        self.wait_timeout
    }

    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }

    pub(crate) fn hold_limit(&self) -> Duration {
        self.hold_limit
    }
}

impl Default for LockPolicy {
    fn default() -> Self {
        Self {
            enabled: true,
            wait_timeout: Duration::from_millis(100),
            lease: Duration::from_secs(30),
            hold_limit: Duration::from_secs(600),
        }
    }
}
