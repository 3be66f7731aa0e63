//! The attributes of [`idempotency-axum`](https://docs.rs/idempotency-axum), which re-exports them: depend on that crate.
//!
//! A handler with an attribute stays a handler, and tells the layer on its route what it wants of idempotency keys. What the
//! attributes expand to uses `::idempotency_axum` by that name.
#![forbid(unsafe_code)]

mod args;
mod expand;
mod item;

use std::fmt;

use proc_macro::TokenStream;

/// A handler whose requests need an idempotency key, or, if `optional`, may have one.
///
/// ```
/// use axum::{Json, Router, http::StatusCode, routing::post};
/// use idempotency_axum::{IdempotencyLayer, MemoryStorage, idempotency_key};
///
/// /// A request without a key is refused with 400; a retry gets the first answer.
/// #[idempotency_key]
/// async fn create_order(Json(items): Json<Vec<String>>) -> (StatusCode, String) {
///     (StatusCode::CREATED, format!("an order of {} items", items.len()))
/// }
///
/// /// Without a key it runs each time. With one, its records are kept for an hour in the cache `drafts`.
/// #[idempotency_key(optional, cache_name = "drafts", ttl = "1h")]
/// async fn save_draft() -> StatusCode {
///     StatusCode::NO_CONTENT
/// }
///
/// # fn main() -> Result<(), idempotency_axum::Misuse> {
/// let layer = IdempotencyLayer::exempt(MemoryStorage::new()).cache("drafts", MemoryStorage::new());
/// let app = Router::new()
///     .route("/orders", post(create_order))
///     .route("/drafts", post(save_draft))
///     .layer(layer.clone());
/// let app = layer.check(app)?;
/// # let _ = app;
/// # Ok(())
/// # }
/// ```
///
/// # Arguments
///
/// In any order, each at most once.
///
/// | argument | default | meaning |
/// |---|---|---|
/// | `optional`, `optional = true`, `optional = false` | `false` | a request without a key runs unprotected, instead of being refused with 400 |
/// | `cache_name = "orders"` | the storage that the layer was made with | the layer's cache of this name. `IdempotencyLayer::check` finds an unknown one at start-up |
/// | `ttl = "24h"` | `Config::ttl` | how long records are kept: digits and one of `ms`, `s`, `m`, `h`, `d`; seconds without a unit. Not zero, which would keep none |
/// | `max_request_body = "10MiB"` | `Config::max_request_body` | the longest request body that is buffered, as in the settings: digits and one of `B`, `KB`, `MB`, `GB` (powers of 1000), `KiB`, `MiB`, `GiB` (powers of 1024); bytes without a unit |
/// | `header = "X-GitHub-Delivery"` | `Config::header` | the request header that has the key, for webhooks that name their deliveries themselves. A request without it is refused with 400, which names it |
/// | `store_on = path` | `Config::store_on` | which answers are recorded: the path of a `fn() -> StoreOn` |
/// | `scope = path` | `Config::scope` | whose key it is: the path of a `fn() -> Scope` |
///
/// The functions are called once in a process, when a layer first sees the handler or a request first reaches it.
///
/// ```
/// use axum::{Router, body::Bytes, http::StatusCode, routing::post};
/// use idempotency_axum::{IdempotencyLayer, MemoryStorage, Scope, StoreOn, idempotency_key};
///
/// /// A refusal is as final as a success.
/// fn settled() -> StoreOn {
///     StoreOn::below(500)
/// }
///
/// #[idempotency_key(header = "X-GitHub-Delivery", max_request_body = "10MiB", store_on = settled, scope = Scope::none)]
/// async fn delivered(_event: Bytes) -> StatusCode {
///     StatusCode::NO_CONTENT
/// }
///
/// let app: Router = Router::new()
///     .route("/github", post(delivered))
///     .layer(IdempotencyLayer::exempt(MemoryStorage::new()));
/// # let _ = app;
/// ```
///
/// For a key in the body there is `KeyPolicy::key_from`.
///
/// A parameter of type `ManualIdempotency`, also behind an alias or in an `Option`, makes the policy *manual*: the handler runs
/// on a retry too, and answers it. An `IdempotencyKey` needs a request with a key, so with `optional` it must be an
/// `Option<IdempotencyKey>`; anything else is a compile error.
///
/// # In unit tests
///
/// The attribute turns the function into a constant that is a handler, so it can't be called as a function any more, except
/// from its own body. `invoke` calls what you wrote, without a request, a key or a layer:
///
/// ```
/// # use idempotency_axum::idempotency_key;
/// #[idempotency_key]
/// async fn shout(text: String) -> String {
///     text.to_uppercase()
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// assert_eq!(shout.invoke("hello".into()).await, "HELLO");
/// // What `IdempotencyLayer::encoded_key_for` takes.
/// assert_eq!(shout.policy(), idempotency_axum::KeyPolicy::required());
/// # }
/// ```
///
/// # What works, and what to do instead
///
/// | | | |
/// |---|---|---|
/// | free `async fn`s, private, `pub`, `pub(…)`, in a module, in a function's body | works | |
/// | 0 to 16 parameters, patterns, `mut`, `impl IntoResponse` as the result | works | |
/// | doc comments, `#[deprecated]`, `#[cfg]`, `#[cfg_attr]`, lint attributes | work | they apply to what you see, as on the function |
/// | a module of the same name | works | a constant lives among the values only |
/// | `pub use`, `use handlers::create_order` | works | |
/// | `#[tracing::instrument]` | works | above or below |
/// | `#[axum::debug_handler]` | below only | it calls the function, so it must find it: put it below. Above, the compiler's error says `debug_handler_goes_below` |
/// | `#[utoipa::path]` | above only | it must see the function as it is written; error with the cure |
/// | other attributes that change the function | below | where they find the function as it is written |
/// | both attributes on one function | error | a handler uses keys or is exempt: remove one |
/// | closures, generic functions, functions that return a future | error | the combinator: `post(create::<Order>.idempotency_key(KeyPolicy::required()))` |
/// | `impl Trait` parameters | error | name the type; or a type parameter and the combinator, as above |
/// | methods and associated functions | error | the combinator: `post(Orders::create.idempotency_key(KeyPolicy::required()))`. Without a `self` or `Self` the attribute can't tell where the function stands, and the compiler says that a `struct` is not supported there |
/// | a parameter that is no extractor, or a body before the last parameter | the compiler's error where the route is made | it names the type (`Order: FromRequestParts<()>` is not satisfied) and points at the parameter: wrap it, as in `Json<Order>`, or move it to the end |
/// | a return type that is no answer, a future that is not `Send` | error | it points at the return type, or at what is held across an `.await` |
/// | `const`, `unsafe`, `extern` functions | error | call them from a handler |
/// | `&T` and `'_` in a parameter's type | error | handlers own what they take: use an owned type, or `'static` |
/// | `Foo` for a `Foo<'_>` as a parameter's type | the compiler's error | as above |
/// | `#[cfg]` on a parameter | error | put it on two versions of the function |
/// | a call, `create_order(…)` | the compiler's error, which says `call_it_by_invoke` | `create_order.invoke(…)` |
/// | `post(create_order).idempotency_key(…)`, a policy on a `MethodRouter` | the compiler's error, which finds a `WithPolicy<MethodRouter>` | put it on the handler: `post(create_order.idempotency_key(…))` |
/// | `create_order.or(…)` of axum-extra | error | one policy for both, without attributes: `post(create_order.or(other).idempotency_key(KeyPolicy::required()))` |
/// | `post` and its like of aide | the compiler's error: no `OperationHandler` | aide wants the function itself: remove the attribute and give the route a layer with the policy, `post(create_order).layer(layer.clone().policy(KeyPolicy::required()))` |
/// | `let create_order = …`, where the handler is in scope | the compiler's error | a constant in a pattern is compared with: choose another name |
/// | `idempotency-axum` under another name in `Cargo.toml` | the compiler's error | keep the name |
#[proc_macro_attribute]
pub fn idempotency_key(args: TokenStream, item: TokenStream) -> TokenStream {
    expand::expand(Attribute::Key, args.into(), item.into()).into()
}

