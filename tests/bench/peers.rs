//! Other libraries, as their documentation sets them up.

use std::sync::Arc;

use axum::{Router, body::Body, extract::Request, routing::post};
use axum_idempotent::{IdempotentLayer, IdempotentOptions};
use idempotent::{memory::MemoryStore, middleware::IdempotencyLayer};
use ruts::{
    CookieOptions, Session, SessionLayer,
    store::{Ttl, moka::MokaStore},
};
use tokio::runtime::Runtime;
use tower::ServiceExt as _;
use tower_cookies::CookieManagerLayer;

use crate::apps::{Key, Load, bare, echo};

pub fn loads(runtime: &Runtime, size: usize) -> Vec<(&'static str, Load)> {
    let idempotent = || Load::new(idempotent(runtime), size);
    let axum_idempotent = || {
        let app = in_sessions();
        let cookie = runtime.block_on(session(app.clone()));
        Load::new(app, size).cookie(cookie)
    };
    vec![
        ("idempotent, first", idempotent().key(Key::Fresh)),
        ("idempotent, replay", idempotent().key(Key::Same)),
        ("axum-idempotent, first", axum_idempotent().key(Key::Fresh)),
        ("axum-idempotent, replay", axum_idempotent().key(Key::Same)),
    ]
}

pub fn idempotent(runtime: &Runtime) -> Router {
    // Its store spawns a task.
    let _guard = runtime.enter();
    let store = MemoryStore::builder().try_build().expect("a store");
    let layer = IdempotencyLayer::new(store).require_key(true);
    bare().layer(layer).with_state(())
}

/// It keeps answers in a session, so there has to be one.
fn in_sessions() -> Router {
    let store = Arc::new(MokaStore::builder().build());
    let cookie = CookieOptions::build()
        .name("session")
        .max_age(86400)
        .path("/");
    let options = IdempotentOptions::default().use_idempotency_key_header(None, true);
    let start = async |session: Session<MokaStore>| {
        let ttl = Ttl::new(86400).expect("a valid TTL");
        let set = session.set("user", &1_u32, ttl, None).await;
        set.expect("a stored field");
    };
    Router::new()
        .route("/orders", post(echo))
        .layer(IdempotentLayer::<MokaStore>::new(options))
        .route("/session", post(start))
        .layer(SessionLayer::new(store).with_cookie_options(cookie))
        .layer(CookieManagerLayer::new())
        .with_state(())
}

async fn session(app: Router) -> String {
    let request = Request::post("/session").body(Body::empty());
    let response = app.oneshot(request.expect("a valid request")).await;
    let response = response.unwrap_or_else(|never| match never {});
    let cookie = response.headers().get("set-cookie").expect("a session");
    let cookie = cookie.to_str().expect("ASCII");
    cookie.split(';').next().expect("a cookie").to_owned()
}
