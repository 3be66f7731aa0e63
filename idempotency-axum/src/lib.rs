//! Idempotency keys for axum: a retried request gets the first answer, and its handler never runs twice.
//!
//! A client sends `POST /orders`, the network eats the answer, the client retries, and two orders exist. With this crate the
//! client sends `Idempotency-Key: <unique>` along, and the retry gets the answer of the first request.
//!
//! ```
//! use axum::{Router, http::StatusCode, routing::post};
//! use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage, idempotency_exempt, idempotency_key};
//!
//! #[idempotency_key]
//! async fn create_order() -> (StatusCode, &'static str) {
//!     (StatusCode::CREATED, "order 1")
//! }
//!
//! #[idempotency_exempt]
//! async fn search() -> &'static str {
//!     "nothing found"
//! }
//!
//! # fn main() -> Result<(), idempotency_axum::Misuse> {
//! let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::ietf());
//! let app = Router::new()
//!     .route("/orders", post(create_order))
//!     .route("/search", post(search))
//!     .layer(layer.clone());
//! let app = layer.check(app)?;
//! # let _ = app;
//! # Ok(())
//! # }
//! ```
//!
//! Of the presets, [`Config::ietf`] gives a retry the first answer with its status, and asks for keys on POST and PATCH;
//! [`Config::stripe`] does what Stripe's API does. [`Config::default`], also called [`Config::django`], gives a retry the first body with
//! **409**, as django-idempotency-key does.
//!
//! # The way of a request
//!
//! ```text
//! request ─ safe method, CONNECT, exempt, or optional without a key ─► handler
//!    │ key read (400 if missing or invalid), body buffered (413 over the limit, 408 if it stops coming, 503 without room)
//!    │ encoded: SHA-256 over key, method, original path and query, caller, body
//!    ▼ one atomic step at the storage
//!    ├ claimed ─────────► handler ─► answer recorded ─► client
//!    ├ another request ─► 422 at once          (encoders with a fingerprint)
//!    ├ in flight ───────► waits for the result ─► as completed, or 423 and Retry-After
//!    ├ completed ───────► the recorded answer, its status or 409, `idempotency-replayed: true`
//!    └ storage failed ──► 503 and Retry-After, or unprotected if configured so
//! ```
//!
//! The engine behind it, its claims, records and tombstones are described in [`Engine`] and [`Storage`]; the kinds of refusal
//! in [`problem`].
//!
//! Examples of items that this crate re-exports say `use idempotency_core::…`; write `idempotency_axum` instead.
//!
//! The [`guide`] answers questions from practice: scopes, uploads, CORS, streams, clients, webhooks, tests, operation.
//! [What a request costs](https://github.com/idempotency-rs/idempotency/tree/main/tests/bench) is measured beside bare axum, a floor
//! and other libraries.
//!
//! # Modes and policies
//!
//! [`IdempotencyLayer::enforce`] requires a key on the methods of [`Config::methods`], [`IdempotencyLayer::exempt`] on none, and
//! [`IdempotencyLayer::optional`] honours a key that is present. A handler says
//! otherwise by [`#[idempotency_key]`](macro@idempotency_key), `#[idempotency_key(optional)]`,
//! `#[idempotency_key(cache_name = "…")]` or [`#[idempotency_exempt]`](macro@idempotency_exempt); closures, generic and
//! associated functions by the combinators of [`IdempotencyHandler`]. The outermost policy wins; of two layers the one nearest
//! the handler decides.
//!
//! Mode, storages and [`Config`] can come from a file or the environment, see [`Settings`].
//!
//! A handler takes the key as [`IdempotencyKey`], and answers conflicts itself if it takes [`ManualIdempotency`].
//!
//! # What a layer can see
//!
//! A layer runs before the handler, so it must know the handler's policy beforehand. It learns it when it is put on a route, by
//! cloning it once: our handlers announce themselves when they are cloned. That works through `Router::layer`, `route_layer`,
//! `Handler::layer`, `MethodRouter`s, nested and merged routers, fallbacks, and tower middleware in between. It can't work where
//! a clone does not reach the handler:
//!
//! | placement | what happens |
//! |---|---|
//! | `nest_service(Router)`, a layer around a whole `Router`, `BufferLayer` | the mode's default policy applies. A handler that asked for more answers 500 and logs its name, its policy and the cure; it never runs unprotected. In `enforce` an exempt handler there gets 400 for a missing key |
//! | `route_service(MethodRouter)`, a closure or a state that holds an annotated handler | the announced policy applies. In `enforce`, one that needs no key is watched [until its handler has answered](#before-a-handler-has-answered) |
//! | [`IdempotencyLayer::policy`] | that policy, no questions asked |
//! | `Handler::layer` with our layer, inside a router that has one too | the router's layer decides and the inner one passes the request through; a cache that only the inner one has is unknown |
//! | an unknown `cache_name` | the route answers 500; [`IdempotencyLayer::check`] finds it before the server listens |
//!
//! ## Before a handler has answered
//!
//! A clone may show an exempt or optional handler that is not the one that answers. So in `enforce` the layer watches the answers
//! of a route (known by its matched path) and method until a handler with that policy has answered once. A success that comes from
//! elsewhere before that is logged as an error with the handler's name; this route and method then have the mode's default policy
//! until the handler does answer a request, which needs a key.
//!
//! Before the first answer, a middleware between the layer and the handler that answers by itself, say a cache, can't be told from
//! another handler. Put it outside of the layer. After the first answer it changes nothing.
//!
//! ## 404 and 405
//!
//! `MethodRouter::route_layer` leaves a wrong method 405, and `Router::route_layer` an unmatched path 404. `Router::layer` wraps
//! those answers too, so in `enforce` they are 400 for an unsafe method without a key; so does `Router::route_layer` with 405.
//!
//! With a key these answers are never recorded, whatever [`StoreOn`] says: another release may have the route, and a retry runs
//! there. The layer takes for a router's answer any 405, and a 404 where no route matched, unless a handler with an attribute or a
//! combinator was entered. That no route matched is known by a missing [`MatchedPath`](axum::extract::MatchedPath). A layer around a
//! `nest_service`, a whole `Router` or any other service never sees one, so there a 404 is recorded only if such a handler gave it.
//! A router that is itself the service of a route (`route_service`) answers for that route.
//!
//! # Order of layers
//!
//! What stands outside sees every request, also those that are refused or get a replay, and is gone once the client is. What
//! stands inside runs with the handler and only then, and its answer is as good as the handler's. **Bold** is where a layer
//! belongs, if one side is better.
//!
//! | layer | outside | inside |
//! |---|---|---|
//! | authentication | **who may not call gets no replay either** | a replay passes it by |
//! | `CorsLayer` | **each request gets its own headers, refusals too** | refusals have none, and replays those for the first origin |
//! | `CompressionLayer` | **the plain answer is recorded, each client gets the encoding that it accepts** | what it made is recorded: retries get these bytes, whatever they accept |
//! | `TimeoutLayer` | **the client gets its timeout, the operation goes on and is recorded** | the handler is cancelled, its key released, and a retry runs it again |
//! | `ResponseBodyTimeoutLayer` | **the client is cut off, the recording goes on** | the answer is broken for everybody: retries get 409 |
//! | `RequestBodyLimitLayer` | **413 before the key is taken** | 413 is an answer that may be stored; [`Config::max_request_body`] comes first |
//! | `NormalizePathLayer` | **around the router that is served: both spellings are one operation** | behind another router the original path counts: two operations |
//! | `CatchPanicLayer` | where 500 is stored a retry gets 409, else it runs | where 500 is stored a retry gets this 500, else it runs |
//! | `GlobalConcurrencyLimitLayer` | counts clients, also for replays; not an operation whose client left | counts operations; one that waits for its place holds its key, and to be shed is an answer. Replays and refusals need no place |
//! | a task-local, say a tenant | not there once the client has left; a request extension is | **there to the end of the handler** |
//! | a tracing span | **there to the end of the recording, whether the client is or not** | there to the end of the handler |
//! | a session that is saved with the answer | not saved where the client has left, though the answer is recorded: save it in the handler | **saved by the operation, not by replays** |
//! | a transaction per request | rolled back when the client leaves, though the answer is recorded | **ends once, with the handler, before the record** |
//!
//! A transaction inside, and any timeout but those of bodies, end with the head of an answer that streams.
//!
//! The layer itself is always ready. It asks what stands inside once the key is claimed, so a `LoadShedLayer` that is to shed
//! operations belongs inside too.
//!
//! # Scope
//!
//! The same key of two callers is two operations. By default `Authorization`, `X-Api-Key`, `Api-Key` and `X-Auth-Token` say who
//! calls, and a request that has a cookie and none of these is refused with 403. Set [`Scope::cookie`] for session cookies, and
//! best of all [`Scope::from_fn`] with the principal that your authentication layer found, which also survives a refreshed token.
//! A scope that finds no caller where it looks refuses too: see [`Scope`].
//!
//! # A client that leaves
//!
//! From the claim on a request is carried on, whether its client is there or not: if hyper drops it because the connection is
//! gone, a task adopts it, and an answer that streams is read on. So a retry finds the record, or the claim still held.
//! [`IdempotencyLayer::drain`] waits for all of them at shutdown.
//!
//! * An answer that can't be recorded (an event stream, one with trailers, one past [`Config::max_response_body`] or without room
//!   in [`Config::max_buffered`]) ends with its client, as it would without this layer. Its key has a tombstone by then.
//! * All others go on to their end, or to [`LockPolicy::max_hold`]. Then their key gets a tombstone; what still has a client goes
//!   on for it, and what has none is dropped, with an error in the log that names the route.
//!
//! # Features
//!
//! | feature | default | build | adds |
//! |---|---|---|---|
//! | `memory` | yes | 0.8 | [`MemoryStorage`]: records in this process; [`MokaCache`] and [`NearCache`] |
//! | `redis` | no | 1.5 | [`RedisStorage`], [`RedisLock`], [`RedisCache`]: records and claims that any number of processes share |
//! | `redis-tls` | no | 1.5 | `rediss://` for them, by rustls with the system's root certificates |
//! | `settings` | yes | 0.7 | [`Settings`] and [`IdempotencyLayer::from_settings`]: the layer from a file or the environment |
//! | `postgres` | no | 1.8 | [`PostgresStorage`]: records and claims in a table of PostgreSQL, which any number of processes share |
//! | `sqlite` | no | 1.7 | [`SqliteStorage`]: records and claims in one SQLite file, for the processes of one machine; SQLite is compiled in |
//! | `conformance` | no | | [`storage::conformance`]: the suite that every storage must pass; [`Env::simulated`] |
//!
//! `build` is the CPU time of `cargo build -p idempotency-axum --no-default-features --features …` from nothing, over the 37 s with the
//! default features; without any feature it is 0.8, with all of them 2.1. On two cores of an AMD EPYC that other builds kept busy, so
//! true to about a fifth.
#![forbid(unsafe_code)]
// Shows on docs.rs, which builds with nightly, what needs a feature.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod buffer;
mod detach;
mod discovery;
mod exchange;
mod extract;
mod future;
pub mod guide;
mod handler;
mod handshake;
mod key_source;
mod layer;
mod misuse;
mod plan;
mod policy;
pub mod problem;
mod recording;
mod request;
mod response;
mod service;
#[cfg(feature = "settings")]
mod settings;

