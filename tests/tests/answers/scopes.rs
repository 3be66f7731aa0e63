//! Whose key it is.

use axum::{
    Router,
    http::request::Parts,
    middleware::{self, Next},
    routing::post,
};
use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage, Scope};
use idempotency_tests::{Call, Logs, Protocol, Runs, Server};

use crate::{Column, Shop, assert_ran, assert_refused};

columns!(
    scope_required_and_absent,
    scope_required_and_present,
    a_caller_that_is_not_found,
    a_cookie_alone
);

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

async fn a_caller_that_is_not_found(column: Column) {
    for scope in [
        Scope::header("x-tenant"),
        Scope::cookie("session"),
        Scope::from_fn(|_| None),
        Scope::from_fn(|_| Some(Vec::new())),
    ] {
        let shop = Shop::open(column.config().scope(scope.clone())).await;
        let answer = call(&shop).header("authorization", "Bearer alice");
        assert_refused(&answer.send().await, 403, "scope-required");
        assert_eq!(shop.runs(), 0, "{scope:?}");

        let shop = Shop::open(column.config().scope(scope.required().or_anonymous())).await;
        assert_ran(&call(&shop).send().await, 1);
        column.assert_replay(&call(&shop).send().await, 201, "order 1");
    }
}

/// The default scope does not know whether it says who calls.
async fn a_cookie_alone(column: Column) {
    let shop = Shop::open(column.config()).await;
    for cookie in ["session=alice", "theme=dark"] {
        let answer = call(&shop).header("cookie", cookie).send().await;
        assert_refused(&answer, 403, "scope-required");
    }
    // What is empty is absent.
    let empty = call(&shop).header("cookie", "a=1").header("x-api-key", "");
    assert_refused(&empty.send().await, 403, "scope-required");
    assert_eq!(shop.runs(), 0);
    let empty = call(&shop).header("cookie", "").send().await;
    assert_ran(&empty, 1);
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

const CREDENTIALS: [&str; 4] = ["authorization", "x-api-key", "api-key", "x-auth-token"];

#[tokio::test]
async fn the_default_tells_callers_apart_by_every_credential() {
    let shop = shop(Scope::default()).await;
    let mut runs = 0;
    for name in CREDENTIALS {
        for value in ["alice", "bob"] {
            runs += 1;
            let call = || call(&shop).header(name, value);
            assert_ran(&call().send().await, runs);
            // As many as there are count together.
            let both = || call().header("x-auth-token", "carol");
            runs += 1;
            assert_ran(&both().send().await, runs);
            let order = format!("order {runs}");
            Column::Ietf.assert_replay(&both().send().await, 201, &order);
        }
    }
    // Who carries none of them is anonymous, and one caller.
    assert_ran(&call(&shop).send().await, runs + 1);
    let order = format!("order {}", runs + 1);
    let anonymous = call(&shop).header("x-tenant", "one").send().await;
    Column::Ietf.assert_replay(&anonymous, 201, &order);
}

#[tokio::test]
async fn authorization_sees_no_api_key() {
    let shop = shop(Scope::authorization()).await;
    assert_ran(&call(&shop).send().await, 1);
    for name in &CREDENTIALS[1..] {
        let keyed = call(&shop).header(name, "alice").send().await;
        Column::Ietf.assert_replay(&keyed, 201, "order 1");
    }
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
    let other = call("xsession=alice; sessions=alice").send().await;
    assert_refused(&other, 403, "scope-required");
    // Other cookies, and where it stands among them, don't matter. Nor does Authorization.
    let retry = call("theme=dark; session=alice; n=1").header("authorization", "Bearer x");
    Column::Ietf.assert_replay(&retry.send().await, 201, "order 1");
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
async fn host_is_the_authority_over_every_protocol() {
    let shop = shop(Scope::header("host")).await;
    let call = |host: &str, protocol| call(&shop).host(host).over(protocol);
    let protocols = [Protocol::Http1, Protocol::Http2];
    for (run, host) in ["one.example", "two.example", "one.example:8443"]
        .into_iter()
        .enumerate()
    {
        assert_ran(&call(host, protocols[run % 2]).send().await, run + 1);
        for protocol in protocols {
            for spelling in [host.to_owned(), host.to_uppercase()] {
                let retry = call(&spelling, protocol).send().await;
                Column::Ietf.assert_replay(&retry, 201, &format!("order {}", run + 1));
            }
        }
    }
    for protocol in protocols {
        for spelling in ["two.example:80", "two.example:443"] {
            let retry = call(spelling, protocol).send().await;
            Column::Ietf.assert_replay(&retry, 201, "order 2");
        }
    }
    assert_eq!(shop.runs(), 3);
}

/// The target of a request counts, as RFC 9112 section 3.2.2 asks, and not the header beside it.
#[tokio::test]
async fn host_of_an_absolute_target() {
    let shop = shop(Scope::header("host")).await;
    assert_ran(&call(&shop).host("one.example").send().await, 1);
    let raw = async |target: &str, hosts: &str| {
        let request = format!(
            "POST {target} HTTP/1.1\r\n{hosts}idempotency-key: abc\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx"
        );
        shop.server.raw(request).await
    };
    for (target, host) in [
        ("http://one.example/orders", "one.example"),
        ("http://one.example/orders", "two.example"),
        ("http://ONE.example:80/orders", "two.example"),
        ("http://two.example@one.example/orders", "two.example"),
    ] {
        let retry = raw(target, &format!("host: {host}\r\n")).await;
        Column::Ietf.assert_replay(&retry, 201, "order 1");
    }
    for hosts in ["host: a\r\nhost: a\r\n", "host: a b\r\n", "host:\r\n", ""] {
        let answer = raw("/orders", hosts).await;
        assert_refused(&answer, 403, "scope-required");
    }
    assert_eq!(shop.runs(), 1);
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

/// Otherwise all callers would be one, and get each other's answers.
#[tokio::test]
async fn authentication_inside_by_mistake_is_refused() {
    let (logs, _guard) = Logs::install();
    let authenticate = |mut request: axum::extract::Request, next: Next| async move {
        let token = request.headers()["authorization"].to_str().unwrap();
        let principal = Principal(token.to_owned());
        request.extensions_mut().insert(principal);
        next.run(request).await
    };
    let scope = Scope::from_fn(|request| {
        let Principal(name) = request.extensions.get()?;
        Some(name.clone().into_bytes())
    });
    let runs = Runs::new();
    let router = Router::new()
        .route("/orders", post(runs.handler()))
        .layer(middleware::from_fn(authenticate))
        .layer(IdempotencyLayer::enforce(MemoryStorage::new()).config(Config::ietf().scope(scope)));
    let server = Server::start(router).await;
    for caller in ["alice", "bob"] {
        let call = server.post("/orders").key("abc");
        let answer = call.header("authorization", caller).send().await;
        assert_refused(&answer, 403, "scope-required");
    }
    assert_eq!(runs.count(), 0);
    let errors = logs.with(&["ERROR", "Scope::from_fn", "outside", ".or_anonymous()"]);
    assert_eq!(errors.len(), 1, "{:?}", logs.lines());
}

/// Sends to each of these paths in turn; after each so many lines with `parts` are there.
async fn assert_logged(shop: &Shop, logs: &Logs, headers: &[(&str, &str)], parts: &[&str]) {
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
        let add = |call: Call, (name, value): &(&str, &str)| call.header(name, value);
        headers.iter().fold(call, add).send().await;
        assert_eq!(logs.with(parts).len(), so_far, "{path}: {:?}", logs.lines());
    }
    for route in ["\"/orders\"", "\"/payments\"", "\"/status/{status}\""] {
        let lines = logs.with(&[parts, &[route]].concat());
        assert_eq!(lines.len(), 1, "{route}");
    }
    assert_eq!(logs.with(&["path"]).len(), 3, "{:?}", logs.lines());
    assert!(logs.with(&["alice"]).is_empty(), "a credential was logged");
}

#[tokio::test]
async fn a_caller_that_is_not_found_is_logged_once_per_route() {
    for (scope, named) in [
        (Scope::header("x-tenant"), "Scope::header(\"x-tenant\")"),
        (Scope::cookie("session"), "Scope::cookie(\"session\")"),
        (Scope::from_fn(|_| None), "Scope::from_fn"),
        (Scope::authorization().required(), "Scope::authorization()"),
    ] {
        let (logs, _guard) = Logs::install();
        let parts = ["ERROR", "403", named, ".or_anonymous()"];
        let cookie = [("cookie", "id=alice")];
        assert_logged(&shop(scope).await, &logs, &cookie, &parts).await;
    }
}

#[tokio::test]
async fn a_cookie_alone_is_logged_once_per_route() {
    let (logs, _guard) = Logs::install();
    let cures = [
        "Scope::cookie",
        "Scope::from_fn",
        "Scope::default().or_anonymous()",
    ];
    let parts = [&["ERROR", "403"][..], &cures].concat();
    let cookie = [("cookie", "session=alice")];
    assert_logged(&shop(Scope::default()).await, &logs, &cookie, &parts).await;
}

#[tokio::test]
async fn a_cookie_beside_a_credential_is_warned_of_once_per_route() {
    for name in CREDENTIALS {
        let (logs, _guard) = Logs::install();
        let parts = ["WARN", "Scope::cookie", "Scope::default().or_anonymous()"];
        let both = [("cookie", "session=alice"), (name, "alice")];
        assert_logged(&shop(Scope::default()).await, &logs, &both, &parts).await;
    }
}

#[tokio::test]
async fn a_cookie_does_not_matter_to_a_chosen_scope() {
    let (logs, _guard) = Logs::install();
    for scope in [
        Scope::authorization(),
        Scope::cookie("session"),
        Scope::none(),
        Scope::header("x-tenant").or_anonymous(),
        Scope::header("authorization"),
        Scope::from_fn(|_| None).or_anonymous(),
        Scope::default().or_anonymous(),
    ] {
        let shop = shop(scope).await;
        let both = call(&shop).header("cookie", "session=alice");
        let both = both.header("authorization", "Bearer alice");
        assert_ran(&both.send().await, 1);
    }
    for scope in [
        Scope::authorization(),
        Scope::none(),
        Scope::default().or_anonymous(),
    ] {
        let shop = shop(scope).await;
        let alone = |session| call(&shop).header("cookie", session);
        assert_ran(&alone("session=alice").send().await, 1);
        let other = alone("session=bob").send().await;
        Column::Ietf.assert_replay(&other, 201, "order 1");
    }
    assert!(logs.with(&["Scope::"]).is_empty(), "{:?}", logs.lines());
}

/// It shares nothing.
#[tokio::test]
async fn a_cookie_does_not_matter_to_an_unprotected_request() {
    let (logs, _guard) = Logs::install();
    let shop = shop(Scope::default()).await;
    let call = shop.server.get("/orders").key("abc");
    let answer = call.header("cookie", "session=alice").send().await;
    assert_ran(&answer, 1);
    let without_key = shop.server.post("/orders");
    let answer = without_key.header("cookie", "session=alice").send().await;
    assert_refused(&answer, 400, "missing-key");
    assert!(logs.with(&["Scope::"]).is_empty(), "{:?}", logs.lines());
}
