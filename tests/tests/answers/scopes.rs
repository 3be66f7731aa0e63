//! Whose key it is.

use axum::{
    Router,
    http::request::Parts,
    middleware::{self, Next},
    routing::post,
};
use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage, Scope};
use idempotency_tests::{Call, Logs, Runs, Server};

use crate::{Column, Shop, assert_ran, assert_refused};

columns!(scope_required_and_absent, scope_required_and_present);

async fn shop(scope: Scope) -> Shop {
    Shop::open(Config::ietf().scope(scope)).await
}

fn call(shop: &Shop) -> Call {
    shop.server.post("/orders").key("abc").body("x")
}

async fn scope_required_and_absent(column: Column) {
    let config = column.config().scope(Scope::authorization().required());
    let shop = Shop::open(config).await;
    assert_refused(&call(&shop).send().await, 403, "scope-required");
    // What is empty is absent.
    let empty = call(&shop).header("authorization", "").send().await;
    assert_refused(&empty, 403, "scope-required");
    assert_eq!(empty.header("retry-after"), None);
    assert_eq!(shop.runs(), 0);
}

async fn scope_required_and_present(column: Column) {
    let config = column.config().scope(Scope::authorization().required());
    let shop = Shop::open(config).await;
    let call = || call(&shop).header("authorization", "Bearer alice");
    assert_ran(&call().send().await, 1);
    column.assert_replay(&call().send().await, 201, "order 1");
}

#[tokio::test]
async fn a_missing_key_is_told_before_a_missing_scope() {
    let shop = shop(Scope::authorization().required()).await;
    let answer = shop.server.post("/orders").send().await;
    assert_refused(&answer, 400, "missing-key");
}

#[tokio::test]
async fn a_refreshed_token_is_another_caller() {
    let shop = shop(Scope::default()).await;
    let call = |token| call(&shop).header("authorization", token);
    assert_ran(&call("Bearer alice-1").send().await, 1);
    assert_ran(&call("Bearer alice-2").send().await, 2);
}

#[tokio::test]
async fn two_authorizations_are_neither_of_them() {
    let shop = shop(Scope::authorization()).await;
    let call = |tokens: &[&str]| {
        let header = |call: Call, token: &&str| call.header("authorization", token);
        tokens.iter().fold(call(&shop), header)
    };
    for (run, tokens) in [
        &["a"][..],
        &["b"],
        &["a", "b"],
        &["b", "a"],
        &["a", "b", ""],
    ]
    .into_iter()
    .enumerate()
    {
        assert_ran(&call(tokens).send().await, run + 1);
    }
}

#[tokio::test]
async fn cookie() {
    let shop = shop(Scope::cookie("session")).await;
    let call = |cookie| call(&shop).header("cookie", cookie);
    assert_ran(&call("session=alice").send().await, 1);
    assert_ran(&call("session=bob").send().await, 2);
    assert_ran(&call("xsession=alice; sessions=alice").send().await, 3);
    // Other cookies, and where it stands among them, don't matter. Nor does Authorization.
    let retry = call("theme=dark; session=alice; n=1").header("authorization", "Bearer x");
    Column::Ietf.assert_replay(&retry.send().await, 201, "order 1");
}

#[tokio::test]
async fn cookie_required() {
    let shop = shop(Scope::cookie("session").required()).await;
    let call = || call(&shop).header("authorization", "Bearer alice");
    assert_refused(&call().send().await, 403, "scope-required");
    let other = call().header("cookie", "theme=dark").send().await;
    assert_refused(&other, 403, "scope-required");
    assert_eq!(shop.runs(), 0);
    let own = call().header("cookie", "session=alice").send().await;
    assert_ran(&own, 1);
}

#[tokio::test]
async fn header() {
    let shop = shop(Scope::header("X-Tenant")).await;
    let call = |tenant| call(&shop).header("x-tenant", tenant);
    assert_ran(&call("one").send().await, 1);
    assert_ran(&call("two").send().await, 2);
    let retry = call("one").header("authorization", "Bearer x").send().await;
    Column::Ietf.assert_replay(&retry, 201, "order 1");
}

#[tokio::test]
async fn none() {
    let shop = shop(Scope::none()).await;
    assert_ran(&call(&shop).send().await, 1);
    let other = call(&shop).header("authorization", "Bearer alice");
    Column::Ietf.assert_replay(&other.send().await, 201, "order 1");
    let other = call(&shop).header("cookie", "session=alice");
    Column::Ietf.assert_replay(&other.send().await, 201, "order 1");
}

