//! Every visibility, in modules and in bodies, and used through `use` and `pub use`.
#![deny(warnings, unreachable_pub)]

use axum::{Router, routing::post};
use idempotency_axum::idempotency_key;

use self::{facade::*, handlers::nested::in_path};

mod handlers {
    use idempotency_axum::{idempotency_exempt, idempotency_key};

    #[idempotency_key]
    pub(crate) async fn in_crate() {}

    #[idempotency_exempt]
    pub(super) async fn in_super() {}

    #[idempotency_key]
    pub(crate) async fn glob() {}

    pub(super) mod nested {
        use super::idempotency_key;

        #[idempotency_key]
        pub(in super::super) async fn in_path() {}
    }
}

mod facade {
    pub(crate) use super::handlers::in_crate as renamed;
    pub(super) use super::handlers::in_super;
    pub(crate) use super::handlers::*;
}

#[idempotency_key]
async fn private() {}

mod child {
    pub(super) fn sees_what_is_private() {
        drop(super::private.invoke());
    }
}

fn app() -> Router {
    #[idempotency_key]
    async fn in_a_body(body: String) -> String {
        shout(&body)
    }

    fn shout(text: &str) -> String {
        text.to_uppercase()
    }

    mod local {
        #[idempotency_axum::idempotency_exempt]
        pub(super) async fn in_a_local_module() {}
    }

    Router::new()
        .route("/1", post(renamed))
        .route("/2", post(in_super))
        .route("/3", post(in_path))
        .route("/4", post(private))
        .route("/5", post(in_a_body))
        .route("/6", post(local::in_a_local_module))
        .route("/7", post(glob))
}

pub(crate) fn main() {
    child::sees_what_is_private();
    let _ = app();
}
