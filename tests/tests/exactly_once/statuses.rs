//! What the status of an answer decides.

use axum::http::StatusCode;
use idempotency_axum::{DoNotRecord, StoreOn};
use idempotency_tests::Runs;

use super::shop::*;

on_each_database!(
    success_commits_order_and_record,
    success_is_recorded_whatever_store_on_says,
    a_redirect_is_recorded_as_a_success,
    an_unstored_error_leaves_nothing,
    a_stored_error_undoes_writes_and_is_recorded,
    kept_writes_are_recorded_with_any_status,
    do_not_record_leaves_nothing,
    a_panic_leaves_nothing,
    a_panic_where_500_is_stored_leaves_a_tombstone,
    an_error_of_the_driver_leaves_nothing,
    the_next_request_sees_no_trace_of_an_undone_one,
);

/// A handler that writes an order and answers with `status`; and how often it ran.
fn answering<D: Database>(shop: &Shop<D>, store_on: StoreOn, status: u16) -> (App, Runs) {
    let runs = Runs::new();
    let status = StatusCode::from_u16(status).unwrap();
    let counted = runs.clone();
    let app = shop.app_with(config().store_on(store_on), async move |mut tx: Tx<D>| {
        let run = counted.next();
        let order = D::order(&mut tx, "answered").await.unwrap();
        let note = [("x-note", format!("run {run}"))];
        (status, note, format!("order {order}"))
    });
    (app, runs)
}

async fn success_commits_order_and_record<D: Database>() {
    let shop = D::start().await;
    let (app, runs) = answering(&shop, StoreOn::success(), 201);
    let first = app.post("k").await;
    assert_status(&first, 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    for _ in 0..3 {
        assert_repeats(&app.post("k").await, &first);
    }
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    assert_status(&app.post("another").await, 201);
    assert_eq!(runs.count(), 2);
}

async fn success_is_recorded_whatever_store_on_says<D: Database>() {
    let shop = D::start().await;
    let (app, runs) = answering(&shop, StoreOn::statuses([StatusCode::OK]), 201);
    let first = app.post("k").await;
    assert_status(&first, 201);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!((shop.orders().await, runs.count()), (1, 1));
}

async fn a_redirect_is_recorded_as_a_success<D: Database>() {
    let shop = D::start().await;
    let (app, runs) = answering(&shop, StoreOn::success(), 303);
    let first = app.post("k").await;
    assert_status(&first, 303);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!((shop.orders().await, runs.count()), (1, 1));
}

async fn an_unstored_error_leaves_nothing<D: Database>() {
    let shop = D::start().await;
    let (app, runs) = answering(&shop, StoreOn::success(), 422);
    for run in 1..=3 {
        assert_status(&app.post("k").await, 422);
        assert_eq!(runs.count(), run);
        assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    }
}

async fn a_stored_error_undoes_writes_and_is_recorded<D: Database>() {
    let shop = D::start().await;
    let (app, runs) = answering(&shop, StoreOn::below(500), 422);
    let first = app.post("k").await;
    assert_status(&first, 422);
    assert_eq!((shop.orders().await, shop.records().await), (0, 1));
    assert_repeats(&app.post("k").await, &first);
    assert_eq!((shop.orders().await, runs.count()), (0, 1));
}

async fn kept_writes_are_recorded_with_any_status<D: Database>() {
    let shop = D::start().await;
    let runs = Runs::new();
    let counted = runs.clone();
    let app = shop.app(async move |mut tx: Tx<D>| {
        counted.next();
        D::order(&mut tx, "refused").await.unwrap();
        tx.keep_writes();
        (StatusCode::UNPROCESSABLE_ENTITY, "refused")
    });
    let first = app.post("k").await;
    assert_status(&first, 422);
    assert_repeats(&app.post("k").await, &first);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
    assert_eq!(runs.count(), 1);
}

async fn do_not_record_leaves_nothing<D: Database>() {
    let shop = D::start().await;
    let app = shop.app(async move |mut tx: Tx<D>| {
        D::order(&mut tx, "a try").await.unwrap();
        (CREATED, DoNotRecord, "a try")
    });
    for _ in 0..2 {
        assert_status(&app.post("k").await, 201);
        assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    }
}

/// A service whose handler panics in its first run.
fn panicking<D: Database>(shop: &Shop<D>, store_on: StoreOn) -> App {
    let runs = Runs::new();
    shop.app_with(config().store_on(store_on), async move |mut tx: Tx<D>| {
        D::order(&mut tx, "panicked").await.unwrap();
        assert!(runs.next() > 1, "a handler that panics");
        (CREATED, "order")
    })
}

async fn a_panic_leaves_nothing<D: Database>() {
    let shop = D::start().await;
    let app = panicking(&shop, StoreOn::success());
    assert_status(&app.post("k").await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    assert_status(&app.post("k").await, 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

async fn a_panic_where_500_is_stored_leaves_a_tombstone<D: Database>() {
    let shop = D::start().await;
    let app = panicking(&shop, StoreOn::all());
    assert_status(&app.post("k").await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 1));
    assert_tombstone(&app.post("k").await);
    assert_eq!(shop.orders().await, 0);
}

async fn an_error_of_the_driver_leaves_nothing<D: Database>() {
    let shop = D::start().await;
    let runs = Runs::new();
    let app = shop.app(async move |mut tx: Tx<D>| {
        let order = D::order(&mut tx, "failed").await?;
        if runs.next() == 1 {
            D::execute(&mut tx, "INSERT INTO nowhere VALUES (1)").await?;
        }
        Ok::<_, Failed>((CREATED, order.to_string()))
    });
    assert_status(&app.post("k").await, 500);
    assert_eq!((shop.orders().await, shop.records().await), (0, 0));
    assert_status(&app.post("k").await, 201);
    assert_eq!((shop.orders().await, shop.records().await), (1, 1));
}

async fn the_next_request_sees_no_trace_of_an_undone_one<D: Database>() {
    let shop = D::start().await;
    let (refused, _) = answering(&shop, StoreOn::below(500), 422);
    let (app, _) = answering(&shop, StoreOn::success(), 201);
    for n in 0..5 {
        assert_status(&refused.post(&format!("refused {n}")).await, 422);
        assert_status(&app.post(&format!("k{n}")).await, 201);
    }
    assert_eq!((shop.orders().await, shop.records().await), (5, 10));
}