/// The principal of `Bearer <principal>-<token's number>`.
fn principal(request: &Parts) -> Option<Vec<u8>> {
    let token = request.headers.get("authorization")?.to_str().ok()?;
    let (principal, _) = token.strip_prefix("Bearer ")?.split_once('-')?;
    Some(principal.as_bytes().to_vec())
}

#[tokio::test]
async fn from_fn_cures_a_refreshed_token() {
    let shop = shop(Scope::from_fn(principal).required()).await;
    let call = |token| call(&shop).header("authorization", token);
    assert_ran(&call("Bearer alice-1").send().await, 1);
    let refreshed = call("Bearer alice-2").send().await;
    Column::Ietf.assert_replay(&refreshed, 201, "order 1");
    assert_ran(&call("Bearer bob-1").send().await, 2);
    assert_refused(&call("Basic x").send().await, 403, "scope-required");
}

#[derive(Clone)]
struct Principal(String);

/// Authentication belongs outside, and leaves the principal in the extensions.
#[tokio::test]
async fn from_fn_sees_what_an_outer_layer_found_out() {
    let scope = Scope::from_fn(|request| {
        let Principal(name) = request.extensions.get()?;
        Some(name.clone().into_bytes())
    });
    let authenticate = |mut request: axum::extract::Request, next: Next| async move {
        let (parts, body) = request.into_parts();
        let found = principal(&parts);
        request = axum::extract::Request::from_parts(parts, body);
        let Some(found) = found else {
            return Err(axum::http::StatusCode::UNAUTHORIZED);
        };
        let name = String::from_utf8_lossy(&found).into_owned();
        request.extensions_mut().insert(Principal(name));
        Ok(next.run(request).await)
    };
    let runs = Runs::new();
    let config = Config::ietf().scope(scope.required());
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(IdempotencyLayer::enforce(MemoryStorage::new()).config(config))
        .layer(middleware::from_fn(authenticate));
    let server = Server::start(router).await;
    let call = |token| {
        server
            .post("/orders")
            .key("abc")
            .header("authorization", token)
    };

    assert_ran(&call("Bearer alice-1").send().await, 1);
    Column::Ietf.assert_replay(&call("Bearer alice-2").send().await, 201, "order 1");
    assert_ran(&call("Bearer bob-1").send().await, 2);
    // Who does not authenticate gets no replay either.
    let stranger = call("nonsense").send().await;
    assert_eq!((stranger.code(), stranger.text()), (401, ""));
}

#[tokio::test]
async fn a_cookie_without_authorization_is_warned_of_once_per_route() {
    let (logs, _guard) = Logs::install();
    let shop = Shop::open(Config::default()).await;
    let warnings = || logs.with(&["WARN", "Scope::cookie"]);
    for (path, so_far) in [
        ("/orders", 1),
        ("/orders", 1),
        ("/orders?page=2", 1),
        ("/payments", 2),
        ("/status/201", 3),
        ("/status/202", 3),
        ("/orders", 3),
    ] {
        let call = shop.server.post(path).key("abc");
        call.header("cookie", "session=alice").send().await;
        assert_eq!(warnings().len(), so_far, "{path}: {:?}", warnings());
    }
    for route in ["\"/orders\"", "\"/payments\"", "\"/status/{status}\""] {
        assert_eq!(
            logs.with(&["WARN", "Scope::cookie", route]).len(),
            1,
            "{route}"
        );
    }
    assert!(logs.with(&["alice"]).is_empty(), "a cookie was logged");
}

#[tokio::test]
async fn a_cookie_is_not_warned_of_where_it_does_not_matter() {
    let (logs, _guard) = Logs::install();
    let cookie = |shop: &Shop| call(shop).header("cookie", "session=alice");

    let with_both = shop(Scope::authorization()).await;
    let both = cookie(&with_both).header("authorization", "Bearer alice");
    assert_ran(&both.send().await, 1);
    // A request that is not protected shares nothing.
    with_both
        .server
        .get("/orders")
        .key("abc")
        .header("cookie", "a=1")
        .send()
        .await;
    for scope in [
        Scope::cookie("session"),
        Scope::none(),
        Scope::header("x-tenant"),
        Scope::from_fn(|_| None),
    ] {
        assert_ran(&cookie(&shop(scope).await).send().await, 1);
    }
    assert!(
        logs.with(&["Scope::cookie"]).is_empty(),
        "{:?}",
        logs.lines()
    );
}