#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;

// Everything can be imported from here; what an application seldom names is shown in the modules below.
#[doc(hidden)]
pub use idempotency_core::*;
pub use idempotency_macros::{idempotency_exempt, idempotency_key};

#[cfg(feature = "memory")]
pub use idempotency_core::MemoryStorage;
#[cfg(feature = "postgres")]
pub use idempotency_core::PostgresStorage;
#[cfg(feature = "redis")]
pub use idempotency_core::RedisStorage;
#[cfg(feature = "settings")]
pub use idempotency_core::Settings;
#[cfg(feature = "sqlite")]
pub use idempotency_core::SqliteStorage;
/// The database of an [`IdempotentTransaction`], as sqlx names it.
#[cfg(feature = "postgres")]
#[doc(no_inline)]
pub use idempotency_core::sqlx::Postgres;
/// The database of an [`IdempotentTransaction`], as sqlx names it.
#[cfg(feature = "sqlite")]
#[doc(no_inline)]
pub use idempotency_core::sqlx::Sqlite;
pub use idempotency_core::{Config, Scope, StoreOn};

pub use self::{
    extract::{IdempotencyKey, IdempotentTransaction, ManualIdempotency},
    handler::IdempotencyHandler,
    layer::IdempotencyLayer,
    misuse::Misuse,
    policy::KeyPolicy,
    response::DoNotRecord,
};

