//! A state of the application's own, and extractors with types in them.
#![deny(warnings)]

use std::{collections::HashMap, sync::Arc};

use axum::{
    Extension, Json, Router,
    extract::{FromRef, FromRequestParts, Path, Query, Request, State},
    http::{StatusCode, request::Parts},
    routing::post,
};
use idempotency_axum::{idempotency_exempt, idempotency_key};

#[derive(Clone)]
struct AppState {
    names: Arc<Vec<String>>,
}

#[derive(Clone)]
struct Names(Arc<Vec<String>>);

impl FromRef<AppState> for Names {
    fn from_ref(state: &AppState) -> Self {
        Self(state.names.clone())
    }
}

/// An extractor for any state that has names.
struct FirstName(String);

impl<S> FromRequestParts<S> for FirstName
where
    S: Send + Sync,
    Names: FromRef<S>,
{
    type Rejection = StatusCode;

    async fn from_request_parts(_: &mut Parts, state: &S) -> Result<Self, StatusCode> {
        let Names(names) = Names::from_ref(state);
        names
            .first()
            .cloned()
            .map(Self)
            .ok_or(StatusCode::NOT_FOUND)
    }
}

#[idempotency_key]
#[expect(
    clippy::too_many_arguments,
    clippy::type_complexity,
    reason = "as in a plain function"
)]
async fn create_order(
    State(state): State<AppState>,
    State(names): State<Names>,
    FirstName(first): FirstName,
    Path((id, name)): Path<(u64, String)>,
    Query(query): Query<HashMap<String, String>>,
    extension: Option<Extension<Arc<dyn Fn(&str) -> u8 + Send + Sync>>>,
    callback: Option<Extension<fn(&str) -> &str>>,
    body: Result<Json<[u8; 2 + 1]>, axum::extract::rejection::JsonRejection>,
) -> String {
    let there = (
        query.is_empty(),
        extension.is_some(),
        callback.is_some(),
        body.is_ok(),
    );
    format!(
        "{id}{name}{first}{}{}{there:?}",
        names.0.len(),
        state.names.len()
    )
}

#[idempotency_exempt]
async fn whole_request(request: Request) -> String {
    request.uri().to_string()
}

pub(crate) fn main() {
    let app: Router<AppState> = Router::new()
        .route("/{id}/{name}", post(create_order))
        .route("/any", post(whole_request));
    let _: Router = app.with_state(AppState {
        names: Arc::default(),
    });
    // No state decided yet: these handlers take any.
    let _: Router<u8> = Router::new().route("/any", post(whole_request));
}
