//! Names that the expansion must not confuse with its own.
#![deny(warnings)]
#![allow(dead_code, non_upper_case_globals, non_camel_case_types)]

use axum::{Router, extract::Extension, routing::post};
use idempotency_axum::{idempotency_exempt, idempotency_key};

mod core {}
mod std {}
mod axum_core {}

struct Option;
struct Clone;
struct Handler;
struct KeyPolicy;
struct Seat;
struct Self_;
trait Send {}
trait Sync {}
trait NoNeeds {}
type String = u8;
type Result = u8;

const state: u8 = 1;
const entry: u8 = 1;
static seat: u8 = 1;

macro_rules! assert {
    () => {};
}
macro_rules! concat {
    () => {};
}
macro_rules! module_path {
    () => {};
}

#[derive(::core::clone::Clone)]
struct S;
#[derive(::core::clone::Clone)]
struct M;
#[derive(::core::clone::Clone)]
struct T1;

fn policy() -> u8 {
    1
}

fn run() -> u8 {
    1
}

fn invoke() -> u8 {
    1
}

#[idempotency_key(optional, ttl = "1s", cache_name = "c")]
async fn call(
    Extension(S): Extension<S>,
    Extension(M): Extension<M>,
    Extension(T1): Extension<T1>,
) -> ::std::string::String {
    assert!();
    concat!();
    module_path!();
    ::std::format!("{}", policy() + run() + invoke() + entry + state + seat)
}

/// Handlers that are named as the expansion's own things.
#[idempotency_key]
async fn request(_: ::std::string::String) {}

#[idempotency_exempt]
async fn clone(_: ::std::string::String) {}

#[idempotency_exempt]
async fn fmt() {}

/// It calls itself.
#[idempotency_key]
async fn recursive(mut body: ::std::string::String) -> ::std::string::String {
    match body.pop() {
        ::core::option::Option::Some(_) => ::std::boxed::Box::pin(recursive(body)).await,
        ::core::option::Option::None => body,
    }
}

/// Two handlers that call each other do so by `invoke`.
#[idempotency_exempt]
async fn caller(body: ::std::string::String) -> ::std::string::String {
    recursive.invoke(body).await
}

pub(crate) fn main() {
    let _: Router = Router::new()
        .route("/1", post(call))
        .route("/2", post(request))
        .route("/3", post(clone))
        .route("/4", post(fmt))
        .route("/6", post(recursive))
        .route("/7", post(caller));
}