#[doc(hidden)]
pub use self::middleware::*;

/// What can be configured beside [`Config`], [`Scope`] and [`StoreOn`]. All of it can be imported from the root too.
pub mod config {
    #[doc(inline)]
    pub use idempotency_core::{
        Budget, KeyFormat, LockPolicy, Mode, OnStorageError, OnUnreadable, Reservation,
        UnknownCaller,
    };
    #[cfg(feature = "settings")]
    #[doc(inline)]
    pub use idempotency_core::{Opened, SettingsError, SettingsErrorKind};
}

/// How a request becomes a storage key: the key of its client, and the encoders. All of it can be imported from the root too.
pub mod encoder {
    #[doc(inline)]
    pub use idempotency_core::{
        BasicKeyEncoder, Encoded, EncodedKey, Fingerprint, FingerprintFieldsEncoder,
        FingerprintKeyEncoder, InvalidKey, InvalidKeyKind, Key, KeyEncoder, KeyOnlyEncoder,
        ParseEncodedKeyError, RequestView,
    };
}

/// The engine without HTTP: it decides who runs an operation. Its events, and where its time comes from. All of it can be imported from the root too.
pub mod engine {
    #[cfg(feature = "conformance")]
    #[doc(inline)]
    pub use idempotency_core::SimulatedClock;
    #[doc(inline)]
    pub use idempotency_core::{
        Claim, Completion, Decision, Engine, Env, Environment, Event, KeyTransaction, NotLent,
        Observer, Operation, Progress, Ran, Refusal, Refused, Replay, Spawner, TracingObserver,
        TransactionClaim, TransactionEnd, TransactionSlot,
    };
}

