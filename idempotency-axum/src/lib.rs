//! Placeholder docs, replaced below.
#![forbid(unsafe_code)]

mod detach;
mod discovery;
mod extract;
mod future;
mod handler;
mod layer;
mod policy;
pub mod problem;
mod record;
mod request;
mod response;
mod service;

#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;

pub use idempotency_core::*;
// pub use idempotency_macros::{idempotency_exempt, idempotency_key};

pub use self::{
    extract::{IdempotencyKey, ManualIdempotency, NotProtected, ReplayedResponse},
    future::ResponseFuture,
    handler::{HandlerFuture, IdempotencyHandler, WithPolicy},
    layer::{IdempotencyLayer, Misuse, MisuseKind},
    policy::{ExtractorNeeds, KeyPolicy, Needs},
    problem::Problem,
    service::Idempotency,
};
