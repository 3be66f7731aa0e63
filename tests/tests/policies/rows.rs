//! The rows of the table, with combinators.

use axum::{extract::State, http::StatusCode, response::IntoResponse};
use idempotency_axum::{IdempotencyHandler, KeyPolicy, ManualIdempotency};
use idempotency_tests::Runs;

use crate::{assert_ran, assert_refused, modes, optional, serve};

pub(crate) async fn order(State(runs): State<Runs>) -> (StatusCode, String) {
    (StatusCode::CREATED, format!("order {}", runs.next()))
}

#[tokio::test]
async fn idempotency_key() {
    for layer in modes() {
        let handler = order.idempotency_key(KeyPolicy::required());
        serve(layer(), handler).await.assert_required().await;
    }
}

#[tokio::test]
async fn idempotency_key_optional() {
    for layer in modes() {
        let handler = order.idempotency_key(optional());
        serve(layer(), handler).await.assert_optional().await;
    }
}

#[tokio::test]
async fn idempotency_exempt() {
    for layer in modes() {
        let handler = order.idempotency_exempt();
        serve(layer(), handler).await.assert_exempt().await;
    }
}

#[tokio::test]
async fn idempotency_key_exempt_as_a_policy() {
    for layer in modes() {
        let handler = order.idempotency_key(KeyPolicy::exempt());
        serve(layer(), handler).await.assert_exempt().await;
    }
}

/// What a manual handler was given.
pub(crate) async fn manual(
    State(runs): State<Runs>,
    manual: ManualIdempotency,
) -> impl IntoResponse {
    let run = runs.next();
    let Some(last) = manual.response() else {
        let exists = manual.exists();
        return (
            StatusCode::CREATED,
            format!("order {run}, exists: {exists}"),
        );
    };
    assert!(manual.exists());
    let body = std::str::from_utf8(last.body()).unwrap();
    let content_type = last.headers()["content-type"].to_str().unwrap().to_owned();
    // An answer that is not stored, so that the record stays.
    let answer = format!("run {run} after {} {content_type} {body:?}", last.status());
    (StatusCode::CONFLICT, answer)
}

#[tokio::test]
async fn manual_idempotency() {
    for layer in modes() {
        let handler = manual.idempotency_key(KeyPolicy::required().manual());
        let served = serve(layer(), handler).await;
        assert_refused(&served.post(None).await, 400, "missing-key");
        let first = served.post(Some("abc")).await;
        assert_eq!(
            (first.code(), first.text()),
            (201, "order 1, exists: false")
        );
        for run in 2..=3 {
            let retry = served.post(Some("abc")).await;
            let last = "201 Created text/plain; charset=utf-8 \"order 1, exists: false\"";
            assert_eq!(retry.code(), 409);
            assert_eq!(retry.text(), format!("run {run} after {last}"));
        }
        let other = served.post(Some("def")).await;
        assert_eq!(other.text(), "order 4, exists: false");
    }
}

/// `ReplayedResponse` is an answer.
#[tokio::test]
async fn manual_idempotency_answers_with_what_is_stored() {
    async fn replay(State(runs): State<Runs>, manual: ManualIdempotency) -> impl IntoResponse {
        let run = runs.next();
        match manual.response() {
            Some(last) => last.with_status(StatusCode::CONFLICT).into_response(),
            None => {
                let location = [("location", format!("/orders/{run}"))];
                (StatusCode::CREATED, location, format!("order {run}")).into_response()
            }
        }
    }
    for layer in modes() {
        let handler = replay.idempotency_key(KeyPolicy::required().manual());
        let served = serve(layer(), handler).await;
        let first = served.post(Some("abc")).await;
        let retry = served.post(Some("abc")).await;
        assert_ran(&first, 1);
        assert_eq!((retry.code(), retry.text()), (409, "order 1"));
        assert_eq!(retry.header("location"), Some("/orders/1"));
        assert_eq!(served.runs.count(), 2);
    }
}

#[tokio::test]
async fn manual_idempotency_with_an_optional_key() {
    let either = |State(runs): State<Runs>, manual: Option<ManualIdempotency>| async move {
        let exists = manual.map(|manual| manual.exists());
        (
            StatusCode::CREATED,
            format!("order {} {exists:?}", runs.next()),
        )
    };
    for layer in modes() {
        let handler = either.idempotency_key(optional().manual());
        let served = serve(layer(), handler).await;
        assert_eq!(served.post(None).await.text(), "order 1 None");
        assert_eq!(served.post(Some("abc")).await.text(), "order 2 Some(false)");
        assert_eq!(served.post(Some("abc")).await.text(), "order 3 Some(true)");
    }
}