/// Where claims and records are kept, and what a storage of your own is made of. All of it can be imported from the root too.
pub mod storage {
    #[cfg(feature = "conformance")]
    #[doc(inline)]
    pub use idempotency_core::storage::conformance;
    #[doc(inline)]
    pub use idempotency_core::{
        AnyStorage, Begin, BeginTransaction, BoxError, Cache, Committed, DecodeError,
        DecodeErrorKind, Entry, Held, Lock, LockedStorage, NewClaim, NewTransaction, Outcome,
        PhaseError, ProcessLock, Record, RolledBack, Storage, StorageError, StorageErrorKind,
        StoredResponse, Token, TombstoneReason, Transaction, TransactionDatabase, Transactions,
        Writes,
    };
    #[cfg(any(feature = "postgres", feature = "sqlite"))]
    #[doc(inline)]
    pub use idempotency_core::{InvalidTableName, Purger};
    #[cfg(feature = "postgres")]
    #[doc(inline)]
    pub use idempotency_core::{
        IsolationLevel, PostgresConnect, PostgresConnectError, PostgresConnectErrorKind,
        PostgresTransaction,
    };
    #[cfg(feature = "memory")]
    #[doc(inline)]
    pub use idempotency_core::{MemoryStorageBuilder, MokaCache, NearCache, WhenFull};
    #[cfg(feature = "redis")]
    #[doc(inline)]
    pub use idempotency_core::{
        RedisCache, RedisConnect, RedisConnectError, RedisConnectErrorKind, RedisLock,
    };
    #[cfg(feature = "sqlite")]
    #[doc(inline)]
    pub use idempotency_core::{SqliteStorageError, SqliteStorageErrorKind, SqliteTransaction};
}

/// The types that the middleware and its extractors are made of. All of it can be imported from the root too.
pub mod middleware {
    #[doc(inline)]
    pub use crate::{
        extract::{NotProtected, ReplayedResponse},
        future::ResponseFuture,
        handler::{HandlerFuture, WithPolicy},
        layer::EncodedKeyError,
        misuse::{MisuseKind, TransactionProblem},
        policy::{ExtractorNeeds, Needs},
        problem::Problem,
        service::Idempotency,
    };
}
