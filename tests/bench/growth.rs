//! What grows: records, requests that wait for one key, cores, and the memory of records.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::Request, routing::post};
use idempotency_axum::{Config, IdempotencyLayer, LockPolicy};
use tokio::{
    runtime::{self, Runtime},
    sync::Notify,
    task::{JoinSet, yield_now},
};

use crate::{
    apps::{Floor, Key, Load, UNLIMITED, bare, memory, protected, send, weight},
    heap,
    measure::{Case, Rounds, Spread, WARM_UP, alternate, cpu},
    on_one_thread,
    report::{Limit, Report},
};

const SIZE: usize = 256;

/// First executions on storages that hold so many records and evict one for each new one, as the floor's cache does.
pub fn records(report: &mut Report) {
    let runtime = on_one_thread();
    let weight = weight(SIZE);
    let mut bare = Load::new(bare().with_state(()), SIZE).key(Key::Fresh);
    let bare = |count| runtime.block_on(bare.send(count));
    let mut cases: Vec<Case<'_>> = vec![("bare".to_owned(), Box::new(bare))];
    for exponent in 3..=6 {
        let records = 10_usize.pow(exponent);
        let storage = memory(records * weight);
        let mut load = Load::new(protected(storage.clone()), SIZE).key(Key::Fresh);
        let mut ours = {
            let runtime = &runtime;
            move |count| runtime.block_on(load.send(count))
        };
        let floor = Floor::new(records * weight, weight);
        let (of, body) = (floor.clone(), vec![b'x'; SIZE]);
        let mut next: u64 = 0;
        let mut floored = move |count| {
            for _ in 0..count {
                of.first(&next.to_be_bytes(), &body);
                next += 1;
            }
        };
        let enough = records as u64 * 21 / 20;
        ours(enough);
        floored(enough);
        for held in [storage.records(), floor.records()] {
            let part = held as f64 / records as f64;
            assert!((0.9..=1.1).contains(&part), "{held} of {records}");
        }
        cases.push((format!("first, 10^{exponent}"), Box::new(ours)));
        cases.push((format!("floor, 10^{exponent}"), Box::new(floored)));
    }
    let times = alternate(&mut cases, 2000, 30).cpu;

    report.group("records");
    for name in times.names() {
        report.row(name, "ns", times.spread(name));
    }
    let ratio = |of: &dyn Fn(&str) -> f64, exponent: u32| {
        let first = of(&format!("first, 10^{exponent}")) - of("bare");
        first / of(&format!("floor, 10^{exponent}"))
    };
    for exponent in 3..=6 {
        let ratio = times.each(|of| ratio(of, exponent));
        report.row(&format!("first / floor, 10^{exponent} records"), "×", ratio);
    }
    let growth = times.each(|of| ratio(of, 6) / ratio(of, 3));
    let limit = Some(Limit::AtMost(1.15));
    report.limited("10^6 over 10^3 records", "×", growth, limit);
}

/// So many duplicates wait for an operation, and get its answer when it ends.
pub fn waiters(report: &mut Report) {
    let runtime = on_one_thread();
    let crowd = Crowd::new();
    let counts = [0, 1, 10, 100, 1000, 10_000];
    let mut rounds = Rounds::default();
    for round in 0..WARM_UP + 16 {
        for count in counts {
            // Small crowds are called together more often, or a round would be a few microseconds.
            let times = (1000 / count.max(1)).clamp(1, 100);
            let took = runtime.block_on(async {
                let mut took = 0.0;
                for _ in 0..times {
                    took += crowd.wait(count).await;
                }
                took / times as f64
            });
            if round >= WARM_UP {
                rounds.add(&count.to_string(), took);
            }
        }
    }
    report.group("waiters");
    let each = |of: &dyn Fn(&str) -> f64, count: usize| {
        (of(&count.to_string()) - of("0")) / count as f64 / 1e3
    };
    for count in &counts[1..] {
        let name = format!("CPU of each of {count}");
        let limit = Some(Limit::AtMost(12.0));
        report.limited(&name, "µs", rounds.each(|of| each(of, *count)), limit);
    }
    let growth = rounds.each(|of| each(of, 10_000) / each(of, 100));
    report.row("each of 10000 over each of 100", "×", growth);
}

/// An operation that ends when it is told, and those who wait for it.
struct Crowd {
    layer: IdempotencyLayer,
    app: Router,
    end: Arc<Notify>,
    next: Cell<u64>,
}

