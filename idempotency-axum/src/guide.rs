//! The guide: one page per question. Each page opens with its short answer.
//!
//! Some examples in the docs of single items import from `idempotency_core`, the crate of the engine. Every such name is also in
//! `idempotency_axum`, which is all that an application depends on.
//!
//! | page | question |
//! |---|---|
//! | [`policies`] | Which requests need a key, and how does a handler say otherwise? |
//! | [`scope`] | Whose key is it? |
//! | [`uploads`] | How do large request bodies and uploads work? |
//! | [`cors`] | What do browsers need? |
//! | [`transactions`] | How does a handler write exactly once? |
//! | [`streams`] | What happens to streams, server-sent events and WebSockets? |
//! | [`clients`] | What should a client do? |
//! | [`webhooks`] | How are webhooks received and sent? |
//! | [`testing`] | How is a service with idempotency keys tested? |
//! | [`operating`] | What does an operator need to know? |
//! | [`settings`] | How is the layer configured from a file or the environment? |
//! | [`migrating`] | How does a service move from django-idempotency-key? |
//! | [`coming_from`] | What is called what, for users of other libraries? |
//!
//! Every Rust block of the pages is compiled, and most of them run and assert as tests of this crate. The pages show the memory
//! storage where the storage does not matter. The [crate docs](crate) describe the way of a request, and [`problem`](crate::problem) lists
//! all kinds of refusal.
//!
//! Every name in these pages is importable from the root of `idempotency_axum`, also where rustdoc shows it in a module. Only the
//! conformance suite has its items in [`storage::conformance`](crate::storage).
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | key | what the client sends in `Idempotency-Key`; the same for each attempt of one operation |
//! | operation | what a key stands for: one run of a handler, however often the client asks |
//! | caller | whoever sends the request: a user, a tenant, a service |
//! | scope | finds the caller of a request; the same key of two callers is two operations |
//! | encoder | computes the storage key, and for some encoders a fingerprint, from key, request and caller |
//! | claim | marks an operation as running, so that a duplicate does not run too |
//! | lease | how long a claim lasts unless it is renewed; after a crash the key is free when the lease is over |
//! | record | the stored answer of an operation; kept for the TTL |
//! | tombstone | a record without an answer: the operation ran, but its answer was not kept; a retry gets 409 |
//! | replay | the recorded answer, sent to a retry; the handler does not run |
//! | preset | a ready-made [`Config`](crate::Config): `django` (the default), `ietf`, `stripe` |
//! | storage | where claims and records are kept: memory, Redis, or your own |

#[doc = include_str!("docs/policies.md")]
pub mod policies {}

#[doc = include_str!("docs/scope.md")]
pub mod scope {}

#[doc = include_str!("docs/uploads.md")]
pub mod uploads {}

#[doc = include_str!("docs/cors.md")]
pub mod cors {}

#[doc = include_str!("docs/transactions.md")]
pub mod transactions {}

#[doc = include_str!("docs/streams.md")]
pub mod streams {}

#[doc = include_str!("docs/clients.md")]
pub mod clients {}

#[doc = include_str!("docs/webhooks.md")]
pub mod webhooks {}

#[doc = include_str!("docs/testing.md")]
pub mod testing {}

#[doc = include_str!("docs/operating.md")]
pub mod operating {}

#[doc = include_str!("docs/settings.md")]
pub mod settings {}

#[doc = include_str!("docs/migrating.md")]
pub mod migrating {}

#[doc = include_str!("docs/coming_from.md")]
pub mod coming_from {}
