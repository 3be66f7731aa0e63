//! How much memory bodies take, however small their frames: that of a request at most twice its size, and an answer that streams
//! while its client does not read at most twice the limit, however large it is.
//!
//! The service is asked without a connection, so that no buffer but ours counts.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    convert::Infallible,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    response::Response,
    routing::post,
};
use futures_util::{Stream, StreamExt, stream};
use http::StatusCode;
use http_body_util::BodyExt;
use idempotency_axum::{Config, IdempotencyLayer, MemoryStorage};
use idempotency_tests::Events;
use tower::ServiceExt;

/// Knows how much is allocated, and how much was at most, each thread for itself: tests that run beside one another don't
/// disturb it, and all tasks of a test run on its thread.
struct Measuring;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: usize) {
    let live = LIVE.get() + bytes as isize;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

fn discount(bytes: usize) {
    LIVE.set(LIVE.get() - bytes as isize);
}

// SAFETY: every call goes to the system's allocator as it came. The counters are constant-initialised thread locals without a
// destructor, so counting neither allocates nor fails.
unsafe impl GlobalAlloc for Measuring {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    /// In the worst case the old place and the new one are there together.
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count(new_size);
        discount(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, new_size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        discount(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Measuring = Measuring;

const KIB: usize = 1 << 10;
const LIMIT: usize = 1 << 20;
/// What a request may take besides the bytes of its body or its answer: futures, headers, lists of frames.
const BESIDES: usize = 16 * KIB;

/// Frames of these lengths, made when they are asked for, each in an allocation of its own.
fn frames(
    lengths: impl Iterator<Item = usize> + Send + 'static,
) -> impl Stream<Item = Bytes> + Send + 'static {
    stream::iter(lengths.map(|length| Bytes::from(vec![b'x'; length])))
}

/// The same after a pause: not there at once, so it is recorded while its client could read.
fn after_a_pause(
    frames: impl Stream<Item = Bytes> + Send + 'static,
) -> impl Stream<Item = Bytes> + Send + 'static {
    let pause = stream::once(async {
        tokio::task::yield_now().await;
        Bytes::new()
    });
    pause.chain(frames)
}

struct Measured {
    /// The most that was allocated at a time, beyond what was before the request.
    peak: usize,
    /// How much the client got.
    length: usize,
    is_recorded: bool,
}

/// Runs a request whose client first does not read, then reads a frame, takes a rest, and reads all.
async fn measure<S>(answer: impl Fn() -> S + Clone + Send + Sync + 'static) -> Measured
where
    S: Stream<Item = Bytes> + Send + 'static,
{
    let events = Events::new();
    let config = Config::default()
        .max_response_body(LIMIT)
        .observer(events.clone());
    let layer = IdempotencyLayer::enforce(MemoryStorage::new()).config(config);
    let handler = move || {
        let body = Body::from_stream(answer().map(Ok::<_, Infallible>));
        std::future::ready(body)
    };
    let small = async || body(1..3);
    let app = Router::new()
        .route("/measured", post(handler))
        .route("/warm-up", post(small))
        .layer(layer);
    let app: Router = app.with_state(());

    // What is made once is made before.
    for key in ["a", "b"] {
        let answer = ask(&app, "/warm-up", key).await.into_body();
        answer.collect().await.expect("a whole answer");
    }
    let before = LIVE.get();
    PEAK.set(before);

    let answer = ask(&app, "/measured", "abc").await;
    assert_eq!(answer.status(), StatusCode::OK);
    let mut body = answer.into_body();
    let mut length = 0;
    // All tasks run on this thread, so each has its turn and comes as far as it can.
    rest().await;
    if let Some(frame) = body.frame().await {
        length += frame.expect("data").into_data().expect("data").len();
    }
    rest().await;
    while let Some(frame) = body.frame().await {
        length += frame.expect("data").into_data().expect("data").len();
    }
    let peak = usize::try_from(PEAK.get() - before).expect("a peak is above");

    let retry = ask(&app, "/measured", "abc").await;
    Measured {
        peak,
        length,
        is_recorded: retry.headers().contains_key("idempotency-replayed"),
    }
}

async fn rest() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

async fn ask(app: &Router, path: &str, key: &str) -> Response {
    let request = Request::post(path).header("idempotency-key", key);
    let request = request.body(Body::empty()).expect("a valid request");
    let Ok(response) = app.clone().oneshot(request).await;
    response
}

/// Frames of these lengths take no more than they may, there at once or after a pause.
async fn assert_bounded<I>(lengths: impl Fn() -> I + Clone + Send + Sync + 'static)
where
    I: Iterator<Item = usize> + Send + 'static,
{
    let total: usize = lengths().sum();
    let at_once = lengths.clone();
    let measured = [
        measure(move || frames(at_once())).await,
        measure(move || after_a_pause(frames(lengths()))).await,
    ];
    for measured in measured {
        assert_eq!(measured.length, total);
        assert_eq!(measured.is_recorded, total <= LIMIT);
        let peak = measured.peak;
        assert!(peak > LIMIT, "{peak}: it was held");
        assert!(peak <= 2 * LIMIT + BESIDES, "{peak}");
    }
}

#[tokio::test]
async fn an_answer_of_five_times_the_limit() {
    assert_bounded(|| std::iter::repeat_n(64 * KIB, 5 * LIMIT / (64 * KIB))).await;
}

#[tokio::test]
async fn an_answer_of_five_times_the_limit_in_small_frames() {
    assert_bounded(|| std::iter::repeat_n(100, 5 * LIMIT / 100)).await;
}

#[tokio::test]
async fn an_answer_at_the_limit_in_frames_of_one_byte() {
    assert_bounded(|| std::iter::repeat_n(1, LIMIT)).await;
}

#[tokio::test]
async fn an_answer_over_the_limit_in_frames_of_one_byte() {
    assert_bounded(|| std::iter::repeat_n(1, LIMIT + 1)).await;
}

#[tokio::test]
async fn an_answer_at_the_limit_in_one_frame() {
    assert_bounded(|| std::iter::once(LIMIT)).await;
}

/// Whatever is copied together, it is not there three times.
#[tokio::test]
async fn an_answer_at_the_limit_in_two_frames() {
    for first in [1, LIMIT / 4, LIMIT / 2, LIMIT - LIMIT / 4, LIMIT - 1] {
        assert_bounded(move || [first, LIMIT - first].into_iter()).await;
    }
}

#[tokio::test]
async fn an_answer_at_the_limit_in_three_frames() {
    for [first, second] in [[50, 25], [44, 2], [2, 44], [45, 54]] {
        let [first, second] = [first * LIMIT / 100, second * LIMIT / 100];
        let third = LIMIT - first - second;
        assert_bounded(move || [first, second, third].into_iter()).await;
    }
}

fn body(lengths: impl Iterator<Item = usize> + Send + 'static) -> Body {
    Body::from_stream(after_a_pause(frames(lengths)).map(Ok::<_, Infallible>))
}

/// The most that a request with a body of these frames takes, beyond what was before it.
async fn peak_of_request(
    frame_lengths: impl Iterator<Item = usize> + Clone + Send + 'static,
) -> usize {
    let layer = IdempotencyLayer::enforce(MemoryStorage::new());
    let length = |body: Bytes| std::future::ready(body.len().to_string());
    let app = Router::new().route("/length", post(length)).layer(layer);
    let app: Router = app.with_state(());
    let send = async |key, body| {
        let request = Request::post("/length").header("idempotency-key", key);
        let Ok(response) = app
            .clone()
            .oneshot(request.body(body).expect("a request"))
            .await;
        let length = response.into_body().collect().await;
        length.expect("an answer").to_bytes()
    };
    // What is made once is made before.
    for key in ["a", "b"] {
        send(key, body(1..3)).await;
    }
    let before = LIVE.get();
    PEAK.set(before);
    let length = send("abc", body(frame_lengths.clone())).await;
    assert_eq!(length, frame_lengths.sum::<usize>().to_string());
    usize::try_from(PEAK.get() - before).expect("a peak is above")
}

async fn assert_at_most_twice(size: usize, frame: usize) {
    let nothing = peak_of_request(std::iter::empty()).await;
    assert!(nothing < 64 * KIB, "{nothing}");
    let rest = size % frame;
    let frames = std::iter::repeat_n(frame, size / frame).chain((rest > 0).then_some(rest));
    let peak = peak_of_request(frames).await;
    assert!(peak > size, "{peak}: it was held");
    assert!(peak <= 2 * size + nothing, "{size} by {frame}: {peak}");
}

/// Also while it grows, and while it is joined.
#[tokio::test]
async fn a_request_body_in_frames_of_one_byte() {
    for size in [1 << 20, 100_000] {
        assert_at_most_twice(size, 1).await;
    }
}

#[tokio::test]
async fn a_request_body_in_larger_frames() {
    for size in [1 << 20, (1 << 20) + 1, (1 << 20) - 1, 3 << 19, 100_000] {
        for frame in [1000, 64 * KIB, size / 3, size / 2, size - 1, size] {
            assert_at_most_twice(size, frame).await;
        }
    }
}