/// A handler that runs for every request, even for one with a key.
///
/// It takes no arguments. It matters where the layer enforces keys; for safe methods (GET, HEAD, OPTIONS, TRACE) it is never
/// needed.
///
/// ```
/// use axum::{Router, routing::post};
/// use idempotency_axum::{IdempotencyLayer, MemoryStorage, idempotency_exempt};
///
/// #[idempotency_exempt]
/// async fn search(query: String) -> String {
///     format!("nothing found for {query}")
/// }
///
/// let app: Router = Router::new()
///     .route("/search", post(search))
///     .layer(IdempotencyLayer::enforce(MemoryStorage::new()));
/// # let _ = app;
/// ```
///
/// What works, and what to do instead, is as for [`#[idempotency_key]`](macro@idempotency_key); the combinator is
/// `.idempotency_exempt()`. A `ManualIdempotency` parameter is an error: an exempt handler has no conflicts to handle. So is an
/// `IdempotencyKey`, but not an `Option` of it.
#[proc_macro_attribute]
pub fn idempotency_exempt(args: TokenStream, item: TokenStream) -> TokenStream {
    expand::expand(Attribute::Exempt, args.into(), item.into()).into()
}

/// Which of the two attributes is at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attribute {
    Key,
    Exempt,
}

impl Attribute {
    /// The attribute that `path` names, however it was imported.
    fn named_by(path: &syn::Path) -> Option<Self> {
        let name = &path.segments.last()?.ident;
        [Self::Key, Self::Exempt]
            .into_iter()
            .find(|attribute| name == attribute.name())
    }

    fn name(self) -> &'static str {
        match self {
            Self::Key => "idempotency_key",
            Self::Exempt => "idempotency_exempt",
        }
    }

    /// What does the same for what is no plain function.
    fn combinator(self) -> &'static str {
        match self {
            Self::Key => ".idempotency_key(KeyPolicy::required())",
            Self::Exempt => ".idempotency_exempt()",
        }
    }
}

impl fmt::Display for Attribute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