impl Crowd {
    fn new() -> Self {
        let patient = LockPolicy::default().timeout(Duration::from_secs(60));
        let layer =
            IdempotencyLayer::enforce(memory(UNLIMITED)).config(Config::ietf().lock(patient));
        let end = Arc::new(Notify::new());
        let ends = end.clone();
        let handler = async move || {
            ends.notified().await;
            "done"
        };
        let app = Router::new().route("/orders", post(handler));
        let app = app.layer(layer.clone()).with_state(());
        Self {
            layer,
            app,
            end,
            next: 0.into(),
        }
    }

    /// The CPU time from before the first one waits until all have the answer.
    async fn wait(&self, count: usize) -> f64 {
        let engine = self.layer.engine();
        let key = self.next.replace(self.next.get() + 1);
        let request = || {
            let request = Request::post("/orders");
            let request = request.header("idempotency-key", format!("key-{key}"));
            let body = Body::from(vec![b'x'; SIZE]);
            request.body(body).expect("a valid request")
        };
        let mut requests = JoinSet::new();
        while engine.running() > 0 {
            yield_now().await;
        }
        requests.spawn(send(self.app.clone(), request()));
        while engine.running() == 0 {
            yield_now().await;
        }
        let since = cpu();
        for _ in 0..count {
            requests.spawn(send(self.app.clone(), request()));
        }
        while engine.waiting() < count {
            yield_now().await;
        }
        self.end.notify_one();
        while let Some(status) = requests.join_next().await {
            assert_eq!(status.expect("an answer"), 200);
        }
        cpu() - since
    }
}

/// First executions on a runtime of one worker, and of two.
pub fn cores(report: &mut Report) {
    let runtimes = [1, 2].map(|workers| {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .build();
        (workers, runtime.expect("a runtime"))
    });
    let apps = [
        ("bare", bare().with_state(())),
        ("first", protected(memory(64 << 20))),
    ];
    let mut rounds = Rounds::default();
    let mut next = 0;
    for round in 0..WARM_UP + 40 {
        for (workers, runtime) in &runtimes {
            for (name, app) in &apps {
                let each = if *name == "bare" { 20_000 } else { 5_000 };
                let rate = rate(runtime, *workers, app, each, &mut next);
                if round >= WARM_UP {
                    rounds.add(&format!("{name}, {workers}"), rate);
                }
            }
        }
    }
    report.group("cores");
    for name in rounds.names() {
        report.row(name, "/s", rounds.spread(name));
    }
    for name in ["bare", "first"] {
        let scaling = rounds.each(|of| of(&format!("{name}, 2")) / of(&format!("{name}, 1")));
        report.row(&format!("{name}, 1 to 2 cores"), "×", scaling);
    }
    let ratio = rounds.each(|of| of("first, 2") / of("first, 1") / (of("bare, 2") / of("bare, 1")));
    let limit = Some(Limit::AtLeast(0.9));
    report.limited("scaling over bare's", "×", ratio, limit);
}

/// Requests in a second, by the clock on the wall, of four tasks for each worker.
fn rate(runtime: &Runtime, workers: usize, app: &Router, each: u64, next: &mut u64) -> f64 {
    let tasks = 4 * workers as u64;
    let first_key = *next;
    *next += tasks * each;
    let since = Instant::now();
    runtime.block_on(async {
        let mut set = JoinSet::new();
        for task in 0..tasks {
            let load = Load::new(app.clone(), SIZE).key(Key::Fresh);
            let mut load = load.keys_from(first_key + task * each);
            set.spawn(async move { load.send(each).await });
        }
        while let Some(done) = set.join_next().await {
            done.expect("requests without a panic");
        }
    });
    (tasks * each) as f64 / since.elapsed().as_secs_f64()
}

/// What lies on the heap for a record beside the body that it replays.
pub fn memory_of_records(report: &mut Report) {
    const RECORDS: u64 = 100_000;
    let runtime = on_one_thread();
    report.group("memory");
    for (name, size) in [("256 B", 256), ("4 KiB", 4 << 10)] {
        // What a process allocates once is there before.
        runtime.block_on(
            Load::new(protected(memory(UNLIMITED)), size)
                .key(Key::Fresh)
                .send(10),
        );
        let grown = heap::grown(|| {
            let app = protected(memory(UNLIMITED));
            let mut load = Load::new(app, size).key(Key::Fresh);
            runtime.block_on(load.send(RECORDS));
            load
        });
        let each = grown as f64 / RECORDS as f64 - size as f64;
        let name = format!("a record beside its body of {name}");
        let limit = Some(Limit::AtMost(450.0));
        report.limited(&name, "B", Spread::once(each), limit);
    }
}
