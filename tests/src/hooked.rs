//! A storage whose calls do something more, or something else.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use idempotency_axum::{
    Begin, EncodedKey, Entry, Held, NewClaim, Operation, Record, Storage, StorageError, Token,
};

/// A storage with a hook around each of its calls.
#[derive(Clone, Debug)]
pub struct Hooked<S, H> {
    inner: S,
    hook: H,
}

impl<S: Storage, H: Hook> Hooked<S, H> {
    /// `inner` with `hook` around its calls.
    pub fn around(inner: S, hook: H) -> Self {
        Self { inner, hook }
    }

    /// The hook.
    pub fn hook(&self) -> &H {
        &self.hook
    }
}

/// What is done around the calls of a storage.
pub trait Hook: Send + Sync + 'static {
    /// Takes the place of a call. `work` is what the storage itself does.
    fn around<T: Send>(
        &self,
        call: StorageCall<'_>,
        work: impl Future<Output = Result<T, StorageError>> + Send,
    ) -> impl Future<Output = Result<T, StorageError>> + Send;
}

/// A call of a storage.
#[derive(Clone, Copy, Debug)]
pub struct StorageCall<'a> {
    /// Which one.
    pub operation: Operation,
    /// The key it is for.
    pub key: &'a EncodedKey,
    /// The record that it is to store.
    pub record: Option<&'a Record>,
}

/// Before or after a storage's own step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It has had no effect yet.
    Before,
    /// It has had its effect, and nobody knows yet.
    After,
}

/// A hook that waits before and after each step for what a function returns.
#[derive(Clone)]
pub struct Waits(Arc<dyn Fn(Operation, Moment) -> BoxFuture<'static, ()> + Send + Sync>);

impl<S: Storage> Hooked<S, Waits> {
    /// `inner` with `wait` before and after each step.
    pub fn waits(
        inner: S,
        wait: impl Fn(Operation, Moment) -> BoxFuture<'static, ()> + Send + Sync + 'static,
    ) -> Self {
        Self::around(inner, Waits(Arc::new(wait)))
    }
}

impl Hook for Waits {
    async fn around<T: Send>(
        &self,
        call: StorageCall<'_>,
        work: impl Future<Output = Result<T, StorageError>> + Send,
    ) -> Result<T, StorageError> {
        (self.0)(call.operation, Moment::Before).await;
        let result = work.await;
        (self.0)(call.operation, Moment::After).await;
        result
    }
}

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waits")
    }
}

macro_rules! storage {
    ($($method:ident($($argument:ident: $type:ty),*) -> $done:ty = $operation:ident, $record:expr;)*) => {
        impl<S: Storage, H: Hook> Storage for Hooked<S, H> {
            $(async fn $method(&self, key: &EncodedKey, $($argument: $type),*) -> Result<$done, StorageError> {
                let call = StorageCall { operation: Operation::$operation, key, record: $record };
                self.hook.around(call, self.inner.$method(key, $($argument),*)).await
            })*
        }
    };
}

storage! {
    begin(claim: &NewClaim) -> Begin = Begin, None;
    complete(token: Token, record: &Record, ttl: Duration) -> Held = Complete, Some(record);
    renew(token: Token, lease: Duration) -> Held = Renew, None;
    release(token: Token) -> Held = Release, None;
    get() -> Option<Entry> = Get, None;
    replace(record: &Record, ttl: Duration) -> () = Replace, Some(record);
    remove() -> bool = Remove, None;
    wait(timeout: Duration) -> () = Wait, None;
}
