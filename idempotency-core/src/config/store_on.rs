//! Which answers are recorded.

use std::{fmt, ops::RangeInclusive, sync::Arc};

use http::StatusCode;

use super::user_fn::UserFn;

/// Which answers are recorded and replayed, by status. Any other answer releases the key, and a retry runs again.
///
/// Whatever the status, the middleware never records a 101, the 500 of an extractor or handler that is not protected, an answer with `DoNotRecord`, and a 405 or an unrouted 404 of the router.
/// An answer that can't be recorded in full (too large, an event stream) leaves a tombstone.
///
/// ```
/// use http::StatusCode;
/// use idempotency_core::StoreOn;
///
/// assert!(StoreOn::success().stores(StatusCode::CREATED));
/// assert!(!StoreOn::success().stores(StatusCode::SEE_OTHER));
/// assert!(StoreOn::below(400).stores(StatusCode::SEE_OTHER));
/// assert!(!StoreOn::all().except([StatusCode::TOO_MANY_REQUESTS]).stores(StatusCode::TOO_MANY_REQUESTS));
/// ```
#[derive(Clone, PartialEq)]
#[must_use]
pub struct StoreOn {
    statuses: Statuses,
    except: Vec<StatusCode>,
    rejections: bool,
}

#[derive(Clone, PartialEq)]
enum Statuses {
    Ranges(Vec<RangeInclusive<u16>>),
    Fn(UserFn<dyn Fn(StatusCode) -> bool + Send + Sync>),
}

impl StoreOn {
    /// 200 to 207: the default.
    pub fn success() -> Self {
        Self::ranges([200..=207])
    }

    /// Only `statuses`.
    pub fn statuses(statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        let codes = statuses.into_iter().map(|status| status.as_u16());
        Self::ranges(codes.map(|code| code..=code))
    }

    /// Every status below `limit`: `below(500)` is every answer that is not a server error.
    pub fn below(limit: u16) -> Self {
        Self::ranges([0..=limit.saturating_sub(1)])
    }

    /// Every status. An error is then replayed until its TTL is over.
    pub fn all() -> Self {
        Self::ranges([100..=999])
    }

    /// Every status for which `stores` returns true.
    pub fn from_fn(stores: impl Fn(StatusCode) -> bool + Send + Sync + 'static) -> Self {
        Self::new(Statuses::Fn(UserFn(Arc::new(stores))))
    }

    /// All of these except `statuses`.
    pub fn except(mut self, statuses: impl IntoIterator<Item = StatusCode>) -> Self {
        self.except.extend(statuses);
        self
    }

    /// Does not record the answer of an extractor that rejects the request: the handler did not run, so a corrected request may use
    /// the key again. Only handlers with our attribute tell; any other handler counts as entered.
    pub fn except_rejections(mut self) -> Self {
        self.rejections = false;
        self
    }

    /// Whether an answer of this status is recorded.
    #[must_use]
    pub fn stores(&self, status: StatusCode) -> bool {
        let listed = match &self.statuses {
            Statuses::Ranges(ranges) => ranges.iter().any(|range| range.contains(&status.as_u16())),
            Statuses::Fn(UserFn(stores)) => stores(status),
        };
        listed && !self.except.contains(&status)
    }

    /// Whether the answer of an extractor that rejects the request is recorded like any other.
    #[must_use]
    pub fn stores_rejections(&self) -> bool {
        self.rejections
    }

    pub(crate) fn ranges(ranges: impl IntoIterator<Item = RangeInclusive<u16>>) -> Self {
        Self::new(Statuses::Ranges(ranges.into_iter().collect()))
    }

    fn new(statuses: Statuses) -> Self {
        Self {
            statuses,
            except: Vec::new(),
            rejections: true,
        }
    }
}

impl Default for StoreOn {
    fn default() -> Self {
        Self::success()
    }
}

impl fmt::Debug for StoreOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.statuses {
            Statuses::Ranges(ranges) => ranges.fmt(f)?,
            Statuses::Fn(_) => f.write_str("fn")?,
        }
        if !self.except.is_empty() {
            write!(f, " except {:?}", self.except)?;
        }
        if !self.rejections {
            f.write_str(" except rejections")?;
        }
        Ok(())
    }
}
